package chunkstore_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// answersIn makes a store take d for each answer.
func answersIn(d time.Duration) func(context.Context, int64) error {
	return func(ctx context.Context, _ int64) error { return pause(ctx, d) }
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TestHedge: a request that gets no answer is sent a second time, past the
// connections that stand, and the loser is cancelled.
func TestHedge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var afresh, cancelled atomic.Int64
		m := newMemory("a", good...)
		m.set(answersIn(20 * time.Millisecond))
		f := fetcher(t, nil, m)
		for i := range chunks {
			wantPlain(t, f, within(t, time.Minute), i)
		}
		m.set(func(ctx context.Context, _ int64) error {
			if IsFresh(ctx) {
				afresh.Add(1)
				return pause(ctx, 20*time.Millisecond)
			}
			<-ctx.Done()
			cancelled.Add(1)
			return ctx.Err()
		})
		start := time.Now()
		wantPlain(t, f, within(t, time.Minute), 0)
		if took := time.Since(start); took != DefaultHedgeAfter+20*time.Millisecond {
			t.Errorf("got the chunk after %v, want it 20 ms after %v", took, DefaultHedgeAfter)
		}
		synctest.Wait()
		if afresh.Load() != 1 || cancelled.Load() != 1 {
			t.Errorf("got %d requests past the connections that stand and %d cancelled, want 1 and 1", afresh.Load(), cancelled.Load())
		}
		if st := f.Stats().Stores[0]; st.Hedges != 1 || st.Failures != 0 {
			t.Errorf("got %+v, want one hedge and no failure", st)
		}
	})
}

// TestHedgeBatch: only what a batch has not brought is asked for again, and
// delivered once.
func TestHedgeBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &batching{memory: newMemory("a", good...)}
		b.onBatch = func(ctx context.Context, n int64, at int) error {
			if n == 1 && at == 7 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		f := fetcher(t, nil, b)
		order, err := fetchAll(t, f, chunks)
		if err != nil || len(order) != len(chunks) {
			t.Errorf("got %d chunks, %v", len(order), err)
		}
		if st := f.Stats().Stores[0]; st.Hedges != int64(len(chunks)-7) || st.Chunks != int64(len(chunks)) {
			t.Errorf("got %+v, want %d hedges", st, len(chunks)-7)
		}
	})
}

// TestHedgeIsNeverWrong: two answers for one chunk, one of them damaged or of
// another chunk, or an error: what is delivered is right, and once.
func TestHedgeIsNeverWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 1))
		hedges := int64(0)
		for range 300 {
			a, b := newMemory("a", good...), newMemory("b", good...)
			for i := range chunks {
				if r.IntN(3) == 0 {
					a.corrupt(chunks[i].ID, func(f []byte) []byte { return damage(r, f) })
				}
			}
			waits := make([]time.Duration, 64)
			for i := range waits {
				waits[i] = time.Duration(r.IntN(4000)) * time.Millisecond
			}
			for _, m := range []*memory{a, b} {
				m.set(func(ctx context.Context, n int64) error {
					if n%7 == 3 {
						return errFault
					}
					return pause(ctx, waits[n%64])
				})
			}
			f := NewFetcher(FetcherOptions{Stores: []Store{a, b}})
			if order, err := fetchAll(t, f, chunks); err != nil || len(order) != len(chunks) {
				t.Fatalf("got %d chunks, %v", len(order), err)
			}
			f.Close()
			for _, s := range f.Stats().Stores {
				hedges += s.Hedges
			}
		}
		if hedges < 300 {
			t.Errorf("got %d hedges in all, want hundreds", hedges)
		}
	})
}

// TestHedgeShare: a store that has become slow for good is not asked for
// everything twice.
func TestHedgeShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(func(ctx context.Context, n int64) error { // ever slower than before
			return pause(ctx, 20*time.Millisecond*time.Duration(n))
		})
		f := fetcher(t, nil, m)
		for i := range 300 {
			wantPlain(t, f, t.Context(), i%len(chunks))
		}
		if n := f.Stats().Stores[0].Hedges; n > 32+300/20+3 {
			t.Errorf("got %d hedges for 300 chunks, want at most 50", n)
		}
	})
}

// TestHedgeAmongOthers: those who fetch the same image over the same line do not
// ask for all of it twice because it is slow; a chunk that does not come they do.
func TestHedgeAmongOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, b := newClaimed(), &batching{memory: newMemory("a", good...)}
		cache.onPut = func(context.Context) error { return ErrFull }
		b.onBatch = func(ctx context.Context, _ int64, at int) error {
			if at > 0 {
				return nil
			}
			return pause(ctx, 5*time.Second)
		}
		release, _ := cache.Claim(chunks[0].ID)
		time.AfterFunc(100*time.Millisecond, release)
		f := fetcher(t, cache, b)
		if order, err := fetchAll(t, f, chunks); err != nil || len(order) != len(chunks) {
			t.Errorf("got %d chunks, %v", len(order), err)
		}
		if n := f.Stats().Stores[0].Hedges; n != 0 {
			t.Errorf("got %d hedges for a line that is slow for all, want none", n)
		}
		b.set(func(ctx context.Context, _ int64) error {
			if IsFresh(ctx) {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		})
		wantPlain(t, f, within(t, time.Minute), 0)
		if n := f.Stats().Stores[0].Hedges; n != 1 {
			t.Errorf("got %d hedges for a chunk that does not come, want 1", n)
		}
	})
}

// TestNoHedges: none are sent where there shall be none, nor while the receiver
// is what is slow.
func TestNoHedges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(answersIn(5 * time.Second))
		f := NewFetcher(FetcherOptions{Stores: []Store{m}, HedgeAfter: -1})
		defer f.Close()
		wantPlain(t, f, within(t, time.Minute), 0)
		if n := m.gets.Load(); n != 1 {
			t.Errorf("got %d requests, want 1", n)
		}
		m.set(nil)
		g := fetcher(t, nil, m)
		if err := g.FetchBatch(t.Context(), chunks, func(int, []byte) error { time.Sleep(3 * time.Second); return nil }); err != nil {
			t.Error(err)
		}
		if n := g.Stats().Stores[0].Hedges; n != 0 {
			t.Errorf("got %d hedges for a slow receiver, want none", n)
		}
	})
}

// TestHedgeTail measures what a second request is for: one connection of twenty
// is stalled.
func TestHedgeTail(t *testing.T) {
	tail := func(t *testing.T, after time.Duration) (p50, p99 time.Duration) {
		m := newMemory("a", good...)
		m.set(func(ctx context.Context, n int64) error {
			if n%20 == 10 {
				return pause(ctx, 10*time.Second)
			}
			return pause(ctx, time.Duration(10+n%10)*time.Millisecond)
		})
		f := NewFetcher(FetcherOptions{Stores: []Store{m}, HedgeAfter: after})
		defer f.Close()
		var took []time.Duration
		for i := range 400 {
			start := time.Now()
			wantPlain(t, f, within(t, time.Minute), i%len(chunks))
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		return took[200], took[396]
	}
	synctest.Test(t, func(t *testing.T) {
		p50, p99 := tail(t, -1)
		h50, h99 := tail(t, 0)
		t.Logf("50th and 99th of 100 reads: %v and %v without a second request, %v and %v with", p50, p99, h50, h99)
		if p99 != 10*time.Second || h99 > time.Second || h50 != p50 {
			t.Errorf("got the 99th of 100 reads after %v, want within 1 s", h99)
		}
	})
}

// TestTroubledStore: nobody waits for a store in trouble while another serves,
// it is probed with growing pauses, asked when the other fails, and used again
// once a probe comes through.
func TestTroubledStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMemory("a", good...), newMemory("b", good...)
		a.set(func(ctx context.Context, _ int64) error { _ = pause(ctx, time.Second); return errFault })
		f := fetcher(t, nil, a, b)
		wantPlain(t, f, within(t, time.Minute), 0)
		before := a.gets.Load()
		start := time.Now()
		for range 600 {
			at := time.Now()
			wantPlain(t, f, within(t, time.Minute), 1)
			if took := time.Since(at); took > 0 {
				t.Fatalf("a read waited %v", took)
			}
			time.Sleep(time.Second)
		}
		if n := a.gets.Load() - before; n < 10 || n > 40 {
			t.Errorf("got %d probes in %v, want 10 to 40", n, time.Since(start))
		}

		// The other fails, too: the store in trouble still serves.
		a.set(nil)
		b.set(failing)
		wantPlain(t, f, within(t, time.Minute), 2)

		// A probe that finds no such chunk has found a store that answers.
		b.set(nil)
		a.set(failing)
		wantPlain(t, f, within(t, time.Minute), 3)
		a.set(nil)
		a.mu.Lock()
		delete(a.frames, chunks[4].ID)
		a.mu.Unlock()
		time.Sleep(time.Minute)
		wantPlain(t, f, within(t, time.Minute), 4)
		synctest.Wait()
		n := b.gets.Load()
		wantPlain(t, f, within(t, time.Minute), 5)
		if b.gets.Load() != n {
			t.Error("the recovered store is not used")
		}
	})
}

// TestProbesEndWithTheFetcher: nothing is left when it is closed.
func TestProbesEndWithTheFetcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMemory("a", good...), newMemory("b", good...)
		a.set(failing)
		f := NewFetcher(FetcherOptions{Stores: []Store{a, b}})
		wantPlain(t, f, t.Context(), 0)
		a.set(hanging)
		time.Sleep(time.Minute)
		wantPlain(t, f, t.Context(), 0)
		start := time.Now()
		f.Close()
		synctest.Wait()
		if took := time.Since(start); took > 0 {
			t.Errorf("got %v, want the probe to end at once", took)
		}
	})
}

// TestHold: whatever the stores answer, a chunk is waited for until they have
// it. That is said once, and once that it has come.
func TestHold(t *testing.T) {
	for name, hook := range map[string]func(context.Context, int64) error{
		"failing":      failing,
		"hanging":      hanging,
		"unauthorized": func(context.Context, int64) error { return unauthorized{} },
		"missing":      func(context.Context, int64) error { return fmt.Errorf("get: %w", ErrNotFound) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var said []bool
				m := newMemory("a", good...)
				m.set(hook)
				f := NewFetcher(FetcherOptions{Stores: []Store{m}, Hold: func(again bool) { said = append(said, again) }})
				defer f.Close()
				// Not at the moment at which it is asked: then some of a batch would come and others not.
				time.AfterFunc(time.Hour+time.Second, func() { m.set(nil) })
				start := time.Now()
				done := make(chan bool)
				go func() { defer close(done); wantPlain(t, f, t.Context(), 1) }()
				if order, err := fetchForEver(t, f, chunks); err != nil || len(order) != len(chunks) {
					t.Errorf("got %d chunks, %v", len(order), err)
				}
				<-done
				if took := time.Since(start); took < time.Hour || took > time.Hour+time.Minute {
					t.Errorf("got %v, want soon after an hour", took)
				}
				if !slices.Equal(said, []bool{false, true}) {
					t.Errorf("got %v said, want the wait and its end", said)
				}
				if n := m.gets.Load(); n > 21*3600 {
					t.Errorf("got %d requests in an hour", n)
				}
			})
		})
	}
	t.Run("corrupt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory("a", good...)
			m.corrupt(chunks[0].ID, flip)
			time.AfterFunc(time.Minute, func() { m.corrupt(chunks[0].ID, flip) })
			f := NewFetcher(FetcherOptions{Stores: []Store{m}, Hold: func(bool) {}})
			defer f.Close()
			wantPlain(t, f, t.Context(), 0)
		})
	})
	t.Run("given up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			said := 0
			m := newMemory("a", good...)
			m.set(failing)
			f := NewFetcher(FetcherOptions{Stores: []Store{m}, Hold: func(bool) { said++ }})
			defer f.Close()
			for range 3 {
				start := time.Now()
				if _, err := f.Fetch(within(t, time.Minute), chunks[0], nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
					t.Errorf("got %v after %v, want the deadline", err, time.Since(start))
				}
			}
			if said != 1 {
				t.Errorf("said %d times that something waits, want once", said)
			}
			m.set(nil)
			wantPlain(t, f, t.Context(), 0)
			if said != 2 {
				t.Errorf("said %d times, want that it goes on", said)
			}
		})
	})
}

// fetchForEver is a batch without a deadline.
func fetchForEver(t *testing.T, f *Fetcher, cs []index.Chunk) (order []int, err error) {
	err = f.FetchBatch(t.Context(), cs, func(i int, plain []byte) error {
		if index.SHA256.Sum(plain) != cs[i].ID {
			t.Errorf("place %d: got other bytes", i)
		}
		order = append(order, i)
		return nil
	})
	return order, err
}
