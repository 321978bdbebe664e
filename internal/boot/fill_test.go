package boot

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMeterLine(t *testing.T) {
	for _, c := range []struct {
		first, done, total int64
		after              time.Duration
		want               string
	}{
		{0, 0, 0, 3 * time.Second, "filling the root"},
		{0, 0, 289e6, 3 * time.Second, "filling the root: 0 of 289 MB"},
		{0, 120e6, 289e6, 2500 * time.Millisecond, "filling the root: 120 of 289 MB, 48 MB/s, about 4s left"},
		{100e6, 120e6, 220e6, 2 * time.Second, "filling the root: 120 of 220 MB, 10 MB/s, about 10s left"},
		{0, 289e6, 289e6, 9 * time.Second, "filling the root: 289 of 289 MB, which the disk has to take"},
	} {
		m := &meter{what: "filling the root"}
		m.set(c.first, c.total)
		m.set(c.done, c.total)
		if got := m.line(c.after); got != c.want {
			t.Errorf("%d of %d bytes after %v: got %q, want %q", c.done, c.total, c.after, got, c.want)
		}
	}
}

// TestProgressOnATerminal rewrites one line, and leaves nothing of it.
func TestProgressOnATerminal(t *testing.T) {
	var out strings.Builder
	c := newConsole(&out, logSettings{level: slog.LevelWarn})
	c.say(utterance{text: "1 MB", progress: true})
	c.say(utterance{text: "2 MB", progress: true})
	c.log.Warn("a warning")
	c.say(utterance{text: "3 MB", progress: true})
	c.say(utterance{text: eraseLine})
	c.flush()
	const want = "1 MB" + eraseLine + "2 MB" + eraseLine + "bootfs: a warning\n" + "3 MB" + eraseLine
	if out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// TestMissingLinesOnATerminal: what is said of them takes the place of the progress.
func TestMissingLinesOnATerminal(t *testing.T) {
	c := &console{queue: make(chan utterance, 2)}
	c.say(utterance{text: "1 MB", progress: true})
	c.dropped.Store(2)
	close(c.queue)
	var out strings.Builder
	c.write(&out)
	if want := "1 MB" + eraseLine + "bootfs: lines that nobody read in time are missing here: 2\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestKeeper(t *testing.T) {
	for _, c := range []struct {
		level         slog.Level
		before, after string
	}{
		{slog.LevelError, "", "bootfs: e\n"},
		{slog.LevelWarn, "", "bootfs: w n=1\nbootfs: e\nbootfs: later\n"},
		{slog.LevelInfo, "bootfs: w n=1\nbootfs: w n=1\nbootfs: e\n", "bootfs: w n=1\nbootfs: w n=1\nbootfs: e\nbootfs: later\n"},
	} {
		var out strings.Builder
		console := newConsole(&out, logSettings{level: c.level})
		log, release := console.keeping()
		log.With("n", 1).Warn("w")
		log.With("n", 1).Warn("w")
		log.Error("e")
		console.flush()
		if out.String() != c.before {
			t.Errorf("%v: got %q, want %q", c.level, out.String(), c.before)
		}
		release()
		log.Warn("later")
		console.flush()
		if out.String() != c.after {
			t.Errorf("%v: after release: got %q, want %q", c.level, out.String(), c.after)
		}
	}
}

func TestAwait(t *testing.T) {
	dir := t.TempDir()
	if _, err := await(dir); err != errNoBoot {
		t.Errorf("without a boot: got %v, want %v", err, errNoBoot)
	}
	addr, err := meetingAddress(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, c := range []struct {
		says string
		word byte
		err  error
	}{
		{string([]byte{wordReady}), wordReady, nil},
		{string([]byte{wordWait, wordWait, wordS3}), wordS3, nil},
		{string([]byte{wordWait}), 0, errNoBoot}, // it has become the program
		{"", 0, errNoBoot},
	} {
		go func() {
			conn, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := io.WriteString(conn, c.says); err != nil {
				t.Error(err)
			}
			conn.Close()
		}()
		if word, err := await(dir); word != c.word || err != c.err {
			t.Errorf("%q: got %d, %v, want %d, %v", c.says, word, err, c.word, c.err)
		}
	}
}

// TestOwnEnv is of a process that no engine has started.
func TestOwnEnv(t *testing.T) {
	for _, c := range []struct {
		uid        int
		halfFilled bool
		heeds      bool
	}{
		{0, false, true},
		{0, true, true},
		{1000, false, true},
		{1000, true, false},
	} {
		app := &caller{uid: c.uid, program: "true", env: []string{"BLOB_STORE=/x"}}
		if got := app.ownEnv(c.halfFilled); (len(got) == 1) != c.heeds {
			t.Errorf("%+v: got %q", c, got)
		}
	}
}

func TestEndsFill(t *testing.T) {
	var ends []string
	for s := unix.Signal(1); s < 65; s++ {
		if endsFill(s) {
			ends = append(ends, unix.SignalName(s))
		}
	}
	if got, want := strings.Join(ends, " "), "SIGHUP SIGINT SIGQUIT SIGTERM"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWhyNoMount(t *testing.T) {
	for _, c := range []struct {
		err     error
		refused bool
	}{
		{unix.EPERM, true},
		{unix.EACCES, true},
		{unix.ENODEV, true},
		{&os.PathError{Op: "open", Path: "/dev/fuse", Err: unix.ENOENT}, true},
		{unix.EIO, false},
		{unix.ENOSPC, false},
		{&os.PathError{Op: "open", Path: filepath.Join("x", "index"), Err: unix.EINVAL}, false},
	} {
		if _, refused := whyNoMount(c.err).(*refusedError); refused != c.refused {
			t.Errorf("%v: a refusal is %v, want %v", c.err, refused, c.refused)
		}
	}
}
