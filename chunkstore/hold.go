package chunkstore

import (
	"sync"
	"time"
)

// holdAfter is how long a chunk is waited for before it is said.
const holdAfter = 5 * time.Second

// hold tells once that chunks are waited for, and once that they have come. The
// methods of a nil hold, and of what it begins, do nothing.
type hold struct {
	say func(again bool)

	mu    sync.Mutex // guards what follows, and holding.waits
	waits int        // fetches that have waited for long
	said  bool
}

// holding is one fetch.
type holding struct {
	hold  *hold
	timer *time.Timer
	ended bool // guarded by hold.mu, as is waits
	waits bool
}

func (h *hold) begin() *holding {
	if h == nil {
		return nil
	}
	g := &holding{hold: h}
	h.mu.Lock()
	defer h.mu.Unlock()
	g.timer = time.AfterFunc(holdAfter, g.late)
	return g
}

// late notes that nothing has come for long.
func (g *holding) late() {
	h := g.hold
	h.mu.Lock()
	defer h.mu.Unlock()
	if g.ended || g.waits {
		return
	}
	g.waits = true
	h.waits++
	if !h.said {
		h.said = true
		h.say(false)
	}
}

// progress notes that something has come.
func (g *holding) progress() {
	if g == nil {
		return
	}
	g.hold.mu.Lock()
	defer g.hold.mu.Unlock()
	if !g.ended {
		g.goesOn(true)
		g.timer.Reset(holdAfter)
	}
}

// end ends the fetch; came says that it brought all.
func (g *holding) end(came bool) {
	if g == nil {
		return
	}
	g.hold.mu.Lock()
	defer g.hold.mu.Unlock()
	g.ended = true
	g.timer.Stop()
	g.goesOn(came)
}

// goesOn ends the fetch's wait. Who was killed meanwhile does not show that the
// stores are back, but what the next one gets does. hold.mu is held.
func (g *holding) goesOn(came bool) {
	h := g.hold
	if g.waits {
		g.waits = false
		h.waits--
	}
	if came && h.said && h.waits == 0 {
		h.said = false
		h.say(true)
	}
}
