package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxScrapers   = 16              // served at a time
	scrapeTimeout = 5 * time.Second // for request and answer
	maxRequest    = 8 << 10         // bytes
)

// metricsAddress is where metrics are served: BOOTFS_METRICS.
type metricsAddress struct {
	network string // "tcp" or "unix"; "" for nowhere
	address string // HOST:PORT, or the path of a socket
}

func parseMetrics(value string) (metricsAddress, error) {
	if value == "" {
		return metricsAddress{}, nil
	}
	if p, ok := strings.CutPrefix(value, "unix:"); ok {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			return metricsAddress{}, fmt.Errorf("BOOTFS_METRICS=%q: want unix: and the absolute path of a socket", value)
		}
		return metricsAddress{"unix", p}, nil
	}
	_, port, err := net.SplitHostPort(value)
	if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 {
		return metricsAddress{}, fmt.Errorf("BOOTFS_METRICS=%q: want [HOST]:PORT or unix:PATH", value)
	}
	return metricsAddress{"tcp", value}, nil
}

// serveMetrics serves what r reports, in the text format of Prometheus, until stop.
func serveMetrics(at metricsAddress, r *reporter) (stop func(), err error) {
	stop = func() {}
	var l net.Listener
	switch at.network {
	case "":
		return stop, nil
	case "tcp":
		l, err = net.Listen("tcp", at.address)
	default:
		l, err = listenInVolume(at.address)
	}
	if err != nil {
		return stop, fmt.Errorf("metrics cannot be served at %s: %w", at.address, err)
	}
	go serveEach(l, maxScrapers, scrapeTimeout, func(conn net.Conn) { scrape(conn, r) })
	return func() { l.Close() }, nil
}

// listenInVolume listens at a socket in a directory that is mounted in the
// container, where others can come to it. No link is followed on the way: who
// can write to the volume could lead it elsewhere.
func listenInVolume(p string) (net.Listener, error) {
	dir, err := unix.Openat2(unix.AT_FDCWD, filepath.Dir(p), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Dir(p), Err: err}
	}
	var root, at unix.Stat_t
	if err := errors.Join(unix.Stat("/", &root), unix.Fstat(dir, &at)); err != nil || root.Dev == at.Dev {
		unix.Close(dir)
		return nil, errors.Join(err, fmt.Errorf("%s is not in a mounted volume", p))
	}
	name := filepath.Base(p)
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		_ = unix.Unlinkat(dir, name, 0) // of a container that was killed
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(byDescriptor(dir), name)})
	if err != nil {
		unix.Close(dir)
		return nil, err
	}
	// The directory is never closed: closing the listener removes the socket there.
	if err := unix.Fchmodat(dir, name, 0o666, 0); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// scrape answers one request. It is HTTP as far as a scraper needs it: the server of
// net/http would add 440 kB to the binary.
func scrape(conn net.Conn, r *reporter) {
	in := bufio.NewReader(io.LimitReader(conn, maxRequest))
	request, err := in.ReadString('\n')
	for line := request; err == nil && strings.TrimRight(line, "\r\n") != ""; {
		line, err = in.ReadString('\n')
	}
	if err != nil {
		return
	}
	method, rest, _ := strings.Cut(request, " ")
	path, _, _ := strings.Cut(rest, " ")
	path, _, _ = strings.Cut(path, "?")
	code, body := "200 OK", &bytes.Buffer{}
	switch {
	case method != "GET" && method != "HEAD":
		code = "405 Method Not Allowed"
	case path != "/metrics":
		code = "404 Not Found"
		body.WriteString("see /metrics\n")
	default:
		r.status().writeMetrics(body)
	}
	fmt.Fprintf(conn, "HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n", code, body.Len())
	if method != "HEAD" {
		_, _ = conn.Write(body.Bytes())
	}
}

// writeMetrics writes the status in the text format of Prometheus.
func (s *status) writeMetrics(w io.Writer) {
	label := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	family := func(name, kind, help string) {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	one := func(name, kind, help string, value float64) {
		family(name, kind, help)
		fmt.Fprintf(w, "%s %s\n", name, strconv.FormatFloat(value, 'g', -1, 64))
	}
	counter := func(name, help string, value int64) { one(name, "counter", help, float64(value)) }
	gauge := func(name, help string, value float64) { one(name, "gauge", help, value) }
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}

	family("bootfs_info", "gauge", "What this container is; always 1.")
	fmt.Fprintf(w, "bootfs_info{mode=\"%s\",state=\"%s\",root=\"%s\",cache=\"%s\"} 1\n", s.Mode, s.State, label.Replace(s.Image.Root), s.Cache.Kind)
	gauge("bootfs_start_time_seconds", "When boot started, since 1970.", float64(s.Started.UnixMilli())/1e3)
	gauge("bootfs_image_chunks", "Chunks of the image.", float64(s.Image.Chunks))
	gauge("bootfs_image_bytes", "Bytes of the image.", float64(s.Image.Bytes))
	if l := s.Local; l != nil {
		gauge("bootfs_local_chunks", "Chunks of the image that are here.", float64(l.Chunks))
		gauge("bootfs_local_bytes", "Bytes of the image that are here.", float64(l.Bytes))
		gauge("bootfs_registry_needed", "Whether a chunk may have to come from a store.", truth(l.RegistryNeeded))
		gauge("bootfs_local_counted_timestamp_seconds", "When that was counted, since 1970.", float64(l.Counted.UnixMilli())/1e3)
	}
	counter("bootfs_reads_total", "Reads of the root.", s.Reads.Total)
	counter("bootfs_reads_failed_total", "Reads that ended with an error.", s.Reads.Failed)
	gauge("bootfs_reads_waiting", "Reads that wait for a chunk.", float64(s.Reads.Waiting))
	counter("bootfs_memory_read_chunks_total", "Chunks of reads that were in memory.", s.Memory.Chunks)
	counter("bootfs_memory_read_bytes_total", "Bytes of reads that were in memory.", s.Memory.Bytes)
	gauge("bootfs_memory_chunks", "Chunks in memory.", float64(s.Memory.KeptChunks))
	gauge("bootfs_memory_bytes", "Bytes of chunks in memory.", float64(s.Memory.KeptBytes))
	gauge("bootfs_cache_limit_bytes", "What the cache may take; 0 is no limit.", float64(s.Cache.LimitBytes))
	counter("bootfs_cache_read_chunks_total", "Chunks that came from the cache.", s.Cache.Chunks)
	counter("bootfs_cache_read_bytes_total", "Bytes that came from the cache.", s.Cache.Bytes)
	counter("bootfs_cache_shared_chunks_total", "Chunks of these that another container was fetching.", s.Cache.Shared)
	counter("bootfs_cache_written_chunks_total", "Chunks that were written to the cache.", s.Cache.Written)
	counter("bootfs_cache_dropped_chunks_total", "Chunks that were not, as it was full or slow.", s.Cache.Dropped)
	counter("bootfs_cache_faults_total", "Reads and writes of the cache that failed.", s.Cache.Faults)
	counter("bootfs_cache_corrupt_chunks_total", "Chunks that were damaged in the cache.", s.Cache.Corrupt)
	stores := func(name, kind, help string, value func(storeStatus) float64) {
		family(name, kind, help)
		for i, store := range s.Stores {
			// Two stores may have one name: the place tells them apart.
			fmt.Fprintf(w, "%s{store=\"%s\",place=\"%d\"} %s\n", name, label.Replace(strings.ToValidUTF8(store.Name, "?")), i, strconv.FormatFloat(value(store), 'g', -1, 64))
		}
	}
	stores("bootfs_store_up", "gauge", "Whether the store answers, as far as is known.", func(s storeStatus) float64 { return truth(s.State == "good") })
	stores("bootfs_store_chunks_total", "counter", "Chunks that came from the store.", func(s storeStatus) float64 { return float64(s.Chunks) })
	stores("bootfs_store_bytes_total", "counter", "Bytes of these chunks.", func(s storeStatus) float64 { return float64(s.Bytes) })
	stores("bootfs_store_stored_bytes_total", "counter", "Bytes of these chunks as they are stored.", func(s storeStatus) float64 { return float64(s.StoredBytes) })
	stores("bootfs_store_failures_total", "counter", "Requests that failed.", func(s storeStatus) float64 { return float64(s.Failures) })
	stores("bootfs_store_corrupt_chunks_total", "counter", "Chunks that came damaged.", func(s storeStatus) float64 { return float64(s.Corrupt) })
	stores("bootfs_store_hedges_total", "counter", "Second requests for a slow chunk.", func(s storeStatus) float64 { return float64(s.Hedges) })
	one("bootfs_fetch_seconds_total", "counter", "Time in which chunks from stores were waited for, of all together.", s.FetchSeconds)
	slowest := 0.0
	if s.Slowest != nil {
		slowest = s.Slowest.Seconds
	}
	gauge("bootfs_slowest_fetch_seconds", "The longest of them.", slowest)
	gauge("go_goroutines", "Goroutines of boot.", float64(s.Process.Goroutines))
	gauge("go_memory_classes_heap_objects_bytes", "Heap of boot.", float64(s.Process.HeapBytes))
	gauge("process_open_fds", "Descriptors of boot.", float64(s.Process.Descriptors))
	gauge("process_resident_memory_bytes", "Resident memory of boot.", float64(s.Process.ResidentBytes))
	gauge("bootfs_process_anonymous_memory_bytes", "Resident memory of boot that is no file's.", float64(s.Process.AnonymousBytes))
	gauge("bootfs_process_threads", "Threads of boot.", float64(s.Process.Threads))
}
