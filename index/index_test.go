package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
)

var small = chunker.Params{Min: 64, Avg: 256, Max: 1024}

// build returns an index of chunks of the given sizes.
func build(t testing.TB, p chunker.Params, d Digest, sizes ...int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b, p, d)
	for i, n := range sizes {
		if err := w.Append(d.Sum(fmt.Append(nil, i)), n); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	for _, d := range []Digest{SHA256, SHA512_256} {
		for _, sizes := range [][]int{
			{},
			{1},
			{1024},
			{1, 1, 1},
			{1024, 1, 63, 64, 65, 255, 256, 257, 1023, 1024},
		} {
			x, err := Open(build(t, small, d, sizes...))
			if err != nil {
				t.Errorf("%v %d: %v", d, sizes, err)
				continue
			}
			if err := x.Verify(); err != nil {
				t.Errorf("%v %d: %v", d, sizes, err)
			}
			if x.Len() != len(sizes) || x.Digest() != d || x.Params() != small {
				t.Errorf("%v %d: got %d chunks, %v, %+v, want %d, %v, %+v", d, sizes, x.Len(), x.Digest(), x.Params(), len(sizes), d, small)
			}
			var off int64
			for i, n := range sizes {
				c, err := x.At(i)
				if want := (Chunk{d.Sum(fmt.Append(nil, i)), off, n}); err != nil || c != want {
					t.Errorf("%v %d: At(%d): got %v, %v, want %v", d, sizes, i, c, err, want)
				}
				for _, o := range []int64{off, off + int64(n)/2, off + int64(n) - 1} {
					if got := x.Find(o); got != i {
						t.Errorf("%v %d: Find(%d): got %d, want %d", d, sizes, o, got, i)
					}
				}
				off += int64(n)
			}
			if x.Size() != off {
				t.Errorf("%v %d: got size %d, want %d", d, sizes, x.Size(), off)
			}
			for _, i := range []int{-1, len(sizes), math.MinInt, math.MaxInt} {
				if _, err := x.At(i); err == nil {
					t.Errorf("%v %d: At(%d): got no error", d, sizes, i)
				}
			}
		}
	}
}

// TestFormat compares a small index with one that casync wrote, but for the
// flags that tell how casync chooses files:
//
//	printf a | casync make --digest=sha256 --chunk-size=64:256:1024 x.caibx
func TestFormat(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b, small, SHA256)
	if err := w.Append(SHA256.Sum([]byte("a")), 1); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var want []byte
	for _, v := range []uint64{48, 0x96824d9c7b129ff9, 0, 64, 256, 1024, math.MaxUint64, 0xe75b9e112f17417d, 1} {
		want = binary.LittleEndian.AppendUint64(want, v)
	}
	id, err := ParseID("ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb")
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, id[:]...)
	for _, v := range []uint64{0, 0, 48, 16 + 40 + 40, 0x4b4f050e5549ecd1} {
		want = binary.LittleEndian.AppendUint64(want, v)
	}
	if !bytes.Equal(b.Bytes(), want) {
		t.Errorf("got\n%x, want\n%x", b.Bytes(), want)
	}
}

func TestOpenRefuses(t *testing.T) {
	good := build(t, small, SHA256, 100, 200, 300)
	put := func(off int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte {
			if off < 0 {
				off += len(b)
			}
			binary.LittleEndian.PutUint64(b[off:], v)
			return b
		}
	}
	for _, test := range []struct {
		name   string
		damage func([]byte) []byte
		want   string
	}{
		{"empty", func([]byte) []byte { return nil }, "got 0 bytes"},
		{"header size", put(0, 49), "header size at offset 0: got 0x31, want 0x30"},
		{"not an index", put(8, 1), "header type"},
		{"unknown flag", put(16, 1), "feature flags at offset 16: got 0x1, of which 0x1"},
		{"flags of an archive", put(16, 0x8000000000000000|0x40), "of which 0x40"},
		{"min 0", put(24, 0), "chunk sizes"},
		{"min over avg", put(24, 257), "chunk sizes"},
		{"avg over max", put(32, 1025), "chunk sizes"},
		{"max too large", put(40, chunker.MaxSize+1), "chunk sizes"},
		{"max 2^63", put(40, 1<<63), "chunk sizes"},
		{"table size", put(48, 0), "table size"},
		{"table type", put(56, 0), "table type"},
		{"tail", put(-40, 1), "tail"},
		{"tail", put(-32, 1), "tail"},
		{"header size in tail", put(-24, 47), "header size in tail"},
		{"table size in tail", put(-16, 1<<63), "table size in tail"},
		{"marker", put(-8, 0), "tail marker"},
		{"image over 2^63", put(tableStart+2*entrySize, 1<<63), "entry 2"},
		{"a byte behind", func(b []byte) []byte { return append(b, 0) }, "index: "},
		{"an entry too few", func(b []byte) []byte { return slices.Delete(b, tableStart, tableStart+entrySize) }, "table size in tail"},
		{"part of an entry", func(b []byte) []byte {
			b = slices.Delete(b, tableStart, tableStart+8)
			binary.LittleEndian.PutUint64(b[len(b)-16:], uint64(len(b)-headerSize))
			return b
		}, "want a multiple of 40"},
	} {
		_, err := Open(test.damage(bytes.Clone(good)))
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got error %v, want one line with %q", test.name, err, test.want)
		}
	}
	for n := range good {
		if _, err := Open(good[:n]); err == nil {
			t.Errorf("the first %d of %d bytes: got no error", n, len(good))
		}
	}
}

// TestBadEntries: entries that do not fit together are found when they are
// used, and make nothing panic.
func TestBadEntries(t *testing.T) {
	for _, test := range []struct {
		name string
		ends []uint64
		bad  []int
	}{
		{"zero length", []uint64{100, 100, 200}, []int{1}},
		{"zero length at the start", []uint64{0, 100, 200}, []int{0}},
		{"unsorted", []uint64{200, 100, 300}, []int{1}},
		{"beyond the end", []uint64{100, 1 << 40, 300}, []int{1, 2}},
		{"too long", []uint64{100, 1125, 1200}, []int{1}},
		{"as long as allowed", []uint64{100, 1124, 1200}, nil},
		{"wrapped", []uint64{100, math.MaxUint64, 300}, []int{1, 2}},
	} {
		b := build(t, small, SHA256, 1, 1, 1)
		for i, end := range test.ends {
			binary.LittleEndian.PutUint64(b[tableStart+i*entrySize:], end)
		}
		x, err := Open(b)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		var bad []int
		for i := range x.Len() {
			if _, err := x.At(i); err != nil {
				bad = append(bad, i)
			}
		}
		if !slices.Equal(bad, test.bad) {
			t.Errorf("%s: got errors at %d, want them at %d", test.name, bad, test.bad)
		}
		if err := x.Verify(); (err != nil) != (len(test.bad) > 0) {
			t.Errorf("%s: Verify: got %v", test.name, err)
		}
		for off := range x.Size() {
			if i := x.Find(off); i < 0 || i >= x.Len() {
				t.Fatalf("%s: Find(%d): got %d", test.name, off, i)
			}
		}
	}
}

func TestFindOutside(t *testing.T) {
	x, err := Open(build(t, small, SHA256, 1, 2, 3))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{-1, math.MinInt64, 6, 7, math.MaxInt64} {
		if i := x.Find(off); i < 0 || i >= x.Len() {
			t.Errorf("Find(%d): got %d, want a valid position", off, i)
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	for _, n := range []int{-1, 0, 1025, math.MaxInt} {
		w := NewWriter(&bytes.Buffer{}, small, SHA256)
		err := w.Append(ID{}, n)
		if err == nil {
			t.Errorf("%d bytes: got no error", n)
		}
		if cerr := w.Close(); cerr != err {
			t.Errorf("%d bytes: Close: got %v, want %v", n, cerr, err)
		}
	}
	if err := NewWriter(&bytes.Buffer{}, chunker.Params{}, SHA256).Append(ID{}, 1); err == nil {
		t.Error("no sizes: got no error")
	}
	w := NewWriter(&bytes.Buffer{}, small, SHA256)
	w.end = math.MaxInt64 - 1
	if err := w.Append(ID{}, 1); err != nil {
		t.Error(err)
	}
	if err := w.Append(ID{}, 1); err == nil {
		t.Error("an image of 2^63 bytes: got no error")
	}
	w = NewWriter(&bytes.Buffer{}, small, SHA256)
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := w.Append(ID{}, 1); err == nil {
		t.Error("Append behind Close: got no error")
	}
	w = NewWriter(failing{}, small, SHA256)
	if err := w.Close(); !errors.Is(err, errFailing) {
		t.Errorf("a writer that fails: got %v, want %v", err, errFailing)
	}
}

var errFailing = errors.New("no space")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFailing }

func TestParseID(t *testing.T) {
	id := SHA256.Sum(nil)
	if got, err := ParseID(id.String()); err != nil || got != id {
		t.Errorf("got %v, %v, want %v", got, err, id)
	}
	for _, s := range []string{"", "ab", id.String()[1:], id.String() + "0", "g" + id.String()[1:], strings.Repeat("../", 21) + "a"} {
		if _, err := ParseID(s); err == nil {
			t.Errorf("%q: got no error", s)
		}
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(build(f, small, SHA256), int64(0))
	f.Add(build(f, small, SHA256, 1, 1024, 5), int64(7))
	f.Add(build(f, small, SHA512_256, 100, 1, 5), int64(100))
	f.Fuzz(func(t *testing.T, b []byte, off int64) {
		x, err := Open(b)
		if err != nil {
			return
		}
		var at int64
		good := x.Verify() == nil
		for i := range x.Len() {
			c, err := x.At(i)
			if err != nil {
				if good {
					t.Fatalf("entry %d: %v, but Verify found none", i, err)
				}
				continue
			}
			if c.Size < 1 || c.Size > x.Params().Max || c.Offset < 0 || c.Offset+int64(c.Size) > x.Size() {
				t.Fatalf("entry %d: got %+v in an image of %d bytes", i, c, x.Size())
			}
			if good && c.Offset != at {
				t.Fatalf("entry %d: got offset %d, want %d", i, c.Offset, at)
			}
			at = c.Offset + int64(c.Size)
		}
		if x.Len() == 0 {
			return
		}
		i := x.Find(off)
		c, err := x.At(i)
		if good && off >= 0 && off < x.Size() && (err != nil || off < c.Offset || off >= c.Offset+int64(c.Size)) {
			t.Fatalf("Find(%d): got %d, %+v, %v", off, i, c, err)
		}
		if !good {
			return
		}
		var again bytes.Buffer
		w := NewWriter(&again, x.Params(), x.Digest())
		for i := range x.Len() {
			c, _ := x.At(i)
			if err := w.Append(c.ID, c.Size); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		b = bytes.Clone(b)
		flags := binary.LittleEndian.Uint64(b[16:]) & flagSHA512_256
		binary.LittleEndian.PutUint64(b[16:], flags)
		if !bytes.Equal(again.Bytes(), b) {
			t.Fatalf("written again:\n%x, want\n%x", again.Bytes(), b)
		}
	})
}

// A root of 10 GiB has about 160,000 chunks.
func benchIndex(b *testing.B) *Index {
	sizes := make([]int, 160_000)
	for i := range sizes {
		sizes[i] = 1 + i*7919%1024
	}
	x, err := Open(build(b, small, SHA256, sizes...))
	if err != nil {
		b.Fatal(err)
	}
	return x
}

func TestLookupDoesNotAllocate(t *testing.T) {
	x, err := Open(build(t, small, SHA256, 100, 200, 300))
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if c, err := x.At(x.Find(150)); err != nil || c.Size != 200 {
			t.Errorf("got %+v, %v", c, err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations per lookup, want 0", n)
	}
}

func BenchmarkOpen(b *testing.B) {
	file := build(b, small, SHA256, slices.Repeat([]int{1000}, 160_000)...)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Open(file); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFindAt(b *testing.B) {
	x := benchIndex(b)
	off := int64(0)
	b.ReportAllocs()
	for b.Loop() {
		off = (off + 1_000_003) % x.Size()
		if _, err := x.At(x.Find(off)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	x := benchIndex(b)
	for b.Loop() {
		if err := x.Verify(); err != nil {
			b.Fatal(err)
		}
	}
}
