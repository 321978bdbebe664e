package boot

import (
	"io"
	"log/slog"
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
		level, err := logLevel(c.level)
		if err != nil {
			t.Fatal(err)
		}
		console := newConsole(&out, level)
		console.log.Info("i")
		console.log.With("chunk", 1).Warn("w", "err", "a b")
		console.log.Error("e")
		console.flush()
		if out.String() != c.want {
			t.Errorf("level %q: got %q, want %q", c.level, out.String(), c.want)
		}
	}
}

// TestLoggerNeverWaits writes to a terminal that stands still.
func TestLoggerNeverWaits(t *testing.T) {
	still, w := io.Pipe()
	defer still.Close()
	console := newConsole(w, slog.LevelWarn)
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
	case <-time.After(flushWait + 5*time.Second):
		t.Fatal("a log line waited for its reader")
	}
}
