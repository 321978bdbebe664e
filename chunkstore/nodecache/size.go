package nodecache

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// units are those of ParseSize, in bytes. Longer ones come before those that
// they end with.
var units = []struct {
	name  string
	bytes int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"KB", 1e3}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
	{"B", 1}, {"", 1},
}

// Unlimited is the size of a cache that may take any.
const Unlimited int64 = math.MaxInt64

// ParseSize reads a size such as 20GiB, 1.5TB or a plain number of bytes.
func ParseSize(s string) (int64, error) {
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		// ParseFloat takes more than a size is written with.
		n, err := strconv.ParseFloat(digits, 64)
		if err != nil || strings.Trim(digits, "0123456789.") != "" || n*float64(u.bytes) >= math.MaxInt64 {
			break
		}
		return int64(n * float64(u.bytes)), nil
	}
	return 0, fmt.Errorf("size %q: want a number with KiB, MiB, GiB, TiB, KB, MB, GB, TB or nothing for bytes, as in 20GiB", s)
}

// Reserve is the free space that a cache leaves on its file system.
type Reserve struct {
	Percent float64 // of the file system
	Bytes   int64   // if Percent is 0; otherwise at most these, 0: no bound
}

// DefaultReserve is what a cache leaves free unless it is told otherwise.
var DefaultReserve = Reserve{Percent: 5, Bytes: 10 << 30}

// ParseReserve reads a reserve: a share such as 5%, or a size.
func ParseReserve(s string) (Reserve, error) {
	if digits, ok := strings.CutSuffix(s, "%"); ok {
		n, err := strconv.ParseFloat(digits, 64)
		if err != nil || strings.Trim(digits, "0123456789.") != "" || n >= 100 {
			return Reserve{}, fmt.Errorf("reserve %q: want a share below 100%%, or a size as 2GiB", s)
		}
		return Reserve{Percent: n}, nil
	}
	n, err := ParseSize(s)
	if err != nil {
		return Reserve{}, fmt.Errorf("reserve %q: want a share as 5%%, or a size as 2GiB", s)
	}
	return Reserve{Bytes: n}, nil
}

// of returns the reserve on a file system of size bytes.
func (r Reserve) of(size int64) int64 {
	if r.Percent == 0 {
		return r.Bytes
	}
	n := int64(float64(size) * r.Percent / 100)
	if r.Bytes > 0 {
		n = min(n, r.Bytes)
	}
	return n
}
