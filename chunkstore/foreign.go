package chunkstore

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"github.com/mikelolasagasti/xz"
)

// What a stored chunk of casync begins with, other than zstd's magic.
var (
	gzipMagic = []byte{0x1f, 0x8b}
	xzMagic   = []byte{0xfd, '7', 'z', 'X', 'Z', 0}
)

// errTooLong says that a frame unpacks to more than its chunk has.
var errTooLong = errors.New("more than expected")

// unpackForeign unpacks frame into dst, which has room for the whole chunk, and
// returns how many bytes that gave. name is the format, "" if it is none of
// casync's older ones.
func unpackForeign(dst, frame []byte) (n int, name string, err error) {
	var r io.Reader
	switch {
	case bytes.HasPrefix(frame, gzipMagic):
		name = "gzip"
		g := gzipReaders.Get().(*gzip.Reader)
		defer gzipReaders.Put(g)
		r, err = g, g.Reset(bytes.NewReader(frame))
	case bytes.HasPrefix(frame, xzMagic):
		name = "xz"
		r, err = newXZ(frame, len(dst))
	}
	if name == "" || err != nil {
		return 0, name, err
	}
	n, err = io.ReadFull(r, dst)
	switch err {
	case nil:
		// What follows is the format's own checksum, or too much.
		switch k, err := io.ReadFull(r, make([]byte, 1)); {
		case k > 0:
			return n, name, errTooLong
		case err != io.EOF:
			return n, name, err
		}
	case io.EOF, io.ErrUnexpectedEOF:
		if _, more := r.Read(make([]byte, 1)); more != io.EOF {
			return n, name, err // the frame ends too early, not the chunk
		}
		err = nil
	}
	return n, name, err
}

var gzipReaders = sync.Pool{New: func() any { return new(gzip.Reader) }}

// The layout of an xz stream's beginning: the stream header, and the header of
// the first block.
//
//	 0      12 bytes stream header
//	12  u8  size of the block header in units of 4 bytes, without the first
//	    u8  flags: number of filters - 1, 0x40 and 0x80 for the sizes that follow
//	        compressed and uncompressed size, if there, 7 bits a byte
//	        filter: u8 0x21 for LZMA2, u8 1, u8 size of the dictionary
//	        zeros
//	    u32 CRC-32 of the block header before it
const (
	xzHeader     = 12
	xzFilters    = 0x03
	xzCompressed = 0x40
	xzPlain      = 0x80
	xzLZMA2      = 0x21
)

// newXZ returns a reader of the xz stream frame, which is to give size bytes.
// What a stream says of its dictionary is only an upper bound of the distances
// in it, 8 MiB in every chunk of casync's: the one that is allocated is no
// larger than the chunk needs.
func newXZ(frame []byte, size int) (io.Reader, error) {
	dict, length := xzDictionary(size)
	head, err := xzBlockHeader(frame)
	if err != nil {
		return nil, err
	}
	in := io.Reader(bytes.NewReader(frame))
	if at := xzDictionaryAt(head); at > 0 && head[at] > dict {
		small := bytes.Clone(frame[:xzHeader+len(head)+crc32.Size])
		small[xzHeader+at] = dict
		sum := crc32.ChecksumIEEE(small[xzHeader : xzHeader+len(head)])
		binary.LittleEndian.PutUint32(small[xzHeader+len(head):], sum)
		in = io.MultiReader(bytes.NewReader(small), bytes.NewReader(frame[len(small):]))
	}
	return xz.NewReader(in, length)
}

// xzDictionary returns how xz writes the size of the smallest dictionary for n
// bytes, and that size.
func xzDictionary(n int) (code byte, length uint32) {
	for {
		length = uint32(2|code&1) << (code/2 + 11)
		if int(length) >= n {
			return code, length
		}
		code++
	}
}

// xzBlockHeader returns the first block header of an xz stream, without its
// checksum, which it compares.
func xzBlockHeader(frame []byte) ([]byte, error) {
	if len(frame) <= xzHeader {
		return nil, io.ErrUnexpectedEOF
	}
	n := int(frame[xzHeader]) * 4
	if n == 0 || len(frame) < xzHeader+n+crc32.Size {
		return nil, errors.New("xz: no block")
	}
	head, rest := frame[xzHeader:xzHeader+n], frame[xzHeader+n:]
	if got, want := crc32.ChecksumIEEE(head), binary.LittleEndian.Uint32(rest); got != want {
		return nil, fmt.Errorf("xz: block header: got checksum %#x, want %#x", got, want)
	}
	return head, nil
}

// xzDictionaryAt returns where in a block header the size of the dictionary
// stands, 0 if LZMA2 is not its only filter.
func xzDictionaryAt(head []byte) int {
	if head[1]&xzFilters != 0 {
		return 0
	}
	at := 2
	for _, flag := range []byte{xzCompressed, xzPlain} {
		if head[1]&flag == 0 {
			continue
		}
		for at < len(head) && head[at]&0x80 != 0 {
			at++
		}
		at++
	}
	if at+2 >= len(head) || head[at] != xzLZMA2 || head[at+1] != 1 {
		return 0
	}
	return at + 2
}
