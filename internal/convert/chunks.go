package convert

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/registrystore"
)

// sink is where the chunks of one platform go.
type sink interface {
	// encode returns the stored form of a chunk. It is called concurrently,
	// once for each distinct chunk.
	encode(ctx context.Context, id index.ID, plain []byte) ([]byte, error)
	// add takes the distinct chunks in order and returns where each lies.
	add(id index.ID, stored []byte, start bool) (registrystore.Location, error)
	// zeros says whether chunks of zeros are stored as well.
	zeros() bool
	// workers is how many encode calls are worth running at once.
	workers() int
}

// chunked is what chunkImage made of a root image.
type chunked struct {
	index     []byte                   // the file
	locations []registrystore.Location // by position in the index
	report    PlatformReport           // its figures on chunks
}

// chunkImage cuts the root image of plan and puts its chunks into s: first
// those of the ranges start, then all others.
func chunkImage(ctx context.Context, plan *rootimage.Plan, start []span, s sink, progress func(int64)) (*chunked, error) {
	cutter, err := chunker.New(chunker.V1)
	if err != nil {
		return nil, err
	}
	p := &pipeline{
		cut: cutter.Cut, max: chunker.V1.Max,
		workers: s.workers(), encode: s.encode, zeros: s.zeros(),
		frames: make(map[index.ID]*frame),
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
		r.StoredBytes += int64(len(stored))
		if start {
			r.StartChunks++
			r.StartBytes += int64(len(stored))
		}
		return len(distinct) - 1, nil
	}

	if len(start) > 0 {
		units := func(yield func(unit) bool) {
			for u := range unitsOf(plan) {
				if overlaps(start, u.Offset, u.Size) && !yield(u) {
					return
				}
			}
		}
		keep := func(off int64, size int) bool { return overlaps(start, off, int64(size)) }
		err := p.run(ctx, units, keep, func(c *chunk, stored []byte, number int) (int, error) {
			if c.frame == nil || number >= 0 {
				return number, nil
			}
			return add(c, stored, true)
		})
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

// unitsOf adapts a plan to the pipeline.
func unitsOf(plan *rootimage.Plan) iter.Seq[unit] {
	return func(yield func(unit) bool) {
		for u := range plan.Units() {
			if !yield(unit{u.Offset, u.Size, func() io.Reader { return plan.Open(u) }}) {
				return
			}
		}
	}
}

// packs is the sink of a destination or store that holds packs.
type packs struct{ w *registrystore.PackWriter }

func (packs) encode(_ context.Context, _ index.ID, plain []byte) ([]byte, error) {
	return chunkstore.Encode(nil, plain), nil
}
func (p packs) add(id index.ID, stored []byte, start bool) (registrystore.Location, error) {
	return p.w.Append(id, stored, start)
}
func (packs) zeros() bool  { return false }
func (packs) workers() int { return runtime.GOMAXPROCS(0) }

// loose is the sink of a store of single chunks.
type loose struct {
	store           chunkstore.Writer
	written, reused atomic.Int64 // stored bytes
}

// encode stores the chunk unless it is there, whole and undamaged.
func (l *loose) encode(ctx context.Context, id index.ID, plain []byte) ([]byte, error) {
	if ok, err := l.store.Has(ctx, id); err == nil && ok {
		stored, err := l.store.Get(ctx, id, nil)
		if err == nil {
			_, err = chunkstore.Decode(make([]byte, 0, len(plain)), stored, index.SHA256, index.Chunk{ID: id, Size: len(plain)})
		}
		if err == nil {
			l.reused.Add(int64(len(stored)))
			return stored, nil
		}
	}
	stored := chunkstore.Encode(nil, plain)
	if err := l.put(ctx, id, stored); err != nil {
		return nil, fmt.Errorf("store %s: %w", l.store, err)
	}
	l.written.Add(int64(len(stored)))
	return stored, nil
}

const (
	putAttempts = 6
	putPause    = 200 * time.Millisecond // after the first attempt; then twice as long each time
	maxPutPause = 30 * time.Second
)

// put writes a chunk, and tries again where the store says that this may help:
// what has been converted is worth more than a server's hiccup.
func (l *loose) put(ctx context.Context, id index.ID, stored []byte) error {
	for attempt := 0; ; attempt++ {
		err := l.store.Put(ctx, id, stored)
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

func (l *loose) add(index.ID, []byte, bool) (registrystore.Location, error) {
	return registrystore.Location{}, nil
}
func (l *loose) zeros() bool { return true } // casync asks for them
// workers counts those that wait for the disk too: each chunk is made durable.
func (l *loose) workers() int { return 8 * runtime.GOMAXPROCS(0) }

// span is a range of the root image, bytes.
type span struct{ Offset, Size int64 }

// overlaps reports whether one of sorted, disjoint spans has a byte of the
// range.
func overlaps(spans []span, off, size int64) bool {
	i, _ := slices.BinarySearchFunc(spans, off, func(s span, off int64) int { return cmp.Compare(s.Offset+s.Size-1, off) })
	return i < len(spans) && spans[i].Offset < off+size
}

// startBudget bounds the bytes of a start set in a root image of n bytes. Five
// percent keep the start of a large image a few requests; that much is less
// than the loader and the C library of a small one, which are one request.
func startBudget(n int64) int64 { return max(n/20, 4<<20) }

// startSpans says where the contents of files lie in the root image that r
// describes: sorted, those of the first files as far as budget goes.
func startSpans(r *erofs.Reader, files []string, budget int64) ([]span, error) {
	var out []span
	for _, p := range files {
		n, err := r.Inode(r.RootNID())
		for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
			var nid uint64
			if err == nil {
				nid, err = r.Lookup(n, name)
			}
			if err == nil {
				n, err = r.Inode(nid)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("start set: %s: %w", p, err)
		}
		for off := int64(0); off < n.Size; {
			at, length, err := r.Span(n, off)
			if err != nil {
				return nil, fmt.Errorf("start set: %s: %w", p, err)
			}
			off += length
			if at < 0 {
				continue // a hole
			}
			if budget -= length; budget < 0 {
				return sortSpans(out), nil
			}
			out = append(out, span{at, length})
		}
	}
	return sortSpans(out), nil
}

// sortSpans sorts by offset and joins what touches: files may share blocks.
func sortSpans(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.Offset, b.Offset) })
	out := spans[:0]
	for _, s := range spans {
		if k := len(out) - 1; k >= 0 && s.Offset <= out[k].Offset+out[k].Size {
			out[k].Size = max(out[k].Size, s.Offset+s.Size-out[k].Offset)
			continue
		}
		out = append(out, s)
	}
	return out
}

// nowhere is a sink that only names chunks.
type nowhere struct{}

func (nowhere) encode(context.Context, index.ID, []byte) ([]byte, error) { return []byte{}, nil }
func (nowhere) add(index.ID, []byte, bool) (registrystore.Location, error) {
	return registrystore.Location{}, nil
}
func (nowhere) zeros() bool  { return true }
func (nowhere) workers() int { return runtime.GOMAXPROCS(0) }

// IndexDigest is the digest of the index that Run would make of t.
func IndexDigest(ctx context.Context, t *tree.Tree, progress func(int64)) (string, error) {
	plan, err := rootimage.New(t)
	if err != nil {
		return "", in(Source, err)
	}
	ch, err := chunkImage(ctx, plan, nil, nowhere{}, progress)
	if err != nil {
		return "", err
	}
	return digestOf(ch.index), nil
}
