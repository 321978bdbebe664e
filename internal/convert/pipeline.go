package convert

import (
	"context"
	"fmt"
	"io"
	"iter"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convcache"
)

// The pipeline's memory, in bytes and chunks. Plain bytes wait in slabs until
// a worker has encoded them, frames wait until their turn comes; with chunks
// of at most 256 KiB both stay below 64 MiB whatever the image.
const (
	slabSize = 2 << 20
	slabs    = 16
	window   = 224
)

// unit is a run of the root image that begins and ends a chunk.
type unit struct {
	Offset, Size int64 // in the root image, bytes
	Open         func() io.Reader
	// Chunks are those of the unit where they are known: it is not read then,
	// and its chunks can be named but not encoded.
	Chunks []convcache.Chunk
}

// sparse is a unit's reader that knows where zeros lie, and can pass over them.
type sparse interface {
	io.Reader
	// Hole returns how many bytes from byte off of the unit on are known to be
	// zero.
	Hole(off int64) int64
	// Skip makes byte off of the unit the next one that Read returns.
	Skip(off int64)
}

// pipeline cuts units into chunks, names and encodes them in parallel, and
// hands them on in the order of the root image. What it hands on depends on
// the bytes alone, not on how many workers there are or which is faster.
type pipeline struct {
	cut     func([]byte) int // length of the first chunk
	max     int              // longest chunk, bytes
	workers int
	// encode returns the stored form of a chunk, nil if there is nothing left
	// to do with it. Workers call it, once for each distinct chunk.
	encode func(ctx context.Context, id index.ID, plain []byte) ([]byte, error)
	// zeros says that chunks of zeros are encoded as all others are.
	zeros bool

	mu     sync.Mutex
	frames map[index.ID]*frame // guarded by mu; every distinct chunk so far
}

// frame is the stored form of a distinct chunk.
type frame struct {
	// number is what the first call of place made of it, -1 before.
	number  int
	encoded chan struct{} // closed when bytes is valid
	bytes   []byte        // nil after it has been placed
}

// chunk is one position of the index on its way.
type chunk struct {
	ID     index.ID
	Offset int64 // in the root image, bytes
	Size   int   // bytes
	Zero   bool  // all its bytes are zero

	cached bool // it is of unit.Chunks
	stored int  // of such a chunk: bytes of the stored form

	plain  []byte        // nil for one of unit.Chunks
	slab   *slab         // nil for one of these or of a hole, whose ID and Zero are valid at once
	frame  *frame        // nil for a zero chunk that is not encoded
	hashed chan struct{} // closed when ID, Zero and frame are valid
}

// slab is a buffer that several chunks share.
type slab struct {
	buf  []byte
	refs atomic.Int32 // chunks that are still read, plus one while it is filled
	free chan<- *slab
}

func (s *slab) release() {
	if s != nil && s.refs.Add(-1) == 0 {
		s.free <- s
	}
}

// run calls place for each chunk of units that keep accepts, in order. number
// is what place returned for the first chunk with the same ID, -1 if this is
// the first, whose stored form is stored; it is valid until place returns.
// A nil keep accepts every chunk.
func (p *pipeline) run(ctx context.Context, units iter.Seq[unit], keep func(off int64, size int) bool,
	place func(c *chunk, stored []byte, number int) (int, error)) error {

	g, ctx := errgroup.WithContext(ctx)
	free := make(chan *slab, slabs)
	for range slabs {
		free <- &slab{free: free}
	}
	work := make(chan *chunk, window)
	order := make(chan *chunk, window)

	g.Go(func() error {
		defer close(work)
		defer close(order)
		return p.read(ctx, units, free, func(c *chunk) error {
			if keep != nil && !keep(c.Offset, c.Size) {
				c.slab.release()
				return nil
			}
			for _, to := range []chan<- *chunk{order, work} {
				select {
				case to <- c:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	})
	for range p.workers {
		g.Go(func() error {
			for c := range work {
				if err := p.process(ctx, c); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		for c := range order {
			if err := p.place(ctx, c, place); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}

// read fills slabs from units and emits their chunks. A chunk never crosses a
// slab: what is left at the end of one moves to the next.
func (p *pipeline) read(ctx context.Context, units iter.Seq[unit], free <-chan *slab, emit func(*chunk) error) error {
	var s *slab
	pos := 0 // end of what has been cut in s
	next := func(tail []byte) error {
		var n *slab
		select {
		case n = <-free:
		case <-ctx.Done():
			return ctx.Err()
		}
		if n.buf == nil {
			n.buf = make([]byte, max(slabSize, 2*p.max))
		}
		n.refs.Store(1)
		copy(n.buf, tail)
		if s != nil {
			s.release()
		}
		s, pos = n, 0
		return nil
	}
	if err := next(nil); err != nil {
		return err
	}
	var zeros chunk // one as holes are cut into
	for u := range units {
		if u.Chunks != nil {
			off := u.Offset
			for _, k := range u.Chunks {
				if err := emit(&chunk{ID: k.ID, Offset: off, Size: k.Size, Zero: k.Zero, cached: true, stored: k.Stored, hashed: make(chan struct{})}); err != nil {
					return err
				}
				off += int64(k.Size)
			}
			continue
		}
		r, left, off := u.Open(), u.Size, u.Offset
		have := 0 // bytes read behind pos
		holes, _ := r.(sparse)
		for left > 0 || have > 0 {
			if holes != nil {
				n := holes.Hole(off - u.Offset)
				for ; n >= int64(p.max); n -= int64(zeros.Size) {
					if zeros.plain == nil {
						zeros = p.zeroChunk()
					}
					c := zeros
					c.Offset, c.hashed = off, make(chan struct{})
					if err := emit(&c); err != nil {
						return err
					}
					off += int64(c.Size)
					read := min(have, c.Size) // of it, already
					pos, have = pos+read, have-read
					if left -= int64(c.Size - read); have == 0 {
						holes.Skip(off - u.Offset)
					}
				}
				if left == 0 && have == 0 {
					break
				}
			}
			if room := len(s.buf) - pos - have; int64(room) < min(left, int64(p.max-have)) {
				if err := next(s.buf[pos : pos+have]); err != nil {
					return err
				}
			}
			n := int(min(left, int64(len(s.buf)-pos-have)))
			if k, err := io.ReadFull(r, s.buf[pos+have:pos+have+n]); err != nil {
				return fmt.Errorf("at byte %d: got %d bytes, want %d: %w", off+int64(have+k), k, n, err)
			}
			left -= int64(n)
			for have += n; have >= p.max || left == 0 && have > 0; {
				k := p.cut(s.buf[pos : pos+have])
				s.refs.Add(1)
				c := &chunk{Offset: off, Size: k, plain: s.buf[pos : pos+k : pos+k], slab: s, hashed: make(chan struct{})}
				pos, have, off = pos+k, have-k, off+int64(k)
				if err := emit(c); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// zeroChunk returns the chunk that endless zeros are cut into.
func (p *pipeline) zeroChunk() chunk {
	plain := make([]byte, p.max)
	plain = plain[:p.cut(plain)]
	return chunk{ID: index.SHA256.Sum(plain), Size: len(plain), Zero: true, plain: plain}
}

// process names a chunk and encodes it if no worker has had its like.
func (p *pipeline) process(ctx context.Context, c *chunk) error {
	defer c.slab.release()
	if c.slab != nil {
		c.ID = index.SHA256.Sum(c.plain)
		c.Zero = allZero(c.plain)
	}
	if c.Zero && !p.zeros {
		close(c.hashed)
		return nil
	}
	// Two equal chunks may be here at once, and the later one may win the
	// lock. It encodes for both, and place takes the result at the earlier.
	p.mu.Lock()
	f, known := p.frames[c.ID]
	if !known {
		f = &frame{number: -1, encoded: make(chan struct{})}
		p.frames[c.ID] = f
	}
	p.mu.Unlock()
	c.frame = f
	close(c.hashed)
	if known {
		return nil
	}
	var err error
	if f.bytes, err = p.encode(ctx, c.ID, c.plain); err != nil {
		return err // encoded stays open: place ends with ctx
	}
	close(f.encoded)
	return nil
}

// place waits for c and hands it on.
func (p *pipeline) place(ctx context.Context, c *chunk, place func(*chunk, []byte, int) (int, error)) error {
	select {
	case <-c.hashed:
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.frame == nil {
		_, err := place(c, nil, -1)
		return err
	}
	if c.frame.number >= 0 {
		_, err := place(c, nil, c.frame.number)
		return err
	}
	select {
	case <-c.frame.encoded:
	case <-ctx.Done():
		return ctx.Err()
	}
	n, err := place(c, c.frame.bytes, -1)
	c.frame.number, c.frame.bytes, c.frame.encoded = n, nil, nil
	return err
}

// allZero compares b with itself, shifted by one byte: memequal is as fast as
// memory, and a chunk that is not zero ends it at once.
func allZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && string(b[1:]) == string(b[:len(b)-1])
}
