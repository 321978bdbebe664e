package nodecache

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// TestCasync: casync reads a cache while it is evicted from, as one of two
// stores, whichever digest names the chunks.
func TestCasync(t *testing.T) {
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		t.Run(d.String(), func(t *testing.T) {
			dir := t.TempDir()
			cache, whole := open(t, filepath.Join(dir, "cache"), Options{}), open(t, filepath.Join(dir, "whole"), Options{})
			const n, size = 200, 20_000
			var data []byte
			var file bytes.Buffer
			w := index.NewWriter(&file, chunker.V1, d)
			random := rand.NewChaCha8([32]byte{1})
			plain := make([]byte, size)
			var ids []index.ID
			fill := func(c *Cache, i int) {
				t.Helper()
				frame := chunkstore.Encode(nil, data[i*size:(i+1)*size])
				if err := c.Put(t.Context(), ids[i], frame); err != nil {
					t.Error(err)
				}
			}
			for i := range n {
				random.Read(plain)
				data = append(data, plain...)
				ids = append(ids, d.Sum(plain))
				if err := w.Append(ids[i], size); err != nil {
					t.Fatal(err)
				}
				fill(cache, i)
				fill(whole, i)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			for _, c := range []*Cache{cache, whole} {
				if err := c.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			caibx := filepath.Join(dir, "image.caibx")
			if err := os.WriteFile(caibx, file.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			run := func(args ...string) {
				t.Helper()
				if out, err := exec.Command("casync", args...).CombinedOutput(); err != nil {
					t.Fatalf("casync %v: %v\n%s", args, err, out)
				}
			}

			done := make(chan struct{})
			var evicting sync.WaitGroup
			evicting.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-done:
						return
					case <-time.After(time.Millisecond):
					}
					if _, err := cache.Prune(t.Context(), int64(50+i%100)*24<<10); err != nil {
						t.Error(err)
						return
					}
					for range 50 {
						fill(cache, rand.IntN(n))
					}
					if err := cache.Flush(t.Context()); err != nil {
						t.Error(err)
						return
					}
				}
			})
			for range 3 {
				out := filepath.Join(dir, "out")
				run("extract", "--store="+cache.String(), "--extra-store="+whole.String(), caibx, out)
				if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
					t.Errorf("casync extract: got %d bytes, %v, want the image's %d", len(got), err, len(data))
				}
			}
			close(done)
			evicting.Wait()

			before, err := cache.Usage(t.Context(), true)
			if err != nil {
				t.Fatal(err)
			}
			if before.Chunks == 0 || before.Chunks == n {
				t.Errorf("got %d chunks, want the cache to be evicted from", before.Chunks)
			}
			if found, err := cache.Check(t.Context(), CheckOptions{}); err != nil || found.Damaged != 0 || found.Chunks != before.Chunks {
				t.Errorf("check: got %+v, %v", found, err)
			}
		})
	}
}

// TestCheckStaged: a chunk that is not on disk yet is one to the check.
func TestCheckStaged(t *testing.T) {
	c := open(t, t.TempDir(), Options{})
	id, frame := chunk(1, 100)
	if err := c.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	if found, err := c.Check(t.Context(), CheckOptions{}); err != nil || found.Chunks != 1 || found.Damaged != 0 {
		t.Errorf("got %+v, %v", found, err)
	}
}
