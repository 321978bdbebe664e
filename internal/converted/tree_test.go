package converted

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

func dir(entries map[string]*tree.Inode) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Entries: entries}
	for _, e := range entries {
		if e.IsDir() {
			n.Nlink++
		}
	}
	return n
}

func file(b []byte) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o4711, UID: 70000, GID: 5, MtimeSec: -77, MtimeNsec: 999_999_999, Nlink: 1, Size: int64(len(b))}
	if len(b) > 0 {
		n.Content = tree.Content{Source: bytes.NewReader(b), Extents: []tree.Extent{{Length: n.Size}}}
	}
	return n
}

// sampleTree has every kind of inode.
func sampleTree() *tree.Tree {
	linked := file([]byte("linked"))
	linked.Nlink = 2
	sparse := file([]byte("end"))
	sparse.Size = 8 << 20
	sparse.Content.Extents = []tree.Extent{{Logical: 7 << 20, Length: 3}}
	tagged := file(bytes.Repeat([]byte("x"), 100_000))
	tagged.Xattrs = []tree.Xattr{{Name: "security.capability", Value: []byte("\x01\x00\x00\x02")}, {Name: "user.a", Value: bytes.Repeat([]byte("v"), 300)}}
	many := map[string]*tree.Inode{}
	for i := range 500 {
		many[fmt.Sprintf("%s%d", strings.Repeat("n", i%200), i)] = file(bytes.Repeat([]byte{byte(i)}, i*7))
	}
	return &tree.Tree{Root: dir(map[string]*tree.Inode{
		"a": dir(map[string]*tree.Inode{"one": linked, "empty": file(nil), "deep": dir(map[string]*tree.Inode{"deeper": dir(nil)})}),
		"b": dir(map[string]*tree.Inode{"two": linked, "\xff\n": file([]byte("name that is not UTF-8"))}),
		"c": {Mode: unix.S_IFLNK | 0o777, Nlink: 1, Target: "../no where"},
		"d": {Mode: unix.S_IFCHR | 0o600, Nlink: 1, Rdev: unix.Mkdev(240, 70_000)},
		"e": {Mode: unix.S_IFIFO | 0o644, Nlink: 1},
		"f": {Mode: unix.S_IFSOCK | 0o644, Nlink: 1},
		"s": sparse, "t": tagged, "many": dir(many),
	})}
}

// TestTree goes from a tree to its root image and back.
func TestTree(t *testing.T) {
	want := sampleTree()
	plan, err := rootimage.New(want)
	if err != nil {
		t.Fatal(err)
	}
	var image bytes.Buffer
	if _, err := plan.WriteTo(&image); err != nil {
		t.Fatal(err)
	}
	got, err := Tree(plan.Meta(), bytes.NewReader(image.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	a, err := treecmp.Tree(got)
	if err != nil {
		t.Fatal(err)
	}
	b, err := treecmp.Tree(want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := treecmp.Diff(a, b); diff != nil {
		t.Errorf("%s", strings.Join(diff, "\n"))
	}
}

// TestTreeHostile damages metadata at random: an error or some tree, but
// neither a panic nor more memory than the metadata justify.
func TestTreeHostile(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	plan, err := rootimage.New(sampleTree())
	if err != nil {
		t.Fatal(err)
	}
	good := plan.Meta()
	r := rand.New(rand.NewPCG(1, 2))
	var before, after runtime.MemStats
	for i := range 3000 {
		meta := bytes.Clone(good)
		for range 1 + r.IntN(4) {
			at := r.IntN(len(meta) - 8)
			switch r.IntN(3) {
			case 0:
				meta[at] ^= 1 << r.IntN(8)
			case 1:
				binary.LittleEndian.PutUint64(meta[at:], r.Uint64()>>r.IntN(64))
			default:
				from := r.IntN(len(meta) - 64)
				copy(meta[at&^31:], meta[from&^31:from&^31+32]) // one slot over another
			}
		}
		runtime.ReadMemStats(&before)
		_, _ = Tree(meta, nil)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > uint64(100*len(meta)) {
			t.Fatalf("damage %d: %d bytes allocated for %d of metadata", i, used, len(meta))
		}
	}
}

func FuzzTree(f *testing.F) {
	plan, err := rootimage.New(sampleTree())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plan.Meta())
	small, err := rootimage.New(&tree.Tree{Root: dir(nil)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small.Meta())
	f.Fuzz(func(t *testing.T, meta []byte) {
		root, err := Tree(meta, nil)
		if err != nil {
			return
		}
		for name := range root.Root.Entries {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
				t.Fatalf("name %q", name)
			}
		}
	})
}
