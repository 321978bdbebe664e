package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
)

func TestBatchedContract(t *testing.T) {
	storetest.Run(t, func() chunkstore.Writer { return create(t, t.TempDir(), Batched()) })
}

func stagedPath(dir string, id index.ID) string {
	return filepath.Join(dir, id.String()[:4], places(id)[staged])
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestBatched: a chunk can be read by all once Put has returned, and has its
// name once Flush has.
func TestBatched(t *testing.T) {
	dir := t.TempDir()
	s, other := create(t, dir, Batched()), create(t, dir)
	const n = 2*flushGroup + 1
	for i := range n {
		id, frame := chunk(uint64(i), 100)
		if err := s.Put(t.Context(), id, frame); err != nil {
			t.Fatal(err)
		}
		if got, err := other.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
			t.Errorf("chunk %d: got %d bytes, %v, want it at once", i, len(got), err)
		}
		if _, err := os.Stat(path(dir, id)); err == nil {
			t.Errorf("chunk %d has its name and is not on disk", i)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Flush(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: got %v, want %v", err, context.Canceled)
	}
	if err := s.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, f := range files(t, dir) {
		if !strings.HasSuffix(f, suffix) || strings.HasPrefix(filepath.Base(f), ".") {
			t.Errorf("got %s, want names of chunks only", f)
		}
	}
	if got := len(files(t, dir)); got != n {
		t.Errorf("got %d files, want %d", got, n)
	}
}

// TestBatchedHeals: what is damaged under a chunk's name is found first, so the
// good chunk takes its place at once.
func TestBatchedHeals(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir, Batched())
	id, frame := chunk(1, 100)
	for name, damage := range map[string]func(string) error{
		"cut short": func(f string) error { return os.WriteFile(f, frame[:10], 0o644) },
		"empty":     func(f string) error { return os.WriteFile(f, nil, 0o644) },
		"FIFO":      func(f string) error { return unix.Mkfifo(f, 0o644) },
		"directory": func(f string) error { return os.Mkdir(f, 0o755) },
		"symlink":   func(f string) error { return os.Symlink("/etc/passwd", f) },
	} {
		os.RemoveAll(filepath.Dir(path(dir, id)))
		if err := errors.Join(os.Mkdir(filepath.Dir(path(dir, id)), 0o755), damage(path(dir, id))); err != nil {
			t.Fatal(err)
		}
		if err := s.Put(t.Context(), id, frame); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
			t.Errorf("%s: got %d bytes, %v", name, len(got), err)
		}
	}
}

// TestStagedSurprises: what is no chunk under a staged name is none, at once,
// and is in nobody's way.
func TestStagedSurprises(t *testing.T) {
	id, frame := chunk(1, 100)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, frame, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, surprise := range map[string]func(string) error{
		"empty":              func(f string) error { return os.WriteFile(f, nil, 0o644) },
		"FIFO":               func(f string) error { return unix.Mkfifo(f, 0o644) },
		"empty directory":    func(f string) error { return os.Mkdir(f, 0o755) },
		"directory of files": func(f string) error { return os.MkdirAll(f+"/x", 0o755) },
		"symlink":            func(f string) error { return os.Symlink(outside, f) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := create(t, dir, Batched())
			place := stagedPath(dir, id)
			if err := errors.Join(os.Mkdir(filepath.Dir(place), 0o755), surprise(place)); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Get(t.Context(), id, nil); !errors.Is(err, chunkstore.ErrNotFound) {
				t.Errorf("Get: got %v, want ErrNotFound", err)
			}
			if ok, err := s.Has(t.Context(), id); ok {
				t.Errorf("Has: got true, %v", err)
			}
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Fatal(err)
			}
			// And again, between Put and Flush.
			os.RemoveAll(place)
			if err := surprise(place); err != nil {
				t.Fatal(err)
			}
			flushed := s.Flush(t.Context())
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(t.Context()); err != nil {
				t.Error(err)
			}
			if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
				t.Errorf("got %d bytes, %v; the first flush: %v", len(got), err, flushed)
			}
		})
	}
}

// TestFlushOfRemoved: a chunk that is gone before it has its name is no error.
func TestFlushOfRemoved(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir, Batched())
	id, frame := chunk(1, 100)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if got := files(t, dir); len(got) > 0 {
		t.Errorf("got %v, want nothing", got)
	}
}

// TestAdopt: what a killed writer has left staged gets its name by another.
func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	killed, s := create(t, dir, Batched()), create(t, dir, Batched())
	id, frame := chunk(1, 100)
	named, namedFrame := chunk(2, 100)
	if err := errors.Join(killed.Put(t.Context(), id, frame), s.Put(t.Context(), named, namedFrame), s.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	missing, _ := chunk(3, 100)
	for _, id := range []index.ID{id, named, missing} {
		s.Adopt(id)
	}
	if err := s.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{path(dir, id), path(dir, named)}
	slices.Sort(want)
	if got := files(t, dir); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestFlushOfOne: several processes write one chunk and flush. It is there
// afterwards, and nothing else.
func TestFlushOfOne(t *testing.T) {
	dir := t.TempDir()
	id, frame := chunk(1, 30000)
	for range 20 {
		var g sync.WaitGroup
		for range 4 {
			s := create(t, dir, Batched())
			g.Go(func() {
				if err := errors.Join(s.Put(t.Context(), id, frame), s.Flush(t.Context())); err != nil {
					t.Error(err)
				}
			})
		}
		g.Wait()
		if got := files(t, dir); len(got) != 1 || got[0] != path(dir, id) {
			t.Fatalf("got %v, want only %s", got, path(dir, id))
		}
		if err := os.Remove(path(dir, id)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPutWaitsForFlush: a writer is ahead of the disk by so many chunks and no
// more.
func TestPutWaitsForFlush(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir, Batched())
	for i := range stagedMost {
		id, frame := chunk(uint64(i), 10)
		if err := s.Put(t.Context(), id, frame); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range files(t, dir) {
		if !strings.HasSuffix(f, suffix) {
			t.Errorf("%s waits for a flush", f)
		}
	}
}

// TestPowerCutBatched: after a power cut, what was flushed is there, and under a
// chunk's name is a whole chunk or nothing.
func TestPowerCutBatched(t *testing.T) {
	disk, dir := newDisk(t)
	store := filepath.Join(dir, "store")
	flushed := 0
	for round := range 3 {
		run(t, "mount", "-o", "loop,commit=300", disk, dir)
		s, err := Create(store, Batched())
		if err != nil {
			t.Fatal(err)
		}
		for i := range 40 {
			id, frame := chunk(uint64(100*round+i), 30000)
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Fatal(err)
			}
			if i == 19 {
				if err := s.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				// Names are durable with the next commit: this forces one.
				if err := syncDir(s.dir); err != nil {
					t.Fatal(err)
				}
				flushed += 20
			}
		}
		cutPower(t, dir)
		s.Close()
		disk = restart(t, disk, dir)
	}
	run(t, "mount", "-o", "loop", disk, dir)
	s, err := Open(store)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	named := 0
	for _, f := range files(t, store) {
		if strings.HasPrefix(filepath.Base(f), ".") {
			continue
		}
		id, ok := chunkstore.AtPlace(filepath.Base(filepath.Dir(f)), filepath.Base(f))
		if !ok {
			t.Fatalf("got %s, want a chunk's name", f)
		}
		frame, err := s.Get(t.Context(), id, nil)
		if err == nil {
			_, err = chunkstore.Decode(nil, frame, index.SHA256, index.Chunk{ID: id, Size: 30000})
		}
		if err != nil {
			t.Error(err)
		}
		named++
	}
	if named < flushed {
		t.Errorf("got %d chunks, want the %d that were flushed", named, flushed)
	}
}

// BenchmarkPutBatched measures chunks until they can be read, and until they are
// on disk.
func BenchmarkPutBatched(b *testing.B) {
	for _, flush := range []bool{false, true} {
		b.Run(fmt.Sprint("flush=", flush), func(b *testing.B) {
			s := create(b, b.TempDir(), Batched())
			_, frame := chunk(1, 30000)
			b.SetBytes(int64(len(frame)))
			n := 0
			for b.Loop() {
				id, _ := chunk(uint64(n), 8)
				if err := s.Put(b.Context(), id, frame); err != nil {
					b.Fatal(err)
				}
				if n++; flush && n%flushGroup == 0 {
					if err := s.Flush(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
