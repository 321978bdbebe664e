package convert

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/index"
)

// holedReader is a reader of data that knows its runs of zeros.
type holedReader struct {
	data []byte
	off  int64
}

func (r *holedReader) Read(p []byte) (int, error) {
	n := copy(p, r.data[r.off:])
	r.off += int64(n)
	return n, nil
}

func (r *holedReader) Skip(off int64) { r.off = off }

func (r *holedReader) Hole(off int64) int64 {
	n := len(bytes.TrimLeft(r.data[off:], "\x00"))
	return int64(len(r.data)) - off - int64(n)
}

// TestPipelineHoles: passing over zeros cuts as reading them does.
func TestPipelineHoles(t *testing.T) {
	const m = 1000
	rnd := rand.New(rand.NewPCG(1, 2))
	cutter, err := chunker.New(chunker.Params{Min: 64, Avg: 256, Max: m})
	if err != nil {
		t.Fatal(err)
	}
	cuts := map[string]func([]byte) int{"fixed": fixed(m - 1), "content": cutter.Cut}
	for name, cut := range cuts {
		for range 200 {
			var data []byte
			for range 1 + rnd.IntN(8) {
				b := make([]byte, 1+rnd.IntN(3*m))
				if rnd.IntN(2) == 0 {
					for i := range b {
						b[i] = byte(1 + rnd.IntN(255))
					}
				} else if rnd.IntN(20) == 0 {
					b = make([]byte, slabSize+rnd.IntN(2*m))
				}
				data = append(data, b...)
			}
			run := func(open func() io.Reader) []placed {
				p := &pipeline{cut: cut, max: m, workers: 2, zeros: true, frames: map[index.ID]*frame{},
					encode: func(_ context.Context, id index.ID, plain []byte) ([]byte, error) {
						if index.SHA256.Sum(plain) != id {
							t.Error("encode was given another chunk's bytes")
						}
						return []byte(id.String()), nil
					}}
				var units iter.Seq[unit] = func(yield func(unit) bool) { yield(unit{Offset: 7, Size: int64(len(data)), Open: open}) }
				return runPlaced(t, p, units, nil)
			}
			want := run(func() io.Reader { return bytes.NewReader(data) })
			got := run(func() io.Reader { return &holedReader{data: data} })
			if !slices.Equal(got, want) {
				t.Fatalf("%s: %d bytes: got %d chunks, want %d, or others", name, len(data), len(got), len(want))
			}
		}
	}
}

func makeBlob(t *testing.T, file, store string) (*BlobReport, []byte) {
	t.Helper()
	var out bytes.Buffer
	r, err := Blob(t.Context(), &out, BlobOptions{File: file, Store: store, Params: chunker.V1})
	if err != nil {
		t.Fatal(err)
	}
	return r, out.Bytes()
}

// TestBlob: the index is that of the bytes, holes or not, and the store has
// every chunk of it.
func TestBlob(t *testing.T) {
	dir := t.TempDir()
	random := make([]byte, 700_000)
	rand.NewChaCha8([32]byte{1}).Read(random)
	for _, test := range []struct {
		name  string
		parts map[int64][]byte
		size  int64
	}{
		{"empty", nil, 0},
		{"one byte", map[int64][]byte{0: {1}}, 1},
		{"a hole alone", nil, 5_000_000},
		{"data", map[int64][]byte{0: random}, 700_000},
		{"data, hole, data, hole", map[int64][]byte{0: random[:100_000], 6_000_000: random}, 9_000_001},
		{"hole, data twice", map[int64][]byte{3 << 20: random, 4 << 20: random}, 4<<20 + 700_000},
		{"the same, then a byte", map[int64][]byte{3 << 20: random, 4 << 20: random}, 4<<20 + 700_001},
	} {
		t.Run(test.name, func(t *testing.T) {
			plain := make([]byte, test.size)
			sparse := filepath.Join(dir, "sparse")
			f, err := os.Create(sparse)
			if err != nil {
				t.Fatal(err)
			}
			for off, b := range test.parts {
				copy(plain[off:], b)
				if _, err := f.WriteAt(b, off); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Truncate(test.size); err != nil {
				t.Fatal(err)
			}
			f.Close()
			full := filepath.Join(dir, "full")
			if err := os.WriteFile(full, plain, 0o644); err != nil {
				t.Fatal(err)
			}
			store := filepath.Join(t.TempDir(), "a", "store.castr")
			r, file := makeBlob(t, sparse, store)
			again, want := makeBlob(t, full, store)
			if !bytes.Equal(file, want) {
				t.Error("the file with holes has another index than the one without")
			}
			x, err := index.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			if x.Size() != test.size || r.Bytes != test.size || r.Chunks != x.Len() || r.IndexDigest != digestOf(file) {
				t.Errorf("got report %+v for an index of %d chunks, %d bytes, %s", r, x.Len(), x.Size(), digestOf(file))
			}
			if r.NewBytes != r.StoredBytes || again.NewBytes != 0 || again.ReusedBytes != r.StoredBytes {
				t.Errorf("got %d of %d bytes new, then %d new and %d reused", r.NewBytes, r.StoredBytes, again.NewBytes, again.ReusedBytes)
			}
			s, err := local.Open(store)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			var got []byte
			zeros := 0
			for i := range x.Len() {
				c, err := x.At(i)
				if err != nil {
					t.Fatal(err)
				}
				stored, err := s.Get(t.Context(), c.ID, nil)
				if err != nil {
					t.Fatal(err)
				}
				start := len(got)
				if got, err = chunkstore.Decode(got, stored, index.SHA256, c); err != nil {
					t.Fatal(err)
				}
				if allZero(got[start:]) {
					zeros++
				}
			}
			if !bytes.Equal(got, plain) || zeros != r.ZeroChunks {
				t.Errorf("got %d bytes with %d chunks of zeros, want the file's %d with %d", len(got), zeros, len(plain), r.ZeroChunks)
			}
		})
	}
}

// TestBlobHole: a hole of 100 GB takes no longer than its index.
func TestBlobHole(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("begin"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 100e9); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	r, _ := makeBlob(t, file, t.TempDir())
	if took := time.Since(began); took > time.Minute || r.Bytes != 100e9 || r.Distinct > 3 {
		t.Errorf("took %v for %+v", took, r)
	}
}

func TestBlobRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, make([]byte, 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	good := BlobOptions{File: file, Store: filepath.Join(dir, "store"), Params: chunker.V1}
	with := func(change func(*BlobOptions)) BlobOptions { o := good; change(&o); return o }
	for _, test := range []struct {
		name string
		o    BlobOptions
		part Part
	}{
		{"missing", with(func(o *BlobOptions) { o.File = filepath.Join(dir, "none") }), Source},
		{"directory", with(func(o *BlobOptions) { o.File = dir }), Source},
		{"FIFO", with(func(o *BlobOptions) { o.File = fifo }), Source},
		{"character device", with(func(o *BlobOptions) { o.File = "/dev/zero" }), Source},
		{"packs", with(func(o *BlobOptions) { o.Store = "registry://host/repo" }), Usage},
		{"store is a file", with(func(o *BlobOptions) { o.Store = file }), Destination},
		{"sizes", with(func(o *BlobOptions) { o.Params.Min = 1 }), Usage},
	} {
		_, err := Blob(t.Context(), io.Discard, test.o)
		var e *Error
		if !errors.As(err, &e) || e.Part != test.part {
			t.Errorf("%s: got %v, want an error of part %d", test.name, err, test.part)
		}
	}
}

// TestBlobShrinks: a file that becomes shorter while it is cut is an error.
func TestBlobShrinks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 20<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := Blob(t.Context(), io.Discard, BlobOptions{
		File: file, Store: t.TempDir(), Params: chunker.V1,
		Progress: func(Event) { os.Truncate(file, 1<<20) },
	})
	var e *Error
	if !errors.As(err, &e) || e.Part != Source {
		t.Errorf("got %v, want an error of the source", err)
	}
}

// TestReusedChunksStay: a collector of garbage that takes every old chunk away
// takes none from a conversion that finds it there.
func TestReusedChunksStay(t *testing.T) {
	dir := t.TempDir()
	file, castr := filepath.Join(dir, "file"), filepath.Join(dir, "store.castr")
	data := make([]byte, 5_000_000)
	rand.NewChaCha8([32]byte{1}).Read(data)
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	_, raw := makeBlob(t, file, castr)
	x, err := index.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	s, err := local.Open(castr)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	long := time.Now().Add(-48 * time.Hour)
	removed := 0
	for range 10 {
		files, err := filepath.Glob(filepath.Join(castr, "*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if err := os.Chtimes(f, long, long); err != nil {
				t.Fatal(err)
			}
		}
		collected := make(chan error)
		go func() {
			for e, err := range s.List(context.Background()) {
				var ok bool
				if err == nil {
					ok, err = s.Expire(context.Background(), e.ID, time.Now().Add(-24*time.Hour))
				}
				if err != nil {
					collected <- err
					return
				}
				if ok {
					removed++
				}
			}
			collected <- nil
		}()
		makeBlob(t, file, castr)
		if err := <-collected; err != nil {
			t.Fatal(err)
		}
		for i := range x.Len() {
			c, err := x.At(i)
			if err != nil {
				t.Fatal(err)
			}
			if ok, err := s.Has(t.Context(), c.ID); err != nil || !ok {
				t.Fatalf("chunk %s is gone: %v", c.ID, err)
			}
		}
	}
	if removed == 0 {
		t.Error("nothing was removed, want the collector to have been in the way")
	}
}
