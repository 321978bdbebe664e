package lazy

import (
	"context"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// What is fetched beside a chunk that a reader of a file waits for: what follows
// in the file. A program mostly reads files whole, and over a line with a round
// trip of 20 ms the bytes of firstAhead take no longer than the request for them.
// In plain bytes.
const (
	firstAhead = 256 << 10 // at the first chunk of a file that is not there
	leastAhead = 32 << 10  // less is none
	mostAhead  = 2 << 20
	// aheadTime is how long it may take when nobody waits for it any more.
	aheadTime = 10 * time.Second
	// maxStreams is how many files' reading is remembered.
	maxStreams = 512
)

// stream is how a file is read. As long as what was fetched ahead is read, or
// what comes behind it, more is fetched with the next chunk, else less. Image.mu
// guards it.
type stream struct {
	window      int // bytes to fetch ahead with the last chunk that was not there
	asked, used int // bytes that were fetched ahead, and those of them that were read
	next        int // position behind the last chunk that was asked for
}

// grow returns how far to fetch ahead with the chunk at position pos.
func (s *stream) grow(pos int) int {
	switch {
	case s.next == 0:
		s.window = firstAhead
	case pos == s.next || 2*s.used >= s.asked:
		s.window = min(max(2*s.window, firstAhead), mostAhead)
	default:
		if s.window /= 4; s.window < leastAhead {
			s.window = 0
		}
	}
	return s.window
}

// streamOf returns the stream of the file that ends at end in the image. m.mu is
// held.
func (m *Image) streamOf(end int64) *stream {
	s := m.streams[end]
	if s == nil {
		if len(m.streams) >= maxStreams {
			clear(m.streams)
		}
		s = &stream{}
		m.streams[end] = s
	}
	return s
}

// ahead returns the chunks to fetch with pieces, of which the first is at position
// pos, if one of them has to come from a store: those that follow in the file, which
// ends at end in the image.
func (m *Image) ahead(ctx context.Context, pieces []piece, pos int, end int64) (*stream, []index.Chunk) {
	here, _ := m.f.(cached)
	missing := -1
	for i, pc := range pieces {
		if !m.isNear(pc.chunk.ID) {
			missing = i
			break
		}
	}
	if missing < 0 || here != nil && here.Cached(ctx, pieces[missing].chunk) {
		return nil, nil
	}
	m.mu.Lock()
	s := m.streamOf(end)
	left := min(s.grow(pos+missing), m.recent.limit/4)
	m.mu.Unlock()
	var cs []index.Chunk
	next := pos + len(pieces)
	for ; next < m.x.Len() && left > 0; next++ {
		c, err := m.x.At(next)
		if err != nil || c.Offset >= end {
			break
		}
		left -= c.Size
		if here == nil || !here.Cached(ctx, c) {
			cs = append(cs, c)
		}
	}
	m.mu.Lock()
	s.next = next
	m.mu.Unlock()
	return s, cs
}

// isNear reports whether a chunk is in memory or on its way.
func (m *Image) isNear(id index.ID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.recent.byID[id] != nil || m.flights[id] != nil
}

// addAhead adds flights of cs to g, for which nobody waits yet. m.mu is held.
func (m *Image) addAhead(g *group, s *stream, cs []index.Chunk) {
	for _, c := range cs {
		if m.recent.byID[c.ID] != nil || m.flights[c.ID] != nil {
			continue
		}
		f := m.add(g, c)
		f.wanted, f.ahead = true, s
		s.asked += c.Size
	}
}

// join notes that a reader waits for f. m.mu is held.
func (f *flight) join() {
	f.group.waiting++
	f.aboard++
	f.wanted = true
	if f.ahead != nil {
		f.ahead.used += f.chunk.Size
		f.ahead = nil
	}
}

// abandon ends f, which the fetch of its group has not brought, if nobody waits
// for it.
func (m *Image) abandon(f *flight, err error) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.ahead == nil || f.landed() {
		return f.landed()
	}
	m.forget(f)
	f.err = err
	close(f.done)
	return true
}

// isAhead reports whether g has flights under way that are ahead of their readers.
// Image.mu is held.
func (g *group) isAhead() bool {
	for _, f := range g.flights {
		if f.ahead != nil && !f.landed() {
			return true
		}
	}
	return false
}
