package index

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/container-bootfs/bootfs/chunker"
)

// Chunk is one entry of an Index.
type Chunk struct {
	ID     ID
	Offset int64 // in the root image, bytes
	Size   int   // bytes, 1 … Params().Max
}

// Index is the ordered list of the chunks that make up a root image. It reads
// the bytes it was opened on and is safe for concurrent use.
type Index struct {
	table  []byte // the entries, entrySize bytes each
	size   int64
	params chunker.Params
	digest Digest
}

// Sniff reports whether b, the first 16 bytes of a file or more, begins an
// index.
func Sniff(b []byte) bool {
	return len(b) >= 16 && binary.LittleEndian.Uint64(b) == headerSize && binary.LittleEndian.Uint64(b[8:]) == headerType
}

// Open returns the Index whose file b holds. b is kept, not copied, and must
// not change. The cost does not depend on the number of chunks: entries are
// checked by At when they are used, or all of them by Verify.
func Open(b []byte) (*Index, error) {
	if len(b) < tableStart+tailSize {
		return nil, fmt.Errorf("index: got %d bytes, want at least %d", len(b), tableStart+tailSize)
	}
	u64 := func(off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	tail := len(b) - tailSize
	for _, f := range []struct {
		name      string
		off       int
		want, got uint64
	}{
		{"header size", 0, headerSize, u64(0)},
		{"header type", 8, headerType, u64(8)},
		{"table size", 48, math.MaxUint64, u64(48)},
		{"table type", 56, tableType, u64(56)},
		{"tail marker", tail + 32, tailMarker, u64(tail + 32)},
		{"tail", tail, 0, u64(tail)},
		{"tail", tail + 8, 0, u64(tail + 8)},
		{"header size in tail", tail + 16, headerSize, u64(tail + 16)},
		{"table size in tail", tail + 24, uint64(len(b) - headerSize), u64(tail + 24)},
	} {
		if f.got != f.want {
			return nil, fmt.Errorf("index: %s at offset %d: got %#x, want %#x", f.name, f.off, f.got, f.want)
		}
	}
	flags := u64(16)
	if unknown := flags &^ knownFlags; unknown != 0 {
		return nil, fmt.Errorf("index: feature flags at offset 16: got %#x, of which %#x are not those of a blob index", flags, unknown)
	}
	smallest, average, largest := u64(24), u64(32), u64(40)
	if smallest < 1 || average < smallest || largest < average || largest > chunker.MaxSize {
		return nil, fmt.Errorf("index: chunk sizes at offset 24: got min %d, avg %d, max %d, want 1 <= min <= avg <= max <= %d",
			smallest, average, largest, chunker.MaxSize)
	}
	table := b[tableStart:tail]
	if len(table)%entrySize != 0 {
		return nil, fmt.Errorf("index: table: got %d bytes of entries, want a multiple of %d", len(table), entrySize)
	}
	x := &Index{
		table:  table,
		params: chunker.Params{Min: int(smallest), Avg: int(average), Max: int(largest)},
	}
	if flags&flagSHA512_256 != 0 {
		x.digest = SHA512_256
	}
	if n := x.Len(); n > 0 {
		end := x.end(n - 1)
		if end > math.MaxInt64 {
			return nil, fmt.Errorf("index: entry %d: got end %d, want at most %d", n-1, end, int64(math.MaxInt64))
		}
		x.size = int64(end)
	}
	return x, nil
}

// Len returns the number of chunks.
func (x *Index) Len() int { return len(x.table) / entrySize }

// Size returns the length of the root image in bytes.
func (x *Index) Size() int64 { return x.size }

// Digest returns the hash function that names the chunks.
func (x *Index) Digest() Digest { return x.digest }

// Params returns the sizes that the chunks were cut by. A chunk may be shorter
// than Min: file bounds cut too.
func (x *Index) Params() chunker.Params { return x.params }

// end returns the offset behind chunk i, unchecked.
func (x *Index) end(i int) uint64 {
	return binary.LittleEndian.Uint64(x.table[i*entrySize:])
}

// At returns chunk i, 0 <= i < Len. It is an error if the entry does not fit
// its neighbour or the sizes of the index.
func (x *Index) At(i int) (Chunk, error) {
	if i < 0 || i >= x.Len() {
		return Chunk{}, fmt.Errorf("index: got chunk %d, want 0 to %d", i, x.Len()-1)
	}
	var start uint64
	if i > 0 {
		start = x.end(i - 1)
	}
	end := x.end(i)
	if end <= start || end-start > uint64(x.params.Max) || end > uint64(x.size) {
		return Chunk{}, fmt.Errorf("index: entry %d: got bytes %d to %d, want 1 to %d bytes within %d",
			i, start, end, x.params.Max, x.size)
	}
	return Chunk{
		ID:     ID(x.table[i*entrySize+8 : (i+1)*entrySize]),
		Offset: int64(start),
		Size:   int(end - start),
	}, nil
}

// Find returns the position of the chunk that holds byte off, 0 <= off < Size.
// In a damaged index it may be another chunk's, which At's Offset and Size
// tell; it is always a valid position if Len is not 0.
func (x *Index) Find(off int64) int {
	lo, hi := 0, x.Len()-1
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if x.end(mid) > uint64(off) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// Verify checks every entry, as At does.
func (x *Index) Verify() error {
	for i := range x.Len() {
		if _, err := x.At(i); err != nil {
			return err
		}
	}
	return nil
}
