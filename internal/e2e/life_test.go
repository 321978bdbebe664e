package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// endsWithin is how long a container may take to end once its boot was killed or
// its grace is over. It takes moments, or for as long as reads wait: a minute.
const endsWithin = 30 * time.Second

// ways are the flags of docker run with which a container gets its root.
var ways = []struct {
	name  string
	flags []string
}{
	{"fuse", flags},
	{"fill", fillFlags},
}

// pidOf returns the process of a container that the engine started: boot where
// the root is mounted, the program where it is filled.
func pidOf(t *testing.T, id string) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(docker(t, "inspect", "--format", "{{.State.Pid}}", id).stdout))
	if err != nil || pid == 0 {
		t.Fatalf("container %s has no process: %v", id, err)
	}
	return pid
}

// kill sends a signal to a process of a container, if it is still there.
func kill(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
}

// endsKilled fails the test unless the container ends at once with 137.
func endsKilled(t *testing.T, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), endsWithin)
	defer cancel()
	out, err := w.docker.Command(ctx, "wait", id).CombinedOutput()
	if err != nil || string(out) != "137\n" {
		t.Errorf("docker wait within %v: %q, %v; want 137", endsWithin, out, err)
	}
}

// traces returns what is on this machine of containers: mounts, volumes and
// network namespaces of the engine, loop devices, and processes of the containers
// ids. A FUSE connection and boot's socket live no longer than those: a process
// that waits for either is one that is left.
func traces(t *testing.T, ids []string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	note := func(kind string, names ...string) {
		for _, n := range names {
			found[kind+" "+n] = true
		}
	}
	engine := filepath.Dir(w.docker.Socket)
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], engine) {
			note("mount", f[4])
		}
	}
	note("volume", strings.Fields(docker(t, "volume", "ls", "--quiet").stdout)...)
	for kind, pattern := range map[string]string{
		"loop device":       "/sys/block/loop*/loop/backing_file",
		"network namespace": engine + "/run/netns/*",
	} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		note(kind, names...)
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		// Its container's shim is named after it, and so are its control groups.
		groups, _ := os.ReadFile(p + "/cgroup")
		command, _ := os.ReadFile(p + "/cmdline")
		for _, id := range ids {
			if strings.Contains(string(groups), id) || strings.Contains(string(command), id) {
				note("process", fmt.Sprintf("%s %q", p, command))
			}
		}
	}
	// The engine's handle of the host's network, made for its first container.
	host := engine + "/run/netns/default"
	delete(found, "mount "+host)
	delete(found, "network namespace "+host)
	return found
}

// leavesNothing runs f, which returns the containers that it has started and
// removed, and fails the test if the machine has more traces of containers after.
func leavesNothing(t *testing.T, f func() (ids []string)) {
	t.Helper()
	before := traces(t, nil)
	ids := f()
	var more map[string]bool
	deadline := time.Now().Add(2 * time.Minute)
	for {
		more = traces(t, ids)
		maps.DeleteFunc(more, func(name string, _ bool) bool { return before[name] })
		if len(more) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %q", slices.Sorted(maps.Keys(more)))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// create makes a container.
func create(t *testing.T, args ...string) string {
	t.Helper()
	r := docker(t, append([]string{"create"}, args...)...)
	if r.code != 0 {
		t.Fatalf("docker create: %s", r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

func remove(t *testing.T, id string) {
	t.Helper()
	if r := docker(t, "rm", "--force", "--volumes", id); r.code != 0 {
		t.Errorf("docker rm: %s", r.stderr)
	}
}

// TestStartsAndStops starts ten containers at once and ends each in one of the
// ways that containers end, twice. make soak does it 20 times over: 400 starts in
// each mode.
func TestStartsAndStops(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	ends := []struct {
		name, code string
		do         func(id string, up func())
	}{
		{"stopped", "0", func(id string, _ func()) { docker(t, "stop", "--time", "20", id) }},
		{"killed", "137", func(id string, _ func()) { docker(t, "kill", id) }},
		{"ended by itself", "0", func(id string, _ func()) { docker(t, "exec", id, "kill", "-TERM", "1") }},
		{"killed from outside", "137", func(id string, _ func()) { kill(t, pidOf(t, id), unix.SIGKILL) }},
		{"restarted and stopped", "0", func(id string, up func()) {
			docker(t, "restart", "--time", "20", id)
			up()
			docker(t, "stop", "--time", "20", id)
		}},
	}
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			leavesNothing(t, func() (ids []string) {
				var running sync.WaitGroup
				for i := range 10 {
					id := create(t, slices.Concat(way.flags, []string{"--env", "BOOTFS_PREFETCH=none", image, "testapp", "sleep"})...)
					ids = append(ids, id)
					end := ends[i%len(ends)]
					starts := 0
					up := func() {
						starts++
						eventually(t, "the program is up", func() bool { return strings.Count(docker(t, "logs", id).stdout, "ready\n") == starts })
					}
					running.Go(func() {
						defer remove(t, id)
						for range 2 {
							if r := docker(t, "start", id); r.code != 0 {
								t.Errorf("start: %s", r.stderr)
							}
							up()
							end.do(id, up)
							if got := docker(t, "wait", id).stdout; got != end.code+"\n" {
								t.Errorf("%s: exit %q, want %s", end.name, got, end.code)
							}
						}
					})
				}
				running.Wait()
				return ids
			})
		})
	}
}

// TestKilledBoot kills boot in the middle of all that it does for the app.
func TestKilledBoot(t *testing.T) {
	const (
		// Cold files, each read by a process of its own.
		reads = `for f in $(find /usr/lib/python3/dist-packages -name "*.so" | head -n 20); do cat $f >/dev/null & done; echo up; wait; sleep 600`
		// A library that is mapped and touched over and over.
		maps = `
import glob, mmap
f = open(glob.glob("/usr/lib/python3/dist-packages/numpy/core/*.so")[0], "rb")
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
print("up", flush=True)
while True: sum(m[::4096])`
	)
	for _, c := range []struct {
		name    string
		cut     bool // no chunk comes any more
		command []string
	}{
		{"while nothing happens", false, []string{"sh", "-c", "echo up; sleep 600"}},
		{"while 20 processes read", false, []string{"sh", "-c", reads}},
		{"while 20 processes wait for a network that is dead", true, []string{"sh", "-c", reads}},
		{"while files of the root are mapped", false, []string{"python3", "-c", maps}},
	} {
		t.Run(c.name, func(t *testing.T) {
			leavesNothing(t, func() []string {
				id := create(t, slices.Concat(flags, []string{"--env", "BOOTFS_PREFETCH=start", w.image}, c.command)...)
				defer remove(t, id)
				docker(t, "start", id)
				eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "up\n" })
				if c.cut {
					w.proxy.hold(t)
				}
				kill(t, pidOf(t, id), unix.SIGKILL)
				endsKilled(t, id)
				return []string{id}
			})
		})
	}
}

// TestKilledDuringTheStart kills containers a little later in their start each
// time, in both modes.
func TestKilledDuringTheStart(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			leavesNothing(t, func() (ids []string) {
				for i := range 8 {
					id := create(t, slices.Concat(way.flags, []string{image, "testapp", "sleep"})...)
					ids = append(ids, id)
					docker(t, "start", id)
					time.Sleep(time.Duration(i*5) * time.Millisecond)
					kill(t, pidOf(t, id), unix.SIGKILL)
					endsKilled(t, id)
					ready := func() int { return strings.Count(docker(t, "logs", id).stdout, "ready\n") }
					before := ready()
					// What the killed start has left is no hindrance to the next one.
					docker(t, "start", id)
					eventually(t, "the program is up", func() bool { return ready() > before })
					remove(t, id)
				}
				return ids
			})
		})
	}
}

// TestStoppedBoot stops boot while the app reads, as a debugger or a frozen
// machine does, and lets it go on.
func TestStoppedBoot(t *testing.T) {
	const program = `
import glob, hashlib
for f in sorted(glob.glob("/usr/lib/python3/dist-packages/numpy/**/*.so", recursive=True)):
    print(f, hashlib.sha256(open(f, "rb").read()).hexdigest())`
	want := docker(t, "run", "--rm", "--network", "none", w.source, "python3", "-c", program)
	id := start(t, "--env", "BOOTFS_PREFETCH=none", w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "python3", "-c", "import glob, hashlib").code == 0 })
	pid := pidOf(t, id)
	kill(t, pid, unix.SIGSTOP)
	got := make(chan result)
	go func() { got <- docker(t, "exec", id, "python3", "-c", program) }()
	select {
	case r := <-got:
		t.Errorf("cold files were read while boot stood still: %+v", r)
	case <-time.After(2 * time.Second):
	}
	kill(t, pid, unix.SIGCONT)
	if r := <-got; r != want {
		t.Errorf("got %+v, want %+v", r, want)
	}
}

// TestPauseAndStopWithoutNetwork pauses and stops a container whose reads wait
// for chunks that do not come. The kernel freezes no process that waits for a
// file system, so a pause may be refused then; nothing else comes of it.
func TestPauseAndStopWithoutNetwork(t *testing.T) {
	const first, second = "/usr/bin/perl", "/usr/bin/openssl"
	id := start(t, "--env", "BOOTFS_PREFETCH=none", w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "cat", "/dev/null").code == 0 })
	got := make(chan result, 1)
	read := func(file string) {
		go func() { got <- docker(t, "exec", id, "cat", file) }()
		eventually(t, "the reader waits", func() bool { return strings.Contains(docker(t, "top", id).stdout, "cat "+file) })
	}

	release := w.proxy.hold(t)
	read(first)
	paused := docker(t, "pause", id)
	release()
	if paused.code == 0 {
		docker(t, "unpause", id)
	} else if !strings.Contains(paused.stderr, "unable to freeze") {
		t.Errorf("docker pause: %+v", paused)
	}
	if r := <-got; r != docker(t, "run", "--rm", "--network", "none", w.source, "cat", first) {
		t.Errorf("exit %d, %d bytes, stderr %q", r.code, len(r.stdout), r.stderr)
	}
	for _, step := range []string{"pause", "unpause"} {
		if r := docker(t, step, id); r.code != 0 {
			t.Errorf("docker %s: %s", step, r.stderr)
		}
	}

	w.proxy.hold(t)
	read(second)
	const grace = 1
	began := time.Now()
	docker(t, "stop", "--time", strconv.Itoa(grace), id)
	if took := time.Since(began); took > grace*time.Second+endsWithin {
		t.Errorf("docker stop took %v", took)
	}
	if r := <-got; r.code == 0 {
		t.Errorf("the reader got %d bytes", len(r.stdout))
	}
}
