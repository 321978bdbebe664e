package convert

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/stores"
)

// BlobOptions are what Blob needs to know.
type BlobOptions struct {
	// File is what is cut: a plain file or a block device.
	File string
	// Store is where the chunks go: one of single chunks.
	Store string
	// Params are the sizes of the chunks.
	Params chunker.Params
	// Access is who we are to the store.
	Access stores.Access
	// Progress is told of steps, from several goroutines at once; may be nil.
	Progress func(Event)
}

// BlobReport is what Blob did, for people and CI.
type BlobReport struct {
	File        string  `json:"file"`
	Store       string  `json:"store"`
	IndexDigest string  `json:"indexDigest"`
	Bytes       int64   `json:"bytes"`
	Chunks      int     `json:"chunks"`
	ZeroChunks  int     `json:"zeroChunks"` // of Chunks, all zeros
	Distinct    int     `json:"distinctChunks"`
	StoredBytes int64   `json:"storedBytes"` // of the distinct chunks, compressed
	NewBytes    int64   `json:"newBytes"`    // of StoredBytes, written now
	ReusedBytes int64   `json:"reusedBytes"` // of StoredBytes, there before
	Seconds     float64 `json:"seconds"`
}

// Blob cuts a file into chunks, stores them and writes the index to w. When it
// returns, every chunk of the index is in the store. The index depends on the
// bytes of the file and on Params; where the file has holes does not matter to
// it, but they cost next to nothing.
func Blob(ctx context.Context, w io.Writer, o BlobOptions) (*BlobReport, error) {
	began := time.Now()
	if o.Progress == nil {
		o.Progress = func(Event) {}
	}
	cutter, err := chunker.New(o.Params)
	if err != nil {
		return nil, &Error{Usage, err}
	}
	f, size, err := openBlob(o.File)
	if err != nil {
		return nil, in(Source, err)
	}
	defer f.Close()
	if !stores.Loose(o.Store) {
		return nil, &Error{Usage, fmt.Errorf("store %q: packs are for images; name a store of single chunks", o.Store)}
	}
	store, err := openLoose(o.Store, o.Access)
	if err != nil {
		return nil, in(Destination, err)
	}
	if c, ok := store.(io.Closer); ok {
		defer c.Close()
	}
	s := &loose{store: store}
	p := &pipeline{
		cut: cutter.Cut, max: o.Params.Max,
		workers: s.workers(), encode: s.encode, zeros: true,
		frames: make(map[index.ID]*frame),
	}
	units := func(yield func(unit) bool) {
		yield(unit{Size: size, Open: func() io.Reader { return &blobReader{f: f, size: size} }})
	}
	m := newMeter(o.Progress, "", PhaseChunks, size)
	r := &BlobReport{File: o.File, Store: store.String(), Bytes: size}
	sum := sha256.New()
	x := index.NewWriter(io.MultiWriter(w, sum), o.Params, index.SHA256)
	err = p.run(ctx, units, nil, func(c *chunk, stored []byte, number int) (int, error) {
		if number < 0 {
			number = r.Distinct
			r.Distinct++
			r.StoredBytes += int64(len(stored))
		}
		r.Chunks++
		if c.Zero {
			r.ZeroChunks++
		}
		m.add(int64(c.Size))
		return number, in(Destination, x.Append(c.ID, c.Size))
	})
	if err == nil {
		err = in(Destination, x.Close())
	}
	if err != nil {
		return nil, err
	}
	m.end()
	r.NewBytes, r.ReusedBytes = s.written.Load(), s.reused.Load()
	r.IndexDigest = "sha256:" + hex.EncodeToString(sum.Sum(nil))
	r.Seconds = time.Since(began).Seconds()
	return r, nil
}

// openBlob opens a file that can be cut, and returns its length in bytes.
func openBlob(name string) (*os.File, int64, error) {
	// Without O_NONBLOCK, opening a FIFO would wait for its writer.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() && info.Mode().Type() != os.ModeDevice {
		err = errors.New("not a plain file or a block device")
	}
	var size int64
	if err == nil {
		size, err = f.Seek(0, io.SeekEnd)
	}
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("%s: %w", name, err)
	}
	return f, size, nil
}

// blobReader reads a file from its beginning and knows its holes.
type blobReader struct {
	f         *os.File
	off, size int64 // bytes
	// What was last learnt of the file: bytes from known to until are a hole
	// or data.
	known, until int64
	hole         bool
}

func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.f.ReadAt(p[:min(int64(len(p)), b.size-b.off)], b.off)
	b.off += int64(n)
	if err != nil {
		err = &Error{Source, fmt.Errorf("read %s: %w", b.f.Name(), err)}
	}
	return n, err
}

func (b *blobReader) Skip(off int64) { b.off = off }

func (b *blobReader) Hole(off int64) int64 {
	if off < b.known || off >= b.until {
		b.learn(off)
	}
	if !b.hole {
		return 0
	}
	return b.until - off
}

// learn asks the file system about byte off. One that cannot tell has no holes.
func (b *blobReader) learn(off int64) {
	b.known, b.until, b.hole = off, b.size, false
	data, err := b.f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // nothing but a hole follows
		b.hole = true
	case err != nil:
	case data > off:
		b.until, b.hole = min(data, b.size), true
	default:
		if end, err := b.f.Seek(off, unix.SEEK_HOLE); err == nil && end > off {
			b.until = min(end, b.size)
		}
	}
}
