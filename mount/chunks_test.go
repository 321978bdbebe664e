package mount

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/rootimage"
)

// memory is a chunk store without a network.
type memory struct {
	mu     sync.Mutex // guards frames
	frames map[index.ID][]byte
}

func (m *memory) String() string { return "memory" }

func (m *memory) Get(_ context.Context, id index.ID, dst []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	frame, ok := m.frames[id]
	if !ok {
		return nil, chunkstore.ErrNotFound
	}
	return append(dst, frame...), nil
}

func (m *memory) Has(_ context.Context, id index.ID) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.frames[id]
	return ok, nil
}

func (m *memory) put(id index.ID, plain []byte) {
	if ok, _ := m.Has(context.Background(), id); ok {
		return
	}
	frame := chunkstore.Encode(nil, plain)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frames[id] = frame
}

// damage flips a bit of every chunk, once more to heal them.
func (m *memory) damage() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, frame := range m.frames {
		frame[len(frame)-1] ^= 1
	}
}

// chunked cuts the root image of plan into a store.
func chunked(t testing.TB, plan *rootimage.Plan) (*index.Index, *memory) {
	t.Helper()
	c, err := chunker.New(chunker.V1)
	if err != nil {
		t.Fatal(err)
	}
	store := &memory{frames: make(map[index.ID][]byte)}
	var (
		xb   bytes.Buffer
		work errgroup.Group
		buf  = make([]byte, 8<<20)
	)
	work.SetLimit(4)
	w := index.NewWriter(&xb, chunker.V1, index.SHA256)
	for u := range plan.Units() {
		r := plan.Open(u)
		for have, ended := 0, false; !ended || have > 0; {
			for !ended && have < len(buf)/2 {
				n, err := r.Read(buf[have:])
				have += n
				if ended = errors.Is(err, io.EOF); err != nil && !ended {
					t.Fatal(err)
				}
			}
			at := 0
			for at < have && (ended || have-at >= chunker.V1.Max) {
				n := c.Cut(buf[at:have])
				plain := bytes.Clone(buf[at : at+n])
				id := index.SHA256.Sum(plain)
				if err := w.Append(id, n); err != nil {
					t.Fatal(err)
				}
				work.Go(func() error {
					store.put(id, plain)
					return nil
				})
				at += n
			}
			have = copy(buf, buf[at:have])
		}
	}
	_ = work.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	x, err := index.Open(xb.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return x, store
}

// The whole way: from a read through chunks to a store that has damaged ones.
func TestChunks(t *testing.T) {
	root, content := small()
	plan, err := rootimage.New(root)
	if err != nil {
		t.Fatal(err)
	}
	x, store := chunked(t, plan)
	fetcher := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: []chunkstore.Store{store}})
	s := serve(t, root, func(o *Options) { o.Image = lazy.New(x, fetcher, lazy.Options{Memory: 1}) })
	f, err := os.Open(filepath.Join(s.dir, "dir/file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, len(content))

	store.damage()
	if n, err := f.ReadAt(p, 0); n != 0 || !errors.Is(err, unix.EIO) {
		t.Errorf("got %d bytes, %v from damaged chunks, want EIO", n, err)
	}
	for _, want := range []string{"path=/dir/file", "chunk " + idOf(t, x, content), "memory"} {
		if log := s.log.String(); !strings.Contains(log, want) {
			t.Errorf("the log lacks %q: %s", want, log)
		}
	}
	store.damage()
	if n, err := f.ReadAt(p, 0); err != nil || n != len(p) || !bytes.Equal(p, content) {
		t.Errorf("after healing: got %d bytes, %v", n, err)
	}
}

// idOf names the chunk that a large file with this content begins with.
func idOf(t *testing.T, x *index.Index, content []byte) string {
	t.Helper()
	for i := range x.Len() {
		c, err := x.At(i)
		if err != nil {
			t.Fatal(err)
		}
		if c.Size <= len(content) && index.SHA256.Sum(content[:c.Size]) == c.ID {
			return c.ID.String()
		}
	}
	t.Fatal("no chunk begins the file")
	return ""
}
