package boot

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"
)

// logger is what boot says about itself. It shares stderr with the app, so each
// line carries a prefix and by default only what a person must act on is said.
type logger = slog.Logger

const (
	maxQueued = 256         // lines that wait for stderr; what is more is dropped
	flushWait = time.Second // for them to be written, at the end
)

// newLogger returns a logger at the level that BOOTFS_LOG names: quiet (errors
// only), info, debug; otherwise warnings and errors. flush writes what is left;
// what is logged after it is lost.
//
// Nobody waits for w: stderr is a pipe or a terminal that may stand still for
// ever, and the reads of the container must not.
func newLogger(w io.Writer, level string) (log *logger, flush func()) {
	l := slog.LevelWarn
	switch level {
	case "quiet":
		l = slog.LevelError
	case "info":
		l = slog.LevelInfo
	case "debug":
		l = slog.LevelDebug
	}
	h := &lineHandler{lines: make(chan string, maxQueued), level: l}
	flushed := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(flushed)
		for {
			select {
			case line := <-h.lines:
				_, _ = io.WriteString(w, line)
			case <-stop:
				for len(h.lines) > 0 {
					_, _ = io.WriteString(w, <-h.lines)
				}
				return
			}
		}
	}()
	return slog.New(h), func() {
		close(stop)
		select {
		case <-flushed:
		case <-time.After(flushWait):
		}
	}
}

// lineHandler writes "bootfs: message key=value" lines.
type lineHandler struct {
	lines chan string
	level slog.Level
	attrs string
}

func (h *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

func (h *lineHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString("bootfs: ")
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		writeAttr(&b, a)
		return true
	})
	b.WriteByte('\n')
	select {
	case h.lines <- b.String():
	default:
	}
	return nil
}

func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	for _, a := range attrs {
		writeAttr(&b, a)
	}
	next := *h
	next.attrs += b.String()
	return &next
}

// WithGroup is not used by boot's packages; a group's attributes stand flat.
func (h *lineHandler) WithGroup(string) slog.Handler { return h }

func writeAttr(b *strings.Builder, a slog.Attr) {
	value := a.Value.Resolve().String()
	if strings.ContainsAny(value, " \t\n\"") {
		value = fmt.Sprintf("%q", value)
	}
	fmt.Fprintf(b, " %s=%s", a.Key, value)
}
