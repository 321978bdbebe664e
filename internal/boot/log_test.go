package boot

import (
	"io"
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
		log, flush := newLogger(&out, c.level)
		log.Info("i")
		log.With("chunk", 1).Warn("w", "err", "a b")
		log.Error("e")
		flush()
		if out.String() != c.want {
			t.Errorf("level %q: got %q, want %q", c.level, out.String(), c.want)
		}
	}
}

// TestLoggerNeverWaits writes to a terminal that stands still.
func TestLoggerNeverWaits(t *testing.T) {
	still, w := io.Pipe()
	defer still.Close()
	log, flush := newLogger(w, "")
	done := make(chan struct{})
	go func() {
		for range 2 * maxQueued {
			log.Error("a line")
		}
		flush()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(flushWait + 5*time.Second):
		t.Fatal("a log line waited for its reader")
	}
}
