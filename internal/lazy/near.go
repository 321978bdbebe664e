package lazy

import (
	"context"
	"iter"

	"github.com/container-bootfs/bootfs/index"
)

// What is decoded before it is read, where the cache has it: to open, read, unpack
// and verify a chunk takes longer than to copy it, and while a program works on one,
// another core can do it for the next. It costs no network, so unlike what is fetched
// ahead it goes on behind the end of a file: who reads a directory's files reads them
// as they lie in the image.
const (
	// maxRuns is how many readers are followed at a time.
	maxRuns = 8
	// runSkips is how many chunks a reader may leave out: the kernel has them.
	runSkips = 2
	// leastRun is from how many bytes on a reader is one who goes on. It is never more
	// ahead of it than what it has read, and than mostNear.
	leastRun = 128 << 10
	mostNear = 1 << 20
)

// run is a reader that goes through the image. Image.mu guards it.
type run struct {
	next    int // position behind the last chunk that was read
	reached int // position behind the last chunk that was asked for ahead of it
	read    int // bytes of the chunks that it went through
}

// follow notes that chunks first to next-1, with size bytes, are read, and returns
// those to be ready next.
func (m *Image) follow(first, next, size int) []index.Chunk {
	if _, ok := m.f.(cached); !ok {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.runOf(first)
	if r == nil {
		m.runs[m.oldestRun] = run{next: next, reached: next, read: size}
		m.oldestRun = (m.oldestRun + 1) % maxRuns
		return nil
	}
	if next <= r.next {
		return nil
	}
	r.read += size
	r.next = next
	r.reached = max(r.reached, next)
	window := min(r.read, mostNear, m.recent.limit/8)
	if r.read < leastRun {
		return nil
	}
	var ready int // bytes
	for i := next; i < r.reached; i++ {
		if c, err := m.x.At(i); err == nil {
			ready += c.Size
		}
	}
	if ready > window/2 {
		return nil
	}
	var cs []index.Chunk
	for ready < window && r.reached < m.x.Len() {
		c, err := m.x.At(r.reached)
		if err != nil {
			break
		}
		r.reached++
		ready += c.Size
		if m.recent.byID[c.ID] == nil && m.flights[c.ID] == nil {
			cs = append(cs, c)
		}
	}
	return cs
}

// runOf returns the run that goes on with the chunk at position first, nil if none
// does. m.mu is held.
func (m *Image) runOf(first int) *run {
	for i := range m.runs {
		if r := &m.runs[i]; r.next > 0 && first >= r.next-1 && first <= r.next+runSkips {
			return r
		}
	}
	return nil
}

// MakeReady decodes chunks at positions of the index that are about to be read, where
// the cache has them: all, or none if they are more than half of what is kept in
// memory. It takes one after the other, as who calls it has work for the other core,
// and returns when they are there.
func (m *Image) MakeReady(positions iter.Seq[int]) {
	var cs []index.Chunk
	size := 0
	for i := range positions {
		c, err := m.x.At(i)
		if err != nil {
			continue // who reads it is told
		}
		if size += c.Size; size > m.recent.limit/2 {
			return
		}
		cs = append(cs, c)
	}
	for i := range cs {
		for _, f := range m.makeReady(cs[i : i+1]) {
			<-f.done
		}
	}
}

// makeReady has those of cs that the cache has in memory soon, and returns their
// flights.
func (m *Image) makeReady(cs []index.Chunk) []*flight {
	here, ok := m.f.(cached)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), aheadTime)
	defer cancel()
	var near []index.Chunk
	for _, c := range cs {
		if here.Cached(ctx, c) {
			near = append(near, c)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	g := &group{}
	m.addAhead(g, &stream{}, near)
	if len(g.flights) > 0 {
		m.start(ctx, g)
	}
	return g.flights
}
