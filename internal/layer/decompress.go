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

// OpenPlain opens the plain tar of b, decompressed ahead of the reader. It
// fails behind limit bytes, and ends with io.EOF only if the bytes are those
// of b.DiffID. progress is told of the stored bytes read; nil = nobody asks.
func OpenPlain(ctx context.Context, b Blob, limit int64, progress func(stored int64)) (io.ReadCloser, error) {
	p := &plainReader{want: b.DiffID, left: limit, limit: limit}
	if b.DiffID != "" {
		p.sum = sha256.New()
	}
	if b.Plain != nil {
		size := b.Size
		if size < 0 {
			size = math.MaxInt64
		}
		stored := &storedReader{ctx: ctx, r: io.NewSectionReader(b.Plain, 0, size), progress: progress}
		p.ReadCloser = startAhead(io.NopCloser(stored), io.NopCloser(nil))
		return p, nil
	}
	rc, err := b.Open(ctx)
	if err != nil {
		return nil, err
	}
	plain, _, err := Decompress(&storedReader{ctx: ctx, r: rc, progress: progress})
	if err != nil {
		return nil, errors.Join(err, rc.Close())
	}
	p.ReadCloser = startAhead(plain, rc)
	return p, nil
}

// plainReader checks and bounds the plain bytes of a layer.
type plainReader struct {
	io.ReadCloser
	want        string    // DiffID
	sum         hash.Hash // nil = no DiffID
	left, limit int64     // bytes
}

func (r *plainReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if r.sum != nil {
		r.sum.Write(p[:n])
	}
	if r.left -= int64(n); r.left < 0 {
		return 0, fmt.Errorf("holds more than %d bytes when decompressed: refused", r.limit)
	}
	if err == io.EOF && r.sum != nil {
		if got := fmt.Sprintf("sha256:%x", r.sum.Sum(nil)); got != r.want {
			err = fmt.Errorf("its plain content is %s, the image's configuration says %s", got, r.want)
		}
	}
	return n, err
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

// ahead runs the decompressor in a goroutine of its own, so that it works
// while the bytes before are hashed, searched and spooled.
type ahead struct {
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
	aheadPieces = 3
	aheadSize   = 256 << 10 // bytes
)

func startAhead(plain io.ReadCloser, source io.Closer) *ahead {
	a := &ahead{
		full: make(chan piece, aheadPieces), free: make(chan []byte, aheadPieces),
		stop: make(chan struct{}), done: make(chan struct{}),
		plain: plain, source: source,
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
				n, err := io.ReadFull(plain, p)
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
		_ = a.plain.Close() // it only gives up memory
	})
	return err
}
