package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

// display shows progress. Lines of the log go through it, so that they do not
// tear a progress bar. It is closed before the result is written, which a bar
// would overwrite; closing again does nothing.
type display interface {
	io.Writer // of whole lines
	event(convert.Event)
	close()
}

// display returns bars on a terminal, plain lines elsewhere, and with --quiet
// only what is written to it.
func (c *common) display() display {
	if c.quiet {
		return &lines{w: c.stderr, every: -1}
	}
	if f, ok := c.stderr.(*os.File); ok && hasSize(f) {
		return &bars{p: mpb.New(mpb.WithOutput(f), mpb.WithWidth(40)), bars: map[string]*mpb.Bar{}}
	}
	return &lines{w: c.stderr, every: 10 * time.Second}
}

// hasSize reports whether f is a terminal that has room for bars. A
// pseudo-terminal of CI may have no lines, and nothing would be shown on it.
func hasSize(f *os.File) bool {
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0 && height > 0
}

// logger writes what people should know.
func (c *common) logger(d display) *slog.Logger {
	level := slog.LevelInfo
	if c.quiet {
		level = slog.LevelWarn
	}
	return slog.New(&lineHandler{w: d, level: level})
}

// title names the phase of an event.
func title(e convert.Event) string {
	if e.Platform == "" {
		return string(e.Phase)
	}
	return string(e.Phase) + " " + e.Platform
}

// meter counts the bytes of a phase of img; end says that it is over.
func meter(d display, img *converted.Image, phase convert.Phase, total int64) (add func(int64), end func()) {
	return eventMeter(d, convert.Event{Platform: img.Platform.String(), Phase: phase, Total: total})
}

// blobMeter is meter for what is no image.
func blobMeter(d display, phase convert.Phase, total int64) (add func(int64), end func()) {
	return eventMeter(d, convert.Event{Phase: phase, Total: total})
}

func eventMeter(d display, e convert.Event) (add func(int64), end func()) {
	d.event(e)
	var done atomic.Int64
	add = func(n int64) {
		e := e
		e.Done = done.Add(n)
		d.event(e)
	}
	end = func() {
		e := e
		e.Done, e.End = done.Load(), true
		d.event(e)
	}
	return add, end
}

// lines is the display without a terminal: a line when a phase ends, and now
// and then one while it lasts.
type lines struct {
	every time.Duration // between two lines of a phase; negative shows none

	mu    sync.Mutex
	w     io.Writer            // guarded by mu
	began map[string]time.Time // guarded by mu; by title
	last  time.Time            // guarded by mu; of the last line
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func (l *lines) event(e convert.Event) {
	if l.every < 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.began == nil {
		l.began = make(map[string]time.Time)
	}
	name := title(e)
	began, ok := l.began[name]
	if !ok {
		l.began[name], l.last = now, now
		return
	}
	switch {
	case e.End:
		fmt.Fprintf(l.w, "%s: %s in %.1f s\n", name, scratch.Bytes(e.Done), now.Sub(began).Seconds())
	case now.Sub(l.last) < l.every:
		return
	case e.Total > 0:
		fmt.Fprintf(l.w, "%s: %s of %s%s\n", name, scratch.Bytes(e.Done), scratch.Bytes(e.Total), pace(e, now.Sub(began)))
	default:
		fmt.Fprintf(l.w, "%s: %s%s\n", name, scratch.Bytes(e.Done), pace(e, now.Sub(began)))
	}
	l.last = now
}

func (l *lines) close() {}

// pace says how fast a phase went that has taken this long, and how long the rest
// of it will take at that rate, where there is an end to be seen.
func pace(e convert.Event, took time.Duration) string {
	if e.Done <= 0 || took <= 0 {
		return ""
	}
	rate := float64(e.Done) / took.Seconds()
	s := fmt.Sprintf(", %s/s", scratch.Bytes(int64(rate)))
	if e.Done < e.Total {
		left := time.Duration(float64(e.Total-e.Done) / rate * float64(time.Second))
		s += fmt.Sprintf(", %s left", left.Round(time.Second))
	}
	return s
}

// bars is the display on a terminal.
type bars struct {
	p    *mpb.Progress
	once sync.Once // closes

	mu   sync.Mutex
	bars map[string]*mpb.Bar // guarded by mu; by title
}

func (b *bars) Write(p []byte) (int, error) { return b.p.Write(p) }

func (b *bars) event(e convert.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	name := title(e)
	bar := b.bars[name]
	if bar == nil {
		// Without a total there is a count and no bar.
		var filler mpb.BarFillerBuilder = mpb.BarStyle()
		count := decor.CountersKiloByte("% .1f / % .1f", decor.WCSyncSpace)
		behind := []decor.Decorator{decor.AverageSpeed(decor.SizeB1000(0), "% .0f", decor.WCSyncSpace)}
		if e.Total <= 0 {
			filler, count = mpb.NopStyle(), decor.CurrentKiloByte("% .1f", decor.WCSyncSpace)
		} else {
			left := decor.AverageETA(decor.ET_STYLE_GO, decor.WCSyncSpace)
			behind = append(behind, decor.OnComplete(left, ""), decor.OnComplete(decor.Name(" left"), ""))
		}
		bar = b.p.New(e.Total, filler,
			mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR), count),
			mpb.AppendDecorators(behind...))
		b.bars[name] = bar
	}
	if e.Done > bar.Current() {
		bar.SetCurrent(e.Done)
	}
	if e.End {
		bar.SetTotal(-1, true) // what was counted is all there is
	}
}

// close leaves the bars as they stand.
func (b *bars) close() {
	b.once.Do(func() {
		for _, bar := range b.bars {
			if !bar.Completed() {
				bar.Abort(false)
			}
		}
		b.p.Wait()
	})
}
