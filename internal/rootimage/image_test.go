package rootimage

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// writeImage writes the root image of p to a file. Blocks of zeros stay holes
// of that file.
func writeImage(t testing.TB, p *Plan) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "rootfs.erofs")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := p.WriteTo(&holeWriter{f: f})
	if err != nil {
		t.Fatal(err)
	}
	if n != p.Size() {
		t.Fatalf("image: wrote %d bytes, want %d", n, p.Size())
	}
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	return name
}

type holeWriter struct {
	f   *os.File
	off int64
}

var zeros [64 << 10]byte

func (w *holeWriter) Write(p []byte) (int, error) {
	for part := range slices.Chunk(p, len(zeros)) {
		if !bytes.Equal(part, zeros[:len(part)]) {
			if _, err := w.f.WriteAt(part, w.off); err != nil {
				return 0, err
			}
		}
		w.off += int64(len(part))
	}
	return len(p), nil
}

// mount mounts an image with the kernel's EROFS.
func mount(t testing.TB, image string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount -t erofs: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// view collects the records of a tree by path.
type view struct {
	records map[string]record
	first   map[any]string // inode → first path
}

func newView() *view { return &view{map[string]record{}, map[any]string{}} }

func (v *view) add(p string, inode any, r record) {
	first, ok := v.first[inode]
	if !ok {
		first = p
		v.first[inode] = p
	}
	r.SameAs = first
	v.records[p] = r
}

func (v *view) compare(t *testing.T, want *view) {
	t.Helper()
	bad := 0
	for p, w := range want.records {
		if g, ok := v.records[p]; !ok {
			t.Errorf("%q is missing", p)
		} else if g != w {
			t.Errorf("%q:\n got %+v\nwant %+v", p, g, w)
		} else {
			continue
		}
		if bad++; bad > 20 {
			t.FailNow()
		}
	}
	for p := range v.records {
		if _, ok := want.records[p]; !ok {
			t.Errorf("%q is not in the tree", p)
		}
	}
}

func viewTree(tr *tree.Tree) *view {
	links := map[*tree.Inode]uint64{}
	tr.Walk(func(_ string, n *tree.Inode) error {
		links[n]++
		if n.IsDir() {
			links[n] = 2
			for _, e := range n.Entries {
				if e.IsDir() {
					links[n]++
				}
			}
		}
		return nil
	})
	v := newView()
	tr.Walk(func(p string, n *tree.Inode) error {
		r := record{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Rdev: n.Rdev, Nlink: links[n],
			Sec: n.MtimeSec, Nsec: n.MtimeNsec, Target: n.Target, Xattrs: xattrString(n.Xattrs),
		}
		if n.IsRegular() {
			r.Size, r.Sum = n.Size, sum(n.ReadAt, n.Size)
		}
		v.add(p, n, r)
		return nil
	})
	return v
}

func viewMount(t *testing.T, root string) *view {
	v := newView()
	var walk func(p string)
	walk = func(p string) {
		full := root + p
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			t.Fatal(&fs.PathError{Op: "lstat", Path: p, Err: err})
		}
		r := record{
			Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Nlink: st.Nlink,
			Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec), Xattrs: xattrString(mountXattrs(t, full)),
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(full)
			if err != nil {
				t.Fatal(err)
			}
			r.Size, r.Sum = st.Size, sum(f.ReadAt, st.Size)
			f.Close()
		case unix.S_IFLNK:
			r.Target, _ = os.Readlink(full)
		}
		v.add(p, st.Ino, r)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		list, err := os.ReadDir(full)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			walk(path.Join(p, e.Name()))
		}
	}
	walk("/")
	return v
}

func mountXattrs(t *testing.T, full string) []tree.Xattr {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(full, list)
	if err != nil {
		t.Fatal(&fs.PathError{Op: "llistxattr", Path: full, Err: err})
	}
	var x []tree.Xattr
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(full, name, value)
		if err != nil {
			t.Fatal(&fs.PathError{Op: "lgetxattr " + name, Path: full, Err: err})
		}
		x = append(x, tree.Xattr{Name: name, Value: slices.Clone(value[:n])})
	}
	slices.SortFunc(x, func(a, b tree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return x
}

func viewReader(t *testing.T, r *erofs.Reader, image io.ReaderAt) *view {
	v := newView()
	var walk func(p string, nid uint64)
	walk = func(p string, nid uint64) {
		n, err := r.Inode(nid)
		if err != nil {
			t.Fatal(err)
		}
		rec := record{Mode: n.Mode, UID: n.UID, GID: n.GID, Rdev: n.Rdev, Nlink: uint64(n.Nlink), Sec: n.MtimeSec, Nsec: n.MtimeNsec}
		var x []tree.Xattr
		if err := r.Xattrs(n, func(name string, value []byte) bool {
			x = append(x, tree.Xattr{Name: name, Value: value})
			if got, ok, err := r.Xattr(n, name); err != nil || !ok || !bytes.Equal(got, value) {
				t.Errorf("%q: xattr %q: got %d bytes, %v, %v; want %d bytes", p, name, len(got), ok, err, len(value))
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		rec.Xattrs = xattrString(x)
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			rec.Size = n.Size
			rec.Sum = sum(func(p []byte, off int64) (int, error) {
				done := 0
				for done < len(p) {
					at, length, err := r.Span(n, off+int64(done))
					if err != nil {
						return done, err
					}
					q := p[done:min(int64(len(p)), int64(done)+length)]
					if at < 0 {
						clear(q)
					} else if _, err := image.ReadAt(q, at); err != nil {
						return done, err
					}
					done += len(q)
				}
				return done, nil
			}, n.Size)
		case unix.S_IFLNK:
			target, err := r.Readlink(n)
			if err != nil {
				t.Fatal(err)
			}
			rec.Target = string(target)
		}
		v.add(p, nid, rec)
		if !n.IsDir() {
			return
		}
		err = r.ReadDir(n, 0, func(name []byte, child uint64, _ uint8, _ uint64) bool {
			if got, err := r.Lookup(n, string(name)); err != nil || got != child {
				t.Errorf("lookup %q in %q: got %d, %v; want %d", name, p, got, err, child)
			}
			if s := string(name); s != "." && s != ".." {
				walk(path.Join(p, s), child)
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	walk("/", r.RootNID())
	return v
}

func viewGoErofs(t *testing.T, image io.ReaderAt) *view {
	img, err := goerofs.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	v := newView()
	var walk func(p string, info fs.FileInfo)
	walk = func(p string, info fs.FileInfo) {
		st := info.Sys().(*goerofs.Stat)
		rec := record{
			Mode: unixMode(st.Mode), UID: st.UID, GID: st.GID, Nlink: uint64(st.Nlink),
			Sec: int64(st.Mtime), Nsec: st.MtimeNs,
		}
		var x []tree.Xattr
		for name, value := range st.Xattrs {
			// go-erofs shows the ACLs, which have no name of their own, with a dot behind.
			x = append(x, tree.Xattr{Name: strings.TrimSuffix(name, "."), Value: []byte(value)})
		}
		slices.SortFunc(x, func(a, b tree.Xattr) int { return strings.Compare(a.Name, b.Name) })
		rec.Xattrs = xattrString(x)
		name := strings.TrimPrefix(p, "/")
		if p == "/" {
			name = "."
		}
		switch {
		case info.Mode().IsRegular():
			rec.Size = st.Size
			if st.Size <= 8<<20 {
				b, err := fs.ReadFile(img, name)
				if err != nil {
					t.Fatal(err)
				}
				rec.Sum = sum(bytes.NewReader(b).ReadAt, int64(len(b)))
			}
		case info.Mode()&fs.ModeSymlink != 0:
			if rec.Target, err = fs.ReadLink(img, name); err != nil {
				t.Fatal(err)
			}
		case info.Mode()&fs.ModeDevice != 0:
			rec.Rdev = uint64(st.Rdev)
		}
		v.add(p, st.Ino, rec)
		if !info.IsDir() {
			return
		}
		list, err := fs.ReadDir(img, name)
		if err != nil {
			t.Fatalf("go-erofs: %q: %v", p, err)
		}
		for _, e := range list {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			walk(path.Join(p, e.Name()), info)
		}
	}
	info, err := fs.Stat(img, ".")
	if err != nil {
		t.Fatal(err)
	}
	walk("/", info)
	return v
}

// unixMode turns Go's mode bits back into st_mode.
func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for _, b := range []struct {
		bit  fs.FileMode
		mode uint32
	}{{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX}} {
		if m&b.bit != 0 {
			mode |= b.mode
		}
	}
	switch m.Type() {
	case 0:
		return mode | unix.S_IFREG
	case fs.ModeDir:
		return mode | unix.S_IFDIR
	case fs.ModeSymlink:
		return mode | unix.S_IFLNK
	case fs.ModeDevice:
		return mode | unix.S_IFBLK
	case fs.ModeDevice | fs.ModeCharDevice:
		return mode | unix.S_IFCHR
	case fs.ModeNamedPipe:
		return mode | unix.S_IFIFO
	case fs.ModeSocket:
		return mode | unix.S_IFSOCK
	}
	return mode
}

// TestJudges shows one image to fsck.erofs, the kernel, go-erofs and our own
// reader. Each must see the tree that it was made from.
func TestJudges(t *testing.T) {
	tr := everything()
	p, err := New(tr)
	if err != nil {
		t.Fatal(err)
	}
	name := writeImage(t, p)
	image, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	want := viewTree(tr)

	t.Run("fsck.erofs", func(t *testing.T) {
		if out, err := exec.Command("fsck.erofs", name).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("kernel", func(t *testing.T) {
		dir := mount(t, name)
		viewMount(t, dir).compare(t, want)
		checkInodeNumbers(t, dir, p)
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		if int64(st.Blocks)*st.Bsize != p.Size() {
			t.Errorf("statfs: %d blocks of %d bytes, want %d bytes", st.Blocks, st.Bsize, p.Size())
		}
	})
	t.Run("go-erofs", func(t *testing.T) {
		small := newView()
		for p, r := range want.records {
			if r.Size > 8<<20 {
				r.Sum = [32]byte{}
			}
			small.records[p] = r
		}
		viewGoErofs(t, image).compare(t, small)
	})
	t.Run("reader", func(t *testing.T) {
		r, err := erofs.NewReader(p.Meta())
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Verify(); err != nil {
			t.Error(err)
		}
		viewReader(t, r, image).compare(t, want)
	})
}

// checkInodeNumbers compares the kernel's inode numbers with our nids: a mount
// through FUSE can then show the same ones.
func checkInodeNumbers(t *testing.T, dir string, p *Plan) {
	r, err := erofs.NewReader(p.Meta())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "sizes", "hard", "names"} {
		nid := r.RootNID()
		if name != "" {
			root, err := r.Inode(nid)
			if err != nil {
				t.Fatal(err)
			}
			if nid, err = r.Lookup(root, name); err != nil {
				t.Fatal(err)
			}
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Ino != nid {
			t.Errorf("/%s: the kernel's inode number is %d, want the nid %d", name, st.Ino, nid)
		}
	}
}

// TestSparse counts what a sparse file costs, and looks for its holes in the
// kernel's mount.
func TestSparse(t *testing.T) {
	const tib = 1 << 40
	for _, test := range []struct {
		name       string
		file       *tree.Inode
		meta, data int64 // bytes, at most
	}{
		{"1 TiB hole", sparseFile(tib), 200 << 10, 0},
		{"1 TiB lastlog", sparseFile(tib, 1000*292), 200 << 10, 32 << 20},
		{"1 TiB at both ends", sparseFile(tib, 0, tib-300), 200 << 10, 64 << 20},
		{"5 GiB", sparseFile(5*gib, 0, gib, 5*gib-300), 20 << 10, 3 * 4 << 20},
		{"16 MiB", sparseFile(16<<20, 5<<20), 8 << 10, 128 << 10},
		{"1 PiB", sparseFile(1<<50, 1<<49), 5 << 20, 1 << 30},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := New(&tree.Tree{Root: dir(entries{"f": test.file})})
			if err != nil {
				t.Fatal(err)
			}
			meta := int64(len(p.Meta()))
			if meta > test.meta || p.Size()-meta > test.data {
				t.Errorf("%d bytes of metadata and %d of data, want at most %d and %d", meta, p.Size()-meta, test.meta, test.data)
			}
			f, err := os.Open(filepath.Join(mount(t, writeImage(t, p)), "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			buf := make([]byte, 300)
			for _, e := range test.file.Content.Extents {
				if _, err := f.ReadAt(buf, e.Logical); err != nil || !bytes.Equal(buf, noise(1, 300)) {
					t.Errorf("at %d: not the file's bytes (%v)", e.Logical, err)
				}
				data, err := unix.Seek(int(f.Fd()), max(0, e.Logical-1<<30), unix.SEEK_DATA)
				if err != nil || data > e.Logical {
					t.Errorf("SEEK_DATA before %d: got %d, %v", e.Logical, data, err)
				}
			}
			if len(test.file.Content.Extents) == 0 {
				if _, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
					t.Errorf("SEEK_DATA in a hole: got %v, want %v", err, unix.ENXIO)
				}
			}
			if _, err := f.ReadAt(buf, test.file.Size-300); err != nil {
				t.Error(err)
			}
			if _, err := f.ReadAt(buf, test.file.Size-299); err != io.EOF {
				t.Errorf("reading over the end: got %v, want %v", err, io.EOF)
			}
		})
	}
}
