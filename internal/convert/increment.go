package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/registrystore"
)

// nowhere is a sink that only names chunks; those of zeros too if it is true.
type nowhere bool

func (nowhere) encode(context.Context, index.ID, []byte) ([]byte, error) { return []byte{}, nil }
func (nowhere) add(index.ID, []byte, bool) (registrystore.Location, error) {
	return registrystore.Location{}, nil
}
func (n nowhere) zeros() bool { return bool(n) }
func (nowhere) workers() int  { return runtime.GOMAXPROCS(0) }

// IndexDigest is the digest of the index that Run would make of t.
func IndexDigest(ctx context.Context, t *tree.Tree, progress func(int64)) (string, error) {
	plan, err := rootimage.New(t)
	if err != nil {
		return "", in(Source, err)
	}
	n, err := nameImage(ctx, plan, startSet{}, nil, false, progress)
	if err != nil {
		return "", err
	}
	return digestOf(n.index), nil
}

// named is a root image that has been cut and named.
type named struct {
	index    []byte        // the file
	first    []int         // by position in the index: position of the same chunk in distinct, -1 if it is not there
	distinct []wantedChunk // in the order of the image
	report   PlatformReport
}

// nameImage cuts the root image of plan, as far as s does not know its chunks,
// and names them, those of the start set as such. Chunks of zeros
// are not among the distinct ones unless withZeros says so. s may be nil.
func nameImage(ctx context.Context, plan *rootimage.Plan, start startSet, s *source, withZeros bool, progress func(int64)) (*named, error) {
	p, err := newPipeline(nowhere(withZeros))
	if err != nil {
		return nil, err
	}
	out := &named{}
	zeros := make(map[index.ID]bool)
	var file bytes.Buffer
	w := index.NewWriter(&file, chunker.V1, index.SHA256)
	err = p.run(ctx, s.units(plan), nil, func(c *chunk, _ []byte, number int) (int, error) {
		if c.Zero {
			out.report.ZeroChunks++
		}
		if c.Zero && !withZeros {
			zeros[c.ID] = true
		} else {
			if number < 0 {
				number = len(out.distinct)
				out.distinct = append(out.distinct, wantedChunk{
					Chunk:  index.Chunk{ID: c.ID, Offset: c.Offset, Size: c.Size},
					cached: c.cached, stored: c.stored,
				})
			}
		}
		out.first = append(out.first, number)
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
	out.report.RootBytes, out.report.Chunks = plan.Size(), len(out.first)
	out.report.Distinct = len(out.distinct) + len(zeros)
	return out, start.mark(out)
}

// choosePacks decides which packs of b the image refers to, and where each of
// them is read from. One that cannot be read is as good as none.
func (c *conversion) choosePacks(ctx context.Context, b *baseImage, n *named) (reuse, []place, error) {
	from := make([]*place, len(b.packs))
	for {
		r := planReuse(b, n.distinct, c.rewriteBelow())
		lost := make([]error, len(r.kept))
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(packsAtOnce)
		for i, k := range r.kept {
			if from[k.number] == nil {
				g.Go(func() (err error) {
					from[k.number], lost[i] = b.look(gctx, k, r.at[k.probe.ID])
					return gctx.Err()
				})
			}
		}
		if err := g.Wait(); err != nil {
			return reuse{}, nil, err
		}
		again := false
		for i, err := range lost {
			if err != nil {
				c.o.Log.Warn(fmt.Sprintf("a pack of the base is not used, its chunks are stored again: %v", err))
				b.gone[r.kept[i].number], again = true, true
			}
		}
		if again {
			continue
		}
		places := make([]place, len(r.kept))
		for i, k := range r.kept {
			places[i] = *from[k.number]
		}
		return r, places, nil
	}
}

// thoroughBytes is how much of an image on top of a base, in plain bytes, is
// compressed thoroughly: what is new in a version travels to every node and is
// kept as long as it is part of later ones. Twenty seconds of one core at most
// go into it; more than that is an image of its own.
const thoroughBytes = 256 << 20

// packsAtOnce is how many packs of a base are looked at, or brought to the
// destination, at a time.
const packsAtOnce = 4

// look finds a place that has pack k, whose last chunk in use lies at at: that
// chunk is read and compared with its name. It shows a pack that is gone or
// too short, and locators that do not belong to it; the chunks in between are
// taken on trust.
func (b *baseImage) look(ctx context.Context, k keptPack, at registrystore.Location) (*place, error) {
	var errs []error
	for _, p := range b.places {
		err := insist(ctx, func() error {
			stored, err := registrystore.ReadRange(ctx, p.blobs, k.Digest, at.Offset, int64(at.Length), nil)
			if err == nil {
				_, err = chunkstore.Decode(nil, stored, index.SHA256, k.probe)
			}
			return err
		})
		if err == nil {
			return &p, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("pack %s: the base names no place where it is", k.Digest)
	}
	return nil, errors.Join(errs...)
}

// chunksOn stores what b does not have of the root image of plan.
func (p *chunkPlace) chunksOn(ctx context.Context, b *baseImage, plan *rootimage.Plan, start startSet, s *source, platform string) (*chunked, []registrystore.Pack, error) {
	clock := newClock()
	naming := p.c.meter(platform, PhaseNames, plan.Size())
	n, err := nameImage(ctx, plan, start, s, false, naming.add)
	if err != nil {
		return nil, nil, err
	}
	naming.end()
	r, places, err := p.c.choosePacks(ctx, b, n)
	if err != nil {
		return nil, nil, err
	}
	out := &chunked{index: n.index, base: b.digest, report: n.report}
	out.report.NameSeconds = clock.lap()

	var first, rest []wantedChunk // that are to be stored: of the start set, and others
	var lost []span               // of them, what only the layers have
	total := int64(0)
	for _, c := range n.distinct {
		switch at, ok := r.at[c.ID]; {
		case ok:
			out.report.stored(at.Length, c.start)
			continue
		case c.start:
			first = append(first, c)
		default:
			rest = append(rest, c)
		}
		total += int64(c.Size)
		if _, ok := b.find(c.ID); c.cached && !ok {
			lost = append(lost, span{c.Offset, int64(c.Size)})
		}
	}
	s.fetch(plan, lost)
	if total == 0 && digestOf(n.index) == b.index && r.whole(b) {
		// This is the base's image once more, which shall not get another
		// digest for that.
		out.base = b.own
	}

	chunking := p.c.meter(platform, PhaseChunks, total)
	var added []registrystore.Pack
	var there, copied int64
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		there, copied, err = p.bring(gctx, r.kept, places)
		return err
	})
	g.Go(func() (err error) {
		added, err = p.store(gctx, b, &out.report, func(s *packs) error {
			s.thorough = total <= thoroughBytes || start.recorded()
			e := &encoder{plan: plan, sink: s, kept: len(r.kept), at: r.at, report: &out.report, progress: chunking.add}
			if err := e.run(gctx, first); err != nil {
				return err
			}
			s.thorough = total <= thoroughBytes
			return e.run(gctx, rest)
		})
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	chunking.end()
	out.report.ReusedBytes += there
	out.report.CopiedBytes = copied
	out.report.Base, out.report.BasePacks = b.digest, len(r.kept)

	list := make([]registrystore.Pack, len(r.kept))
	for i, k := range r.kept {
		list[i] = registrystore.Pack{PackDescriptor: k.PackDescriptor} // at the destination by now
	}
	list, renumbered := startFirst(append(list, added...))
	out.locations = make([]registrystore.Location, len(n.first))
	for pos, number := range n.first {
		if number >= 0 {
			at := r.at[n.distinct[number].ID]
			at.Pack = renumbered[at.Pack]
			out.locations[pos] = at
		}
	}
	return out, list, nil
}

// startFirst moves the packs of the start set to the front, and says where each
// pack has gone.
func startFirst(packs []registrystore.Pack) (sorted []registrystore.Pack, to []int) {
	to = make([]int, len(packs))
	for _, start := range []bool{true, false} {
		for i, p := range packs {
			if p.Start == start {
				to[i] = len(sorted)
				sorted = append(sorted, p)
			}
		}
	}
	return sorted, to
}

// bring lets the destination have packs of a base, each from its place: there
// counts the bytes that it had or could link, copied the others.
func (p *chunkPlace) bring(ctx context.Context, kept []keptPack, from []place) (there, copied int64, err error) {
	var counts [2]atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(packsAtOnce)
	for i, k := range kept {
		g.Go(func() error {
			was, err := p.packs.PutPack(ctx, registrystore.Pack{PackDescriptor: k.PackDescriptor, From: from[i].address,
				Open: func() (io.ReadCloser, error) {
					return transport.OpenBlob(ctx, from[i].blobs, k.Digest, k.Size)
				}})
			if err != nil {
				return in(Destination, fmt.Errorf("pack %s of the base: %w", k.Digest, err))
			}
			if was {
				counts[0].Add(k.Size)
			} else {
				counts[1].Add(k.Size)
			}
			return nil
		})
	}
	err = g.Wait()
	return counts[0].Load(), counts[1].Load(), err
}

// encoder reads chunks that have been named a second time, and stores them.
type encoder struct {
	plan     *rootimage.Plan
	sink     sink
	kept     int                                 // packs before those of sink
	at       map[index.ID]registrystore.Location // learns where they lie
	report   *PlatformReport
	progress func(int64)
}

// run stores chunks, which are in the order of the image; those of the start set
// in that in which they are read.
func (e *encoder) run(ctx context.Context, chunks []wantedChunk) error {
	if len(chunks) == 0 {
		return nil
	}
	p, err := newPipeline(e.sink)
	if err != nil {
		return err
	}
	spans := make([]span, len(chunks))
	for i, c := range chunks {
		spans[i] = span{c.Offset, int64(c.Size)}
	}
	keep := func(off int64, size int) bool { return overlaps(spans, off, int64(size)) }
	units := unitsWith(e.plan, spans)
	if chunks[0].start {
		var list []unit
		list, chunks = asRead(slices.Collect(units), chunks)
		units = slices.Values(list)
	}
	next := 0
	err = p.run(ctx, units, keep, func(c *chunk, stored []byte, _ int) (int, error) {
		// Layers of a local layout are read where they lie, by whoever writes there.
		if next == len(chunks) || c.ID != chunks[next].ID || c.Offset != chunks[next].Offset {
			return -1, in(Source, fmt.Errorf("root image at %d: the source has changed while it was read", c.Offset))
		}
		start := chunks[next].start
		at, err := e.sink.add(c.ID, stored, start)
		if err != nil {
			return -1, err
		}
		at.Pack += e.kept
		e.at[c.ID] = at
		e.report.stored(len(stored), start)
		e.progress(int64(c.Size))
		next++
		return next, nil
	})
	if err == nil && next < len(chunks) {
		err = in(Source, errors.New("the source has changed while it was read"))
	}
	return err
}
