package nodecache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
)

// How often a writer looks again at what others do to the cache and its disk.
const (
	lookEvery  = 2 * time.Second
	spaceEvery = 100 * time.Millisecond
	spaceAfter = 1 << 20 // bytes that it has written

	// lookPatience is how long the first write waits to hear how large the cache
	// is: what is not kept, each container fetches anew, so the disk of a busy
	// machine must have answered by then. Later writes wait less, as reads may wait
	// for them: until the look that is under way, and the eviction after it, have
	// taken laterPatience.
	lookPatience  = 2 * time.Second
	laterPatience = time.Second

	// allPatience is how long writers wait in all: that is for the start of many
	// containers. Where more chunks are in use than there is room for, each of them
	// takes the place of another one, and nothing is won by waiting. patienceBack is
	// after how long they may wait again.
	allPatience  = 3 * time.Second
	patienceBack = 10 * time.Minute

	// fullEvery is how often a writer that finds the cache full looks whether others
	// have evicted from it.
	fullEvery = 100 * time.Millisecond

	// stepsBlind is how many steps may be written before the look that was due
	// after one is over.
	stepsBlind = 2

	// evictPause is between two evictions of one process; skipPause, after one that
	// another process was at; stuckPause, after one that could not remove what it
	// should.
	evictPause = time.Second
	skipPause  = 250 * time.Millisecond
	stuckPause = 30 * time.Second
)

// How many processes write to a cache: one of which nothing is known, and any other
// at least. A look may be old when it ends, and others write again that had waited
// for room.
const (
	manyWriters = 16
	fewWriters  = 4
)

// block is what the size of a file is rounded up to, in bytes.
const block = 4096

// room is what a writer knows of the room that is left.
type room struct {
	mu      sync.Mutex    // guards what follows
	held    int64         // bytes of the cache: at the last look, and what this process has written since
	before  int64         // at the last look
	looked  time.Time     // when that was; zero: never
	writers int64         // how many processes write, by how much the cache grows
	wrote   int64         // by this process since the last look
	taken   int64         // bytes that it has ever taken
	pending int64         // of these, those that are being written
	step    int64         // looks again after half of that many
	disk    space         // less what this process has written since
	asked   time.Time     // when disk was
	since   int64         // bytes written since then
	next    time.Time     // no eviction before
	tending bool          // a look, and perhaps an eviction, is under way
	tended  time.Time     // when that began
	known   chan struct{} // closed when more is known; nil: nobody waits for that
	vain    bool          // it does not help to wait: the last look has failed, or one has waited and no look has found much room since

	waited time.Duration // by writers, for any of this
	last   time.Time     // when that was counted

	background sync.WaitGroup
}

// take says that n bytes will be written, or fails with ErrFull. Where it is time
// to look at the cache, or room is getting short, it has that seen to in the
// background: the disk may be slow, and what waits for a write is reads. Where it
// would fail otherwise it waits for that, for a bounded time.
func (c *Cache) take(ctx context.Context, n int64) error {
	r := &c.room
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if c.reserve != (Reserve{}) && (now.Sub(r.asked) > spaceEvery || r.since > spaceAfter) {
		r.disk, r.asked, r.since = c.space(), now, 0
	}
	reserve := c.reserve.of(r.disk.size)
	short := func() bool { return r.disk.size > 0 && r.disk.free-n < reserve }
	blind := func() bool { return c.limit > 0 && (r.looked.IsZero() || r.wrote+n > stepsBlind*max(r.step, n)) }
	full := func() bool { return c.limit > 0 && r.held+n > c.limit }
	end := now.Add(laterPatience)
	if r.looked.IsZero() {
		end = now.Add(lookPatience)
	}
	if now.Sub(r.last) > patienceBack {
		r.waited = 0
	}
	c.tendIfDue(n, short())
	for !r.vain && r.waited < allPatience && (blind() || full()) {
		until := end
		switch {
		case r.tending && !r.looked.IsZero():
			until = r.tended.Add(laterPatience) // others have waited for it, too
		case !r.tending:
			until = r.looked.Add(fullEvery)
		}
		if until.After(end) {
			until = end
		}
		tending := r.tending
		if !c.awaitTending(ctx, time.Until(until)) && (tending || ctx.Err() != nil || !time.Now().Before(end)) {
			break
		}
		c.tendIfDue(n, short())
	}
	switch {
	case blind():
		return fmt.Errorf("%w: it is not known yet how many of %d bytes are taken", chunkstore.ErrFull, c.limit)
	case full():
		r.vain = true
		return fmt.Errorf("%w: %d of %d bytes are taken, %d more are wanted", chunkstore.ErrFull, r.held, c.limit, n)
	case short():
		return fmt.Errorf("%w: %d bytes of the disk are free and %d shall stay so, %d more are wanted", chunkstore.ErrFull, r.disk.free, reserve, n)
	}
	r.held, r.wrote, r.disk.free, r.since = r.held+n, r.wrote+n, r.disk.free-n, r.since+n
	r.taken, r.pending = r.taken+n, r.pending+n
	return nil
}

// tendIfDue begins a look, and perhaps an eviction, if it is time for that before n
// bytes are written. short says that the disk lacks room for them. The caller has
// locked the room.
func (c *Cache) tendIfDue(n int64, short bool) {
	r := &c.room
	now := time.Now()
	due := r.looked.IsZero()
	if c.limit > 0 {
		old := now.Sub(r.looked)
		due = due || r.wrote > r.step/2 || old > lookEvery || r.held+n > c.limit && !r.vain && old >= fullEvery
	}
	crowded := short || c.noSpace.Load() || c.limit > 0 && r.held+n > c.high()
	if !r.tending && (due || crowded && now.After(r.next)) {
		r.tending, r.tended = true, now
		r.background.Go(c.tend)
	}
}

// awaitTending waits until more is known of the cache, for d at most, and reports
// whether it is. The caller has locked the room, which is not locked meanwhile.
func (c *Cache) awaitTending(ctx context.Context, d time.Duration) bool {
	r := &c.room
	if r.known == nil {
		r.known = make(chan struct{})
	}
	known, start := r.known, time.Now()
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		now := time.Now()
		r.waited += min(now.Sub(start), now.Sub(r.last)) // others that wait have counted the rest
		r.last = now
	}()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-known:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// high is how many bytes of the cache are too many.
func (c *Cache) high() int64 { return int64(highShare * float64(c.limit)) }

// tend looks how large the cache is, and evicts if that is called for.
func (c *Cache) tend() {
	r := &c.room
	var failed error
	var held int64
	written := c.written()
	if c.limit > 0 {
		s, err := c.look(c.ctx, false)
		if failed = err; err == nil {
			held = s.scaled(s.bytes)
		}
	}
	r.mu.Lock()
	if c.limit > 0 && failed == nil {
		c.learn(held, written, time.Now())
	} else {
		r.looked = time.Now() // what this process has written is all that is known
		r.vain = r.vain || failed != nil
	}
	r.tell()
	due := failed == nil && !time.Now().Before(r.next)
	r.mu.Unlock()

	pause := time.Duration(0)
	if due && (c.limit > 0 && held > c.high() || c.noSpace.Load() || c.lacks() > 0 || c.sweepDue()) {
		var e Eviction
		e, failed = c.Evict(c.ctx)
		switch pause = evictPause; {
		case e.Short > 0:
			pause = stuckPause
		case e.Skipped:
			pause = skipPause
		}
		if e.Chunks > 0 {
			c.log.Debug("evicted from the cache", "cache", c.String(), "chunks", e.Chunks, "bytes", e.Bytes, "of", e.Before)
		}
	}
	if failed != nil && c.ctx.Err() == nil {
		pause = stuckPause
		c.log.Info("cannot evict from the cache", "cache", c.String(), "error", failed)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tending = false
	r.tell()
	if pause > 0 {
		r.next = time.Now().Add(pause)
	}
}

// tell wakes those who wait to know more of the cache. The caller has locked r.
func (r *room) tell() {
	if r.known != nil {
		close(r.known)
		r.known = nil
	}
}

// written returns how many bytes this process has written, for learn: a look that
// begins now sees those.
func (c *Cache) written() int64 {
	c.room.mu.Lock()
	defer c.room.mu.Unlock()
	return c.room.taken - c.room.pending
}

// learn takes held for the bytes of the cache, as of a look that began when this
// process had written so many. The caller has locked the room.
func (c *Cache) learn(held, written int64, now time.Time) {
	r := &c.room
	// Of what the cache has grown by, others may have written the most: the next
	// look comes before all together can have filled it.
	if r.writers == 0 {
		r.writers = manyWriters
	} else if r.wrote > 0 && held > r.before {
		// Those that were refused for a while come back, all at once.
		r.writers = min(4*manyWriters, max(fewWriters, r.writers*3/4, (held-r.before+r.wrote/2)/r.wrote))
	}
	r.held, r.before, r.looked, r.wrote = held+r.taken-written, held, now, 0
	r.vain = r.vain && r.held > c.high()
	r.step = max(c.limit/256, (c.high()-r.held)/(8*r.writers))
}

// settle takes the result of an eviction for what the cache holds; written is as
// for learn.
func (c *Cache) settle(e Eviction, written int64) {
	c.room.mu.Lock()
	defer c.room.mu.Unlock()
	c.room.wrote = 0 // what an eviction takes away says nothing of the others
	c.learn(max(0, e.Before-e.Bytes-e.LeftBytes), written, time.Now())
	c.room.asked = time.Time{}
}

// wrote says that n bytes that were taken are written, or are not, because of
// err.
func (c *Cache) wrote(n int64, err error) {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		c.noSpace.Store(true)
	}
	r := &c.room
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending -= n
	if err != nil {
		r.taken, r.held, r.wrote, r.disk.free = r.taken-n, r.held-n, r.wrote-n, r.disk.free+n
	}
}
