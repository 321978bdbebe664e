package lazy

import (
	"sync/atomic"

	"github.com/container-bootfs/bootfs/index"
)

// Stats is what an Image has done so far, and what it has in memory now.
type Stats struct {
	Reads    int64 // calls of ReadAt
	Failed   int64 // those of them that ended with an error, but for readers that gave up
	Hits     int64 // chunks of reads that were in memory
	HitBytes int64 // of them, as read

	Chunks  int // in memory
	Bytes   int // of them
	Waiting int // reads that wait for a chunk
}

// counters are the part of Stats that only grows.
type counters struct {
	reads, failed, hits, hitBytes atomic.Int64
}

// Stats returns the counters. They are not of one moment.
func (m *Image) Stats() Stats {
	m.mu.Lock()
	s := Stats{Chunks: len(m.recent.byID), Bytes: m.recent.size, Waiting: m.readers}
	m.mu.Unlock()
	s.Reads, s.Failed = m.count.reads.Load(), m.count.failed.Load()
	s.Hits, s.HitBytes = m.count.hits.Load(), m.count.hitBytes.Load()
	return s
}

// InMemory returns the chunks that are in memory now.
func (m *Image) InMemory() map[index.ID]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	ids := make(map[index.ID]bool, len(m.recent.byID))
	for id := range m.recent.byID {
		ids[id] = true
	}
	return ids
}
