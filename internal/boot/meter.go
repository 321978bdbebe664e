package boot

import (
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	meterAfter = 2 * time.Second // a fill that is done by then says nothing
	meterLines = 10 * time.Second
	meterTicks = 500 * time.Millisecond // on a terminal
)

// meter tells how far a fill has come, on one line of a terminal or now and then
// on a line of its own.
type meter struct {
	out         *console
	what        string // is being done
	began       time.Time
	first       atomic.Int64 // bytes that were there at the beginning, +1; 0 until that is known
	done, total atomic.Int64
	end, ended  chan struct{}
}

func newMeter(out *console, what string) *meter {
	m := &meter{out: out, what: what, began: time.Now(), end: make(chan struct{}), ended: make(chan struct{})}
	out.meter.Store(m)
	go m.run()
	return m
}

// set takes the bytes that are in place.
func (m *meter) set(done, total int64) {
	m.first.CompareAndSwap(0, done+1)
	m.total.Store(total)
	m.done.Store(done)
}

func (m *meter) run() {
	defer close(m.ended)
	next := time.NewTimer(meterAfter)
	defer next.Stop()
	said, before := false, int64(0) // bytes at the last line
	for {
		select {
		case <-m.end:
			if said && m.out.terminal {
				m.out.say(utterance{text: eraseLine})
			}
			return
		case <-next.C:
		}
		if m.out.level > slog.LevelWarn {
			continue // said to be quiet
		}
		done := m.done.Load()
		line := m.line(time.Since(m.began))
		if m.out.terminal {
			next.Reset(meterTicks)
			line = "bootfs: " + line
		} else {
			next.Reset(meterLines)
			line = m.out.line(slog.LevelInfo, line, nil)
			if said && done == before {
				continue // what stands in the way is said elsewhere
			}
		}
		said, before = true, done
		m.out.say(utterance{text: line, progress: m.out.terminal})
	}
}

// line is what there is to say after a time.
func (m *meter) line(after time.Duration) string {
	const mega = 1e6
	done, total := m.done.Load(), m.total.Load()
	if total == 0 {
		return m.what
	}
	line := fmt.Sprintf("%s: %.0f of %.0f MB", m.what, float64(done)/mega, float64(total)/mega)
	if done == total {
		return line + ", which the disk has to take"
	}
	if rate := float64(done-m.first.Load()+1) / after.Seconds(); rate > 0 {
		left := time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second)
		line += fmt.Sprintf(", %.0f MB/s", rate/mega)
		if left > 0 {
			line += fmt.Sprintf(", about %s left", left)
		}
	}
	return line
}

func (m *meter) stop() {
	m.out.meter.CompareAndSwap(m, nil)
	close(m.end)
	<-m.ended
}
