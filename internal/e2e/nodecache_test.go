package e2e

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// diskUsage is what the files below dir take of the disk, in bytes.
func diskUsage(t *testing.T, dir string) int64 {
	t.Helper()
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // evicted meanwhile
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if info, err := d.Info(); err == nil {
			sum += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return sum
}

// TestSmallCache: containers whose cache may hold a fraction of their image read all
// its files right, twice, and the cache stays within its limit. The short form
// reads a part of the image.
func TestSmallCache(t *testing.T) {
	files, limit := "/usr/lib/python3/dist-packages/numpy/core /usr/bin", int64(4<<20)
	if soak {
		files, limit = "/", 32<<20
	}
	some := "find " + files + ` -xdev \( -path /.bootfs -o -path /etc/hostname -o -path /etc/hosts -o -path /etc/resolv.conf \) -prune -o -type f ! -name .dockerenv -print0 | xargs -0 sha256sum`
	source := sumsOf(docker(t, "run", "--rm", "--user", "root", w.source, "sh", "-c", some).stdout)
	cache := t.TempDir()
	// What a file system says of itself is true at one moment, a walk is not.
	if err := unix.Mount("tmpfs", cache, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(cache, unix.MNT_DETACH)
	used := func() int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(cache, &st); err != nil {
			t.Error(err)
		}
		return int64(st.Blocks-st.Bfree) * st.Bsize
	}
	done := make(chan struct{})
	var most int64
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			most = max(most, used())
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	// The second container has none of the first one's memory.
	for range 2 {
		r := run(t, "--user", "root", "--env", fmt.Sprint("BOOTFS_CACHE_SIZE=", limit), "--env", "BOOTFS_PREFETCH=none", "--volume", cache+":/.bootfs/rootfs.castr", w.image, "sh", "-c", some)
		if r.code != 0 || r.stderr != "" || !maps.Equal(sumsOf(r.stdout), source) || len(source) == 0 {
			t.Errorf("exit %d, %d files, want %d as in the source\n%.2000s", r.code, strings.Count(r.stdout, "\n"), len(source), r.stderr)
		}
	}
	close(done)
	watch.Wait()
	t.Logf("%d files; the cache had at most %.1f %% of its limit, and has %.1f %% now", len(source), 100*float64(most)/float64(limit), 100*float64(used())/float64(limit))
	const marker = 4 << 10
	if most > limit+marker {
		t.Errorf("the cache took %d bytes, want at most %d", most, limit)
	}
	if most < limit/2 {
		t.Errorf("the cache took %d bytes at most, want it to be used", most)
	}
	for _, args := range [][]string{{"cache", "check", "-q", cache}, {"cache", "stats", cache}} {
		out, err := w.command(args...).CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Errorf("%v: %v", args, err)
		}
	}
}

// TestUnknownCache: a cache that another version has written is left alone, with
// a line, and the container runs.
func TestUnknownCache(t *testing.T) {
	cache := t.TempDir()
	if err := os.WriteFile(filepath.Join(cache, ".bootfs-cache"), []byte(`{"version":99}`), 0o644); err != nil {
		t.Fatal(err)
	}
	r := run(t, "--volume", cache+":/.bootfs/rootfs.castr", w.image, "echo", "up")
	if r.code != 0 || r.stdout != "up\n" || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "it is in format 99") {
		t.Errorf("exit %d, stdout %q, stderr %q, want the program to run and one line that names the format", r.code, r.stdout, r.stderr)
	}
	if entries, _ := os.ReadDir(cache); len(entries) != 1 {
		t.Errorf("got %v, want the marker alone", entries)
	}
	for _, setting := range []string{"BOOTFS_CACHE_SIZE=big", "BOOTFS_CACHE_RESERVE=100%"} {
		r := run(t, "--env", setting, w.image, "echo", "up")
		name, _, _ := strings.Cut(setting, "=")
		if r.code != 125 || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, name) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want 125 and one line with the name", setting, r.code, r.stdout, r.stderr)
		}
	}
}

// TestCacheKeeper runs the keeper of samples/cache with Docker: a container that
// takes its volume fills it over the keeper's limit, the keeper evicts, and says
// so in its metrics.
func TestCacheKeeper(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := build(filepath.Join(dir, "bin/bootfs-cache"), "../../cmd/bootfs-cache"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, "bin/bootfs-cache"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the keeper has %.1f MB", float64(info.Size())/1e6)
	if info.Size() > 5e6 {
		t.Errorf("the keeper has %d bytes, want at most 5 MB", info.Size())
	}
	if r := docker(t, "build", "--network=none", "--target=prebuilt", "--file=../../samples/cache/Dockerfile", "--tag=bootfs-cache", dir); r.code != 0 {
		t.Fatalf("docker build: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	address := net.JoinHostPort("127.0.0.1", freePort(t))
	keeper := startWith(t, []string{
		"--network", w.hostNetwork, "--read-only", "--cap-drop", "ALL", "--cap-add", "DAC_OVERRIDE",
		"--env", "BOOTFS_CACHE_SIZE=1MiB", "--env", "BOOTFS_METRICS=" + address,
	}, "bootfs-cache", "--interval", "1s")
	metric := func(name string) string {
		r, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return err.Error()
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil {
			return err.Error()
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, name+" "); ok {
				return strings.TrimSpace(value)
			}
		}
		return ""
	}
	eventually(t, "the keeper looks", func() bool { return metric("bootfs_cache_up") == "1" })
	r := run(t, "--volumes-from", keeper, "--env", "BOOTFS_PREFETCH=none", w.image, "sh", "-c", "cat /usr/lib/python3/dist-packages/numpy/core/*.so | wc -c")
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("exit %d, stderr %q", r.code, r.stderr)
	}
	eventually(t, "the keeper evicts", func() bool {
		n := metric("bootfs_cache_evicted_chunks_total")
		return n != "" && n != "0"
	})
	t.Logf("%s chunks evicted, %s left, which take %s bytes", metric("bootfs_cache_evicted_chunks_total"), metric("bootfs_cache_chunks"), metric("bootfs_cache_bytes"))
	volume := strings.TrimSpace(docker(t, "inspect", "--format", "{{range .Mounts}}{{.Source}}{{end}}", keeper).stdout)
	eventually(t, "the volume is within the limit", func() bool { return diskUsage(t, volume) <= 1<<20 })
	// What is left is whole, and a container without the keeper reads it.
	if out, err := w.command("cache", "check", "-q", volume).CombinedOutput(); err != nil {
		t.Errorf("cache check: %v\n%s", err, out)
	}
	docker(t, "stop", keeper)
	docker(t, "inspect", "--format", "{{.State.ExitCode}}", keeper).want(t, "0\n")
	run(t, "--volumes-from", keeper, w.image, "echo", "up").want(t, "up\n")
}
