package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// logger is what boot says about itself. It shares stderr with the app, so each
// line carries a prefix, or as JSON a field that says whose it is, and by default
// only what a person must act on is said.
type logger = slog.Logger

const (
	maxQueued = 256         // lines that wait for stderr; what is more is dropped
	maxWords  = 8 << 10     // bytes of a line's message
	flushWait = time.Second // for them to be written
)

// console is where boot speaks.
//
// Nobody waits for its reader: stderr is a pipe or a terminal that may stand
// still for ever, and the reads of the container must not.
type console struct {
	log *logger
	logSettings
	terminal bool // lines can be rewritten in place
	queue    chan utterance
	dropped  atomic.Int64          // lines that found no room in the queue and were not told of
	meter    atomic.Pointer[meter] // of what takes long at present
}

// logSettings say how boot speaks. The zero value is lines of all that is worth one.
type logSettings struct {
	level slog.Level // BOOTFS_LOG
	json  bool       // BOOTFS_LOG_FORMAT: each line is a JSON object
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

// readLogSettings reads them from the environment: by default warnings and errors,
// as lines. What it returns beside an error is usable.
func readLogSettings(getenv func(string) string) (logSettings, error) {
	s := logSettings{level: slog.LevelWarn}
	levels := map[string]slog.Level{"": slog.LevelWarn, "quiet": slog.LevelError, "info": slog.LevelInfo, "debug": slog.LevelDebug}
	format := getenv("BOOTFS_LOG_FORMAT")
	switch format {
	case "", "text":
	case "json":
		s.json = true
	default:
		return s, fmt.Errorf("BOOTFS_LOG_FORMAT=%q: want text or json", format)
	}
	level, ok := levels[getenv("BOOTFS_LOG")]
	if !ok {
		return s, fmt.Errorf("BOOTFS_LOG=%q: want quiet, info or debug", getenv("BOOTFS_LOG"))
	}
	s.level = level
	return s, nil
}

func newConsole(w io.Writer, s logSettings) *console {
	c := &console{logSettings: s, queue: make(chan utterance, maxQueued)}
	if f, ok := w.(*os.File); ok && !s.json {
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
	put := func(text string, progress bool) {
		if stands {
			text = eraseLine + strings.TrimPrefix(text, eraseLine)
		}
		stands = progress
		_, _ = io.WriteString(w, text)
	}
	for u := range c.queue {
		if u.text != "" {
			put(u.text, u.progress)
		}
		if n := c.dropped.Load(); n > 0 && len(c.queue) == 0 {
			c.dropped.Add(-n)
			put(c.line(slog.LevelWarn, fmt.Sprintf("lines that nobody read in time are missing here: %d", n), nil), false)
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
		if !u.progress {
			c.dropped.Add(1)
		}
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

// line is what is written of a message. Neither its words nor its attributes, which
// stores and images can have a part in, make a second line of it, or are obeyed by
// a terminal.
func (c *console) line(level slog.Level, message string, attrs []slog.Attr) string {
	message = httpio.OneLine(strings.ReplaceAll(strings.TrimSpace(message), "\n", "; "), maxWords)
	if !c.json {
		return "bootfs: " + message + inText(attrs) + "\n"
	}
	object := map[string]any{}
	for _, a := range attrs {
		switch v := a.Value.Resolve(); v.Kind() {
		case slog.KindInt64, slog.KindUint64, slog.KindFloat64, slog.KindBool:
			object[a.Key] = v.Any()
		default:
			object[a.Key] = v.String()
		}
	}
	object["time"], object["level"], object["logger"], object["msg"] = time.Now().UTC(), level.String(), "bootfs", message
	b, _ := json.Marshal(object) // strings, numbers and a time, which can all be written
	return string(b) + "\n"
}

// inText returns attributes as " key=value key=value".
func inText(attrs []slog.Attr) string {
	var b strings.Builder
	for _, a := range attrs {
		value := a.Value.Resolve().String()
		if strings.ContainsFunc(value, func(r rune) bool { return r == ' ' || r == '"' || !unicode.IsPrint(r) }) {
			value = strconv.Quote(value)
		}
		b.WriteString(" " + a.Key + "=" + value)
	}
	return b.String()
}

// keeper keeps lines back until it is known whether the container starts: if not,
// the error that ends it says what they say, once.
type keeper struct {
	mu    sync.Mutex // guards what follows
	open  bool       // lines go past it
	words []string   // what the lines say
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
		k.words, k.lines = nil, nil
	}
	return slog.New(&lineHandler{console: c, keeper: k}), release
}

// keep reports whether it has kept a line, or has one that says the same.
func (k *keeper) keep(words, line string) bool {
	if k == nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.open {
		return false
	}
	if len(k.lines) < maxQueued && !slices.Contains(k.words, words) {
		k.words, k.lines = append(k.words, words), append(k.lines, line)
	}
	return true
}

// lineHandler writes a line for each record.
type lineHandler struct {
	console *console
	keeper  *keeper // nil for none
	attrs   []slog.Attr
}

func (h *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.console.level }

func (h *lineHandler) Handle(_ context.Context, r slog.Record) error {
	attrs := slices.Clone(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		attrs = append(attrs, a)
		return true
	})
	line := h.console.line(r.Level, r.Message, attrs)
	if !h.keeper.keep(r.Message+inText(attrs), line) {
		h.console.say(utterance{text: line})
	}
	return nil
}

func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := *h
	next.attrs = slices.Concat(h.attrs, attrs)
	return &next
}

// WithGroup is not used by boot's packages; a group's attributes stand flat.
func (h *lineHandler) WithGroup(string) slog.Handler { return h }
