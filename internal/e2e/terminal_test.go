package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A terminal is a docker client with a terminal, and the user before it.
type terminal struct {
	t      *testing.T
	screen *os.File
	cmd    *exec.Cmd

	mu   sync.Mutex
	text strings.Builder // guarded by mu; all that was shown
	seen int             // of text, by expect
}

// openTerminal runs the docker client with args in a terminal of 24 lines and
// 80 columns.
func openTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	screen, keyboard, err := openPTY()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	m := &terminal{t: t, screen: screen, cmd: w.docker.Command(ctx, args...)}
	m.resize(24, 80)
	m.cmd.Stdin, m.cmd.Stdout, m.cmd.Stderr = keyboard, keyboard, keyboard
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = m.cmd.Start()
	keyboard.Close()
	if err != nil {
		t.Fatal(err)
	}
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		p := make([]byte, 4096)
		for {
			n, err := screen.Read(p)
			m.mu.Lock()
			m.text.Write(p[:n])
			m.mu.Unlock()
			if err != nil {
				return // EIO once the client has gone
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		_ = m.cmd.Wait() // close has, or the client was killed
		<-shown
		screen.Close()
	})
	return m
}

func openPTY() (screen, keyboard *os.File, err error) {
	if screen, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	number, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		keyboard, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		screen.Close()
		return nil, nil, err
	}
	return screen, keyboard, nil
}

func (m *terminal) resize(lines, columns uint16) {
	m.t.Helper()
	if err := unix.IoctlSetWinsize(int(m.screen.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: lines, Col: columns}); err != nil {
		m.t.Fatal(err)
	}
}

// press types keys.
func (m *terminal) press(keys string) {
	m.t.Helper()
	if _, err := m.screen.WriteString(keys); err != nil {
		m.t.Fatal(err)
	}
}

// expect waits until text is shown, behind what was expected before.
func (m *terminal) expect(text string) {
	m.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		m.mu.Lock()
		all := m.text.String()
		i := strings.Index(all[m.seen:], text)
		if i >= 0 {
			m.seen += i + len(text)
		}
		m.mu.Unlock()
		if i >= 0 {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("the terminal does not show %q:\n%q", text, all)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// close waits for the end of the client and returns its exit status.
func (m *terminal) close() int {
	m.t.Helper()
	_ = m.cmd.Wait() // the status says it
	return m.cmd.ProcessState.ExitCode()
}
