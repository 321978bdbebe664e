package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
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

// text is the state in Prometheus' text format.
func (s *state) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	metric := func(name, kind, help string, value any) {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n%s %v\n", name, help, name, kind, name, value)
	}
	up := 0
	if s.good {
		up = 1
	}
	metric("bootfs_cache_up", "gauge", "Whether the last look at the cache succeeded.", up)
	metric("bootfs_cache_passes_total", "counter", "Looks at the cache that succeeded.", s.passes)
	metric("bootfs_cache_skipped_passes_total", "counter", "Looks at which another process was evicting.", s.skipped)
	metric("bootfs_cache_faults_total", "counter", "Looks at the cache that failed.", s.faults)
	metric("bootfs_cache_evicted_chunks_total", "counter", "Chunks that this keeper has evicted.", s.evicted.Chunks)
	metric("bootfs_cache_evicted_bytes_total", "counter", "Bytes of the disk that these took.", s.evicted.Bytes)
	metric("bootfs_cache_swept_files_total", "counter", "Files removed that killed writers had left or that cannot be chunks.", s.evicted.Leftovers)
	if s.usage == nil {
		return b.String()
	}
	u := s.usage
	metric("bootfs_cache_last_look_timestamp_seconds", "gauge", "When the cache was last looked at.", s.looked.Unix())
	metric("bootfs_cache_chunks", "gauge", "Chunks in the cache, about.", u.Chunks)
	metric("bootfs_cache_bytes", "gauge", "Bytes of the disk that the chunks take, about.", u.Bytes)
	metric("bootfs_cache_other_files", "gauge", "Files in the place of chunks that are none, or are being written, about.", u.Leftovers)
	metric("bootfs_cache_limit_bytes", "gauge", "Bytes that the chunks may take, 0 is any.", s.limit)
	metric("bootfs_cache_reserve_bytes", "gauge", "Bytes of the disk that are to stay free.", u.Reserve)
	metric("bootfs_cache_disk_free_bytes", "gauge", "Bytes of the disk that are free.", u.DiskFree)
	metric("bootfs_cache_disk_size_bytes", "gauge", "Bytes of the disk.", u.DiskSize)
	if u.Chunks > 0 {
		metric("bootfs_cache_oldest_use_timestamp_seconds", "gauge", "When the chunk was last used that was not used for the longest time, about.", u.Oldest.Unix())
	}
	const used = "bootfs_cache_used_bytes"
	fmt.Fprintf(&b, "# HELP %s Bytes of the disk that chunks take which were last used within that many seconds, about.\n# TYPE %s gauge\n", used, used)
	var sum int64
	for _, a := range u.Ages {
		within := fmt.Sprint(int64(a.Within.Seconds()))
		if a.Within == 0 {
			within = "+Inf"
		}
		sum += a.Bytes
		fmt.Fprintf(&b, "%s{within=%q} %d\n", used, within, sum)
	}
	return b.String()
}

// What a client of the metrics may take: it shall not be able to do harm.
const (
	maxClients    = 16
	clientTimeout = 3 * time.Second
	maxHeader     = 16 << 10
)

// serveMetrics answers at address, [HOST]:PORT or unix:PATH, until stop.
func serveMetrics(address string, s *state) (stop func(), err error) {
	network, at := "tcp", address
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, at = "unix", path
		// A keeper that was killed has left its socket.
		if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
			os.Remove(path)
		}
	}
	l, err := net.Listen(network, at)
	if err != nil {
		return nil, err
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/metrics" && r.URL.Path != "/" {
				http.NotFound(w, r)
				return
			}
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			fmt.Fprint(w, s.text())
		}),
		ReadTimeout:    clientTimeout,
		WriteTimeout:   clientTimeout,
		IdleTimeout:    clientTimeout,
		MaxHeaderBytes: maxHeader,
	}
	go func() { _ = server.Serve(&limited{Listener: l, room: make(chan struct{}, maxClients)}) }()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); errors.Is(err, context.DeadlineExceeded) {
			server.Close()
		}
	}, nil
}

// limited accepts so many connections at a time; the others wait.
type limited struct {
	net.Listener
	room chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	l.room <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.room
		return nil, err
	}
	return &limitedConn{Conn: c, leave: sync.OnceFunc(func() { <-l.room })}, nil
}

type limitedConn struct {
	net.Conn
	leave func()
}

func (c *limitedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
