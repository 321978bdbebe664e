package boot

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
)

// logger is what boot says about itself. It shares stderr with the app, so each
// line carries a prefix and by default only what a person must act on is said.
type logger = slog.Logger

// newLogger returns a logger at the level that BOOTFS_LOG names: quiet (errors
// only), info, debug; otherwise warnings and errors.
func newLogger(w io.Writer, level string) *logger {
	l := slog.LevelWarn
	switch level {
	case "quiet":
		l = slog.LevelError
	case "info":
		l = slog.LevelInfo
	case "debug":
		l = slog.LevelDebug
	}
	return slog.New(&lineHandler{w: w, level: l, mu: new(sync.Mutex)})
}

// lineHandler writes "bootfs: message key=value" lines.
type lineHandler struct {
	mu    *sync.Mutex // one line at a time
	w     io.Writer
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
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.w, b.String())
	return err
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
