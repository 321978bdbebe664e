package lazy

import (
	"context"
	"errors"
	"testing"

	"github.com/container-bootfs/bootfs/index"
)

func TestStats(t *testing.T) {
	x, f, _ := testImage(t, []int{1000, 2000, 3000})
	m := New(x, f, Options{})
	read := func(ctx context.Context, off int64, n int) error {
		_, err := m.ReadAt(ctx, make([]byte, n), off)
		return err
	}
	want := func(what string, want Stats) {
		t.Helper()
		if got := m.Stats(); got != want {
			t.Errorf("%s: got %+v, want %+v", what, got, want)
		}
	}
	if err := read(t.Context(), 500, 1000); err != nil {
		t.Fatal(err)
	}
	want("nothing was in memory", Stats{Reads: 1, Chunks: 2, Bytes: 3000})
	if err := read(t.Context(), 900, 2200); err != nil {
		t.Fatal(err)
	}
	want("two of three chunks were", Stats{Reads: 2, Hits: 2, HitBytes: 2100, Chunks: 3, Bytes: 6000})
	if ids := m.InMemory(); len(ids) != 3 {
		t.Errorf("in memory: %v", ids)
	}

	m = New(x, f, Options{})
	f.before = func(context.Context, index.Chunk) error { return errors.New("no network") }
	if err := read(t.Context(), 0, 1); err == nil {
		t.Error("read without a network")
	}
	f.before = func(ctx context.Context, _ index.Chunk) error { <-ctx.Done(); return ctx.Err() }
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := read(gone, 0, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	want("a failure, and a reader who gave up", Stats{Reads: 2, Failed: 1})
}
