package chunkstore

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// Count is a number of chunks and their bytes.
type Count struct {
	Chunks int64
	Stored int64 // bytes as stored
	Plain  int64 // bytes as read
}

// StoreStats is what a Fetcher had from one store.
type StoreStats struct {
	Name     string // Store.String
	Count           // delivered and good
	Failures int64  // requests that failed, ErrNotFound apart
	Corrupt  int64  // chunks that came damaged
	Hedges   int64  // chunks asked for here a second time, as a request for them was slow
	// LastError is why a chunk could not be had the last time, nil if all could.
	LastError error
	LastAt    time.Time // of LastError
	// Trouble is when the last request failed, zero since the store has delivered.
	Trouble time.Time
}

// CacheStats is what a Fetcher had from its cache and put there.
type CacheStats struct {
	Count         // read and good
	Shared  int64 // of these chunks, those that another process was fetching when they were wanted
	Written int64 // chunks put
	Dropped int64 // chunks not put, as the cache was full or too slow
	Faults  int64 // reads and writes that failed
	Corrupt int64 // chunks that were damaged
}

// SlowFetch is the chunk from a store that took longest.
type SlowFetch struct {
	Took  time.Duration // from the request to the verified bytes, with all attempts; 0: there was none
	Chunk index.ID
	Store string    // which delivered it, as Store.String
	At    time.Time // when it came
}

// Stats is what a Fetcher has done so far.
type Stats struct {
	Cache   CacheStats
	Stores  []StoreStats // in the order of FetcherOptions.Stores
	Slowest SlowFetch
	Waited  time.Duration // for all chunks from stores together
}

// Stats returns the counters. Each is exact; they are not of one moment.
func (f *Fetcher) Stats() Stats {
	st := Stats{Slowest: f.slowest.load(), Waited: time.Duration(f.waited.Load())}
	if f.cache != nil {
		st.Cache = f.cache.stats()
	}
	for _, s := range f.stores {
		one := StoreStats{Name: s.String(), Count: s.count.load(), Failures: s.failures.Load(), Corrupt: s.corrupt.Load(), Hedges: s.hedged.Load()}
		one.LastAt, one.Trouble, one.LastError = s.condition()
		st.Stores = append(st.Stores, one)
	}
	return st
}

// slowest keeps the slowest fetch.
type slowest struct {
	mu    sync.Mutex // guards fetch
	fetch SlowFetch
}

func (s *slowest) note(took time.Duration, chunk index.ID, store Store, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if took > s.fetch.Took {
		s.fetch = SlowFetch{took, chunk, store.String(), at}
	}
}

func (s *slowest) load() SlowFetch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fetch
}

// counter is a Count that is counted by many.
type counter struct {
	chunks, stored, plain atomic.Int64
}

func (c *counter) add(stored, plain int) {
	c.chunks.Add(1)
	c.stored.Add(int64(stored))
	c.plain.Add(int64(plain))
}

func (c *counter) load() Count {
	return Count{Chunks: c.chunks.Load(), Stored: c.stored.Load(), Plain: c.plain.Load()}
}
