package convert

import (
	"sync/atomic"
	"time"
)

// meter counts the bytes of a phase.
type meter struct {
	send  func(Event)
	event Event
	done  atomic.Int64
}

func (c *conversion) meter(platform string, phase Phase, total int64) *meter {
	return newMeter(c.o.Progress, platform, phase, total)
}

// newMeter starts a phase. One whose length is not known may turn out not to
// happen, and is told of with its first byte.
func newMeter(send func(Event), platform string, phase Phase, total int64) *meter {
	m := &meter{send: send, event: Event{Platform: platform, Phase: phase, Total: total}}
	if total > 0 {
		m.send(m.event)
	}
	return m
}

func (m *meter) add(n int64) {
	e := m.event
	e.Done = m.done.Add(n)
	m.send(e)
}

func (m *meter) end() {
	e := m.event
	if e.Done, e.End = m.done.Load(), true; e.Done > 0 {
		m.send(e)
	}
}

// clock measures laps in seconds.
type clock struct{ last time.Time }

func newClock() *clock { return &clock{time.Now()} }

func (c *clock) lap() float64 {
	now := time.Now()
	d := now.Sub(c.last)
	c.last = now
	return d.Seconds()
}
