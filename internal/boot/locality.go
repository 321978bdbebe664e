package boot

import (
	"context"
	"sync"
	"time"
)

const (
	// countShare bounds what counting costs: after a count none begins for this
	// many times as long as it took, at least countPause.
	countShare = 50
	countPause = time.Second
	// countWait is how long who asks waits for a count. One that takes longer goes on,
	// and the former is told meanwhile.
	countWait = 500 * time.Millisecond
)

// locality counts what of the image is here, when somebody asks: a neighbour may
// have filled the cache, or evicted from it, and tells nobody.
type locality struct {
	content *content

	mu    sync.Mutex    // guards what follows
	last  *localStatus  // nil: it was never counted
	next  time.Time     // before which no count begins
	under chan struct{} // closed by the count that is under way; nil if none is
}

// counted returns the last count, nil if the first takes long.
func (l *locality) counted() *localStatus {
	l.mu.Lock()
	if l.under == nil && !time.Now().Before(l.next) {
		l.under = make(chan struct{})
		go l.count(l.under)
	}
	under := l.under
	l.mu.Unlock()
	if under != nil {
		select {
		case <-under:
		case <-time.After(countWait):
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

func (l *locality) count(done chan struct{}) {
	began := time.Now()
	s := l.content.countLocal()
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last, l.next, l.under = s, now.Add(max(countPause, countShare*now.Sub(began))), nil
	close(done)
}

// countLocal asks for each chunk whether it is here.
func (c *content) countLocal() *localStatus {
	s := &localStatus{Counted: time.Now().UTC()}
	memory := c.image.InMemory()
	// What is in memory alone gives way to other chunks, unless no more can come.
	forgotten := 0
	for i := range c.index.Len() {
		chunk, err := c.index.At(i)
		if err != nil {
			continue
		}
		switch {
		case chunk.Offset+int64(chunk.Size) <= int64(len(c.meta)) || c.isZeros(i):
		case c.fetcher.Cached(context.Background(), chunk):
		case memory[chunk.ID]:
			forgotten++
		default:
			continue
		}
		s.Chunks++
		s.Bytes += int64(chunk.Size)
	}
	s.RegistryNeeded = s.Chunks < c.index.Len() || forgotten > 0 && c.index.Size() > int64(c.memory.chunks())
	return s
}

// isZeros reports whether chunk i is made and not fetched.
func (c *content) isZeros(i int) bool {
	if c.locators == nil {
		return false
	}
	at, err := c.locators.At(i)
	return err == nil && at.Length == 0
}
