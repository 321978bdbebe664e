package registrystore

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"sync"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

// Sizes of packs, in bytes. Where a pack ends between the two depends on the
// chunks in it and on nothing else, so that an insertion changes the packs
// around it and leaves the later ones as they were. They are part of profile
// v1: other values give other packs.
const (
	MinPack = 8 << 20
	MaxPack = 64 << 20

	// meanTail is what a pack grows beyond MinPack on average.
	meanTail = 16 << 20
)

// PackDescriptor names a pack.
type PackDescriptor struct {
	Digest string // "sha256:…" of the pack
	Size   int64  // bytes
	Start  bool   // the pack belongs to the start set
}

// Pack is a pack and its bytes.
type Pack struct {
	PackDescriptor
	// Open reads the pack from its beginning; it may be called again. nil says
	// that the destination has the pack already.
	Open func() (io.ReadCloser, error)
	// File holds the pack and nothing else, and has no name: a destination on its
	// filesystem can give it one, and need not copy it. nil when there is none.
	File *os.File
	// From is the address of a place that has the pack,
	// "registry://HOST/REPOSITORY"; "" when no such place is known. A
	// destination in the same registry can take it from there unread.
	From string
	// Number is the place in the list of packs, set by a PackWriter.
	Number int
}

// Location says where the stored form of a chunk lies.
type Location struct {
	Pack   int   // position in the list of packs
	Offset int64 // in the pack, bytes
	Length int   // of the stored form, bytes; 0: the chunk is all zeros and stored nowhere
}

// uploads is how many packs a PackWriter hands out at once. With the pack
// that is being filled, it bounds the temporary space to uploads+1 packs.
const uploads = 2

// PackSpace is the temporary space that a PackWriter needs at most, in bytes.
const PackSpace = (uploads + 1) * MaxPack

// PackWriter lines frames up in packs and hands each full pack to its sink.
// Calls of its methods must not overlap.
type PackWriter struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	dir    string
	sink   func(context.Context, Pack) error

	packs []PackDescriptor // full ones
	cur   *spool           // the pack that is being filled, nil between packs

	slots chan struct{} // one per running sink
	wg    sync.WaitGroup
}

// spool is a pack in the making.
type spool struct {
	file  *os.File
	buf   *bufio.Writer
	sum   hash.Hash
	size  int64
	start bool
}

// NewPackWriter returns a PackWriter that spools packs to unnamed files in dir
// ("" is the system's directory for temporary files). The sink gets each pack
// once, up to two at a time and in no particular order; its context ends
// when another sink fails. Pack.Open and Pack.File work until the sink returns.
func NewPackWriter(ctx context.Context, dir string, sink func(context.Context, Pack) error) *PackWriter {
	ctx, cancel := context.WithCancelCause(ctx)
	return &PackWriter{ctx: ctx, cancel: cancel, dir: dir, sink: sink, slots: make(chan struct{}, uploads)}
}

// Append adds frame, the stored form of chunk id, and returns where it lies.
// Frames of the start set go to packs of their own, which end only when they
// are full, so that a start stays a few requests.
func (w *PackWriter) Append(id index.ID, frame []byte, start bool) (Location, error) {
	if len(frame) == 0 || len(frame) > chunkstore.MaxStored {
		return Location{}, fmt.Errorf("pack chunk %s: stored form of %d bytes, want 1 to %d", id, len(frame), chunkstore.MaxStored)
	}
	if w.cur != nil && (w.cur.start != start || w.cur.size+int64(len(frame)) > MaxPack) {
		if err := w.end(); err != nil {
			return Location{}, err
		}
	}
	if w.cur == nil {
		if err := w.begin(start); err != nil {
			return Location{}, err
		}
	}
	c := w.cur
	at := Location{Pack: len(w.packs), Offset: c.size, Length: len(frame)}
	if _, err := c.buf.Write(frame); err != nil {
		return Location{}, fmt.Errorf("spool pack %d: %w", at.Pack, err)
	}
	c.sum.Write(frame)
	c.size += int64(len(frame))
	if !start && c.size >= MinPack && endsPack(id, len(frame)) {
		if err := w.end(); err != nil {
			return Location{}, err
		}
	}
	return at, nil
}

// endsPack decides by the name of a chunk, which is as good as random, with
// a probability that grows with its stored size.
func endsPack(id index.ID, size int) bool {
	return binary.BigEndian.Uint64(id[:]) < uint64(size)*(math.MaxUint64/meanTail)
}

func (w *PackWriter) begin(start bool) error {
	f, err := scratch.File(w.dir)
	if err != nil {
		return fmt.Errorf("spool pack %d: %w", len(w.packs), err)
	}
	w.cur = &spool{file: f, buf: bufio.NewWriterSize(f, 1<<20), sum: sha256.New(), start: start}
	return nil
}

// end hands the current pack to the sink, once one of the slots is free.
func (w *PackWriter) end() error {
	c := w.cur
	w.cur = nil
	if err := c.buf.Flush(); err != nil {
		c.file.Close()
		return fmt.Errorf("spool pack %d: %w", len(w.packs), err)
	}
	p := Pack{PackDescriptor: PackDescriptor{
		Digest: "sha256:" + hex.EncodeToString(c.sum.Sum(nil)),
		Size:   c.size,
		Start:  c.start,
	}, File: c.file, Number: len(w.packs)}
	p.Open = func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(c.file, 0, c.size)), nil
	}
	select {
	case w.slots <- struct{}{}:
	case <-w.ctx.Done():
	}
	if err := context.Cause(w.ctx); err != nil {
		c.file.Close()
		return err
	}
	w.packs = append(w.packs, p.PackDescriptor)
	w.wg.Go(func() {
		defer func() { <-w.slots }()
		defer c.file.Close()
		if err := w.sink(w.ctx, p); err != nil {
			w.cancel(fmt.Errorf("pack %s: %w", p.Digest, err))
		}
	})
	return nil
}

// Close ends the last pack, waits for the sinks and returns the packs, in the
// order in which Location.Pack counts them. It must be called also after an
// error, and then returns the first one.
func (w *PackWriter) Close() ([]PackDescriptor, error) {
	var err error
	if w.cur != nil {
		err = w.end()
	}
	w.wg.Wait()
	// A sink's error is the cause of all others.
	if cause := context.Cause(w.ctx); cause != nil {
		err = cause
	}
	w.cancel(errClosed)
	if err != nil {
		return nil, err
	}
	return w.packs, nil
}

var errClosed = errors.New("the pack writer is closed")
