package e2e

import (
	"archive/tar"
	"bytes"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// faulty is a small converted image in a registry behind a proxy.
type faulty struct {
	proxy *faultproxy.Proxy
	image string
	data  []byte // of the file /data, which no start reads
}

func newFaulty(t *testing.T, repository string) *faulty {
	t.Helper()
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.ScratchImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := faultproxy.New("http://" + w.registry.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	source := w.registry.Address + "/" + repository + ":source"
	if err := testenv.Push(t.Context(), layout, source); err != nil {
		t.Fatal(err)
	}
	f := &faulty{proxy: proxy, image: proxy.Addr() + "/" + repository + ":converted", data: make([]byte, 300<<10)}
	rand.NewChaCha8([32]byte{1}).Read(f.data)
	addFile(t, source, "data", f.data)
	if out, err := w.command("--boot", w.boot, source, f.image).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	if r := docker(t, "pull", "--quiet", f.image); r.code != 0 {
		t.Fatal(r.stderr)
	}
	return f
}

// TestFaultsInContainers takes some rows of docs/failure.md through the engine:
// what a user sees of a fault during the start, and in a container that runs.
func TestFaultsInContainers(t *testing.T) {
	f := newFaulty(t, "faulty")
	proxy, image, data := f.proxy, f.image, f.data
	lost := []struct {
		name  string
		fault faultproxy.Fault
		says  string
	}{
		{"404", faultproxy.Status(http.StatusNotFound, ""), "the registry does not have this blob"},
		{"403", faultproxy.Status(http.StatusForbidden, ""), "403 Forbidden"},
		{"wrong bytes", faultproxy.Flip(40), "is corrupt"},
		{"redirects in a circle", faultproxy.RedirectLoop(), "more than 10 redirects"},
	}
	t.Run("start", func(t *testing.T) {
		for _, c := range lost {
			proxy.Set(c.fault)
			r := run(t, image)
			if r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, c.says) {
				t.Errorf("%s: exit %d, stdout %q, stderr %q; want exit 125, and %q", c.name, r.code, r.stdout, r.stderr, c.says)
			}
		}
		for name, fault := range map[string]faultproxy.Fault{
			"500, 3 times":             faultproxy.Times(3, faultproxy.Status(http.StatusInternalServerError, "")),
			"429, once":                faultproxy.Times(1, faultproxy.Status(http.StatusTooManyRequests, "1")),
			"RST in the body, 3 times": faultproxy.Times(3, faultproxy.Reset(1000)),
			"nothing comes for 2 s":    faultproxy.Outage(2 * time.Second),
			"200 for 206":              faultproxy.IgnoreRange(),
			"307 to another host":      faultproxy.Redirect(http.StatusTemporaryRedirect, proxy.Other(), false),
		} {
			proxy.Set(fault)
			if r := run(t, image); r.code != 0 || r.stdout != "ok\n" {
				t.Errorf("%s: exit %d, stdout %q, stderr %q; want exit 0 and %q", name, r.code, r.stdout, r.stderr, "ok\n")
			}
		}
	})
	t.Run("read", func(t *testing.T) {
		proxy.Set(nil)
		id := start(t, "--env", "BOOTFS_PREFETCH=none", image, "sleep")
		eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "ready\n" })
		docker(t, "exec", id, "/testapp").want(t, "ok\n") // the engine reads /etc/passwd for it
		cat := []string{"exec", id, "/testapp", "cat", "/data"}
		for _, c := range lost {
			proxy.Set(c.fault)
			if r := docker(t, cat...); r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "input/output error") {
				t.Errorf("%s: exit %d, %d bytes, stderr %q; want exit 1 and EIO", c.name, r.code, len(r.stdout), r.stderr)
			}
			eventually(t, c.name+": the log says why, and of what", func() bool {
				log := docker(t, "logs", id).stderr
				return strings.Contains(log, c.says) && strings.Contains(log, "path=/data")
			})
		}
		proxy.Set(nil)
		if r := docker(t, cat...); r.code != 0 || r.stdout != string(data) {
			t.Errorf("after the faults: exit %d, %d bytes, want %d, stderr %q", r.code, len(r.stdout), len(data), r.stderr)
		}
	})
}

// addFile adds a layer with a file to the image called ref.
func addFile(t *testing.T, ref, path string, data []byte) {
	t.Helper()
	addFiles(t, ref, map[string][]byte{path: data})
}

// addFiles adds a layer with files, by their paths.
func addFiles(t *testing.T, ref string, files map[string][]byte) {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(r)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		if err := tw.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(files[path]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(files[path]); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
}
