package chunkstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// claimed is a cache that several Fetchers share, each as a process of its own.
type claimed struct {
	*memory
	claims *shared
}

// shared is what the lock file of a cache is.
type shared struct {
	mu      sync.Mutex
	held    map[index.ID]int
	claims  int
	hostile func(id index.ID) bool // chunks that somebody holds for ever
	takes   time.Duration          // for each claim
}

func (c *claimed) Claim(id index.ID) (release func(), ok bool) {
	s := c.claims
	time.Sleep(s.takes)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claims++
	if s.held[id] > 0 || s.hostile != nil && s.hostile(id) {
		return nil, false
	}
	s.held[id]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held[id]--
	}, true
}

func newClaimed() *claimed {
	return &claimed{newMemory("cache"), &shared{held: make(map[index.ID]int)}}
}

// wantReleased checks that no claim is left.
func (c *claimed) wantReleased(t *testing.T) {
	t.Helper()
	c.claims.mu.Lock()
	defer c.claims.mu.Unlock()
	for id, n := range c.claims.held {
		if n != 0 {
			t.Errorf("chunk %s: got %d claims left, want none", id, n)
		}
	}
}

// slow returns a store that takes d for each chunk.
func slow(d time.Duration) *memory {
	m := newMemory("store", good...)
	m.set(func(ctx context.Context, _ int64) error { sleepIn(ctx, d); return ctx.Err() })
	return m
}

func sleepIn(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// TestOneFetchForAll: many processes that want the same chunks at once fetch each
// of them once, and none waits much longer than for the network.
func TestOneFetchForAll(t *testing.T) {
	for _, how := range []string{"batches", "single chunks", "batches in other orders", "both"} {
		synctest.Test(t, func(t *testing.T) {
			cache, store := newClaimed(), slow(100*time.Millisecond)
			const processes = 16
			var g sync.WaitGroup
			start := time.Now()
			var sharing int64
			var mu sync.Mutex
			for p := range processes {
				f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
				g.Go(func() {
					cs := append([]index.Chunk(nil), chunks...)
					if how == "batches in other orders" {
						rand.Shuffle(len(cs), func(i, j int) { cs[i], cs[j] = cs[j], cs[i] })
					}
					if how == "single chunks" || how == "both" && p%2 == 0 {
						for i := range cs {
							wantPlain(t, f, within(t, time.Minute), i)
						}
					} else if order, err := fetchAll(t, f, cs); err != nil || len(order) != len(cs) {
						t.Errorf("%s: got %d chunks, %v", how, len(order), err)
					}
					f.Close()
					mu.Lock()
					sharing += f.Stats().Cache.Shared
					mu.Unlock()
				})
			}
			g.Wait()
			if n := store.gets.Load(); n != int64(len(chunks)) {
				t.Errorf("%s: got %d requests for %d chunks, want one each", how, n, len(chunks))
			}
			if sharing == 0 {
				t.Errorf("%s: got no chunk counted as another's", how)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s: got %v, want about 2 s at most", how, took)
			}
			cache.wantReleased(t)
		})
	}
}

// TestOwnerGivesUp: what the owner of a claim cannot have is fetched by another,
// soon after it has said so.
func TestOwnerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := newClaimed()
		broken, store := newMemory("broken"), newMemory("store", good...)
		broken.set(func(context.Context, int64) error { time.Sleep(time.Second); return fmt.Errorf("no: %w", ErrNotFound) })
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{broken}})
		go f.FetchBatch(t.Context(), chunks, func(int, []byte) error { return nil })
		time.Sleep(100 * time.Millisecond)
		start := time.Now()
		other := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
		if order, err := fetchAll(t, other, chunks); err != nil || len(order) != len(chunks) {
			t.Errorf("got %d chunks, %v", len(order), err)
		}
		if took := time.Since(start); took > 5*time.Second || store.gets.Load() != int64(len(chunks)) {
			t.Errorf("got %d requests in %v, want one for each chunk within 5 s", store.gets.Load(), took)
		}
		f.Close()
		other.Close()
		cache.wantReleased(t)
	})
}

// TestStoppedOwner: an owner that holds its claims and does nothing costs the
// others a few seconds in all. Each of them asks for one chunk or two to see that
// it is the owner; the rest of its chunks are fetched by one.
func TestStoppedOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newClaimed(), slow(50*time.Millisecond)
		for _, c := range chunks[5:15] {
			cache.Claim(c.ID)
		}
		const processes = 8
		var g sync.WaitGroup
		for range processes {
			f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
			g.Go(func() {
				start := time.Now()
				for _, cs := range [][]index.Chunk{chunks[:10], chunks[10:]} {
					if order, err := fetchAll(t, f, cs); err != nil || len(order) != len(cs) {
						t.Errorf("got %d chunks, %v", len(order), err)
					}
				}
				if took := time.Since(start); took > 7*time.Second {
					t.Errorf("got %v, want a few seconds", took)
				}
				f.Close()
			})
		}
		g.Wait()
		if n, most := store.gets.Load(), int64(len(chunks)+2*processes); n > most {
			t.Errorf("got %d requests for %d chunks, want at most %d", n, len(chunks), most)
		}
	})
}

// TestStalledStore: when the store stands still, each of the processes that wait
// for one another asks for one chunk at most that another is fetching, however
// long it takes, and as often as it happens within the time of a start.
func TestStalledStore(t *testing.T) {
	for _, test := range []struct {
		stall   time.Duration
		times   int
		batches bool
	}{
		{6 * time.Second, 1, true},
		{10 * time.Second, 1, true},
		{10 * time.Second, 1, false},
		{30 * time.Second, 1, true},
		{6 * time.Second, 5, true},
		{6 * time.Second, 5, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			const processes, works = 16, 200 * time.Millisecond // between two stalls
			cache, store := newClaimed(), newMemory("store", good...)
			start := time.Now()
			var brought atomic.Int64
			store.set(func(ctx context.Context, _ int64) error {
				sleepIn(ctx, 90*time.Millisecond)
				stalls, since := time.Since(start)/(works+test.stall), time.Since(start)%(works+test.stall)
				if int(stalls) < test.times && since >= works {
					sleepIn(ctx, works+test.stall-since)
				}
				if ctx.Err() == nil {
					brought.Add(1)
				}
				return ctx.Err()
			})
			var g sync.WaitGroup
			for range processes {
				// Second requests for what is slow have a limit of their own.
				f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}, HedgeAfter: -1})
				g.Go(func() {
					if test.batches {
						for from := 0; from < len(chunks); from += 2 {
							n := 0
							if err := f.FetchBatch(t.Context(), chunks[from:from+2], func(int, []byte) error { n++; return nil }); err != nil || n != 2 {
								t.Errorf("%+v: got %d chunks, %v", test, n, err)
							}
						}
					} else {
						for i := range chunks {
							wantPlain(t, f, within(t, time.Minute), i)
						}
					}
					f.Close()
				})
			}
			g.Wait()
			t.Logf("%+v: %d chunks brought, in %v", test, brought.Load(), time.Since(start))
			if n, most := brought.Load(), int64(len(chunks)+test.times*processes); n > most {
				t.Errorf("%+v: the store brought %d chunks for %d, want at most %d", test, n, len(chunks), most)
			}
			if took, most := time.Since(start), time.Duration(test.times)*(works+test.stall)+10*time.Second; took > most {
				t.Errorf("%+v: got %v, want at most %v", test, took, most)
			}
			cache.wantReleased(t)
		})
	}
}

// TestStoreAnswersOthers: a process that the store does not answer waits for those
// that it does answer.
func TestStoreAnswersOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store, deaf := newClaimed(), slow(4*time.Second), newMemory("deaf", good...)
		deaf.set(hanging)
		owner := fetcher(t, cache, store)
		var g sync.WaitGroup
		g.Go(func() { fetchAll(t, owner, chunks) })
		time.Sleep(100 * time.Millisecond)
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{deaf}, HedgeAfter: -1})
		if order, err := fetchAll(t, f, chunks); err != nil || len(order) != len(chunks) {
			t.Errorf("got %d chunks, %v", len(order), err)
		}
		if n := deaf.gets.Load(); n > 1 {
			t.Errorf("got %d requests, want one at most", n)
		}
		f.Close()
		g.Wait()
	})
}

// TestAllClaimedForEver: somebody who holds every claim there can be, costs a
// process a few seconds in all, however many chunks it reads, and whether they
// are read one by one or in batches.
func TestAllClaimedForEver(t *testing.T) {
	for _, batches := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			cache, store := newClaimed(), newMemory("store", good...)
			cache.claims.hostile = func(index.ID) bool { return true }
			f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
			start := time.Now()
			for i := range chunks {
				if batches {
					if err := f.FetchBatch(t.Context(), chunks[i:i+1], func(int, []byte) error { return nil }); err != nil {
						t.Error(err)
					}
				} else {
					wantPlain(t, f, within(t, time.Minute), i)
				}
			}
			if took := time.Since(start); took > 8*time.Second {
				t.Errorf("batches %v: got %v for %d chunks, want a few seconds", batches, took, len(chunks))
			}
			start = time.Now()
			f.Close()
			for i := range chunks {
				delete(cache.frames, chunks[i].ID)
			}
			if _, err := fetchAll(t, f, chunks); err != nil || time.Since(start) > 0 {
				t.Errorf("then: got %v after %v, want all at once", err, time.Since(start))
			}
		})
	}
}

// TestSomeClaimedForEver: somebody who holds one chunk of each batch costs no more
// than one who holds all. If the store is slow, too, or stands still for a while,
// what it needs comes on top.
func TestSomeClaimedForEver(t *testing.T) {
	for _, test := range []struct {
		name  string
		takes time.Duration // a chunk
		stall time.Duration // of the first one
		all   bool
	}{
		{"one of each batch", 20 * time.Millisecond, 0, false},
		{"one of each batch, stalled", 20 * time.Millisecond, 10 * time.Second, false},
		{"one of each batch, slow", 2 * time.Second, 0, false},
		{"all, stalled", 20 * time.Millisecond, 10 * time.Second, true},
		{"all, slow", 2 * time.Second, 0, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			const batch = 2
			cache, store := newClaimed(), newMemory("store", good...)
			store.set(func(ctx context.Context, n int64) error {
				if sleepIn(ctx, test.takes); n == 1 {
					sleepIn(ctx, test.stall)
				}
				return ctx.Err()
			})
			held := make(map[index.ID]bool)
			for i := 0; i < len(chunks); i += batch {
				held[chunks[i].ID] = true
			}
			cache.claims.hostile = func(id index.ID) bool { return test.all || held[id] }
			f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}, HedgeAfter: -1})
			start := time.Now()
			for from := 0; from < len(chunks); from += batch {
				if order, err := fetchAll(t, f, chunks[from:from+batch]); err != nil || len(order) != batch {
					t.Errorf("%s: got %d chunks, %v", test.name, len(order), err)
				}
			}
			took, alone := time.Since(start), test.stall+time.Duration(len(chunks))*test.takes
			t.Logf("%s: %v", test.name, took)
			if took > alone+9*time.Second {
				t.Errorf("%s: got %v, want a few seconds more than %v", test.name, took, alone)
			}
			f.Close()
		})
	}
}

// TestHalfClaimedForEver: neighbours that deliver do not let others, that never
// do, take more time than they would alone.
func TestHalfClaimedForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newClaimed(), slow(20*time.Millisecond)
		cache.claims.hostile = func(id index.ID) bool { return id[5]&1 == 0 }
		var g sync.WaitGroup
		for range 4 {
			f := fetcher(t, cache, store)
			g.Go(func() {
				start := time.Now()
				for i := range chunks {
					wantPlain(t, f, within(t, time.Minute), i)
				}
				if took := time.Since(start); took > 10*time.Second {
					t.Errorf("got %v, want a few seconds", took)
				}
			})
		}
		g.Wait()
	})
}

// TestSlowClaims: somebody who makes each claim slow costs a few seconds in all.
func TestSlowClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newClaimed(), newMemory("store", good...)
		cache.claims.takes = 300 * time.Millisecond
		f := fetcher(t, cache, store)
		start := time.Now()
		if order, err := fetchAll(t, f, chunks); err != nil || len(order) != len(chunks) {
			t.Errorf("got %d chunks, %v", len(order), err)
		}
		if took := time.Since(start); took > 4*time.Second || cache.claims.claims > 10 {
			t.Errorf("got %d claims in %v, want a few in 4 s", cache.claims.claims, took)
		}
		time.Sleep(11 * time.Minute)
		cache.wantReleased(t)

		// After a while it is tried again.
		cache.claims.takes, cache.claims.claims = 0, 0
		cache.mu.Lock()
		delete(cache.frames, chunks[0].ID)
		cache.mu.Unlock()
		wantPlain(t, f, t.Context(), 0)
		if cache.claims.claims == 0 {
			t.Error("got no claims, want one")
		}
	})
}

// TestPatienceComesBack: after a while neighbours are waited for again.
func TestPatienceComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newClaimed(), newMemory("store", good...)
		cache.claims.hostile = func(index.ID) bool { return true }
		f := fetcher(t, cache, store)
		last := len(chunks) - 1
		for i := range last - 1 {
			wantPlain(t, f, t.Context(), i)
		}
		start := time.Now()
		wantPlain(t, f, t.Context(), last-1)
		if took := time.Since(start); took > 0 {
			t.Errorf("got a chunk that a neighbour holds after %v, want it at once", took)
		}
		cache.claims.hostile = nil
		time.Sleep(11 * time.Minute)
		release, _ := cache.Claim(chunks[last].ID)
		time.AfterFunc(900*time.Millisecond, func() {
			cache.Put(context.Background(), chunks[last].ID, good[last])
			release()
		})
		before := store.gets.Load()
		wantPlain(t, f, t.Context(), last)
		if n := store.gets.Load() - before; n != 0 {
			t.Errorf("got %d requests for what a neighbour was fetching, want none", n)
		}
	})
}

// TestShortDeadline: a reader with little time does not spend it on neighbours.
func TestShortDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := newClaimed()
		cache.claims.hostile = func(index.ID) bool { return true }
		f := fetcher(t, cache, slow(500*time.Millisecond))
		start := time.Now()
		wantPlain(t, f, within(t, 2*time.Second), 0)
		if took := time.Since(start); took > 1900*time.Millisecond {
			t.Errorf("got %v, want less than the reader has", took)
		}
	})
}

// TestWaitIsCancelled: who waits for a neighbour stops when its context ends.
func TestWaitIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := newClaimed()
		cache.claims.hostile = func(index.ID) bool { return true }
		f := fetcher(t, cache, slow(time.Second))
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		start := time.Now()
		if _, err := f.Fetch(ctx, chunks[0], nil); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, context.Canceled)
		}
		if took := time.Since(start); took > 1100*time.Millisecond {
			t.Errorf("got %v, want about 1 s", took)
		}
	})
}

// TestYieldStopsWhileClaimed: a caller that wants no more leaves no claim behind.
func TestYieldStopsWhileClaimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := errors.New("stop")
		for _, from := range []string{"store", "neighbour"} {
			cache := newClaimed()
			f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{slow(time.Second)}})
			if from == "neighbour" {
				release, _ := cache.Claim(chunks[0].ID)
				time.AfterFunc(100*time.Millisecond, func() {
					cache.Put(context.Background(), chunks[0].ID, good[0])
					release()
				})
			}
			cs := chunks
			if from == "neighbour" {
				cs = chunks[:1]
			}
			if err := f.FetchBatch(t.Context(), cs, func(int, []byte) error { return stop }); err != stop {
				t.Errorf("%s: got %v, want %v", from, err, stop)
			}
			f.Close()
			cache.wantReleased(t)
		}
	})
}

// TestNobodyWaitsForAFullCache: where nothing comes into the cache, processes do
// not wait for one another.
func TestNobodyWaitsForAFullCache(t *testing.T) {
	for name, refusal := range map[string]error{"full": ErrFull, "failing": errFault} {
		synctest.Test(t, func(t *testing.T) {
			cache, store := newClaimed(), slow(100*time.Millisecond)
			cache.onPut = func(context.Context) error { return refusal }
			var g sync.WaitGroup
			start := time.Now()
			for range 8 {
				f := fetcher(t, cache, store)
				g.Go(func() {
					for i := range chunks {
						wantPlain(t, f, within(t, time.Minute), i)
					}
				})
			}
			g.Wait()
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s: got %v, want about 2 s", name, took)
			}
			cache.wantReleased(t)
		})
	}
}

// TestSomeWritesAreRefused: a cache that refuses some writes, as one does that is
// being evicted from, is still filled by one fetch for all.
func TestSomeWritesAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newClaimed(), slow(100*time.Millisecond)
		var writes atomic.Int64
		cache.onPut = func(context.Context) error {
			if writes.Add(1)%4 == 0 {
				return ErrFull
			}
			return nil
		}
		var g sync.WaitGroup
		for range 8 {
			f := fetcher(t, cache, store)
			g.Go(func() {
				for i := range chunks {
					wantPlain(t, f, within(t, time.Minute), i)
				}
			})
		}
		g.Wait()
		if n, most := store.gets.Load(), int64(len(chunks)*3/2); n > most {
			t.Errorf("got %d requests for %d chunks, want at most %d", n, len(chunks), most)
		}
		cache.wantReleased(t)
	})
}

// TestClaimedDamage: several processes that find a damaged chunk heal it with one
// fetch, and each says once that it was damaged.
func TestClaimedDamage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newClaimed(), slow(time.Second)
		cache.frames[chunks[0].ID] = flip(bytes.Clone(good[0]))
		var g sync.WaitGroup
		for range 4 {
			var log bytes.Buffer
			f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}, Log: slog.New(slog.NewTextHandler(&log, nil))})
			g.Go(func() {
				wantPlain(t, f, within(t, time.Minute), 0)
				f.Close()
				if n := f.Stats().Cache.Corrupt; n != 1 || strings.Count(log.String(), "corrupt chunk") != 1 {
					t.Errorf("got %d damages counted, want 1; log:\n%s", n, &log)
				}
			})
		}
		g.Wait()
		if n := store.gets.Load(); n != 1 {
			t.Errorf("got %d requests, want 1", n)
		}
		if !bytes.Equal(cache.frames[chunks[0].ID], good[0]) {
			t.Error("the chunk is not healed")
		}
	})
}

// TestClaimAfterClose: a Fetcher whose cache writes have ended claims nothing, as
// nothing would come of it.
func TestClaimAfterClose(t *testing.T) {
	cache := newClaimed()
	f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{newMemory("store", good...)}})
	f.Close()
	wantPlain(t, f, t.Context(), 0)
	if cache.claims.claims != 0 {
		t.Errorf("got %d claims, want none", cache.claims.claims)
	}
}
