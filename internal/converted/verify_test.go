package converted

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// memory is a store in memory. Chunks that it has are those that it holds;
// asked for another one, it fails with err, or says that it is not there.
type memory struct {
	name   string
	frames map[index.ID][]byte
	err    error
	asked  atomic.Int64
}

func (m *memory) Get(_ context.Context, id index.ID, dst []byte) ([]byte, error) {
	m.asked.Add(1)
	if f, ok := m.frames[id]; ok {
		return append(dst, f...), nil
	}
	if m.err != nil {
		return dst, m.err
	}
	return dst, chunkstore.ErrNotFound
}

func (m *memory) Has(_ context.Context, id index.ID) (bool, error) { return m.frames[id] != nil, m.err }
func (m *memory) String() string                                   { return m.name }

// refused is an error that no other attempt helps against.
type refused struct{}

func (refused) Error() string             { return "access denied" }
func (refused) Temporary() bool           { return false }
func (refused) RetryAfter() time.Duration { return 0 }

func TestVerify(t *testing.T) {
	const n = 3 * batchChunks / 2
	var cs []index.Chunk
	var frames [][]byte
	for i := range n {
		plain := fmt.Appendf(nil, "chunk %d", i)
		cs = append(cs, index.Chunk{ID: index.SHA256.Sum(plain), Offset: int64(10 * i), Size: len(plain)})
		frames = append(frames, chunkstore.Encode(nil, plain))
	}
	with := func(name string, err error, from, to int) *memory {
		m := &memory{name: name, err: err, frames: make(map[index.ID][]byte)}
		for i := from; i < to; i++ {
			m.frames[cs[i].ID] = frames[i]
		}
		return m
	}
	damage := func(m *memory, i int) *memory {
		m.frames[cs[i].ID] = frames[(i+1)%n]
		return m
	}
	for _, test := range []struct {
		name   string
		stores []*memory
		good   int
		faults string // in their order
		failed string // in the error
	}{
		{"all there", []*memory{with("a", nil, 0, n)}, n, "", ""},
		{"the last is not asked", []*memory{with("a", nil, 0, n), with("b", refused{}, 0, 0)}, n, "", ""},
		{"one half each", []*memory{with("a", nil, 0, n/2), with("b", nil, n/2, n)}, n, "", ""},
		{"three are missing", []*memory{with("a", nil, 0, n-3), with("b", nil, 0, n-3)}, n - 3, "missing missing missing", ""},
		{"damaged", []*memory{damage(with("a", nil, 0, n), 7)}, n - 1, "corrupt in a", ""},
		{"damaged in one", []*memory{damage(with("a", nil, 0, n), 7), with("b", nil, 0, n)}, n, "corrupt in a", ""},
		{"damaged in one, missing in the other", []*memory{damage(with("a", nil, 0, n), 7), with("b", nil, 0, 0)}, n - 1, "corrupt in a", ""},
		{"the first does not answer", []*memory{with("a", refused{}, 0, 0), with("b", nil, 0, n)}, n, "", ""},
		{"one does not answer for what is missing", []*memory{with("a", refused{}, 0, n/2), with("b", nil, 0, n-1)}, 0, "", "1 chunks cannot be verified: "},
		{"none answers", []*memory{with("a", refused{}, 0, 0)}, 0, "", "a: access denied"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var from []chunkstore.Store
			for _, s := range test.stores {
				from = append(from, s)
			}
			v, err := Verify(t.Context(), index.SHA256, cs, from, func(int64) {})
			if test.failed != "" {
				if err == nil || !strings.Contains(err.Error(), test.failed) {
					t.Errorf("got error %v, want one with %q", err, test.failed)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range v.Faults {
				if where, _, found := strings.Cut(f.Where, ","); found {
					f.Reason += " in " + where
				}
				got = append(got, f.Reason)
			}
			if v.Good != test.good || v.Chunks != n || strings.Join(got, " ") != test.faults {
				t.Errorf("got %d of %d good, faults %q, want %d of %d, %q", v.Good, v.Chunks, got, test.good, n, test.faults)
			}
			if last := test.stores[len(test.stores)-1]; test.name == "the last is not asked" && last.asked.Load() > 0 {
				t.Errorf("the last store was asked %d times", last.asked.Load())
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Verify(ctx, index.SHA256, cs, []chunkstore.Store{with("a", nil, 0, n)}, func(int64) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v, want %v", err, context.Canceled)
	}
}
