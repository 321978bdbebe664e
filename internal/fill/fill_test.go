package fill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
	"github.com/container-bootfs/bootfs/internal/unpack"
)

// image is a root image in memory, cut into chunks, and the fetcher of them.
type image struct {
	meta   []byte
	x      *index.Index
	chunks map[index.ID][]byte

	fetched atomic.Int64                             // chunks that were delivered
	before  func(i int64, c index.Chunk) (err error) // called before each of them, may be nil
}

// sizes cuts small: trees of tests are small.
var sizes = chunker.Params{Min: 1 << 10, Avg: 4 << 10, Max: 16 << 10}

func newImage(t testing.TB, tr *tree.Tree) *image {
	t.Helper()
	m, err := makeImage(tr)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func makeImage(tr *tree.Tree) (*image, error) {
	p, err := rootimage.New(tr)
	if err != nil {
		return nil, err
	}
	cutter, err := chunker.New(sizes)
	if err != nil {
		return nil, err
	}
	m := &image{meta: p.Meta(), chunks: make(map[index.ID][]byte)}
	var file bytes.Buffer
	w := index.NewWriter(&file, sizes, index.SHA256)
	for u := range p.Units() {
		r := p.Open(u)
		var unit bytes.Buffer
		if _, err := unit.ReadFrom(r); err != nil {
			return nil, err
		}
		for b := unit.Bytes(); len(b) > 0; {
			n := cutter.Cut(b)
			id := index.SHA256.Sum(b[:n])
			m.chunks[id] = bytes.Clone(b[:n])
			if err := w.Append(id, n); err != nil {
				return nil, err
			}
			b = b[n:]
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	m.x, err = index.Open(file.Bytes())
	return m, err
}

func (m *image) Fetch(ctx context.Context, c index.Chunk, dst []byte) ([]byte, error) {
	err := m.FetchBatch(ctx, []index.Chunk{c}, func(_ int, plain []byte) error {
		dst = append(dst, plain...)
		return nil
	})
	return dst, err
}

var errGone = errors.New("no store has it")

func (m *image) FetchBatch(ctx context.Context, cs []index.Chunk, yield func(i int, plain []byte) error) error {
	var missing error
	for i, c := range cs {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := m.fetched.Add(1)
		if m.before != nil {
			if err := m.before(n, c); err != nil {
				missing = err
				continue
			}
		}
		plain, ok := m.chunks[c.ID]
		if !ok {
			missing = fmt.Errorf("chunk %s: %w", c.ID, errGone)
			continue
		}
		if err := yield(i, plain); err != nil {
			return err
		}
	}
	return missing
}

// fill writes m below dir, with the state in .state there.
func (m *image) fill(t testing.TB, dir string, o Options) (Report, error) {
	t.Helper()
	return m.root(t.Context(), dir, o)
}

func (m *image) root(ctx context.Context, dir string, o Options) (Report, error) {
	o.Meta, o.Index, o.Fetcher = m.meta, m.x, m
	if o.State == "" {
		o.State = filepath.Join(dir, ".state")
	}
	return Root(ctx, dir, o)
}

func dirNode(entries map[string]*tree.Inode) *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFDIR | 0o755, MtimeSec: 1_000_000_000, MtimeNsec: 5, Entries: entries}
}

func fileNode(b []byte) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o644, MtimeSec: 12345, MtimeNsec: 678, Size: int64(len(b))}
	if len(b) > 0 {
		n.Content = tree.Content{Source: bytes.NewReader(b), Extents: []tree.Extent{{Length: n.Size}}}
	}
	return n
}

func noise(seed uint64, size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// capability is a security.capability of cap_net_raw+ep.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// acl is user::rw-, user:1:r--, group::r--, mask::r--, other::---.
var acl = []byte("\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x01\x00\x00\x00" +
	"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")

// sample has a file of every kind.
func sample() *tree.Tree {
	program := fileNode([]byte("program"))
	program.Mode, program.UID, program.GID = unix.S_IFREG|0o6755, 5, 6
	program.Xattrs = []tree.Xattr{{Name: "security.capability", Value: capability}, {Name: "user.x", Value: []byte("y")}}
	linked := fileNode([]byte("linked"))
	guarded := fileNode([]byte("guarded"))
	guarded.Mode = unix.S_IFREG | 0o640
	guarded.Xattrs = []tree.Xattr{{Name: "system.posix_acl_access", Value: acl}}
	sparse := fileNode(nil)
	sparse.Size = 1 << 30
	sparse.Content = tree.Content{Source: bytes.NewReader(noise(9, 300)), Extents: []tree.Extent{{Logical: 5 << 20, Length: 300}, {Logical: 1<<30 - 300, Length: 300}}}
	locked := dirNode(map[string]*tree.Inode{"inside": fileNode([]byte("x"))})
	locked.Mode, locked.UID = unix.S_IFDIR|0o3500, 7
	locked.Xattrs = []tree.Xattr{{Name: "system.posix_acl_default", Value: acl}}
	shut := dirNode(map[string]*tree.Inode{"inside": fileNode([]byte("x"))})
	shut.Mode = unix.S_IFDIR
	twin := noise(3, 100_000)
	symlink := &tree.Inode{Mode: unix.S_IFLNK | 0o777, MtimeSec: 99, UID: 3, Target: "/etc/passwd"}
	many := map[string]*tree.Inode{strings.Repeat("n", 255): fileNode([]byte("long")), "\xfe\n": fileNode(nil)}
	for i := range 200 {
		many[fmt.Sprintf("small%03d", i)] = fileNode(noise(uint64(i), 37*i))
	}
	return &tree.Tree{Root: dirNode(map[string]*tree.Inode{
		"program": program, "guarded": guarded, "locked": locked, "shut": shut, "many": dirNode(many),
		"a":      dirNode(map[string]*tree.Inode{"one": linked, "l": symlink}),
		"b":      dirNode(map[string]*tree.Inode{"two": linked, "l": symlink}),
		"link":   {Mode: unix.S_IFLNK | 0o777, Target: "/etc/passwd"},
		"null":   {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
		"disk":   {Mode: unix.S_IFBLK | 0o660, GID: 6, Rdev: unix.Mkdev(259, 70000)},
		"fifo":   {Mode: unix.S_IFIFO | 0o600},
		"socket": {Mode: unix.S_IFSOCK | 0o755},
		"holes":  sparse,
		"zeros":  fileNode(make([]byte, 300_000)),
		"large":  fileNode(noise(1, 3_000_000)),
		"twins":  dirNode(map[string]*tree.Inode{"x": fileNode(twin), "y": fileNode(twin)}),
	})}
}

// want is the manifest of tr as unpack writes it.
func want(t *testing.T, tr *tree.Tree) treecmp.Manifest {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "want")
	countLinks(tr.Root, map[*tree.Inode]bool{})
	if _, err := unpack.Dir(t.Context(), tr, dir, unpack.Options{}); err != nil {
		t.Fatal(err)
	}
	m, err := treecmp.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// countLinks sets Nlink of files, which unpack goes by.
func countLinks(n *tree.Inode, seen map[*tree.Inode]bool) {
	for _, e := range n.Entries {
		if e.IsDir() {
			countLinks(e, seen)
			continue
		}
		if !seen[e] {
			seen[e], e.Nlink = true, 0
		}
		e.Nlink++
	}
}

// compare compares what stands in dir with m. What the tests put beside it is
// left out.
func compare(t *testing.T, dir string, m treecmp.Manifest) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(dir, ".state")); err != nil {
		t.Fatal(err)
	}
	root := m["/"]
	ts := unix.Timespec{Sec: root.MtimeSec, Nsec: int64(root.MtimeNsec)}
	if err := unix.UtimesNano(dir, []unix.Timespec{ts, ts}); err != nil {
		t.Fatal(err)
	}
	got, err := treecmp.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := treecmp.Diff(got, m); diff != nil {
		t.Errorf("%s", strings.Join(diff[:min(len(diff), 30)], "\n"))
	}
}

func TestRoot(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir := t.TempDir()
	var done, total atomic.Int64
	r, err := m.fill(t, dir, Options{Progress: func(d, all int64) {
		for old := done.Load(); old < d && !done.CompareAndSwap(old, d); old = done.Load() {
		}
		total.Store(all)
	}})
	if err != nil {
		t.Fatal(err)
	}
	if r.Left != nil || r.Resumed != 0 || r.Bytes != total.Load() || done.Load() != total.Load() || r.Files != 225 {
		t.Errorf("report %+v, progress %d of %d", r, done.Load(), total.Load())
	}
	if n := int(m.fetched.Load()); n > len(m.chunks) {
		t.Errorf("fetched %d chunks of %d", n, len(m.chunks))
	}
	var st unix.Stat_t
	for _, name := range []string{"holes", "zeros"} {
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil || st.Blocks*512 > 8<<20 {
			t.Errorf("%s takes %d bytes, %v", name, st.Blocks*512, err)
		}
	}
	// Once more: it is complete.
	before := m.fetched.Load()
	r, err = m.fill(t, dir, Options{})
	if err != nil || r.Bytes != 0 || r.Resumed != total.Load() || m.fetched.Load() != before {
		t.Errorf("a second call: %+v, %v, %d chunks fetched", r, err, m.fetched.Load()-before)
	}
	compare(t, dir, want(t, tr))
}
