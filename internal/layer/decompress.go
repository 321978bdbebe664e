package layer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is the zstd window that is accepted, in bytes: that of the zstd
// command without --long, and so of every layer that an engine can read.
const maxWindow = 128 << 20

// openStored returns the plain bytes of b, decompressed ahead of the reader.
func openStored(ctx context.Context, b Blob, progress func(int64)) (io.ReadCloser, error) {
	var rc io.ReadCloser
	if b.Plain != nil {
		size := b.Size
		if size < 0 {
			size = math.MaxInt64
		}
		rc = io.NopCloser(io.NewSectionReader(b.Plain, 0, size))
	} else {
		var err error
		if rc, err = b.Open(ctx); err != nil {
			return nil, err
		}
	}
	stored := bufio.NewReaderSize(&storedReader{ctx: ctx, r: rc, progress: progress}, 64<<10)
	if b.Plain != nil {
		return startAhead(stored, rc, nil), nil
	}
	magic, err := stored.Peek(4)
	if err != nil && err != io.EOF {
		return nil, errors.Join(err, rc.Close())
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(stored)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("gzip: %w", noEOF(err)), rc.Close())
		}
		return startAhead(named{"gzip", z}, rc, nil), nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		// A skippable frame: zstd:chunked puts some behind the content, and
		// a writer may put one in front.
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(stored, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("zstd: %w", err), rc.Close())
		}
		return startAhead(named{"zstd", z}, rc, z.Close), nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return nil, errors.Join(errors.New("compressed with bzip2: only gzip, zstd and plain tar are layers"), rc.Close())
	case bytes.Equal(magic, []byte("\xfd7zX")):
		return nil, errors.Join(errors.New("compressed with xz: only gzip, zstd and plain tar are layers"), rc.Close())
	}
	return startAhead(stored, rc, nil), nil
}

// storedReader counts the stored bytes and ends with its context.
type storedReader struct {
	ctx      context.Context
	r        io.Reader
	progress func(int64)
}

func (r *storedReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	if n > 0 && r.progress != nil {
		r.progress(int64(n))
	}
	return n, err
}

// named says in an error which decompressor it came from.
type named struct {
	name string
	r    io.Reader
}

func (n named) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.name, err)
	}
	return k, err
}

// ahead runs the decompressor in a goroutine of its own, so that it works
// while the bytes before are hashed, searched and spooled.
type ahead struct {
	full   chan piece
	free   chan []byte
	stop   chan struct{}
	done   chan struct{}
	source io.Closer
	end    func() // gives up the decompressor; nil = nothing to do
	once   sync.Once

	whole []byte // goes back to free when rest is used up
	rest  []byte
	err   error // sticky
}

type piece struct {
	p   []byte
	err error
}

const (
	aheadPieces = 3
	aheadSize   = 256 << 10 // bytes
)

func startAhead(r io.Reader, source io.Closer, end func()) *ahead {
	a := &ahead{
		full: make(chan piece, aheadPieces), free: make(chan []byte, aheadPieces),
		stop: make(chan struct{}), done: make(chan struct{}),
		source: source, end: end,
	}
	for range aheadPieces {
		a.free <- make([]byte, aheadSize)
	}
	go func() {
		defer close(a.done)
		for {
			select {
			case <-a.stop:
				return
			case p := <-a.free:
				n, err := io.ReadFull(r, p)
				if err == io.ErrUnexpectedEOF && n < len(p) {
					// ReadFull's word for the end behind n bytes; a decompressor's
					// own unexpected end has its name around it.
					err = io.EOF
				}
				a.full <- piece{p[:n], err} // never blocks: there are no more pieces than places
				if err != nil {
					return
				}
			}
		}
	}()
	return a
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.whole != nil {
			a.free <- a.whole[:cap(a.whole)]
			a.whole = nil
		}
		if a.err != nil {
			return 0, a.err
		}
		next := <-a.full
		a.whole, a.rest, a.err = next.p, next.p, next.err
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close stops the goroutine and closes the source. Closing the source first
// ends a read that waits for the network.
func (a *ahead) Close() (err error) {
	a.once.Do(func() {
		close(a.stop)
		err = a.source.Close()
		<-a.done
		if a.end != nil {
			a.end()
		}
	})
	return err
}
