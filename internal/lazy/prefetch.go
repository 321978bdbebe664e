package lazy

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/index"
)

const (
	// prefetchBatch is how many plain bytes Prefetch asks for at once. A reader
	// that finds its chunk in a batch under way waits for it, so a batch must
	// not take long; a round trip of 10 ms must not dominate either.
	prefetchBatch = 2 << 20
	// prefetchAhead is how many batches travel at once: while one is on its
	// way, the other is hashed and stored.
	prefetchAhead = 2
	// startBatch is the same for what a start reads: all of that is wanted, in the
	// order in which it lies in its pack, and the fewer requests the better.
	startBatch = 256 << 20
	// yieldStep and yieldMost say how Prefetch gives way: before a batch it
	// looks this often whether readers wait for the network, and goes on
	// after this long all the same. A busy container's start set still comes.
	yieldStep = 5 * time.Millisecond
	yieldMost = 100 * time.Millisecond
)

// cached is implemented by fetchers that tell without reading it whether a chunk
// is near. The bytes are verified when they are read.
type cached interface {
	Cached(ctx context.Context, c index.Chunk) bool
}

// Prefetch fetches the chunks at positions of the index, in that order, so
// that the fetcher's cache has them. They take no place among the recently
// read ones, and readers go first. A chunk that cannot be had does not stop the
// others; the first error is returned.
func (m *Image) Prefetch(ctx context.Context, positions iter.Seq[int]) error {
	return m.prefetch(ctx, positions, prefetchBatch, m.yield, false)
}

// PrefetchStart fetches chunks that are about to be read, as Prefetch does, but
// with as few requests as it takes and at once. Who reads one of them gets it as
// soon as it has arrived. They are among the recently read ones, so that a program
// that is not far behind them need not have them decoded and verified once more.
func (m *Image) PrefetchStart(ctx context.Context, positions iter.Seq[int]) error {
	return m.prefetch(ctx, positions, startBatch, func(context.Context) {}, true)
}

// prefetch asks for at most batch plain bytes at once, after yield, and with keep
// holds them in memory.
func (m *Image) prefetch(ctx context.Context, positions iter.Seq[int], batch int, yield func(context.Context), keep bool) error {
	var (
		batches errgroup.Group
		once    sync.Once
		failed  error
		cs      []index.Chunk
		size    int
	)
	fail := func(err error) { once.Do(func() { failed = err }) }
	here, _ := m.f.(cached)
	batches.SetLimit(prefetchAhead)
	flush := func() {
		these := cs
		cs, size = nil, 0
		yield(ctx)
		batches.Go(func() error {
			if err := m.bring(ctx, these, keep); err != nil {
				fail(err)
			}
			return nil
		})
	}
	for i := range positions {
		if ctx.Err() != nil {
			break
		}
		if i < 0 || i >= m.x.Len() {
			fail(fmt.Errorf("prefetch: position %d of %d chunks", i, m.x.Len()))
			continue
		}
		c, err := m.x.At(i)
		if err != nil {
			fail(fmt.Errorf("prefetch: %w", err))
			continue
		}
		if here != nil && here.Cached(ctx, c) {
			continue
		}
		cs = append(cs, c)
		if size += c.Size; size >= batch {
			flush()
		}
	}
	if len(cs) > 0 && ctx.Err() == nil {
		flush()
	}
	_ = batches.Wait() // its functions return nil
	if err := ctx.Err(); err != nil {
		return err
	}
	return failed
}

// yield lets readers that wait for a chunk go first.
func (m *Image) yield(ctx context.Context) {
	for end := time.Now().Add(yieldMost); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(yieldStep) {
		m.mu.Lock()
		readers := m.readers
		m.mu.Unlock()
		if readers == 0 {
			return
		}
	}
}

// bring fetches those of cs that are not in memory nor on their way. It goes on
// while the stores do not answer.
func (m *Image) bring(ctx context.Context, cs []index.Chunk, keep bool) error {
	var failed error
	for len(cs) > 0 {
		g := &group{}
		m.mu.Lock()
		for _, c := range cs {
			if _, ok := m.recent.byID[c.ID]; ok || m.flights[c.ID] != nil {
				continue
			}
			m.add(g, c).wanted = keep
			g.waiting++
		}
		if len(g.flights) > 0 {
			m.start(ctx, g)
		}
		m.mu.Unlock()

		cs = nil
		for i, f := range g.flights {
			switch err := m.wait(ctx, g.flights[i:i+1]); {
			case errors.Is(err, errAgain):
				cs = append(cs, f.chunk)
			case err != nil && failed == nil:
				failed = err
			}
		}
	}
	return failed
}
