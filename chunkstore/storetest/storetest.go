// Package storetest is the contract of a chunk store as tests. A store proves
// itself in three lines:
//
//	func TestContract(t *testing.T) {
//		storetest.Run(t, func() chunkstore.Writer { return newStore(t) })
//	}
//
// What Run checks is what a Fetcher and the converter rely on; the optional
// interfaces are checked where a store has them.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// Run tests the stores that newStore returns. Each call returns an empty one.
func Run(t *testing.T, newStore func() chunkstore.Writer) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, chunkstore.Writer)
	}{
		{"Name", name},
		{"Missing", missing},
		{"RoundTrip", roundTrip},
		{"Bounds", bounds},
		{"Overwrite", overwrite},
		{"NothingRemembered", nothingRemembered},
		{"Cancelled", cancelled},
		{"Concurrent", concurrent},
		{"SameChunkAtOnce", sameChunkAtOnce},
		{"List", list},
		{"Remove", remove},
		{"Expire", expire},
		{"Batch", batch},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, newStore()) })
	}
}

// chunk returns the ID and the stored form of n reproducible bytes.
func chunk(seed, n int) (index.ID, []byte) {
	plain := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(plain)
	return index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
}

func put(t *testing.T, s chunkstore.Writer, id index.ID, frame []byte) {
	t.Helper()
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
}

func wantFrame(t *testing.T, s chunkstore.Store, id index.ID, want []byte) {
	t.Helper()
	got, err := s.Get(t.Context(), id, nil)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("Get: got %d bytes, error %v, want the %d bytes that were put", len(got), err, len(want))
	}
	if ok, err := s.Has(t.Context(), id); err != nil || !ok {
		t.Errorf("Has: got %v, %v, want true", ok, err)
	}
}

func wantMissing(t *testing.T, s chunkstore.Store, id index.ID) {
	t.Helper()
	got, err := s.Get(t.Context(), id, []byte("kept"))
	if !errors.Is(err, chunkstore.ErrNotFound) || string(got) != "kept" {
		t.Errorf("Get: got %q, error %v, want %q, ErrNotFound", got, err, "kept")
	}
	if ok, err := s.Has(t.Context(), id); err != nil || ok {
		t.Errorf("Has: got %v, %v, want false", ok, err)
	}
}

func name(t *testing.T, s chunkstore.Writer) {
	if s.String() == "" {
		t.Error("String: got nothing, want a name for messages")
	}
}

func missing(t *testing.T, s chunkstore.Writer) {
	id, _ := chunk(1, 10)
	wantMissing(t, s, id)
	other, frame := chunk(2, 10)
	put(t, s, other, frame)
	wantMissing(t, s, id)
	near := other
	near[31]++ // beside it in every order
	wantMissing(t, s, near)
}

func roundTrip(t *testing.T, s chunkstore.Writer) {
	for i, n := range []int{1, 2, 4095, 4096, 4097, 65536, 256 << 10, 1 << 20} {
		id, frame := chunk(i, n)
		put(t, s, id, frame)
		wantFrame(t, s, id, frame)

		dst := append(make([]byte, 0, 100), "before"...)
		got, err := s.Get(t.Context(), id, dst)
		if err != nil || !bytes.Equal(got, append([]byte("before"), frame...)) {
			t.Errorf("%d bytes: Get did not append: error %v", n, err)
		}
	}
}

// bounds: what no store may hold is refused before it is stored.
func bounds(t *testing.T, s chunkstore.Writer) {
	id, _ := chunk(1, 10)
	if err := s.Put(t.Context(), id, make([]byte, chunkstore.MaxStored+1)); err == nil {
		t.Errorf("Put of %d bytes: got no error", chunkstore.MaxStored+1)
	}
	if err := s.Put(t.Context(), id, nil); err == nil {
		t.Error("Put of no bytes: got no error")
	}
	wantMissing(t, s, id)
	largest := bytes.Repeat([]byte{1}, chunkstore.MaxStored)
	put(t, s, id, largest)
	wantFrame(t, s, id, largest)
}

// overwrite: a good chunk takes the place of a damaged one.
func overwrite(t *testing.T, s chunkstore.Writer) {
	id, frame := chunk(1, 1000)
	for _, damaged := range [][]byte{{0}, frame[:len(frame)/2], append(bytes.Clone(frame), 0)} {
		put(t, s, id, damaged)
		wantFrame(t, s, id, damaged)
		put(t, s, id, frame)
		wantFrame(t, s, id, frame)
	}
}

// nothingRemembered: a chunk that was missing is found once it is there.
func nothingRemembered(t *testing.T, s chunkstore.Writer) {
	id, frame := chunk(1, 1000)
	wantMissing(t, s, id)
	put(t, s, id, frame)
	wantFrame(t, s, id, frame)
}

// cancelled: a call whose context has ended returns, and leaves nothing half
// done.
func cancelled(t *testing.T, s chunkstore.Writer) {
	id, frame := chunk(1, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan error)
	go func() {
		err := s.Put(ctx, id, frame)
		s.Get(ctx, id, nil)
		s.Has(ctx, id)
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil {
			wantFrame(t, s, id, frame)
		} else {
			wantMissing(t, s, id)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("calls with an ended context did not return within 10 s")
	}
}

func concurrent(t *testing.T, s chunkstore.Writer) {
	var g sync.WaitGroup
	for w := range 8 {
		g.Go(func() {
			for i := range 8 {
				id, frame := chunk(w*8+i, 500+i)
				if err := s.Put(t.Context(), id, frame); err != nil {
					t.Error(err)
					return
				}
				got, err := s.Get(t.Context(), id, nil)
				if err != nil || !bytes.Equal(got, frame) {
					t.Errorf("writer %d, chunk %d: got %d bytes, %v", w, i, len(got), err)
				}
			}
		})
	}
	g.Wait()
	for i := range 8 * 8 {
		id, frame := chunk(i, 500+i%8)
		wantFrame(t, s, id, frame)
	}
}

// sameChunkAtOnce: readers see all of one of the writers' versions, or none.
func sameChunkAtOnce(t *testing.T, s chunkstore.Writer) {
	id, _ := chunk(1, 1)
	version := func(w int) []byte { return bytes.Repeat([]byte{byte(w + 1)}, 100_000+w) }
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		writers.Go(func() {
			for range 10 {
				if err := s.Put(t.Context(), id, version(w)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 4 {
		readers.Go(func() {
			var got []byte
			for {
				select {
				case <-stop:
					return
				default:
				}
				var err error
				got, err = s.Get(t.Context(), id, got[:0])
				if errors.Is(err, chunkstore.ErrNotFound) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if len(got) == 0 || !bytes.Equal(got, version(int(got[0])-1)) {
					t.Errorf("got %d bytes that no writer wrote", len(got))
					return
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
}

func list(t *testing.T, s chunkstore.Writer) {
	l, ok := s.(chunkstore.Lister)
	if !ok {
		return
	}
	began := time.Now()
	want := make(map[index.ID]int)
	check := func() {
		t.Helper()
		got := make(map[index.ID]bool)
		for e, err := range l.List(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			if got[e.ID] || want[e.ID] == 0 {
				t.Errorf("got chunk %s, twice (%v) or unasked", e.ID, got[e.ID])
			}
			if e.Size != int64(want[e.ID]) {
				t.Errorf("chunk %s: got %d bytes, want %d", e.ID, e.Size, want[e.ID])
			}
			if d := e.Modified.Sub(began); d < -2*time.Second || d > 10*time.Minute {
				t.Errorf("chunk %s: got modified %v, want about %v", e.ID, e.Modified, began)
			}
			got[e.ID] = true
		}
		if len(got) != len(want) {
			t.Errorf("got %d chunks, want %d", len(got), len(want))
		}
	}
	check()
	for i := range 50 {
		id, frame := chunk(i, 100)
		put(t, s, id, frame)
		want[id] = len(frame)
	}
	check()
	n := 0
	for range l.List(t.Context()) {
		if n++; n == 3 {
			break
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var last error
	for _, err := range l.List(ctx) {
		if last = err; err != nil {
			break
		}
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("with an ended context: got %v, want %v", last, context.Canceled)
	}
}

// remove: what was removed is gone, and nothing else is; a writer and a remover
// of one chunk do not disturb one another.
func remove(t *testing.T, s chunkstore.Writer) {
	r, ok := s.(chunkstore.Remover)
	if !ok {
		return
	}
	id, frame := chunk(1, 1000)
	near := id
	near[31]++ // in the same place, where stores have places
	if err := r.Remove(t.Context(), id); err != nil {
		t.Errorf("from an empty store: %v", err)
	}
	put(t, s, id, frame)
	put(t, s, near, frame)
	for range 2 {
		if err := r.Remove(t.Context(), id); err != nil {
			t.Error(err)
		}
		wantMissing(t, s, id)
		wantFrame(t, s, near, frame)
	}
	put(t, s, id, frame)
	wantFrame(t, s, id, frame)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Remove(ctx, id); err == nil {
		t.Error("with an ended context: got no error")
	}
	wantFrame(t, s, id, frame)

	if err := r.Remove(t.Context(), near); err != nil {
		t.Error(err)
	}
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			for range 10 {
				if err := s.Put(t.Context(), id, frame); err != nil {
					t.Error(err)
				}
				got, err := s.Get(t.Context(), id, nil)
				if err == nil && !bytes.Equal(got, frame) || err != nil && !errors.Is(err, chunkstore.ErrNotFound) {
					t.Errorf("beside removers: got %d bytes, %v", len(got), err)
				}
				if err := r.Remove(t.Context(), id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	g.Wait()
	wantMissing(t, s, id)
}

// expire: what is old goes and what was touched stays, whoever is faster.
func expire(t *testing.T, s chunkstore.Writer) {
	e, ok := s.(chunkstore.Expirer)
	if !ok {
		return
	}
	past, future := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	expired := func(id index.ID, then time.Time, want bool) {
		t.Helper()
		if got, err := e.Expire(t.Context(), id, then); err != nil || got != want {
			t.Errorf("Expire: got %v, %v, want %v", got, err, want)
		}
	}
	const n = 40
	var ids [n]index.ID
	var frames [n][]byte
	for i := range n {
		ids[i], frames[i] = chunk(i, 100)
	}
	expired(ids[0], future, false)
	if err := e.Touch(t.Context(), ids[0]); !errors.Is(err, chunkstore.ErrNotFound) {
		t.Errorf("Touch of what is not there: got %v, want ErrNotFound", err)
	}
	put(t, s, ids[0], frames[0])
	expired(ids[0], past, false)
	wantFrame(t, s, ids[0], frames[0])
	expired(ids[0], future, true)
	wantMissing(t, s, ids[0])

	for i := range n {
		put(t, s, ids[i], frames[i])
	}
	time.Sleep(2100 * time.Millisecond) // times may be whole seconds
	then := time.Now().Add(-time.Second)
	var g sync.WaitGroup
	var touched [n]error
	for i := range n {
		g.Go(func() { touched[i] = e.Touch(t.Context(), ids[i]) })
		g.Go(func() {
			if _, err := e.Expire(t.Context(), ids[i], then); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	for i := range n {
		switch {
		case touched[i] == nil:
			wantFrame(t, s, ids[i], frames[i])
		case errors.Is(touched[i], chunkstore.ErrNotFound):
			// It may have got its name back since: then it is as it was.
			if ok, err := s.Has(t.Context(), ids[i]); err != nil {
				t.Error(err)
			} else if ok {
				wantFrame(t, s, ids[i], frames[i])
			}
		default:
			t.Error(touched[i])
		}
	}
	expired(ids[0], then, false)
}

func batch(t *testing.T, s chunkstore.Writer) {
	b, ok := s.(chunkstore.Batcher)
	if !ok {
		return
	}
	var ids []index.ID
	frames := make(map[index.ID][]byte)
	for i := range 40 {
		id, frame := chunk(i, 100+i)
		put(t, s, id, frame)
		ids = append(ids, id)
		frames[id] = frame
	}
	for _, n := range []int{0, 1, 2, 40} {
		seen := make(map[int]bool)
		err := b.GetBatch(t.Context(), ids[:n], func(i int, frame []byte) error {
			if i < 0 || i >= n || seen[i] || !bytes.Equal(frame, frames[ids[i]]) {
				return fmt.Errorf("place %d of %d: twice (%v) or with other bytes", i, n, seen[i])
			}
			seen[i] = true
			return nil
		})
		if err != nil || len(seen) != n {
			t.Errorf("%d chunks: got %d, error %v", n, len(seen), err)
		}
	}
	stop := errors.New("stop")
	calls := 0
	err := b.GetBatch(t.Context(), ids, func(int, []byte) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("yield fails: got error %v after %d calls, want %v after 1", err, calls, stop)
	}
	absent, _ := chunk(1000, 10)
	err = b.GetBatch(t.Context(), append(ids[:3:3], absent), func(int, []byte) error { return nil })
	if !errors.Is(err, chunkstore.ErrNotFound) {
		t.Errorf("one is missing: got %v, want ErrNotFound", err)
	}
}
