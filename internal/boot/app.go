package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// appInitName is argument 0 of the process that becomes the app.
const appInitName = "bootfs-app-init"

// Descriptors of that process, besides the three that the app inherits.
const (
	orderFD  = 3 // read: an appOrder
	reportFD = 4 // write: an appReport when the app cannot be started; closed by its exec
)

// appOrder is what boot tells the process that becomes the app.
type appOrder struct {
	Program      string
	Argv, Env    []string
	Cwd          string
	UID, GID     int
	Groups       []int
	Masks        []mask
	KeepSysAdmin bool
	Score        int // added to its oom_score_adj
}

// appReport is the failure that it answers with.
type appReport struct {
	Status  int
	Message string // "" if the user was told
	// Unread says that Message is of a program whose chunks could not be had:
	// boot knows why.
	Unread bool
}

// startApp starts the caller's program as PID 1 of a PID namespace of its own,
// in a mount namespace below boot's, and returns its process ID once it has
// been exec'd. signals are those that boot has caught. meanwhile is called while
// the app starts, when it has its namespaces.
func startApp(c *caller, masks []mask, keepSysAdmin bool, score int, signals chan os.Signal, meanwhile func()) (pid int, err error) {
	order, err := json.Marshal(appOrder{
		Program: c.program, Argv: c.argv, Env: c.env, Cwd: c.cwd,
		UID: c.uid, GID: c.gid, Groups: c.groups,
		Masks: masks, KeepSysAdmin: keepSysAdmin, Score: score,
	})
	if err != nil {
		return 0, err
	}
	orderRead, orderWrite, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer orderRead.Close()
	defer orderWrite.Close()
	reportRead, reportWrite, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer reportRead.Close()
	defer reportWrite.Close()

	sys := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if err := passTerminal(sys, signals); err != nil {
		return 0, err
	}
	pid, err = syscall.ForkExec(bootimage.BootPath, []string{appInitName}, &syscall.ProcAttr{
		Files: []uintptr{0, 1, 2, orderRead.Fd(), reportWrite.Fd()},
		Sys:   sys,
	})
	if err != nil {
		return 0, fmt.Errorf("start the app's namespaces: %w", err)
	}
	orderRead.Close()
	reportWrite.Close()
	_, err = orderWrite.Write(order)
	orderWrite.Close()
	meanwhile()
	report, reportErr := awaitExec(pid, reportRead, signals)
	if len(report) > 0 {
		var r appReport
		if err := json.Unmarshal(report, &r); err != nil {
			return 0, fmt.Errorf("start the app: unreadable report: %w", err)
		}
		if r.Message == "" {
			return 0, &exitError{status: r.Status, err: errSaid}
		}
		if r.Unread {
			return 0, &noChunksError{msg: r.Message}
		}
		return 0, &exitError{status: r.Status, err: errors.New(r.Message)}
	}
	if err := errors.Join(err, reportErr); err != nil {
		return 0, fmt.Errorf("start the app: %w", err)
	}
	return pid, nil
}

// waitsForChunks is after which time a program that does not run yet is one whose
// chunks are waited for.
const waitsForChunks = 2 * time.Second

// awaitExec returns what the process that becomes the app reports: nothing when it
// is the app. A signal that stops containers ends one that waits for its chunks;
// the app gets all others.
func awaitExec(pid int, report io.Reader, signals chan os.Signal) ([]byte, error) {
	type result struct {
		report []byte
		err    error
	}
	done := make(chan result, 1)
	go func() {
		b, err := io.ReadAll(report)
		done <- result{b, err}
	}()
	var early []os.Signal
	waits := false
	late := time.After(waitsForChunks)
	for {
		select {
		case r := <-done:
			for _, s := range early {
				select {
				case signals <- s:
				default:
				}
			}
			return r.report, r.err
		case s := <-signals:
			early = append(early, s)
		case <-late:
			waits = true
		}
		if i := slices.IndexFunc(early, func(s os.Signal) bool { return endsFill(s.(unix.Signal)) }); waits && i >= 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
			return nil, &exitError{status: 128 + int(early[i].(unix.Signal)), err: errSaid}
		}
	}
}

// passTerminal arranges that the app has the container's terminal as boot has
// it now, so that Ctrl-C, Ctrl-Z and resizing reach it from the kernel.
func passTerminal(sys *syscall.SysProcAttr, signals chan os.Signal) error {
	foreground, err := unix.IoctlGetInt(terminal, unix.TIOCGPGRP)
	controls := err == nil && foreground == unix.Getpgrp()
	switch {
	case !sessionLeader():
		// An init of the engine's leads the session: the app gets the
		// foreground in it.
		sys.Foreground, sys.Ctty = controls, terminal
	case controls:
		// A session of its own takes the terminal that boot's gives up: to take it
		// from another session is for root of the host.
		if err := giveUpTerminal(signals); err != nil {
			return err
		}
		sys.Setsid, sys.Setctty, sys.Ctty = true, true, terminal
	default:
		sys.Setsid = true
	}
	return nil
}

// terminal is the descriptor at which a container has its terminal.
const terminal = 0

// giveUpTerminal leaves the terminal of boot's session to another. The kernel
// then hangs up and continues who is in the foreground, boot: those two signals
// are not for the app.
func giveUpTerminal(signals chan os.Signal) error {
	var others []os.Signal
	for len(signals) > 0 { // a full channel would lose what is waited for below
		others = append(others, <-signals)
	}
	if err := unix.IoctlSetInt(terminal, unix.TIOCNOTTY, 0); err != nil {
		return fmt.Errorf("give up the terminal: %w", err)
	}
	for hungUp, continued := signal.Ignored(unix.SIGHUP), false; !hungUp || !continued; {
		switch s := <-signals; s {
		case unix.SIGHUP:
			hungUp = true
		case unix.SIGCONT:
			continued = true
		default:
			others = append(others, s)
		}
	}
	for _, s := range others {
		select {
		case signals <- s:
		default:
		}
	}
	return nil
}

func sessionLeader() bool {
	sid, err := unix.Getsid(0)
	return err == nil && sid == os.Getpid()
}
