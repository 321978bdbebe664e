package chunkstore_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/container-bootfs/bootfs/chunkstore"
)

// TestStatsOfStores: the slowest fetch is known with its store, a store is in
// trouble from its failure to its next delivery, and its last error stays.
func TestStatsOfStores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newMemory("first", good...), newMemory("second", good...)
		var log strings.Builder
		f := NewFetcher(FetcherOptions{Stores: []Store{first, second}, HedgeAfter: -1, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		second.set(func(context.Context, int64) error { time.Sleep(3 * time.Second); return nil })
		began := time.Now()
		wantPlain(t, f, t.Context(), 0)
		if st := f.Stats(); st.Slowest.Took != 0 || st.Waited != 0 || !st.Stores[0].Trouble.IsZero() || st.Stores[0].LastError != nil {
			t.Errorf("at first: %+v", st)
		}
		first.set(failing)
		wantPlain(t, f, t.Context(), 1)
		st := f.Stats()
		if want := (SlowFetch{3 * time.Second, chunks[1].ID, "second", began.Add(3 * time.Second)}); st.Slowest != want {
			t.Errorf("slowest: got %+v, want %+v", st.Slowest, want)
		}
		if st.Waited != 3*time.Second {
			t.Errorf("waited %v, want 3 s", st.Waited)
		}
		if s := st.Stores[0]; !s.Trouble.Equal(began) || !errors.Is(s.LastError, errFault) || !s.LastAt.Equal(began) {
			t.Errorf("a store that fails: %+v", s)
		}
		if s := st.Stores[1]; !s.Trouble.IsZero() || s.LastError != nil {
			t.Errorf("the other: %+v", s)
		}
		first.set(nil)
		time.Sleep(time.Minute)
		wantPlain(t, f, t.Context(), 2) // and a probe
		synctest.Wait()
		st = f.Stats()
		if s := st.Stores[0]; !s.Trouble.IsZero() || !errors.Is(s.LastError, errFault) {
			t.Errorf("a store that has recovered: %+v", s)
		}
		if st.Slowest.Took != 3*time.Second {
			t.Errorf("slowest: %+v", st.Slowest)
		}
		if !strings.Contains(log.String(), `msg="slow fetch" store=second chunk=`+chunks[1].ID.String()+" took=3s") {
			t.Errorf("no line tells of the slow fetch:\n%s", log.String())
		}
	})
}
