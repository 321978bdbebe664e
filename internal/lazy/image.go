// Package lazy serves the bytes of a root image without having it: a read
// finds its chunks in the index, and those that are not in memory are fetched.
//
// However many readers want a chunk, it is fetched once at a time. A reader
// waits no longer than its context says, and a fetch lives only as long as
// somebody waits for it, or a moment longer for what is fetched ahead. A failed
// fetch is told to those who waited and then forgotten: the next read tries again.
package lazy

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// DefaultMemory is what Options.Memory means when it is 0, in bytes.
const DefaultMemory = 16 << 20

// flightTime bounds the fetch of a chunk for one that would wait for ever. The
// fetcher divides what time there is among its stores, so there must be an end.
const flightTime = 30 * time.Second

// causeWait is how long the last reader of a cancelled fetch waits to learn
// what the fetch was failing at. The answer goes to a log; the reader is late.
const causeWait = 100 * time.Millisecond

// Fetcher delivers chunks, verified: the bytes it hands out are those that the
// chunk's ID names.
type Fetcher interface {
	// Fetch appends the plain bytes of c to dst. It tries until ctx ends or
	// trying again is pointless.
	Fetch(ctx context.Context, c index.Chunk, dst []byte) ([]byte, error)
	// FetchBatch calls yield with the plain bytes of each chunk, in any order;
	// they are valid until yield returns.
	FetchBatch(ctx context.Context, cs []index.Chunk, yield func(i int, plain []byte) error) error
}

// Options of New. The zero value is good.
type Options struct {
	Memory int // bytes of decoded chunks kept in memory; 0 is DefaultMemory
	// Patient says that the fetcher knows no failure: it is left to try for as
	// long as somebody waits who has no deadline.
	Patient bool
}

// Image is a root image. It is safe for concurrent use.
type Image struct {
	x       *index.Index
	f       Fetcher
	patient bool

	mu      sync.Mutex // guards what follows, and the fields of flight and group that say so
	recent  recent
	flights map[index.ID]*flight // chunks that are being fetched for somebody
	streams map[int64]*stream    // by the end of the file in the image
	runs    [maxRuns]run
	// oldestRun is the place in runs that the next one takes.
	oldestRun int
	readers   int // calls of ReadAt that wait for a flight

	count counters
}

// A flight is one chunk on its way.
type flight struct {
	chunk  index.Chunk
	group  *group
	wanted bool          // by a reader, now or soon, as Prefetch's are not; guarded by Image.mu
	ahead  *stream       // nil unless it was fetched ahead and no reader waits for it yet; guarded by Image.mu
	aboard int           // readers that have joined it and not taken plain yet; guarded by Image.mu
	done   chan struct{} // closed when landed

	// Set before done is closed, never changed after; but plain goes with the last
	// who is aboard, as the group lives for longer than a chunk shall.
	plain   []byte // nil if err is not, or if no reader is aboard
	err     error
	expired bool // err came when time was up for who started the flight
}

func (f *flight) landed() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// A group is the flights that one request brings. Neighbours travel together
// because a round trip costs more than their bytes.
type group struct {
	flights  []*flight
	cancel   context.CancelFunc
	deadline time.Time   // of the fetch, if it has one
	waiting  int         // flights of it that somebody waits for, once for each; guarded by Image.mu
	late     *time.Timer // gives it up; nil while somebody waits for it; guarded by Image.mu
}

// New returns the root image that x describes, with chunks from f.
func New(x *index.Index, f Fetcher, o Options) *Image {
	if o.Memory == 0 {
		o.Memory = DefaultMemory
	}
	return &Image{
		x:       x,
		f:       f,
		patient: o.Patient,
		recent:  recent{limit: o.Memory, byID: make(map[index.ID]*list.Element)},
		flights: make(map[index.ID]*flight),
		streams: make(map[int64]*stream),
	}
}

// A piece is what one chunk contributes to a read: its bytes, or the flight
// that will bring them.
type piece struct {
	chunk  index.Chunk
	plain  []byte
	flight *flight
}

// ReadAt fills p with the image's bytes from off. Unlike an io.ReaderAt it
// never reads short: it returns len(p), or 0 and an error.
func (m *Image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return m.ReadFile(ctx, p, off, 0)
}

// ReadFile is ReadAt of a file that goes on until end in the image: with a chunk
// that a store has to deliver, some come that follow in the file.
func (m *Image) ReadFile(ctx context.Context, p []byte, off, end int64) (int, error) {
	n, err := m.readAt(ctx, p, off, end)
	m.count.reads.Add(1)
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) { // who gave up was told nothing
		m.count.failed.Add(1)
	}
	return n, err
}

func (m *Image) readAt(ctx context.Context, p []byte, off, fileEnd int64) (int, error) {
	if off < 0 || off > m.x.Size()-int64(len(p)) {
		return 0, fmt.Errorf("read of %d bytes at %d: the image has %d", len(p), off, m.x.Size())
	}
	if len(p) == 0 {
		return 0, nil
	}
	var few [8]piece
	pieces := few[:0]
	end := off + int64(len(p))
	first, size := m.x.Find(off), 0
	for i, at := first, off; at < end; i++ {
		c, err := m.x.At(i)
		if err != nil {
			return 0, fmt.Errorf("read of %d bytes at %d: %w", len(p), off, err)
		}
		next := c.Offset + int64(c.Size)
		if at < c.Offset || at >= next { // a damaged index: Find says so
			return 0, fmt.Errorf("read of %d bytes at %d: got chunk %d with bytes %d to %d, want byte %d in it",
				len(p), off, i, c.Offset, next, at)
		}
		pieces = append(pieces, piece{chunk: c})
		at = next
		size += c.Size
	}
	if cs := m.follow(first, first+len(pieces), size); len(cs) > 0 {
		go m.makeReady(cs)
	}

	for {
		var s *stream
		var more []index.Chunk
		if at := pieces[len(pieces)-1].chunk; at.Offset+int64(at.Size) < fileEnd {
			s, more = m.ahead(ctx, pieces, first, fileEnd)
		}
		flights := m.board(ctx, pieces, s, more)
		if len(flights) == 0 {
			break
		}
		err := m.wait(ctx, flights)
		m.disembark(pieces)
		if errors.Is(err, errAgain) {
			continue
		}
		if err != nil {
			return 0, err
		}
		break
	}
	for _, pc := range pieces {
		n := 0
		if at := pc.chunk.Offset - off; at >= 0 {
			n = copy(p[at:], pc.plain)
		} else {
			n = copy(p, pc.plain[-at:])
		}
		if pc.flight == nil {
			m.count.hits.Add(1)
			m.count.hitBytes.Add(int64(n))
		}
	}
	return len(p), nil
}

// board gives each piece its bytes, when they are in memory, or the flight
// that brings them, and starts those that nobody else has started. If it
// returns flights, the caller counts as a reader until it has waited for them.
// Those of more, which are ahead in s, travel with the first that it starts.
func (m *Image) board(ctx context.Context, pieces []piece, s *stream, more []index.Chunk) []*flight {
	m.mu.Lock()
	defer m.mu.Unlock()
	var (
		flights []*flight
		g       *group
	)
	for i := range pieces {
		pc := &pieces[i]
		if plain, ok := m.recent.get(pc.chunk.ID); ok {
			pc.plain, pc.flight = plain, nil
			continue
		}
		f := m.flights[pc.chunk.ID]
		if f == nil {
			if g == nil {
				g = &group{}
			}
			f = m.add(g, pc.chunk)
		}
		f.join()
		pc.flight = f
		flights = append(flights, f)
	}
	if g != nil {
		m.addAhead(g, s, more)
		m.start(ctx, g)
	}
	if len(flights) > 0 {
		m.readers++
	}
	return flights
}

// disembark gives each piece the bytes that its flight has brought. The caller is
// no reader any more.
func (m *Image) disembark(pieces []piece) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.readers--
	for i := range pieces {
		f := pieces[i].flight
		if f == nil {
			continue
		}
		pieces[i].plain = f.plain
		if f.aboard--; f.aboard == 0 {
			f.plain = nil
		}
	}
}

// add makes a flight of c in g. m.mu is held.
func (m *Image) add(g *group, c index.Chunk) *flight {
	f := &flight{chunk: c, group: g, done: make(chan struct{})}
	g.flights = append(g.flights, f)
	m.flights[c.ID] = f
	return f
}

// start begins to fetch g for the owner of ctx. The fetch has the time that ctx
// has, but ends before only when the last one has left. m.mu is held.
func (m *Image) start(ctx context.Context, g *group) {
	g.deadline = time.Now().Add(flightTime)
	if d, ok := ctx.Deadline(); ok {
		g.deadline = d
	} else if m.patient {
		ctx, g.cancel = context.WithCancel(context.Background())
		go m.fetch(ctx, g)
		return
	}
	ctx, g.cancel = context.WithDeadline(context.Background(), g.deadline)
	go m.fetch(ctx, g)
}

// errAgain is wait's answer when the flight of another, who had less time,
// ended with that time.
var errAgain = errors.New("another's time was up")

// wait waits for flights until one fails or ctx ends, and leaves them.
func (m *Image) wait(ctx context.Context, flights []*flight) error {
	for i, f := range flights {
		select {
		case <-f.done:
			if f.err == nil {
				m.leave(flights[i : i+1])
				continue
			}
			m.leave(flights[i:])
			if f.expired && ctx.Err() == nil {
				if d, ok := ctx.Deadline(); !ok || d.After(f.group.deadline) {
					return errAgain
				}
				// The reader's time ends in this moment, too. Another flight would
				// only lose what this one was failing at.
				return f.lateness(context.DeadlineExceeded)
			}
			return f.err
		case <-ctx.Done():
			m.leave(flights[i:])
			return f.lateness(context.Cause(ctx))
		}
	}
	return nil
}

// lateness is the error of a reader whose context ended with err while it
// waited for f: with what f was failing at, if that can be known.
func (f *flight) lateness(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		select {
		case <-f.done: // its time was up as well, or nobody waits any more
			if errors.Is(f.err, context.DeadlineExceeded) {
				return f.err // which says the rest
			}
			if f.err != nil {
				return fmt.Errorf("%w: %w", f.err, err)
			}
		case <-time.After(causeWait):
		}
	}
	return fmt.Errorf("chunk %s at %d: %w", f.chunk.ID, f.chunk.Offset, err)
}

// leave says that the caller no longer waits for flights. When the last one
// leaves a group, it is given up: what has not landed is cancelled and out of
// sight, so that a reader who comes now starts anew instead of being told of a
// cancellation that was not its own. If the last one has got what it waited for,
// what travels with it has some more time.
func (m *Image) leave(flights []*flight) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range flights {
		g := f.group
		if g.waiting--; g.waiting > 0 {
			continue
		}
		if f.landed() && f.err == nil && g.isAhead() {
			g.stopLate()
			g.late = time.AfterFunc(aheadTime, func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				if g.waiting == 0 {
					m.giveUp(g)
				}
			})
			continue
		}
		m.giveUp(g)
	}
}

// giveUp ends the fetch of g. m.mu is held.
func (m *Image) giveUp(g *group) {
	for _, f := range g.flights {
		m.forget(f)
	}
	g.cancel()
}

// stopLate ends the timer of g, which would keep its chunks in memory. Image.mu is
// held.
func (g *group) stopLate() {
	if g.late != nil {
		g.late.Stop()
	}
}

// forget takes f off the flights that readers can join. m.mu is held.
func (m *Image) forget(f *flight) {
	if m.flights[f.chunk.ID] == f {
		delete(m.flights, f.chunk.ID)
	}
}

// fetch brings the flights of g.
func (m *Image) fetch(ctx context.Context, g *group) {
	defer func() {
		g.cancel()
		m.mu.Lock()
		defer m.mu.Unlock()
		g.stopLate()
	}()
	var failed error
	if len(g.flights) > 1 {
		cs := make([]index.Chunk, len(g.flights))
		for i, f := range g.flights {
			cs[i] = f.chunk
		}
		err := m.f.FetchBatch(ctx, cs, func(i int, plain []byte) error {
			m.land(ctx, g.flights[i], plain, false, nil)
			return nil
		})
		if err != nil && ctx.Err() != nil {
			for _, f := range g.flights {
				m.land(ctx, f, nil, false, err)
			}
			return
		}
		failed = err
	}
	// The error of a batch may be that of another chunk. What it has not brought
	// is fetched one by one, so that each reader gets its own chunk's answer.
	for _, f := range g.flights {
		if f.landed() || len(g.flights) > 1 && m.abandon(f, failed) {
			continue
		}
		plain, err := m.f.Fetch(ctx, f.chunk, nil)
		m.land(ctx, f, plain, true, err)
	}
}

// land ends f with its bytes or an error. The first landing counts. Unless
// plain is owned, it is the fetcher's and is copied for those who want it.
func (m *Image) land(ctx context.Context, f *flight, plain []byte, owned bool, err error) {
	if err == nil && len(plain) != f.chunk.Size {
		err = fmt.Errorf("chunk %s: got %d bytes, want %d", f.chunk.ID, len(plain), f.chunk.Size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.landed() {
		return
	}
	m.forget(f)
	switch {
	case err != nil:
		f.err, f.expired = err, ctx.Err() != nil
	case f.wanted:
		if !owned {
			plain = bytes.Clone(plain)
		}
		if f.aboard > 0 {
			f.plain = plain
		}
		m.recent.put(f.chunk.ID, plain, f.ahead)
	}
	close(f.done)
}
