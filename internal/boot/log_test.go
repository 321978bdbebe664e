package boot

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestLogger(t *testing.T) {
	for _, c := range []struct{ level, want string }{
		{"", "bootfs: w chunk=1 err=\"a b\"\nbootfs: e\n"},
		{"quiet", "bootfs: e\n"},
		{"info", "bootfs: i\nbootfs: w chunk=1 err=\"a b\"\nbootfs: e\n"},
	} {
		var out strings.Builder
		settings, err := readLogSettings(envOf("BOOTFS_LOG=" + c.level))
		if err != nil {
			t.Fatal(err)
		}
		console := newConsole(&out, settings)
		console.log.Info("i")
		console.log.With("chunk", 1).Warn("w", "err", "a b")
		console.log.Error("e")
		console.flush()
		if out.String() != c.want {
			t.Errorf("level %q: got %q, want %q", c.level, out.String(), c.want)
		}
	}
}

// envOf returns a getenv that knows one variable.
func envOf(variable string) func(string) string {
	return func(name string) string {
		value, _ := strings.CutPrefix(variable, name+"=")
		if value == variable {
			return ""
		}
		return value
	}
}

func TestLogSettings(t *testing.T) {
	for variable, want := range map[string]logSettings{
		"":                       {slog.LevelWarn, false},
		"BOOTFS_LOG=debug":       {slog.LevelDebug, false},
		"BOOTFS_LOG_FORMAT=text": {slog.LevelWarn, false},
		"BOOTFS_LOG_FORMAT=json": {slog.LevelWarn, true},
	} {
		if got, err := readLogSettings(envOf(variable)); err != nil || got != want {
			t.Errorf("%s: got %+v, %v, want %+v", variable, got, err, want)
		}
	}
	for _, variable := range []string{"BOOTFS_LOG=loud", "BOOTFS_LOG_FORMAT=xml"} {
		name, _, _ := strings.Cut(variable, "=")
		if got, err := readLogSettings(envOf(variable)); err == nil || !strings.HasPrefix(err.Error(), name+"=") || got.level != slog.LevelWarn {
			t.Errorf("%s: got %+v, %v, want an error with the name", variable, got, err)
		}
	}
}

// TestOneLine: what a server has said makes neither a second line nor a command
// for a terminal.
func TestOneLine(t *testing.T) {
	var out strings.Builder
	console := newConsole(&out, logSettings{})
	console.log.Warn(errors.Join(errors.New("one"), errors.New("two\x1b[2J")).Error(), "error", errors.New("a\r\nbootfs: b\x1b"))
	console.flush()
	if want := "bootfs: one; two [2J error=\"a\\r\\nbootfs: b\\x1b\"\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestJSON(t *testing.T) {
	var out strings.Builder
	console := newConsole(&out, logSettings{json: true})
	console.log.With("failures", 3).Warn("store fails", "error", errors.New("a\nb"), "msg", "theirs")
	console.flush()
	if strings.Count(out.String(), "\n") != 1 {
		t.Errorf("got %q, want one line", out.String())
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(out.String()), &got); err != nil {
		t.Fatal(err)
	}
	if at, err := time.Parse(time.RFC3339Nano, got["time"].(string)); err != nil || at.IsZero() {
		t.Errorf("got time %v", got["time"])
	}
	delete(got, "time")
	if want := map[string]any{"level": "WARN", "logger": "bootfs", "msg": "store fails", "failures": 3.0, "error": "a\nb"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestLoggerNeverWaits writes to a terminal that stands still, and then goes on: it
// is told how many lines are missing.
func TestLoggerNeverWaits(t *testing.T) {
	still, w := io.Pipe()
	defer still.Close()
	console := newConsole(w, logSettings{level: slog.LevelWarn})
	done := make(chan struct{})
	go func() {
		for range 2 * maxQueued {
			console.log.Error("a line")
		}
		console.flush()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		t.Fatal("a log line waited for its reader")
	}
	var read strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(read.String(), "missing here: ") {
		n, err := still.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		read.Write(buf[:n])
	}
	// One is with the writer, and the flush may have had its place in the queue.
	if got := strings.Count(read.String(), "a line\n"); got < maxQueued || got > maxQueued+1 {
		t.Errorf("got %d lines, want those that the queue holds", got)
	}
}
