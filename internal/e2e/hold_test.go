package e2e

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
)

// TestHold runs containers with BOOTFS_ON_FAILURE=hold before a store that fails:
// reads, the start and a fill wait until it is back, whatever it answers
// meanwhile, and keep neither docker stop nor the end of the program waiting.
func TestHold(t *testing.T) {
	f := newFaulty(t, "held")
	const waits, again = "reads wait until the chunks can be had", "the chunks come again, reads go on"
	hold := []string{"--env", "BOOTFS_ON_FAILURE=hold", "--env", "BOOTFS_READ_TIMEOUT=3s", "--env", "BOOTFS_PREFETCH=none"}
	begin := func(t *testing.T, flags []string, args ...string) string {
		t.Helper()
		return startWith(t, append(append([]string{}, flags...), hold...), append([]string{f.image}, args...)...)
	}
	fillFlags := []string{"--network", "host", "--env", "BOOTFS_MODE=fill"}
	log := func(t *testing.T, id string) string { t.Helper(); return docker(t, "logs", id).stderr }
	said := func(t *testing.T, id, what string) {
		t.Helper()
		within(t, time.Minute, what, func() bool { return strings.Contains(log(t, id), what) })
	}
	// What a store that is down answers, and one that has lost its chunks.
	down := faultproxy.Status(http.StatusServiceUnavailable, "")
	lost := faultproxy.Status(http.StatusNotFound, "")
	running := func(t *testing.T) (id string) {
		t.Helper()
		f.proxy.Set(nil)
		id = begin(t, flags, "sleep")
		eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "ready\n" })
		docker(t, "exec", id, "/testapp").want(t, "ok\n") // the engine reads /etc/passwd for it
		return id
	}
	cat := func(t *testing.T, id string) chan result {
		t.Helper()
		got := make(chan result, 1)
		go func() { got <- docker(t, "exec", id, "/testapp", "cat", "/data") }()
		return got
	}

	reads := map[string]faultproxy.Fault{"404": lost}
	stopped := map[string][]string{"fuse": flags}
	if soak {
		reads["503"], reads["wrong bytes"] = down, faultproxy.Flip(40)
		stopped["fill"] = fillFlags
	}
	for name, fault := range reads {
		t.Run("read/"+name, func(t *testing.T) {
			id := running(t)
			f.proxy.Set(fault)
			got := cat(t, id)
			said(t, id, waits)
			select {
			case r := <-got:
				t.Errorf("exit %d, %d bytes, stderr %q; want a read that waits", r.code, len(r.stdout), r.stderr)
			case <-time.After(4 * time.Second): // longer than BOOTFS_READ_TIMEOUT
			}
			f.proxy.Set(nil)
			if r := <-got; r.code != 0 || r.stdout != string(f.data) {
				t.Errorf("exit %d, %d bytes, stderr %q; want the file", r.code, len(r.stdout), r.stderr)
			}
			said(t, id, again)
			if l := log(t, id); strings.Count(l, waits) != 1 || strings.Count(l, again) != 1 {
				t.Errorf("got log %q, want each said once", l)
			}
		})
	}
	for name, flags := range map[string][]string{"fuse": flags, "fill": fillFlags} {
		t.Run("start/"+name, func(t *testing.T) {
			f.proxy.Set(lost)
			id := begin(t, flags)
			said(t, id, waits)
			f.proxy.Set(nil)
			docker(t, "wait", id).want(t, "0\n")
			if l := docker(t, "logs", id); l.stdout != "ok\n" || strings.Count(l.stderr, waits) != 1 || strings.Count(l.stderr, again) != 1 {
				t.Errorf("got stdout %q, log %q, want each said once", l.stdout, l.stderr)
			}
		})
	}
	for name, flags := range stopped {
		t.Run("stop during the start/"+name, func(t *testing.T) {
			f.proxy.Set(down)
			id := begin(t, flags)
			said(t, id, waits)
			stopsWithin(t, id, 60, 20*time.Second, "143\n")
		})
	}
	t.Run("stop during a read", func(t *testing.T) {
		id := running(t)
		f.proxy.Set(down)
		got := cat(t, id)
		said(t, id, waits)
		stopsWithin(t, id, 60, 20*time.Second, "0\n") // the program ends by itself
		if r := <-got; r.code == 0 {
			t.Errorf("the reader got %d bytes", len(r.stdout))
		}
	})
	t.Run("stop of a program that reads", func(t *testing.T) {
		f.proxy.Set(nil)
		f.proxy.ClearLog()
		run(t, "--env", "BOOTFS_PREFETCH=none", f.image).want(t, "ok\n")
		start := map[string]bool{} // blobs that a start needs
		for _, r := range f.proxy.Log() {
			start[r.Path] = true
		}
		f.proxy.Set(func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
			if start[r.URL.Path] {
				pass.ServeHTTP(w, r)
			} else {
				down(w, r, pass)
			}
		})
		id := begin(t, flags, "cat", "/data")
		said(t, id, waits)
		stopsWithin(t, id, 1, 1*time.Second+endsWithin, "137\n") // as PID 1 that has asked for no signal
	})
	t.Run("kill of a reader", func(t *testing.T) {
		id := running(t)
		f.proxy.Set(down)
		got := cat(t, id)
		said(t, id, waits)
		docker(t, "kill", id)
		endsKilled(t, id)
		<-got
	})
}

// stopsWithin stops a container with that grace period, in seconds, and wants it
// to end in time with that status.
func stopsWithin(t *testing.T, id string, grace int, limit time.Duration, status string) {
	t.Helper()
	began := time.Now()
	if r := docker(t, "stop", "--time", strconv.Itoa(grace), id); r.code != 0 {
		t.Error(r.stderr)
	}
	if took := time.Since(began); took > limit {
		t.Errorf("docker stop took %v, want at most %v", took, limit)
	}
	docker(t, "inspect", "--format", "{{.State.ExitCode}}", id).want(t, status)
}
