package registrystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// image is a small converted image without its boot part.
type image struct {
	index    *index.Index
	locators *Locators
	packs    []Pack
	plain    map[index.ID][]byte
}

// newImage makes an image of n random chunks of 1 byte to 256 KiB, which
// compress by about half. The first tenth is the start set; each 16th chunk
// occurs twice and each 20th is all zeros.
func newImage(t testing.TB, n int) *image {
	t.Helper()
	rnd := rand.New(rand.NewChaCha8([32]byte{'i', 'm', 'g'}))
	im := &image{plain: make(map[index.ID][]byte)}
	var file bytes.Buffer
	iw := index.NewWriter(&file, chunker.V1, index.SHA256)
	sink := &memorySink{}
	pw := NewPackWriter(context.Background(), t.TempDir(), sink.put)
	at := make(map[index.ID]Location)
	var all []Location
	for i := range n {
		size := 1 + rnd.IntN(128<<10)
		switch i % 20 {
		case 3:
			size = 256 << 10
		case 4:
			size = 1
		}
		plain := make([]byte, size)
		if i%20 != 19 {
			for j := range plain {
				plain[j] = byte(rnd.Uint32N(16)) // half a byte of entropy
			}
		}
		id := index.SHA256.Sum(plain)
		im.plain[id] = plain
		for range 1 + min(1, i%16/15) {
			if err := iw.Append(id, size); err != nil {
				t.Fatal(err)
			}
			loc, ok := at[id]
			if !ok && i%20 != 19 {
				var err error
				if loc, err = pw.Append(id, chunkstore.Encode(nil, plain), i < n/10); err != nil {
					t.Fatal(err)
				}
			}
			at[id] = loc
			all = append(all, loc)
		}
	}
	if err := iw.Close(); err != nil {
		t.Fatal(err)
	}
	packs, err := pw.Close()
	if err != nil {
		t.Fatal(err)
	}
	im.packs = sink.sorted(packs)
	if im.index, err = index.Open(file.Bytes()); err != nil {
		t.Fatal(err)
	}
	b, err := EncodeLocators(im.index, packs, all)
	if err != nil {
		t.Fatal(err)
	}
	if im.locators, err = OpenLocators(b, im.index); err != nil {
		t.Fatal(err)
	}
	return im
}

// memorySink keeps packs in memory.
type memorySink struct {
	mu    sync.Mutex
	packs map[string]Pack
}

func (s *memorySink) put(_ context.Context, p Pack) error {
	r, err := p.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if int64(len(b)) != p.Size || "sha256:"+index.SHA256.Sum(b).String() != p.Digest {
		return fmt.Errorf("pack of %d bytes is not %s of %d", len(b), p.Digest, p.Size)
	}
	p.Open = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.packs == nil {
		s.packs = make(map[string]Pack)
	}
	s.packs[p.Digest] = p
	return nil
}

func (s *memorySink) sorted(list []PackDescriptor) []Pack {
	var packs []Pack
	for _, d := range list {
		packs = append(packs, s.packs[d.Digest])
	}
	return packs
}

// ids returns the distinct names of the chunks at positions lo to hi.
func (im *image) ids(t testing.TB, lo, hi int) []index.ID {
	t.Helper()
	var ids []index.ID
	seen := make(map[index.ID]bool)
	for pos := lo; pos < hi; pos++ {
		c, err := im.index.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		if !seen[c.ID] {
			seen[c.ID] = true
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// verify compares a stored form with the chunk.
func (im *image) verify(id index.ID, frame []byte) error {
	want, ok := im.plain[id]
	if !ok {
		return errors.New("an unknown chunk")
	}
	got, err := chunkstore.Decode(make([]byte, 0, len(want)), frame, index.SHA256, index.Chunk{ID: id, Size: len(want)})
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("chunk %s: wrong bytes", id)
	}
	return nil
}

// readAll reads every chunk of the image one by one and in batches.
func (im *image) readAll(t *testing.T, s *Store) {
	t.Helper()
	ctx := t.Context()
	ids := im.ids(t, 0, im.index.Len())
	for i, id := range ids {
		if i%7 != 0 { // single reads are slow
			continue
		}
		prefix := []byte("before")
		frame, err := s.Get(ctx, id, prefix)
		if err != nil {
			t.Fatal(err)
		}
		if err := im.verify(id, bytes.TrimPrefix(frame, prefix)); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]bool, len(ids))
	err := s.GetBatch(ctx, ids, func(i int, frame []byte) error {
		if got[i] {
			return fmt.Errorf("chunk %s came twice", ids[i])
		}
		got[i] = true
		return im.verify(ids[i], frame)
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, ok := range got {
		if !ok {
			t.Fatalf("chunk %s did not come", ids[i])
		}
	}
}
