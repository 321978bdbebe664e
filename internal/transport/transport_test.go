package transport

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/registrystore"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// layerTar is a layer with one file.
func layerTar(t testing.TB, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content)), ModTime: time.Unix(1, 0)}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type testLayer struct {
	plain       []byte
	compression compression.Compression
	mediaType   types.MediaType
}

// gzipLayers makes layers of the usual kind, one file in each.
func gzipLayers(t testing.TB, names ...string) []testLayer {
	var ls []testLayer
	for _, n := range names {
		ls = append(ls, testLayer{layerTar(t, n, strings.Repeat(n, 1000)), compression.GZip, types.OCILayer})
	}
	return ls
}

func testImage(t testing.TB, arch string, ls ...testLayer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	config := must(img.ConfigFile())(t).DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Config.Env = []string{"PATH=/bin"}
	img = must(mutate.ConfigFile(img, config))(t)
	for _, l := range ls {
		layer := static.NewLayer(l.plain, l.mediaType)
		if l.compression != compression.None {
			layer = must(tarball.LayerFromOpener(func() (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(l.plain)), nil
			}, tarball.WithCompression(l.compression), tarball.WithMediaType(l.mediaType)))(t)
		}
		img = must(mutate.AppendLayers(img, layer))(t)
	}
	return img
}

func platform(arch string) v1.Platform { return v1.Platform{OS: "linux", Architecture: arch} }

func testPack(content string) registrystore.Pack {
	return registrystore.Pack{
		PackDescriptor: registrystore.PackDescriptor{
			Digest: fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(content))), Size: int64(len(content)),
		},
		Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil },
	}
}

// startRegistry serves a registry and returns its address.
func startRegistry(t testing.TB, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		h = wrap(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func mustParse(t testing.TB, s string) Ref {
	t.Helper()
	return must(Parse(s, ""))(t)
}

// commit writes images, and packs for each, to a reference.
func commit(t testing.TB, ref string, o Options, packs []string, images map[string]v1.Image) string {
	t.Helper()
	ctx := context.Background()
	d := must(OpenDestination(ctx, mustParse(t, ref), o))(t)
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	var list []registrystore.Pack
	for _, p := range packs {
		list = append(list, testPack(p))
		if _, err := d.PutPack(ctx, list[len(list)-1]); err != nil {
			t.Fatal(err)
		}
		list[len(list)-1].Open = nil
	}
	var out []PlatformImage
	for _, arch := range []string{"amd64", "arm64"} {
		img, ok := images[arch]
		if !ok {
			continue
		}
		p := PlatformImage{Platform: platform(arch), Boot: img}
		if packs != nil {
			p.Data = must(registrystore.DataManifest(list))(t)
		}
		out = append(out, p)
	}
	return must(d.Commit(ctx, out))(t)
}

func open(t testing.TB, ref string, o Options) Source {
	t.Helper()
	s := must(Open(context.Background(), mustParse(t, ref), o))(t)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// checkImage compares what a source offers with the image that was written.
func checkImage(t testing.TB, got Image, want v1.Image, manifests bool) {
	t.Helper()
	digest := must(want.ConfigName())(t)
	if manifests {
		digest = must(want.Digest())(t)
	}
	if got.Digest != digest.String() {
		t.Errorf("digest %s, want %s", got.Digest, digest)
	}
	if raw := must(want.RawConfigFile())(t); !bytes.Equal(got.RawConfig, raw) {
		t.Errorf("configuration %s, want %s", got.RawConfig, raw)
	}
	layers := must(want.Layers())(t)
	if len(got.Layers) != len(layers) {
		t.Fatalf("%d layers, want %d", len(got.Layers), len(layers))
	}
	for i, l := range layers {
		b := got.Layers[i]
		if diffID := must(l.DiffID())(t); b.DiffID != diffID.String() {
			t.Errorf("layer %d: DiffID %s, want %s", i, b.DiffID, diffID)
		}
		rc := must(b.Open(context.Background()))(t)
		stored := must(io.ReadAll(rc))(t)
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
		if int64(len(stored)) != b.Size {
			t.Errorf("layer %d: %d bytes, Size says %d", i, len(stored), b.Size)
		}
		plain := must(io.ReadAll(must(l.Uncompressed())(t)))(t)
		if b.Plain != nil {
			at := make([]byte, b.Size)
			if _, err := b.Plain.ReadAt(at, 0); err != nil && err != io.EOF {
				t.Error(err)
			}
			if !bytes.Equal(at, plain) {
				t.Errorf("layer %d: Plain is not the layer", i)
			}
		}
		want := plain
		if manifests {
			want = must(io.ReadAll(must(l.Compressed())(t)))(t)
		}
		if !bytes.Equal(stored, want) {
			t.Errorf("layer %d: %d bytes differ from the %d written", i, len(stored), len(want))
		}
	}
}

func skopeo(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command("skopeo", append([]string{"--insecure-policy"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, stderr.Bytes())
	}
	return string(out)
}

// places are references for each transport that holds packs, with skopeo's
// flags for reading it.
func places(t testing.TB) map[string][]string {
	real := must(testenv.StartRegistry(context.Background(), t.TempDir(), ""))(t)
	t.Cleanup(func() { real.Close() })
	return map[string][]string{
		"docker-registry": {"docker://" + real.Address + "/a/b:v1", "--tls-verify=false"},
		"registry":        {"docker://" + startRegistry(t, nil) + "/a/b:v1", "--tls-verify=false"},
		"oci":             {"oci:" + t.TempDir() + "/layout:v1"},
		"oci-archive":     {"oci-archive:" + t.TempDir() + "/x.tar:v1"},
	}
}

func TestRoundTripWithPacks(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			ref, flags := place[0], place[1:]
			images := map[string]v1.Image{
				"amd64": testImage(t, "amd64", gzipLayers(t, "boot", "x")...),
				"arm64": testImage(t, "arm64", gzipLayers(t, "boot", "y")...),
			}
			packs := []string{"first pack", strings.Repeat("second pack", 10000)}
			var progress atomic.Int64
			digest := commit(t, ref, Options{Progress: func(n int64) { progress.Add(n) }}, packs, images)
			if want := int64(len(packs[0]) + len(packs[1])); progress.Load() < want {
				t.Errorf("progress of %d bytes, at least %d were written", progress.Load(), want)
			}

			s := open(t, ref, Options{})
			got := s.Images()
			if len(got) != 2 || got[0].Platform.String() != "linux/amd64" || got[1].Platform.String() != "linux/arm64" {
				t.Fatalf("images %+v", got)
			}
			checkImage(t, got[0], images["amd64"], true)
			checkImage(t, got[1], images["arm64"], true)
			// One data manifest for both platforms, as their packs are the same.
			for _, skipped := range s.Skipped() {
				if skipped.Platform != "unknown/unknown" || skipped.Reason != "artifact "+registrystore.ArtifactTypeData {
					t.Errorf("skipped %+v", skipped)
				}
			}
			if len(s.Skipped()) != 2 {
				t.Errorf("%d manifests skipped, want 2", len(s.Skipped()))
			}
			blobs := must(s.Blobs())(t)
			for _, p := range packs {
				b := must(registrystore.ReadRange(context.Background(), blobs, testPack(p).Digest, 3, 5, nil))(t)
				if string(b) != p[3:8] {
					t.Errorf("range of a pack: %q, want %q", b, p[3:8])
				}
			}

			// skopeo reads the same, and takes the packs along.
			raw := skopeo(t, append([]string{"inspect", "--raw", ref}, flags...)...)
			if got := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(raw))); got != digest {
				t.Errorf("skopeo reads an index %s, Commit said %s", got, digest)
			}
			var inspect struct{ Architecture, Digest string }
			if err := json.Unmarshal([]byte(skopeo(t, append([]string{"inspect", "--override-arch", "arm64", ref}, flags...)...)), &inspect); err != nil {
				t.Fatal(err)
			}
			if inspect.Architecture != "arm64" {
				t.Errorf("skopeo inspect: %+v", inspect)
			}
			copied := "oci:" + t.TempDir() + "/copy:v2"
			if len(flags) > 0 {
				flags = []string{"--src-tls-verify=false"}
			}
			skopeo(t, append([]string{"copy", "--all", "--preserve-digests", ref, copied}, flags...)...)
			c := open(t, copied, Options{})
			if len(c.Images()) != 2 || c.Images()[0].Digest != got[0].Digest {
				t.Errorf("after skopeo copy: %+v", c.Images())
			}
			if _, err := registrystore.ReadRange(context.Background(), must(c.Blobs())(t), testPack(packs[1]).Digest, 0, 5, nil); err != nil {
				t.Errorf("pack after skopeo copy: %v", err)
			}
		})
	}
}

func TestPacksAreReused(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			img := map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)}
			commit(t, place[0], Options{}, []string{"old"}, img)
			d := must(OpenDestination(context.Background(), mustParse(t, place[0]), Options{}))(t)
			defer d.Close()
			for i, want := range []bool{name != "oci-archive", true} {
				if reused, err := d.PutPack(context.Background(), testPack("old")); err != nil || reused != want {
					t.Errorf("PutPack %d of a pack that is there: %v, %v", i, reused, err)
				}
			}
			if reused, err := d.PutPack(context.Background(), testPack("new")); err != nil || reused {
				t.Errorf("PutPack of a new pack: %v, %v", reused, err)
			}
			// The bytes must be those of the name.
			bad := testPack("good")
			bad.Open = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("evil")), nil }
			if _, err := d.PutPack(context.Background(), bad); err == nil {
				t.Error("PutPack took a pack with other bytes than its digest")
			}
		})
	}
}

// A place for packs alone gets only data manifests.
func TestDataOnly(t *testing.T) {
	ref := "docker://" + startRegistry(t, nil) + "/packs:v1"
	ctx := context.Background()
	d := must(OpenDestination(ctx, mustParse(t, ref), Options{}))(t)
	defer d.Close()
	p := testPack("pack")
	if _, err := d.PutPack(ctx, p); err != nil {
		t.Fatal(err)
	}
	data := must(registrystore.DataManifest([]registrystore.Pack{p}))(t)
	if _, err := d.Commit(ctx, []PlatformImage{{Platform: platform("amd64"), Data: data}}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, mustParse(t, ref), Options{}); err == nil || !strings.Contains(err.Error(), "no image") {
		t.Errorf("Open of packs: %v", err)
	}
}

func TestStoreAddress(t *testing.T) {
	host := startRegistry(t, nil)
	for ref, want := range map[string]string{
		"docker://" + host + "/a/b:v1":        "registry://" + host + "/a/b",
		"oci:" + t.TempDir() + "/x":           "",
		"oci-archive:" + t.TempDir() + "/x":   "",
		"docker-archive:" + t.TempDir() + "/": "",
	} {
		if strings.HasSuffix(ref, "/") {
			ref += "x"
		}
		d := must(OpenDestination(context.Background(), mustParse(t, ref), Options{}))(t)
		if got := d.StoreAddress(); got != want {
			t.Errorf("%s: StoreAddress %q, want %q", ref, got, want)
		}
		if d.HoldsPacks() != mustParse(t, ref).HoldsPacks() {
			t.Errorf("%s: HoldsPacks differs from the reference's", ref)
		}
		d.Close()
	}
}

func TestDockerArchive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.tar")
	img := testImage(t, "amd64", gzipLayers(t, "boot", "x", "boot")...)
	id := commit(t, "docker-archive:"+file+":example/app:v1", Options{}, nil, map[string]v1.Image{"amd64": img})
	if want := must(img.ConfigName())(t).String(); id != want {
		t.Errorf("Commit returned %s, want the image ID %s", id, want)
	}
	for _, ref := range []string{"docker-archive:" + file, "docker-archive:" + file + ":docker.io/example/app:v1"} {
		s := open(t, ref, Options{})
		checkImage(t, s.Images()[0], img, false)
		for i, l := range s.Images()[0].Layers {
			if l.Plain == nil {
				t.Errorf("layer %d is not read in place", i)
			}
		}
	}
	var inspect struct {
		Layers   []string
		RepoTags []string
	}
	if err := json.Unmarshal([]byte(skopeo(t, "inspect", "docker-archive:"+file+":example/app:v1")), &inspect); err != nil {
		t.Fatal(err)
	}
	if len(inspect.Layers) != 3 {
		t.Errorf("skopeo inspect: %+v", inspect)
	}
	// What skopeo writes is read as well, compressed as a whole too.
	other := filepath.Join(t.TempDir(), "y.tar")
	skopeo(t, "copy", "docker-archive:"+file, "docker-archive:"+other+":other:v2")
	checkImage(t, open(t, "docker-archive:"+other+":other:v2", Options{}).Images()[0], img, false)
	for _, tool := range []string{"gzip", "zstd"} {
		packed := filepath.Join(t.TempDir(), "z")
		out := must(exec.Command(tool, "-c", other).Output())(t)
		if err := os.WriteFile(packed, out, 0o644); err != nil {
			t.Fatal(err)
		}
		checkImage(t, open(t, "docker-archive:"+packed, Options{}).Images()[0], img, false)
	}
	for ref, want := range map[string]string{
		"docker-archive:" + file + ":nobody": "no image \"nobody\"",
		"oci-archive:" + file:                "name it docker-archive:",
		"oci:" + file:                        "not a directory",
		"docker-archive:" + t.TempDir():      "is a directory",
		"docker-archive:/nonexistent":        "no such file",
	} {
		if _, err := Open(context.Background(), mustParse(t, ref), Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", ref, err, want)
		}
	}
}

func TestOneImageOnly(t *testing.T) {
	d := must(OpenDestination(context.Background(), mustParse(t, "docker-archive:"+t.TempDir()+"/x"), Options{}))(t)
	defer d.Close()
	img := testImage(t, "amd64", gzipLayers(t, "a")...)
	two := []PlatformImage{{Platform: platform("amd64"), Boot: img}, {Platform: platform("arm64"), Boot: img}}
	if _, err := d.Commit(context.Background(), two); err == nil {
		t.Error("Commit took two platforms")
	}
	if _, err := d.PutPack(context.Background(), testPack("p")); !errors.Is(err, errNoPacks) {
		t.Errorf("PutPack: %v", err)
	}
}

// A layout keeps what others put into it, and replaces the name it is given.
func TestLayoutNames(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	images := make([]v1.Image, 4)
	for i := range images {
		images[i] = testImage(t, "amd64", gzipLayers(t, fmt.Sprint("file", i))...)
	}
	for i, name := range []string{":a", ":b", "", ":a"} {
		commit(t, "oci:"+dir+name, Options{}, nil, map[string]v1.Image{"amd64": images[i]})
	}
	for name, want := range map[string]int{":a": 3, ":b": 1} {
		checkImage(t, open(t, "oci:"+dir+name, Options{}).Images()[0], images[want], true)
	}
	if _, err := Open(context.Background(), mustParse(t, "oci:"+dir), Options{}); err == nil || !strings.Contains(err.Error(), `choose one of ["b" "a"]`) {
		t.Errorf("Open without a name: %v", err)
	}
	if _, err := Open(context.Background(), mustParse(t, "oci:"+dir+":c"), Options{}); err == nil || !strings.Contains(err.Error(), `no image is called "c"`) {
		t.Errorf("Open of an unknown name: %v", err)
	}
	// An unknown field and an unknown entry survive.
	path := filepath.Join(dir, indexFile)
	var index map[string]any
	if err := json.Unmarshal(must(os.ReadFile(path))(t), &index); err != nil {
		t.Fatal(err)
	}
	index["x"] = "kept"
	index["manifests"] = append(index["manifests"].([]any), map[string]any{"y": "kept"})
	if err := os.WriteFile(path, must(json.Marshal(index))(t), 0o644); err != nil {
		t.Fatal(err)
	}
	commit(t, "oci:"+dir+":b", Options{}, nil, map[string]v1.Image{"amd64": images[0]})
	if raw := string(must(os.ReadFile(path))(t)); !strings.Contains(raw, `"x":"kept"`) || !strings.Contains(raw, `"y":"kept"`) {
		t.Errorf("index.json lost fields: %s", raw)
	}
	// Two runs at once would take each other's blobs away.
	d := must(OpenDestination(context.Background(), mustParse(t, "oci:"+dir+":z"), Options{}))(t)
	if _, err := OpenDestination(context.Background(), mustParse(t, "oci:"+dir+":y"), Options{}); err == nil || !strings.Contains(err.Error(), "another conversion") {
		t.Errorf("second destination: %v", err)
	}
	d.Close()
	if _, err := OpenDestination(context.Background(), mustParse(t, "oci:"+filepath.Dir(dir)), Options{}); err == nil || !strings.Contains(err.Error(), "not an OCI layout") {
		t.Errorf("destination in a directory of something else: %v", err)
	}
}

// snapshot lists the files below dir with their content.
func snapshot(t testing.TB, dir string) []string {
	t.Helper()
	var list []string
	if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		list = append(list, fmt.Sprintf("%s %x", path, sha256.Sum256(b)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

// failingLayer breaks while it is read.
type failingLayer struct {
	v1.Layer
	fail func() error
}

func (l failingLayer) Compressed() (io.ReadCloser, error) {
	rc, err := l.Layer.Compressed()
	return l.broken(rc), err
}

func (l failingLayer) Uncompressed() (io.ReadCloser, error) {
	rc, err := l.Layer.Uncompressed()
	return l.broken(rc), err
}

func (l failingLayer) broken(rc io.ReadCloser) io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(rc, 20), readerFunc(func([]byte) (int, error) { return 0, l.fail() })), rc}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// brokenImage is an image whose last layer fails.
type brokenImage struct {
	v1.Image
	fail func() error
}

func (b brokenImage) Layers() ([]v1.Layer, error) {
	ls, err := b.Image.Layers()
	if err == nil {
		ls[len(ls)-1] = failingLayer{ls[len(ls)-1], b.fail}
	}
	return ls, err
}

var errBroken = errors.New("broken on purpose")

// I7, an error in the middle: the place is as it was, and a place that was not
// there is not there.
func TestFailureLeavesDestination(t *testing.T) {
	for _, existing := range []bool{true, false} {
		for _, transport := range []string{"oci:", "oci-archive:", "docker-archive:"} {
			t.Run(fmt.Sprint(transport, existing), func(t *testing.T) {
				dir := t.TempDir()
				ref := transport + dir + "/new/x"
				if transport != "oci:" {
					ref = transport + dir + "/x"
				}
				if transport == "docker-archive:" {
					ref += ":name"
				}
				old := testImage(t, "amd64", gzipLayers(t, "old")...)
				if existing {
					commit(t, ref, Options{}, nil, map[string]v1.Image{"amd64": old})
				}
				before := snapshot(t, dir)
				failHalfway(t, ref, brokenImage{testImage(t, "amd64", gzipLayers(t, "a", "b")...), func() error { return errBroken }})
				if after := snapshot(t, dir); !slices.Equal(before, after) {
					t.Errorf("before\n%s\nafter\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
				}
				if existing {
					open(t, ref, Options{})
				}
			})
		}
	}
}

// Two conversions make layouts in a directory that neither found. The one that
// fails takes back its own layout only.
func TestFailureLeavesNeighbour(t *testing.T) {
	dir := t.TempDir()
	failing := must(OpenDestination(context.Background(), mustParse(t, "oci:"+dir+"/new/sub/a"), Options{}))(t)
	commit(t, "oci:"+dir+"/new/b", Options{}, nil, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
	if err := failing.Close(); err != nil {
		t.Error(err)
	}
	open(t, "oci:"+dir+"/new/b", Options{})
	if _, err := os.Stat(dir + "/new/sub"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what the failed run made is still there: %v", err)
	}
}

func failHalfway(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	ctx := context.Background()
	d := must(OpenDestination(ctx, mustParse(t, ref), Options{}))(t)
	p := PlatformImage{Platform: platform("amd64"), Boot: img}
	if d.HoldsPacks() {
		pack := testPack("a pack of the failed run")
		if _, err := d.PutPack(ctx, pack); err != nil {
			t.Fatal(err)
		}
		p.Data = must(registrystore.DataManifest([]registrystore.Pack{pack}))(t)
	}
	if _, err := d.Commit(ctx, []PlatformImage{p}); !errors.Is(err, errBroken) {
		t.Fatalf("Commit: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestFailureLeavesTag(t *testing.T) {
	ref := "docker://" + startRegistry(t, nil) + "/a:v1"
	old := testImage(t, "amd64", gzipLayers(t, "old")...)
	commit(t, ref, Options{}, []string{"p"}, map[string]v1.Image{"amd64": old})
	failHalfway(t, ref, brokenImage{testImage(t, "amd64", gzipLayers(t, "a", "b")...), func() error { return errBroken }})
	checkImage(t, open(t, ref, Options{}).Images()[0], old, true)
}

// I7, a kill in the middle, by a child process that kills itself.
func TestKillLeavesDestination(t *testing.T) {
	if ref := os.Getenv("BOOTFS_TEST_KILL"); ref != "" {
		failHalfway(t, ref, brokenImage{testImage(t, "amd64", gzipLayers(t, "a", "b")...), func() error {
			self, err := os.FindProcess(os.Getpid())
			if err == nil {
				err = self.Kill()
			}
			time.Sleep(time.Minute)
			return err
		}})
		return
	}
	host := startRegistry(t, nil)
	for _, transport := range []string{"docker://" + host, "oci:", "oci-archive:", "docker-archive:"} {
		t.Run(transport, func(t *testing.T) {
			dir := t.TempDir()
			ref := transport + dir + "/x"
			if strings.HasPrefix(transport, "docker://") {
				ref = transport + "/x:v1"
			}
			old := testImage(t, "amd64", gzipLayers(t, "old")...)
			commit(t, ref, Options{}, nil, map[string]v1.Image{"amd64": old})
			cmd := exec.Command(os.Args[0], "-test.run=^TestKillLeavesDestination$")
			cmd.Env = append(os.Environ(), "BOOTFS_TEST_KILL="+ref)
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Fatalf("child: %v\n%s", err, out)
			}
			checkImage(t, open(t, ref, Options{}).Images()[0], old, transport != "docker-archive:")
			// And the next run succeeds.
			img := testImage(t, "amd64", gzipLayers(t, "a", "b")...)
			commit(t, ref, Options{}, nil, map[string]v1.Image{"amd64": img})
			checkImage(t, open(t, ref, Options{}).Images()[0], img, transport != "docker-archive:")
			if transport == "oci:" {
				for _, f := range snapshot(t, dir) {
					if strings.Contains(f, temporarySuffix) {
						t.Errorf("left of the killed run: %s", f)
					}
				}
			}
		})
	}
}

// The second tag of a conversion stays when the first is moved, and is none
// that a layout's only image is looked for under.
func TestKeepTag(t *testing.T) {
	for name, place := range places(t) {
		if name == "oci-archive" {
			continue // is written anew each time
		}
		t.Run(name, func(t *testing.T) {
			base, _, _ := strings.Cut(place[0], ":v1")
			first := commit(t, place[0], Options{KeepTag: true}, []string{"pack"}, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
			img := testImage(t, "amd64", gzipLayers(t, "b")...)
			commit(t, place[0], Options{}, []string{"pack"}, map[string]v1.Image{"amd64": img})
			kept := base + ":" + KeepTag(must(v1.NewHash(first))(t))
			if got := open(t, kept, Options{}).Images()[0].Digest; got == must(img.Digest())(t).String() {
				t.Errorf("%s is the later image", kept)
			}
			if name == "oci" {
				checkImage(t, open(t, base, Options{}).Images()[0], img, true)
			}
		})
	}
}

// What a killed process left in the making is removed, what a living one is
// making is not.
func TestSweep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.tar")
	living := must(newReplacement(path))(t)
	defer living.abandon()
	stale := filepath.Join(filepath.Dir(path), ".x.tar.bootfs-123")
	other := filepath.Join(filepath.Dir(path), ".y.tar.bootfs-123")
	for _, name := range []string{stale, other} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sweep(path)
	for name, want := range map[string]bool{living.Name(): true, stale: false, other: true} {
		if _, err := os.Stat(name); err == nil != want {
			t.Errorf("%s is there: %v, want %v", name, err == nil, want)
		}
	}
}
