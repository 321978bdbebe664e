package lazy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
)

// fakeFetcher holds chunks and counts what is asked of it. before, if set, is
// called for each chunk and may wait or fail.
type fakeFetcher struct {
	chunks map[index.ID][]byte
	before func(ctx context.Context, c index.Chunk) error
	// inOrder says that batches come in the order in which they were asked for.
	inOrder bool

	fetched atomic.Int64 // chunks delivered
	single  atomic.Int64 // calls of Fetch
	batches atomic.Int64 // calls of FetchBatch
}

func (f *fakeFetcher) get(ctx context.Context, c index.Chunk) ([]byte, error) {
	if f.before != nil {
		if err := f.before(ctx, c); err != nil {
			return nil, err
		}
	}
	plain, ok := f.chunks[c.ID]
	if !ok {
		return nil, fmt.Errorf("chunk %s: not found", c.ID)
	}
	f.fetched.Add(1)
	return plain, nil
}

func (f *fakeFetcher) Fetch(ctx context.Context, c index.Chunk, dst []byte) ([]byte, error) {
	f.single.Add(1)
	plain, err := f.get(ctx, c)
	if err != nil {
		return nil, err
	}
	return append(dst, plain...), nil
}

func (f *fakeFetcher) FetchBatch(ctx context.Context, cs []index.Chunk, yield func(i int, plain []byte) error) error {
	f.batches.Add(1)
	order := rand.Perm(len(cs)) // "in any order"
	if f.inOrder {
		slices.Sort(order)
	}
	for _, i := range order {
		plain, err := f.get(ctx, cs[i])
		if err != nil {
			return err
		}
		lent := bytes.Clone(plain)
		if err := yield(i, lent); err != nil {
			return err
		}
		clear(lent) // "valid until yield returns"
	}
	return nil
}

var sizes = chunker.Params{Min: 1, Avg: 4 << 10, Max: 64 << 10}

// testImage makes an image of chunks with the given sizes; a negative size
// repeats the chunk before it.
func testImage(t testing.TB, chunkSizes []int) (*index.Index, *fakeFetcher, []byte) {
	t.Helper()
	rng := rand.NewChaCha8([32]byte{1})
	f := &fakeFetcher{chunks: make(map[index.ID][]byte)}
	var (
		xb    bytes.Buffer
		image []byte
		plain []byte
	)
	w := index.NewWriter(&xb, sizes, index.SHA256)
	for _, n := range chunkSizes {
		if n >= 0 {
			plain = make([]byte, n)
			_, _ = rng.Read(plain)
		}
		id := index.SHA256.Sum(plain)
		f.chunks[id] = plain
		image = append(image, plain...)
		if err := w.Append(id, len(plain)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	x, err := index.Open(xb.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return x, f, image
}

func upTo(n int) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

func TestReadAt(t *testing.T) {
	x, f, want := testImage(t, []int{1, 4096, 1, 1, 65536, -1, 3, 10000, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4095})
	for _, memory := range []int{0, 1, 70000} { // everything, nothing, one large chunk
		m := New(x, f, Options{Memory: memory})
		var offs []int64
		for i := range x.Len() {
			c, err := x.At(i)
			if err != nil {
				t.Fatal(err)
			}
			offs = append(offs, c.Offset-1, c.Offset, c.Offset+1)
		}
		offs = append(offs, x.Size()-1, x.Size())
		for _, from := range offs[1:] {
			for _, to := range offs[1:] {
				if from > to {
					continue
				}
				p := make([]byte, to-from)
				n, err := m.ReadAt(t.Context(), p, from)
				if err != nil || n != len(p) || !bytes.Equal(p, want[from:to]) {
					t.Fatalf("memory %d: ReadAt %d to %d: got %d bytes, error %v, equal %v",
						memory, from, to, n, err, bytes.Equal(p, want[from:to]))
				}
			}
		}
		m.idle(t)
	}
}

// idle fails the test if anything is left under way.
func (m *Image) idle(t *testing.T) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.flights) != 0 || m.readers != 0 {
		t.Errorf("got %d flights and %d readers left, want none", len(m.flights), m.readers)
	}
}

func TestReadOutside(t *testing.T) {
	x, f, _ := testImage(t, []int{100, 100})
	m := New(x, f, Options{})
	for _, r := range []struct {
		off int64
		n   int
	}{{-1, 1}, {-1, 0}, {200, 1}, {199, 2}, {0, 201}, {1 << 62, 4096}, {-1 << 63, 4096}} {
		if n, err := m.ReadAt(t.Context(), make([]byte, r.n), r.off); n != 0 || err == nil {
			t.Errorf("ReadAt of %d bytes at %d: got %d, %v, want an error", r.n, r.off, n, err)
		}
	}
}

// A damaged index gives errors, never another chunk's bytes nor a panic.
func TestDamagedIndex(t *testing.T) {
	x, f, want := testImage(t, []int{5000, 5000, 5000, 5000, 5000, 5000, 5000})
	var good bytes.Buffer
	w := index.NewWriter(&good, sizes, index.SHA256)
	for i := range x.Len() {
		c, _ := x.At(i)
		_ = w.Append(c.ID, c.Size)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		b := bytes.Clone(good.Bytes())
		b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
		x, err := index.Open(b)
		if err != nil {
			continue
		}
		m := New(x, f, Options{})
		off := rng.Int64N(int64(len(want)) - 8000)
		p := make([]byte, 8000)
		if n, err := m.ReadAt(t.Context(), p, off); err == nil && (n != len(p) || !bytes.Equal(p, want[off:off+8000])) {
			t.Fatal("got wrong bytes from a damaged index")
		}
		m.idle(t)
	}
}

func TestWrongLength(t *testing.T) {
	x, f, _ := testImage(t, []int{100, 100})
	for id, plain := range f.chunks {
		f.chunks[id] = plain[:99]
	}
	m := New(x, f, Options{})
	if _, err := m.ReadAt(t.Context(), make([]byte, 200), 0); err == nil || !strings.Contains(err.Error(), "got 99 bytes, want 100") {
		t.Errorf("got error %v, want one of the length", err)
	}
}

func TestOneFetchForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, want := testImage(t, slices.Repeat([]int{3000}, 50))
		f.before = func(ctx context.Context, c index.Chunk) error { time.Sleep(10 * time.Millisecond); return nil }
		m := New(x, f, Options{})
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				off := int64(i % 40 * 3000)
				p := make([]byte, 9000)
				if _, err := m.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, want[off:off+9000]) {
					t.Errorf("read at %d: %v", off, err)
				}
			})
		}
		wg.Wait()
		if got := f.fetched.Load(); got != 42 {
			t.Errorf("got %d chunks fetched, want 42", got)
		}
		m.idle(t)
	})
}

// TestMemoryBounded reads a start set on its way, in which no more than the recently
// read chunks may stay in memory, and much of a file from a store.
func TestMemoryBounded(t *testing.T) {
	const n, size = 100, 50000
	held := func(m *Image, g *group) (plain int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, f := range g.flights {
			plain += len(f.plain)
		}
		return plain
	}
	synctest.Test(t, func(t *testing.T) {
		x, f, _ := testImage(t, slices.Repeat([]int{size}, n))
		last, err := x.At(n - 1)
		if err != nil {
			t.Fatal(err)
		}
		f.inOrder = true
		f.before = func(_ context.Context, c index.Chunk) error {
			if c == last {
				time.Sleep(time.Minute)
			}
			return nil
		}
		m := New(x, f, Options{Memory: 4 * size})
		var done sync.WaitGroup
		done.Go(func() {
			if err := m.PrefetchStart(t.Context(), upTo(n)); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		m.mu.Lock()
		g := m.flights[last.ID].group
		m.mu.Unlock()
		if got := held(m, g); got > 0 || m.Stats().Bytes > 4*size {
			t.Errorf("while the last chunk is on its way: %d bytes are held beside %d, want 0 beside at most %d", got, m.Stats().Bytes, 4*size)
		}
		var readers sync.WaitGroup
		for range 3 {
			readers.Go(func() {
				if _, err := m.ReadAt(t.Context(), make([]byte, 2*size), last.Offset-size); err != nil {
					t.Error(err)
				}
			})
		}
		readers.Wait()
		done.Wait()
		if got := held(m, g); got > 0 {
			t.Errorf("after the readers: %d bytes are held, want 0", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		m, f, want := aheadImage(t, n)
		groups := make(map[*group]bool)
		arrives := f.before
		f.before = func(ctx context.Context, c index.Chunk) error {
			m.mu.Lock()
			groups[m.flights[c.ID].group] = true
			m.mu.Unlock()
			return arrives(ctx, c)
		}
		for off := 0; off < len(want); off += aheadChunk {
			if _, err := m.ReadFile(t.Context(), make([]byte, 1), int64(off), int64(len(want))); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		timed := 0
		for g := range groups {
			if g.late == nil {
				continue
			}
			if timed++; g.late.Stop() {
				t.Error("a timer keeps chunks that have arrived in memory")
			}
		}
		if timed == 0 {
			t.Error("no chunk was fetched ahead of its reader")
		}
	})
}

// Several missing chunks of one read travel together.
func TestBatch(t *testing.T) {
	x, f, want := testImage(t, slices.Repeat([]int{1000}, 10))
	m := New(x, f, Options{})
	p := make([]byte, 1)
	for range 2 {
		if _, err := m.ReadAt(t.Context(), p, 5500); err != nil {
			t.Fatal(err)
		}
	}
	p = make([]byte, 10000)
	if _, err := m.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatal("read differs", err)
	}
	if f.single.Load() != 1 || f.batches.Load() != 1 || f.fetched.Load() != 10 {
		t.Errorf("got %d single, %d batches, %d chunks, want 1, 1, 10", f.single.Load(), f.batches.Load(), f.fetched.Load())
	}
}

// One bad chunk in a batch is an error for its readers only, and is tried
// again by the next read.
func TestErrorsAreNotRemembered(t *testing.T) {
	x, f, want := testImage(t, slices.Repeat([]int{1000}, 10))
	bad, _ := x.At(4)
	broken := errors.New("pack sha256:00 at 4711: got other bytes")
	var healed atomic.Bool
	f.before = func(ctx context.Context, c index.Chunk) error {
		if c.ID == bad.ID && !healed.Load() {
			return broken
		}
		return nil
	}
	m := New(x, f, Options{})
	if _, err := m.ReadAt(t.Context(), make([]byte, 10000), 0); !errors.Is(err, broken) {
		t.Fatalf("got error %v, want %v", err, broken)
	}
	for _, off := range []int64{0, 3999, 4000, 4999, 5000, 9000} {
		_, err := m.ReadAt(t.Context(), make([]byte, 1), off)
		if isBad := off/1000 == 4; isBad != errors.Is(err, broken) {
			t.Errorf("read at %d: got error %v", off, err)
		}
	}
	healed.Store(true)
	p := make([]byte, 10000)
	if _, err := m.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("after healing: %v", err)
	}
	m.idle(t)
}

// A reader who gives up leaves the fetch to the others; the last one ends it,
// and who comes then starts a new one.
func TestLeaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, want := testImage(t, []int{1000, 1000})
		var hang atomic.Bool
		hang.Store(true)
		f.before = func(ctx context.Context, c index.Chunk) error {
			if !hang.Load() {
				return nil
			}
			<-ctx.Done()
			return fmt.Errorf("dial: connection refused: %w", ctx.Err())
		}
		m := New(x, f, Options{})
		read := func(limit time.Duration) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			start := time.Now()
			_, err := m.ReadAt(ctx, make([]byte, 2000), 0)
			return time.Since(start), err
		}
		var wg sync.WaitGroup
		for _, limit := range []time.Duration{time.Second, 2 * time.Second} {
			wg.Go(func() {
				took, err := read(limit)
				if !errors.Is(err, context.DeadlineExceeded) || took < limit || took > limit+causeWait {
					t.Errorf("limit %v: got %v after %v", limit, err, took)
				}
				if limit == 2*time.Second && !strings.Contains(err.Error(), "connection refused") {
					t.Errorf("the last reader's error lacks the cause: %v", err)
				}
			})
		}
		time.Sleep(1500 * time.Millisecond)
		m.mu.Lock()
		if len(m.flights) != 2 {
			t.Error("the first reader to leave ended the fetch of the second")
		}
		m.mu.Unlock()
		wg.Wait()
		synctest.Wait()
		m.idle(t)

		// One who comes while an abandoned fetch is still ending.
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() { time.Sleep(time.Second); cancel(errors.New("interrupted")) }()
		if _, err := m.ReadAt(ctx, make([]byte, 2000), 0); err == nil || !strings.Contains(err.Error(), "interrupted") {
			t.Errorf("got error %v, want the interrupt", err)
		}
		hang.Store(false)
		p := make([]byte, 2000)
		if _, err := m.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
			t.Errorf("after leaving: %v", err)
		}
		synctest.Wait()
		m.idle(t)
	})
}

// Who joins a fetch has its own time, not that of who started it.
func TestJoinerOutlastsStarter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, want := testImage(t, []int{1000})
		start := time.Now()
		f.before = func(ctx context.Context, c index.Chunk) error {
			if d, ok := ctx.Deadline(); !ok || d.After(time.Now().Add(10*time.Second)) {
				t.Errorf("the fetcher got deadline %v, %v, want that of a reader", d, ok)
			}
			select {
			case <-time.After(time.Until(start.Add(15 * time.Second))): // healed
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		m := New(x, f, Options{})
		var wg sync.WaitGroup
		for _, wait := range []time.Duration{0, 9 * time.Second} {
			wg.Go(func() {
				time.Sleep(wait)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				p := make([]byte, 1000)
				_, err := m.ReadAt(ctx, p, 0)
				if wait == 0 && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("starter: got error %v", err)
				}
				if wait > 0 && (err != nil || !bytes.Equal(p, want)) {
					t.Errorf("joiner: got error %v", err)
				}
			})
		}
		wg.Wait()
		m.idle(t)
	})
}

// TestDeadlineSaysWhy: whichever of two timers rings first, that of the reader
// or that of its flight, the error says what the fetch was failing at.
func TestDeadlineSaysWhy(t *testing.T) {
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			x, f, _ := testImage(t, []int{1000})
			var failing error // of the last attempt
			f.before = func(ctx context.Context, _ index.Chunk) error {
				if ctx.Err() == nil {
					failing = errors.New("connection refused")
				}
				<-ctx.Done()
				return fmt.Errorf("%w; gave up: %w", failing, ctx.Err())
			}
			m := New(x, f, Options{})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := m.ReadAt(ctx, make([]byte, 1), 0)
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connection refused") || f.single.Load() != 1 {
				t.Fatalf("got %v after %d fetches, want the deadline and why, after 1", err, f.single.Load())
			}
		})
	}
}

func TestPrefetchOutlastsOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, _ := testImage(t, slices.Repeat([]int{1000}, 10))
		start := time.Now()
		f.before = func(ctx context.Context, c index.Chunk) error {
			select {
			case <-time.After(time.Until(start.Add(5 * time.Minute))):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		m := New(x, f, Options{})
		if err := m.Prefetch(t.Context(), upTo(x.Len())); err != nil {
			t.Error(err)
		}
		if got := f.fetched.Load(); got != 10 || time.Since(start) != 5*time.Minute {
			t.Errorf("got %d chunks after %v, want 10 after 5m", got, time.Since(start))
		}
		m.idle(t)
	})
}

// A fetcher that ignores its context does not hold a reader up.
func TestDeafFetcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, _ := testImage(t, []int{1000})
		f.before = func(ctx context.Context, c index.Chunk) error { time.Sleep(time.Hour); return nil }
		m := New(x, f, Options{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := m.ReadAt(ctx, make([]byte, 1000), 0)
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took > time.Second+2*causeWait {
			t.Errorf("got %v after %v", err, took)
		}
		time.Sleep(time.Hour) // let it finish
		m.idle(t)
	})
}

func TestMemoryIsBounded(t *testing.T) {
	x, f, want := testImage(t, slices.Repeat([]int{40000}, 100))
	m := New(x, f, Options{Memory: 1 << 20})
	p := make([]byte, 4096)
	for off := int64(0); off+4096 <= x.Size(); off += 4096 {
		if _, err := m.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, want[off:off+4096]) {
			t.Fatal(off, err)
		}
		sum := 0
		for e := m.recent.order.Front(); e != nil; e = e.Next() {
			sum += len(e.Value.(*kept).plain)
		}
		if sum != m.recent.size || sum > 1<<20 || len(m.recent.byID) != m.recent.order.Len() {
			t.Fatalf("kept %d bytes, counted %d, %d names for %d", sum, m.recent.size, len(m.recent.byID), m.recent.order.Len())
		}
	}
	if got := f.fetched.Load(); got != 100 {
		t.Errorf("a sequential read fetched %d chunks, want 100", got)
	}
}

func TestPrefetch(t *testing.T) {
	x, f, want := testImage(t, append(slices.Repeat([]int{50000}, 200), -1, -1))
	m := New(x, f, Options{})
	if _, err := m.ReadAt(t.Context(), make([]byte, 1), 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Prefetch(t.Context(), upTo(x.Len())); err != nil {
		t.Fatal(err)
	}
	if got := f.fetched.Load(); got < 200 || got > 202 { // the repeated chunk may fall into two batches
		t.Errorf("got %d chunks fetched, want 200 or little more", got)
	}
	if got := len(m.recent.byID); got != 1 {
		t.Errorf("prefetch left %d chunks in memory, want the reader's one", got)
	}
	p := make([]byte, 200000)
	if _, err := m.ReadAt(t.Context(), p, 77); err != nil || !bytes.Equal(p, want[77:200077]) {
		t.Fatal("read differs", err)
	}
	m.idle(t)
}

// What a start reads is asked for at once and all together, also while somebody
// waits for another chunk; and who reads one of them waits for that one only.
func TestPrefetchStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, want := testImage(t, slices.Repeat([]int{50000}, 300))
		began := time.Now()
		other, err := x.At(299)
		if err != nil {
			t.Fatal(err)
		}
		f.before = func(ctx context.Context, c index.Chunk) error {
			if c == other {
				time.Sleep(time.Minute)
			} else {
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		}
		m := New(x, f, Options{})
		var readers sync.WaitGroup
		readers.Go(func() {
			if _, err := m.ReadAt(t.Context(), make([]byte, 1), other.Offset); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		readers.Go(func() {
			if err := m.PrefetchStart(t.Context(), upTo(299)); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took != 299*10*time.Millisecond {
				t.Errorf("the start set took %v", took)
			}
		})
		synctest.Wait()
		p := make([]byte, 50000)
		if _, err := m.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want[:50000]) {
			t.Error("read differs", err)
		}
		readers.Wait()
		if got := f.batches.Load(); got != 1 {
			t.Errorf("got %d requests for the start set, want 1", got)
		}
		if got := f.fetched.Load(); got != 300 {
			t.Errorf("got %d chunks fetched, want each of 300 once", got)
		}
		// Of those that came last nothing has to be decoded again, even though the
		// cache has them.
		if _, err := m.ReadAt(t.Context(), p, 298*50000); err != nil || !bytes.Equal(p, want[298*50000:299*50000]) {
			t.Error("read differs", err)
		}
		if got := f.single.Load(); got != 1 || m.recent.size > DefaultMemory {
			t.Errorf("got %d chunks fetched apart and %d bytes in memory, want the other one and at most %d", got, m.recent.size, DefaultMemory)
		}
		m.idle(t)
	})
}

// A reader joins a batch under way, is not hurt when the prefetch is stopped,
// and its chunk counts as read.
// cachingFetcher has some chunks near.
type cachingFetcher struct {
	*fakeFetcher
	near map[index.ID]bool
}

func (f *cachingFetcher) Cached(_ context.Context, c index.Chunk) bool { return f.near[c.ID] }

func TestPrefetchPassesOverWhatIsCached(t *testing.T) {
	x, fake, _ := testImage(t, []int{100, 200, 300})
	f := &cachingFetcher{fakeFetcher: fake, near: map[index.ID]bool{}}
	for _, i := range []int{0, 2} {
		c, err := x.At(i)
		if err != nil {
			t.Fatal(err)
		}
		f.near[c.ID] = true
	}
	if err := New(x, f, Options{}).Prefetch(t.Context(), slices.Values([]int{0, 1, 2})); err != nil {
		t.Fatal(err)
	}
	if n := fake.fetched.Load(); n != 1 {
		t.Errorf("got %d chunks fetched, want the one that is not cached", n)
	}
}

func TestReaderJoinsPrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, want := testImage(t, slices.Repeat([]int{1000}, 20))
		f.before = func(ctx context.Context, c index.Chunk) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		m := New(x, f, Options{})
		ctx, stop := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() { stopped <- m.Prefetch(ctx, upTo(x.Len())) }()
		time.Sleep(500 * time.Millisecond)
		got := make(chan error)
		p := make([]byte, 20000)
		go func() {
			_, err := m.ReadAt(t.Context(), p, 0)
			got <- err
		}()
		time.Sleep(time.Second)
		stop()
		if err := <-stopped; !errors.Is(err, context.Canceled) {
			t.Errorf("prefetch: got %v", err)
		}
		if err := <-got; err != nil || !bytes.Equal(p, want) {
			t.Errorf("reader: %v", err)
		}
		if n := f.fetched.Load(); n != 20 {
			t.Errorf("got %d chunks fetched, want 20", n)
		}
		if len(m.recent.byID) != 20 {
			t.Errorf("got %d chunks in memory, want 20", len(m.recent.byID))
		}
		m.idle(t)
	})
}

func TestPrefetchGoesOn(t *testing.T) {
	x, f, _ := testImage(t, slices.Repeat([]int{60000}, 100))
	bad, _ := x.At(40)
	delete(f.chunks, bad.ID)
	m := New(x, f, Options{})
	err := m.Prefetch(t.Context(), func(yield func(int) bool) {
		_ = yield(-1) && yield(100) && yield(1<<40)
		upTo(x.Len())(yield)
	})
	if err == nil || !strings.Contains(err.Error(), "position -1 of 100") {
		t.Errorf("got error %v, want the first one", err)
	}
	if got := f.fetched.Load(); got != 99 {
		t.Errorf("got %d chunks fetched, want 99", got)
	}
	if err := m.Prefetch(t.Context(), upTo(x.Len())); err == nil || !strings.Contains(err.Error(), bad.ID.String()) {
		t.Errorf("got error %v, want one that names %s", err, bad.ID)
	}
	m.idle(t)
}

// Prefetch gives way to readers that wait, and gets on all the same.
func TestPrefetchYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, f, _ := testImage(t, slices.Repeat([]int{64000}, 101))
		var slow index.Chunk
		slow, _ = x.At(100)
		f.before = func(ctx context.Context, c index.Chunk) error {
			if c.ID == slow.ID {
				time.Sleep(time.Hour)
			}
			return nil
		}
		m := New(x, f, Options{})
		go func() { _, _ = m.ReadAt(t.Context(), make([]byte, 1), slow.Offset) }()
		synctest.Wait()
		start := time.Now()
		if err := m.Prefetch(t.Context(), upTo(100)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < yieldMost || took > 10*yieldMost {
			t.Errorf("prefetch beside a waiting reader took %v, want some times %v", took, yieldMost)
		}
		time.Sleep(time.Hour) // let the reader finish
		m.idle(t)
	})
}

// Everything at once, for the race detector.
func TestStress(t *testing.T) {
	x, f, want := testImage(t, append(slices.Repeat([]int{7000, 300, 50000}, 60), -1, -1))
	var healed atomic.Bool
	f.before = func(ctx context.Context, c index.Chunk) error {
		if healed.Load() {
			return nil
		}
		switch rand.IntN(8) {
		case 0:
			return io.ErrUnexpectedEOF
		case 1:
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Duration(rand.IntN(3)) * time.Millisecond):
			}
		case 2:
			runtime.Gosched()
		}
		return nil
	}
	m := New(x, f, Options{Memory: 300000})
	var good atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 300 {
				off := rand.Int64N(x.Size() - 100000)
				p := make([]byte, rand.IntN(100000))
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(4000))*time.Microsecond)
				if _, err := m.ReadAt(ctx, p, off); err == nil {
					good.Add(1)
					if !bytes.Equal(p, want[off:off+int64(len(p))]) {
						t.Error("wrong bytes")
					}
				}
				cancel()
			}
		})
	}
	wg.Go(func() {
		for range 5 {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			_ = m.Prefetch(ctx, upTo(x.Len()))
			cancel()
		}
	})
	wg.Wait()
	if good.Load() == 0 {
		t.Error("no read succeeded")
	}
	m.idle(t)
	healed.Store(true)
	p := make([]byte, len(want))
	if _, err := m.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
		t.Errorf("after the storm: %v", err)
	}
}

// TestReadAtDoesNotAllocate: what is in memory, which is what most reads of the
// kernel find.
func TestReadAtDoesNotAllocate(t *testing.T) {
	x, f, _ := testImage(t, slices.Repeat([]int{64 << 10}, 4))
	m := New(x, f, Options{Memory: 32 << 20})
	for _, n := range []int64{4 << 10, 128 << 10} {
		p := make([]byte, n)
		if allocs := testing.AllocsPerRun(100, func() {
			if _, err := m.ReadAt(t.Context(), p, 32<<10); err != nil {
				t.Error(err)
			}
		}); allocs != 0 {
			t.Errorf("%d bytes: got %v allocations, want 0", n, allocs)
		}
	}
}

func BenchmarkReadAt(b *testing.B) {
	x, f, _ := testImage(b, slices.Repeat([]int{64 << 10}, 256))
	for _, bench := range []struct {
		name   string
		memory int
		n      int
	}{
		{"kept/4KiB", 32 << 20, 4 << 10},
		{"kept/128KiB", 32 << 20, 128 << 10},
		{"fetched/4KiB", 1, 4 << 10},
		{"fetched/128KiB", 1, 128 << 10},
	} {
		b.Run(bench.name, func(b *testing.B) {
			m := New(x, f, Options{Memory: bench.memory})
			p := make([]byte, bench.n)
			b.SetBytes(int64(bench.n))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := m.ReadAt(b.Context(), p, int64(i)*int64(bench.n)%(x.Size()-int64(bench.n))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
