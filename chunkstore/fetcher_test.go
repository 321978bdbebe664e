package chunkstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
)

// memory is a store in memory that fails on demand.
type memory struct {
	name string
	gets atomic.Int64
	puts atomic.Int64

	mu     sync.Mutex
	frames map[index.ID][]byte
	onGet  func(ctx context.Context, n int64) error // n counts from 1
	onPut  func(ctx context.Context) error
}

func newMemory(name string, frames ...[]byte) *memory {
	m := &memory{name: name, frames: make(map[index.ID][]byte)}
	for i, frame := range frames {
		m.frames[chunks[i].ID] = frame
	}
	return m
}

func (m *memory) String() string { return m.name }

func (m *memory) Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error) {
	n := m.gets.Add(1)
	m.mu.Lock()
	hook := m.onGet
	m.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, n); err != nil {
			return dst, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	frame, ok := m.frames[id]
	if !ok {
		return dst, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	return append(dst, frame...), nil
}

func (m *memory) Has(_ context.Context, id index.ID) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.frames[id]
	return ok, nil
}

func (m *memory) Put(ctx context.Context, id index.ID, frame []byte) error {
	if len(frame) < 1 || len(frame) > MaxStored {
		return fmt.Errorf("got %d bytes, want 1 to %d", len(frame), MaxStored)
	}
	m.puts.Add(1)
	m.mu.Lock()
	hook := m.onPut
	m.mu.Unlock()
	if hook != nil {
		if err := hook(ctx); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frames[id] = bytes.Clone(frame)
	return nil
}

func (m *memory) set(f func(ctx context.Context, n int64) error) {
	m.mu.Lock()
	m.onGet = f
	m.mu.Unlock()
}

func (m *memory) corrupt(id index.ID, f func([]byte) []byte) {
	m.mu.Lock()
	m.frames[id] = f(bytes.Clone(m.frames[id]))
	m.mu.Unlock()
}

func TestMemoryContract(t *testing.T) {
	storetest.Run(t, func() Writer { return newMemory("memory") })
}

// batching is a memory with GetBatch.
type batching struct {
	*memory
	batches atomic.Int64
	onBatch func(ctx context.Context, n int64, at int) error // before delivering place at
}

func (b *batching) GetBatch(ctx context.Context, ids []index.ID, yield func(int, []byte) error) error {
	n := b.batches.Add(1)
	for i, id := range ids {
		if b.onBatch != nil {
			if err := b.onBatch(ctx, n, i); err != nil {
				return err
			}
		}
		b.mu.Lock()
		frame, ok := b.frames[id]
		b.mu.Unlock()
		if !ok {
			return fmt.Errorf("%s: %w", id, ErrNotFound)
		}
		frame = bytes.Clone(frame)
		err := yield(i, frame)
		clear(frame) // it was valid until yield returned
		if err != nil {
			return err
		}
	}
	return nil
}

func TestBatchingContract(t *testing.T) {
	storetest.Run(t, func() Writer { return &batching{memory: newMemory("memory")} })
}

// located says where its chunks are.
type located struct{ *memory }

func (l located) Locate(id index.ID) string { return "pack sha256:beef at 1234" }

var (
	plains [][]byte
	chunks []index.Chunk
	good   [][]byte
)

func init() {
	for i := range 20 {
		plains = append(plains, text(i, 3000+i))
		chunks = append(chunks, chunkOf(index.SHA256, plains[i]))
		good = append(good, Encode(nil, plains[i]))
	}
	// Makes the decoder here, as it would belong to the first synctest bubble that
	// uses it.
	if _, err := Decode(nil, good[0], index.SHA256, chunks[0]); err != nil {
		panic(err)
	}
}

func fetcher(t *testing.T, cache Writer, stores ...Store) *Fetcher {
	t.Helper()
	f := NewFetcher(FetcherOptions{Cache: cache, Stores: stores})
	t.Cleanup(func() { f.Close() })
	return f
}

// within returns a context with a deadline, as a read has.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func wantPlain(t *testing.T, f *Fetcher, ctx context.Context, i int) {
	t.Helper()
	got, err := f.Fetch(ctx, chunks[i], []byte("before"))
	if err != nil || !bytes.Equal(got, append([]byte("before"), plains[i]...)) {
		t.Errorf("chunk %d: got %d bytes, error %v", i, len(got), err)
	}
}

func flip(frame []byte) []byte {
	frame[len(frame)/2] ^= 1
	return frame
}

var errFault = errors.New("connection refused")

func failing(context.Context, int64) error { return errFault }

func hanging(ctx context.Context, _ int64) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestFetchThroughCache(t *testing.T) {
	cache, store := newMemory("cache"), newMemory("store", good...)
	f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
	for i := range chunks {
		wantPlain(t, f, t.Context(), i)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	second := fetcher(t, cache, store)
	for i := range chunks {
		wantPlain(t, second, t.Context(), i)
	}
	if n := store.gets.Load(); n != int64(len(chunks)) {
		t.Errorf("got %d requests of the store, want %d: none by the second fetcher", n, len(chunks))
	}
	var stored, plain int64
	for i := range chunks {
		stored, plain = stored+int64(len(good[i])), plain+int64(len(plains[i]))
	}
	count := Count{Chunks: int64(len(chunks)), Stored: stored, Plain: plain}
	st := f.Stats()
	if want := (CacheStats{Written: int64(len(chunks))}); st.Cache != want {
		t.Errorf("first: got %+v, want %+v", st.Cache, want)
	}
	if want := []StoreStats{{Name: "store", Count: count}}; !slices.Equal(st.Stores, want) {
		t.Errorf("first: got %+v, want %+v", st.Stores, want)
	}
	if want := (CacheStats{Count: count}); second.Stats().Cache != want {
		t.Errorf("second: got %+v, want %+v", second.Stats().Cache, want)
	}
}

// TestCacheHeals: whatever is damaged in the cache is read from the store and
// overwritten.
func TestCacheHeals(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	cache, store := newMemory("cache", good...), newMemory("store", good...)
	for range 50 {
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
		for i := range chunks {
			bad := damage(r, good[i])
			cache.corrupt(chunks[i].ID, func([]byte) []byte { return bad })
			wantPlain(t, f, t.Context(), i)
		}
		f.Close()
		for i := range chunks {
			if !bytes.Equal(cache.frames[chunks[i].ID], good[i]) {
				// A damage that does not touch the content may stay.
				if _, err := Decode(nil, cache.frames[chunks[i].ID], index.SHA256, chunks[i]); err != nil {
					t.Errorf("chunk %d was not healed: %v", i, err)
				}
			}
		}
	}
}

// TestDamageEverywhere damages chunks in cache and store at random: a read
// gives the right bytes or an error that names chunk and place.
func TestDamageEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 1))
		served, failed := 0, 0
		for range 500 {
			cache, store := newMemory("cache", good...), newMemory("store", good...)
			for i := range chunks {
				for _, m := range []*memory{cache, store} {
					if r.IntN(2) == 0 {
						bad := damage(r, good[i])
						if r.IntN(5) == 0 {
							bad = good[r.IntN(len(good))] // another chunk's
						}
						m.corrupt(chunks[i].ID, func([]byte) []byte { return bad })
					}
				}
			}
			f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
			for i := range chunks {
				got, err := f.Fetch(t.Context(), chunks[i], nil)
				var corrupt *CorruptError
				switch {
				case err == nil && bytes.Equal(got, plains[i]):
					served++
				case err == nil:
					t.Fatal("got wrong bytes")
				case errors.As(err, &corrupt) && corrupt.ID == chunks[i].ID && corrupt.Where == "store":
					failed++
				default:
					t.Fatalf("got error %v, want a *CorruptError", err)
				}
			}
			f.Close()
		}
		if served < 5000 || failed < 1000 {
			t.Errorf("got %d reads served and %d failed, want both in thousands", served, failed)
		}
	})
}

func TestCacheFaultNeverFailsARead(t *testing.T) {
	store := newMemory("store", good...)
	cache := newMemory("cache", good...)
	cache.set(failing)
	cache.onPut = func(context.Context) error { return errFault }
	var log bytes.Buffer
	f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	for i := range chunks {
		wantPlain(t, f, t.Context(), i)
	}
	f.Close()
	st := f.Stats()
	if want := int64(2 * len(chunks)); st.Cache.Faults != want || st.Cache.Chunks != 0 || st.Cache.Written != 0 {
		t.Errorf("got %+v, want %d faults", st.Cache, want)
	}
	if n := strings.Count(log.String(), "\n"); n != 2 || !strings.Contains(log.String(), chunks[0].ID.String()) {
		t.Errorf("got %d lines of log, want 2, the first with the chunk's name:\n%s", n, &log)
	}
}

func TestFullCacheIsSaidOnce(t *testing.T) {
	cache := newMemory("cache")
	cache.onPut = func(context.Context) error { return fmt.Errorf("put: %w", ErrFull) }
	var log bytes.Buffer
	f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{newMemory("store", good...)}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	for i := range chunks {
		wantPlain(t, f, t.Context(), i)
	}
	f.Close()
	if st := f.Stats().Cache; st.Dropped != int64(len(chunks)) || st.Faults != 0 {
		t.Errorf("got %+v, want %d dropped and no fault", st, len(chunks))
	}
	if n := strings.Count(log.String(), "the cache is full"); n != 1 {
		t.Errorf("got %d lines, want 1", n)
	}
}

// TestHangingCache: reads go on at once when the cache takes nothing any more,
// and take it into use again.
func TestHangingCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		cache := newMemory("cache")
		cache.onPut = func(context.Context) error { <-release; return nil }
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{newMemory("store", good...)}})
		start := time.Now()
		for n := range 500 {
			wantPlain(t, f, within(t, time.Minute), n%len(chunks))
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("500 reads with a hanging cache: got %v, want at most 1 s", took)
		}
		start = time.Now()
		if err := f.FetchBatch(within(t, time.Minute), chunks, func(int, []byte) error { return nil }); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > 15*time.Second {
			t.Errorf("a batch with a hanging cache: got %v, want at most 15 s", took)
		}
		before := f.Stats().Cache
		if before.Dropped == 0 || before.Written != 0 {
			t.Errorf("got %+v, want chunks dropped and none written", before)
		}
		close(release)
		synctest.Wait()
		for i := range chunks {
			wantPlain(t, f, t.Context(), i)
		}
		if after := f.Stats().Cache; after.Dropped != before.Dropped {
			t.Errorf("got %d more chunks dropped by a cache that works again", after.Dropped-before.Dropped)
		}
		f.Close()
	})
}

func TestCloseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := newMemory("cache")
		cache.onPut = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{newMemory("store", good...)}})
		wantPlain(t, f, t.Context(), 0)
		start := time.Now()
		if err := f.Close(); err == nil {
			t.Error("got no error, want one that says what was given up")
		}
		if took := time.Since(start); took > 6*time.Second {
			t.Errorf("got %v, want at most 6 s", took)
		}
		wantPlain(t, f, t.Context(), 1)
		f.Close()
	})
}

// TestBatchWaitsForCache: a batch that is faster than the disk loses nothing.
func TestBatchWaitsForCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, store := newMemory("cache"), newMemory("store")
		cache.onPut = func(context.Context) error { time.Sleep(500 * time.Millisecond); return nil }
		var many []index.Chunk
		for i := range 500 {
			plain := text(i, 100)
			c := chunkOf(index.SHA256, plain)
			many = append(many, c)
			store.frames[c.ID] = Encode(nil, plain)
		}
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{store}})
		if err := f.FetchBatch(t.Context(), many, func(int, []byte) error { return nil }); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		if st := f.Stats().Cache; st.Written != 500 || st.Dropped != 0 {
			t.Errorf("got %+v, want 500 written and none dropped", st)
		}
		f.Close()
	})
}

func TestStoresInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := newMemory("a"), newMemory("b", good...), newMemory("c", good...)
		f := fetcher(t, nil, a, b, c)
		start := time.Now()
		wantPlain(t, f, t.Context(), 0)
		if a.gets.Load() != 1 || b.gets.Load() != 1 || c.gets.Load() != 0 || time.Since(start) > 0 {
			t.Errorf("got %d, %d, %d requests in %v, want 1, 1, 0 at once", a.gets.Load(), b.gets.Load(), c.gets.Load(), time.Since(start))
		}
	})
}

// TestNotFound: an answer that all stores gave is final, at once, and not
// remembered.
func TestNotFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMemory("a"), newMemory("b")
		f := fetcher(t, newMemory("cache"), a, b)
		start := time.Now()
		dst := []byte("kept")
		got, err := f.Fetch(t.Context(), chunks[0], dst)
		if !errors.Is(err, ErrNotFound) || string(got) != "kept" || time.Since(start) > 0 {
			t.Errorf("got %q, %v after %v, want ErrNotFound at once", got, err, time.Since(start))
		}
		if msg := err.Error(); !strings.Contains(msg, "a: ") || !strings.Contains(msg, "b: ") || strings.Contains(msg, "\n") {
			t.Errorf("got error %q, want one line that names the stores", msg)
		}
		b.frames[chunks[0].ID] = good[0]
		wantPlain(t, f, t.Context(), 0)

		if _, err := fetcher(t, nil).Fetch(t.Context(), chunks[0], nil); !errors.Is(err, ErrNotFound) {
			t.Errorf("without stores: got %v, want ErrNotFound", err)
		}
	})
}

func TestCorruptStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMemory("a", good...), newMemory("b", good...)
		a.corrupt(chunks[0].ID, flip)
		var log bytes.Buffer
		cache := newMemory("cache")
		f := NewFetcher(FetcherOptions{Cache: cache, Stores: []Store{located{a}, b}, Log: slog.New(slog.NewTextHandler(&log, nil))})
		wantPlain(t, f, t.Context(), 0)
		if f.Stats().Stores[0].Corrupt != 1 {
			t.Errorf("got %+v, want one corrupt chunk", f.Stats().Stores[0])
		}
		if !strings.Contains(log.String(), chunks[0].ID.String()) || !strings.Contains(log.String(), "pack sha256:beef at 1234") {
			t.Errorf("got log %q, want the chunk's name and place", &log)
		}

		b.corrupt(chunks[1].ID, flip)
		a.corrupt(chunks[1].ID, flip)
		a.gets.Store(0)
		b.gets.Store(0)
		start := time.Now()
		got, err := f.Fetch(t.Context(), chunks[1], []byte("kept"))
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.ID != chunks[1].ID || corrupt.Where != "pack sha256:beef at 1234" || string(got) != "kept" {
			t.Errorf("got %d bytes, %v, want a *CorruptError", len(got), err)
		}
		if a.gets.Load() != 2 || b.gets.Load() != 2 || time.Since(start) > time.Second {
			t.Errorf("got %d and %d requests in %v, want 2 each within 1 s", a.gets.Load(), b.gets.Load(), time.Since(start))
		}

		// It works again once the store is repaired.
		b.frames[chunks[1].ID] = good[1]
		wantPlain(t, f, t.Context(), 1)
		f.Close()
		if !bytes.Equal(cache.frames[chunks[1].ID], good[1]) {
			t.Error("the cache did not get the good chunk")
		}
	})
}

// TestDamagedOnTheWay: a second request may bring what the first one lost.
func TestDamagedOnTheWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.corrupt(chunks[0].ID, flip)
		m.set(func(_ context.Context, n int64) error {
			if n == 2 {
				m.frames[chunks[0].ID] = good[0]
			}
			return nil
		})
		wantPlain(t, fetcher(t, nil, m), t.Context(), 0)
	})
}

func TestRetryUntilHealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(failing)
		f := fetcher(t, nil, m)
		time.AfterFunc(20*time.Second, func() { m.set(nil) })
		start := time.Now()
		wantPlain(t, f, within(t, time.Minute), 0)
		if took := time.Since(start); took < 20*time.Second || took > 26*time.Second {
			t.Errorf("got %v, want soon after 20 s", took)
		}
		if n := m.gets.Load(); n < 5 || n > 30 {
			t.Errorf("got %d requests in 20 s, want some with growing pauses", n)
		}
	})
}

func TestDeadline(t *testing.T) {
	for name, hook := range map[string]func(context.Context, int64) error{"failing": failing, "hanging": hanging} {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory("a", good...)
			m.set(hook)
			f := fetcher(t, nil, m)
			start := time.Now()
			_, err := f.Fetch(within(t, 10*time.Second), chunks[0], nil)
			if took := time.Since(start); took != 10*time.Second {
				t.Errorf("%s: got an error after %v, want it after 10 s", name, took)
			}
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "a: ") {
				t.Errorf("%s: got %v, want the deadline and the store's failure", name, err)
			}
			if name == "failing" && !errors.Is(err, errFault) {
				t.Errorf("got %v, want %v in it", err, errFault)
			}
			// Nothing is remembered.
			m.set(nil)
			start = time.Now()
			wantPlain(t, f, within(t, 10*time.Second), 0)
			if time.Since(start) > 0 {
				t.Errorf("%s: healed, got the chunk after %v, want it at once", name, time.Since(start))
			}
		})
	}
}

// A last attempt on which nothing arrives does not hide why those before it failed.
func TestSilenceAfterFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(func(ctx context.Context, n int64) error {
			if n == 1 {
				return failing(ctx, n)
			}
			return hanging(ctx, n)
		})
		_, err := fetcher(t, nil, m).Fetch(within(t, 10*time.Second), chunks[0], nil)
		want := "a: nothing arrived within 5s: context deadline exceeded; before that: " + errFault.Error()
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, errFault) {
			t.Errorf("got %v, want %q in it, and to be asked again", err, want)
		}
	})
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(failing)
		f := fetcher(t, nil, m)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(3*time.Second, cancel)
		start := time.Now()
		if _, err := f.Fetch(ctx, chunks[0], nil); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, context.Canceled)
		}
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("got %v, want 3 s", took)
		}
	})
}

// TestStoreHangs: the second store is asked in time, the next reads ask it
// first, and the first one is used again when it has recovered.
func TestStoreHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMemory("a", good...), newMemory("b", good...)
		a.set(hanging)
		f := fetcher(t, nil, a, b)
		start := time.Now()
		wantPlain(t, f, within(t, time.Minute), 0)
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("first read: got %v, want at most half of the deadline", took)
		}
		start = time.Now()
		for i := range chunks {
			wantPlain(t, f, within(t, time.Minute), i)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("next reads: got %v, want one that waits for a moment, and the others at once", took)
		}
		a.set(nil)
		time.Sleep(time.Minute)
		wantPlain(t, f, within(t, time.Minute), 0) // and a probe
		synctest.Wait()
		before := b.gets.Load()
		for i := range chunks {
			wantPlain(t, f, within(t, time.Minute), i)
		}
		if n := b.gets.Load() - before; n != 0 {
			t.Errorf("recovered: got %d requests of the second store, want 0", n)
		}
	})
}

type tooMany struct{ after time.Duration }

func (e tooMany) Error() string             { return "429" }
func (e tooMany) Temporary() bool           { return true }
func (e tooMany) RetryAfter() time.Duration { return e.after }

// unauthorized is the error of a store that will not change its mind.
type unauthorized struct{}

func (unauthorized) Error() string             { return "401" }
func (unauthorized) Temporary() bool           { return false }
func (unauthorized) RetryAfter() time.Duration { return 0 }

func TestPermanentFailureIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(func(_ context.Context, n int64) error {
			if n == 1 {
				return fmt.Errorf("get: %w", unauthorized{})
			}
			return nil
		})
		f := fetcher(t, nil, m)
		if _, err := f.Fetch(within(t, time.Minute), chunks[0], nil); !errors.As(err, new(unauthorized)) || m.gets.Load() != 1 {
			t.Errorf("got %v after %d requests, want the store's error after 1", err, m.gets.Load())
		}
		wantPlain(t, f, within(t, time.Minute), 0) // it is not remembered either
	})
}

func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("a", good...)
		m.set(func(_ context.Context, n int64) error {
			if n == 1 {
				return fmt.Errorf("get: %w", tooMany{17 * time.Second})
			}
			return nil
		})
		start := time.Now()
		wantPlain(t, fetcher(t, nil, m), within(t, time.Minute), 0)
		if took := time.Since(start); took != 17*time.Second || m.gets.Load() != 2 {
			t.Errorf("got %d requests in %v, want 2 in 17 s", m.gets.Load(), took)
		}
	})
}

// TestRetryAfterTooLong: a store that says to come back in an hour, and
// recovers after twenty seconds.
func TestRetryAfterTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		m := newMemory("a", good...)
		m.set(func(_ context.Context, n int64) error {
			if time.Since(start) < 20*time.Second {
				return fmt.Errorf("get: %w", tooMany{time.Hour})
			}
			return nil
		})
		wantPlain(t, fetcher(t, nil, m), within(t, time.Minute), 0)
		if took := time.Since(start); took != 30*time.Second || m.gets.Load() != 2 {
			t.Errorf("got %d requests in %v, want 2 in half of a minute", m.gets.Load(), took)
		}
	})
}

func TestInvalidSize(t *testing.T) {
	f := fetcher(t, nil, newMemory("a", good...))
	for _, n := range []int{-1, 0, 1 << 40} {
		c := index.Chunk{ID: chunks[0].ID, Size: n}
		if _, err := f.Fetch(t.Context(), c, nil); err == nil {
			t.Errorf("Fetch, %d bytes: got no error", n)
		}
		if err := f.FetchBatch(t.Context(), []index.Chunk{c}, func(int, []byte) error { return nil }); err == nil {
			t.Errorf("FetchBatch, %d bytes: got no error", n)
		}
	}
}

// fetchAll fetches cs as a batch and checks what arrives. It returns the places
// in the order of their arrival.
func fetchAll(t *testing.T, f *Fetcher, cs []index.Chunk) ([]int, error) {
	t.Helper()
	var (
		order  []int
		inside atomic.Bool
	)
	err := f.FetchBatch(within(t, time.Minute), cs, func(i int, plain []byte) error {
		if inside.Swap(true) {
			t.Error("two calls of yield at a time")
		}
		defer inside.Store(false)
		if slices.Contains(order, i) {
			t.Errorf("place %d: delivered twice", i)
		}
		if index.SHA256.Sum(plain) != cs[i].ID {
			t.Errorf("place %d: got other bytes", i)
		}
		order = append(order, i)
		return nil
	})
	return order, err
}

func TestFetchBatch(t *testing.T) {
	for _, kind := range []string{"single", "batching"} {
		for _, n := range []int{0, 1, 2, len(chunks)} {
			for cached := range 3 {
				synctest.Test(t, func(t *testing.T) {
					cache, m := newMemory("cache"), newMemory("store", good...)
					var store Store = m
					b := &batching{memory: m}
					if kind == "batching" {
						store = b
					}
					for i := range min(cached, n) {
						cache.frames[chunks[n-1-i].ID] = good[n-1-i]
					}
					f := fetcher(t, cache, store)
					order, err := fetchAll(t, f, chunks[:n])
					if err != nil || len(order) != n {
						t.Errorf("%s, %d with %d cached: got %d, %v", kind, n, cached, len(order), err)
					}
					for i := range min(cached, n) {
						if order[i] < n-cached {
							t.Errorf("%s, %d with %d cached: got order %v, want the cached ones first", kind, n, cached, order)
						}
					}
					missing := int64(n - min(cached, n))
					if kind == "batching" && missing > 1 {
						if m.gets.Load() != 0 || b.batches.Load() != 1 {
							t.Errorf("%d: got %d requests and %d batches, want one batch", n, m.gets.Load(), b.batches.Load())
						}
					} else if m.gets.Load() != missing {
						t.Errorf("%s, %d: got %d requests, want %d", kind, n, m.gets.Load(), missing)
					}
					f.Close()
					if len(cache.frames) != n {
						t.Errorf("%s, %d: got %d chunks in the cache", kind, n, len(cache.frames))
					}
				})
			}
		}
	}
}

func TestFetchBatchTwice(t *testing.T) {
	m := newMemory("store", good...)
	f := fetcher(t, nil, &batching{memory: m})
	cs := []index.Chunk{chunks[0], chunks[1], chunks[0], chunks[0], chunks[1]}
	if order, err := fetchAll(t, f, cs); err != nil || len(order) != len(cs) {
		t.Errorf("got %v, %v, want all 5 places", order, err)
	}
	if n := f.Stats().Stores[0].Chunks; n != 2 {
		t.Errorf("got %d chunks from the store, want 2", n)
	}
}

// TestFetchBatchFaults: a batch ends complete whatever the stores do on the way.
func TestFetchBatchFaults(t *testing.T) {
	for _, test := range []struct {
		name  string
		onGet func(context.Context, int64) error
		on    func(ctx context.Context, n int64, at int) error
		max   time.Duration
	}{
		{"breaks off in the middle once", nil, func(_ context.Context, n int64, at int) error {
			if n == 1 && at == 7 {
				return errFault
			}
			return nil
		}, time.Second},
		{"breaks off after each two", nil, func(_ context.Context, n int64, at int) error {
			if at == 2 {
				return errFault
			}
			return nil
		}, 2 * time.Second},
		{"hangs in the middle once", nil, func(ctx context.Context, n int64, at int) error {
			if n == 1 && at == 7 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}, 31 * time.Second},
		{"fails for ten seconds", func(_ context.Context, n int64) error { return nil }, func(_ context.Context, n int64, _ int) error {
			if n < 8 {
				return errFault
			}
			return nil
		}, 15 * time.Second},
		{"answers for one chunk and not for several", nil, func(context.Context, int64, int) error { return errFault }, 15 * time.Second},
		{"is slow but steady", nil, func(ctx context.Context, _ int64, _ int) error {
			select {
			case <-time.After(2 * time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}, 41 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := &batching{memory: newMemory("store", good...), onBatch: test.on}
			b.set(test.onGet)
			start := time.Now()
			order, err := fetchAll(t, fetcher(t, newMemory("cache"), b), chunks)
			if err != nil || len(order) != len(chunks) || time.Since(start) > test.max {
				t.Errorf("%s: got %d of %d chunks, %v in %v, want them within %v", test.name, len(order), len(chunks), err, time.Since(start), test.max)
			}
		})
	}
}

// TestFetchBatchParts: what one store lacks or damages comes from the next, and
// what none has is the error, after everything else.
func TestFetchBatchParts(t *testing.T) {
	for _, kind := range []string{"single", "batching"} {
		synctest.Test(t, func(t *testing.T) {
			a, b := newMemory("a", good...), newMemory("b", good...)
			var stores []Store
			for _, m := range []*memory{a, b} {
				if kind == "batching" {
					stores = append(stores, &batching{memory: m})
				} else {
					stores = append(stores, m)
				}
			}
			delete(a.frames, chunks[3].ID)
			a.corrupt(chunks[5].ID, flip)
			f := fetcher(t, nil, stores...)
			if order, err := fetchAll(t, f, chunks); err != nil || len(order) != len(chunks) {
				t.Errorf("%s: got %d chunks, %v", kind, len(order), err)
			}

			delete(b.frames, chunks[3].ID)
			b.corrupt(chunks[5].ID, flip)
			order, err := fetchAll(t, f, chunks)
			var corrupt *CorruptError
			if len(order) != len(chunks)-2 || !errors.Is(err, ErrNotFound) || !errors.As(err, &corrupt) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: got %d chunks, %v, want all but 2 and both errors", kind, len(order), err)
			}
		})
	}
}

func TestFetchBatchStops(t *testing.T) {
	stop := errors.New("stop")
	for _, kind := range []string{"single", "batching", "cached"} {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory("store", good...)
			f := fetcher(t, nil, m)
			switch kind {
			case "batching":
				f = fetcher(t, nil, &batching{memory: m})
			case "cached":
				f = fetcher(t, m)
			}
			calls := 0
			err := f.FetchBatch(t.Context(), chunks, func(int, []byte) error {
				if calls++; calls == 3 {
					return stop
				}
				return nil
			})
			if err != stop || calls != 3 {
				t.Errorf("%s: got %v after %d calls, want %v after 3", kind, err, calls, stop)
			}
			if st := f.Stats(); len(st.Stores) > 0 && st.Stores[0].Failures != 0 {
				t.Errorf("%s: got %d failures of the store, want 0", kind, st.Stores[0].Failures)
			}
		})
	}
}

// TestEndedContext: what is asked for with an ended context ends at once.
func TestEndedContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f := NewFetcher(FetcherOptions{Cache: newMemory("cache"), Stores: []Store{newMemory("store", good...)}})
		defer f.Close()
		if _, err := f.Fetch(ctx, chunks[0], nil); !errors.Is(err, context.Canceled) {
			t.Errorf("Fetch: got %v, want %v", err, context.Canceled)
		}
		if err := f.FetchBatch(ctx, chunks, func(int, []byte) error { return nil }); !errors.Is(err, context.Canceled) {
			t.Errorf("FetchBatch: got %v, want %v", err, context.Canceled)
		}
	})
}

func TestFetchBatchCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory("store", good...)
		m.set(hanging)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		start := time.Now()
		err := fetcher(t, nil, m).FetchBatch(ctx, chunks, func(int, []byte) error { return nil })
		if !errors.Is(err, context.Canceled) || time.Since(start) != time.Second {
			t.Errorf("got %v after %v, want %v after 1 s", err, time.Since(start), context.Canceled)
		}
		if strings.Contains(err.Error(), "\n") || len(err.Error()) > 500 {
			t.Errorf("got error %q, want one short line", err)
		}
	})
}

// TestFetchConcurrently is for the race detector.
func TestFetchConcurrently(t *testing.T) {
	cache := newMemory("cache")
	a, b := newMemory("a", good...), newMemory("b", good...)
	a.set(func(_ context.Context, n int64) error {
		if n%3 == 0 {
			return errFault
		}
		return nil
	})
	f := fetcher(t, cache, a, &batching{memory: b})
	var g sync.WaitGroup
	for w := range 8 {
		g.Go(func() {
			for n := range 50 {
				if n%10 == 0 {
					if _, err := fetchAll(t, f, chunks); err != nil {
						t.Error(err)
					}
				}
				wantPlain(t, f, t.Context(), (w+n)%len(chunks))
				f.Stats()
			}
		})
	}
	g.Wait()
}

// cachedChunk returns a chunk and a fetcher whose cache has it.
func cachedChunk(t testing.TB) (*Fetcher, index.Chunk) {
	plain := program(t, 64<<10)
	c := chunkOf(index.SHA256, plain)
	cache := newMemory("cache")
	cache.frames[c.ID] = Encode(nil, plain)
	f := NewFetcher(FetcherOptions{Cache: cache})
	t.Cleanup(func() { f.Close() })
	return f, c
}

func TestFetchCachedDoesNotAllocate(t *testing.T) {
	f, c := cachedChunk(t)
	buf := make([]byte, 0, c.Size)
	if n := testing.AllocsPerRun(50, func() {
		var err error
		if buf, err = f.Fetch(t.Context(), c, buf[:0]); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations per chunk of the cache, want 0", n)
	}
}

func BenchmarkFetchCached(b *testing.B) {
	f, c := cachedChunk(b)
	var buf []byte
	b.SetBytes(int64(c.Size))
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if buf, err = f.Fetch(b.Context(), c, buf[:0]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFetchBatchCached(b *testing.B) {
	cache := newMemory("cache")
	var cs []index.Chunk
	all := program(b, 16*64<<10)
	for plain := range slices.Chunk(all, 64<<10) {
		c := chunkOf(index.SHA256, plain)
		cs = append(cs, c)
		cache.frames[c.ID] = Encode(nil, plain)
	}
	f := NewFetcher(FetcherOptions{Cache: cache})
	defer f.Close()
	b.SetBytes(int64(len(all)))
	b.ReportAllocs()
	for b.Loop() {
		if err := f.FetchBatch(b.Context(), cs, func(int, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
