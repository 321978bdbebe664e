package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bootStatus is what boot tells as JSON, as far as these tests look at it. Its names
// are a promise.
type bootStatus struct {
	Version       int
	State         string
	Mode          string
	Why           string
	Doing         string
	UptimeSeconds float64
	Image         struct {
		Root   string
		Chunks int
		Bytes  int64
	}
	Local *struct {
		Chunks         int
		Bytes          int64
		RegistryNeeded bool
		Counted        time.Time
	}
	Reads  struct{ Total, Failed, Waiting int64 }
	Memory struct{ Chunks, Bytes int64 }
	Cache  struct {
		Kind                             string
		LimitBytes                       int64
		Chunks, Bytes, Written, Corrupt int64
	}
	Stores []struct {
		Name, State, LastError                      string
		Chunks, Bytes, StoredBytes, Failures, Corrupt int64
	}
	SlowestFetch *struct {
		Seconds      float64
		Chunk, Store string
	}
	Prefetch struct{ What, State, Error string }
	Process  struct{ Goroutines, Threads, Descriptors, HeapBytes, ResidentBytes, AnonymousBytes int64 }
}

// statusOf asks the boot of a container. more are flags of docker exec.
func statusOf(t *testing.T, id string, more ...string) *bootStatus {
	t.Helper()
	r := docker(t, append(append([]string{"exec"}, more...), id, "/.bootfs/boot", "status", "--json")...)
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("exit %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
	var s bootStatus
	if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
		t.Fatalf("%v: %s", err, r.stdout)
	}
	if s.Version != 1 {
		t.Errorf("version %d", s.Version)
	}
	return &s
}

// TestStatus follows a container with a cache from its start to the time when it
// needs no registry any more, and back.
func TestStatus(t *testing.T) {
	cache := t.TempDir()
	_, image := fidelityImage(t, "plain")
	id := start(t, "--volume", cache+":/.bootfs/rootfs.castr", "--env", "BOOTFS_PREFETCH=none", "--env", "BOOTFS_CACHE_SIZE=10GiB", image, "sh", "-c", "cat /bin/busybox >/dev/null; exec sleep 600")
	var s *bootStatus
	eventually(t, "the program has read", func() bool {
		s = statusOf(t, id)
		return s.State == "running" && s.Reads.Total > 0 && s.Reads.Waiting == 0 && s.Local != nil
	})
	if s.Mode != "fuse" || s.UptimeSeconds <= 0 || !strings.HasPrefix(s.Image.Root, "sha256:") || s.Image.Chunks == 0 || s.Image.Bytes == 0 {
		t.Errorf("%+v", s)
	}
	if s.Cache.Kind != "shared" || s.Cache.LimitBytes != 10<<30 || s.Prefetch.What != "none" || s.Prefetch.State != "off" {
		t.Errorf("cache %+v, prefetch %+v", s.Cache, s.Prefetch)
	}
	if len(s.Stores) != 1 || s.Stores[0].State != "good" || s.Stores[0].Chunks == 0 || !strings.Contains(s.Stores[0].Name, w.proxy.address) {
		t.Errorf("stores %+v", s.Stores)
	}
	if f := s.SlowestFetch; f == nil || f.Seconds <= 0 || len(f.Chunk) != 64 || f.Store != s.Stores[0].Name {
		t.Errorf("slowest fetch %+v", f)
	}
	if !s.Local.RegistryNeeded || s.Local.Chunks == 0 || s.Local.Chunks >= s.Image.Chunks {
		t.Errorf("local %+v of %+v", s.Local, s.Image)
	}
	if p := s.Process; p.Goroutines == 0 || p.Threads == 0 || p.Descriptors == 0 || p.HeapBytes == 0 || p.AnonymousBytes == 0 || p.ResidentBytes < p.AnonymousBytes {
		t.Errorf("process %+v", p)
	}
	t.Log(docker(t, "exec", id, "/.bootfs/boot", "status").stdout)

	// Another container fills the cache, and the first one knows.
	other := start(t, "--volume", cache+":/.bootfs/rootfs.castr", image, "sleep", "600")
	eventually(t, "all of the image is in the cache", func() bool { return !statusOf(t, other).Local.RegistryNeeded })
	if s := statusOf(t, other); s.Prefetch.What != "all" || s.Prefetch.State != "done" {
		t.Errorf("prefetch %+v", s.Prefetch)
	}
	eventually(t, "the first container knows", func() bool {
		s = statusOf(t, id)
		return !s.Local.RegistryNeeded
	})
	if s.Local.Chunks != s.Image.Chunks || s.Local.Bytes != s.Image.Bytes {
		t.Errorf("local %+v of %+v", s.Local, s.Image)
	}
	human := docker(t, "exec", id, "/.bootfs/boot", "status")
	if lines := strings.Count(human.stdout, "\n"); human.code != 0 || lines > 20 || !strings.Contains(human.stdout, "the registry is no longer needed") {
		t.Errorf("%+v", human)
	}

	// Chunks are evicted by somebody else.
	shards, err := filepath.Glob(filepath.Join(cache, "[0-9a-f][0-9a-f][0-9a-f][0-9a-f]"))
	if err != nil || len(shards) == 0 {
		t.Fatal(err, len(shards))
	}
	for _, shard := range shards[:len(shards)/2] {
		if err := os.RemoveAll(shard); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "an eviction shows", func() bool { return statusOf(t, id).Local.RegistryNeeded })
}

// TestStatusOfTrouble asks a container whose registry fails.
func TestStatusOfTrouble(t *testing.T) {
	id := start(t, "--env", "BOOTFS_PREFETCH=none", w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	release := w.proxy.hold(t)
	go docker(t, "exec", id, "python3", "-c", "import ssl")
	eventually(t, "a read waits", func() bool { return statusOf(t, id).Reads.Waiting > 0 })
	release()
	eventually(t, "none waits", func() bool { return statusOf(t, id).Reads.Waiting == 0 })
}
