package chunkstore

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
)

// CorruptError says that a store returned other bytes than those that a
// chunk's name stands for.
type CorruptError struct {
	ID    index.ID
	Where string // the store, or the place in it; empty until it is known
	Got   string
	Want  string
}

func (e *CorruptError) Error() string {
	where := ""
	if e.Where != "" {
		where = " in " + e.Where
	}
	return fmt.Sprintf("chunk %s%s is corrupt: got %s, want %s", e.ID, where, e.Got, e.Want)
}

// reason is Error for a message that names the chunk and the store.
func (e *CorruptError) reason(store string) string {
	where := ""
	if e.Where != "" && e.Where != store {
		where = " in " + e.Where
	}
	return fmt.Sprintf("it is corrupt%s: got %s, want %s", where, e.Got, e.Want)
}

// encoder makes frames at one of zstd's levels. It is made at first use, and by
// a function, not a variable: so a program that only reads neither pays for it nor
// links it.
type encoder struct {
	once sync.Once
	zstd *zstd.Encoder
}

var quick, thorough encoder

// encode appends a frame. It carries no checksum of zstd's, as a chunk's name is
// one, and is a single segment: only those always state their content size.
func (e *encoder) encode(dst, plain []byte, level zstd.EncoderLevel) []byte {
	e.once.Do(func() {
		var err error
		e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithWindowSize(chunker.MaxSize), zstd.WithEncoderLevel(level))
		if err != nil {
			panic(err) // the options are constants
		}
	})
	return e.zstd.EncodeAll(plain, dst)
}

// decoder works within the capacity that it is given: a frame that claims or
// unpacks to more is refused, not allocated.
var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderConcurrency(0))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
})

// decodeSlack is how many bytes of room behind a frame's content let zstd copy whole
// words, in two thirds of the time.
const decodeSlack = 16

// Encode appends the stored form of plain, one zstd frame that states its
// content size, to dst. The same plain bytes give the same frame on every
// machine.
func Encode(dst, plain []byte) []byte {
	return quick.encode(dst, plain, zstd.SpeedDefault)
}

// EncodeThoroughly is Encode for bytes that are worth ten times the work: the
// frame is 6 % smaller, as programs and libraries go, and is read as fast.
func EncodeThoroughly(dst, plain []byte) []byte {
	return thorough.encode(dst, plain, zstd.SpeedBestCompression)
}

// Decode appends the plain bytes of chunk c, whose stored form frame is, to
// dst. Beside what Encode makes, frame may be all that casync and desync store:
// zstd, xz, gzip or the plain bytes. d names c. The bytes are those that c's
// name stands for, or the result is dst and a *CorruptError. What is allocated
// depends on c.Size, whatever the frame says.
func Decode(dst, frame []byte, d index.Digest, c index.Chunk) ([]byte, error) {
	if err := checkSize(c); err != nil {
		return dst, err
	}
	corrupt := func(got, want string) ([]byte, error) {
		return dst, &CorruptError{ID: c.ID, Got: got, Want: want}
	}
	start := len(dst)
	grown := slices.Grow(dst, c.Size+decodeSlack)[:start+c.Size]
	plain := grown[start:]
	n, format, err := unpackForeign(plain, frame)
	if format == "" {
		var out []byte
		out, err = decoder().DecodeAll(frame, plain[:0:c.Size+decodeSlack])
		n, format = len(out), "zstd"
	}
	if (err != nil || n != c.Size) && len(frame) == c.Size && d.Sum(frame) == c.ID {
		copy(plain, frame)
		return grown, nil
	}
	switch {
	case errors.Is(err, zstd.ErrDecoderSizeExceeded), errors.Is(err, errTooLong), n > c.Size:
		return corrupt("more", fmt.Sprintf("%d bytes", c.Size))
	case err != nil:
		return corrupt(fmt.Sprintf("%d bytes that are no %s frame (%v)", len(frame), format, err), fmt.Sprintf("%d bytes of plain content", c.Size))
	case n != c.Size:
		return corrupt(fmt.Sprintf("%d bytes", n), fmt.Sprintf("%d bytes", c.Size))
	}
	if id := d.Sum(plain); id != c.ID {
		return corrupt(d.String()+" "+hex.EncodeToString(id[:]), "that of its name")
	}
	return grown, nil
}

// checkSize refuses a chunk that no index may hold.
func checkSize(c index.Chunk) error {
	if c.Size < 1 || c.Size > chunker.MaxSize {
		return fmt.Errorf("chunk %s: got a size of %d bytes, want 1 to %d", c.ID, c.Size, chunker.MaxSize)
	}
	return nil
}

// Identify finds out which digest names chunk id, whose stored form is frame, and
// how many plain bytes it has: for chunks of which no index is at hand. buf may
// have room to unpack it. The error is a *CorruptError when the bytes are not
// those that id stands for.
func Identify(buf, frame []byte, id index.ID) (d index.Digest, size int, err error) {
	plain := slices.Grow(buf[:0], chunker.MaxSize)[:chunker.MaxSize]
	n, format, err := unpackForeign(plain, frame)
	if format == "" {
		var out []byte
		out, err = decoder().DecodeAll(frame, plain[:0:chunker.MaxSize])
		n, format = len(out), "zstd"
	}
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		if err == nil && n > 0 && d.Sum(plain[:n]) == id {
			return d, n, nil
		}
		if len(frame) <= chunker.MaxSize && d.Sum(frame) == id {
			return d, len(frame), nil
		}
	}
	got := fmt.Sprintf("%d bytes of another name", n)
	if err != nil {
		got = fmt.Sprintf("%d bytes that are no %s frame (%v)", len(frame), format, err)
	}
	return 0, 0, &CorruptError{ID: id, Got: got, Want: "those of its name"}
}
