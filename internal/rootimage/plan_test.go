package rootimage

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

func plan(t testing.TB, root *tree.Inode) *Plan {
	t.Helper()
	p, err := New(&tree.Tree{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func hexSum(h hash.Hash) string { return fmt.Sprintf("%x", h.Sum(nil)) }

// TestGolden freezes profile v1 by the digests of the images of two trees. A
// change here re-cuts every image that users have: it needs a new profile.
func TestGolden(t *testing.T) {
	small := func() *tree.Tree {
		root := dir(entries{"usr": dir(entries{}), "bin": link("usr/bin")})
		rng := rand.New(rand.NewPCG(1, 2))
		for d := range 20 {
			sub := dir(entries{})
			for f := range 50 {
				n := file(noise(uint64(d*50+f), 1<<rng.IntN(18)))
				n.MtimeSec = 1700000000 + int64(f)
				sub.Entries[fmt.Sprintf("file-%d", f)] = n
			}
			root.Entries["usr"].Entries[fmt.Sprintf("dir-%d", d)] = sub
		}
		return &tree.Tree{Root: root}
	}
	for _, test := range []struct {
		name               string
		tree               func() *tree.Tree
		meta, units, image string // SHA-256
	}{
		{
			"usr", small,
			"7a449f04a41ec6dedc1e5965f317641e073e124bb6474823c4a8811f14dd1421",
			"7c970bf565a67f39b7347e3b7192a9bfbf8ecd48159ad2017a46aaa82ed89135",
			"090e5253ec11584553ce6221efc1dac630770b90a2664933ae18d0f208406e5b",
		},
		{
			"everything", everything,
			"23aea25b78d5d12f4c9ae627d23e6c7b0eb6296beb9b2323abddf0a08cee9fb8",
			"d73c907196289af2c1085fb76fc5a7854923d65c5bbe0d7619279d0554e0da9c",
			"4234e7fba99e78e8d2bd28d22108d6de14abcd7f1921f6f6f298e7ccdb5a281a",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := New(test.tree())
			if err != nil {
				t.Fatal(err)
			}
			meta, units, image := sha256.New(), sha256.New(), sha256.New()
			meta.Write(p.Meta())
			for u := range p.Units() {
				fmt.Fprintln(units, u.Offset, u.Size)
			}
			if _, err := p.WriteTo(image); err != nil {
				t.Fatal(err)
			}
			for _, d := range []struct{ name, got, want string }{
				{"metadata", hexSum(meta), test.meta},
				{"units", hexSum(units), test.units},
				{"image", hexSum(image), test.image},
			} {
				if d.got != d.want {
					t.Errorf("%s: got SHA-256 %s, want %s", d.name, d.got, d.want)
				}
			}
		})
	}
}

// TestUnits checks that units cover the image, begin at files, and give the
// same bytes however they are read.
func TestUnits(t *testing.T) {
	p, err := New(everything())
	if err != nil {
		t.Fatal(err)
	}
	starts := map[int64]bool{0: true}
	for _, f := range p.files {
		starts[int64(f.block)*erofs.BlockSize] = true
	}
	var end int64
	large := false
	var odd [4097]byte
	for u := range p.Units() {
		if u.Offset != end || u.Size <= 0 || u.Size%erofs.BlockSize != 0 || !starts[u.Offset] {
			t.Fatalf("unit of %d bytes at %d: want whole blocks from a file's first byte at %d", u.Size, u.Offset, end)
		}
		end += u.Size
		inode := p.layout.Inode(p.files[slices.IndexFunc(p.files, func(f placed) bool { return int64(f.block)*erofs.BlockSize >= u.Offset })].inode)
		if u.Offset > 0 {
			if large && inode.Size < smallFile {
				t.Errorf("unit at %d: a small file behind a large one", u.Offset)
			}
			large = inode.Size >= smallFile
			if !large && u.Size > groupMax {
				t.Errorf("unit at %d: %d bytes of small files, at most %d", u.Offset, u.Size, groupMax)
			}
			if want := erofs.Blocks(inode) * erofs.BlockSize; large && u.Size != want {
				t.Errorf("unit at %d: %d bytes, want the %d of one large file", u.Offset, u.Size, want)
			}
		}
		var blocks int64
		for n := range p.Files(u) {
			if blocks == 0 && n != inode {
				t.Errorf("unit at %d: Files begins with another file than the image", u.Offset)
			}
			blocks += erofs.Blocks(n)
		}
		if u.Offset > 0 && blocks*erofs.BlockSize != u.Size || u.Offset == 0 && blocks > 0 {
			t.Errorf("unit at %d: %d bytes with %d blocks of files", u.Offset, u.Size, blocks)
		}
		if u.Size > 2<<20 {
			continue
		}
		want, err := io.ReadAll(p.Open(u))
		if err != nil || int64(len(want)) != u.Size {
			t.Fatalf("unit at %d: read %d bytes, %v; want %d", u.Offset, len(want), err, u.Size)
		}
		var got bytes.Buffer
		if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, p.Open(u), odd[:]); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("unit at %d: differs when it is read %d bytes at a time (%v)", u.Offset, len(odd), err)
		}
		if u.Size <= 64<<10 {
			if err := iotest.TestReader(p.Open(u), want); err != nil {
				t.Errorf("unit at %d: %v", u.Offset, err)
			}
		}
	}
	if end != p.Size() {
		t.Errorf("units end at %d, want %d", end, p.Size())
	}
}

// TestGroups inserts, grows and deletes one small file among many. All other
// units must stay as they are but those beside it.
func TestGroups(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	base := entries{}
	for i := range 3000 {
		base[fmt.Sprintf("f%06d", i*10)] = file(noise(uint64(i), 1+rng.IntN(smallFile-1)/(1+rng.IntN(8))))
	}
	units := func(e entries) map[string]bool {
		set := map[string]bool{}
		p := plan(t, dir(e))
		for u := range p.Units() {
			if u.Offset == 0 {
				continue
			}
			h := sha256.New()
			if _, err := io.Copy(h, p.Open(u)); err != nil {
				t.Fatal(err)
			}
			set[hexSum(h)] = true
		}
		return set
	}
	before := units(base)
	if mean := 3000 / len(before); mean < 2 || mean > 5 {
		t.Errorf("%d files in %d units, want 2 to 5 in each", 3000, len(before))
	}
	for name, change := range map[string]func(e entries, at int){
		"insert": func(e entries, at int) { e[fmt.Sprintf("f%06d", at*10+5)] = file(noise(1<<32, 5000)) },
		"grow":   func(e entries, at int) { e[fmt.Sprintf("f%06d", at*10)] = file(noise(1<<32, smallFile-1)) },
		"delete": func(e entries, at int) { delete(e, fmt.Sprintf("f%06d", at*10)) },
	} {
		t.Run(name, func(t *testing.T) {
			for at := 100; at < 3000; at += 500 {
				e := entries{}
				for k, v := range base {
					e[k] = v
				}
				change(e, at)
				fresh := 0
				for u := range units(e) {
					if !before[u] {
						fresh++
					}
				}
				if fresh > 3 {
					t.Errorf("at file %d: %d new units, want at most 3", at, fresh)
				}
			}
		})
	}
}

// TestReproducible makes the same image from the same tree, and from one whose
// maps were filled in another order.
func TestReproducible(t *testing.T) {
	build := func(names []string) []byte {
		e := entries{}
		for _, name := range names {
			e[name] = file([]byte(name))
		}
		return plan(t, dir(e)).Meta()
	}
	var names []string
	for i := range 500 {
		names = append(names, fmt.Sprint("n", i))
	}
	want := build(names)
	slices.Reverse(names)
	if !bytes.Equal(build(names), want) {
		t.Error("metadata depends on the order in which the tree was built")
	}
}

func TestRefused(t *testing.T) {
	inner := dir(entries{})
	loop := dir(entries{})
	loop.Entries["loop"] = loop
	manyXattrs := make([]tree.Xattr, 5)
	for i := range manyXattrs {
		manyXattrs[i] = tree.Xattr{Name: fmt.Sprintf("user.%d", i), Value: make([]byte, 60<<10)}
	}
	terabytes := entries{}
	for i := range 5 {
		n := file(nil)
		n.Size = 1 << 42
		n.Content = tree.Content{Source: strings.NewReader(""), Extents: []tree.Extent{{Length: n.Size}}}
		terabytes[fmt.Sprint(i)] = n
	}
	tables := entries{}
	for i := range 300 {
		tables[fmt.Sprint(i)] = sparseFile(1 << 50)
	}
	with := func(change func(n *tree.Inode)) *tree.Inode {
		n := file([]byte("x"))
		change(n)
		return dir(entries{"dir": dir(entries{"bad": n})})
	}
	for _, test := range []struct {
		name string
		root *tree.Inode
		want string // in the error
	}{
		{"no root", nil, "root is not a directory"},
		{"root is a file", file(nil), "root is not a directory"},
		{"no type", with(func(n *tree.Inode) { n.Mode = 0o644 }), `"/dir/bad": mode 0644`},
		{"wide mode", with(func(n *tree.Inode) { n.Mode |= 1 << 16 }), `"/dir/bad": mode`},
		{"nanoseconds", with(func(n *tree.Inode) { n.MtimeNsec = 1e9 }), `"/dir/bad": mtime`},
		{"8 EiB", with(func(n *tree.Inode) { n.Size = 1<<63 - 1 }), `"/dir/bad": size 9223372036854775807 bytes, at most 1125899906842624`},
		{"above 1 PiB", dir(entries{"bad": sparseFile(1<<50 + 1)}), `"/bad": size`},
		{"negative size", with(func(n *tree.Inode) { n.Size = -1 }), `"/dir/bad": size -1`},
		{"image above 16 TiB", dir(terabytes), `"/3": with its 4398046511104 bytes the root image exceeds 17592186040320 bytes`},
		{"metadata above 1 GiB", dir(tables), "metadata of the root image exceeds"},
		{"extent over the end", with(func(n *tree.Inode) { n.Content.Extents[0].Length = 2 }), `"/dir/bad": extent 0`},
		{"extents overlap", with(func(n *tree.Inode) {
			n.Size = 10
			n.Content.Extents = []tree.Extent{{Length: 6}, {Logical: 5, Length: 5}}
		}), `"/dir/bad": extent 1`},
		{"extent offset wraps", with(func(n *tree.Inode) { n.Content.Extents[0].Logical = 1<<63 - 1 }), `"/dir/bad": extent 0`},
		{"no source", with(func(n *tree.Inode) { n.Content.Source = nil }), `"/dir/bad": 1 extents without a source`},
		{"empty name", dir(entries{"d": dir(entries{"": file(nil)})}), `"/d": entry "": not a name`},
		{"dot", dir(entries{".": file(nil)}), `"/": entry ".": not a name`},
		{"dot dot", dir(entries{"..": dir(nil)}), `"/": entry "..": not a name`},
		{"slash", dir(entries{"a/b": file(nil)}), `"/": entry "a/b"`},
		{"NUL", dir(entries{"a\x00b": file(nil)}), `"/": entry "a\x00b"`},
		{"256 bytes", dir(entries{strings.Repeat("n", 256): file(nil)}), `name of 256 bytes, at most 255`},
		{"nil entry", dir(entries{"x": nil}), `"/": entry "x" has no inode`},
		{"directory twice", dir(entries{"a": inner, "b": inner}), `"/": entry "b" is a second link to directory "/a"`},
		{"cycle", loop, `"/": entry "loop" is a second link to directory "/"`},
		{"long target", dir(entries{"l": link(strings.Repeat("t", 4096))}), `"/l": symlink target of 4096 bytes`},
		{"empty target", dir(entries{"l": link("")}), `"/l": symlink target of 0 bytes`},
		{"NUL in target", dir(entries{"l": link("a\x00")}), `"/l": symlink target`},
		{"device", dir(entries{"n": {Mode: unix.S_IFCHR, Rdev: unix.Mkdev(4096, 0)}}), `"/n": device 4096:0`},
		{"xattr class", with(func(n *tree.Inode) { n.Xattrs = []tree.Xattr{{Name: "btrfs.x"}} }), `"/dir/bad": xattr "btrfs.x"`},
		{"other system xattr", with(func(n *tree.Inode) { n.Xattrs = []tree.Xattr{{Name: "system.nfs4_acl"}} }), `"/dir/bad": xattr "system.nfs4_acl"`},
		{"xattr without a name", with(func(n *tree.Inode) { n.Xattrs = []tree.Xattr{{Name: "user."}} }), `"/dir/bad": xattr "user."`},
		{"long xattr name", with(func(n *tree.Inode) { n.Xattrs = []tree.Xattr{{Name: "user." + strings.Repeat("n", 251)}} }), `not a name of at most 255`},
		{"64 KiB value", with(func(n *tree.Inode) { n.Xattrs = []tree.Xattr{{Name: "user.x", Value: make([]byte, 64<<10)}} }), `"/dir/bad": xattr "user.x": value of 65536 bytes, at most 65535`},
		{"xattrs above 256 KiB", with(func(n *tree.Inode) { n.Xattrs = manyXattrs }), `"/dir/bad": xattrs of 307252 bytes, at most 262148`},
		{"xattr twice", with(func(n *tree.Inode) { n.Xattrs = []tree.Xattr{{Name: "user.x"}, {Name: "user.x"}} }), `"/dir/bad": xattr "user.x": out of order or twice`},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := New(&tree.Tree{Root: test.root})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want %s", err, test.want)
			}
		})
	}
}

// TestSourceFails checks that a file whose source is short or broken is named,
// and that no bytes are made up for it.
func TestSourceFails(t *testing.T) {
	broken := errors.New("broken")
	for _, test := range []struct {
		name   string
		source io.ReaderAt
		want   error
	}{
		{"short", bytes.NewReader(make([]byte, 50000)), io.ErrUnexpectedEOF},
		{"broken", failingAt{broken}, broken},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := file(noise(1, 100000))
			n.Content.Source = test.source
			_, err := plan(t, dir(entries{"etc": dir(entries{"bad": n})})).WriteTo(io.Discard)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), `"/etc/bad"`) {
				t.Errorf(`got error %v, want "/etc/bad": … %v`, err, test.want)
			}
		})
	}
}

type failingAt struct{ err error }

func (f failingAt) ReadAt([]byte, int64) (int, error) { return 0, f.err }

func TestXattrClasses(t *testing.T) {
	x := func(names ...string) *tree.Inode {
		n := file(nil)
		for _, name := range names {
			n.Xattrs = append(n.Xattrs, tree.Xattr{Name: name})
		}
		return n
	}
	for _, test := range []struct {
		root *tree.Inode
		want []string
	}{
		{dir(nil), nil},
		{dir(entries{"a": x("user.a"), "b": dir(entries{"c": x("security.capability")})}), []string{"security", "user"}},
		{dir(entries{"a": x("system.posix_acl_default", "trusted.x")}), []string{"system", "trusted"}},
	} {
		if got := plan(t, test.root).XattrClasses(); !slices.Equal(got, test.want) {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}

// BenchmarkNew plans a root of 100,000 files.
func BenchmarkNew(b *testing.B) {
	tr := manyFiles(100000)
	b.ReportAllocs()
	for b.Loop() {
		p, err := New(tr)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(p.Meta()))/100000, "meta-B/inode")
	}
}

// BenchmarkWriteTo streams an image whose contents are in memory.
func BenchmarkWriteTo(b *testing.B) {
	e := entries{}
	for i := range 2000 {
		e[fmt.Sprint("small", i)] = file(noise(uint64(i), 5000))
	}
	for i := range 20 {
		e[fmt.Sprint("large", i)] = file(noise(uint64(i), 4<<20))
	}
	p := plan(b, dir(e))
	b.SetBytes(p.Size())
	for b.Loop() {
		if _, err := p.WriteTo(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

// manyFiles is a tree of n small files in directories of 100.
func manyFiles(n int) *tree.Tree {
	root := dir(entries{})
	for d := range n / 100 {
		sub := dir(entries{})
		for f := range 100 {
			sub.Entries[fmt.Sprintf("some-file-%d.py", f)] = file([]byte("content"))
		}
		root.Entries[fmt.Sprintf("directory-%d", d)] = sub
	}
	return &tree.Tree{Root: root}
}
