package convert

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
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
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

// entries are the files of a layer: content by name, a directory if the name
// ends with "/".
type entries map[string][]byte

// mtime is that of all files that tarOf makes.
var mtime = time.Unix(1_700_000_000, 0)

func tarOf(t testing.TB, files entries) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(files[name])), ModTime: mtime}
		if strings.HasSuffix(name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sourceImage makes an image of a gzip, a zstd and a plain layer.
func sourceImage(t testing.TB, arch string, layers ...entries) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", arch
	cf.Config.Entrypoint, cf.Config.Cmd = []string{"/bin/app"}, []string{"serve"}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	for i, files := range layers {
		plain := tarOf(t, files)
		var l v1.Layer
		switch i % 3 {
		case 0:
			l, err = tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(plain)), nil },
				tarball.WithMediaType(types.OCILayer))
			if err != nil {
				t.Fatal(err)
			}
		case 1:
			z, err := zstd.NewWriter(nil)
			if err != nil {
				t.Fatal(err)
			}
			l = zstdLayer{static.NewLayer(z.EncodeAll(plain, nil), types.OCILayerZStd), plain}
		default:
			l = static.NewLayer(plain, types.OCIUncompressedLayer)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// zstdLayer knows the digest of its plain bytes, as static layers do not.
type zstdLayer struct {
	v1.Layer
	plain []byte
}

func (l zstdLayer) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.plain))
	return h, err
}

// writeLayout makes an OCI layout of images under the tag "src".
func writeLayout(t testing.TB, images ...v1.Image) transport.Ref {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	tag := map[string]string{"org.opencontainers.image.ref.name": "src"}
	if len(images) == 1 {
		err = p.AppendImage(images[0], layout.WithAnnotations(tag))
	} else {
		x := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
		for _, img := range images {
			cf, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			x = mutate.AppendManifests(x, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
				Platform: &v1.Platform{OS: cf.OS, Architecture: cf.Architecture}}})
		}
		attestation := mutate.AppendManifests(x, mutate.IndexAddendum{Add: empty.Image, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
		err = p.AppendIndex(attestation, layout.WithAnnotations(tag))
	}
	if err != nil {
		t.Fatal(err)
	}
	return transport.Ref{Transport: transport.OCI, Path: dir, Name: "src"}
}

// sample returns n bytes that compress to about half, the same for a seed.
func sample(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint64()) & 0x2f
	}
	return b
}

// sampleLayers hold duplicates within and across files, zeros, small files,
// whiteouts and a program.
func sampleLayers() []entries {
	big := sample(1, 3<<20)
	one, two, three := entries{}, entries{}, entries{}
	one["bin/"] = nil
	one["bin/app"] = sample(2, 900_000)
	one["data/"] = nil
	one["data/big"] = big
	for i := range 300 {
		one[fmt.Sprintf("data/small%03d", i)] = sample(uint64(i), 10+i*97%9000)
	}
	two["data/again"] = slices.Concat(big[1<<20:], big[:1<<20])
	two["data/zeros"] = make([]byte, 900_000)
	two["data/.wh.small007"] = nil
	three["data/twice"] = big
	three["data/half"] = slices.Concat(big[:1<<20], make([]byte, 600_000), sample(3, 300_000))
	return []entries{one, two, three}
}

// bootLayer is the layer of what has the headers of a program, but is none.
func bootLayer(text string) (*assembly.BootLayer, error) {
	return assembly.NewBootLayer([]byte("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 57) + text))
}

func boot(v1.Platform) (*assembly.BootLayer, error) {
	return bootLayer("a boot binary")
}

func ociRef(t testing.TB) transport.Ref {
	return transport.Ref{Transport: transport.OCI, Path: filepath.Join(t.TempDir(), "layout"), Name: "dst"}
}

func convertTo(t testing.TB, src, dst transport.Ref, change func(*Options)) *Report {
	t.Helper()
	o := Options{Source: src, Destination: dst, Boot: boot, TempDir: t.TempDir()}
	if change != nil {
		change(&o)
	}
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
	return r
}

// blobs lists the files of a directory with the digests of their content.
func blobs(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		rel, _ := filepath.Rel(dir, p)
		out[rel] = fmt.Sprintf("%x", sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestRunReproducible wants the same bytes at any parallelism: in packs, in a
// registry and in a loose store.
func TestRunReproducible(t *testing.T) {
	src := writeLayout(t, sourceImage(t, "amd64", sampleLayers()...))
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer reg.Close()
	host := strings.TrimPrefix(reg.URL, "http://")

	var packs, store map[string]string
	digests := map[string]string{}
	for i, procs := range []int{1, 2, 8, 2} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		dst := ociRef(t)
		r := convertTo(t, src, dst, nil)
		got := blobs(t, dst.Path)
		if packs == nil {
			packs = got
		}
		if !maps.Equal(got, packs) {
			t.Errorf("GOMAXPROCS=%d: another layout", procs)
		}

		rr := convertTo(t, src, transport.Ref{Transport: transport.Registry, Name: host + "/r:t"}, nil)
		if p := rr.Platforms[0]; i > 0 && p.NewBytes != 0 || i > 0 && p.ReusedBytes != p.StoredBytes {
			t.Errorf("run %d into the registry: %d bytes new, %d of %d reused", i, p.NewBytes, p.ReusedBytes, p.StoredBytes)
		}

		dir := filepath.Join(t.TempDir(), "rootfs.castr")
		lr := convertTo(t, src, ociRef(t), func(o *Options) { o.Store = dir })
		gotStore := blobs(t, dir)
		if store == nil {
			store = gotStore
		}
		if !maps.Equal(gotStore, store) {
			t.Errorf("GOMAXPROCS=%d: another loose store", procs)
		}

		for name, d := range map[string]string{"layout": r.Digest, "registry": rr.Digest, "index": r.Platforms[0].IndexDigest} {
			if want := cmp.Or(digests[name], d); d != want {
				t.Errorf("GOMAXPROCS=%d: %s is %s, want %s", procs, name, d, want)
			}
			digests[name] = d
		}
		if a, b := r.Platforms[0].IndexDigest, lr.Platforms[0].IndexDigest; a != b {
			t.Errorf("index %s with packs, %s with a loose store", a, b)
		}
	}
}

// TestRunRoot compares what the chunks give with the root image of the source.
func TestRunRoot(t *testing.T) {
	layers := sampleLayers()
	src := writeLayout(t, sourceImage(t, "amd64", layers...))
	plan, want := planOf(t, layers)
	for name, store := range map[string]string{"packs": "", "loose": filepath.Join(t.TempDir(), "castr")} {
		t.Run(name, func(t *testing.T) {
			dst := ociRef(t)
			r := convertTo(t, src, dst, func(o *Options) { o.Store = store }).Platforms[0]
			o, err := converted.Open(t.Context(), dst, converted.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer o.Close()
			img := o.Images[0]
			root, err := img.Spool(t.Context(), t.TempDir(), func(int64) {})
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			got, err := io.ReadAll(root)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the chunks do not give the root image: %v", err)
			}
			if err := img.CheckMeta(root); err != nil {
				t.Error(err)
			}
			digest, err := IndexDigest(t.Context(), mergeOf(t, layers), func(int64) {})
			if err != nil || digest != r.IndexDigest {
				t.Errorf("IndexDigest %s, %v, want %s", digest, err, r.IndexDigest)
			}
			tr, err := converted.Tree(img.Meta, root)
			if err != nil {
				t.Fatal(err)
			}
			have, err := treecmp.Tree(tr)
			if err != nil {
				t.Fatal(err)
			}
			source, err := treecmp.Tree(mergeOf(t, layers))
			if err != nil {
				t.Fatal(err)
			}
			if diff := treecmp.Diff(have, source); diff != nil {
				t.Errorf("the tree differs: %v", diff)
			}
			if r.RootBytes != plan.Size() || r.Chunks != img.Index.Len() || r.ZeroChunks == 0 || r.Distinct >= r.Chunks {
				t.Errorf("report %+v", r)
			}
			if store != "" {
				return
			}
			var start int
			for range img.Locators.StartSet() {
				start++
			}
			// The program's 900,000 bytes, and what shares chunks with it.
			if start < 8 || start > 30 || start < r.StartChunks {
				t.Errorf("start set of %d chunks, report %d", start, r.StartChunks)
			}
			if err := img.Locators.Verify(); err != nil {
				t.Error(err)
			}
		})
	}
}

func readLayers(t testing.TB, layers []entries) []*layer.Layer {
	t.Helper()
	var blobs []layer.Blob
	for _, files := range layers {
		b := tarOf(t, files)
		blobs = append(blobs, layer.Blob{Name: "test", Size: int64(len(b)), Plain: bytes.NewReader(b),
			Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }})
	}
	out, done, err := ReadLayers(t.Context(), blobs, t.TempDir(), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	return out
}

func mergeOf(t testing.TB, layers []entries) *tree.Tree {
	t.Helper()
	root, err := layer.Merge(readLayers(t, layers))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func planOf(t testing.TB, layers []entries) (*rootimage.Plan, []byte) {
	t.Helper()
	plan, err := rootimage.New(mergeOf(t, layers))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := plan.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return plan, b.Bytes()
}

// TestRunLooseHeals wants a damaged chunk of the store replaced, and the others
// reused.
func TestRunLooseHeals(t *testing.T) {
	src := writeLayout(t, sourceImage(t, "amd64", entries{"bin/app": sample(1, 500_000)}))
	dir := filepath.Join(t.TempDir(), "castr")
	loose := func(o *Options) { o.Store = dir }
	first := convertTo(t, src, ociRef(t), loose).Platforms[0]
	if first.NewBytes != first.StoredBytes || first.ReusedBytes != 0 {
		t.Errorf("first run: %+v", first)
	}
	before := blobs(t, dir)
	var damaged string
	for name := range before {
		damaged = filepath.Join(dir, name)
	}
	if err := os.WriteFile(damaged, []byte("damage"), 0o644); err != nil {
		t.Fatal(err)
	}
	second := convertTo(t, src, ociRef(t), loose).Platforms[0]
	if second.NewBytes == 0 || second.ReusedBytes == 0 || second.NewBytes+second.ReusedBytes != second.StoredBytes {
		t.Errorf("second run: %d new, %d reused of %d", second.NewBytes, second.ReusedBytes, second.StoredBytes)
	}
	if after := blobs(t, dir); !maps.Equal(before, after) {
		t.Error("the store has not healed")
	}
	if s, err := local.Open(dir); err != nil {
		t.Error(err)
	} else {
		s.Close()
	}
}

// TestRunPlatforms converts an index of two platforms and an attestation.
// TestRunWebStore writes to a web server that has its hiccups: the chunks are
// those of a directory, and the image records the address without the password.
func TestRunWebStore(t *testing.T) {
	layers := sampleLayers()
	src := writeLayout(t, sourceImage(t, "amd64", layers...))
	served, dir := t.TempDir(), filepath.Join(t.TempDir(), "castr")
	var puts atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := filepath.Join(served, filepath.Clean(r.URL.Path))
		if r.Method != http.MethodPut {
			http.ServeFile(w, r, name)
			return
		}
		b, err := io.ReadAll(r.Body)
		switch _, password, _ := r.BasicAuth(); {
		case password != "s3cret":
			w.WriteHeader(http.StatusUnauthorized)
		case puts.Add(1)%10 == 0:
			w.WriteHeader(http.StatusServiceUnavailable)
		case err == nil && os.MkdirAll(filepath.Dir(name), 0o755) == nil && os.WriteFile(name, b, 0o644) == nil:
			w.WriteHeader(http.StatusCreated)
		default:
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer server.Close()

	want := convertTo(t, src, ociRef(t), func(o *Options) { o.Store = dir })
	dst := ociRef(t)
	r := convertTo(t, src, dst, func(o *Options) { o.Store = "http://ci:s3cret@" + strings.TrimPrefix(server.URL, "http://") + "/castr" })
	if !maps.Equal(blobs(t, filepath.Join(served, "castr")), blobs(t, dir)) {
		t.Error("the store differs from that in a directory")
	}
	if a, b := r.Platforms[0].IndexDigest, want.Platforms[0].IndexDigest; a != b {
		t.Errorf("got index %s, want %s", a, b)
	}
	if r.Store != server.URL+"/castr" {
		t.Errorf("got store %s, want %s/castr", r.Store, server.URL)
	}
	o, err := converted.Open(t.Context(), dst, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	root, err := o.Images[0].Spool(t.Context(), t.TempDir(), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	_, image := planOf(t, layers)
	if got, err := io.ReadAll(root); err != nil || !bytes.Equal(got, image) {
		t.Errorf("the chunks do not give the root image: %v", err)
	}
	again := convertTo(t, src, ociRef(t), func(o *Options) { o.Store = server.URL + "/castr" }) // nothing to write: no password
	if p := again.Platforms[0]; p.NewBytes != 0 || p.ReusedBytes != p.StoredBytes {
		t.Errorf("once more: %d bytes new, %d of %d reused", p.NewBytes, p.ReusedBytes, p.StoredBytes)
	}

	if err := os.RemoveAll(filepath.Join(served, "castr")); err != nil {
		t.Fatal(err)
	}
	for store, want := range map[string]string{
		server.URL + "/castr": "401 Unauthorized: the server wants credentials",
		"http://ci:s3cret@" + strings.TrimPrefix(server.URL, "http://") + "/castr?x": "want https://HOST/PATH",
	} {
		_, err := Run(t.Context(), Options{Source: src, Destination: ociRef(t), Boot: boot, TempDir: t.TempDir(), Store: store})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestRunPlatforms(t *testing.T) {
	files := entries{"bin/app": sample(1, 100_000)}
	src := writeLayout(t, sourceImage(t, "amd64", files), sourceImage(t, "arm64", files), sourceImage(t, "mips64le", files))
	only := func(archs ...string) func(v1.Platform) (*assembly.BootLayer, error) {
		return func(p v1.Platform) (*assembly.BootLayer, error) {
			if !slices.Contains(archs, p.Architecture) {
				return nil, fmt.Errorf("no boot binary for %s", p)
			}
			return bootLayer("boot for " + p.Architecture)
		}
	}
	t.Run("all that can be started", func(t *testing.T) {
		dst := ociRef(t)
		r := convertTo(t, src, dst, func(o *Options) { o.Boot = only("amd64", "arm64") })
		if len(r.Platforms) != 2 || len(r.Skipped) != 2 || !strings.Contains(strings.Join(r.Skipped, " "), "mips64le") {
			t.Errorf("%d platforms, skipped %q", len(r.Platforms), r.Skipped)
		}
		o, err := converted.Open(t.Context(), dst, converted.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		if len(o.Images) != 2 || o.Images[1].Platform.Architecture != "arm64" {
			t.Errorf("%d images", len(o.Images))
		}
	})
	t.Run("one asked for", func(t *testing.T) {
		r := convertTo(t, src, ociRef(t), func(o *Options) {
			o.Platforms, o.Boot = []v1.Platform{{OS: "linux", Architecture: "arm64"}}, only("arm64")
		})
		if len(r.Platforms) != 1 || r.Platforms[0].Platform != "linux/arm64" {
			t.Errorf("%+v", r.Platforms)
		}
	})
	t.Run("asked for and not startable", func(t *testing.T) {
		_, err := Run(t.Context(), Options{Source: src, Destination: ociRef(t), Boot: only("amd64"),
			Platforms: []v1.Platform{{OS: "linux", Architecture: "mips64le"}}})
		if err == nil || !strings.Contains(err.Error(), "no boot binary for linux/mips64le") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a place for one", func(t *testing.T) {
		dst := transport.Ref{Transport: transport.DockerArchive, Path: filepath.Join(t.TempDir(), "x.tar"), Name: "x:y"}
		r := convertTo(t, src, dst, func(o *Options) { o.Store = t.TempDir() })
		if len(r.Platforms) != 1 || r.Platforms[0].Platform != "linux/"+runtime.GOARCH {
			t.Errorf("%+v", r.Platforms)
		}
	})
}

// TestSourceLayers looks for the source's layers and history in the converted
// image.
func TestSourceLayers(t *testing.T) {
	img := sourceImage(t, "amd64")
	var want []bootimage.Layer
	for i, files := range sampleLayers() {
		layers, err := sourceImage(t, "amd64", files).Layers()
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.Append(img, mutate.Addendum{History: v1.History{CreatedBy: "ENV x=y", EmptyLayer: true}},
			mutate.Addendum{Layer: layers[0], History: v1.History{CreatedBy: fmt.Sprint("COPY ", i), Author: "me"}}); err != nil {
			t.Fatal(err)
		}
		d, err := layers[0].Digest()
		if err != nil {
			t.Fatal(err)
		}
		diffID, err := layers[0].DiffID()
		if err != nil {
			t.Fatal(err)
		}
		size, err := layers[0].Size()
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, bootimage.Layer{Digest: d.String(), DiffID: diffID.String(), MediaType: string(types.OCILayer), Size: size, Step: 2*i + 2})
	}
	dst := ociRef(t)
	convertTo(t, writeLayout(t, img), dst, nil)
	o, err := converted.Open(t.Context(), dst, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	got := o.Images[0]
	if !slices.Equal(got.Config.Source.Layers, want) {
		t.Errorf("layers %+v, want %+v", got.Config.Source.Layers, want)
	}
	for i, h := range got.History[:6] {
		by := "ENV x=y"
		if i%2 == 1 {
			by = fmt.Sprint("COPY ", i/2)
		}
		if h.CreatedBy != by || !h.EmptyLayer {
			t.Errorf("step %d: %+v, want %q without a layer", i+1, h, by)
		}
	}

	// A history that does not fit the layers says nothing about them.
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.History = cf.History[:3]
	for _, l := range sourceLayers(transport.Image{Config: cf, Layers: make([]layer.Blob, 3)}) {
		if l.Step != 0 {
			t.Errorf("a layer of step %d of a history that is cut off", l.Step)
		}
	}
}

// TestRunStoreInRegistry puts the packs of an archive into a repository, where
// a tag keeps them.
func TestRunStoreInRegistry(t *testing.T) {
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer reg.Close()
	host := strings.TrimPrefix(reg.URL, "http://")
	src := writeLayout(t, sourceImage(t, "amd64", sampleLayers()...))
	dst := transport.Ref{Transport: transport.DockerArchive, Path: filepath.Join(t.TempDir(), "x.tar"), Name: "x:y"}
	for _, scheme := range []string{"registry+http://", "registry://"} {
		store := scheme + host + "/packs"
		if r := convertTo(t, src, dst, func(o *Options) { o.Store = store }); r.Store != store {
			t.Errorf("store %q recorded as %q", store, r.Store)
		}
	}
	o, err := converted.Open(t.Context(), dst, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	root, err := o.Images[0].Spool(t.Context(), t.TempDir(), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	root.Close()
	resp, err := reg.Client().Get(reg.URL + "/v2/packs/tags/list")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(b), `"packs-`) {
		t.Errorf("tags %s, %v: want one that keeps the packs", b, err)
	}
}

// TestRunEmpty converts an image without layers.
func TestRunEmpty(t *testing.T) {
	src, dst := writeLayout(t, sourceImage(t, "amd64")), ociRef(t)
	if r := convertTo(t, src, dst, nil).Platforms[0]; r.Files != 1 || r.Chunks != 1 || r.Packs != 1 {
		t.Errorf("report %+v", r)
	}
	o, err := converted.Open(t.Context(), dst, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o.Close()
}

func TestRunErrors(t *testing.T) {
	good := writeLayout(t, sourceImage(t, "amd64", entries{"bin/app": sample(1, 100_000)}))
	converted1 := ociRef(t)
	convertTo(t, good, converted1, nil)
	bad := writeLayout(t, sourceImage(t, "amd64", entries{"x": {}, "bin/app": sample(1, 100_000)}))
	// A flipped byte in the layer.
	for name := range blobs(t, bad.Path) {
		p := filepath.Join(bad.Path, name)
		if info, err := os.Stat(p); err != nil {
			t.Fatal(err)
		} else if info.Size() > 20_000 {
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(p, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)
	tiny := t.TempDir()
	if err := unix.Mount("tmpfs", tiny, "tmpfs", 0, "size=32k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(tiny, unix.MNT_DETACH)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	archive := transport.Ref{Transport: transport.DockerArchive, Path: filepath.Join(t.TempDir(), "x.tar"), Name: "x:y"}
	for _, tt := range []struct {
		name string
		src  transport.Ref
		dst  transport.Ref
		o    func(*Options)
		part Part
		want string
	}{
		{"no such source", transport.Ref{Transport: transport.OCI, Path: "/no/such", Name: "x"}, ociRef(t), nil, Source, "/no/such"},
		{"no such tag", transport.Ref{Transport: transport.OCI, Path: good.Path, Name: "nope"}, ociRef(t), nil, Source, "nope"},
		{"damaged layer", bad, ociRef(t), nil, Source, ""},
		{"converted already", converted1, ociRef(t), nil, Source, "already"},
		{"no place for chunks", good, archive, nil, Usage, "--store"},
		{"a store of no kind", good, ociRef(t), func(o *Options) { o.Store = "ftp://x" }, Usage, "ftp://x"},
		{"a store that is only read", good, ociRef(t), func(o *Options) { o.Store = "oci:/x" }, Usage, "oci:/x"},
		{"store is no repository", good, ociRef(t), func(o *Options) { o.Store = "registry://h/UPPER" }, Usage, "registry://h/UPPER"},
		{"store is a file", good, ociRef(t), func(o *Options) { o.Store = file }, Destination, file},
		{"destination is a file", good, transport.Ref{Transport: transport.OCI, Path: file, Name: "x"}, nil, Destination, file},
		{"too little space", good, ociRef(t), func(o *Options) { o.TempDir = small }, 0, small},
		{"full destination", good, transport.Ref{Transport: transport.OCI, Path: filepath.Join(tiny, "layout"), Name: "x"}, nil, Destination, ""},
		{"no such platform", good, ociRef(t), func(o *Options) { o.Platforms = []v1.Platform{{OS: "linux", Architecture: "s390x"}} }, Source, "s390x"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := Options{Source: tt.src, Destination: tt.dst, Boot: boot, TempDir: t.TempDir()}
			if tt.o != nil {
				tt.o(&o)
			}
			_, err := Run(t.Context(), o)
			if err == nil {
				t.Fatal("no error")
			}
			var part *Error
			if tt.part != 0 && (!errors.As(err, &part) || part.Part != tt.part) {
				t.Errorf("%v: of part %v, want %v", err, part, tt.part)
			}
			if full := errors.Is(err, scratch.ErrNoSpace); full != (tt.part == 0) {
				t.Errorf("%v: ErrNoSpace is %t", err, full)
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: want one line with %q", err, tt.want)
			}
			if _, err := os.Stat(tt.dst.Path); tt.dst.Path != file && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the destination is there: %v", err)
			}
		})
	}
}

// TestRunCancelled ends a conversion in the middle of each phase: the
// destination must be what it was.
func TestRunCancelled(t *testing.T) {
	src := writeLayout(t, sourceImage(t, "amd64", sampleLayers()...))
	for _, phase := range []Phase{PhaseLayers, PhaseChunks, PhaseUpload} {
		t.Run(string(phase), func(t *testing.T) {
			dst := ociRef(t)
			ctx, cancel := context.WithCancel(t.Context())
			_, err := Run(ctx, Options{Source: src, Destination: dst, Boot: boot, TempDir: t.TempDir(), Progress: func(e Event) {
				if e.Phase == phase && e.Done > 0 {
					cancel()
				}
			}})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if _, err := os.Stat(dst.Path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the destination is there: %v", err)
			}
		})
	}
}

func TestOverlaps(t *testing.T) {
	spans := sortSpans([]span{{100, 50}, {10, 10}, {20, 5}, {120, 100}, {300, 1}})
	if want := []span{{10, 15}, {100, 120}, {300, 1}}; !slices.Equal(spans, want) {
		t.Fatalf("got %v, want %v", spans, want)
	}
	for off := int64(0); off < 310; off++ {
		for _, size := range []int64{1, 2, 50, 400} {
			want := slices.ContainsFunc(spans, func(s span) bool { return off < s.Offset+s.Size && s.Offset < off+size })
			if got := overlaps(spans, off, size); got != want {
				t.Fatalf("overlaps(%d, %d) = %t", off, size, got)
			}
		}
	}
	if overlaps(nil, 0, 1) {
		t.Error("nothing overlaps with nothing")
	}
}

func TestLoopbackHost(t *testing.T) {
	for address, want := range map[string]string{
		"registry://localhost:5000/x": "localhost:5000", "registry://127.0.0.1/x": "127.0.0.1", "registry://[::1]:5000/x": "[::1]:5000",
		"registry://127.8.9.1:1/x": "127.8.9.1:1", "registry://r.localhost/x": "r.localhost",
		"registry://registry.example.com/x": "", "registry://10.0.0.1:5000/x": "", "/srv/localhost": "", "": "",
	} {
		if got := loopbackHost(address); got != want {
			t.Errorf("loopbackHost(%q) = %q, want %q", address, got, want)
		}
	}
}
