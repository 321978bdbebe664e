package converted

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// Target is where WriteBlob writes.
type Target struct {
	io.WriterAt
	// Blank says that it reads as zeros: chunks of zeros are not written.
	Blank bool
	// Seed holds bytes that may be right where they are, as those of an earlier
	// version: a chunk that is there is not fetched. nil for none.
	Seed io.ReaderAt
	// InPlace says that Seed is what is written to: a chunk that is there is not
	// written.
	InPlace bool
}

// How WriteBlob fetches: batches are large enough for one request to a pack,
// and a batch that takes longer than batchTimeout will not come.
const (
	batchChunks   = 128
	batchesAtOnce = 4
	batchTimeout  = 2 * time.Minute
)

// WriteBlob writes what x stands for to t, with chunks from f. Every chunk is
// verified. progress is told of bytes, by several goroutines at once.
func WriteBlob(ctx context.Context, x *index.Index, f *chunkstore.Fetcher, t Target, progress func(int64)) error {
	b := &blob{Target: t, f: f, digest: x.Digest(), progress: progress}
	b.zeros = make([]byte, x.Params().Max)
	b.zeroID = b.digest.Sum(b.zeros)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(batchesAtOnce)
	var failed atomic.Bool
	batch := make([]index.Chunk, 0, batchChunks)
	flush := func() {
		cs := batch
		batch = make([]index.Chunk, 0, batchChunks)
		g.Go(func() error {
			err := b.write(ctx, cs)
			if err != nil {
				failed.Store(true)
			}
			return err
		})
	}
	for k := range x.Len() {
		c, err := x.At(k)
		if err != nil {
			failed.Store(true)
			g.Wait()
			return err
		}
		if batch = append(batch, c); len(batch) == batchChunks {
			flush()
		}
		if failed.Load() {
			break
		}
	}
	if len(batch) > 0 {
		flush()
	}
	return g.Wait()
}

// blob is one WriteBlob.
type blob struct {
	Target
	f        *chunkstore.Fetcher
	digest   index.Digest
	zeros    []byte   // as many as the longest chunk has
	zeroID   index.ID // of zeros: runs of them are cut into these
	progress func(int64)
}

// write writes the chunks cs.
func (b *blob) write(ctx context.Context, cs []index.Chunk) error {
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	var want []index.Chunk
	var buf []byte
	for _, c := range cs {
		done, err := false, ctx.Err()
		if err == nil && b.Seed != nil {
			if buf == nil {
				buf = make([]byte, len(b.zeros))
			}
			done, err = b.fromSeed(c, buf[:c.Size])
		}
		if err == nil && !done && c.ID == b.zeroID && c.Size == len(b.zeros) {
			done, err = true, b.put(c, b.zeros)
		}
		switch {
		case err != nil:
			return err
		case done:
			b.progress(int64(c.Size))
		default:
			want = append(want, c)
		}
	}
	return b.f.FetchBatch(ctx, want, func(k int, plain []byte) error {
		b.progress(int64(len(plain)))
		return b.put(want[k], plain)
	})
}

// fromSeed takes c from the seed if it is there. What of the seed cannot be
// read is not there.
func (b *blob) fromSeed(c index.Chunk, buf []byte) (bool, error) {
	if n, _ := b.Seed.ReadAt(buf, c.Offset); n < len(buf) || b.digest.Sum(buf) != c.ID {
		return false, nil
	}
	if b.InPlace {
		return true, nil
	}
	return true, b.put(c, buf)
}

func (b *blob) put(c index.Chunk, plain []byte) error {
	if b.Blank && bytes.Equal(plain, b.zeros[:len(plain)]) {
		return nil
	}
	_, err := b.WriteAt(plain, c.Offset)
	return err
}
