package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/convert"
)

// rebuild pushes the image of the world with another last line in its program,
// so that its last layer is another one. It returns the size of that.
func rebuild(t testing.TB, ref string) int64 {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	from, err := layout.ImageIndexFromPath(w.layout)
	check(err)
	m, err := from.IndexManifest()
	check(err)
	old, err := from.Image(m.Manifests[0].Digest)
	check(err)
	config, err := old.ConfigFile()
	check(err)
	layers, err := old.Layers()
	check(err)
	last := len(layers) - 1
	in, err := layers[last].Uncompressed()
	check(err)
	defer in.Close()
	var b bytes.Buffer
	changed := false
	r, out := tar.NewReader(in), tar.NewWriter(&b)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		check(err)
		data, err := io.ReadAll(r)
		check(err)
		if strings.HasSuffix(h.Name, "/main.py") {
			data, changed = append(data, "print('rebuilt')\n"...), true
			h.Size = int64(len(data))
		}
		check(out.WriteHeader(h))
		_, err = out.Write(data)
		check(err)
	}
	check(out.Close())
	if !changed {
		t.Fatal("the last layer has no main.py")
	}
	top, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
	check(err)
	config = config.DeepCopy()
	config.RootFS.DiffIDs, config.History = nil, nil
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), config)
	check(err)
	img, err = mutate.AppendLayers(img, append(slices.Clone(layers[:last]), top)...)
	check(err)
	to, err := name.ParseReference(ref, name.Insecure)
	check(err)
	check(remote.Write(to, img, remote.WithContext(t.Context())))
	size, err := top.Size()
	check(err)
	return size
}

// TestCache converts an image that was rebuilt with another last layer. With the
// cache of the conversion before, that layer alone crosses the network, and the
// image is the one that a conversion without a cache makes.
func TestCache(t *testing.T) {
	t.Parallel()
	source := newCountingProxy(w.registry.Address)
	defer source.Close()
	last := rebuild(t, source.address+"/cache/source:rebuilt")
	rebuilt := source.address + "/cache/source:rebuilt"
	for _, where := range []string{"type=inline", filepath.Join(t.TempDir(), "cache")} {
		t.Run(where, func(t *testing.T) {
			with, without := w.proxy.address+"/cache/app:with", w.proxy.address+"/cache/app:without"
			reportOf(t, "--base", "none", "--cache-to", where, w.source, with)
			reportOf(t, "--base", "none", w.source, without)

			var got, want convert.Report
			small := int64(64 << 10) // configuration
			read := source.measure(func() { got, _ = reportOf(t, "--cache-from", where, "--cache-to", where, rebuilt, with) })
			all := source.measure(func() { want, _ = reportOf(t, rebuilt, without) })
			p := got.Platforms[0]
			t.Logf("%d kB read at the source, %d kB without a cache; the last layer has %d kB; %.2f s, %.2f s without", read/1000, all/1000, last/1000, got.Seconds, want.Seconds)
			if read > last+small || p.CachedLayers != 3 || p.CachedBytes != p.SourceBytes-last {
				t.Errorf("%d bytes read at the source, the last layer has %d: %+v", read, last, p)
			}
			if got.Digest != want.Digest {
				t.Errorf("with a cache %s, without %s", got.Digest, want.Digest)
			}
			if out, err := w.command("check", "-q", rebuilt, with).CombinedOutput(); err != nil {
				t.Errorf("check: %v\n%s", err, out)
			}
			if r := runBeside(t, with); r.code != 0 || !strings.HasSuffix(r.stdout, "rebuilt\n") {
				t.Errorf("exit %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
			}
		})
	}
}

// BenchmarkCache compares the conversion of a rebuilt image with a cache, without
// one, and without anything of an earlier conversion, in turn. The boot binary
// is the built-in one, which comes compressed.
func BenchmarkCache(b *testing.B) {
	rebuilt := w.proxy.address + "/cache/source:rebuilt"
	rebuild(b, rebuilt)
	dir := b.TempDir()
	image := w.proxy.address + "/cache/bench:app"
	convertIn := func(args ...string) float64 {
		out, err := w.command(append([]string{"-q", "--json"}, args...)...).Output()
		if err != nil {
			b.Fatal(err)
		}
		var r convert.Report
		if err := json.Unmarshal(out, &r); err != nil {
			b.Fatal(err)
		}
		return r.Seconds
	}
	var seconds [3][]float64
	for b.Loop() {
		b.StopTimer()
		for i, args := range [][]string{{"--cache-from", dir}, nil, {"--base", "none"}} {
			convertIn("--base", "none", "--cache-to", dir, w.source, image)
			seconds[i] = append(seconds[i], convertIn(append(args, rebuilt, image)...))
		}
		b.StartTimer()
	}
	for i, unit := range []string{"s/cached", "s/uncached", "s/alone"} {
		slices.Sort(seconds[i])
		b.ReportMetric(seconds[i][len(seconds[i])/2], unit)
	}
}
