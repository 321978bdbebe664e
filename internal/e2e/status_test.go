package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
		Kind                                     string
		LimitBytes                               int64
		Chunks, Bytes, Written, Dropped, Corrupt int64
	}
	Stores []struct {
		Name, State, LastError                        string
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
		s = &bootStatus{}
		r := docker(t, "exec", id, "/.bootfs/boot", "status", "--json")
		return r.code == 0 && json.Unmarshal([]byte(r.stdout), s) == nil && s.State == "running" && s.Reads.Total > 0 && s.Reads.Waiting == 0 && s.Local != nil
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
	eventually(t, "all of the image is in the cache", func() bool {
		var s bootStatus
		r := docker(t, "exec", other, "/.bootfs/boot", "status", "--json")
		return r.code == 0 && json.Unmarshal([]byte(r.stdout), &s) == nil && s.Local != nil && !s.Local.RegistryNeeded && s.Prefetch.What == "all" && s.Prefetch.State == "done"
	})
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

// TestStatusInTrouble asks a container whose boot waits for a registry that does
// not answer, while it fills its root and while its program reads, and one whose boot
// is stopped.
func TestStatusInTrouble(t *testing.T) {
	release := w.proxy.hold(t)
	filling := startFilled(t, w.image, "sleep", "600")
	for _, user := range []string{"root", "nobody"} {
		var r result
		eventually(t, "the status can be asked for", func() bool {
			r = docker(t, "exec", "--user", user, filling, "/.bootfs/boot", "status")
			return r.code == 0 && strings.Contains(r.stdout, "starting (fill)") && strings.Contains(r.stdout, "filling the root")
		})
		if !strings.Contains(r.stdout, "store     registry://"+w.proxy.address) {
			t.Errorf("%+v", r)
		}
	}
	docker(t, "kill", filling)
	release()

	id := start(t, "--env", "BOOTFS_PREFETCH=none", w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "python3", "-c", "pass").code == 0 })
	release = w.proxy.hold(t)
	read := make(chan result, 1)
	go func() { read <- docker(t, "exec", id, "python3", "-c", "import ssl, sqlite3, json; print('read')") }()
	eventually(t, "a read waits", func() bool { return statusOf(t, id).Reads.Waiting > 0 })
	release()
	(<-read).want(t, "read\n")
	eventually(t, "none waits", func() bool { return statusOf(t, id).Reads.Waiting == 0 })

	pid, err := strconv.Atoi(strings.TrimSpace(docker(t, "inspect", "--format", "{{.State.Pid}}", id).stdout))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	r := docker(t, "exec", id, "/.bootfs/boot", "status")
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "does not answer within 5s") || strings.Count(r.stderr, "\n") != 1 || took > 2*time.Minute {
		t.Errorf("a boot that is stopped, after %v: %+v", took, r)
	}
	if s := statusOf(t, id); s.State != "running" {
		t.Errorf("a boot that goes on: %+v", s)
	}
}

// TestStatusByMode asks containers of all kinds, as users of all kinds, and gives
// an image's own program of that name its place.
func TestStatusByMode(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	for _, c := range []struct {
		name  string
		flags []string
		mode  string
		why   string
	}{
		{"mounted", flags, "fuse", ""},
		{"asked for", append(slices.Clone(flags), "--env", "BOOTFS_MODE=fuse"), "fuse", "asked for with BOOTFS_MODE"},
		{"read-only", append(slices.Clone(flags), "--read-only"), "fuse", ""},
		{"under an init, of a user", append(slices.Clone(flags), "--init", "--user", "1000"), "fuse", ""},
		{"with the host's processes", append(slices.Clone(flags), "--pid", "host"), "fuse", ""},
		{"filled", []string{"--network", "host", "--env", "BOOTFS_LOG=quiet"}, "fill", "to mount it and start at once"},
		{"filled, under an init, of a user", append(slices.Clone(fillFlags), "--init", "--user", "1000"), "fill", "asked for with BOOTFS_MODE"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := startWith(t, c.flags, "--env", "BOOTFS_PREFETCH=none", image, "sleep", "600")
			state := map[string]string{"fuse": "running", "fill": "filled"}[c.mode]
			var s *bootStatus
			eventually(t, "it runs", func() bool {
				r := docker(t, "exec", id, "/.bootfs/boot", "status", "--json")
				return r.code == 0 && json.Unmarshal([]byte(r.stdout), &s) == nil && s.State == state
			})
			if s.Mode != c.mode || c.why == "" && s.Why != "" || !strings.Contains(s.Why, c.why) {
				t.Errorf("%s because %q, want %s because %q", s.Mode, s.Why, c.mode, c.why)
			}
			if c.mode == "fill" && (s.Local == nil || s.Local.RegistryNeeded || s.Local.Chunks != s.Image.Chunks || s.Stores[0].Chunks == 0) {
				t.Errorf("%+v", s)
			}
			for _, user := range []string{"0", "1000", "12345"} {
				if s := statusOf(t, id, "--user", user, "--workdir", "/"); s.State != state {
					t.Errorf("told user %s: %+v", user, s)
				}
			}
			docker(t, "exec", id, "/.bootfs/boot", "status", "--help").want(t, "usage: /.bootfs/boot status [--json]\n")
			if r := docker(t, "exec", id, "/.bootfs/boot", "status", "--yaml"); r.code != 2 || !strings.Contains(r.stderr, "usage: /.bootfs/boot status [--json]") {
				t.Errorf("%+v", r)
			}
		})
	}

	// A program of the image's that is called status.
	dir := t.TempDir()
	program := filepath.Join(dir, "status")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho the program \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range [][]string{flags, append(slices.Clone(flags), "--init"), fillFlags} {
		args := slices.Concat([]string{"run", "--volume", program + ":/bin/status"}, f, []string{image, "status", "--json"})
		docker(t, append([]string{args[0], "--rm"}, args[1:]...)...).want(t, "the program --json\n")
	}
	id := startFilled(t, "--volume", program+":/bin/status", image, "status")
	docker(t, "wait", id).want(t, "0\n")
	docker(t, "start", "--attach", id).want(t, "the program\n")
}

// TestExecWhileNothingComes: an exec into a container whose root stands and whose
// registry does not answer ends, as the engine's own read of /etc/passwd there does,
// or with the container, which is 137.
func TestExecWhileNothingComes(t *testing.T) {
	const limit = 6 * time.Second
	release := w.proxy.hold(t)
	defer release()
	id := start(t, "--env", "BOOTFS_PREFETCH=none", "--env", "BOOTFS_READ_TIMEOUT="+limit.String(), w.image, "sleep", "600")
	began := time.Now()
	r := docker(t, "exec", id, "true")
	t.Logf("after %v: %+v", time.Since(began), r)
	if took := time.Since(began); r.code == 0 || r.code != 137 && r.stdout+r.stderr == "" || took > limit+2*time.Minute {
		t.Errorf("after %v: %+v, want an error that is told", took, r)
	}
	docker(t, "wait", id).want(t, "125\n")
	if l := docker(t, "logs", id).stderr; !strings.Contains(l, "bootfs: ") || !strings.Contains(l, w.proxy.address) {
		t.Errorf("got %q, want what could not be had", l)
	}
}
