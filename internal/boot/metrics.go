package boot

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/metrics"
)

// serveMetrics serves what r reports to Prometheus, until stop.
func serveMetrics(at metrics.Address, r *reporter) (stop func(), err error) {
	stop = func() {}
	if at.IsNowhere() {
		return stop, nil
	}
	l, err := at.Listen(inVolume)
	if err != nil {
		return stop, err
	}
	go metrics.Serve(l, func(p *metrics.Page) { r.status().fillPage(p) })
	return func() { l.Close() }, nil
}

// inVolume refuses a directory of the container's own root, where a socket is
// hidden from everybody.
func inVolume(dir int) error {
	var root, at unix.Stat_t
	if err := errors.Join(unix.Stat("/", &root), unix.Fstat(dir, &at)); err != nil {
		return err
	}
	if root.Dev == at.Dev {
		return fmt.Errorf("it is not in a mounted volume")
	}
	return nil
}

// fillPage puts the status on a page.
func (s *status) fillPage(p *metrics.Page) {
	p.Family("bootfs_info", "gauge", "What this container is; always 1.")
	p.Sample("bootfs_info", 1, "mode", s.Mode, "state", s.State, "root", s.Image.Root, "cache", s.Cache.Kind)
	p.Gauge("bootfs_start_time_seconds", "When boot started, since 1970.", float64(s.Started.UnixMilli())/1e3)
	p.Gauge("bootfs_image_chunks", "Chunks of the image.", float64(s.Image.Chunks))
	p.Gauge("bootfs_image_bytes", "Bytes of the image.", float64(s.Image.Bytes))
	if l := s.Local; l != nil {
		p.Gauge("bootfs_local_chunks", "Chunks of the image that are here.", float64(l.Chunks))
		p.Gauge("bootfs_local_bytes", "Bytes of the image that are here.", float64(l.Bytes))
		p.Gauge("bootfs_registry_needed", "Whether a chunk may have to come from a store.", metrics.Truth(l.RegistryNeeded))
		p.Gauge("bootfs_local_counted_timestamp_seconds", "When that was counted, since 1970.", float64(l.Counted.UnixMilli())/1e3)
	}
	p.Counter("bootfs_reads_total", "Reads of the root.", float64(s.Reads.Total))
	p.Counter("bootfs_reads_failed_total", "Reads that ended with an error.", float64(s.Reads.Failed))
	p.Gauge("bootfs_reads_waiting", "Reads that wait for a chunk.", float64(s.Reads.Waiting))
	p.Counter("bootfs_memory_read_chunks_total", "Chunks of reads that were in memory.", float64(s.Memory.Chunks))
	p.Counter("bootfs_memory_read_bytes_total", "Bytes of reads that were in memory.", float64(s.Memory.Bytes))
	p.Gauge("bootfs_memory_chunks", "Chunks in memory.", float64(s.Memory.KeptChunks))
	p.Gauge("bootfs_memory_bytes", "Bytes of chunks in memory.", float64(s.Memory.KeptBytes))
	p.Gauge("bootfs_cache_limit_bytes", "What the cache may take; 0 is no limit.", float64(s.Cache.LimitBytes))
	p.Counter("bootfs_cache_read_chunks_total", "Chunks that came from the cache.", float64(s.Cache.Chunks))
	p.Counter("bootfs_cache_read_bytes_total", "Bytes that came from the cache.", float64(s.Cache.Bytes))
	p.Counter("bootfs_cache_shared_chunks_total", "Chunks of these that another container was fetching.", float64(s.Cache.Shared))
	p.Counter("bootfs_cache_written_chunks_total", "Chunks that were written to the cache.", float64(s.Cache.Written))
	p.Counter("bootfs_cache_dropped_chunks_total", "Chunks that were not, as it was full or slow.", float64(s.Cache.Dropped))
	p.Counter("bootfs_cache_faults_total", "Reads and writes of the cache that failed.", float64(s.Cache.Faults))
	p.Counter("bootfs_cache_corrupt_chunks_total", "Chunks that were damaged in the cache.", float64(s.Cache.Corrupt))
	stores := func(name, kind, help string, value func(storeStatus) float64) {
		p.Family(name, kind, help)
		for i, store := range s.Stores {
			// Two stores may have one name: the place tells them apart.
			p.Sample(name, value(store), "store", store.Name, "place", strconv.Itoa(i))
		}
	}
	stores("bootfs_store_up", "gauge", "Whether the store answers, as far as is known.", func(s storeStatus) float64 { return metrics.Truth(s.State == "good") })
	stores("bootfs_store_chunks_total", "counter", "Chunks that came from the store.", func(s storeStatus) float64 { return float64(s.Chunks) })
	stores("bootfs_store_bytes_total", "counter", "Bytes of these chunks.", func(s storeStatus) float64 { return float64(s.Bytes) })
	stores("bootfs_store_stored_bytes_total", "counter", "Bytes of these chunks as they are stored.", func(s storeStatus) float64 { return float64(s.StoredBytes) })
	stores("bootfs_store_failures_total", "counter", "Requests that failed.", func(s storeStatus) float64 { return float64(s.Failures) })
	stores("bootfs_store_corrupt_chunks_total", "counter", "Chunks that came damaged.", func(s storeStatus) float64 { return float64(s.Corrupt) })
	stores("bootfs_store_hedges_total", "counter", "Second requests for a slow chunk.", func(s storeStatus) float64 { return float64(s.Hedges) })
	p.Counter("bootfs_fetch_seconds_total", "Time in which chunks from stores were waited for, of all together.", s.FetchSeconds)
	slowest := 0.0
	if s.Slowest != nil {
		slowest = s.Slowest.Seconds
	}
	p.Gauge("bootfs_slowest_fetch_seconds", "The longest of them.", slowest)
	p.Gauge("go_goroutines", "Goroutines of boot.", float64(s.Process.Goroutines))
	p.Gauge("go_memory_classes_heap_objects_bytes", "Heap of boot.", float64(s.Process.HeapBytes))
	p.Gauge("process_open_fds", "Descriptors of boot.", float64(s.Process.Descriptors))
	p.Gauge("process_resident_memory_bytes", "Resident memory of boot.", float64(s.Process.ResidentBytes))
	p.Gauge("bootfs_process_anonymous_memory_bytes", "Resident memory of boot that is no file's.", float64(s.Process.AnonymousBytes))
	p.Gauge("bootfs_process_threads", "Threads of boot.", float64(s.Process.Threads))
}
