package boot

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// logger is what boot says about itself. It shares stderr with the app, so each
// line carries a prefix and by default only what a person must act on is said.
type logger = slog.Logger

const (
	maxQueued = 256         // lines that wait for stderr; what is more is dropped
	flushWait = time.Second // for them to be written
)

// console is where boot speaks.
//
// Nobody waits for its reader: stderr is a pipe or a terminal that may stand
// still for ever, and the reads of the container must not.
type console struct {
	log      *logger
	level    slog.Level
	terminal bool // lines can be rewritten in place
	queue    chan utterance
	meter    atomic.Pointer[meter] // of what takes long at present
}

// doing is what takes long at present, and how far it has come; "" for nothing.
func (c *console) doing() string {
	m := c.meter.Load()
	if m == nil {
		return ""
	}
	return m.line(time.Since(m.began))
}

// utterance is what is written at once.
type utterance struct {
	text     string
	progress bool          // it stands until the next one takes its place
	flushed  chan struct{} // closed where it is this one's turn; may be nil
}

// logLevel is the level that BOOTFS_LOG names: by default warnings and errors.
func logLevel(name string) (slog.Level, error) {
	switch name {
	case "quiet":
		return slog.LevelError, nil
	case "info":
		return slog.LevelInfo, nil
	case "debug":
		return slog.LevelDebug, nil
	case "":
		return slog.LevelWarn, nil
	}
	return slog.LevelWarn, fmt.Errorf("BOOTFS_LOG=%q: want quiet, info or debug", name)
}

func newConsole(w io.Writer, level slog.Level) *console {
	c := &console{level: level, queue: make(chan utterance, maxQueued)}
	if f, ok := w.(*os.File); ok {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		c.terminal = err == nil
	}
	c.log = slog.New(&lineHandler{console: c})
	go c.write(w)
	return c
}

// eraseLine takes the cursor back and the line off the terminal.
const eraseLine = "\r\x1b[K"

func (c *console) write(w io.Writer) {
	stands := false // a line of progress on the terminal
	for u := range c.queue {
		if stands && u.text != "" {
			u.text = eraseLine + strings.TrimPrefix(u.text, eraseLine)
		}
		if u.text != "" {
			stands = u.progress
			_, _ = io.WriteString(w, u.text)
		}
		if u.flushed != nil {
			close(u.flushed)
		}
	}
}

// say queues a line, unless too many wait.
func (c *console) say(u utterance) {
	select {
	case c.queue <- u:
	default:
	}
}

// flush waits a moment for what was said to be written.
func (c *console) flush() {
	flushed := make(chan struct{})
	late := time.After(flushWait)
	select {
	case c.queue <- utterance{flushed: flushed}:
	case <-late:
		return
	}
	select {
	case <-flushed:
	case <-late:
	}
}

// keeper keeps lines back until it is known whether the container starts: if not,
// the error that ends it says what they say, once.
type keeper struct {
	mu    sync.Mutex // guards what follows
	open  bool       // lines go past it
	lines []string
}

// keeping returns a logger whose lines are kept until release. Who asked for
// more than warnings has them at once.
func (c *console) keeping() (log *logger, release func()) {
	k := &keeper{open: c.level < slog.LevelWarn}
	release = func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.open = true
		for _, line := range k.lines {
			c.say(utterance{text: line})
		}
		k.lines = nil
	}
	return slog.New(&lineHandler{console: c, keeper: k}), release
}

// keep reports whether it has kept a line, or has it already.
func (k *keeper) keep(line string) bool {
	if k == nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.open {
		return false
	}
	if len(k.lines) < maxQueued && !slices.Contains(k.lines, line) {
		k.lines = append(k.lines, line)
	}
	return true
}

// lineHandler writes "bootfs: message key=value" lines.
type lineHandler struct {
	console *console
	keeper  *keeper // nil for none
	attrs   string
}

func (h *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.console.level }

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
	if line := b.String(); !h.keeper.keep(line) {
		h.console.say(utterance{text: line})
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
