package chunkstore

import (
	"sync/atomic"
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
	// LastError is why a chunk could not be had the last time, nil if all could.
	LastError error
}

// CacheStats is what a Fetcher had from its cache and put there.
type CacheStats struct {
	Count         // read and good
	Written int64 // chunks put
	Dropped int64 // chunks not put, as the cache was full or too slow
	Faults  int64 // reads and writes that failed
	Corrupt int64 // chunks that were damaged
}

// Stats is what a Fetcher has done so far.
type Stats struct {
	Cache  CacheStats
	Stores []StoreStats // in the order of FetcherOptions.Stores
}

// Stats returns the counters. Each is exact; they are not of one moment.
func (f *Fetcher) Stats() Stats {
	var st Stats
	if f.cache != nil {
		st.Cache = f.cache.stats()
	}
	for _, s := range f.stores {
		st.Stores = append(st.Stores, StoreStats{
			Name: s.String(), Count: s.count.load(), Failures: s.failures.Load(), Corrupt: s.corrupt.Load(), LastError: s.lastError(),
		})
	}
	return st
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
