package lazy

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// callFetcher notes the chunks of each call, by position.
type callFetcher struct {
	*cachingFetcher
	at   map[index.ID]int
	fail error // of each batch

	mu    sync.Mutex // guards calls
	calls [][]int
}

func (f *callFetcher) note(cs ...index.Chunk) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var call []int
	for _, c := range cs {
		call = append(call, f.at[c.ID])
	}
	f.calls = append(f.calls, call)
}

func (f *callFetcher) Fetch(ctx context.Context, c index.Chunk, dst []byte) ([]byte, error) {
	f.note(c)
	return f.fakeFetcher.Fetch(ctx, c, dst)
}

func (f *callFetcher) FetchBatch(ctx context.Context, cs []index.Chunk, yield func(int, []byte) error) error {
	f.note(cs...)
	if f.fail != nil {
		return f.fail
	}
	return f.fakeFetcher.FetchBatch(ctx, cs, yield)
}

// aheadChunk is the size of the chunks of aheadImage.
const aheadChunk = 64 << 10

// aheadImage is an image of n equal chunks, with fetches that take a while.
func aheadImage(t *testing.T, n int) (*Image, *callFetcher, []byte) {
	x, fake, want := testImage(t, slices.Repeat([]int{aheadChunk}, n))
	fake.before = func(ctx context.Context, _ index.Chunk) error {
		time.Sleep(time.Millisecond)
		return ctx.Err()
	}
	f := &callFetcher{cachingFetcher: &cachingFetcher{fake, make(map[index.ID]bool)}, at: make(map[index.ID]int)}
	for i := range n {
		c, err := x.At(i)
		if err != nil {
			t.Fatal(err)
		}
		f.at[c.ID] = i
	}
	return New(x, f, Options{}), f, want
}

// TestReadFileAhead reads files in several ways and counts what is fetched.
func TestReadFileAhead(t *testing.T) {
	const n = 200
	whole := func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
	for name, tt := range map[string]struct {
		end              int // of the file, in chunks
		order            func(yield func(int) bool)
		near             int // chunks up to here are in the cache
		minCall, maxCall int
		maxFetched       int
	}{
		// 5, 5, 9, 17 and from then on 33 chunks.
		"from front to back": {n, whole, 0, 2, 12, n},
		"nothing is known":   {0, whole, 0, n, n, n},
		// What follows is decoded, a MiB at a time at most.
		"from the cache":                 {n, whole, n, 25, 40, n},
		"from the cache, here and there": {n, slices.Values([]int{0, 40, 80, 120, 160}), n, 5, 5, 5},
		"from the cache to its end":      {n, whole, 100, 15, 40, n},
		"the first of a small file": {
			2, slices.Values([]int{0, 1}), 0, 1, 1, 2,
		},
		"the last chunk": {n, slices.Values([]int{n - 1}), 0, 1, 1, 1},
		// 4, 1 and none beside those that are read.
		"here and there": {
			n, slices.Values([]int{0, 40, 80, 120, 160, 20, 60, 100, 140, 180, 30, 70, 110, 150, 190}), 0, 15, 15, 15 + 5,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, f, want := aheadImage(t, n)
				for i := range tt.near {
					c, _ := m.x.At(i)
					f.near[c.ID] = true
				}
				got := make([]byte, 4096)
				for i := range tt.order {
					off := int64(i) * aheadChunk
					if _, err := m.ReadFile(t.Context(), got, off, int64(tt.end)*aheadChunk); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, want[off:off+4096]) {
						t.Fatalf("chunk %d: wrong bytes", i)
					}
					synctest.Wait()
					time.Sleep(time.Second)
				}
				if k := len(f.calls); k < tt.minCall || k > tt.maxCall {
					t.Errorf("got %d fetches, want %d to %d: %v", k, tt.minCall, tt.maxCall, f.calls)
				}
				if k := int(f.fetched.Load()); k > tt.maxFetched {
					t.Errorf("got %d chunks, want at most %d: %v", k, tt.maxFetched, f.calls)
				}
				for _, call := range f.calls {
					if last := slices.Max(call); tt.end > 0 && last >= tt.end {
						t.Errorf("got chunk %d of a file of %d", last, tt.end)
					}
				}
			})
		})
	}
}

// TestReadFileFails has the chunks that nobody waits for fail.
func TestReadFileFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f, want := aheadImage(t, 10)
		f.fail = errors.New("the pack is gone")
		got := make([]byte, aheadChunk)
		if _, err := m.ReadFile(t.Context(), got, 0, int64(len(want))); err != nil || !bytes.Equal(got, want[:len(got)]) {
			t.Fatalf("the chunk that is read: %v", err)
		}
		synctest.Wait()
		if len(m.flights) > 0 || f.single.Load() != 1 {
			t.Errorf("got %d chunks on their way and %d fetched by themselves, want 0 and 1", len(m.flights), f.single.Load())
		}
	})
}

// TestReadFileGivenUp ends readers, and fetches for which nobody waits.
func TestReadFileGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f, want := aheadImage(t, 10)
		var given []error
		f.before = func(ctx context.Context, c index.Chunk) error {
			if f.at[c.ID] == 0 && len(given) > 0 {
				return nil // the second reader's own
			}
			<-ctx.Done()
			given = append(given, ctx.Err())
			return ctx.Err()
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := m.ReadFile(ctx, make([]byte, 1), 0, int64(len(want))); err == nil {
			t.Error("a read that was given up has its bytes")
		}
		synctest.Wait()
		if len(given) == 0 || len(m.flights) > 0 {
			t.Errorf("after the reader left: %d fetches ended, %d chunks on their way", len(given), len(m.flights))
		}

		// The first chunk comes, the others never do.
		began := time.Now()
		f.before = func(ctx context.Context, c index.Chunk) error {
			if f.at[c.ID] == 0 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}
		f.inOrder = true
		if _, err := m.ReadFile(t.Context(), make([]byte, 1), 0, int64(len(want))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(m.flights) == 0 {
			t.Fatal("nothing is fetched ahead")
		}
		time.Sleep(aheadTime)
		synctest.Wait()
		if len(m.flights) > 0 || time.Since(began) > aheadTime {
			t.Errorf("%d chunks are still on their way after %v", len(m.flights), time.Since(began))
		}
	})
}

// TestMakeReady decodes what is about to be read, and a set that is too large not.
func TestMakeReady(t *testing.T) {
	const n = 100
	for name, tt := range map[string]struct{ near, ask, want int }{
		"all are in the cache":         {n, 16, 16},
		"some are in the cache":        {5, 16, 5},
		"none is in the cache":         {0, 16, 0},
		"more than half of the memory": {n, 17, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, f, _ := aheadImage(t, n)
				m.recent.limit = 32 * aheadChunk
				for i := range tt.near {
					c, _ := m.x.At(i)
					f.near[c.ID] = true
				}
				m.MakeReady(upTo(tt.ask))
				synctest.Wait()
				time.Sleep(time.Second)
				if got := m.Stats().Chunks; got != tt.want || int(f.fetched.Load()) != tt.want {
					t.Errorf("got %d chunks in memory, %d fetched, want %d", got, f.fetched.Load(), tt.want)
				}
				m.idle(t)
			})
		})
	}
}
