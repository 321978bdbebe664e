package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"maps"
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
// whoever looks afterwards sees the old image or the new one, whole, and no
// temporary file. The new image refers to packs of the old one.
func TestKilled(t *testing.T) {
	const size, moments = 4 << 20, 8
	older, newer := layoutOf(t, layerOf(t, size, 1, 3)), layoutOf(t, layerOf(t, size, 2, 3))
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(reg.Close)
	host := strings.TrimPrefix(reg.URL, "http://")
	for name, dst := range map[string]string{
		"oci":            "oci:" + filepath.Join(t.TempDir(), "layout") + ":dst",
		"oci-archive":    "oci-archive:" + filepath.Join(t.TempDir(), "layout.tar") + ":dst",
		"docker-archive": "docker-archive:" + filepath.Join(t.TempDir(), "image.tar") + ":dst:latest",
		"registry":       host + "/dst:latest",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tmp := t.TempDir()
			args := []string{"-q", "--boot", "/bin/true"}
			if name == "docker-archive" {
				args = append(args, "--store", filepath.Join(t.TempDir(), "castr"))
			}
			convert := func(src string) *exec.Cmd { return command(t, tmp, append(args, src, dst)...) }
			began := time.Now()
			if out, err := convert(newer).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			whole := time.Since(began)
			indexNew := rootOf(t, dst)
			if out, err := convert(older).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			indexOld := rootOf(t, dst)
			if indexOld == indexNew {
				t.Fatal("both images have one index")
			}
			done := 0
			for i := range moments {
				cmd := convert(newer)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(whole * time.Duration(i+1) / moments)
				cmd.Process.Kill()
				cmd.Wait()
				switch got := rootOf(t, dst); got {
				case indexOld:
				case indexNew:
					done++
					if out, err := convert(older).CombinedOutput(); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				default:
					t.Fatalf("killed after %d/%d: index %s is neither the old nor the new", i+1, moments, got)
				}
				if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
					t.Errorf("killed after %d/%d: temporary files are left: %v, %v", i+1, moments, left, err)
				}
			}
			t.Logf("%d of %d conversions of %v were complete", done, moments, whole)
			// What was in the making goes with the next conversion.
			if out, err := convert(older).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if path := strings.Split(dst, ":")[1]; name != "registry" {
				if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".*.bootfs-*")); err != nil || len(left) > 0 {
					t.Errorf("files in the making are left: %q, %v", left, err)
				}
			}
		})
	}
}

// rootOf reads all chunks of a converted image and returns its index digest.
func rootOf(t *testing.T, image string) string {
	t.Helper()
	ref, err := transport.Parse(image, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
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
	case <-time.After(time.Minute):
		t.Error("no pack came in a minute")
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
