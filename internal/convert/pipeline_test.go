package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// sliceUnits are consecutive units of the root image.
func sliceUnits(parts ...[]byte) iter.Seq[unit] {
	return func(yield func(unit) bool) {
		var off int64
		for _, p := range parts {
			if !yield(unit{Offset: off, Size: int64(len(p)), Open: func() io.Reader { return bytes.NewReader(p) }}) {
				return
			}
			off += int64(len(p))
		}
	}
}

// fixed cuts every n bytes.
func fixed(n int) func([]byte) int { return func(b []byte) int { return min(n, len(b)) } }

// placed is what a run handed on.
type placed struct {
	id     index.ID
	off    int64
	size   int
	zero   bool
	first  bool
	number int
}

func runPlaced(t *testing.T, p *pipeline, units iter.Seq[unit], keep func(int64, int) bool) []placed {
	t.Helper()
	var out []placed
	n := 0
	err := p.run(t.Context(), units, keep, func(c *chunk, stored []byte, number int) (int, error) {
		first := stored != nil
		if first {
			if want := c.ID.String(); string(stored) != want {
				t.Errorf("chunk at %d: stored form of %s, want %s", c.Offset, stored, want)
			}
			number = n
			n++
		}
		out = append(out, placed{c.ID, c.Offset, c.Size, c.Zero, first, number})
		return number, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestPipelineOrder feeds many duplicates to encoders that take their time at
// random, and wants the same result whatever the number of workers.
func TestPipelineOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var parts [][]byte
	for range 300 {
		b := make([]byte, rnd.IntN(3000))
		for i := range b {
			b[i] = byte(i) & byte(rnd.IntN(4)) / 3
		}
		if rnd.IntN(5) == 0 {
			clear(b)
		}
		parts = append(parts, b)
		if rnd.IntN(3) == 0 {
			parts = append(parts, parts[rnd.IntN(len(parts))])
		}
	}
	var want []placed
	for _, workers := range []int{1, 2, 3, 16} {
		p := &pipeline{cut: fixed(64), max: 64, workers: workers, frames: map[index.ID]*frame{},
			encode: func(_ context.Context, id index.ID, plain []byte) ([]byte, error) {
				if sha256.Sum256(plain) != id {
					t.Error("encode was given another chunk's bytes")
				}
				if id[0]&7 == 0 {
					time.Sleep(time.Duration(id[1]) * time.Microsecond)
				}
				return []byte(id.String()), nil
			}}
		got := runPlaced(t, p, sliceUnits(parts...), nil)
		if want == nil {
			want = got
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%d workers place chunks otherwise than one", workers)
		}
	}
	var off int64
	for _, c := range want {
		if c.off != off {
			t.Fatalf("chunk at %d, want %d", c.off, off)
		}
		off += int64(c.size)
	}
	if total := int64(len(slices.Concat(parts...))); off != total {
		t.Fatalf("%d bytes placed, want %d", off, total)
	}
}

// TestPipelineSlabs crosses the ends of slabs at every distance to a cut.
func TestPipelineSlabs(t *testing.T) {
	const m = 1000
	for _, n := range []int{0, 1, m - 1, m, m + 1, slabSize - m, slabSize - 1, slabSize, slabSize + 1, 3*slabSize + m/2} {
		for _, lead := range []int{0, 1, m - 1, m, slabSize - 1} {
			parts := [][]byte{make([]byte, lead), make([]byte, n)}
			for i, p := range parts {
				for j := range p {
					p[j] = byte(j * (i + 3) >> 3)
				}
			}
			all := slices.Concat(parts...)
			p := &pipeline{cut: fixed(m), max: m, workers: 2, zeros: true, frames: map[index.ID]*frame{},
				encode: func(_ context.Context, id index.ID, plain []byte) ([]byte, error) { return []byte(id.String()), nil }}
			pos := 0
			for _, c := range runPlaced(t, p, sliceUnits(parts...), nil) {
				if int(c.off) != pos || index.ID(sha256.Sum256(all[pos:pos+c.size])) != c.id {
					t.Fatalf("units of %d and %d bytes: wrong chunk at %d", lead, n, pos)
				}
				pos += c.size
			}
			if pos != len(all) {
				t.Fatalf("units of %d and %d bytes: %d bytes placed", lead, n, pos)
			}
		}
	}
}

// TestPipelineTwice runs a part first and then everything, as a start set does.
func TestPipelineTwice(t *testing.T) {
	a, b := bytes.Repeat([]byte("abcd"), 16), bytes.Repeat([]byte("efgh"), 16)
	p := &pipeline{cut: fixed(64), max: 64, workers: 2, frames: map[index.ID]*frame{},
		encode: func(_ context.Context, id index.ID, plain []byte) ([]byte, error) { return []byte(id.String()), nil }}
	got := runPlaced(t, p, sliceUnits(a, b), func(off int64, size int) bool { return off == 64 })
	if len(got) != 1 || !got[0].first || got[0].off != 64 {
		t.Fatalf("first run: %+v", got)
	}
	err := p.run(t.Context(), sliceUnits(a, b), nil, func(c *chunk, stored []byte, number int) (int, error) {
		if first := stored != nil; first != (c.Offset == 0) || !first && number != 0 {
			t.Errorf("chunk at %d: first %t, number %d", c.Offset, first, number)
		}
		return 1, nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPipelineErrors wants the error of whichever part fails, at once.
func TestPipelineErrors(t *testing.T) {
	boom := errors.New("boom")
	data := make([]byte, 3*slabSize)
	for i := range data {
		data[i] = byte(i>>8) ^ byte(i)
	}
	newPipeline := func() *pipeline {
		return &pipeline{cut: fixed(64), max: 64, workers: 2, zeros: true, frames: map[index.ID]*frame{},
			encode: func(_ context.Context, id index.ID, plain []byte) ([]byte, error) { return plain, nil }}
	}
	place := func(*chunk, []byte, int) (int, error) { return 0, nil }
	for _, tt := range []struct {
		name string
		run  func(ctx context.Context, cancel func()) error
		want error
	}{
		{"short reader", func(ctx context.Context, _ func()) error {
			u := unit{Size: 100, Open: func() io.Reader { return bytes.NewReader(data[:99]) }}
			return newPipeline().run(ctx, slices.Values([]unit{u}), nil, place)
		}, io.ErrUnexpectedEOF},
		{"encode", func(ctx context.Context, _ func()) error {
			p := newPipeline()
			p.encode = func(context.Context, index.ID, []byte) ([]byte, error) { return nil, boom }
			return p.run(ctx, sliceUnits(data), nil, place)
		}, boom},
		{"place", func(ctx context.Context, _ func()) error {
			return newPipeline().run(ctx, sliceUnits(data), nil, func(*chunk, []byte, int) (int, error) { return 0, boom })
		}, boom},
		{"cancelled", func(ctx context.Context, cancel func()) error {
			return newPipeline().run(ctx, sliceUnits(data), nil, func(*chunk, []byte, int) (int, error) { cancel(); return 0, nil })
		}, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			if err := tt.run(ctx, cancel); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestAllZero(t *testing.T) {
	for n := range 70 {
		b := make([]byte, n)
		if !allZero(b) {
			t.Fatalf("%d zeros", n)
		}
		for i := range b {
			b[i] = 1
			if allZero(b) {
				t.Fatalf("%d bytes, byte %d is one", n, i)
			}
			b[i] = 0
		}
	}
}
