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
	Avg int // mean size aimed at; profile v1 cuts random bytes to 63 KiB on average
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
	gear     *[256]uint64
	min, max int    // bytes
	centre   int    // where lenient takes over from strict, bytes from the last cut
	strict   uint64 // a cut before centre needs a hash below it
	lenient  uint64 // a cut from centre on needs a hash below it
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
		gear:    gear(),
		min:     p.Min,
		max:     p.Max,
		centre:  p.Avg - (p.Avg-p.Min)/4,
		strict:  math.MaxUint64 / (4 * uint64(p.Avg)),
		lenient: math.MaxUint64 / uint64(p.Avg) * 4,
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
	if at := c.find(data, c.min, centre, c.strict); at < centre {
		return at
	}
	return c.find(data, centre, len(data), c.lenient)
}

// find returns the first position from lo on, and before hi, at which the hash
// is below threshold, or hi.
func (c *Chunker) find(data []byte, lo, hi int, threshold uint64) int {
	for lo+2*lane <= hi && !c.below(data[lo-window:], threshold) {
		lo += 2 * lane
	}
	h := c.hash(data[lo-window : lo])
	for ; lo < hi; lo++ {
		if h < threshold {
			return lo
		}
		h = h<<1 + c.gear[data[lo]]
	}
	return hi
}

// lane is the number of positions that below walks through twice at once.
const lane = 1024

// below reports whether the hash is below threshold at one of the 2*lane
// positions from data[window] on. Each step of the hash waits for the one
// before; two walks side by side keep the processor busy meanwhile, which makes
// up for finding the position once more.
func (c *Chunker) below(data []byte, threshold uint64) bool {
	gear := c.gear
	first := (*[lane]byte)(data[window:])
	second := (*[lane]byte)(data[window+lane:])
	h := c.hash(data[:window])
	k := c.hash(data[lane : lane+window])
	for i := 0; i <= lane-4; i += 4 {
		a, b := (*[4]byte)(first[i:]), (*[4]byte)(second[i:])
		if h < threshold || k < threshold {
			return true
		}
		h, k = h<<1+gear[a[0]], k<<1+gear[b[0]]
		if h < threshold || k < threshold {
			return true
		}
		h, k = h<<1+gear[a[1]], k<<1+gear[b[1]]
		if h < threshold || k < threshold {
			return true
		}
		h, k = h<<1+gear[a[2]], k<<1+gear[b[2]]
		if h < threshold || k < threshold {
			return true
		}
		h, k = h<<1+gear[a[3]], k<<1+gear[b[3]]
	}
	return false
}

// hash returns the gear hash of window bytes.
func (c *Chunker) hash(data []byte) uint64 {
	var h uint64
	for _, b := range data {
		h = h<<1 + c.gear[b]
	}
	return h
}
