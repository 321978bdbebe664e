package assembly

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// The budget of the metadata is 40 bytes per inode, compressed. The names,
// sizes and times are those of this machine's /usr/share, with contents of
// zeros that nobody reads.
func TestMetadataBudget(t *testing.T) {
	inodes := 0
	var read func(dir string) *tree.Inode
	read = func(dir string) *tree.Inode {
		inodes++
		n := inodeOf(t, dir)
		n.Entries = map[string]*tree.Inode{}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if inodes > 10_000 {
				break
			}
			name := filepath.Join(dir, e.Name())
			switch {
			case e.IsDir():
				n.Nlink++
				n.Entries[e.Name()] = read(name)
			case e.Type().IsRegular() || e.Type() == os.ModeSymlink:
				inodes++
				n.Entries[e.Name()] = inodeOf(t, name)
			}
		}
		return n
	}
	in := testInput(t, &tree.Tree{Root: read("/usr/share")}, `{"os":"linux"}`)
	plan, err := rootimage.New(in.Tree)
	if err != nil {
		t.Fatal(err)
	}
	size := func(meta []byte) int64 {
		in.Meta = meta
		m := must(must(BootImage(in))(t).Manifest())(t)
		return m.Layers[1].Size
	}
	got := float64(size(plan.Meta())-size(nil)) / float64(inodes)
	t.Logf("%d inodes, %.1f bytes each, %.1f compressed", inodes, float64(len(plan.Meta()))/float64(inodes), got)
	if got > 40 {
		t.Errorf("%.1f bytes per inode", got)
	}
}

func inodeOf(t testing.TB, name string) *tree.Inode {
	t.Helper()
	var s syscall.Stat_t
	if err := syscall.Lstat(name, &s); err != nil {
		t.Fatal(err)
	}
	n := &tree.Inode{Mode: s.Mode, UID: s.Uid, GID: s.Gid, MtimeSec: s.Mtim.Sec, MtimeNsec: uint32(s.Mtim.Nsec), Nlink: 1}
	switch {
	case n.IsDir():
		n.Nlink = 2
	case n.IsSymlink():
		n.Target = must(os.Readlink(name))(t)
	default:
		if n.Size = s.Size; n.Size > 0 {
			n.Content = tree.Content{Source: zeroReader{}, Extents: []tree.Extent{{Length: n.Size}}}
		}
	}
	return n
}
