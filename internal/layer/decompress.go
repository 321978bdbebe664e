package layer

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is the zstd window that is accepted, in bytes: that of the zstd
// command without --long, and so of every layer that an engine can read.
const maxWindow = 128 << 20

// Decompress returns the plain bytes of r, which it recognises by its first
// bytes: those of gzip or zstd, or r itself where it is in neither form. format
// names the form, "" for none. Close leaves r open.
func Decompress(r io.Reader) (plain io.ReadCloser, format string, err error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(10)
	if err != nil && err != io.EOF {
		return nil, "", err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, "", fmt.Errorf("gzip: %w", noEOF(err))
		}
		return named{"gzip", z}, "gzip", nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		// A skippable frame: zstd:chunked puts some behind the content, and
		// a writer may put one in front.
		len(magic) >= 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:4], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, "", fmt.Errorf("zstd: %w", err)
		}
		return named{"zstd", z.IOReadCloser()}, "zstd", nil
	case len(magic) == 10 && bytes.HasPrefix(magic, []byte("BZh")) && bytes.Equal(magic[4:], []byte("1AY&SY")):
		return nil, "", errors.New("compressed with bzip2: only gzip, zstd and plain tar can be read")
	case bytes.HasPrefix(magic, []byte("\xfd7zXZ\x00")):
		return nil, "", errors.New("compressed with xz: only gzip, zstd and plain tar can be read")
	}
	return io.NopCloser(b), "", nil
}

// OpenPlain opens the plain tar of b, decompressed and checked ahead of the
// reader. It fails behind limit bytes, and ends with io.EOF only if the bytes
// are those of b.DiffID. progress is told of the stored bytes read; nil = nobody
// asks.
func OpenPlain(ctx context.Context, b Blob, limit int64, progress func(stored int64)) (io.ReadCloser, error) {
	a, err := openPlain(ctx, b, limit, progress)
	if err != nil {
		return nil, err
	}
	return a, nil
}

func openPlain(ctx context.Context, b Blob, limit int64, progress func(stored int64)) (*ahead, error) {
	c := &check{want: b.DiffID, left: limit, limit: limit}
	if b.DiffID != "" {
		c.sum = sha256.New()
	}
	if b.Plain != nil {
		size := b.Size
		if size < 0 {
			size = math.MaxInt64
		}
		stored := &storedReader{ctx: ctx, r: io.NewSectionReader(b.Plain, 0, size), progress: progress}
		return startAhead(io.NopCloser(stored), io.NopCloser(nil), c), nil
	}
	rc, err := b.Open(ctx)
	if err != nil {
		return nil, err
	}
	plain, _, err := Decompress(&storedReader{ctx: ctx, r: rc, progress: progress})
	if err != nil {
		return nil, errors.Join(err, rc.Close())
	}
	return startAhead(plain, rc, c), nil
}

// check checks and bounds the plain bytes of a layer.
type check struct {
	want        string    // DiffID
	sum         hash.Hash // nil = no DiffID
	left, limit int64     // bytes
}

// next looks at the next bytes and at the error behind them.
func (c *check) next(p piece) piece {
	if c.sum != nil {
		c.sum.Write(p.p)
	}
	if c.left -= int64(len(p.p)); c.left < 0 {
		return piece{p.p[:0], fmt.Errorf("holds more than %d bytes when decompressed: refused", c.limit)}
	}
	if p.err == io.EOF && c.sum != nil {
		if got := fmt.Sprintf("sha256:%x", c.sum.Sum(nil)); got != c.want {
			p.err = fmt.Errorf("its plain content is %s, the image's configuration says %s", got, c.want)
		}
	}
	return p
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
	io.ReadCloser
}

func (n named) Read(p []byte) (int, error) {
	k, err := n.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.name, err)
	}
	return k, err
}

// ahead runs the decompressor in a goroutine of its own, and the check in
// another, so that both work while the bytes before are searched and spooled.
// The bytes stay where they were read to: Peek shows them there.
type ahead struct {
	read   chan piece // not yet checked
	full   chan piece
	free   chan []byte
	stop   chan struct{}
	done   chan struct{}
	plain  io.Closer // the decompressor
	source io.Closer
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
	aheadPieces = 4
	aheadSize   = 256 << 10 // bytes
)

func startAhead(plain io.ReadCloser, source io.Closer, c *check) *ahead {
	a := &ahead{
		read: make(chan piece, aheadPieces), full: make(chan piece, aheadPieces), free: make(chan []byte, aheadPieces),
		stop: make(chan struct{}), done: make(chan struct{}),
		plain: plain, source: source,
	}
	for range aheadPieces {
		a.free <- nil
	}
	go func() {
		defer close(a.done)
		defer close(a.read)
		for {
			select {
			case <-a.stop:
				return
			case p := <-a.free:
				if p == nil {
					p = make([]byte, aheadSize)
				}
				n, err := io.ReadFull(plain, p)
				if err == io.ErrUnexpectedEOF && n < len(p) {
					// ReadFull's word for the end behind n bytes; a decompressor's
					// own unexpected end has its name around it.
					err = io.EOF
				}
				a.read <- piece{p[:n], err} // never blocks: there are no more pieces than places
				if err != nil {
					return
				}
			}
		}
	}()
	go func() {
		for p := range a.read {
			p = c.next(p)
			a.full <- p // never blocks either
			if p.err != nil {
				return
			}
		}
	}()
	return a
}

// fill waits for bytes if none are at hand.
func (a *ahead) fill() error {
	for len(a.rest) == 0 {
		if a.whole != nil {
			a.free <- a.whole[:cap(a.whole)]
			a.whole = nil
		}
		if a.err != nil {
			return a.err
		}
		next := <-a.full
		a.whole, a.rest, a.err = next.p, next.p, next.err
	}
	return nil
}

func (a *ahead) Read(p []byte) (int, error) {
	if err := a.fill(); err != nil {
		return 0, err
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Buffered, Peek and Discard are those of a bufio.Reader, but for Peek, which
// shows at most what is buffered, or one byte.
func (a *ahead) Buffered() int { return len(a.rest) }

func (a *ahead) Peek(n int) ([]byte, error) {
	if err := a.fill(); err != nil {
		return nil, err
	}
	return a.rest[:n], nil
}

func (a *ahead) Discard(n int) (int, error) {
	left := n
	for left > 0 {
		if err := a.fill(); err != nil {
			return n - left, err
		}
		k := min(left, len(a.rest))
		a.rest, left = a.rest[k:], left-k
	}
	return n, nil
}

// Close stops the goroutines and closes the source. Closing the source first
// ends a read that waits for the network.
func (a *ahead) Close() (err error) {
	a.once.Do(func() {
		close(a.stop)
		err = a.source.Close()
		<-a.done
		_ = a.plain.Close() // it only gives up memory
	})
	return err
}
