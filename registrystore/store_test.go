package registrystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

var (
	_ chunkstore.Store   = (*Store)(nil)
	_ chunkstore.Batcher = (*Store)(nil)
	_ chunkstore.Locator = (*Store)(nil)
)

// packBlobs serves packs from memory and counts.
type packBlobs struct {
	packs            map[string][]byte
	requests, now    atomic.Int64
	mostNow, largest atomic.Int64
	delay            time.Duration
}

func newPackBlobs(t testing.TB, im *image) *packBlobs {
	b := &packBlobs{packs: make(map[string][]byte)}
	for _, p := range im.packs {
		r, err := p.Open()
		if err != nil {
			t.Fatal(err)
		}
		if b.packs[p.Digest], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func (b *packBlobs) String() string { return "memory" }

func (b *packBlobs) Range(_ context.Context, digest string, off, n int64) (io.ReadCloser, error) {
	b.requests.Add(1)
	now := b.now.Add(1)
	for most := b.mostNow.Load(); now > most && !b.mostNow.CompareAndSwap(most, now); most = b.mostNow.Load() {
	}
	for most := b.largest.Load(); n > most && !b.largest.CompareAndSwap(most, n); most = b.largest.Load() {
	}
	time.Sleep(b.delay)
	return &rangeOf{bytes.NewReader(b.packs[digest][off : off+n]), b}, nil
}

type rangeOf struct {
	io.Reader
	b *packBlobs
}

func (r *rangeOf) Close() error { r.b.now.Add(-1); return nil }

func TestCoalesce(t *testing.T) {
	at := func(pack int, off int64, n int) Location { return Location{pack, off, n} }
	const mib = 1 << 20
	im := newImage(t, 300)
	s := NewStore(nil, im.locators, im.index)
	for i, start := range []bool{true, false} {
		if p, err := im.locators.Pack(i); err != nil || p.Start != start {
			t.Fatal(i, p, err)
		}
	}
	for _, tt := range []struct {
		name string
		in   []Location
		want [][]Location
	}{
		{"nothing", nil, nil},
		{"one", []Location{at(0, 5, 5)}, [][]Location{{at(0, 5, 5)}}},
		{"neighbours, out of order", []Location{at(0, 10, 5), at(0, 0, 10)}, [][]Location{{at(0, 0, 10), at(0, 10, 5)}}},
		{"two packs", []Location{at(1, 0, 5), at(0, 0, 5)}, [][]Location{{at(0, 0, 5)}, {at(1, 0, 5)}}},
		{"gap", []Location{at(0, 0, 5), at(0, 5+maxGap, 5)}, [][]Location{{at(0, 0, 5), at(0, 5+maxGap, 5)}}},
		{"gap + 1", []Location{at(0, 0, 5), at(0, 6+maxGap, 5)}, [][]Location{{at(0, 0, 5)}, {at(0, 6+maxGap, 5)}}},
		{"the same twice", []Location{at(0, 5, 5), at(0, 5, 5)}, [][]Location{{at(0, 5, 5), at(0, 5, 5)}}},
		{"overlap", []Location{at(0, 0, 5), at(0, 4, 5)}, [][]Location{{at(0, 0, 5)}, {at(0, 4, 5)}}},
		{"one in the other", []Location{at(0, 0, 9), at(0, 0, 5)}, [][]Location{{at(0, 0, 5)}, {at(0, 0, 9)}}},
		{"span", []Location{at(1, 0, mib), at(1, mib, maxSpan-mib)}, [][]Location{{at(1, 0, mib), at(1, mib, maxSpan-mib)}}},
		{"span + 1", []Location{at(1, 0, mib), at(1, mib, maxSpan-mib+1)}, [][]Location{{at(1, 0, mib)}, {at(1, mib, maxSpan-mib+1)}}},
		{"span + 1 in the start set", []Location{at(0, 0, mib), at(0, mib, maxSpan-mib+1)}, [][]Location{{at(0, 0, mib), at(0, mib, maxSpan-mib+1)}}},
	} {
		var list []wanted
		for i, l := range tt.in {
			list = append(list, wanted{i: i, at: l})
		}
		var got [][]Location
		for _, run := range s.coalesce(list, false) {
			var ls []Location
			for _, w := range run {
				ls = append(ls, w.at)
			}
			got = append(got, ls)
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestStoreInMemory(t *testing.T) {
	im := newImage(t, 300)
	b := newPackBlobs(t, im)
	s := NewStore(b, im.locators, im.index)
	im.readAll(t, s)
	ids := im.ids(t, 0, im.index.Len())
	if s.String() != "memory" {
		t.Errorf("got %q", s)
	}

	// A start is one request for each pack of the start set.
	var start []index.ID
	for pos := range im.locators.StartSet() {
		c, _ := im.index.At(pos)
		start = append(start, c.ID)
	}
	b.requests.Store(0)
	places := 0
	if err := s.GetBatch(t.Context(), start, func(int, []byte) error { places++; return nil }); err != nil {
		t.Fatal(err)
	}
	if n := b.requests.Load(); n != 1 || places != len(start) || places < 20 {
		t.Errorf("%d chunks of a start set of %d in %d requests, want 1", places, len(start), n)
	}

	for _, id := range ids[:25] {
		if has, err := s.Has(t.Context(), id); !has || err != nil {
			t.Errorf("Has: got %v, %v", has, err)
		}
	}
	if has, err := s.Has(t.Context(), numbered(1)); has || err != nil {
		t.Errorf("Has unknown: got %v, %v", has, err)
	}
	if got := s.Locate(ids[1]); !strings.HasPrefix(got, "pack "+im.packs[0].Digest+" at ") {
		t.Errorf("Locate: got %q", got)
	}
	if got := s.Locate(numbered(1)); got != "in no pack" {
		t.Errorf("Locate unknown: got %q", got)
	}
	for _, id := range ids {
		if !bytes.ContainsFunc(im.plain[id], func(r rune) bool { return r != 0 }) {
			b.requests.Store(0)
			if _, err := s.Get(t.Context(), id, nil); err != nil || b.requests.Load() != 0 {
				t.Errorf("zeros: %v, %d requests", err, b.requests.Load())
			}
			if got := s.Locate(id); got != "all zeros, in no pack" && im.plain[id][0] == 0 && len(im.plain[id]) > 1 {
				t.Errorf("Locate zeros: got %q", got)
			}
			break
		}
	}
	for _, list := range [][]index.ID{{numbered(1)}, append(slices.Clone(ids[:3]), numbered(1))} {
		if err := s.GetBatch(t.Context(), list, func(int, []byte) error { return nil }); !errors.Is(err, chunkstore.ErrNotFound) {
			t.Errorf("unknown chunk in a batch: got %v", err)
		}
	}
	errFull := errors.New("full")
	if err := s.GetBatch(t.Context(), ids, func(int, []byte) error { return errFull }); !errors.Is(err, errFull) {
		t.Errorf("got %v, want yield's error", err)
	}
}

// TestStoreLimits counts the requests that run at once.
func TestStoreLimits(t *testing.T) {
	im := newImage(t, 100)
	b := newPackBlobs(t, im)
	b.delay = 10 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(b, im.locators, im.index)
		var wg sync.WaitGroup
		for _, id := range im.ids(t, 0, im.index.Len()) {
			wg.Go(func() {
				if _, err := s.Get(t.Context(), id, nil); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	if n := b.mostNow.Load(); n != parallelRequests {
		t.Errorf("%d requests at once, want %d", n, parallelRequests)
	}
}

// TestLayoutMoves: in a container, boot moves the mount of a layout away from
// where it was opened. One that comes later is found all the same.
func TestLayoutMoves(t *testing.T) {
	im := newImage(t, 20)
	dir := t.TempDir()
	before, after := filepath.Join(dir, "before"), filepath.Join(dir, "after")
	early := NewStore(NewLayoutBlobs(before), im.locators, im.index)
	data, err := DataManifest(im.packs)
	if err != nil {
		t.Fatal(err)
	}
	empty, err := layout.Write(before, emptyIndex)
	if err != nil {
		t.Fatal(err)
	}
	if err := empty.AppendImage(data); err != nil {
		t.Fatal(err)
	}
	im.readAll(t, early)
	held := NewStore(NewLayoutBlobs(before), im.locators, im.index)
	if err := os.Rename(before, after); err != nil {
		t.Fatal(err)
	}
	im.readAll(t, held)
}

// TestHostileLayout puts other things than files in the place of a blob.
func TestHostileLayout(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	im := newImage(t, 20)
	id := im.ids(t, 0, 1)[0]
	for name, put := range map[string]func(path string) error{
		"nothing":   func(string) error { return nil },
		"directory": func(p string) error { return os.Mkdir(p, 0o755) },
		"FIFO":      func(p string) error { return syscall.Mkfifo(p, 0o644) },
		"symlink":   func(p string) error { return os.Symlink("/etc/passwd", p) },
		"empty":     func(p string) error { return os.WriteFile(p, nil, 0o644) },
		"short":     func(p string) error { return os.WriteFile(p, []byte("x"), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			dir := t.TempDir()
			blobs := filepath.Join(dir, "blobs", "sha256")
			if err := os.MkdirAll(blobs, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := put(filepath.Join(blobs, strings.TrimPrefix(im.packs[0].Digest, "sha256:"))); err != nil {
				t.Fatal(err)
			}
			_, err := NewStore(NewLayoutBlobs(dir), im.locators, im.index).Get(t.Context(), id, nil)
			if err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("got %v", err)
			}
			if got := errors.Is(err, chunkstore.ErrNotFound); got != (name == "nothing") {
				t.Errorf("%v: not found is %v", err, got)
			}
		})
	}
}
