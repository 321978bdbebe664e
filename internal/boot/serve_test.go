package boot

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestServeReturnsTheStatus ends an app with every status that there is, and by
// every signal that can end one.
func TestServeReturnsTheStatus(t *testing.T) {
	ends := map[string]int{}
	for status := range 256 {
		ends[fmt.Sprintf("exit %d", status)] = status
	}
	for s := 1; s <= 64; s++ {
		switch unix.Signal(s) {
		case unix.SIGCHLD, unix.SIGCONT, unix.SIGURG, unix.SIGWINCH, unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
			continue // none of them ends a program
		case 32, 33:
			continue // the C library keeps them from programs
		}
		ends[fmt.Sprintf("kill -%d $$", s)] = 128 + s
	}
	for command, want := range ends {
		cmd := exec.Command("sh", "-c", command)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if got := serve(cmd.Process.Pid, nil); got != want {
			t.Errorf("%s: %d, want %d", command, got, want)
		}
	}
}

// TestServeReaps lets orphans come to a boot that is the init of its PID
// namespace, and looks at what is left of them.
func TestServeReaps(t *testing.T) {
	if os.Getenv("BOOTFS_TEST_REAP") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestServeReaps$", "-test.v")
		cmd.Env = append(os.Environ(), "BOOTFS_TEST_REAP=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	// Each of a thousand children leaves a grandchild behind. The app ends once
	// no zombie is left of them.
	app := exec.Command("sh", "-c", `
		for i in $(seq 1000); do (true & ); done
		for i in $(seq 100); do
			grep -l "^State:.Z" /proc/[0-9]*/status 2>/dev/null | xargs -r grep -l "^PPid:.`+fmt.Sprint(hostPid(t))+`$" 2>/dev/null | grep -q . || exit 7
			sleep 0.1
		done`)
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	if got := serve(app.Process.Pid, nil); got != 7 {
		t.Errorf("status %d: zombies were left", got)
	}
}

// hostPid returns the number of this process in the namespace of /proc.
func hostPid(t *testing.T) string {
	t.Helper()
	self, err := os.Readlink("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	return self
}

// TestSignalsPass sends each signal that boot catches to a program through it.
func TestSignalsPass(t *testing.T) {
	passed := func(s unix.Signal) bool {
		switch s {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE, unix.SIGPROF, 32, 33, 34:
			return false
		}
		return true
	}
	signals := catchSignals()
	defer signal.Stop(signals)
	var traps strings.Builder
	for s := unix.Signal(1); s <= 64; s++ {
		if passed(s) {
			fmt.Fprintf(&traps, "trap 'exit %d' %d; ", s, s)
		}
	}
	for s := unix.Signal(1); s <= 64; s++ {
		if !passed(s) {
			continue
		}
		app := exec.Command("sh", "-c", traps.String()+"echo up; while :; do sleep 0.01; done")
		out, err := app.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		own := make(chan os.Signal, 1)
		go func() {
			if err := unix.Kill(os.Getpid(), s); err != nil {
				t.Error(err)
			}
			for got := range signals {
				if got == s {
					own <- got
					return
				}
			}
		}()
		if got := serve(app.Process.Pid, own); got != int(s) {
			t.Errorf("signal %d: the app ended with %d", s, got)
		}
		out.Close()
	}
}
