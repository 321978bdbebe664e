package converted

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// PackChunks lines the chunks of the image up in packs, in the order of the
// root image and compressed anew, so that the same image gives the same packs
// whatever its store looks like. It hands each to sink, one after the other, and
// returns them with the file of their locators. dir takes temporary files.
func (i *Image) PackChunks(ctx context.Context, dir string, sink func(context.Context, registrystore.Pack) error, progress func(int64)) ([]registrystore.Pack, []byte, error) {
	f, err := i.Fetcher(nil)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	cs, err := Distinct(i.Index, nil)
	if err != nil {
		return nil, nil, err
	}
	q := &inOrder{sink: sink}
	q.turn = sync.NewCond(&q.mu)
	w := registrystore.NewPackWriter(ctx, dir, q.put)
	at := make(map[index.ID]registrystore.Location, len(cs))
	var failed error
	for from := 0; from < len(cs) && failed == nil; from += batchChunks {
		failed = i.packBatch(ctx, f, w, cs[from:min(from+batchChunks, len(cs))], at, progress)
	}
	descriptors, err := w.Close()
	if failed != nil {
		return nil, nil, failed
	}
	if err != nil {
		return nil, nil, err
	}
	all := make([]registrystore.Location, i.Index.Len())
	for pos := range all {
		c, err := i.Index.At(pos)
		if err != nil {
			return nil, nil, err
		}
		all[pos] = at[c.ID]
	}
	locators, err := registrystore.EncodeLocators(i.Index, descriptors, all)
	packs := make([]registrystore.Pack, len(descriptors))
	for n, d := range descriptors {
		packs[n].PackDescriptor = d
	}
	return packs, locators, err
}

// packBatch appends cs to w, and enters in at where they lie.
func (i *Image) packBatch(ctx context.Context, f *chunkstore.Fetcher, w *registrystore.PackWriter, cs []index.Chunk, at map[index.ID]registrystore.Location, progress func(int64)) error {
	fetch, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	frames := make([][]byte, len(cs)) // nil for zeros
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	err := f.FetchBatch(fetch, cs, func(k int, plain []byte) error {
		progress(int64(len(plain)))
		if len(bytes.TrimLeft(plain, "\x00")) == 0 {
			return nil
		}
		plain = bytes.Clone(plain)
		g.Go(func() error {
			frames[k] = chunkstore.Encode(nil, plain)
			return nil
		})
		return nil
	})
	_ = g.Wait()
	if err != nil {
		return err
	}
	for k, c := range cs {
		if frames[k] == nil {
			continue // stored nowhere
		}
		if at[c.ID], err = w.Append(c.ID, frames[k], false); err != nil {
			return err
		}
	}
	return nil
}

// inOrder hands packs on by their numbers, as a PackWriter does not.
type inOrder struct {
	sink func(context.Context, registrystore.Pack) error

	mu   sync.Mutex // guards next
	turn *sync.Cond
	next int
}

// put is the sink of a PackWriter. It starts them by their numbers, so the one
// that is waited for is always under way.
func (q *inOrder) put(ctx context.Context, p registrystore.Pack) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.next != p.Number {
		q.turn.Wait()
	}
	defer q.turn.Broadcast()
	q.next++
	return q.sink(ctx, p)
}

// maxLocators bounds a file of locators beside an image, in bytes: 40 million
// chunks.
const maxLocators = 640 << 20

// locatorsBeside reads the locators that a data manifest of src has for the boot
// image, which has none itself; nil if there are none.
func locatorsBeside(ctx context.Context, src transport.Source, img *Image) (*registrystore.Locators, error) {
	stored, ok := src.(transport.Stored)
	if !ok {
		return nil, nil
	}
	for _, s := range src.Skipped() {
		a := s.Descriptor.Annotations
		if a[transport.AnnotationType] != registrystore.ArtifactTypeData || a[transport.AnnotationBoot] != img.Digest {
			continue
		}
		raw, err := stored.Manifest(ctx, s.Descriptor)
		if err != nil {
			return nil, err
		}
		var m v1.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, fmt.Errorf("data manifest %s: %w", s.Digest, err)
		}
		for _, d := range m.Layers {
			if d.MediaType == registrystore.MediaTypeLocators {
				return openLocators(ctx, stored, d, img.Index)
			}
		}
	}
	return nil, nil
}

func openLocators(ctx context.Context, stored transport.Stored, d v1.Descriptor, x *index.Index) (*registrystore.Locators, error) {
	if d.Size < 0 || d.Size > maxLocators {
		return nil, fmt.Errorf("locators %s: %d bytes, want at most %d", d.Digest, d.Size, maxLocators)
	}
	rc, err := stored.Blob(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("locators %s: %w", d.Digest, err)
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, maxLocators))
	if err != nil {
		return nil, fmt.Errorf("locators %s: %w", d.Digest, err)
	}
	return registrystore.OpenLocators(b, x)
}
