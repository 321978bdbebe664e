package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

func TestExecLandsInTheRoot(t *testing.T) {
	id := start(t, w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	docker(t, "exec", id, "head", "-n", "1", "/app/main.py").want(t, "\"\"\"Loads what most Python services load, does a little work and says so.\"\"\"\n")
	docker(t, "exec", "--user", "nobody", "--workdir", "/usr", id, "sh", "-c", "id -un; pwd").want(t, "nobody\n/usr\n")
	docker(t, "exec", id, "ls", "-A", "/.bootfs").want(t, "boot\nstatus\n")
	docker(t, "exec", id, "/.bootfs/boot", "id", "-un").want(t, "app\n")
	if r := docker(t, "exec", id, "sh", "-c", "exit 3"); r.code != 3 {
		t.Errorf("%+v", r)
	}
}

func (r result) notFound(t *testing.T) {
	t.Helper()
	if r.code == 0 || !strings.Contains(r.stderr, "No such file or directory") {
		t.Errorf("exit %d, stdout %q, stderr %q; want no such file", r.code, r.stdout, r.stderr)
	}
}

// TestExecDuringTheStart holds boot between its first step and the root: it
// reads the password that is mounted for it, and whoever opens that file waits
// for its lease.
func TestExecDuringTheStart(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	lease, err := os.Open(password)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	if _, err := unix.FcntlInt(lease.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatal(err)
	}
	id := start(t, "--volume", password+":/run/secrets/bootfs-held-password", w.image, "sleep", "600")

	type call struct {
		args []string
		want string
		got  chan result
	}
	calls := []*call{
		{args: []string{"python3", "-c", "import json; print(json.dumps([1]))"}, want: "[1]\n"},
		{args: []string{"/usr/bin/id", "-un"}, want: "app\n"},
		{args: []string{"sh", "-c", "wc -l < /app/main.py; readlink /proc/self/exe"}, want: "18\n/usr/bin/readlink\n"},
		{args: []string{"/usr/lib/apt/apt-helper", "cat-file", "/app/data/old"}, want: "from before 1970\n"},
	}
	for _, c := range calls {
		c.got = make(chan result, 1)
		go func() { c.got <- docker(t, append([]string{"exec", id}, c.args...)...) }()
	}
	eventually(t, "the calls are in the container", func() bool {
		processes := docker(t, "top", id, "-o", "pid,comm").stdout // below a line with the title
		return strings.Count(processes, "\n") == 1+1+len(calls) && !strings.Contains(processes, "runc")
	})
	for _, c := range calls {
		select {
		case r := <-c.got:
			t.Errorf("%q did not wait for the root: %+v", c.args, r)
		default:
		}
	}
	if _, err := unix.FcntlInt(lease.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		t.Fatal(err)
	}
	for _, c := range calls {
		(<-c.got).want(t, c.want)
	}
}

// TestExecsAroundTheSwitch sends execs without a pause while containers start.
// Many mounts make the switch of the root last.
func TestExecsAroundTheSwitch(t *testing.T) {
	const starts, callers, calls, mounts = 4, 4, 6, 60
	dir := t.TempDir()
	args := append([]string{"create"}, flags...)
	args = append(args, "--env", "BOOTFS_PREFETCH=none", "--workdir", "/work/0")
	for i := range mounts {
		args = append(args, "--volume", fmt.Sprintf("%s:/work/%d", dir, i))
	}
	args = append(args, w.image, "sleep", "600")
	for range starts {
		id := strings.TrimSpace(docker(t, args...).stdout)
		removeAtEnd(t, id)
		var group sync.WaitGroup
		group.Go(func() { docker(t, "start", id) })
		for range callers {
			group.Go(func() {
				for n := 0; n < calls; {
					r := docker(t, "exec", id, "sh", "-c", "pwd; readlink /proc/self/exe")
					if strings.Contains(r.stderr, "is not running") {
						continue
					}
					r.want(t, "/work/0\n/usr/bin/readlink\n")
					n++
				}
			})
		}
		group.Wait()
		docker(t, "kill", id)
	}
}

func TestSignalsReachTheApp(t *testing.T) {
	id := start(t, w.image, "python3", "-u", "-c", `
import signal, time
for s in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGWINCH, signal.SIGRTMIN + 3):
    signal.signal(s, lambda n, _: print(n))
print("up")
while True: time.sleep(1)`)
	want := "up\n"
	said := func() bool { return docker(t, "logs", id).stdout == want }
	eventually(t, "the program is up", said)
	for _, s := range []struct{ name, number string }{
		{"HUP", "1"}, {"INT", "2"}, {"USR1", "10"}, {"USR2", "12"}, {"CONT", "18"}, {"WINCH", "28"}, {"RTMIN+3", "37"},
	} {
		if r := docker(t, "kill", "--signal", s.name, id); r.code != 0 {
			t.Fatal(r.stderr)
		}
		want += s.number + "\n"
		eventually(t, "the app got SIG"+s.name, said)
	}
}

func TestNothingIsLeft(t *testing.T) {
	id := start(t, w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	began := time.Now()
	if r := docker(t, "kill", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	docker(t, "wait", id).want(t, "137\n")
	if took := time.Since(began); took > endsWithin {
		t.Errorf("a killed container took %v to end", took)
	}
}

// TestNetworkOfItsOwn runs the container as a host of its own.
func TestNetworkOfItsOwn(t *testing.T) {
	ctx := context.Background()
	pod, err := testenv.StartPod(ctx, w.docker, w.source, "sleep", "600")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pod.Close(); err != nil {
			t.Error(err)
		}
	})
	address, err := pod.Forward(w.proxy.address)
	if err != nil {
		t.Fatal(err)
	}
	r := docker(t, "run", "--rm", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--network", pod.Network,
		"--env", "BLOB_STORE=registry+http://"+address+"/python", w.image, "python3", "-c", "import ssl; print('ok')")
	r.want(t, "ok\n")
}
