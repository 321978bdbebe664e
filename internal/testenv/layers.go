package testenv

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// layerWriter writes one image layer as a tar stream.
type layerWriter struct {
	tw    *tar.Writer
	links map[inodeKey]string // of files with several names: the first name written
	dirs  map[string]bool     // directories that addFile has written
}

type inodeKey struct{ dev, ino uint64 }

func newLayerWriter(w io.Writer) *layerWriter {
	return &layerWriter{tw: tar.NewWriter(w), links: map[inodeKey]string{}, dirs: map[string]bool{}}
}

// entry is what layers that are written by hand consist of.
type entry struct {
	name         string // without slashes at its ends
	typ          byte   // a tar type flag; zero is a regular file
	mode         int64  // the twelve permission bits
	uid, gid     int
	mtime        time.Time
	link         string // target of a symlink, or the other name of a hard link
	major, minor int64  // of a device
	data         []byte // of a regular file
	xattrs       map[string]string
}

func (l *layerWriter) add(e entry) error {
	h := &tar.Header{
		Typeflag: e.typ, Name: e.name, Linkname: e.link, Size: int64(len(e.data)),
		Mode: e.mode, Uid: e.uid, Gid: e.gid, ModTime: e.mtime,
		Devmajor: e.major, Devminor: e.minor, Format: tar.FormatPAX,
	}
	switch e.typ {
	case 0:
		h.Typeflag = tar.TypeReg
	case tar.TypeDir:
		h.Name += "/"
	}
	setXattrs(h, e.xattrs)
	if err := l.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("layer entry %s: %w", e.name, err)
	}
	_, err := l.tw.Write(e.data)
	return err
}

func setXattrs(h *tar.Header, xattrs map[string]string) {
	for name, value := range xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

// addDiff writes what turns the tree at old into the tree at new: files that
// were added or changed, and whiteouts for those removed. An empty old writes
// the whole tree. As in an engine's own diff, size, times and attributes tell
// whether a file has changed.
func (l *layerWriter) addDiff(old, new string) error {
	return filepath.WalkDir(new, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(new, path)
		if err != nil {
			return err
		}
		var before string
		if old != "" {
			before = filepath.Join(old, name)
		}
		if same, err := sameFile(before, path); err != nil {
			return err
		} else if !same && name != "." {
			if err := l.addParents(new, name); err != nil {
				return err
			}
			if err := l.addFile(path, name); err != nil {
				return fmt.Errorf("layer entry %s: %w", name, err)
			}
		}
		if d.IsDir() && before != "" {
			return l.addWhiteouts(old, new, name)
		}
		return nil
	})
}

// addParents writes the directories above name that are not in the layer yet:
// an engine gives a directory that it has to invent a mode of its own.
func (l *layerWriter) addParents(root, name string) error {
	dir := filepath.Dir(name)
	if dir == "." || l.dirs[dir] {
		return nil
	}
	if err := l.addParents(root, dir); err != nil {
		return err
	}
	return l.addFile(filepath.Join(root, dir), dir)
}

// addWhiteouts removes from directory name what the tree at old has there and
// the one at new lacks.
func (l *layerWriter) addWhiteouts(old, new, name string) error {
	oldDir, newDir := filepath.Join(old, name), filepath.Join(new, name)
	if info, err := os.Lstat(oldDir); err != nil || !info.IsDir() {
		return nil
	}
	entries, err := os.ReadDir(oldDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := os.Lstat(filepath.Join(newDir, e.Name())); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		white := filepath.Join(name, ".wh."+e.Name())
		if err := l.addParents(new, white); err != nil {
			return err
		}
		if err := l.add(entry{name: white}); err != nil {
			return err
		}
	}
	return nil
}

// sameFile reports whether before and after look the same to lstat.
func sameFile(before, after string) (bool, error) {
	if before == "" {
		return false, nil
	}
	var a, b unix.Stat_t
	if err := unix.Lstat(before, &a); err != nil {
		return false, nil
	}
	if err := unix.Lstat(after, &b); err != nil {
		return false, fmt.Errorf("lstat %s: %w", after, err)
	}
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev {
		return false, nil
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return true, nil
	case unix.S_IFLNK:
		x, err := os.Readlink(before)
		if err != nil {
			return false, err
		}
		y, err := os.Readlink(after)
		return x == y, err
	}
	return a.Size == b.Size && a.Mtim == b.Mtim, nil
}

// addFile writes the file at path as name.
func (l *layerWriter) addFile(path, name string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	var target string
	if info.Mode().Type() == fs.ModeSymlink {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	if info.Mode().Type() == fs.ModeSocket {
		return nil // a layer cannot hold one
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name = name
	if info.IsDir() {
		h.Name += "/"
		l.dirs[name] = true
	}
	// An engine's layers carry whole seconds, owners as numbers, no access
	// times.
	h.ModTime, h.AccessTime, h.ChangeTime = h.ModTime.Truncate(time.Second), time.Time{}, time.Time{}
	h.Uname, h.Gname = "", ""

	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if !info.IsDir() && st.Nlink > 1 {
		key := inodeKey{st.Dev, st.Ino}
		if first, ok := l.links[key]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return l.tw.WriteHeader(h)
		}
		l.links[key] = name
	}
	xattrs, err := readXattrs(path)
	if err != nil {
		return err
	}
	setXattrs(h, xattrs)
	if err := l.tw.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(l.tw, f)
	return err
}

func readXattrs(path string) (map[string]string, error) {
	list := make([]byte, 64<<10) // the kernel's limit of a list
	n, err := unix.Llistxattr(path, list)
	if err != nil || n == 0 {
		return nil, err
	}
	xattrs := map[string]string{}
	value := make([]byte, 64<<10) // and of a value
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list[:n], []byte{0}), []byte{0}) {
		n, err := unix.Lgetxattr(path, string(name), value)
		if err != nil {
			return nil, fmt.Errorf("attribute %s: %w", name, err)
		}
		xattrs[string(name)] = string(value[:n])
	}
	return xattrs, nil
}

func (l *layerWriter) close() error { return l.tw.Close() }

// capability is the security.capability attribute that gives one file
// capability, permitted and effective (VFS_CAP_REVISION_2).
func capability(number uint) string {
	const revision2Effective = "\x01\x00\x00\x02"
	var permitted [16]byte
	permitted[number/8%4+number/32*8] = 1 << (number % 8)
	return revision2Effective + string(permitted[:])
}

// accessACL is the system.posix_acl_access attribute of a file with mode 0640
// that one more user may read.
func accessACL(user uint32) string {
	type ace struct {
		tag, perm uint16
		id        uint32
	}
	const (
		userObj, userTag, groupObj, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
		none                                    = 0xffffffff
	)
	b := []byte{2, 0, 0, 0} // version
	for _, e := range []ace{{userObj, 6, none}, {userTag, 4, user}, {groupObj, 4, none}, {mask, 4, none}, {other, 0, none}} {
		b = append(b, byte(e.tag), byte(e.tag>>8), byte(e.perm), byte(e.perm>>8),
			byte(e.id), byte(e.id>>8), byte(e.id>>16), byte(e.id>>24))
	}
	return string(b)
}
