package nodecache

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
)

// TestWriterWaitsForALook: a writer that has written its share waits for the look
// that is under way, but not long, and not again for the same one.
func TestWriterWaitsForALook(t *testing.T) {
	for _, test := range []struct {
		takes time.Duration // the look
		err   error
		waits time.Duration // the first writer, and
		then  time.Duration // the next one
	}{
		{300 * time.Millisecond, nil, 300 * time.Millisecond, 0},
		{time.Hour, chunkstore.ErrFull, laterPatience, 0},
	} {
		dir := t.TempDir()
		id, frame := chunk(0, 100) // the encoder must not belong to the bubble
		synctest.Test(t, func(t *testing.T) {
			const limit = 100 << 20
			c, err := Open(dir, Options{Limit: limit})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			r := &c.room
			r.held, r.looked, r.writers, r.step, r.wrote = limit/2, time.Now(), 1, 1<<20, stepsBlind<<20
			r.tending, r.tended = true, time.Now()
			defer time.AfterFunc(test.takes, func() {
				r.mu.Lock()
				defer r.mu.Unlock()
				c.learn(limit/2, r.taken-r.pending, time.Now())
				r.tending = false
				r.tell()
			}).Stop()
			for i, want := range []time.Duration{test.waits, test.then} {
				start := time.Now()
				if err := c.Put(t.Context(), id, frame); !errors.Is(err, test.err) {
					t.Errorf("write %d: got %v, want %v", i, err, test.err)
				}
				if got := time.Since(start); got != want {
					t.Errorf("write %d: waited %v, want %v", i, got, want)
				}
			}
		})
	}
}

// TestWritersWaitALittleInAll: where each look takes long, that costs a process a
// few seconds and no more, and as much again much later.
func TestWritersWaitALittleInAll(t *testing.T) {
	dir := t.TempDir()
	id, frame := chunk(0, 100)
	synctest.Test(t, func(t *testing.T) {
		const limit, takes = 100 << 20, 400 * time.Millisecond // a look
		c, err := Open(dir, Options{Limit: limit})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		r := &c.room
		waited := func() (d time.Duration) {
			for range 30 {
				r.mu.Lock()
				c.learn(limit/2, r.taken-r.pending, time.Now())
				r.wrote, r.step, r.tending, r.tended = stepsBlind<<20, 1<<20, true, time.Now()
				r.mu.Unlock()
				look := time.AfterFunc(takes, func() {
					r.mu.Lock()
					defer r.mu.Unlock()
					c.learn(limit/2, r.taken-r.pending, time.Now())
					r.tell()
				})
				var g sync.WaitGroup
				start := time.Now()
				for range 4 {
					g.Go(func() { c.Put(t.Context(), id, frame) })
				}
				g.Wait()
				d += time.Since(start)
				look.Stop()
			}
			return d
		}
		for i := range 2 {
			if d := waited(); d < allPatience || d > allPatience+laterPatience {
				t.Errorf("%d: waited %v, want %v", i, d, allPatience)
			}
			time.Sleep(patienceBack + time.Second)
		}
		r.mu.Lock()
		r.tending = false
		r.mu.Unlock()
	})
}

// TestWriterWaitsForRoom: who finds the cache full looks soon whether others have
// made room. Where they do not, one write waits for that and those after it do not.
func TestWriterWaitsForRoom(t *testing.T) {
	dir := t.TempDir()
	const n, size = 20, 8 << 10
	for i := range n {
		id, _ := chunk(uint64(i), 100)
		write(t, dir, id, make([]byte, size), time.Duration(i)*time.Hour)
	}
	id, frame := chunk(n, 100)
	synctest.Test(t, func(t *testing.T) {
		other, err := Open(dir, Options{Limit: n * size})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		lock, held := other.lockEviction()
		if !held || lock == nil {
			t.Fatal("got no lock")
		}
		c, err := Open(dir, Options{Limit: n * size})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for i, most := range []time.Duration{laterPatience + lookPatience, 0} {
			start := time.Now()
			if err := c.Put(t.Context(), id, frame); !errors.Is(err, chunkstore.ErrFull) {
				t.Errorf("write %d to a full cache: got %v, want %v", i, err, chunkstore.ErrFull)
			}
			if got := time.Since(start); got > most {
				t.Errorf("write %d to a full cache: waited %v, want %v at most", i, got, most)
			}
		}
		lock.Close()
		if e, err := other.Evict(t.Context()); err != nil || e.Chunks == 0 {
			t.Fatalf("got %+v, %v", e, err)
		}
		time.Sleep(lookEvery + time.Second)
		c.Put(t.Context(), id, frame) // has it looked
		time.Sleep(time.Second)
		if err := c.Put(t.Context(), id, frame); err != nil {
			t.Errorf("room was made: got %v", err)
		}

		// What it knows is that there was no room a moment ago, and that it is not its
		// turn to make some.
		r := &c.room
		r.mu.Lock()
		c.learn(n*size, r.taken-r.pending, time.Now())
		r.next = time.Now().Add(evictPause)
		r.mu.Unlock()
		start := time.Now()
		if err := c.Put(t.Context(), id, frame); err != nil || time.Since(start) != fullEvery {
			t.Errorf("room was made a moment ago: got %v after %v, want it after %v", err, time.Since(start), fullEvery)
		}
	})
}

// TestRoomForOneImage: many writers that start together on a cache that is full of
// old chunks, and may hold a few times what they write, keep nearly all of it and
// exceed the limit by little.
func TestRoomForOneImage(t *testing.T) {
	const writers, chunks, size = 16, 640, 40 << 10
	for _, times := range []int64{2, 4} {
		t.Run(fmt.Sprint(times), func(t *testing.T) {
			dir := mount(t, "tmpfs", 0, "")
			limit := times * chunks * size
			for i := range limit * 94 / 100 / (256 << 10) {
				id, _ := chunk(uint64(1_000_000+i), 10)
				write(t, dir, id, make([]byte, 256<<10), 24*time.Hour)
			}
			var put, full atomic.Int64
			var writing sync.WaitGroup
			for w := range writers {
				c := open(t, dir, Options{Limit: limit})
				writing.Go(func() {
					for i := w; i < chunks; i += writers {
						id, frame := chunk(uint64(i), size-100)
						switch err := c.Put(t.Context(), id, frame); {
						case err == nil:
							put.Add(1)
						case errors.Is(err, chunkstore.ErrFull):
							full.Add(1)
						default:
							t.Error(err)
						}
						time.Sleep(10 * time.Millisecond) // as from a narrow line
					}
				})
			}
			done := make(chan struct{})
			go func() { writing.Wait(); close(done) }()
			var most int64
			for sampling := true; sampling; {
				select {
				case <-done:
					sampling = false
				case <-time.After(5 * time.Millisecond):
				}
				most = max(most, usage(t, dir))
			}
			t.Logf("%d chunks written, %d refused; at most %.1f %% of the limit", put.Load(), full.Load(), 100*float64(most)/float64(limit))
			if full.Load() > chunks/20 {
				t.Errorf("%d of %d chunks were refused, want at most one of 20", full.Load(), chunks)
			}
			if most > limit*11/10 {
				t.Errorf("got %d bytes, want at most %d", most, limit)
			}
		})
	}
}
