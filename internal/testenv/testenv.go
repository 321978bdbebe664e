// Package testenv brings the real things that bootfs is judged by: a Docker
// engine, a registry, Debian roots and images of several layers, a network of
// a container's own. The end-to-end tests and the demo use it.
//
// It needs root and the Debian packages that scripts/install-deps.sh
// installs. Everything that is started here is private to its directory, is
// stopped by its own handle, and leaves neither process nor mount behind;
// nothing is reached over a network but loopback and the machine's own apt
// sources.
package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// daemon is a server that runs in the background, with its output in a file.
type daemon struct {
	name string
	log  string // path of the file that holds its stdout and stderr
	cmd  *exec.Cmd
	done chan struct{} // closed once the process has been reaped
	err  error         // of Wait; valid after done

	told bool // that it ended is known: ready has reported it with the log, or it was killed
}

// startDaemon starts cmd. The process gets onDeath if this one dies, so that a
// killed test leaves no server.
func startDaemon(name, logPath string, cmd *exec.Cmd, onDeath syscall.Signal) (*daemon, error) {
	out, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close() // the child has its own
	cmd.Stdout, cmd.Stderr = out, out
	// A process group of its own: Ctrl-C in the terminal reaches us, and we
	// stop the server in order.
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, onDeath

	d := &daemon{name: name, log: logPath, cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that forked ends,
		// not the process. So that thread is kept until the server has gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- fmt.Errorf("start %s: %w", name, err)
			return
		}
		started <- nil
		d.err = cmd.Wait()
		close(d.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return d, nil
}

// patience is how long a server may take to start, or to end, on a machine that
// has much else to do.
const patience = 2 * time.Minute

// ready polls check until it succeeds, the server ends or ctx does, at most for
// patience.
func (d *daemon) ready(ctx context.Context, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-d.done:
			d.told = true
			return fmt.Errorf("%s ended before it was ready: %v\n%s", d.name, d.err, d.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %v\n%s", d.name, ctx.Err(), err, d.tail())
		case <-tick.C:
		}
	}
}

// stop asks the server to end, and makes it if that takes longer than patience.
func (d *daemon) stop() error {
	select {
	case <-d.done:
		if d.told {
			return nil
		}
		return fmt.Errorf("%s had ended by itself: %v\n%s", d.name, d.err, d.tail())
	default:
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		return nil
	case <-time.After(patience):
	}
	d.cmd.Process.Kill()
	<-d.done
	return fmt.Errorf("%s did not end within %v of SIGTERM and was killed\n%s", d.name, patience, d.tail())
}

// processes returns the process ids of the server and of what it runs.
func (d *daemon) processes() []int {
	pid := d.cmd.Process.Pid
	return append([]int{pid}, descendants(pid)...)
}

// kill ends the server and what it runs with SIGKILL, if it has not ended.
func (d *daemon) kill() {
	select {
	case <-d.done:
		return // its id may be another's by now
	default:
	}
	d.told = true
	for _, pid := range d.processes() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-d.done
}

// descendants returns the process ids of pid's children, and of theirs.
func descendants(pid int) []int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil // it has ended
	}
	var all []int
	for _, field := range strings.Fields(string(text)) {
		if child, err := strconv.Atoi(field); err == nil {
			all = append(append(all, child), descendants(child)...)
		}
	}
	return all
}

// tail returns the last lines of the log.
func (d *daemon) tail() string {
	const lines = 40
	b, err := os.ReadFile(d.log)
	if err != nil {
		return fmt.Sprintf("(log: %v)", err)
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return "last lines of " + d.log + ":\n" + strings.Join(all, "\n")
}

// run runs a command to its end; an error carries what it printed.
func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	return output(exec.CommandContext(ctx, name, args...))
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), commandError(cmd, err, stdout.String(), stderr.String())
	}
	return stdout.Bytes(), nil
}

func commandError(cmd *exec.Cmd, err error, outputs ...string) error {
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: install it with scripts/install-deps.sh", err)
	}
	said := strings.TrimSpace(strings.Join(outputs, "\n"))
	if said != "" {
		said = "\n" + said
	}
	return fmt.Errorf("%s: %w%s", strings.Join(cmd.Args, " "), err, said)
}

// mountsBelow lists the mount points at and below dir, deepest first.
func mountsBelow(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		p := unescapeMount.Replace(f[4])
		if p == dir || strings.HasPrefix(p, dir+"/") {
			// A mount that stands later in the table may lie on an earlier one.
			points = append([]string{p}, points...)
		}
	}
	return points, nil
}

// unescapeMount undoes the octal escapes of mountinfo.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// absDir makes dir and returns its absolute path without symbolic links, as
// the mount table shows it.
func absDir(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}
