package index

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/container-bootfs/bootfs/chunker"
)

var errClosed = errors.New("index: writer is closed")

// Writer writes an index, chunk by chunk.
type Writer struct {
	w     *bufio.Writer
	max   int
	end   int64 // of the last chunk in the image, bytes
	count int64 // chunks
	err   error // the first one; every later call returns it
}

// NewWriter writes to w the index of a root image that was cut by p and whose
// chunks d names. An error shows with the first Append or with Close.
func NewWriter(w io.Writer, p chunker.Params, d Digest) *Writer {
	xw := &Writer{w: bufio.NewWriter(w), max: p.Max}
	if p.Min < 1 || p.Avg < p.Min || p.Max < p.Avg || p.Max > chunker.MaxSize {
		xw.err = fmt.Errorf("index: got chunk sizes min %d, avg %d, max %d, want 1 <= min <= avg <= max <= %d",
			p.Min, p.Avg, p.Max, chunker.MaxSize)
		return xw
	}
	var flags uint64
	if d == SHA512_256 {
		flags = flagSHA512_256
	}
	xw.u64(headerSize, headerType, flags, uint64(p.Min), uint64(p.Avg), uint64(p.Max), math.MaxUint64, tableType)
	return xw
}

// u64 writes numbers, unless something failed before.
func (w *Writer) u64(vs ...uint64) {
	var b [8]byte
	for _, v := range vs {
		if w.err == nil {
			binary.LittleEndian.PutUint64(b[:], v)
			_, w.err = w.w.Write(b[:])
		}
	}
}

// Append adds the chunk that follows in the image: size bytes named id.
func (w *Writer) Append(id ID, size int) error {
	if w.err != nil {
		return w.err
	}
	if size < 1 || size > w.max {
		w.err = fmt.Errorf("index: chunk %d, %s: got %d bytes, want 1 to %d", w.count, id, size, w.max)
		return w.err
	}
	if w.end > math.MaxInt64-int64(size) {
		w.err = fmt.Errorf("index: chunk %d, %s: the image exceeds %d bytes", w.count, id, int64(math.MaxInt64))
		return w.err
	}
	w.end += int64(size)
	w.count++
	w.u64(uint64(w.end))
	if w.err == nil {
		_, w.err = w.w.Write(id[:])
	}
	return w.err
}

// Close writes what ends the index. It does not close the underlying writer.
func (w *Writer) Close() error {
	if w.err != nil {
		return w.err
	}
	w.u64(0, 0, headerSize, uint64(tableStart-headerSize+tailSize)+uint64(w.count)*entrySize, tailMarker)
	if w.err == nil {
		w.err = w.w.Flush()
	}
	if w.err != nil {
		return w.err
	}
	w.err = errClosed
	return nil
}
