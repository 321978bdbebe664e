package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// statusCommand is argument 1 of a boot that is asked how its container is.
const statusCommand = "status"

// Exit statuses of the command.
const (
	exitTold    = 0
	exitNotTold = 1
	exitUsage   = 2
)

const (
	answerTimeout = 5 * time.Second // for boot to answer
	comingTimeout = 5 * time.Second // for boot to be there
	maxAnswer     = 1 << 20         // bytes
)

// asks reports whether boot was started to tell what command names. A converted
// image may have a program of that name, which its container runs: so only one that
// was started beside it asks.
func asks(command string) bool {
	if len(os.Args) < 2 || os.Args[1] != command {
		return false
	}
	cwd, err := unix.Getwd()
	if err != nil || !isBoot(execPath(), cwd) {
		return false
	}
	if inCorner() || execed() {
		return true
	}
	conn, err := dialMeeting(bootimage.Dir)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// inCorner reports whether the process sees what openCorner mounts.
func inCorner() bool {
	info, err := os.Lstat(bootimage.SocketPath)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// tellStatus is the command. It returns the exit status.
func tellStatus(args []string, stdout, stderr io.Writer) int {
	const usage = "usage: " + bootimage.BootPath + " " + statusCommand + " [--json]"
	switch {
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-h"):
		fmt.Fprintln(stdout, usage)
		return exitTold
	case len(args) > 1 || len(args) == 1 && args[0] != "--json":
		fmt.Fprintln(stderr, "bootfs: "+usage)
		return exitUsage
	}
	answer, err := askBoot()
	var s *status
	if err == nil {
		s, err = parseStatus(answer)
	}
	if err != nil {
		fmt.Fprintln(stderr, "bootfs: "+err.Error())
		return exitNotTold
	}
	if slices.Contains(args, "--json") {
		_, _ = stdout.Write(answer)
	} else {
		s.print(stdout)
	}
	return exitTold
}

// parseStatus reads what boot has answered, or the file that it left behind: of
// that the app may have made anything.
func parseStatus(answer []byte) (*status, error) {
	var s status
	if err := json.Unmarshal(answer, &s); err != nil || s.Version == 0 {
		return nil, errors.New("what the container's boot has answered is no status")
	}
	return &s, nil
}

// askBoot returns the status as JSON, in seconds.
func askBoot() ([]byte, error) {
	if inCorner() {
		return askCorner()
	}
	config, err := readConfig(bootimage.ConfigPath)
	if err != nil {
		return nil, err
	}
	for began := time.Now(); ; time.Sleep(dialPause) {
		answer, err := askMeeting()
		switch {
		case err == nil && len(answer) == 1:
			// The root stands, and this process is still in the one below.
			runtime.LockOSThread()
			if err := enterRoot(); err != nil {
				return nil, err
			}
			return askCorner()
		case err == nil:
			return answer, nil
		case !errors.Is(err, errNoBoot):
			return nil, err
		}
		if isFilled(config) {
			return keptStatus(config)
		}
		if time.Since(began) > comingTimeout {
			return nil, fmt.Errorf("%w: it has not started, or it was killed while it filled the root", errNoBoot)
		}
	}
}

func askCorner() ([]byte, error) {
	conn, err := net.DialTimeout("unix", bootimage.SocketPath, answerTimeout)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, errNoBoot
	}
	if err != nil {
		return nil, fmt.Errorf("reach the container's boot: %w", err)
	}
	return readAnswer(conn)
}

// askMeeting asks before the root stands. An answer of one byte says that it does.
func askMeeting() ([]byte, error) {
	conn, err := dialMeeting(bootimage.Dir)
	if err != nil {
		return nil, err
	}
	_, _ = conn.Write([]byte{askStatus}) // it may have said its word already
	return readAnswer(conn)
}

func readAnswer(conn net.Conn) ([]byte, error) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(answerTimeout))
	answer, err := io.ReadAll(io.LimitReader(conn, maxAnswer))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("the container's boot does not answer within %s: it is stopped, or gets no processor time", answerTimeout)
	case err != nil && !errors.Is(err, unix.ECONNRESET):
		return nil, fmt.Errorf("ask the container's boot: %w", err)
	case len(answer) == 0:
		return nil, errNoBoot
	}
	return answer, nil
}

// keptStatus returns what the boot that has filled the root left behind.
func keptStatus(config *bootimage.Config) ([]byte, error) {
	// The app may have put something in its place that never ends.
	f, err := os.OpenFile(bootimage.StatusPath, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err == nil {
		defer f.Close()
		var b []byte
		info, failed := f.Stat()
		if failed == nil && info.Mode().IsRegular() {
			b, failed = io.ReadAll(io.LimitReader(f, maxAnswer))
		}
		var s status
		if failed == nil && json.Unmarshal(b, &s) == nil && s.Image.Root == config.IndexDigest {
			return b, nil
		}
	}
	// It was filled by another version, or the program has taken it away.
	return json.Marshal(&status{
		Version: statusVersion, State: stateFilled, Mode: modeFill.String(), Stores: []storeStatus{},
		Image: imageStatus{Root: config.IndexDigest, Source: config.Source.Name}, Cache: cacheStatus{Kind: "none"},
		Prefetch: prefetchStatus{What: "none", State: "off"},
	})
}
