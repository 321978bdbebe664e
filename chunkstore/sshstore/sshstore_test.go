package sshstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
)

// TestContract: by SFTP, a store is what every store is, whichever way SFTP
// came to be used.
func TestContract(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, scheme string
		config       []string
	}{
		{"sftp", "sftp", nil},
		{"fallback", "ssh", []string{noCasync}},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := startServer(t, test.config...)
			storetest.Run(t, func() chunkstore.Writer { return server.open(test.scheme, t.TempDir()+"/new/store.castr") })
		})
	}
}

// TestSample: the server of samples/ssh, whose user may nothing but SFTP in a
// directory of his own.
func TestSample(t *testing.T) {
	t.Parallel()
	sample, err := os.ReadFile("../../samples/ssh/sshd_config")
	if err != nil {
		t.Fatal(err)
	}
	// sshd wants every directory above the root to be root's.
	root, err := os.MkdirTemp("/var/lib", "bootfs-sshstore-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, scheme := range []string{"ssh", "sftp"} {
		// The first value counts: these, and for the rest the sample's.
		config := []string{"ChrootDirectory " + root, "AllowUsers root"}
		for line := range strings.Lines(string(sample)) {
			if kind, _, _ := strings.Cut(line, " "); kind != "Port" && kind != "Subsystem" { // of which there may be many, or but one
				config = append(config, strings.TrimSpace(line))
			}
		}
		server := startServer(t, config...)
		st := server.open(scheme, "/"+scheme)
		id, frame := chunk(1, 5000)
		if err := st.Put(t.Context(), id, frame); err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		wantFrame(t, st, id, frame)
		if _, err := os.Stat(filepath.Join(root, scheme)); err != nil {
			t.Error(err)
		}
	}
}

// TestCasyncOnly: a key that the line in samples/ssh lets do nothing but read
// chunks.
func TestCasyncOnly(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../../samples/ssh/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(readme), "\ncommand=")
	options, _, ok := strings.Cut(line, " ssh-ed25519 ")
	if !ok {
		t.Fatalf("no line for authorized_keys in:\n%s", readme)
	}
	server := startServer(t)
	dir := filepath.Join(t.TempDir(), "store.castr")
	ids := fill(t, dir, 20)
	keys := filepath.Join(server.dir, "authorized_keys")
	key, err := os.ReadFile(keys)
	if err != nil {
		t.Fatal(err)
	}
	write(t, keys, "command="+strings.Replace(options, "/srv/chunks", dir, 1)+" "+string(key))
	st := server.open("ssh", dir)
	for i, id := range ids {
		_, want := chunk(i, 3000)
		wantFrame(t, st, id, want)
	}
	absent, frame := chunk(1000, 3000)
	wantMissing(t, st, absent)
	if err := st.Put(t.Context(), absent, frame); err == nil || !strings.Contains(err.Error(), "has no SFTP") {
		t.Errorf("put: got %v, want it refused for want of SFTP", err)
	}
}

// TestCasync: a server with casync is spoken to in its protocol, and what it
// does not do twice is asked of a second one.
func TestCasync(t *testing.T) {
	t.Parallel()
	server := startServer(t, "Subsystem other /bin/false") // sftp stands first; casync must do the reading
	dir := filepath.Join(t.TempDir(), "it's a store")
	ids := fill(t, dir, 200)
	st := server.open("ssh", strings.ReplaceAll(dir, " ", "%20"))
	for range 3 {
		for i, id := range ids[:5] {
			_, want := chunk(i, 3000)
			wantFrame(t, st, id, want)
		}
	}
	absent, frame := chunk(1000, 3000)
	for range 2 {
		wantMissing(t, st, absent)
	}
	if err := st.Put(t.Context(), absent, frame); err != nil {
		t.Fatal(err)
	}
	wantFrame(t, st, absent, frame)

	got := make([]bool, len(ids))
	err := st.GetBatch(t.Context(), ids, func(i int, frame []byte) error {
		if _, want := chunk(i, 3000); got[i] || !bytes.Equal(frame, want) {
			return fmt.Errorf("chunk %d: twice (%v) or with other bytes", i, got[i])
		}
		got[i] = true
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for i, ok := range got {
		if !ok {
			t.Errorf("chunk %d did not come", i)
		}
	}
	missing := 0
	err = st.GetBatch(t.Context(), []index.ID{ids[0], {1}, ids[1]}, func(int, []byte) error { missing++; return nil })
	if !errors.Is(err, chunkstore.ErrNotFound) || missing != 2 {
		t.Errorf("with one missing: got %d chunks, %v, want 2, ErrNotFound", missing, err)
	}

	// The same chunk for many, while others give up.
	var g sync.WaitGroup
	for i := range 64 {
		g.Go(func() {
			ctx := t.Context()
			if i%2 == 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(i)*time.Millisecond/8)
				defer cancel()
			}
			got, err := st.Get(ctx, ids[9], nil)
			if _, want := chunk(9, 3000); err == nil && !bytes.Equal(got, want) || err != nil && ctx.Err() == nil {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
	g.Wait()
	if !st.budget.TryAcquire(budget) {
		t.Error("not all buffers were given back")
	} else {
		st.budget.Release(budget)
	}

	c, _, err := st.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.casync.wait(t.Context()); err != nil {
		t.Errorf("casync was not used: %v", err)
	}
}

func wantFrame(t *testing.T, s chunkstore.Store, id index.ID, want []byte) {
	t.Helper()
	got, err := s.Get(t.Context(), id, []byte("kept"))
	if err != nil || !bytes.Equal(got, append([]byte("kept"), want...)) {
		t.Errorf("Get: got %d bytes, error %v, want %d bytes", len(got), err, len(want)+4)
	}
	if ok, err := s.Has(t.Context(), id); err != nil || !ok {
		t.Errorf("Has: got %v, %v, want true", ok, err)
	}
}

func wantMissing(t *testing.T, s chunkstore.Store, id index.ID) {
	t.Helper()
	if _, err := s.Get(t.Context(), id, nil); !errors.Is(err, chunkstore.ErrNotFound) {
		t.Errorf("Get: got %v, want ErrNotFound", err)
	}
	if ok, err := s.Has(t.Context(), id); err != nil || ok {
		t.Errorf("Has: got %v, %v, want false", ok, err)
	}
}

// TestInFlight: reads do not wait for one another. 1,000 chunks at a round trip
// of 20 ms arrive at ten times the speed of one at a time.
func TestInFlight(t *testing.T) {
	const (
		all   = 1000
		alone = 40
	)
	dir := t.TempDir()
	ids := fill(t, dir, all+2*alone)
	for _, scheme := range []string{"ssh", "sftp"} {
		t.Run(scheme, func(t *testing.T) {
			server := startServer(t)
			slow := startProxy(t, server.addr, 10*time.Millisecond)
			o := server.options()
			o.HostKeys = []string{strings.SplitN(server.hostKey, " ", 2)[1]}
			st := server.openAt(scheme, slow.addr, dir, o)
			if _, err := st.Get(t.Context(), ids[all], nil); err != nil { // connects
				t.Fatal(err)
			}
			start := time.Now()
			for _, id := range ids[all+1 : all+1+alone] {
				if _, err := st.Get(t.Context(), id, nil); err != nil {
					t.Fatal(err)
				}
			}
			one := time.Since(start) / alone

			// What else runs on the machine slows the many reads more than the few,
			// which mostly wait: the fastest of some batches counts.
			batch := time.Hour
			for range 3 {
				start = time.Now()
				n := 0
				if err := st.GetBatch(t.Context(), ids[:all], func(int, []byte) error { n++; return nil }); err != nil || n != all {
					t.Fatalf("got %d chunks, %v", n, err)
				}
				batch = min(batch, time.Since(start)/all)
			}
			t.Logf("one at a time %v a chunk, in a batch %v: %.1f times as fast", one, batch, float64(one)/float64(batch))
			if one < 10*batch {
				t.Errorf("a batch is %.1f times as fast as one at a time, want 10", float64(one)/float64(batch))
			}
		})
	}
}

// TestRestart: a server that was killed is connected to again, and nothing that
// failed meanwhile is remembered.
func TestRestart(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"ssh", "sftp"} {
		t.Run(scheme, func(t *testing.T) {
			server := startServer(t)
			dir := t.TempDir()
			ids := fill(t, dir, 50)
			st := server.open(scheme, dir)
			if _, err := st.Get(t.Context(), ids[0], nil); err != nil {
				t.Fatal(err)
			}
			// Killed and started again before anybody notices.
			server.kill()
			server.start()
			if _, err := st.Get(t.Context(), ids[1], nil); err != nil {
				t.Errorf("after a restart: %v", err)
			}
			// Killed while reads are under way.
			var failures, reads atomic.Int64
			var g sync.WaitGroup
			stop := make(chan struct{})
			for w := range 4 {
				g.Go(func() {
					for i := w; ; i++ {
						select {
						case <-stop:
							return
						default:
						}
						_, err := st.Get(t.Context(), ids[i%len(ids)], nil)
						reads.Add(1)
						if err != nil {
							failures.Add(1)
							wantTemporary(t, err, true)
							time.Sleep(5 * time.Millisecond)
						}
					}
				})
			}
			time.Sleep(50 * time.Millisecond)
			server.kill()
			time.Sleep(50 * time.Millisecond)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			_, err := st.Get(ctx, ids[0], nil)
			cancel()
			if err == nil {
				t.Error("from a server that is not there: got a chunk")
			}
			server.start()
			close(stop)
			g.Wait()
			if _, err := st.Get(t.Context(), ids[0], nil); err != nil {
				t.Errorf("after a second restart: %v", err)
			}
			t.Logf("%d of %d reads failed", failures.Load(), reads.Load())
			if failures.Load() == 0 {
				t.Error("no read failed while the server was away")
			}
		})
	}
}

func wantTemporary(t *testing.T, err error, want bool) {
	t.Helper()
	var e *chunkstore.Error
	if !errors.As(err, &e) || e.Temporary() != want || e.RetryAfter() != 0 {
		t.Errorf("got %v (a %T), want a *chunkstore.Error that is temporary: %v", err, err, want)
	}
}

// TestSilence: a connection on which nothing arrives any more is given up, a
// caller's deadline holds before that, and the next connection works.
func TestSilence(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"ssh", "sftp"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			server := startServer(t)
			p := startProxy(t, server.addr, 0)
			dir := t.TempDir()
			ids := fill(t, dir, 10)
			o := server.options()
			o.HostKeys = []string{strings.SplitN(server.hostKey, " ", 2)[1]}
			o.Stall = 3 * time.Second
			st := server.openAt(scheme, p.addr, dir, o)
			if _, err := st.Get(t.Context(), ids[0], nil); err != nil {
				t.Fatal(err)
			}
			// An idle connection lives on its keepalive.
			before, _, err := st.connect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(o.Stall * 3 / 2)
			if before.ended() {
				t.Errorf("an idle connection ended: %v", before.why())
			}
			p.silence()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err = st.Get(ctx, ids[1], nil)
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want the caller's deadline", err)
			}
			wantTemporary(t, err, true)
			p.mu.Lock()
			old := len(p.conns)
			p.mu.Unlock()
			ctx, cancel = context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			if _, err = st.Get(ctx, ids[2], nil); err != nil {
				t.Errorf("after the silence: %v", err)
			}
			if why := before.why(); why == nil || !strings.Contains(why.Error(), "was silent for") {
				t.Errorf("the connection ended as %v, want its silence", why)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			if len(p.conns) != old+2 {
				t.Errorf("got %d new connections, want one", (len(p.conns)-old)/2)
			}
		})
	}
}

// TestDeadConnection: when the connection has died without a word, as after a sleep
// of the machine, a read does not wait until it is found silent.
func TestDeadConnection(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"ssh", "sftp"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			server := startServer(t)
			p := startProxy(t, server.addr, 0)
			dir := t.TempDir()
			ids := fill(t, dir, 20)
			o := server.options()
			o.HostKeys = []string{strings.SplitN(server.hostKey, " ", 2)[1]}
			o.Stall = 5 * time.Minute
			f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Stores: []chunkstore.Store{server.openAt(scheme, p.addr, dir, o)}})
			defer f.Close()
			for i, id := range ids {
				if i%5 == 4 {
					p.silence()
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				_, err := f.Fetch(ctx, index.Chunk{ID: id, Size: 3000}, nil)
				cancel()
				if err != nil {
					t.Fatalf("chunk %d: %v", i, err)
				}
			}
			if s := f.Stats().Stores[0]; s.Hedges < 4 || s.Failures != 0 {
				t.Errorf("got %+v, want a second request for each of 4 and no failure", s)
			}
		})
	}
}

// TestStuck: a FIFO in a chunk's place makes OpenSSH's SFTP wait for ever. Who
// waits long enough takes it down, and the others go on.
func TestStuck(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	dir := t.TempDir()
	ids := fill(t, dir, 3)
	shard, file := chunkstore.Place(ids[0])
	fifo := filepath.Join(dir, shard, file)
	if err := os.Remove(fifo); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	defer func() { // sshd's process waits on
		if f, err := os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
	}()
	st := server.open("sftp", dir)
	ctx, cancel := context.WithTimeout(t.Context(), stuckAfter+time.Second)
	defer cancel()
	if _, err := st.Get(ctx, ids[0], nil); err == nil {
		t.Error("got a chunk from a FIFO")
	}
	if _, err := st.Get(t.Context(), ids[1], nil); err != nil {
		t.Errorf("the next chunk: %v", err)
	}
}

// TestFetcher: a Fetcher reads from a server again and again, and what the
// server does not have fails at once.
func TestFetcher(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	dir := t.TempDir()
	ids := fill(t, dir, 100)
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Stores: []chunkstore.Store{server.open("ssh", dir)}})
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var chunks []index.Chunk
	for _, id := range ids {
		chunks = append(chunks, index.Chunk{ID: id, Size: 3000})
	}
	for range 2 {
		n := 0
		if err := f.FetchBatch(ctx, chunks, func(int, []byte) error { n++; return nil }); err != nil || n != len(ids) {
			t.Errorf("got %d chunks, %v", n, err)
		}
	}
	if _, err := f.Fetch(ctx, index.Chunk{ID: index.ID{1}, Size: 3000}, nil); !errors.Is(err, chunkstore.ErrNotFound) || ctx.Err() != nil {
		t.Errorf("got %v, want ErrNotFound at once", err)
	}
}

func TestNoDirectory(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	st := server.open("sftp", "/nonexistent/store.castr")
	_, err := st.Get(t.Context(), index.ID{}, nil)
	if !errors.Is(err, chunkstore.ErrNotFound) || !strings.Contains(err.Error(), "/nonexistent/store.castr on the server") {
		t.Errorf("got %v, want ErrNotFound that names the directory", err)
	}
}

func TestAddress(t *testing.T) {
	for _, test := range []struct{ address, host, dir string }{
		{"ssh://u@h/a/b", "h:22", "/a/b"},
		{"sftp://u@h:2222/a//b/", "h:2222", "/a/b"},
		{"ssh://u@[::1]/a", "[::1]:22", "/a"},
		{"ssh://u@h/~/a", "h:22", "./a"},
		{"ssh://h/a%20b", "h:22", "/a b"},
	} {
		a, err := parseAddress(test.address, "default")
		name := strings.Replace(test.address, "//h/", "//default@h/", 1)
		if err != nil || a.host != test.host || a.dir != test.dir || a.String() != name {
			t.Errorf("%s: got %+v, %v, want host %s, directory %s and name %s", test.address, a, err, test.host, test.dir, name)
		}
	}
	for _, bad := range []string{
		"", "ssh:", "ssh://", "ssh://u@h", "ssh://u@h/", "ssh://u@/a", "http://u@h/a", "ssh://u:s3cret@h/a", "ssh://u:s3cret@h:port/a",
		"ssh://u:s3cret@h/%zz", "ssh://u@h/a?b", "ssh://u@h/a#b", "ssh://h/a", "ssh://u@h/a%0ab", "ssh://u@h/~/", "ssh://u:s3cret%zz@h/a",
	} {
		if a, err := parseAddress(bad, ""); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: got %+v, %v, want an error without secrets", bad, a, err)
		}
	}
}

func TestQuote(t *testing.T) {
	if got := quote("it's $(a) path"); got != `'it'\''s $(a) path'` {
		t.Errorf("got %s", got)
	}
}
