package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/internal/metrics"
)

// state is what the keeper has seen and done. A scrape reads it and does not
// touch the cache.
type state struct {
	mu      sync.Mutex // guards what follows
	limit   int64
	usage   *nodecache.Usage // nil before the first look
	looked  time.Time
	good    bool // the last pass was
	passes  int64
	faults  int64
	skipped int64
	evicted nodecache.Eviction // the sum of all
}

func (s *state) passed(limit int64, e nodecache.Eviction, u *nodecache.Usage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit, s.usage, s.looked, s.good = limit, u, time.Now(), true
	s.passes++
	if e.Skipped {
		s.skipped++
	}
	s.evicted.Chunks += e.Chunks
	s.evicted.Bytes += e.Bytes
	s.evicted.Leftovers += e.Leftovers
}

func (s *state) failed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.good = false
	s.faults++
}

// fill puts the state on a page.
func (s *state) fill(p *metrics.Page) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.Gauge("bootfs_cache_up", "Whether the last look at the cache succeeded.", metrics.Truth(s.good))
	p.Counter("bootfs_cache_passes_total", "Looks at the cache that succeeded.", float64(s.passes))
	p.Counter("bootfs_cache_skipped_passes_total", "Looks at which another process was evicting.", float64(s.skipped))
	p.Counter("bootfs_cache_failed_passes_total", "Looks at the cache that failed.", float64(s.faults))
	p.Counter("bootfs_cache_evicted_chunks_total", "Chunks that this keeper has evicted.", float64(s.evicted.Chunks))
	p.Counter("bootfs_cache_evicted_bytes_total", "Bytes of the disk that these took.", float64(s.evicted.Bytes))
	p.Counter("bootfs_cache_swept_files_total", "Files removed that killed writers had left or that cannot be chunks.", float64(s.evicted.Leftovers))
	if s.usage == nil {
		return
	}
	u := s.usage
	p.Gauge("bootfs_cache_last_look_timestamp_seconds", "When the cache was last looked at.", float64(s.looked.Unix()))
	p.Gauge("bootfs_cache_chunks", "Chunks in the cache, about.", float64(u.Chunks))
	p.Gauge("bootfs_cache_bytes", "Bytes of the disk that the chunks take, about.", float64(u.Bytes))
	p.Gauge("bootfs_cache_other_files", "Files in the place of chunks that are none, or are being written, about.", float64(u.Leftovers))
	p.Gauge("bootfs_cache_limit_bytes", "Bytes that the chunks may take, 0 is any.", float64(s.limit))
	p.Gauge("bootfs_cache_reserve_bytes", "Bytes of the disk that are to stay free.", float64(u.Reserve))
	p.Gauge("bootfs_cache_disk_free_bytes", "Bytes of the disk that are free.", float64(u.DiskFree))
	p.Gauge("bootfs_cache_disk_size_bytes", "Bytes of the disk.", float64(u.DiskSize))
	if u.Chunks > 0 {
		p.Gauge("bootfs_cache_oldest_use_timestamp_seconds", "When the chunk was last used that was not used for the longest time, about.", float64(u.Oldest.Unix()))
	}
	const used = "bootfs_cache_used_bytes"
	p.Family(used, "gauge", "Bytes of the disk that chunks take which were last used within that many seconds, about.")
	var sum int64
	for _, a := range u.Ages {
		within := fmt.Sprint(int64(a.Within.Seconds()))
		if a.Within == 0 {
			within = "+Inf"
		}
		sum += a.Bytes
		p.Sample(used, float64(sum), "within", within)
	}
}
