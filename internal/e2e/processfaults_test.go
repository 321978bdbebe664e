package e2e

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// A processFault is what happens to a container while it waits for a chunk.
type processFault struct {
	name, must  string
	flags       []string // of docker run
	readTimeout string   // of boot; "": long enough for a busy machine
	// happen makes it happen, and be over, to containers that wait behind net.
	happen func(t *testing.T, net *network, ids []string)
	// Whether the chunks come, for those who wait, only after it.
	after                 bool
	start, read, prefetch string
}

// What a cell of the table of containers can say.
const (
	ends    = "exit 137; the next start is good"
	noStart = "exit 125 with a line that names the registry; the next start is good"
	eio     = "EIO; data once healed"
	onceMet = "all once healed"
)

// network is the way of containers to a registry: a line that fails, and behind it two
// gates at which their requests for chunks wait.
type network struct {
	line    *faultproxy.TCP
	image   string
	data    []byte // of the file /data, which no start reads
	pack    string // in which it lies
	first   int64  // byte of the pack
	behind  int64
	waiting atomic.Int64

	mu    sync.Mutex // guards what follows
	gates [2]chan struct{}
}

const (
	gateOfData = iota // of requests with bytes of /data
	gateOfRest
)

// newNetwork converts source by way of a new network.
func newNetwork(t *testing.T, source, repository string, data []byte) *network {
	t.Helper()
	n := &network{data: data}
	proxy, err := faultproxy.New("http://" + w.registry.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	if n.line, err = faultproxy.NewTCP(proxy.Addr()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.line.Close)
	n.image = n.line.Addr() + "/" + repository + ":converted"
	if out, err := w.command("--boot", w.boot, source, n.image).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	if r := docker(t, "pull", "--quiet", n.image); r.code != 0 {
		t.Fatal(r.stderr)
	}
	n.find(t)
	proxy.Set(n.pass)
	return n
}

// find finds the bytes of /data in the packs.
func (n *network) find(t *testing.T) {
	t.Helper()
	image, rest := openImage(t, "docker://"+n.image), n.data
	for i := range image.Index.Len() {
		c, err := image.Index.At(i)
		if err != nil {
			t.Fatal(err)
		}
		if int64(c.Size) > int64(len(rest)) || index.ID(sha256.Sum256(rest[:c.Size])) != c.ID {
			continue
		}
		rest = rest[c.Size:]
		at, err := image.Locators.At(i)
		if err != nil {
			t.Fatal(err)
		}
		p, err := image.Locators.Pack(at.Pack)
		if err != nil {
			t.Fatal(err)
		}
		if n.pack == "" {
			n.pack, n.first = p.Digest, at.Offset
		}
		n.behind = at.Offset + int64(at.Length)
	}
	if len(rest) == len(n.data) {
		t.Fatal("/data is in no chunk of its own")
	}
}

// hasData reports whether bytes of /data are asked for.
func (n *network) hasData(r *http.Request) bool {
	if !strings.HasSuffix(r.URL.Path, n.pack) {
		return false
	}
	var from, to int64
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
		return true // the whole pack
	}
	return from < n.behind && to >= n.first
}

// pass lets a request wait at its gate.
func (n *network) pass(w http.ResponseWriter, r *http.Request, pass http.Handler) {
	which := gateOfRest
	if n.hasData(r) {
		which = gateOfData
	}
	n.mu.Lock()
	gate := n.gates[which]
	n.mu.Unlock()
	if gate != nil {
		n.waiting.Add(1)
		select {
		case <-gate:
		case <-r.Context().Done():
			return
		}
	}
	pass.ServeHTTP(w, r)
}

// close closes a gate.
func (n *network) close(gate int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gates[gate] = make(chan struct{})
}

// open opens both gates.
func (n *network) open() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, g := range n.gates {
		if g != nil {
			close(g)
			n.gates[i] = nil
		}
	}
}

// comes waits until one more request waits at a gate than before.
func (n *network) comes(t *testing.T, before int64) {
	t.Helper()
	eventually(t, "a request waits", func() bool { return n.waiting.Load() > before })
}

// gone keeps all that is sent back for d.
func gone(d time.Duration) func(*testing.T, *network, []string) {
	return func(_ *testing.T, n *network, _ []string) {
		n.line.Hold(true)
		time.Sleep(d)
		n.line.Hold(false)
	}
}

// afterSignal sends a signal to the processes of each container, and if that stops
// them lets them go on after d.
func afterSignal(s syscall.Signal, d time.Duration, of func(*testing.T, string) []int) func(*testing.T, *network, []string) {
	return func(t *testing.T, n *network, ids []string) {
		for _, id := range ids {
			for _, pid := range of(t, id) {
				kill(t, pid, s)
				if s == unix.SIGSTOP {
					defer kill(t, pid, unix.SIGCONT)
				}
			}
		}
		time.Sleep(d)
	}
}

func bootPID(t *testing.T, id string) []int { return []int{pidOf(t, id)} }

// appPID returns the process that is PID 1 for the program: the program, or in the
// start what becomes it.
func appPID(t *testing.T, id string) (pids []int) {
	pattern := fmt.Sprintf("/proc/%d/task/*/children", pidOf(t, id)) // each thread has its own
	eventually(t, "boot has begun the program", func() bool {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Error(err)
		}
		for _, file := range files {
			children, _ := os.ReadFile(file) // of a thread that may have ended
			for _, f := range strings.Fields(string(children)) {
				if pid, err := strconv.Atoi(f); err == nil {
					pids = append(pids, pid)
				}
			}
		}
		return len(pids) > 0
	})
	return pids
}

func allPIDs(t *testing.T, id string) []int { return processesOf(t, id, "cgroup") }

// sleepFor is how long a machine sleeps.
func sleepFor() time.Duration {
	if soak {
		return time.Minute
	}
	return 3 * time.Second
}

// processFaults are the rows.
var processFaults = []processFault{
	{name: "the network is gone for 2 s", must: "data", happen: gone(2 * time.Second), start: fine, read: fine, prefetch: all},
	{name: "the network is gone for 12 s", must: "data", happen: gone(12 * time.Second), start: fine, read: fine, prefetch: all},
	{name: "the network is gone for good", must: "an error in time, data once healed", readTimeout: "10s",
		after: true, start: noStart, read: eio, prefetch: onceMet},
	{name: "the machine sleeps, and wakes up with dead connections", must: "data",
		happen: func(t *testing.T, n *network, ids []string) {
			n.line.Deaden()
			afterSignal(unix.SIGSTOP, sleepFor(), allPIDs)(t, n, ids)
		}, start: fine, read: fine, prefetch: all},
	{name: "SIGKILL of boot", must: "the container ends at once, the next start is good", happen: afterSignal(unix.SIGKILL, 0, bootPID), start: ends, read: ends, prefetch: ends},
	{name: "SIGSTOP of boot for 2 s", must: "data", happen: afterSignal(unix.SIGSTOP, 2*time.Second, bootPID), start: fine, read: fine, prefetch: all},
	{name: "SIGKILL of the program", must: "the container ends at once, the next start is good", happen: afterSignal(unix.SIGKILL, 0, appPID), start: ends, read: ends, prefetch: ends},
	{name: "SIGSTOP of the program for 2 s", must: "data", happen: afterSignal(unix.SIGSTOP, 2*time.Second, appPID), start: fine, read: fine, prefetch: all},
	{name: "a process of the program meets the memory limit", must: "data", flags: []string{"--memory", "96m", "--memory-swap", "96m"},
		happen: meetLimit, start: fine, read: fine, prefetch: all},
}

// meetLimit has a process in each container take all memory that this may have, and
// be killed.
func meetLimit(t *testing.T, _ *network, ids []string) {
	for _, id := range ids {
		hog := exec.Command("sh", "-c", `echo $$ >"$1" && exec tail /dev/zero`, "sh", filepath.Join(memoryGroup(t, pidOf(t, id)), "cgroup.procs"))
		err := hog.Run()
		if status, ok := hog.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Errorf("a process that takes all memory ended with %v, want it killed", err)
		}
	}
}

// memoryGroup returns the directory of a process's control group that counts memory.
func memoryGroup(t *testing.T, pid int) string {
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, at := range map[string]string{"memory": "/sys/fs/cgroup/memory", "": "/sys/fs/cgroup"} {
			dir := filepath.Join(at, f[2])
			if _, err := os.Stat(filepath.Join(dir, "memory.events")); err == nil && f[1] == "" {
				return dir
			}
			if _, err := os.Stat(filepath.Join(dir, "memory.limit_in_bytes")); err == nil && f[1] == "memory" {
				return dir
			}
		}
	}
	t.Fatalf("process %d is in no control group that counts memory:\n%s", pid, groups)
	return ""
}

// fate is how the three containers of a row fared.
type fate struct {
	cells [3]string
	wrong []string
}

func (f *fate) bad(format string, args ...any) {
	f.wrong = append(f.wrong, fmt.Sprintf(format, args...))
}

// befall lets the fault happen to three containers, of which one starts, one has a
// reader, and one fetches ahead.
func (p processFault) befall(t *testing.T, n *network) *fate {
	f := &fate{}
	begin := func(prefetch string, args ...string) string {
		id := create(t, slices.Concat(flags, p.flags, []string{
			"--env", "BOOTFS_PREFETCH=" + prefetch, "--env", "BOOTFS_READ_TIMEOUT=" + cmp.Or(p.readTimeout, "5m"), n.image}, args)...)
		if r := docker(t, "start", id); r.code != 0 {
			t.Errorf("docker start: %s", r.stderr)
		}
		return id
	}
	ready := func(id string, times int) {
		eventually(t, "the program is up", func() bool { return strings.Count(docker(t, "logs", id).stdout, "ready\n") == times })
	}
	cat := func(id string) result { return docker(t, "exec", id, "/testapp", "cat", "/data") }
	// again starts a container anew that has ended.
	again := func(id string) {
		if r := docker(t, "start", id); r.code != 0 {
			f.bad("the next start: %s", r.stderr)
			return
		}
		ready(id, 2)
	}
	ended := func(id string) bool {
		var status string
		eventually(t, "the container's end is known", func() bool {
			status = docker(t, "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", id).stdout
			return strings.HasPrefix(status, "running ") || strings.HasPrefix(status, "exited ")
		})
		if strings.HasPrefix(status, "running ") {
			return false
		}
		if status != "exited 137\n" {
			f.bad("the container has %s", status)
		}
		return true
	}

	reading := begin("none", "sleep")
	defer remove(t, reading)
	ready(reading, 1)
	docker(t, "exec", reading, "/testapp").want(t, "ok\n") // the engine reads /etc/passwd for it
	n.close(gateOfData)
	waiting := n.waiting.Load()
	got := make(chan result, 1)
	go func() { got <- cat(reading) }()
	n.comes(t, waiting)
	waiting = n.waiting.Load()
	ahead := begin("all", "sleep")
	defer remove(t, ahead)
	ready(ahead, 1)
	n.comes(t, waiting)
	n.close(gateOfRest)
	waiting = n.waiting.Load()
	starting := begin("none")
	defer remove(t, starting)
	n.comes(t, waiting)

	three := []string{starting, reading, ahead}
	switch {
	case p.after:
		n.line.Hold(true)
		n.open()
	case p.read == ends:
		p.happen(t, n, three) // while all three wait
		n.open()
	default:
		time.AfterFunc(200*time.Millisecond, n.open) // in the midst of it
		p.happen(t, n, three)
	}

	status := strings.TrimSpace(docker(t, "wait", starting).stdout)
	r := <-got
	if !bytes.HasPrefix(n.data, []byte(r.stdout)) {
		f.bad("read: wrong bytes")
	}
	n.line.Hold(false)

	switch log := docker(t, "logs", starting); {
	case status == "0" && log.stdout == "ok\n":
		f.cells[0] = fine
	case status == "125" && !strings.Contains(log.stderr, n.line.Addr()):
		f.bad("start: exit 125, and no line names the registry: %s", log.stderr)
	case (status == "125" || status == "137") && log.stdout == "":
		f.cells[0] = map[string]string{"125": noStart, "137": ends}[status]
		if r := docker(t, "start", "--attach", starting); r.code != 0 || r.stdout != "ok\n" {
			f.bad("start: the next one: %+v", r)
		}
	default:
		f.bad("start: status %s, log %+v", status, log)
	}
	switch {
	case r.code == 0 && len(r.stdout) == len(n.data):
		f.cells[1] = fine
	case r.code == 0:
		f.bad("read: %d bytes and no error", len(r.stdout))
	case ended(reading):
		f.cells[1] = ends
		again(reading)
	case strings.Contains(r.stderr, "input/output error"):
		f.cells[1] = eio
	default:
		f.bad("read: exit %d, %d bytes, stderr %q", r.code, len(r.stdout), r.stderr)
	}
	if r := cat(reading); r.code != 0 || r.stdout != string(n.data) {
		f.bad("read, when it is over: exit %d, %d bytes, stderr %q", r.code, len(r.stdout), r.stderr)
	}
	switch {
	case ended(ahead):
		f.cells[2] = ends
		again(ahead)
	case p.after:
		f.cells[2] = onceMet
	default:
		f.cells[2] = all
	}
	eventually(t, "all is fetched", func() bool {
		s := statusOf(t, ahead)
		return s.Prefetch.State == "done" && s.Local != nil && !s.Local.RegistryNeeded
	})
	return f
}

// processTable lets each fault happen to containers that wait for a chunk.
func processTable(t *testing.T) string {
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.ScratchImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	source := w.registry.Address + "/processes:source"
	if err := testenv.Push(t.Context(), layout, source); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 300<<10)
	rand.NewChaCha8([32]byte{2}).Read(data)
	addFile(t, source, "data", data)
	fates := make([]*fate, len(processFaults))
	slots := make(chan struct{}, 4)
	var rows sync.WaitGroup
	for i, p := range processFaults {
		n := newNetwork(t, source, fmt.Sprintf("processes%d", i), data)
		rows.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			fates[i] = p.befall(t, n)
		})
	}
	rows.Wait()
	page := failureProcesses
	for i, p := range processFaults {
		f := fates[i]
		if f == nil {
			t.Fatalf("%s: no outcome", p.name)
		}
		page += fmt.Sprintf("| %s | %s |", p.name, p.must)
		for j, want := range []string{p.start, p.read, p.prefetch} {
			if f.cells[j] != want {
				t.Errorf("%s, %s: got %q, want %q", p.name, []string{"start", "read", "prefetch"}[j], f.cells[j], want)
			}
			page += " " + f.cells[j] + " |"
		}
		page += "\n"
		for _, s := range f.wrong {
			t.Errorf("%s, %s", p.name, s)
		}
	}
	return page
}
