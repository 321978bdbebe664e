// Package chunker decides where a stream of bytes is cut into chunks.
//
// Give [Chunker.Cut] the bytes that lie ahead; it answers with the length of
// the first chunk. A cut depends only on the 64 bytes before it and on the
// distance from the last cut, so two streams that share a stretch of bytes are
// cut alike there, soon after it begins, whatever stands before it.
//
// The same Params give the same cuts in every release: chunks are named by
// their content, and a fleet's images share only what is cut alike.
package chunker

import (
	"fmt"
	"math"
)

// MaxSize is the largest Params.Max, in bytes. A chunk of it, compressed to no
// avail, still fits a store's bound on a stored chunk.
const MaxSize = 8 << 20

// Params are cutting parameters, in bytes.
type Params struct {
	Min int // no chunk is shorter, but for the last one; at least 64
	Avg int // mean chunk of random bytes, within 3 %, where Max is at least 4 × Avg
	Max int // no chunk is longer; at most MaxSize
}

// V1 are the parameters of profile v1.
var V1 = Params{Min: 16 << 10, Avg: 64 << 10, Max: 256 << 10}

// Validate says what is wrong with p.
func (p Params) Validate() error {
	if p.Min < window || p.Avg < p.Min || p.Max < p.Avg || p.Max > MaxSize {
		return fmt.Errorf("chunk sizes min %d, avg %d, max %d: want %d <= min <= avg <= max <= %d",
			p.Min, p.Avg, p.Max, window, MaxSize)
	}
	return nil
}

// Chunker cuts by one set of Params. It holds no state between cuts and is
// safe for concurrent use.
type Chunker struct {
	gear   *[256]uint64
	min    int
	max    int
	centre int    // where lenient takes over from strict, bytes from the last cut
	strict uint64 // a cut before centre needs a hash below it
	low    uint64 // a cut from centre on needs a hash below it
}

// New returns the Chunker of p.
//
// Cutting is normalised, as FastCDC calls it: up to the centre a cut is four
// times rarer than one in Avg bytes, behind it four times more frequent. That
// gathers sizes around Avg and leaves next to none to be cut by force at Max,
// where cuts would not follow the content. The centre lies a quarter of the
// way from Avg back to Min, which puts the mean at Avg.
func New(p Params) (*Chunker, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	return &Chunker{
		gear:   gear(),
		min:    p.Min,
		max:    p.Max,
		centre: p.Avg - (p.Avg-p.Min)/4,
		strict: math.MaxUint64 / (4 * uint64(p.Avg)),
		low:    math.MaxUint64 / uint64(p.Avg) * 4,
	}, nil
}

// Cut returns the length of the first chunk of data. data holds at least
// Params.Max bytes or all that remain. The result is 0 only for no data.
//
// The cut is at the first c, Min <= c < Max, at which the gear hash of
// data[c-64:c] is below the threshold of c. Without one, and where the data
// end first, it is at Max or at the end.
func (c *Chunker) Cut(data []byte) int {
	if len(data) <= c.min {
		return len(data)
	}
	data = data[:min(len(data), c.max)]
	centre := min(len(data), c.centre)

	var h uint64
	for _, b := range data[c.min-window : c.min] {
		h = h<<1 + c.gear[b]
	}
	// h is the hash before position i; a cut at i is decided before data[i] is
	// taken in.
	i := c.min
	for ; i < centre; i++ {
		if h < c.strict {
			return i
		}
		h = h<<1 + c.gear[data[i]]
	}
	for ; i < len(data); i++ {
		if h < c.low {
			return i
		}
		h = h<<1 + c.gear[data[i]]
	}
	return len(data)
}
