package chunker

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// naiveCut is the definition of Cut, written down without regard to speed.
func naiveCut(c *Chunker, data []byte) int {
	if len(data) <= c.min {
		return len(data)
	}
	end := min(len(data), c.max)
	for at := c.min; at < end; at++ {
		var h uint64
		for k := range window {
			h += c.gear[data[at-1-k]] << k
		}
		threshold := c.strict
		if at >= c.centre {
			threshold = c.lenient
		}
		if h < threshold {
			return at
		}
	}
	return end
}

func newChunker(t testing.TB, p Params) *Chunker {
	t.Helper()
	c, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// cuts returns the lengths of data's chunks.
func cuts(c *Chunker, data []byte) []int {
	var lens []int
	for len(data) > 0 {
		n := c.Cut(data)
		lens = append(lens, n)
		data = data[n:]
	}
	return lens
}

// random returns n reproducible bytes.
func random(seed, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], uint64(seed))
	rand.NewChaCha8(key).Read(b)
	return b
}

func TestValidate(t *testing.T) {
	for _, p := range []Params{V1, {64, 64, 64}, {64, 64, MaxSize}, {MaxSize, MaxSize, MaxSize}, {1000, 3001, 70000}} {
		if err := p.Validate(); err != nil {
			t.Errorf("%+v: %v", p, err)
		}
	}
	for _, p := range []Params{
		{}, {63, 64, 64}, {-1, 64, 64}, {65, 64, 128}, {64, 129, 128}, {64, 64, MaxSize + 1}, {64, -1, 128},
	} {
		if err := p.Validate(); err == nil {
			t.Errorf("%+v: got no error", p)
		}
		if _, err := New(p); err == nil {
			t.Errorf("New(%+v): got no error", p)
		}
	}
}

// TestGear computes the table in another way: from the documented seed, and
// checks the property that the seed was chosen for.
func TestGear(t *testing.T) {
	c := newChunker(t, V1)
	all := sha256.New()
	for b, got := range c.gear {
		sum := sha256.Sum256([]byte("bootfs gear v1" + string([]byte{byte(b)})))
		if want := binary.BigEndian.Uint64(sum[:8]); got != want {
			t.Errorf("gear[%d]: got %#x, want %#x", b, got, want)
		}
		binary.Write(all, binary.BigEndian, got)
		if n := c.Cut(bytes.Repeat([]byte{byte(b)}, V1.Max+1)); n != V1.Max {
			t.Errorf("a run of byte %d: got a cut at %d, want %d", b, n, V1.Max)
		}
	}
	const want = "fcdc84c20afc180f5c30d1d303d35766163621adfac7d021468b802416c45901"
	if got := fmt.Sprintf("%x", all.Sum(nil)); got != want {
		t.Errorf("SHA-256 of the table: got %s, want %s", got, want)
	}
}

// TestGolden freezes the cuts of profile v1. If it fails, images made by this
// release share nothing with those made before: make a new profile instead.
func TestGolden(t *testing.T) {
	c := newChunker(t, V1)
	for _, test := range []struct {
		name string
		data []byte
		want []int
	}{
		// rand.NewChaCha8 with the seed in the key's first eight bytes,
		// little endian, and zeros behind it.
		{"ChaCha8 seed 1, 1 MiB", random(1, 1<<20), []int{
			64278, 45529, 69566, 47199, 59904, 121970, 55820, 55635, 56699,
			60842, 71396, 83295, 54085, 68017, 73391, 36491, 24459,
		}},
		{"ChaCha8 seed 2, 4 values a byte, 1 MiB", fourValues(random(2, 1<<20)), []int{
			130524, 62284, 53842, 79478, 61730, 58694, 67017, 75685,
			57964, 31260, 101962, 79126, 85819, 58932, 44259,
		}},
		{"600 KiB of zeros", make([]byte, 600<<10), []int{256 << 10, 256 << 10, 88 << 10}},
		{"decimal numbers, 512 KiB", decimals(512 << 10), []int{53389, 79630, 29126, 65694, 93713, 96186, 56495, 50055}},
	} {
		if got := cuts(c, test.data); !slices.Equal(got, test.want) {
			t.Errorf("%s: got %d, want %d", test.name, got, test.want)
		}
	}
	// Many more, as one hash of their lengths.
	sum := sha256.New()
	for seed := range 16 {
		for _, n := range cuts(c, random(100+seed, 4<<20)) {
			binary.Write(sum, binary.BigEndian, uint32(n))
		}
	}
	const want = "d03032f73718affbcc61a37821cacad6e4254c9906ba0363a229a33765a5c87d"
	if got := fmt.Sprintf("%x", sum.Sum(nil)); got != want {
		t.Errorf("cuts of 64 MiB: got SHA-256 %s, want %s", got, want)
	}
}

// fourValues makes data that repeat themselves more than random ones.
func fourValues(data []byte) []byte {
	for i := range data {
		data[i] &= 3
	}
	return data
}

func decimals(n int) []byte {
	var b []byte
	for i := 0; len(b) < n; i++ {
		b = fmt.Appendf(b, "%d\n", i)
	}
	return b[:n]
}

// TestNaive compares Cut with its definition at every size around the bounds
// that the loops have.
func TestNaive(t *testing.T) {
	for _, p := range []Params{
		V1,
		{64, 64, 64},
		{64, 65, 66},
		{64, 256, 1024},
		{64, 512, 64 << 10},
		{100, 4000, 20000},
		{2 << 10, 8 << 10, 8 << 10},
		{2 << 10, 8 << 10, 32 << 10},
		{window + lane, window + 4*lane, window + 9*lane},
	} {
		c := newChunker(t, p)
		sizes := []int{0, 1}
		for _, bound := range []int{
			p.Min, c.centre, p.Avg, p.Max,
			p.Min + lane, p.Min + 2*lane, p.Min + 4*lane, c.centre + lane, c.centre + 2*lane,
		} {
			sizes = append(sizes, bound-1, bound, bound+1)
		}
		for seed := range 4 {
			for _, n := range sizes {
				if n < 0 {
					continue
				}
				data := random(seed, n)
				if got, want := c.Cut(data), naiveCut(c, data); got != want {
					t.Errorf("%+v, seed %d, %d bytes: got a cut at %d, want %d", p, seed, n, got, want)
				}
			}
		}
		data := random(int(p.Avg), 16*p.Avg)
		for len(data) > 0 {
			got, want := c.Cut(data), naiveCut(c, data)
			if got != want {
				t.Fatalf("%+v, %d bytes before the end: got a cut at %d, want %d", p, len(data), got, want)
			}
			data = data[got:]
		}
	}
}

func TestSizes(t *testing.T) {
	c := newChunker(t, V1)
	data := random(7, 64<<20)
	lens := cuts(c, data)
	for i, n := range lens {
		if n > V1.Max || n < V1.Min && i < len(lens)-1 {
			t.Errorf("chunk %d: got %d bytes, want %d to %d", i, n, V1.Min, V1.Max)
		}
	}
	mean := len(data) / len(lens)
	if mean < V1.Avg*95/100 || mean > V1.Avg*105/100 {
		t.Errorf("mean chunk: got %d bytes, want %d within 5 %%", mean, V1.Avg)
	}
}

// TestResynchronise: behind an insertion the old cuts come back.
func TestResynchronise(t *testing.T) {
	c := newChunker(t, V1)
	for seed := range 8 {
		data := random(seed, 8<<20)
		known := make(map[[32]byte]bool)
		for rest := data; len(rest) > 0; {
			n := c.Cut(rest)
			known[sha256.Sum256(rest[:n])] = true
			rest = rest[n:]
		}
		at := 1 << 20
		changed := slices.Concat(data[:at], []byte("inserted"), data[at:])
		fresh := 0
		for rest := changed; len(rest) > 0; {
			n := c.Cut(rest)
			if !known[sha256.Sum256(rest[:n])] {
				fresh += n
			}
			rest = rest[n:]
		}
		if fresh > 1<<20 {
			t.Errorf("seed %d: got %d new bytes behind an insertion, want at most %d", seed, fresh, 1<<20)
		}
	}
}

func TestCutDoesNotAllocate(t *testing.T) {
	c := newChunker(t, V1)
	data := random(1, V1.Max)
	if n := testing.AllocsPerRun(10, func() { c.Cut(data) }); n != 0 {
		t.Errorf("got %v allocations per cut, want 0", n)
	}
}

func FuzzCut(f *testing.F) {
	f.Add(random(1, 5000), uint16(64), uint16(200), uint16(3000))
	f.Add(make([]byte, 3000), uint16(64), uint16(64), uint16(64))
	f.Add(fourValues(random(2, 9000)), uint16(100), uint16(5000), uint16(8500))
	f.Fuzz(func(t *testing.T, data []byte, smallest, average, largest uint16) {
		data = data[:min(len(data), 32<<10)] // the definition is slow
		c, err := New(Params{int(smallest), int(average), int(largest)})
		if err != nil {
			return
		}
		for {
			got, want := c.Cut(data), naiveCut(c, data)
			if got != want {
				t.Fatalf("%d bytes before the end: got a cut at %d, want %d", len(data), got, want)
			}
			if len(data) == 0 {
				return
			}
			if got == 0 {
				t.Fatalf("got an empty chunk, %d bytes remain", len(data))
			}
			data = data[got:]
		}
	})
}

func BenchmarkCut(b *testing.B) {
	data := random(1, 32<<20)
	c := newChunker(b, V1)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		for rest := data; len(rest) > 0; {
			rest = rest[c.Cut(rest):]
		}
	}
}
