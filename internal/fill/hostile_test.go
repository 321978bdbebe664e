package fill

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Offsets in the superblock's block and in an inode; see internal/erofs.
const (
	superAt, checksumAt = 1024, 1028
	inodeBlock          = 16
	inodeLinks          = 44
)

// seal makes the checksum of changed metadata right.
func seal(meta []byte) []byte {
	block := bytes.Clone(meta[superAt:erofs.BlockSize])
	clear(block[checksumAt-superAt:][:4])
	binary.LittleEndian.PutUint32(meta[checksumAt:], ^crc32.Update(0, castagnoli, block))
	return meta
}

// nid returns the place of the inode name in the root of meta.
func nid(t *testing.T, meta []byte, name string) int {
	t.Helper()
	r, err := erofs.NewReader(meta)
	try(t, err)
	root, err := r.Inode(r.RootNID())
	try(t, err)
	n, err := r.Lookup(root, name)
	try(t, err)
	return int(n) * 32
}

func TestHostile(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	le := binary.LittleEndian
	for name, test := range map[string]struct {
		want   string
		damage func(t *testing.T, m *image)
	}{
		"files that share bytes": {"share bytes of the image", func(t *testing.T, m *image) {
			copy(m.meta[nid(t, m.meta, "guarded")+inodeBlock:][:4], m.meta[nid(t, m.meta, "program")+inodeBlock:][:4])
		}},
		"a file with itself": {"share bytes of the image", func(t *testing.T, m *image) {
			// One inode with two names that says it has one.
			r, err := erofs.NewReader(m.meta)
			try(t, err)
			root, err := r.Inode(r.RootNID())
			try(t, err)
			a, err := r.Lookup(root, "a")
			try(t, err)
			dir, err := r.Inode(a)
			try(t, err)
			one, err := r.Lookup(dir, "one")
			try(t, err)
			le.PutUint32(m.meta[one*32+inodeLinks:], 1)
		}},
		"bytes behind the image": {"outside the image", func(t *testing.T, m *image) {
			le.PutUint32(m.meta[nid(t, m.meta, "large")+inodeBlock:], 1<<31)
		}},
		"a name with a slash": {"no sound name", func(t *testing.T, m *image) {
			at := bytes.Index(m.meta, []byte("small050"))
			copy(m.meta[at:], "small/50")
		}},
		"a name that leads up": {`entry ".." behind`, func(t *testing.T, m *image) {
			tr := &tree.Tree{Root: dirNode(map[string]*tree.Inode{"zz": fileNode([]byte("x"))})}
			up := newImage(t, tr)
			m.meta, m.x = bytes.Replace(up.meta, []byte("zz"), []byte(".."), 1), up.x
		}},
		"a directory in itself": {"points back", func(t *testing.T, m *image) {
			r, err := erofs.NewReader(m.meta)
			try(t, err)
			from := le.AppendUint64(nil, uint64(nid(t, m.meta, "many")/32))
			to := le.AppendUint64(nil, r.RootNID())
			at := bytes.Index(m.meta[r.RootNID()*32:], from) + int(r.RootNID())*32
			copy(m.meta[at:], to)
		}},
		"an index of another image": {"the index has", func(t *testing.T, m *image) {
			m.x = newImage(t, &tree.Tree{Root: dirNode(map[string]*tree.Inode{"x": fileNode(noise(1, 5000))})}).x
		}},
		"no metadata": {"metadata of 0 bytes", func(t *testing.T, m *image) { m.meta = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			m := newImage(t, sample())
			m.meta = bytes.Clone(m.meta)
			test.damage(t, m)
			if len(m.meta) > 0 {
				seal(m.meta)
			}
			dir := t.TempDir()
			_, err := m.fill(t, dir, Options{})
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("in the directory: %v, %v", left, err)
			}
		})
	}
}

// TestWrongSize has a fetcher that delivers less than the index says.
func TestWrongSize(t *testing.T) {
	m := newImage(t, sample())
	for id, b := range m.chunks {
		m.chunks[id] = b[:len(b)-1]
	}
	if _, err := m.fill(t, t.TempDir(), Options{}); err == nil || !strings.Contains(err.Error(), "bytes, want") {
		t.Errorf("got %v", err)
	}
}

// ones delivers chunks of ones, whatever their name.
type ones struct{}

func (ones) Fetch(_ context.Context, c index.Chunk, dst []byte) ([]byte, error) {
	return append(dst, bytes.Repeat([]byte{1}, c.Size)...), nil
}

func (o ones) FetchBatch(ctx context.Context, cs []index.Chunk, yield func(int, []byte) error) error {
	for i, c := range cs {
		plain, _ := o.Fetch(ctx, c, nil)
		if err := yield(i, plain); err != nil {
			return err
		}
	}
	return nil
}

// FuzzRoot fills a directory from any metadata and any index: nothing outside
// of it changes, and what was filled once is complete.
func FuzzRoot(f *testing.F) {
	var file bytes.Buffer
	add := func(tr *tree.Tree) {
		m, err := makeImage(tr)
		try(f, err)
		file.Reset()
		w := index.NewWriter(&file, sizes, index.SHA256)
		for i := range m.x.Len() {
			c, _ := m.x.At(i)
			try(f, w.Append(c.ID, c.Size))
		}
		try(f, w.Close())
		f.Add(m.meta, bytes.Clone(file.Bytes()))
	}
	small := sample()
	for _, name := range []string{"many", "holes", "zeros", "large"} {
		delete(small.Root.Entries, name)
	}
	add(small)
	add(sample())
	for seed := range uint64(3) {
		add(randomTree(seed))
	}
	f.Fuzz(func(t *testing.T, meta, table []byte) {
		x, err := index.Open(table)
		if err != nil || x.Size() > 16<<20 {
			return
		}
		// What is no superblock's checksum shall be one: all else is reached so.
		if len(meta) >= erofs.BlockSize {
			meta = seal(bytes.Clone(meta))
		}
		if r, err := erofs.NewReader(meta); err != nil || r.Inodes() > 2000 {
			return
		}
		// In memory: to wait for a disk each time takes longer than all else.
		outside, err := os.MkdirTemp("/dev/shm", "fill")
		try(t, err)
		defer os.RemoveAll(outside)
		dir := filepath.Join(outside, "root")
		try(t, os.Mkdir(dir, 0o755), os.Symlink(outside, filepath.Join(dir, "a")), os.Symlink(outside, filepath.Join(dir, "twins")))
		o := Options{Meta: meta, Index: x, Fetcher: ones{}, State: filepath.Join(dir, ".state")}
		_, err = Root(t.Context(), dir, o)
		if left, failed := os.ReadDir(outside); failed != nil || len(left) != 1 {
			t.Fatalf("beside the root: %v, %v", left, failed)
		}
		if err != nil {
			return
		}
		if r, err := Root(t.Context(), dir, o); err != nil || r.Bytes != 0 {
			t.Errorf("the second time: %+v, %v", r, err)
		}
	})
}

// randomTree grows a tree of up to 150 inodes from a seed.
func randomTree(seed uint64) *tree.Tree {
	rng := rand.New(rand.NewPCG(seed, 1))
	near := func(edges ...int) int { return max(0, edges[rng.IntN(len(edges))]+rng.IntN(9)-4) }
	root := dirNode(map[string]*tree.Inode{})
	dirs, files := []*tree.Inode{root}, []*tree.Inode{}
	for i := range 1 + rng.IntN(150) {
		var n *tree.Inode
		switch rng.IntN(9) {
		case 0, 1:
			n = dirNode(map[string]*tree.Inode{})
			dirs = append(dirs, n)
		case 2:
			n = &tree.Inode{Mode: unix.S_IFLNK, Target: strings.Repeat("t", 1+near(1, 100, 3900))}
		case 3:
			n = &tree.Inode{Mode: unix.S_IFCHR, Rdev: unix.Mkdev(1+rng.Uint32N(4095), rng.Uint32N(1<<20))}
		case 4:
			n = fileNode(noise(seed, 300))
			n.Size = int64(near(2<<20, 4<<20, 9<<20))
			n.Content.Extents = []tree.Extent{{Logical: rng.Int64N(1 << 19), Length: 300}, {Logical: n.Size - 300, Length: 300}}
		case 5:
			n = fileNode(append(make([]byte, near(0, 4096, 70_000)), noise(seed, near(0, 4096, 70_000))...))
		case 6:
			if len(files) > 0 {
				n = files[rng.IntN(len(files))]
				break
			}
			fallthrough
		default:
			n = fileNode(noise(rng.Uint64N(50), near(0, 1024, 4096, 16<<10, 32<<10, 200_000)))
		}
		if !n.IsDir() {
			files = append(files, n)
		}
		n.Mode = n.Mode&unix.S_IFMT | rng.Uint32N(1<<12)
		if n.IsSymlink() {
			n.Mode |= 0o777
		}
		n.UID, n.GID = rng.Uint32N(3)*rng.Uint32N(1<<31), rng.Uint32N(3)*rng.Uint32N(1<<31)
		n.MtimeSec, n.MtimeNsec = rng.Int64N(1<<33)-1<<30, rng.Uint32N(1e9)
		if rng.IntN(6) == 0 && (n.IsDir() || n.IsRegular()) {
			n.Xattrs = []tree.Xattr{{Name: "trusted.x", Value: noise(seed, near(0, 100))}, {Name: "user.x", Value: noise(seed, near(0, 900))}}
		}
		name := fmt.Sprintf("%d%s", i, noise(rng.Uint64(), 1+near(1, 10, 240)))
		name = strings.NewReplacer("/", "x", "\x00", "y").Replace(name)
		dirs[rng.IntN(len(dirs))].Entries[name] = n
	}
	return &tree.Tree{Root: root}
}

// TestRandomTrees fills random trees over what is of another kind, in random
// orders, some of it in the end.
func TestRandomTrees(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			tr := randomTree(seed)
			m := newImage(t, tr)
			rng := rand.New(rand.NewPCG(seed, 2))
			dir, outside := t.TempDir(), t.TempDir()
			inTheWay := map[string]bool{}
			try(t, tr.Walk(func(path string, n *tree.Inode) error {
				at := filepath.Join(dir, path)
				if path == "/" || rng.IntN(3) > 0 || inTheWay[filepath.Dir(path)] {
					inTheWay[path] = path != "/"
					return nil
				}
				switch kind := rng.IntN(4); {
				case n.IsDir() && kind > 0:
					return os.Mkdir(at, os.FileMode(rng.IntN(0o1000)))
				case kind == 0:
					inTheWay[path] = true
					return os.Symlink(outside, at)
				case kind == 1 && !n.IsDir():
					inTheWay[path] = true
					return os.MkdirAll(filepath.Join(at, "below/it"), 0o755)
				default:
					inTheWay[path] = true
					return os.WriteFile(at, []byte("before"), 0o600)
				}
			}))
			order := rng.Perm(m.x.Len())
			r, err := m.fill(t, dir, Options{
				Last: func(path string) bool { return len(path)%3 == 0 },
				Order: func(yield func(int) bool) {
					for _, pos := range order[:len(order)/2] {
						if !yield(pos) {
							return
						}
					}
				},
			})
			if err != nil || r.Left != nil {
				t.Fatalf("%+v, %v", r, err)
			}
			if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
				t.Errorf("outside of the root: %v, %v", left, err)
			}
			compare(t, dir, want(t, tr))
		})
	}
}

// TestHostileJournal has what another container can put in the place of the
// journal in a volume that it shares. One that is longer than the image allows
// is none; what is no file is an error, and nobody waits for it.
func TestHostileJournal(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	for name, test := range map[string]struct {
		want string
		put  func(at string) error
	}{
		"1 TiB": {"", func(at string) error {
			return errors.Join(os.WriteFile(at, []byte(journalMagic), 0o600), os.Truncate(at, 1<<40))
		}},
		"FIFO":      {"no regular file", func(at string) error { return unix.Mkfifo(at, 0o600) }},
		"symlink":   {"too many levels of symbolic links", func(at string) error { return os.Symlink("/dev/zero", at) }},
		"directory": {"is a directory", func(at string) error { return os.Mkdir(at, 0o700) }},
	} {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			tr := sample()
			dir := t.TempDir()
			try(t, os.Mkdir(filepath.Join(dir, ".state"), 0o700), test.put(filepath.Join(dir, ".state", journalName)))
			_, err := newImage(t, tr).fill(t, dir, Options{})
			if (err == nil) != (test.want == "") || err != nil && (!strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n")) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			if info, err := os.Stat(filepath.Join(dir, ".state", journalName)); test.want == "" && (err != nil || info.Size() > 1<<20) {
				t.Errorf("the journal afterwards: %v, %v", info, err)
			}
		})
	}
}

// FuzzJournal reads any journal of an image: what it says is bounded by the
// image, and what is read again behind its good records adds nothing.
func FuzzJournal(f *testing.F) {
	file, err := os.CreateTemp(f.TempDir(), "")
	try(f, err)
	defer file.Close()
	j := &journal{file: file, done: make([]uint64, 2)}
	same := make([]uint32, 128)
	same[3], same[70], same[1] = 70, 3, 1
	try(f, j.add(3, same), j.add(1, same), j.finish())
	b, err := os.ReadFile(file.Name())
	try(f, err)
	f.Add(b, uint16(100))
	f.Add(b[:20], uint16(2))
	f.Add(binary.LittleEndian.AppendUint32(nil, 1<<32-2), uint16(5))
	f.Fuzz(func(t *testing.T, b []byte, chunks uint16) {
		read := func(b []byte) (*journal, int, bool) {
			j := &journal{done: make([]uint64, (int(chunks)+63)/64)}
			good, complete := j.replay(b, int(chunks))
			return j, good, complete
		}
		j, good, complete := read(b)
		if good < 0 || good > len(b) || complete && good < 8 {
			t.Fatalf("%d good bytes of %d", good, len(b))
		}
		for i := int(chunks); i < 64*len(j.done); i++ {
			if j.done[i/64]&(1<<(i%64)) != 0 {
				t.Fatalf("chunk %d of %d", i, chunks)
			}
		}
		again, n, whole := read(b[:good])
		if n != good || whole != complete || fmt.Sprint(again.done) != fmt.Sprint(j.done) {
			t.Errorf("read again: %d bytes, want %d", n, good)
		}
	})
}
