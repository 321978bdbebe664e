package registrystore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

const (
	// parallelRequests bounds the requests of one Store that run at once.
	parallelRequests = 8
	// batchRequests bounds those of one batch, so that a read that somebody
	// waits for gets its turn beside a prefetch.
	batchRequests = 4
	// maxGap is how many bytes between two chunks are rather read and thrown
	// away than asked around: what a fast line brings during one round trip.
	maxGap = 128 << 10
	// maxSpan bounds a request for several chunks, in bytes: a pack's worth is
	// split between the requests of a batch. A pack of the start set is not: its
	// chunks are wanted in the order in which they lie there.
	maxSpan = 8 << 20
)

// Store reads the chunks of one index from packs. It is a chunkstore.Store, a
// chunkstore.Batcher and a chunkstore.Locator.
type Store struct {
	blobs    Blobs
	locators *Locators
	index    *index.Index
	slots    chan struct{} // one per running request
}

// NewStore reads the chunks of x, which lie where l says, from b.
func NewStore(b Blobs, l *Locators, x *index.Index) *Store {
	return &Store{blobs: b, locators: l, index: x, slots: make(chan struct{}, parallelRequests)}
}

func (s *Store) String() string { return s.blobs.String() }

// find returns the chunk called id, its pack and its place there.
func (s *Store) find(id index.ID) (index.Chunk, PackDescriptor, Location, error) {
	pos, err := s.locators.Lookup(id)
	if err != nil {
		return index.Chunk{}, PackDescriptor{}, Location{}, err
	}
	c, err := s.index.At(pos)
	if err != nil {
		return index.Chunk{}, PackDescriptor{}, Location{}, fmt.Errorf("chunk %s: %w", id, err)
	}
	at, err := s.locators.At(pos)
	if err != nil || at.Length == 0 {
		return c, PackDescriptor{}, at, err
	}
	p, err := s.locators.Pack(at.Pack)
	return c, p, at, err
}

// Get implements chunkstore.Store. A chunk of zeros is made, not fetched.
func (s *Store) Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error) {
	c, p, at, err := s.find(id)
	if err != nil {
		return dst, err
	}
	if at.Length == 0 {
		return chunkstore.AppendZeros(dst, c.Size), nil
	}
	if err := s.acquire(ctx); err != nil {
		return dst, fmt.Errorf("chunk %s: %w", id, err)
	}
	defer s.release()
	out, err := ReadRange(ctx, s.blobs, p.Digest, at.Offset, int64(at.Length), dst)
	if err != nil {
		return dst, fail("chunk "+id.String(), p.Digest, err)
	}
	return out, nil
}

// fail returns err, why a blob could not be read, as why a chunk could not.
func fail(what, digest string, err error) error {
	var e *chunkstore.Error
	if !errors.As(err, &e) {
		return fmt.Errorf("%s: %w", what, err)
	}
	of := *e
	of.Did, of.Err = "read "+what, fmt.Errorf("blob %s: %w", digest, e.Err)
	return &of
}

// Has implements chunkstore.Store: it reads one byte of the chunk, for some
// registries refuse HEAD.
func (s *Store) Has(ctx context.Context, id index.ID) (bool, error) {
	_, p, at, err := s.find(id)
	if err == nil && at.Length > 0 {
		if err = s.acquire(ctx); err == nil {
			_, err = ReadRange(ctx, s.blobs, p.Digest, at.Offset, 1, nil)
			s.release()
		}
	}
	if errors.Is(err, chunkstore.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Locate implements chunkstore.Locator.
func (s *Store) Locate(id index.ID) string {
	_, p, at, err := s.find(id)
	switch {
	case err != nil:
		return "in no pack"
	case at.Length == 0:
		return "all zeros, in no pack"
	}
	return fmt.Sprintf("pack %s at %d", p.Digest, at.Offset)
}

// wanted is one chunk of a batch.
type wanted struct {
	i  int // place in the caller's list
	id index.ID
	at Location
}

// byPlace sorts without a type parameter: the boot binary gets some 15 kB larger
// with each type that slices.SortFunc is compiled for.
type byPlace []wanted

func (w byPlace) Len() int      { return len(w) }
func (w byPlace) Swap(i, j int) { w[i], w[j] = w[j], w[i] }
func (w byPlace) Less(i, j int) bool {
	a, b := w[i].at, w[j].at
	return cmp.Or(cmp.Compare(a.Pack, b.Pack), cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Length, b.Length)) < 0
}

// GetBatch implements chunkstore.Batcher. Neighbours in a pack come with one
// request, and a chunk is yielded as soon as it has arrived. That one pack is
// not there does not keep the chunks of the others.
func (s *Store) GetBatch(ctx context.Context, ids []index.ID, yield func(i int, frame []byte) error) error {
	var list []wanted
	for i, id := range ids {
		c, _, at, err := s.find(id)
		if err != nil {
			return err
		}
		if at.Length > 0 {
			list = append(list, wanted{i, id, at})
		} else if err := yield(i, chunkstore.AppendZeros(nil, c.Size)); err != nil {
			return err
		}
	}
	// yield is called by one request at a time.
	var (
		mu      sync.Mutex
		aborted bool  // yield has returned an error
		missing error // of packs that are not there
	)
	one := func(i int, frame []byte) error {
		mu.Lock()
		defer mu.Unlock()
		err := yield(i, frame)
		aborted = aborted || err != nil
		return err
	}
	g, running := errgroup.WithContext(ctx)
	g.SetLimit(batchRequests)
	for _, run := range s.coalesce(list, s.readsWhole()) {
		if running.Err() != nil {
			break
		}
		g.Go(func() error {
			err := s.getRun(running, run, one)
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, chunkstore.ErrNotFound) && !aborted {
				missing = err
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return cmp.Or(ctx.Err(), missing)
}

// readsWhole reports whether a request costs the whole blob up to the range's
// end: then the fewer requests the better.
func (s *Store) readsWhole() bool {
	b, ok := s.blobs.(interface{ ReadsWhole() bool })
	return ok && b.ReadsWhole()
}

// coalesce sorts list by place and splits it into runs, one for each request;
// or, with whole, for each pack. Places that overlap, which an honest writer
// does not make, are not joined unless they are the same.
func (s *Store) coalesce(list []wanted, whole bool) [][]wanted {
	sort.Sort(byPlace(list))
	var runs [][]wanted
	from := 0
	for i := 1; i <= len(list); i++ {
		if i < len(list) && s.joins(list[from].at, list[i-1].at, list[i].at, whole) {
			continue
		}
		runs = append(runs, list[from:i])
		from = i
	}
	return runs
}

// joins tells whether next goes into the run from first to last.
func (s *Store) joins(first, last, next Location, whole bool) bool {
	if next == last {
		return true
	}
	end := last.Offset + int64(last.Length)
	return next.Pack == last.Pack && next.Offset >= end &&
		(whole || next.Offset-end <= maxGap && (next.Offset+int64(next.Length)-first.Offset <= maxSpan || s.isStart(next.Pack)))
}

// isStart reports whether a pack is of the start set.
func (s *Store) isStart(pack int) bool {
	p, err := s.locators.Pack(pack)
	return err == nil && p.Start
}

// getRun reads a run with one request.
func (s *Store) getRun(ctx context.Context, run []wanted, yield func(int, []byte) error) error {
	first, last := run[0], run[len(run)-1]
	p, err := s.locators.Pack(first.at.Pack)
	if err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	r, err := s.blobs.Range(ctx, p.Digest, first.at.Offset, last.at.Offset+int64(last.at.Length)-first.at.Offset)
	if err != nil {
		return fail(fmt.Sprintf("chunk %s and %d more", first.id, len(run)-1), p.Digest, err)
	}
	defer r.Close()
	var frame []byte
	pos := first.at.Offset
	for i, w := range run {
		if i == 0 || w.at != run[i-1].at {
			if _, err := io.CopyN(io.Discard, r, w.at.Offset-pos); err != nil {
				return fail("chunk "+w.id.String(), p.Digest, err)
			}
			frame = slices.Grow(frame[:0], w.at.Length)[:w.at.Length]
			if _, err := io.ReadFull(r, frame); err != nil {
				return fail("chunk "+w.id.String(), p.Digest, err)
			}
			pos = w.at.Offset + int64(w.at.Length)
		}
		if err := yield(w.i, frame); err != nil {
			return err
		}
	}
	return nil
}

// acquire waits until a request may start.
func (s *Store) acquire(ctx context.Context) error {
	select {
	case s.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Store) release() { <-s.slots }
