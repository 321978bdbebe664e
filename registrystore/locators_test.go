package registrystore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

// newIndex returns an index of chunks with the given numbers as names, all of
// size bytes.
func newIndex(t testing.TB, size int, numbers ...int) *index.Index {
	t.Helper()
	var b bytes.Buffer
	w := index.NewWriter(&b, chunker.V1, index.SHA256)
	for _, n := range numbers {
		if err := w.Append(numbered(n), size); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	x, err := index.Open(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func digestOf(n int) string { return "sha256:" + numbered(n).String() }

// sample is a valid file of three chunks, the first of which occurs twice and
// the last of which is all zeros.
func sample(t testing.TB) (x *index.Index, packs []PackDescriptor, at []Location, file []byte) {
	t.Helper()
	x = newIndex(t, 100, 1, 2, 1, 3)
	packs = []PackDescriptor{{digestOf(10), 60, true}, {digestOf(11), math.MaxUint32, false}}
	at = []Location{{0, 10, 50}, {1, math.MaxUint32 - 7, 7}, {0, 10, 50}, {}}
	file, err := EncodeLocators(x, packs, at)
	if err != nil {
		t.Fatal(err)
	}
	return x, packs, at, file
}

func TestLocators(t *testing.T) {
	x, packs, at, file := sample(t)
	l, err := OpenLocators(file, x)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Verify(); err != nil {
		t.Error(err)
	}
	if l.Packs() != len(packs) {
		t.Errorf("got %d packs, want %d", l.Packs(), len(packs))
	}
	for i, want := range packs {
		if got, err := l.Pack(i); err != nil || got != want {
			t.Errorf("pack %d: got %+v, %v, want %+v", i, got, err, want)
		}
	}
	for pos, want := range at {
		if got, err := l.At(pos); err != nil || got != want {
			t.Errorf("chunk %d: got %+v, %v, want %+v", pos, got, err, want)
		}
	}
	for n, want := range map[int]int{1: 0, 2: 1, 3: 3} {
		if got, err := l.Lookup(numbered(n)); err != nil || got != want {
			t.Errorf("chunk %d: got position %d, %v, want %d", n, got, err, want)
		}
	}
	if _, err := l.Lookup(numbered(4)); !errors.Is(err, chunkstore.ErrNotFound) {
		t.Errorf("unknown chunk: got %v, want %v", err, chunkstore.ErrNotFound)
	}
	for _, i := range []int{-1, 2, math.MaxInt} {
		if _, err := l.Pack(i); err == nil {
			t.Errorf("pack %d: no error", i)
		}
	}
	for _, pos := range []int{-1, 4, math.MaxInt} {
		if _, err := l.At(pos); err == nil {
			t.Errorf("chunk %d: no error", pos)
		}
	}
	var start []int
	for pos := range l.StartSet() {
		start = append(start, pos)
	}
	if len(start) != 2 || start[0] != 0 || start[1] != 2 {
		t.Errorf("start set: got %v, want [0 2]", start)
	}
	for range l.StartSet() {
		break // an early end
	}
	for range l.PackOrder() {
		break
	}
}

// TestPackOrder has packs whose chunks stand in the index in another order.
func TestPackOrder(t *testing.T) {
	x := newIndex(t, 100, 1, 2, 1, 3, 4, 5)
	packs := []PackDescriptor{{digestOf(10), 60, true}, {digestOf(11), 90, false}}
	file, err := EncodeLocators(x, packs, []Location{{1, 40, 7}, {0, 10, 50}, {1, 40, 7}, {}, {1, 2, 30}, {0, 0, 10}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := OpenLocators(file, x)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Collect(l.PackOrder()), []int{5, 1, 4, 0, 2}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestLocatorsOfNothing(t *testing.T) {
	x := newIndex(t, 1)
	file, err := EncodeLocators(x, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := OpenLocators(file, x)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Lookup(numbered(1)); !errors.Is(err, chunkstore.ErrNotFound) {
		t.Errorf("got %v, want %v", err, chunkstore.ErrNotFound)
	}
}

// TestHostileLocators damages a field each and wants the named use to say so.
func TestHostileLocators(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	const (
		packRow  = headerSize
		chunkRow = headerSize + 2*packSize
		nameRow  = chunkRow + 4*locationSize
	)
	u32 := func(off int, v uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[off:], v) }
	}
	u64 := func(off int, v uint64) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint64(b[off:], v) }
	}
	for _, tt := range []struct {
		name   string
		damage func([]byte)
		opens  bool
		want   string
	}{
		{"magic", u32(0, 0), false, "starts with"},
		{"version", u32(8, 2), false, "version 2"},
		{"no packs", u32(12, 0), false, "bytes, want"},
		{"2^32-1 packs", u32(12, math.MaxUint32), false, "bytes, want"},
		{"chunks and names swapped", func(b []byte) { u32(16, 3)(b); u32(20, 6)(b) }, false, "index of"},
		{"2^32-1 chunks", u32(16, math.MaxUint32), false, "bytes, want"},
		{"2^32-1 names", u32(20, math.MaxUint32), false, "bytes, want"},
		{"flags", u64(24, 1), false, "flags"},
		{"pack of 0 bytes", u64(packRow+32, 0), true, "size 0"},
		{"pack of 2^63 bytes", u64(packRow+32, 1<<63), true, "size 9223372036854775808"},
		{"pack flags", u32(packRow+40, 2), true, "flags 0x2"},
		{"pack number", u32(chunkRow, 2), true, "pack 2 of 2"},
		{"pack number 2^32-1", u32(chunkRow, math.MaxUint32), true, "of 2"},
		{"offset", u32(chunkRow+4, 11), true, "of pack 0, which has 60"},
		{"offset 2^32-1", u32(chunkRow+4, math.MaxUint32), true, "of pack 0, which has 60"},
		{"length", u32(chunkRow+8, 51), true, "of pack 0, which has 60"},
		{"length 2^32-1", u32(chunkRow+8, math.MaxUint32), true, "at most"},
		{"no length", u32(chunkRow+8, 0), true, "no bytes in pack 0 at 10"},
		{"position", u32(nameRow, 4), true, "chunk 4 of 4"},
		{"position 2^32-1", u32(nameRow, math.MaxUint32), true, "of 4"},
		{"names out of order", func(b []byte) {
			for i := range 4 {
				b[nameRow+i], b[nameRow+4+i] = b[nameRow+4+i], b[nameRow+i]
			}
		}, true, "after"},
		{"name twice", func(b []byte) { copy(b[nameRow:nameRow+4], b[nameRow+4:]) }, true, "after"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bounded.Case(t)
			x, _, _, file := sample(t)
			tt.damage(file)
			l, err := OpenLocators(file, x)
			if (err == nil) != tt.opens {
				t.Fatalf("OpenLocators: got %v", err)
			}
			if err == nil {
				err = l.Verify()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, tt.want)
			}
		})
	}
	t.Run("length of the file", func(t *testing.T) {
		bounded.Case(t)
		x, _, _, file := sample(t)
		for n := range len(file) {
			if _, err := OpenLocators(file[:n], x); err == nil {
				t.Fatalf("%d of %d bytes were taken", n, len(file))
			}
		}
		if _, err := OpenLocators(append(file, 0), x); err == nil {
			t.Error("a byte too many was taken")
		}
	})
	t.Run("another index", func(t *testing.T) {
		bounded.Case(t)
		_, _, _, file := sample(t)
		if _, err := OpenLocators(file, newIndex(t, 100, 1, 2, 3)); err == nil {
			t.Error("an index of 3 chunks was taken for one of 4")
		}
	})
}

func TestEncodeLocatorsRefuses(t *testing.T) {
	x := newIndex(t, 100, 1)
	good := []PackDescriptor{{Digest: digestOf(10), Size: 60}}
	for _, tt := range []struct {
		name  string
		packs []PackDescriptor
		at    []Location
	}{
		{"too few locations", good, nil},
		{"too many locations", good, make([]Location, 2)},
		{"no such pack", good, []Location{{1, 0, 1}}},
		{"negative pack", good, []Location{{-1, 0, 1}}},
		{"negative offset", good, []Location{{0, -1, 1}}},
		{"behind the pack", good, []Location{{0, 60, 1}}},
		{"offset 2^32", good, []Location{{0, 1 << 32, 1}}},
		{"negative length", good, []Location{{0, 0, -1}}},
		{"length", good, []Location{{0, 0, chunkstore.MaxStored + 1}}},
		{"zero chunk with a place", good, []Location{{0, 1, 0}}},
		{"empty pack", []PackDescriptor{{Digest: digestOf(10)}}, []Location{{}}},
		{"SHA-512 digest", []PackDescriptor{{Digest: "sha512:" + numbered(1).String(), Size: 1}}, []Location{{}}},
		{"short digest", []PackDescriptor{{Digest: "sha256:00", Size: 1}}, []Location{{}}},
		{"path as digest", []PackDescriptor{{Digest: "sha256:../" + strings.Repeat("0", 61), Size: 1}}, []Location{{}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := EncodeLocators(x, tt.packs, tt.at); err == nil {
				t.Error("no error")
			}
		})
	}
}

// FuzzLocators wants no panic from any use of any file, and what Verify lets
// through to be usable.
func FuzzLocators(f *testing.F) {
	x, _, _, file := sample(f)
	f.Add(file)
	f.Add(file[:headerSize])
	for _, i := range []int{12, 16, 20, headerSize + 32, headerSize + 2*packSize, headerSize + 2*packSize + 4, len(file) - 1} {
		b := bytes.Clone(file)
		b[i] ^= 0xff
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := OpenLocators(b, x)
		if err != nil {
			return
		}
		verified := l.Verify() == nil
		for pos := range x.Len() {
			at, err := l.At(pos)
			if verified && err != nil {
				t.Fatal(err)
			}
			if err == nil && at.Length > 0 {
				p, err := l.Pack(at.Pack)
				if err != nil || at.Offset < 0 || at.Offset+int64(at.Length) > p.Size {
					t.Fatalf("chunk %d at %+v of %+v, %v", pos, at, p, err)
				}
			}
			c, _ := x.At(pos)
			if got, err := l.Lookup(c.ID); err == nil {
				if other, _ := x.At(got); other.ID != c.ID {
					t.Fatalf("looked up %s, got %s", c.ID, other.ID)
				}
			} else if verified {
				t.Fatal(err)
			}
		}
		for range l.StartSet() {
		}
	})
}

// large is the locators of an image of n chunks.
func large(b testing.TB, n int) (*index.Index, []byte) {
	b.Helper()
	numbers := count(0, n)
	at := make([]Location, n)
	for i := range at {
		at[i] = Location{0, int64(i) * 100, 100}
	}
	x := newIndex(b, 100, numbers...)
	file, err := EncodeLocators(x, []PackDescriptor{{Digest: digestOf(1), Size: int64(n) * 100}}, at)
	if err != nil {
		b.Fatal(err)
	}
	return x, file
}

func TestLookupDoesNotAllocate(t *testing.T) {
	x, file := large(t, 1000)
	l, err := OpenLocators(file, x)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x.At(700)
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		pos, err := l.Lookup(c.ID)
		if err == nil {
			_, err = l.At(pos)
		}
		if err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations per lookup, want 0", n)
	}
}

func BenchmarkOpenLocators(b *testing.B) {
	x, file := large(b, 200_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := OpenLocators(file, x); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStartSet(b *testing.B) {
	x, file := large(b, 200_000)
	l, err := OpenLocators(file, x)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		for pos := range l.StartSet() {
			b.Fatalf("chunk %d is of no start set", pos)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	const n = 200_000
	x, file := large(b, n)
	l, err := OpenLocators(file, x)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c, _ := x.At(i % n)
		if _, err := l.Lookup(c.ID); err != nil {
			b.Fatal(err)
		}
	}
}
