package converted

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// Chunks returns the chunks of the image, each once, in the order in which they
// lie in packs. With start these are only those that a program reads before it
// does anything; an error that wraps errors.ErrUnsupported says that the image
// does not know them.
func (i *Image) Chunks(start bool) ([]index.Chunk, error) {
	all, err := Distinct(i.Index, i.located)
	if err != nil || !start {
		return all, err
	}
	if i.Locators == nil {
		return nil, fmt.Errorf("an image whose chunks are in a loose store knows no start set: %w", errors.ErrUnsupported)
	}
	of := make(map[index.ID]bool)
	for pos := range i.Locators.StartSet() {
		c, err := i.Index.At(pos)
		if err != nil {
			return nil, err
		}
		of[c.ID] = true
	}
	return slices.DeleteFunc(all, func(c index.Chunk) bool { return !of[c.ID] }), nil
}

// StoredBytes is how many bytes the stored form of c has, 0 where that is not
// known, as in loose stores.
func (i *Image) StoredBytes(c index.Chunk) (int64, error) {
	if i.located == nil {
		return 0, nil
	}
	pos, err := i.located.Lookup(c.ID)
	if err != nil {
		return 0, err
	}
	at, err := i.located.At(pos)
	return int64(at.Length), err
}

// Preloaded is what Preload found and did.
type Preloaded struct {
	Had     Amount // good ones that were in the cache
	Fetched Amount // those that are there now
	// Missing are the chunks that are not there, in the order of the image.
	Missing []MissingChunk
}

// Amount is a number of chunks and their stored bytes.
type Amount struct {
	Chunks int   `json:"chunks"`
	Bytes  int64 `json:"bytes"`
}

func (a *Amount) add(stored int) { a.Chunks, a.Bytes = a.Chunks+1, a.Bytes+int64(stored) }

// MissingChunk is a chunk that could not be had, and why.
type MissingChunk struct {
	Chunk  string `json:"chunk"`
	Offset int64  `json:"offset"` // in the root image, bytes, where the chunk comes first
	Size   int    `json:"size"`   // plain bytes
	Reason string `json:"reason"`
}

// preloadRounds is how often what is not in the cache is fetched: a cache may
// have lost a chunk, or had no time to write it.
const preloadRounds = 3

// Preload puts the chunks cs into cache, and reads and verifies them there. What
// is there and good is not fetched; what is damaged is overwritten. An error is
// only that ctx ended, or that the image has no store: what could not be had is
// in the result.
func (i *Image) Preload(ctx context.Context, cs []index.Chunk, cache chunkstore.Writer, progress func(int64)) (*Preloaded, error) {
	r := &Preloaded{Missing: []MissingChunk{}}
	missing := i.look(ctx, cs, cache, &r.Had, progress)
	var cause error // why a round fetched less than it wanted to
	reasons := make(map[index.ID]error)
	for range preloadRounds {
		if len(missing) == 0 || ctx.Err() != nil {
			break
		}
		f, err := i.Fetcher(cache)
		if err != nil {
			return nil, err
		}
		cause = fetchAll(ctx, f, missing, reasons, progress)
		cause = errors.Join(cause, f.Close(), flush(ctx, cache))
		still := i.look(ctx, missing, cache, &r.Fetched, func(int64) {})
		stuck := len(still) == len(missing)
		if missing = still; stuck {
			break
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	for _, c := range missing {
		reason := "the cache does not have it, although it was fetched"
		if err := cmp.Or(reasons[c.ID], cause); err != nil {
			reason = err.Error()
		}
		r.Missing = append(r.Missing, MissingChunk{c.ID.String(), c.Offset, c.Size, reason})
	}
	slices.SortFunc(r.Missing, func(a, b MissingChunk) int { return cmp.Compare(a.Offset, b.Offset) })
	return r, nil
}

// flush brings what was put into cache to the disk. The Fetcher's Close does
// that, too, but not for as long as it takes.
func flush(ctx context.Context, cache chunkstore.Writer) error {
	if f, ok := cache.(chunkstore.Flusher); ok {
		return f.Flush(ctx)
	}
	return nil
}

// look reads cs from cache, counts those that are good and returns the others.
func (i *Image) look(ctx context.Context, cs []index.Chunk, cache chunkstore.Store, good *Amount, progress func(int64)) []index.Chunk {
	found := make([]bool, len(cs))
	var mu sync.Mutex // guards good
	var g errgroup.Group
	const each = 64 // chunks, so that a worker keeps its buffers for a while
	g.SetLimit(runtime.GOMAXPROCS(0))
	for from := 0; from < len(cs); from += each {
		g.Go(func() error {
			var frame, plain []byte
			for k, c := range cs[from:min(from+each, len(cs))] {
				if ctx.Err() != nil {
					return nil
				}
				var err error
				if frame, err = cache.Get(ctx, c.ID, frame[:0]); err != nil {
					continue // what cannot be read is written anew
				}
				if plain, err = chunkstore.Decode(plain[:0], frame, i.Index.Digest(), c); err != nil {
					continue
				}
				found[from+k] = true
				progress(int64(c.Size))
				mu.Lock()
				good.add(len(frame))
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait()
	var missing []index.Chunk
	for k, c := range cs {
		if !found[k] {
			missing = append(missing, c)
		}
	}
	return missing
}

// fetchAll brings cs through f into its cache. Why a chunk was not to be had is
// left in reasons. It stops early, and returns why, when a store does not say
// whether it has a chunk.
func fetchAll(ctx context.Context, f *chunkstore.Fetcher, cs []index.Chunk, reasons map[index.ID]error, progress func(int64)) error {
	var mu sync.Mutex // guards reasons
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(batchesAtOnce)
	for batch := range slices.Chunk(cs, batchChunks) {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, batchTimeout)
			defer cancel()
			err := f.FetchBatch(ctx, batch, func(_ int, plain []byte) error {
				progress(int64(len(plain)))
				return nil
			})
			if err == nil {
				return nil
			}
			failed := chunkstore.Failed(err)
			mu.Lock()
			defer mu.Unlock()
			var unanswered error
			for _, c := range batch {
				why, ok := failed[c.ID]
				if !ok {
					continue
				}
				reasons[c.ID] = why
				if !errors.As(why, new(*chunkstore.CorruptError)) && !errors.Is(why, chunkstore.ErrNotFound) {
					unanswered = why
				}
			}
			if len(failed) == 0 {
				unanswered = err
			}
			return unanswered
		})
	}
	return g.Wait()
}
