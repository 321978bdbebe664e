package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// fill makes a cache of n chunks of 8 KiB, the first of which was used last.
func fill(t *testing.T, n int) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for i := range n {
		id := index.SHA256.Sum([]byte{byte(i)})
		shard, name := chunkstore.Place(id)
		file := filepath.Join(dir, shard, name)
		at := time.Now().Add(-time.Duration(i) * time.Hour)
		for _, err := range []error{os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, make([]byte, 8<<10), 0o644), os.Chtimes(file, at, at)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func chunks(t *testing.T, dir string) int {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "????", "*"+chunkstore.Suffix))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func noEnv(string) string { return "" }

func TestOnce(t *testing.T) {
	dir := fill(t, 100)
	env := map[string]string{"BOOTFS_CACHE_SIZE": "409600", "BOOTFS_CACHE_RESERVE": "0"}
	var out bytes.Buffer
	if code := run(t.Context(), []string{"--once", dir}, func(name string) string { return env[name] }, &out); code != exitOK {
		t.Errorf("got exit code %d\n%s", code, out.String())
	}
	if got := chunks(t, dir); got != 45 {
		t.Errorf("got %d chunks, want 45: nine tenths of what the limit holds", got)
	}
	if !strings.Contains(out.String(), "chunks=55") {
		t.Errorf("got %q, want it to say what was evicted", out.String())
	}
}

func TestUsage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args string
		code int
		want string
	}{
		{"--help", exitOK, "\n  --interval TIME      TIME between two looks at the cache (default 30s)\n"},
		{"--nope", exitUsage, "nope"},
		{"a b", exitUsage, "got 2 arguments"},
		{"--size x " + file, exitUsage, `--size, BOOTFS_CACHE_SIZE: size "x"`},
		{"--reserve x " + file, exitUsage, `--reserve, BOOTFS_CACHE_RESERVE: reserve "x"`},
		{"--interval 1ms " + file, exitUsage, "want 1s or more"},
		{"--once " + file, exitFailed, "not a directory"},
		{"--once " + file + ".none", exitFailed, "no such file"},
		{"--metrics nowhere " + filepath.Dir(file), exitUsage, `--metrics, BOOTFS_METRICS: "nowhere": want [HOST]:PORT`},
		{"--metrics unix:" + file + " " + filepath.Dir(file), exitFailed, "metrics cannot be served at "},
	} {
		var out bytes.Buffer
		code := run(t.Context(), strings.Fields(test.args), noEnv, &out)
		if code != test.code || !strings.Contains(out.String(), test.want) {
			t.Errorf("%s: got exit code %d and %q, want %d and %q", test.args, code, out.String(), test.code, test.want)
		}
	}
}

// TestKeep: the cache is looked at again and again, and its metrics can be read.
func TestKeep(t *testing.T) {
	dir := fill(t, 100)
	socket := filepath.Join(t.TempDir(), "metrics")
	// A keeper that was killed has left its socket.
	old, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false)
	old.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int)
	var out bytes.Buffer
	go func() {
		done <- run(ctx, []string{"--size", "400KiB", "--reserve", "0", "--interval", "1s", "--metrics", "unix:" + socket, dir}, noEnv, &out)
	}()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	scrape := func() string {
		r, err := client.Get("http://keeper/metrics")
		if err != nil {
			return err.Error()
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil {
			return err.Error()
		}
		return string(text)
	}
	eventually := func(want string) string {
		t.Helper()
		var got string
		for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if got = scrape(); strings.Contains(got, want) {
				return got
			}
		}
		t.Fatalf("got %s\nwant it to have %q", got, want)
		return ""
	}
	got := eventually("bootfs_cache_up 1")
	for _, want := range []string{
		"# TYPE bootfs_cache_evicted_chunks_total counter\nbootfs_cache_evicted_chunks_total 55\n",
		fmt.Sprintf("bootfs_cache_evicted_bytes_total %d\n", 55*8<<10), "bootfs_cache_chunks 45\n", "bootfs_cache_limit_bytes 409600\n",
		"bootfs_cache_reserve_bytes 0\n", `bootfs_cache_used_bytes{within="+Inf"} 368640`, "bootfs_cache_disk_size_bytes ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("got %s\nwant it to have %q", got, want)
		}
	}
	// A cache that cannot be kept is said once, and kept when it can be again.
	marker := filepath.Join(dir, ".bootfs-cache")
	if err := os.WriteFile(marker, []byte(`{"version":99}`), 0o644); err != nil {
		t.Fatal(err)
	}
	eventually("bootfs_cache_up 0")
	if err := os.Remove(marker); err != nil {
		t.Fatal(err)
	}
	eventually("bootfs_cache_up 1")
	cancel()
	if code := <-done; code != exitOK {
		t.Errorf("got exit code %d", code)
	}
	if n := strings.Count(out.String(), "format 99"); n != 1 {
		t.Errorf("the format is said %d times, want once:\n%s", n, out.String())
	}
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is left behind")
	}
}
