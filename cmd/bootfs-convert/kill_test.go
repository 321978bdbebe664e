package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// command is a call of bootfs-convert in a process of its own.
func command(t *testing.T, tmp string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Args = append([]string{"bootfs-convert"}, args...) // see TestMain
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	return cmd
}

// layerOf is a layer that holds a file of n bytes for each seed: app, and then
// app1 and so on.
func layerOf(t *testing.T, n int, seeds ...uint64) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	name := "app"
	for i, seed := range seeds {
		if i > 0 {
			name = fmt.Sprintf("app%d", i)
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(n)}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(sample(seed, n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// layoutOf makes an OCI layout, tag "src", of an image with one layer.
func layoutOf(t *testing.T, plain []byte) string {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	cf.Config.Cmd = []string{"/app"}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, static.NewLayer(plain, types.OCIUncompressedLayer)); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "src"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir + ":src"
}

// TestKilled kills conversions over an image that is there, at many moments:
// whoever looks afterwards sees the old image or the new one, whole, no
// temporary file, and no part of a chunk under a chunk's name. The new image
// refers to packs of the old one. The next conversion works, also with the cache
// of those that were killed.
func TestKilled(t *testing.T) {
	moments := 5
	if os.Getenv("BOOTFS_SOAK") != "" {
		moments = 34
	}
	const size = 4 << 20
	older, newer := layoutOf(t, layerOf(t, size, 1, 3)), layoutOf(t, layerOf(t, size, 2, 3))
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(reg.Close)
	host := strings.TrimPrefix(reg.URL, "http://")
	for _, test := range []struct {
		name, dst            string
		store, cache, around bool // chunks in a directory; a cache of conversions; temporary files beside dst
	}{
		{name: "oci", dst: "oci:" + filepath.Join(t.TempDir(), "layout") + ":dst", around: true},
		{name: "oci-archive", dst: "oci-archive:" + filepath.Join(t.TempDir(), "layout.tar") + ":dst", around: true},
		{name: "docker-archive", dst: "docker-archive:" + filepath.Join(t.TempDir(), "image.tar") + ":dst:latest", store: true, around: true},
		{name: "directory store", dst: host + "/stored:latest", store: true},
		{name: "registry", dst: host + "/dst:latest"},
		{name: "registry, cache", dst: host + "/cached:latest", cache: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			tmp, dst := t.TempDir(), test.dst
			args := []string{"-q", "--boot", "/bin/true"}
			castr, cache := filepath.Join(t.TempDir(), "castr"), filepath.Join(t.TempDir(), "cache")
			if test.store {
				args = append(args, "--store", castr)
			}
			if test.cache {
				args = append(args, "--cache-from", cache, "--cache-to", cache)
			}
			convert := func(src string) *exec.Cmd { return command(t, tmp, append(args, src, dst)...) }
			run := func(cmd *exec.Cmd) {
				t.Helper()
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			forget := func() { // what the conversion would otherwise find done
				if err := errors.Join(os.RemoveAll(castr), os.RemoveAll(cache)); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now()
			run(convert(newer))
			whole := time.Since(began)
			indexNew := rootOf(t, dst)
			forget()
			run(convert(older))
			indexOld := rootOf(t, dst)
			if indexOld == indexNew {
				t.Fatal("both images have one index")
			}
			const seed = 1
			rng := rand.New(rand.NewPCG(seed, 0))
			done, unfinished := 0, 0
			for i := range moments {
				cmd := convert(newer)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				// Somewhere in its i-th part.
				after := time.Duration(float64(whole) * (float64(i) + rng.Float64()) / float64(moments))
				time.Sleep(after)
				cmd.Process.Kill()
				cmd.Wait()
				switch got := rootOf(t, dst); got {
				case indexOld:
				case indexNew:
					done++
					forget()
					run(convert(older))
				default:
					t.Fatalf("killed after %v (seed %d): index %s is neither the old nor the new", after, seed, got)
				}
				if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
					t.Errorf("killed after %v: temporary files are left: %v, %v", after, left, err)
				}
				if test.store {
					unfinished = max(unfinished, checkChunks(t, castr))
				}
			}
			t.Logf("%d of %d conversions of %v were complete when they were killed", done, moments, whole)
			// What was in the making goes with the next conversion.
			run(convert(older))
			if around := strings.Split(dst, ":")[1]; test.around {
				if left, err := filepath.Glob(filepath.Join(filepath.Dir(around), ".*.bootfs-*")); err != nil || len(left) > 0 {
					t.Errorf("files in the making are left: %q, %v", left, err)
				}
			}
			if most := moments * writersOfStore; unfinished > most {
				t.Errorf("%d chunks in the making are left, want at most %d", unfinished, most)
			}
			if got := rootOf(t, dst); got != indexOld {
				t.Errorf("converted again: index %s, want %s", got, indexOld)
			}
			run(command(t, tmp, "check", "-q", older, dst))
		})
	}
}

// writersOfStore is how many chunks a conversion writes to a store at once, at
// most, and so how many files in the making it leaves when it is killed.
const writersOfStore = 64

// checkChunks looks at the files of a chunk store and returns how many chunks in
// the making are left in it, which gc removes.
func checkChunks(t *testing.T, dir string) (unfinished int) {
	t.Helper()
	s, err := local.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0 // it was killed before it had anything to write
	}
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for e, err := range s.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		frame, err := s.Get(t.Context(), e.ID, nil)
		if err != nil {
			t.Fatal(err)
		}
		var h zstd.Header
		if err := h.Decode(frame); err != nil {
			t.Fatalf("chunk %s: %v", e.ID, err)
		}
		if _, err := chunkstore.Decode(nil, frame, index.SHA256, index.Chunk{ID: e.ID, Size: int(h.FrameContentSize)}); err != nil {
			t.Error(err)
		}
	}
	// A future moment: all of them are older.
	unfinished, _, err = s.Sweep(t.Context(), time.Now().Add(time.Hour), true)
	if err != nil {
		t.Fatal(err)
	}
	return unfinished
}

// rootOf reads all chunks of a converted image and returns its index digest.
func rootOf(t *testing.T, image string) string {
	t.Helper()
	ref, err := transport.Parse(image, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	o, err := converted.Open(ctx, ref, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	root, err := o.Images[0].Spool(ctx, t.TempDir(), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	root.Close()
	return o.Images[0].Config.IndexDigest
}

// TestRestarted kills a conversion when its first pack is up. The second run
// sends every pack but that one.
func TestRestarted(t *testing.T) {
	var (
		mu    sync.Mutex // guards what follows
		sent  = map[string]int{}
		first = make(chan struct{}, 100)
	)
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	reg := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r)
		if digest := r.URL.Query().Get("digest"); r.Method == http.MethodPut && digest != "" {
			mu.Lock()
			sent[digest]++
			mu.Unlock()
			first <- struct{}{}
		}
	}))
	t.Cleanup(reg.Close)
	dst := strings.TrimPrefix(reg.URL, "http://") + "/dst:latest"
	src := layoutOf(t, layerOf(t, 64<<20, 3))
	args := []string{"-q", "--boot", "/bin/true", src, dst}
	cmd := command(t, t.TempDir(), args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-first:
	case <-time.After(5 * time.Minute):
		t.Error("no pack came in 5 min")
	}
	cmd.Process.Kill()
	cmd.Wait()
	mu.Lock()
	before := maps.Clone(sent)
	mu.Unlock()
	if out, err := command(t, t.TempDir(), args...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rootOf(t, dst)
	if len(before) == 0 || len(sent) <= len(before)+2 {
		t.Errorf("%d blobs were sent before the kill, %d in all", len(before), len(sent))
	}
	for digest, n := range sent {
		if before[digest] > 0 && n > 1 {
			t.Errorf("%s was sent %d times", digest, n)
		}
	}
}
