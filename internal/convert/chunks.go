package convert

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/registrystore"
)

// sink is where the chunks of one platform go.
type sink interface {
	// encode returns the stored form of a chunk. It is called concurrently,
	// once for each distinct chunk.
	encode(ctx context.Context, id index.ID, plain []byte) ([]byte, error)
	// add takes the distinct chunks in order and returns where each lies. stored
	// is the sink's again.
	add(id index.ID, stored []byte, start bool) (registrystore.Location, error)
	// zeros says whether chunks of zeros are stored as well.
	zeros() bool
	// workers is how many encode calls are worth running at once.
	workers() int
}

// chunked is what became of a root image.
type chunked struct {
	index     []byte                   // the file
	locations []registrystore.Location // by position in the index
	base      string                   // as the image records it
	report    PlatformReport           // its figures on chunks
}

// newPipeline returns a pipeline to s.
func newPipeline(s sink) (*pipeline, error) {
	cutter, err := chunker.New(chunker.V1)
	if err != nil {
		return nil, err
	}
	return &pipeline{
		cut: cutter.Cut, max: chunker.V1.Max,
		workers: s.workers(), encode: s.encode, zeros: s.zeros(),
		frames: make(map[index.ID]*frame),
	}, nil
}

// chunkImage cuts the root image of plan and puts its chunks into s: first
// those of the start set, then all others.
func chunkImage(ctx context.Context, plan *rootimage.Plan, start startSet, s sink, progress func(int64)) (*chunked, error) {
	p, err := newPipeline(s)
	if err != nil {
		return nil, err
	}
	out := &chunked{}
	r := &out.report
	var distinct []registrystore.Location // by frame number
	unstored := make(map[index.ID]bool)   // chunks of zeros, by size
	add := func(c *chunk, stored []byte, start bool) (int, error) {
		at, err := s.add(c.ID, stored, start)
		if err != nil {
			return -1, err
		}
		distinct = append(distinct, at)
		r.Distinct++
		r.stored(len(stored), start)
		return len(distinct) - 1, nil
	}

	if len(start.spans) > 0 {
		keep := func(off int64, size int) bool { return overlaps(start.spans, off, int64(size)) }
		of, ok := s.(*packs)
		if ok {
			of.thorough = start.recorded()
		}
		err := p.run(ctx, slices.Values(start.units(plan)), keep, func(c *chunk, stored []byte, number int) (int, error) {
			if c.frame == nil || number >= 0 {
				return number, nil
			}
			return add(c, stored, true)
		})
		if ok {
			of.thorough = false
		}
		if err != nil {
			return nil, err
		}
	}

	var file bytes.Buffer
	w := index.NewWriter(&file, chunker.V1, index.SHA256)
	err = p.run(ctx, unitsOf(plan), nil, func(c *chunk, stored []byte, number int) (int, error) {
		if c.frame != nil && number < 0 {
			if number, err = add(c, stored, false); err != nil {
				return -1, err
			}
		}
		r.Chunks++
		if c.Zero {
			r.ZeroChunks++
		}
		if c.frame == nil && !unstored[c.ID] {
			unstored[c.ID] = true
			r.Distinct++
		}
		at := registrystore.Location{}
		if number >= 0 {
			at = distinct[number]
		}
		out.locations = append(out.locations, at)
		progress(int64(c.Size))
		return number, w.Append(c.ID, c.Size)
	})
	if err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	out.index = file.Bytes()
	r.RootBytes = plan.Size()
	return out, nil
}

// stored counts a distinct chunk of n stored bytes.
func (r *PlatformReport) stored(n int, start bool) {
	r.StoredBytes += int64(n)
	if start {
		r.StartChunks++
		r.StartBytes += int64(n)
	}
}

// unitsWith are the units that have a byte of spans.
func unitsWith(plan *rootimage.Plan, spans []span) iter.Seq[unit] {
	return func(yield func(unit) bool) {
		for u := range unitsOf(plan) {
			if overlaps(spans, u.Offset, u.Size) && !yield(u) {
				return
			}
		}
	}
}

// unitsOf adapts a plan to the pipeline.
func unitsOf(plan *rootimage.Plan) iter.Seq[unit] {
	return func(yield func(unit) bool) {
		for u := range plan.Units() {
			if !yield(unit{Offset: u.Offset, Size: u.Size, Open: func() io.Reader { return plan.Open(u) }}) {
				return
			}
		}
	}
}

// packs is the sink of a destination or store that holds packs.
type packs struct {
	w    *registrystore.PackWriter
	base *baseImage // may be nil
	// thorough has chunks compressed as well as can be.
	thorough bool
	written  []written // by pack
	// buffers are of chunks that lie in a pack by now, for those to come.
	buffers sync.Pool
}

// written are the stored bytes in a pack, by why they were written.
type written struct{ start, added, again int64 }

func (p *packs) encode(_ context.Context, _ index.ID, plain []byte) ([]byte, error) {
	var buf []byte
	if b, ok := p.buffers.Get().(*[]byte); ok {
		buf = *b
	}
	if p.thorough {
		return chunkstore.EncodeThoroughly(buf, plain), nil
	}
	return chunkstore.Encode(buf, plain), nil
}

func (p *packs) add(id index.ID, stored []byte, start bool) (registrystore.Location, error) {
	at, err := p.w.Append(id, stored, start)
	if err != nil {
		return at, err
	}
	buf := stored[:0]
	p.buffers.Put(&buf)
	for len(p.written) <= at.Pack {
		p.written = append(p.written, written{})
	}
	w, n := &p.written[at.Pack], int64(len(stored))
	switch {
	case start:
		w.start += n
	case p.base.has(id):
		w.again += n
	default:
		w.added += n
	}
	return at, nil
}
func (*packs) zeros() bool  { return false }
func (*packs) workers() int { return runtime.GOMAXPROCS(0) }

// loose is the sink of a store of single chunks.
type loose struct {
	store           chunkstore.Writer
	written, reused atomic.Int64 // stored bytes
}

// encode stores the chunk unless it is there, whole and undamaged.
func (l *loose) encode(ctx context.Context, id index.ID, plain []byte) ([]byte, error) {
	stored, err := l.store.Get(ctx, id, nil)
	if err == nil {
		_, err = chunkstore.Decode(nil, stored, index.SHA256, index.Chunk{ID: id, Size: len(plain)})
	}
	if err == nil {
		if err := l.renew(ctx, id, stored); err != nil {
			return nil, err
		}
		l.reused.Add(int64(len(stored)))
		return stored, nil
	}
	stored = chunkstore.Encode(nil, plain)
	if err := l.put(ctx, id, stored); err != nil {
		return nil, in(Destination, err)
	}
	l.written.Add(int64(len(stored)))
	return stored, nil
}

// renew makes a chunk young that is there already: a gc that has found it
// unused shall not take it from the image that is being made.
func (l *loose) renew(ctx context.Context, id index.ID, stored []byte) error {
	if l.touch(ctx, id) {
		return nil
	}
	return l.put(ctx, id, stored) // gc was faster, or the file is another user's
}

func (l *loose) touch(ctx context.Context, id index.ID) bool {
	e, ok := l.store.(chunkstore.Expirer)
	return !ok || e.Touch(ctx, id) == nil
}

// missing returns those of chunks that have to be read: the store is asked for
// the ones that a cache knows, and the others have been read already. What the
// store has is not looked at.
func (l *loose) missing(ctx context.Context, chunks []wantedChunk) []wantedChunk {
	there := make([]bool, len(chunks))
	var g errgroup.Group
	g.SetLimit(l.workers())
	for i, c := range chunks {
		if c.cached && c.stored > 0 {
			g.Go(func() error {
				ok, err := l.store.Has(ctx, c.ID)
				there[i] = ok && err == nil && l.touch(ctx, c.ID)
				return nil
			})
		}
	}
	_ = g.Wait() // that one cannot be asked for is no error: it is stored
	var out []wantedChunk
	for i, c := range chunks {
		if there[i] {
			l.reused.Add(int64(c.stored))
		} else {
			out = append(out, c)
		}
	}
	return out
}

const (
	putAttempts = 6
	putPause    = 200 * time.Millisecond // after the first attempt; then twice as long each time
	maxPutPause = 30 * time.Second
)

// put writes a chunk.
func (l *loose) put(ctx context.Context, id index.ID, stored []byte) error {
	return insist(ctx, func() error { return l.store.Put(ctx, id, stored) })
}

// insist calls do again where its error says that this may help: what has been
// converted is worth more than a server's hiccup.
func insist(ctx context.Context, do func() error) error {
	for attempt := 0; ; attempt++ {
		err := do()
		var told interface {
			Temporary() bool
			RetryAfter() time.Duration
		}
		if err == nil || attempt+1 == putAttempts || !errors.As(err, &told) || !told.Temporary() {
			return err
		}
		pause := putPause << attempt
		pause += rand.N(pause) // the workers shall not come back together
		select {
		case <-time.After(min(max(pause, told.RetryAfter()), maxPutPause)):
		case <-ctx.Done():
			return err
		}
	}
}

// add says how long the stored form is; a loose store has no other places.
func (l *loose) add(_ index.ID, stored []byte, _ bool) (registrystore.Location, error) {
	return registrystore.Location{Length: len(stored)}, nil
}
func (l *loose) zeros() bool { return true } // casync asks for them
// workers counts those that wait: each chunk is made durable, and over SSH that
// takes a dozen round trips.
func (l *loose) workers() int { return max(64, 8*runtime.GOMAXPROCS(0)) }

// span is a range of the root image, bytes.
type span struct{ Offset, Size int64 }

// overlaps reports whether one of sorted, disjoint spans has a byte of the
// range.
func overlaps(spans []span, off, size int64) bool {
	i, _ := slices.BinarySearchFunc(spans, off, func(s span, off int64) int { return cmp.Compare(s.Offset+s.Size-1, off) })
	return i < len(spans) && spans[i].Offset < off+size
}
