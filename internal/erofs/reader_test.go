package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
)

type entries = map[string]*tree.Inode

func dir(e entries) *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFDIR | 0o755, Entries: e}
}

func file(content string, x ...tree.Xattr) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(len(content)), Xattrs: x}
	if n.Size > 0 {
		n.Content = tree.Content{Source: strings.NewReader(content), Extents: []tree.Extent{{Length: n.Size}}}
	}
	return n
}

func link(target string) *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFLNK | 0o777, Target: target}
}

// sparseFile holds one byte at each offset.
func sparseFile(size int64, offsets ...int64) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o644, Size: size, Content: tree.Content{Source: strings.NewReader("x")}}
	for _, off := range offsets {
		n.Content.Extents = append(n.Content.Extents, tree.Extent{Logical: off, Length: 1})
	}
	return n
}

// numbered is a directory of n files in which lookups take several blocks.
func numbered(n int) *tree.Inode {
	d := dir(entries{})
	for i := range n {
		d.Entries[fmt.Sprintf("entry%06d", i)] = file("")
	}
	return d
}

func metadata(t testing.TB, root *tree.Inode) []byte {
	t.Helper()
	p, err := rootimage.New(&tree.Tree{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return p.Meta()
}

func open(t testing.TB, root *tree.Inode) *erofs.Reader {
	t.Helper()
	r, err := erofs.NewReader(metadata(t, root))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// inode looks up a path of names without symlinks.
func inode(t testing.TB, r *erofs.Reader, path string) erofs.Inode {
	t.Helper()
	n, err := r.Inode(r.RootNID())
	for name := range strings.FieldsFuncSeq(path, func(c rune) bool { return c == '/' }) {
		var nid uint64
		if nid, err = r.Lookup(n, name); err == nil {
			n, err = r.Inode(nid)
		}
		if err != nil {
			t.Fatalf("%s: %s: %v", path, name, err)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLookup(t *testing.T) {
	for _, count := range []int{0, 1, 2, 150, 170, 171, 172, 173, 340, 341, 5000} {
		t.Run(fmt.Sprint(count), func(t *testing.T) {
			r := open(t, dir(entries{"d": numbered(count)}))
			d := inode(t, r, "d")
			seen := map[uint64]bool{}
			for i := range count {
				nid, err := r.Lookup(d, fmt.Sprintf("entry%06d", i))
				if err != nil || seen[nid] {
					t.Fatalf("entry %d: got inode %d, %v; want one of its own", i, nid, err)
				}
				seen[nid] = true
			}
			absent := []string{"", "!", "a", "entry", "entry000000x", "z", "\xff", strings.Repeat("e", 300), fmt.Sprintf("entry%06d", count)}
			for i := range count {
				absent = append(absent, fmt.Sprintf("entry%06d+", i))
			}
			for _, name := range absent {
				if nid, err := r.Lookup(d, name); err != erofs.ErrNotExist {
					t.Errorf("%q: got inode %d, %v; want %v", name, nid, err, erofs.ErrNotExist)
				}
			}
			for name, want := range map[string]uint64{".": d.NID, "..": r.RootNID()} {
				if nid, err := r.Lookup(d, name); err != nil || nid != want {
					t.Errorf("%q: got inode %d, %v; want %d", name, nid, err, want)
				}
			}
		})
	}
}

// TestReadDirResumes reads a directory from every cookie, and from cookies
// that ReadDir never gave.
func TestReadDirResumes(t *testing.T) {
	r := open(t, numbered(700))
	root := inode(t, r, "/")
	var names []string
	cookies := []uint64{0}
	err := r.ReadDir(root, 0, func(name []byte, _ uint64, typ uint8, next uint64) bool {
		want := uint8(unix.DT_REG)
		if name[0] == '.' {
			want = unix.DT_DIR
		}
		if typ != want {
			t.Errorf("%q: type %d, want %d", name, typ, want)
		}
		names = append(names, string(name))
		cookies = append(cookies, next)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 702 {
		t.Fatalf("got %d entries, want 702", len(names))
	}
	for i, pos := range cookies {
		var got []string
		err := r.ReadDir(root, pos, func(name []byte, _ uint64, _ uint8, _ uint64) bool {
			got = append(got, string(name))
			return len(got) < 2
		})
		want := names[i:min(i+2, len(names))]
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("from cookie %d: got %q, %v; want %q", pos, got, err, want)
		}
	}
	for _, pos := range []uint64{1 << 20, 1 << 40, 1 << 62, 1<<63 - 1, 1 << 63, 1<<64 - 1} {
		err := r.ReadDir(root, pos, func(name []byte, _ uint64, _ uint8, _ uint64) bool {
			t.Errorf("from cookie %d: got %q, want nothing", pos, name)
			return false
		})
		if err != nil {
			t.Errorf("from cookie %d: %v", pos, err)
		}
	}
}

// TestDeep looks up a path of 5,000 directories.
func TestDeep(t *testing.T) {
	root := dir(entries{"end": file("x")})
	for range 5000 {
		root = dir(entries{"d": root})
	}
	r := open(t, root)
	if err := r.Verify(); err != nil {
		t.Error(err)
	}
	if n := inode(t, r, strings.Repeat("d/", 5000)+"end"); n.Size != 1 {
		t.Errorf("got a file of %d bytes, want 1", n.Size)
	}
}

func TestXattr(t *testing.T) {
	value := bytes.Repeat([]byte("v"), 60<<10)
	r := open(t, dir(entries{
		"none": file("x"),
		"some": file("x",
			tree.Xattr{Name: "security.capability", Value: []byte("cap")},
			tree.Xattr{Name: "system.posix_acl_access", Value: []byte("acl")},
			tree.Xattr{Name: "user.60k", Value: value},
			tree.Xattr{Name: "user.empty", Value: nil}),
	}))
	some, none := inode(t, r, "some"), inode(t, r, "none")
	for _, test := range []struct {
		node  erofs.Inode
		name  string
		value []byte
		ok    bool
	}{
		{some, "security.capability", []byte("cap"), true},
		{some, "system.posix_acl_access", []byte("acl"), true},
		{some, "user.60k", value, true},
		{some, "user.empty", nil, true},
		{some, "user.60", nil, false},
		{some, "trusted.60k", nil, false},
		{some, "system.posix_acl_default", nil, false},
		{some, "system.posix_acl_accessx", nil, false},
		{some, "user.", nil, false},
		{some, "", nil, false},
		{some, "btrfs.compression", nil, false},
		{none, "security.capability", nil, false},
	} {
		got, ok, err := r.Xattr(test.node, test.name)
		if err != nil || ok != test.ok || !bytes.Equal(got, test.value) {
			t.Errorf("%q: got %d bytes, %v, %v; want %d bytes, %v", test.name, len(got), ok, err, len(test.value), test.ok)
		}
	}
	var names []string
	stop := func(name string, _ []byte) bool {
		names = append(names, name)
		return len(names) < 2
	}
	if err := r.Xattrs(some, stop); err != nil || len(names) != 2 {
		t.Errorf("got %q, %v; want the first two", names, err)
	}
}

func TestSpan(t *testing.T) {
	const mib = 1 << 20
	r := open(t, dir(entries{
		"plain":  file(strings.Repeat("p", 10000)),
		"sparse": sparseFile(64*mib, 0, 300<<10, 40*mib, 64*mib-1), // in chunks of 256 KiB
		"dir":    dir(nil),
	}))
	sparse := inode(t, r, "sparse")
	base, _, err := r.Span(sparse, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		off, image, length int64
	}{
		{0, base, 512 << 10}, // two chunks that follow one another
		{1, base + 1, 512<<10 - 1},
		{256 << 10, base + 256<<10, 256 << 10},
		{512<<10 - 1, base + 512<<10 - 1, 1},
		{512 << 10, -1, 64 * 256 << 10}, // no more than 64 chunks at a time
		{39 * mib, -1, mib},
		{40 * mib, base + 512<<10, 256 << 10},
		{64*mib - 1, base + mib - 1, 1},
	} {
		image, length, err := r.Span(sparse, test.off)
		if err != nil || image != test.image || length != test.length {
			t.Errorf("sparse at %d: got %d bytes at %d, %v; want %d at %d", test.off, length, image, err, test.length, test.image)
		}
	}
	plain := inode(t, r, "plain")
	for _, off := range []int64{0, 1, 4096, 9999} {
		image, length, err := r.Span(plain, off)
		first, _, _ := r.Span(plain, 0)
		if err != nil || image != first+off || length != 10000-off {
			t.Errorf("plain at %d: got %d bytes at %d, %v; want %d at %d", off, length, image, err, 10000-off, first+off)
		}
	}
	for _, test := range []struct {
		path string
		off  int64
	}{{"plain", -1}, {"plain", 10000}, {"plain", 1<<63 - 1}, {"sparse", 64 * mib}, {"dir", 0}} {
		if _, _, err := r.Span(inode(t, r, test.path), test.off); err == nil {
			t.Errorf("%s at %d: got no error", test.path, test.off)
		}
	}
}

func TestWrongType(t *testing.T) {
	r := open(t, dir(entries{"f": file("x"), "d": dir(nil), "l": link("t")}))
	if _, err := r.Lookup(inode(t, r, "f"), "x"); err == nil || errors.Is(err, erofs.ErrNotExist) {
		t.Errorf("lookup in a file: got %v, want an error that says so", err)
	}
	if err := r.ReadDir(inode(t, r, "l"), 0, nil); err == nil {
		t.Error("reading a symlink as a directory: got no error")
	}
	if _, err := r.Readlink(inode(t, r, "d")); err == nil {
		t.Error("reading a directory as a symlink: got no error")
	}
}

// TestNoAllocation holds the calls that serve a mount to zero allocations.
func TestNoAllocation(t *testing.T) {
	r := open(t, dir(entries{"d": numbered(5000), "l": link("target"), "s": sparseFile(1<<30, 1<<29),
		"x": file("x", tree.Xattr{Name: "security.capability", Value: []byte("cap")})}))
	d, l, s, x := inode(t, r, "d"), inode(t, r, "l"), inode(t, r, "s"), inode(t, r, "x")
	count := 0
	for name, call := range map[string]func() error{
		"Inode":  func() error { _, err := r.Inode(d.NID); return err },
		"Lookup": func() error { _, err := r.Lookup(d, "entry003210"); return err },
		"absent": func() error { _, err := r.Lookup(d, "entry"); return errorUnless(err == erofs.ErrNotExist) },
		"ReadDir": func() error {
			return r.ReadDir(d, 0, func([]byte, uint64, uint8, uint64) bool { count++; return true })
		},
		"Readlink": func() error {
			_, err := r.Readlink(l)
			return err
		},
		"Xattr": func() error {
			_, ok, err := r.Xattr(x, "security.capability")
			return errors.Join(err, errorUnless(ok))
		},
		"absent Xattr": func() error { _, ok, err := r.Xattr(x, "user.x"); return errors.Join(err, errorUnless(!ok)) },
		"Span":         func() error { _, _, err := r.Span(s, 1<<29); return err },
	} {
		var failed error
		allocs := testing.AllocsPerRun(100, func() {
			if err := call(); err != nil {
				failed = err
			}
		})
		if failed != nil || allocs != 0 {
			t.Errorf("%s: %v allocations, %v; want none", name, allocs, failed)
		}
	}
}

func errorUnless(ok bool) error {
	if !ok {
		return errors.New("wrong result")
	}
	return nil
}

func BenchmarkLookup(b *testing.B) {
	for _, count := range []int{10, 1000, 100000} {
		r := open(b, numbered(count))
		root := inode(b, r, "/")
		names := make([]string, 1024)
		for i := range names {
			names[i] = fmt.Sprintf("entry%06d", i*7919%count)
		}
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				nid, err := r.Lookup(root, names[i%len(names)])
				if err == nil {
					_, err = r.Inode(nid)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReadDir(b *testing.B) {
	r := open(b, numbered(100000))
	root := inode(b, r, "/")
	b.ReportAllocs()
	for b.Loop() {
		n := 0
		err := r.ReadDir(root, 0, func([]byte, uint64, uint8, uint64) bool {
			n++
			return true
		})
		if err != nil || n != 100002 {
			b.Fatal(n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100002, "ns/entry")
}

func BenchmarkNewReader(b *testing.B) {
	meta := metadata(b, numbered(100000))
	for b.Loop() {
		if _, err := erofs.NewReader(meta); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	r := open(b, numbered(100000))
	for b.Loop() {
		if err := r.Verify(); err != nil {
			b.Fatal(err)
		}
	}
}
