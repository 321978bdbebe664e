package rootimage

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// randomTree grows a tree of up to 200 inodes from a seed, with sizes that
// gather where the format has edges.
func randomTree(seed uint64) *tree.Tree {
	rng := rand.New(rand.NewPCG(seed, 0))
	// near picks one of the edges, or a little more or less.
	near := func(edges ...int) int {
		return max(0, edges[rng.IntN(len(edges))]+rng.IntN(9)-4)
	}
	xattrs := func(mode uint32) (x []tree.Xattr) {
		classes := []string{"security", "trusted", "trusted"}
		if mode&unix.S_IFMT == unix.S_IFREG || mode&unix.S_IFMT == unix.S_IFDIR {
			classes[2] = "user" // which the kernel shows of no other file
		}
		for i := range rng.IntN(4) * rng.IntN(2) {
			class := classes[i]
			size := near(0, 100, 3900, 4000, 8192) * rng.IntN(2)
			x = append(x, tree.Xattr{Name: fmt.Sprintf("%s.%d", class, i), Value: noise(rng.Uint64(), size)})
		}
		return x
	}
	root := dir(entries{})
	dirs, files := []*tree.Inode{root}, []*tree.Inode{}
	for range rng.IntN(200) {
		var n *tree.Inode
		switch rng.IntN(8) {
		case 0, 1:
			n = dir(entries{})
			dirs = append(dirs, n)
		case 2:
			n = link(string(bytes.Repeat([]byte("t"), 1+near(1, 100, 3900, 4000))))
		case 3:
			n = &tree.Inode{Mode: unix.S_IFCHR, Rdev: unix.Mkdev(rng.Uint32N(4096), rng.Uint32N(1<<20))}
		case 4:
			if size := int64(near(1<<20, 4<<20, 9<<20)); size > 2<<20 {
				n = sparseFile(size, rng.Int64N(1<<20), 1<<20+rng.Int64N(1<<19))
			} else {
				n = sparseFile(size)
			}
		case 5:
			if len(files) > 0 {
				n = files[rng.IntN(len(files))]
				break
			}
			fallthrough
		default:
			n = file(noise(rng.Uint64(), near(0, 4096, smallFile)))
		}
		if !n.IsDir() {
			files = append(files, n)
		}
		n.Mode = n.Mode&unix.S_IFMT | rng.Uint32N(1<<12)
		n.UID, n.GID = rng.Uint32(), rng.Uint32()
		n.MtimeSec, n.MtimeNsec = int64(rng.Uint64())>>rng.IntN(63), rng.Uint32N(1e9)
		n.Xattrs = xattrs(n.Mode)
		name := noise(rng.Uint64(), 1+near(1, 10, 250)%255)
		for i, c := range name {
			if c == 0 || c == '/' || c == '.' {
				name[i] = 'x'
			}
		}
		dirs[rng.IntN(len(dirs))].Entries[string(name)] = n
	}
	return &tree.Tree{Root: root}
}

// FuzzPlan makes the image of a random tree and reads the tree back from it.
func FuzzPlan(f *testing.F) {
	for seed := range uint64(30) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		tr := randomTree(seed)
		p, err := New(tr)
		if err != nil {
			t.Fatal(err)
		}
		var image bytes.Buffer
		if _, err := p.WriteTo(&image); err != nil {
			t.Fatal(err)
		}
		r, err := erofs.NewReader(p.Meta())
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Verify(); err != nil {
			t.Error(err)
		}
		viewReader(t, r, bytes.NewReader(image.Bytes())).compare(t, viewTree(tr))
	})
}

// TestRandomTreesMounted shows some random trees to fsck.erofs and the kernel.
func TestRandomTreesMounted(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			tr := randomTree(seed)
			p, err := New(tr)
			if err != nil {
				t.Fatal(err)
			}
			image := writeImage(t, p)
			if out, err := exec.Command("fsck.erofs", image).CombinedOutput(); err != nil {
				t.Errorf("fsck.erofs: %v\n%s", err, out)
			}
			viewMount(t, mount(t, image)).compare(t, viewTree(tr))
		})
	}
}
