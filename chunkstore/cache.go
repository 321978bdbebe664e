package chunkstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

const (
	// cacheWriters write at a time: where a write waits for the disk, that takes
	// several fsyncs together at the price of one.
	cacheWriters = 8
	cacheQueue   = 64 // chunks

	// fewRefused is how many writes in a row a cache may refuse that others fill as
	// well: one that is being evicted from refuses a few and takes the next.
	fewRefused = 8

	// flushPause is how long chunks gather before the cache is told to bring them
	// to disk: fewer, larger commits, and not in the way of what is fetched now.
	flushPause = 500 * time.Millisecond

	// How long a read and a batch wait for room in the queue before the chunk is
	// not cached. A batch waits long, so that what was prefetched is there for
	// the next container; but not for ever, as the disk may hang.
	readPatience  = 500 * time.Millisecond
	batchPatience = 10 * time.Second

	// closePatience is how long the end of a container waits for its last chunks
	// to reach the disk: what is dropped then, the next container fetches again.
	closePatience = 5 * time.Second
)

// cache is a Fetcher's cache: reads that cannot fail, only miss, and writes in
// the background.
type cache struct {
	store Writer
	log   *slog.Logger

	queue   chan cacheEntry
	closing chan struct{}
	close1  sync.Once
	dirty   chan struct{} // holds a value when chunks wait for a flush
	writers sync.WaitGroup
	ctx     context.Context // of the writes
	cancel  context.CancelFunc

	// stalled is set when a chunk found no room in time and until a write ends.
	// While it is set nobody waits for room again.
	stalled atomic.Bool
	refused atomic.Int32 // writes that have failed since one was good

	count                                     counter
	shared, written, dropped, faults, corrupt atomic.Int64
	readFaults, writeFaults                   throttle
	saidFull                                  atomic.Bool
}

type cacheEntry struct {
	id      index.ID
	frame   []byte
	release func() // ends the claim on the chunk; nil: there is none
}

func newCache(store Writer, log *slog.Logger) *cache {
	c := &cache{
		store:   store,
		log:     log,
		queue:   make(chan cacheEntry, cacheQueue),
		closing: make(chan struct{}),
		dirty:   make(chan struct{}, 1),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	for range cacheWriters {
		c.writers.Go(c.write)
	}
	if _, ok := store.(Flusher); ok {
		go c.flushOften()
	}
	return c
}

// get appends the plain bytes of chunk ch to dst. What is wrong with those that
// are there is said and counted here; the error then wraps no ErrNotFound.
func (c *cache) get(ctx context.Context, d index.Digest, ch index.Chunk, dst []byte) ([]byte, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	frame, err := c.store.Get(ctx, ch.ID, (*buf)[:0])
	if err != nil {
		if !errors.Is(err, ErrNotFound) && ctx.Err() == nil {
			c.fault("cannot read from the cache", &c.readFaults, err, "chunk", ch.ID.String())
		}
		return dst, err
	}
	*buf = frame
	plain, err := Decode(dst, frame, d, ch)
	if err != nil {
		var corrupt *CorruptError
		if errors.As(err, &corrupt) {
			corrupt.Where = c.store.String()
		}
		c.corrupt.Add(1)
		c.log.Warn("corrupt chunk in the cache, fetching it anew", "cache", c.store.String(), "chunk", ch.ID.String(), "error", err)
		return dst, err
	}
	c.count.add(len(frame), len(plain)-len(dst))
	return plain, nil
}

// put has the frame of w written, and waits up to patience for room in the
// queue. The claim on w ends when others can read it, or never will.
func (c *cache) put(ctx context.Context, w *want, frame []byte, patience time.Duration) {
	e := cacheEntry{w.chunk.ID, bytes.Clone(frame), w.release}
	if c.enqueue(ctx, e, patience) {
		w.release = nil
		return
	}
	c.dropped.Add(1)
	w.giveUp()
}

func (c *cache) enqueue(ctx context.Context, e cacheEntry, patience time.Duration) bool {
	select {
	case <-c.closing:
		return false
	case c.queue <- e:
		return true
	default:
	}
	if c.stalled.Load() {
		return false
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case c.queue <- e:
		return true
	case <-t.C:
		c.stalled.Store(true)
	case <-ctx.Done():
	case <-c.closing:
	}
	return false
}

// takes reports whether what is put is likely to be there for others soon.
func (c *cache) takes() bool {
	select {
	case <-c.closing:
		return false
	default:
		return !c.stalled.Load() && c.refused.Load() < fewRefused
	}
}

// write writes what is queued, until close.
func (c *cache) write() {
	for {
		select {
		case e := <-c.queue:
			c.writeOne(e)
		case <-c.closing:
			for {
				select {
				case e := <-c.queue:
					c.writeOne(e)
				default:
					return
				}
			}
		}
	}
}

func (c *cache) writeOne(e cacheEntry) {
	err := c.store.Put(c.ctx, e.id, e.frame)
	if e.release != nil {
		e.release()
	}
	c.stalled.Store(false)
	if err != nil {
		c.refused.Add(1)
	} else {
		c.refused.Store(0)
	}
	switch {
	case err == nil:
		c.written.Add(1)
		select {
		case c.dirty <- struct{}{}:
		default:
		}
	case c.ctx.Err() != nil:
		c.dropped.Add(1)
	case errors.Is(err, ErrFull):
		c.dropped.Add(1)
		if !c.saidFull.Swap(true) {
			c.log.Info("the cache is full, further chunks are not kept", "cache", c.store.String(), "error", err)
		}
	default:
		c.fault("cannot write to the cache", &c.writeFaults, err, "chunk", e.id.String())
	}
}

// flushOften brings what is written to disk, until close.
func (c *cache) flushOften() {
	for {
		select {
		case <-c.dirty:
		case <-c.closing:
			return
		}
		t := time.NewTimer(flushPause)
		select {
		case <-t.C:
		case <-c.closing:
			t.Stop()
			return
		}
		c.flush()
	}
}

func (c *cache) flush() {
	f, ok := c.store.(Flusher)
	if !ok {
		return
	}
	if err := f.Flush(c.ctx); err != nil && c.ctx.Err() == nil {
		c.fault("cannot write to the cache", &c.writeFaults, err)
	}
}

func (c *cache) fault(msg string, t *throttle, err error, about ...any) {
	c.faults.Add(1)
	if n, ok := t.allow(time.Now()); ok {
		c.log.Warn(msg, append([]any{"cache", c.store.String(), "error", err, "faults", n}, about...)...)
	}
}

// close ends the writers, and the way to the disk of what they wrote.
func (c *cache) close() error {
	c.close1.Do(func() { close(c.closing) })
	done := make(chan struct{})
	go func() {
		c.writers.Wait()
		c.flush()
		close(done)
	}()
	t := time.NewTimer(closePatience)
	defer t.Stop()
	defer c.cancel()
	select {
	case <-done:
		return nil
	case <-t.C:
		return fmt.Errorf("cache %s: writes are under way after %v, gave up waiting", c.store, closePatience)
	}
}

func (c *cache) stats() CacheStats {
	return CacheStats{
		Count:   c.count.load(),
		Shared:  c.shared.Load(),
		Written: c.written.Load(),
		Dropped: c.dropped.Load(),
		Faults:  c.faults.Load(),
		Corrupt: c.corrupt.Load(),
	}
}
