package e2e

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
)

// A held is a container with BOOTFS_ON_FAILURE=hold, of an image whose store can be
// made to fail.
type held struct {
	*faulty
	id string
}

const (
	holdWaits = "reads wait until the chunks can be had"
	holdAgain = "the chunks come again, reads go on"
)

// begin starts the container.
func (h *held) begin(t *testing.T, flags []string, args ...string) {
	t.Helper()
	hold := []string{"--env", "BOOTFS_ON_FAILURE=hold", "--env", "BOOTFS_READ_TIMEOUT=3s", "--env", "BOOTFS_PREFETCH=none"}
	h.id = startWith(t, append(append([]string{}, flags...), hold...), append([]string{h.image}, args...)...)
}

// run starts the container with a program that is up.
func (h *held) run(t *testing.T) {
	t.Helper()
	h.begin(t, besideFlags(), "sleep")
	eventually(t, "the program is up", func() bool { return docker(t, "logs", h.id).stdout == "ready\n" })
	docker(t, "exec", h.id, "/testapp").want(t, "ok\n") // the engine reads /etc/passwd for it
}

// read reads a file that no start reads.
func (h *held) read(t *testing.T) chan result {
	t.Helper()
	got := make(chan result, 1)
	go func() { got <- docker(t, "exec", h.id, "/testapp", "cat", "/data") }()
	return got
}

func (h *held) log(t *testing.T) string { t.Helper(); return docker(t, "logs", h.id).stderr }

// says waits until boot has said something.
func (h *held) says(t *testing.T, what string) {
	t.Helper()
	eventually(t, what, func() bool { return strings.Contains(h.log(t), what) })
}

// saidOnce fails the test unless boot has said once that it waits, and once that it
// goes on.
func (h *held) saidOnce(t *testing.T) {
	t.Helper()
	if l := h.log(t); strings.Count(l, holdWaits) != 1 || strings.Count(l, holdAgain) != 1 {
		t.Errorf("got log %q, want each said once", l)
	}
}

// TestHold runs containers with BOOTFS_ON_FAILURE=hold before a store that fails:
// reads, the start and a fill wait until it is back, whatever it answers
// meanwhile, and keep neither docker stop nor the end of the program waiting.
func TestHold(t *testing.T) {
	t.Parallel()
	fuse, fill := besideFlags(), []string{"--network", w.hostNetwork, "--env", "BOOTFS_MODE=fill"}
	// What a store that is down answers, and one that has lost its chunks.
	down := faultproxy.Status(http.StatusServiceUnavailable, "")
	lost := faultproxy.Status(http.StatusNotFound, "")

	images := 0
	// test runs f beside the others. Each has a store of its own.
	test := func(name string, f func(t *testing.T, h *held)) {
		images++
		repository := fmt.Sprint("held", images)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, &held{faulty: newFaulty(t, repository)})
		})
	}
	reads := map[string]faultproxy.Fault{"404": lost}
	stopped := map[string][]string{"fuse": fuse}
	if soak {
		reads["503"], reads["wrong bytes"] = down, faultproxy.Flip(40)
		stopped["fill"] = fill
	}
	for name, fault := range reads {
		test("read/"+name, func(t *testing.T, h *held) {
			h.run(t)
			h.proxy.Set(fault)
			got := h.read(t)
			h.says(t, holdWaits)
			select {
			case r := <-got:
				t.Errorf("exit %d, %d bytes, stderr %q; want a read that waits", r.code, len(r.stdout), r.stderr)
			case <-time.After(4 * time.Second): // longer than BOOTFS_READ_TIMEOUT
			}
			h.proxy.Set(nil)
			if r := <-got; r.code != 0 || r.stdout != string(h.data) {
				t.Errorf("exit %d, %d bytes, stderr %q; want the file", r.code, len(r.stdout), r.stderr)
			}
			h.says(t, holdAgain)
			h.saidOnce(t)
		})
	}
	for name, flags := range map[string][]string{"fuse": fuse, "fill": fill} {
		test("start/"+name, func(t *testing.T, h *held) {
			h.proxy.Set(lost)
			h.begin(t, flags)
			h.says(t, holdWaits)
			h.proxy.Set(nil)
			docker(t, "wait", h.id).want(t, "0\n")
			h.saidOnce(t)
			if out := docker(t, "logs", h.id).stdout; out != "ok\n" {
				t.Errorf("got stdout %q", out)
			}
		})
	}
	for name, flags := range stopped {
		test("stop during the start/"+name, func(t *testing.T, h *held) {
			h.proxy.Set(down)
			h.begin(t, flags)
			h.says(t, holdWaits)
			stopsWithin(t, h.id, 60, 40*time.Second, "143\n")
		})
	}
	test("stop during a read", func(t *testing.T, h *held) {
		h.run(t)
		h.proxy.Set(down)
		got := h.read(t)
		h.says(t, holdWaits)
		stopsWithin(t, h.id, 60, 40*time.Second, "0\n") // the program ends by itself
		if r := <-got; r.code == 0 {
			t.Errorf("the reader got %d bytes", len(r.stdout))
		}
	})
	test("stop of a program that reads", func(t *testing.T, h *held) {
		h.proxy.ClearLog()
		runBeside(t, "--env", "BOOTFS_PREFETCH=none", h.image).want(t, "ok\n")
		start := map[string]bool{} // blobs that a start needs
		for _, r := range h.proxy.Log() {
			start[r.Path] = true
		}
		h.proxy.Set(func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
			if start[r.URL.Path] {
				pass.ServeHTTP(w, r)
			} else {
				down(w, r, pass)
			}
		})
		h.begin(t, fuse, "cat", "/data")
		h.says(t, holdWaits)
		stopsWithin(t, h.id, 1, time.Second+endsWithin, "137\n") // as PID 1 that has asked for no signal
	})
	test("kill of a reader", func(t *testing.T, h *held) {
		h.run(t)
		h.proxy.Set(down)
		got := h.read(t)
		h.says(t, holdWaits)
		docker(t, "kill", h.id)
		endsKilled(t, h.id)
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
