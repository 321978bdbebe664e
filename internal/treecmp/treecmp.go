// Package treecmp answers whether two root filesystems are the same, wherever
// each stands: in a directory of this machine, a mount, or a tree in memory.
//
// A [Manifest] notes of every file what a program can see of it: type and
// mode, owner, size, content, times of modification, extended attributes,
// device numbers, symlink targets, and which names are one inode. [Diff] says
// in words where two manifests differ.
package treecmp

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// Manifest holds an Entry for every path. Paths begin with "/", which is the
// root itself.
type Manifest map[string]Entry

// Entry is what is seen of one file.
type Entry struct {
	Mode      uint32 // st_mode
	UID, GID  uint32
	Nlink     uint32
	Rdev      uint64
	Size      int64 // bytes; 0 of all but regular files
	MtimeSec  int64
	MtimeNsec uint32
	Target    string            // of a symlink
	Xattrs    map[string]string // trusted.overlay.* apart: these belong to a mount, not to a file
	Content   [sha256.Size]byte // of a regular file; see contentSum
	Link      string            // the first path, in the order of a walk, that is the same inode
}

// Tree makes the manifest of a tree and reads all its files.
func Tree(t *tree.Tree) (Manifest, error) {
	m := Manifest{}
	first := map[*tree.Inode]string{}
	err := t.Walk(func(path string, n *tree.Inode) error {
		link, seen := first[n]
		if seen {
			m[path] = m[link]
			return nil
		}
		if n.Nlink > 1 && !n.IsDir() {
			first[n] = path
		}
		e := Entry{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Nlink: n.Nlink, Rdev: n.Rdev,
			MtimeSec: n.MtimeSec, MtimeNsec: n.MtimeNsec, Target: n.Target, Link: path,
		}
		for _, x := range n.Xattrs {
			e.addXattr(x.Name, x.Value)
		}
		if n.IsRegular() {
			e.Size = n.Size
			var runs []run
			for _, x := range n.Content.Extents {
				runs = append(runs, run{x.Logical, x.Logical + x.Length})
			}
			var err error
			if e.Content, err = contentSum(n, n.Size, runs); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		m[path] = e
		return nil
	})
	return m, err
}

// Dir makes the manifest of what stands in directory root and reads all its
// files. It follows no symlinks.
func Dir(root string) (Manifest, error) {
	m := Manifest{}
	type inode struct{ dev, ino uint64 }
	first := map[inode]string{}
	root = filepath.Clean(root)
	err := filepath.WalkDir(root, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		path := filepath.Join("/", rel)
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: name, Err: err}
		}
		id := inode{uint64(st.Dev), st.Ino}
		if link, seen := first[id]; seen {
			m[path] = m[link]
			return nil
		}
		e := Entry{
			Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint32(st.Nlink), Link: path,
			MtimeSec: st.Mtim.Sec, MtimeNsec: uint32(st.Mtim.Nsec),
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			e.Size = st.Size
			if e.Content, err = fileSum(name, st.Size); err != nil {
				return err
			}
		case unix.S_IFLNK:
			if e.Target, err = os.Readlink(name); err != nil {
				return err
			}
		case unix.S_IFBLK, unix.S_IFCHR:
			e.Rdev = uint64(st.Rdev)
		}
		if err := e.readXattrs(name); err != nil {
			return err
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			first[id] = path
		}
		m[path] = e
		return nil
	})
	return m, err
}

func (e *Entry) addXattr(name string, value []byte) {
	if strings.HasPrefix(name, "trusted.overlay.") {
		return
	}
	if e.Xattrs == nil {
		e.Xattrs = map[string]string{}
	}
	e.Xattrs[name] = string(value)
}

func (e *Entry) readXattrs(name string) error {
	list, err := grown(func(p []byte) (int, error) { return unix.Llistxattr(name, p) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "llistxattr", Path: name, Err: err}
	}
	for x := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if x == "" {
			continue
		}
		value, err := grown(func(p []byte) (int, error) { return unix.Lgetxattr(name, x, p) })
		if err != nil {
			return &fs.PathError{Op: "lgetxattr " + x, Path: name, Err: err}
		}
		e.addXattr(x, value)
	}
	return nil
}

// grown calls read with a buffer that holds the answer, which may grow between
// the question for its size and the answer.
func grown(read func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := read(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		p := make([]byte, n)
		n, err = read(p)
		if !errors.Is(err, unix.ERANGE) {
			return p[:max(n, 0)], err
		}
	}
}

// run is a piece of a file that may hold data; what lies between runs is
// known to be zeros.
type run struct{ from, to int64 }

// fileSum is contentSum of a file on this machine.
func fileSum(name string, size int64) (sum [sha256.Size]byte, err error) {
	// Nothing may block or be followed, should the file change under us.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	var runs []run
	for end := int64(0); end < size; {
		from, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil { // the filesystem does not tell
			runs = []run{{0, size}}
			break
		}
		if end, err = f.Seek(from, unix.SEEK_HOLE); err != nil {
			return sum, err
		}
		runs = append(runs, run{from, min(end, size)})
	}
	return contentSum(f, size, runs)
}

// block is the unit, in bytes, in which zeros are left out of a sum.
const block = 4096

// contentSum names the content of a file: the SHA-256 of its blocks that are
// not all zeros, each behind its offset, and of its size. So holes cost
// nothing, and it does not matter which zeros are stored.
func contentSum(r io.ReaderAt, size int64, runs []run) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	var zeros, number [block]byte
	put := func(v int64) {
		binary.LittleEndian.PutUint64(number[:8], uint64(v))
		h.Write(number[:8])
	}
	buf := make([]byte, min(size, 256<<10))
	done := int64(0)
	for _, u := range runs {
		// Whole blocks, because a run may begin or end within one.
		off := max(done, u.from/block*block)
		end := min(size, (u.to+block-1)/block*block)
		for off < end {
			p := buf[:min(int64(len(buf))/block*block, end-off)]
			if len(buf) < block {
				p = buf[:end-off]
			}
			if n, err := r.ReadAt(p, off); n < len(p) {
				return sum, err
			}
			for at := 0; at < len(p); at += block {
				b := p[at:min(at+block, len(p))]
				if string(b) != string(zeros[:len(b)]) {
					put(off + int64(at))
					h.Write(b)
				}
			}
			off += int64(len(p))
		}
		done = max(done, end)
	}
	put(size)
	h.Sum(sum[:0])
	return sum, nil
}

// Diff lists the differences, by path, one line each; none if got is want.
func Diff(got, want Manifest) []string {
	var list []string
	paths := slices.Collect(maps.Keys(want))
	for p := range got {
		if _, ok := want[p]; !ok {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	for _, p := range paths {
		g, inGot := got[p]
		w, inWant := want[p]
		switch {
		case !inWant:
			list = append(list, quote(p)+": there is "+typeName(g.Mode)+", want nothing")
		case !inGot:
			list = append(list, quote(p)+": missing, want "+typeName(w.Mode))
		default:
			for _, d := range g.diff(&w) {
				list = append(list, quote(p)+": "+d)
			}
		}
	}
	return list
}

func (e *Entry) diff(want *Entry) []string {
	var list []string
	differ := func(what string, got, want any) {
		if got != want {
			list = append(list, fmt.Sprintf("%s %v, want %v", what, got, want))
		}
	}
	if e.Mode&unix.S_IFMT != want.Mode&unix.S_IFMT {
		return []string{"is " + typeName(e.Mode) + ", want " + typeName(want.Mode)}
	}
	differ("mode", fmt.Sprintf("%04o", e.Mode&0o7777), fmt.Sprintf("%04o", want.Mode&0o7777))
	differ("owner", fmt.Sprintf("%d:%d", e.UID, e.GID), fmt.Sprintf("%d:%d", want.UID, want.GID))
	differ("size", e.Size, want.Size)
	differ("mtime", fmt.Sprintf("%d.%09d", e.MtimeSec, e.MtimeNsec), fmt.Sprintf("%d.%09d", want.MtimeSec, want.MtimeNsec))
	differ("device", device(e.Rdev), device(want.Rdev))
	differ("target", quote(e.Target), quote(want.Target))
	differ("first link", quote(e.Link), quote(want.Link))
	// A directory's count of 1 means that its filesystem does not count.
	if e.Mode&unix.S_IFMT != unix.S_IFDIR || e.Nlink != 1 && want.Nlink != 1 {
		differ("link count", e.Nlink, want.Nlink)
	}
	if e.Size == want.Size && e.Content != want.Content {
		list = append(list, fmt.Sprintf("content %x…, want %x…", e.Content[:8], want.Content[:8]))
	}
	names := slices.Collect(maps.Keys(want.Xattrs))
	for x := range e.Xattrs {
		if _, ok := want.Xattrs[x]; !ok {
			names = append(names, x)
		}
	}
	slices.Sort(names)
	for _, x := range names {
		g, inGot := e.Xattrs[x]
		w, inWant := want.Xattrs[x]
		switch {
		case !inWant:
			list = append(list, fmt.Sprintf("xattr %s is %.100q, want none", quote(x), g))
		case !inGot:
			list = append(list, fmt.Sprintf("xattr %s missing, want %.100q", quote(x), w))
		case g != w:
			list = append(list, fmt.Sprintf("xattr %s %.100q, want %.100q", quote(x), g, w))
		}
	}
	return list
}

func device(rdev uint64) string {
	return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
}

// quote leaves printable names as they are.
func quote(s string) string {
	if q := strconv.Quote(s); len(q) != len(s)+2 {
		return q
	}
	return s
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symlink"
	case unix.S_IFCHR:
		return "a character device"
	case unix.S_IFBLK:
		return "a block device"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	}
	return fmt.Sprintf("of type %o", mode&unix.S_IFMT)
}
