package transport

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/freeport"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

// sourceIndex is an index as BuildKit makes them, and some more.
func sourceIndex(t testing.TB) (v1.ImageIndex, map[string]v1.Image) {
	t.Helper()
	plain := layerTar(t, "f", strings.Repeat("content", 1000))
	images := map[string]v1.Image{
		"linux/amd64": testImage(t, "amd64",
			testLayer{plain, compression.GZip, types.OCILayer},
			testLayer{plain, compression.ZStd, types.OCILayerZStd},
			testLayer{plain, compression.None, types.OCIUncompressedLayer}),
		"linux/arm64/v8": testImage(t, "arm64", testLayer{plain, compression.GZip, types.OCILayer}),
		"linux/arm/v7":   testImage(t, "arm", testLayer{plain, compression.GZip, types.OCILayer}),
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	add := func(p v1.Platform, img v1.Image, annotations map[string]string) {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p, Annotations: annotations}})
	}
	add(v1.Platform{OS: "linux", Architecture: "amd64"}, images["linux/amd64"], nil)
	add(v1.Platform{OS: "unknown", Architecture: "unknown"}, testImage(t, "unknown"), map[string]string{"vnd.docker.reference.type": "attestation-manifest"})
	add(v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, images["linux/arm64/v8"], nil)
	add(v1.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, images["linux/arm/v7"], nil)
	add(v1.Platform{OS: "windows", Architecture: "amd64"}, testImage(t, "amd64", gzipLayers(t, "w")...), nil)
	add(v1.Platform{OS: "linux", Architecture: "amd64"}, testImage(t, "amd64", gzipLayers(t, "second")...), nil)
	return index, images
}

func TestSourceIndex(t *testing.T) {
	index, images := sourceIndex(t)
	host := startRegistry(t, nil)
	if err := remote.WriteIndex(must(name.ParseReference(host+"/x:v1"))(t), index); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	p := must(layout.Write(dir, empty.Index))(t)
	if err := p.AppendIndex(index, layout.WithAnnotations(map[string]string{refNameAnno: "v1"})); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "x.tar")
	must(exec.Command("tar", "-C", dir, "-cf", file, ".").Output())(t)

	for _, ref := range []string{"docker://" + host + "/x:v1", "oci:" + dir, "oci:" + dir + ":v1", "oci-archive:" + file} {
		s := open(t, ref, Options{})
		if len(s.Images()) != len(images) {
			t.Fatalf("%s: %d images, want %d", ref, len(s.Images()), len(images))
		}
		for _, img := range s.Images() {
			checkImage(t, img, images[img.Platform.String()], true)
		}
		if s.Images()[0].Layers[2].Plain == nil != strings.HasPrefix(ref, "docker:") {
			t.Errorf("%s: the plain layer is read in place: %v", ref, s.Images()[0].Layers[2].Plain != nil)
		}
		var reasons []string
		for _, k := range s.Skipped() {
			reasons = append(reasons, k.Platform+" "+k.Reason)
		}
		if got, want := strings.Join(reasons, "; "), "unknown/unknown attestation; windows/amd64 not a Linux platform; linux/amd64 a second image for the platform"; got != want {
			t.Errorf("%s: skipped %q, want %q", ref, got, want)
		}
		for want, n := range map[string]int{"linux/arm64": 1, "linux/arm/v7": 1, "linux/arm/v6": 0, "linux/riscv64": 0} {
			w := must(ParsePlatform(want))(t)
			s, err := Open(context.Background(), mustParse(t, ref), Options{Platforms: []v1.Platform{w}})
			if n == 0 {
				if err == nil || !strings.Contains(err.Error(), "there is one for linux/amd64, linux/arm64/v8, linux/arm/v7") {
					t.Errorf("%s for %s: %v", ref, want, err)
				}
				continue
			}
			if err != nil || len(s.Images()) != n {
				t.Errorf("%s for %s: %v", ref, want, err)
				continue
			}
			s.Close()
		}
	}
}

// Docker's own media types, and a single image of another platform.
func TestSourceSchema2(t *testing.T) {
	img := testImage(t, "arm64", gzipLayers(t, "a")...)
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.DockerManifestSchema2), types.DockerConfigJSON)
	ref := startRegistry(t, nil) + "/x:v1"
	if err := remote.Write(must(name.ParseReference(ref))(t), img); err != nil {
		t.Fatal(err)
	}
	checkImage(t, open(t, ref, Options{}).Images()[0], img, true)
	_, err := Open(context.Background(), mustParse(t, ref), Options{Platforms: []v1.Platform{platform("amd64")}})
	if err == nil || !strings.Contains(err.Error(), "no image for platform linux/amd64; there is one for linux/arm64") {
		t.Errorf("wrong platform: %v", err)
	}
}

// hostileLayout makes a layout whose index.json names the given manifest, with
// the blobs that it may refer to.
func hostileLayout(t testing.TB, mediaType types.MediaType, manifest string, blobs ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, b := range append(blobs, manifest) {
		d := testPack(b).Digest
		if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", d[7:]), []byte(b), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	index := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`, mediaType, testPack(manifest).Digest, len(manifest))
	if err := os.WriteFile(filepath.Join(dir, indexFile), []byte(index), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestHostileManifests(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	const config = `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`
	descriptor := func(mt types.MediaType, content string, size int) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mt, testPack(content).Digest, size)
	}
	good := descriptor(types.OCIConfigJSON, config, len(config))
	nested := config // replaced level by level
	for i := range 6 {
		mt := types.OCIImageIndex
		if i == 0 {
			mt = types.OCIManifestSchema1
		}
		nested = `{"schemaVersion":2,"manifests":[` + descriptor(mt, nested, len(nested)) + `]}`
	}
	for _, c := range []struct {
		name, manifest, err string
		mediaType           types.MediaType
	}{
		{"not JSON", `<html>`, "invalid character", types.OCIManifestSchema1},
		{"schema 1", `{"schemaVersion":1,"fsLayers":[]}`, "schema 1", types.DockerManifestSchema1},
		{"index and image", `{"schemaVersion":2,"manifests":[],"config":` + good + `,"layers":[]}`, "neither an image nor an index", types.OCIImageIndex},
		{"nothing", `{"schemaVersion":2}`, "neither an image nor an index", types.OCIImageIndex},
		{"image as index", `{"schemaVersion":2,"config":` + good + `,"layers":[]}`, "its fields say otherwise", types.OCIImageIndex},
		{"index says image", `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}`, "its fields say otherwise", types.OCIImageIndex},
		{"huge configuration", `{"schemaVersion":2,"config":` + descriptor(types.OCIConfigJSON, config, 1<<30) + `,"layers":[]}`, "claims 1073741824 bytes", types.OCIManifestSchema1},
		{"negative configuration", `{"schemaVersion":2,"config":` + descriptor(types.OCIConfigJSON, config, -1) + `,"layers":[]}`, "claims -1 bytes", types.OCIManifestSchema1},
		{"short configuration", `{"schemaVersion":2,"config":` + descriptor(types.OCIConfigJSON, config, 10) + `,"layers":[]}`, "got more than the 10 bytes", types.OCIManifestSchema1},
		{"path as digest", `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../../etc/passwd","size":10},"layers":[]}`, "hash", types.OCIManifestSchema1},
		{"missing blob", `{"schemaVersion":2,"config":` + descriptor(types.OCIConfigJSON, "nobody", 6) + `,"layers":[]}`, "no such file", types.OCIManifestSchema1},
		{"artifact", `{"schemaVersion":2,"config":` + descriptor("application/vnd.oci.empty.v1+json", config, len(config)) + `,"layers":[]}`, "no image", types.OCIManifestSchema1},
		{"more layers than DiffIDs", `{"schemaVersion":2,"config":` + good + `,"layers":[` + descriptor(types.OCILayer, "x", 1) + `]}`, "lists 1 layers, its configuration 0", types.OCIManifestSchema1},
		{"deep index", nested, "nests deeper", types.OCIImageIndex},
		{"empty index", `{"schemaVersion":2,"manifests":[]}`, "no image for a Linux platform", types.OCIImageIndex},
	} {
		t.Run(c.name, func(t *testing.T) {
			bounded.Case(t)
			blobs := []string{config}
			if c.name == "deep index" {
				next := config
				for i := range 5 {
					mt := types.OCIImageIndex
					if i == 0 {
						mt = types.OCIManifestSchema1
					}
					next = `{"schemaVersion":2,"manifests":[` + descriptor(mt, next, len(next)) + `]}`
					blobs = append(blobs, next)
				}
			}
			_, err := Open(context.Background(), mustParse(t, "oci:"+hostileLayout(t, c.mediaType, c.manifest, blobs...)), Options{})
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %v, want an error with %q", err, c.err)
			}
		})
	}
}

// Images of an index that states no platforms may be for the same one.
func TestSecondImage(t *testing.T) {
	image := func(variant string) (config, manifest string) {
		config = fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":[]},"author":%q}`, variant)
		return config, fmt.Sprintf(`{"schemaVersion":2,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`,
			types.OCIConfigJSON, testPack(config).Digest, len(config))
	}
	c1, m1 := image("1")
	c2, m2 := image("2")
	var list []string
	for _, m := range []string{m1, m2} {
		list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, types.OCIManifestSchema1, testPack(m).Digest, len(m)))
	}
	dir := hostileLayout(t, types.OCIImageIndex, `{"schemaVersion":2,"manifests":[`+strings.Join(list, ",")+`]}`, c1, m1, c2, m2)
	s := open(t, "oci:"+dir, Options{})
	if len(s.Images()) != 1 || s.Images()[0].Config.Author != "1" {
		t.Errorf("images %+v", s.Images())
	}
	if k := s.Skipped(); len(k) != 1 || k[0].Digest != testPack(m2).Digest || k[0].Platform != "linux/amd64" {
		t.Errorf("skipped %+v", k)
	}
}

func TestDamagedLayout(t *testing.T) {
	img := testImage(t, "amd64", gzipLayers(t, "a")...)
	layer := must(must(img.Layers())(t)[0].Digest())(t).Hex
	manifest := must(img.Digest())(t).Hex
	for _, c := range []struct {
		name, blob, err string
		damage          func(path string) error
	}{
		{"flipped manifest", manifest, "have the digest", func(p string) error { return flip(p) }},
		{"flipped layer", layer, "have the digest", func(p string) error { return flip(p) }},
		{"truncated layer", layer, "bytes, want", func(p string) error { return os.Truncate(p, 10) }},
		{"longer layer", layer, "got more than", func(p string) error { return os.Truncate(p, 1<<20) }},
		{"FIFO", manifest, "not a regular file", func(p string) error { return syscall.Mkfifo(p, 0o644) }},
		{"directory", layer, "not a regular file", func(p string) error { return os.Mkdir(p, 0o755) }},
		{"symlink out", layer, "escapes", func(p string) error { return os.Symlink("/etc/passwd", p) }},
		{"huge manifest", manifest, "at most", func(p string) error { return os.Truncate(p, 1<<40) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			commit(t, "oci:"+dir, Options{}, nil, map[string]v1.Image{"amd64": img})
			path := filepath.Join(dir, "blobs", "sha256", c.blob)
			switch c.name {
			case "FIFO", "directory", "symlink out":
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.damage(path); err != nil {
				t.Fatal(err)
			}
			err := readEverything("oci:" + dir)
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %v, want an error with %q", err, c.err)
			}
		})
	}
}

func flip(path string) error {
	b, err := os.ReadFile(path)
	if err == nil {
		b[len(b)/2] ^= 1
		err = os.WriteFile(path, b, 0o644)
	}
	return err
}

func readEverything(ref string) error {
	r, err := Parse(ref, "")
	if err != nil {
		return err
	}
	s, err := Open(context.Background(), r, Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	for _, img := range s.Images() {
		for _, l := range img.Layers {
			rc, err := l.Open(context.Background())
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func TestHostileArchives(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	save := func(entries map[string]string) string {
		var b bytes.Buffer
		w := tarWriter{tar.NewWriter(&b)}
		for n, c := range entries {
			if err := w.add(n, int64(len(c)), strings.NewReader(c)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		f := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(f, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return f
	}
	const config = `{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]}}`
	for name, c := range map[string]struct {
		entries map[string]string
		err     string
	}{
		"empty":            {nil, "no such file in the archive"},
		"no images":        {map[string]string{"manifest.json": "[]"}, "holds 0 images"},
		"layer outside":    {map[string]string{"manifest.json": `[{"Config":"c","Layers":["../../etc/passwd"]}]`, "c": config}, "no such file"},
		"missing layers":   {map[string]string{"manifest.json": `[{"Config":"c","Layers":[]}]`, "c": config}, "lists 0 layers, the configuration 1"},
		"no configuration": {map[string]string{"manifest.json": `[{"Config":"c","Layers":[]}]`}, "configuration"},
		"windows":          {map[string]string{"manifest.json": `[{"Config":"c","Layers":[]}]`, "c": `{"os":"windows"}`}, "only Linux"},
	} {
		_, err := Open(context.Background(), mustParse(t, "docker-archive:"+save(c.entries)), Options{})
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.err)
		}
	}
	// A member that claims more than the file has.
	f := save(map[string]string{"x": strings.Repeat("x", 10000)})
	if err := os.Truncate(f, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), mustParse(t, "docker-archive:"+f), Options{}); err == nil || !strings.Contains(err.Error(), "behind the end") {
		t.Errorf("truncated: %v", err)
	}
}

// Links between layers, as engines before 1.10 and others write them; a link
// to itself must not hang.
func TestArchiveLinks(t *testing.T) {
	a := &archive{
		files: map[string]span{"/b/layer.tar": {1, 2}},
		links: map[string]string{"/a/layer.tar": "/b/layer.tar", "/loop": "/loop"},
	}
	if s, err := a.find("a/layer.tar"); err != nil || s != (span{1, 2}) {
		t.Errorf("link: %v, %v", s, err)
	}
	if _, err := a.find("./loop"); err == nil {
		t.Error("a link to itself was followed")
	}
}

// breaking cuts blob responses after some bytes.
func breaking(h http.Handler, cuts *atomic.Int32) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && cuts.Add(-1) >= 0 {
			w = &cutWriter{ResponseWriter: w, left: 3000}
		}
		h.ServeHTTP(w, r)
	})
}

type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	if c.left < len(p) {
		c.ResponseWriter.Write(p[:c.left])
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestBrokenTransferGoesOn(t *testing.T) {
	var cuts atomic.Int32
	host := startRegistry(t, func(h http.Handler) http.Handler { return breaking(h, &cuts) })
	noise := make([]byte, 20000)
	for i := range noise {
		noise[i] = byte(i * i >> 3)
	}
	img := testImage(t, "amd64", testLayer{layerTar(t, "f", string(noise)), compression.None, types.OCIUncompressedLayer})
	ref := host + "/x:v1"
	commit(t, ref, Options{}, nil, map[string]v1.Image{"amd64": img})
	s := open(t, ref, Options{})
	cuts.Store(4)
	checkImage(t, s.Images()[0], img, true)
	if cuts.Load() >= 0 {
		t.Errorf("%d connections were not cut", cuts.Load()+1)
	}
}

func TestCloseEndsARead(t *testing.T) {
	hang := make(chan struct{})
	var on atomic.Bool
	host := startRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if on.Load() {
				<-hang
			}
			h.ServeHTTP(w, r)
		})
	})
	defer close(hang)
	commit(t, host+"/x:v1", Options{}, nil, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
	s := open(t, host+"/x:v1", Options{})
	on.Store(true)
	rc := must(s.Images()[0].Layers[0].Open(context.Background()))(t)
	ended := make(chan error, 1)
	go func() {
		_, err := rc.Read(make([]byte, 1))
		ended <- err
	}()
	time.Sleep(50 * time.Millisecond)
	rc.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the read succeeded")
		}
	case <-time.After(2 * time.Minute):
		t.Error("the read goes on after Close")
	}
}

func TestRegistryErrors(t *testing.T) {
	host := startRegistry(t, nil)
	commit(t, host+"/x:v1", Options{}, nil, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
	denied := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pass, _ := r.BasicAuth(); pass != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.WriteHeader(http.StatusForbidden)
	}))
	defer denied.Close()
	deniedHost := strings.TrimPrefix(denied.URL, "http://")
	closed := must(freeport.Listen())(t)
	closed.Close()

	for _, c := range []struct {
		ref  string
		want string
		o    Options
	}{
		{host + "/x:nobody", "has no image nobody in x", Options{}},
		{host + "/y:v1", "has no image v1 in y", Options{}},
		{deniedHost + "/x:v1", "denies access; log in with: docker login " + deniedHost, Options{}},
		{deniedHost + "/x:v1", "denies access", Options{Keychain: keychain{}}},
		{closed.Addr().String() + "/x:v1", "refused; is the registry running?", Options{}},
		{"nobody.invalid/x:v1", "cannot resolve nobody.invalid", Options{}},
	} {
		for _, f := range []func(context.Context, Ref, Options) error{
			func(ctx context.Context, r Ref, o Options) error { _, err := Open(ctx, r, o); return err },
			func(ctx context.Context, r Ref, o Options) error { _, err := OpenDestination(ctx, r, o); return err },
		} {
			err := f(context.Background(), mustParse(t, c.ref), c.o)
			if strings.HasPrefix(c.ref, host) && err == nil {
				continue // as a destination it is fine
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v, want an error with %q", c.ref, err, c.want)
			} else if s := err.Error(); strings.Contains(s, "\n") || strings.Contains(s, "secret") || !strings.HasPrefix(s, "docker://"+c.ref) {
				t.Errorf("%s: the error is %q", c.ref, s)
			}
		}
	}
	if _, err := OpenDestination(context.Background(), mustParse(t, host+"/x@"+testPack("x").Digest), Options{}); err == nil || !strings.Contains(err.Error(), "name a tag") {
		t.Errorf("destination by digest: %v", err)
	}
}

type keychain struct{}

func (keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: "u", Password: "secret"}, nil
}

// A registry with a certificate of its own, and one that speaks plain HTTP
// under a name that is not loopback.
func TestInsecure(t *testing.T) {
	s := httptest.NewTLSServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "https://")
	img := map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)}
	if _, err := OpenDestination(context.Background(), mustParse(t, host+"/x:v1"), Options{}); err == nil {
		t.Error("a certificate of nobody was accepted")
	}
	o := Options{Insecure: []string{host}}
	commit(t, host+"/x:v1", o, []string{"pack"}, img)
	src := open(t, host+"/x:v1", o)
	checkImage(t, src.Images()[0], img["amd64"], true)
	if want := "registry+http://" + host + "/x"; src.StoreAddress() != want {
		t.Errorf("StoreAddress %q, want %q", src.StoreAddress(), want)
	}

	rt := newHostTransport(Options{Insecure: []string{"named.example:5000"}})
	for url, want := range map[string]bool{
		"http://192.0.2.1/v2/": false, "http://10.0.0.1:5000/v2/": false, "http://registry.local/v2/": false,
	} {
		req := must(http.NewRequest(http.MethodGet, url, nil))(t)
		if _, err := rt.RoundTrip(req); (err == nil) != want || !strings.Contains(fmt.Sprint(err), errPlainHTTP.Error()) {
			t.Errorf("plain HTTP to %s: %v", url, err)
		}
	}
	p := must(newRepository(mustParse(t, host+"/x"), Options{}))(t)
	cert := &tls.CertificateVerificationError{Err: fmt.Errorf("unknown authority")}
	if got := p.explain(cert).Error(); !strings.Contains(got, "--insecure "+host) {
		t.Errorf("explained certificate error: %s", got)
	}
	if got := p.explain(fmt.Errorf("x: %w", errPlainHTTP)).Error(); !strings.Contains(got, "--insecure "+host) {
		t.Errorf("explained plain HTTP: %s", got)
	}
}

func FuzzResolve(f *testing.F) {
	img := testImage(f, "amd64", gzipLayers(f, "a")...)
	f.Add(must(img.RawManifest())(f))
	index, _ := sourceIndex(f)
	f.Add(must(index.RawManifest())(f))
	f.Add([]byte(`{"manifests":[{}]}`))
	config := must(img.RawConfigFile())(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, n, _ := v1.SHA256(bytes.NewReader(raw))
		c := memory{h.String(): raw}
		var m v1.Manifest
		if json.Unmarshal(raw, &m) == nil {
			c[m.Config.Digest.String()] = config
		}
		images, _, err := resolve(context.Background(), c, v1.Descriptor{Digest: h, Size: n}, nil)
		if err == nil && len(images) == 0 {
			t.Error("neither an image nor an error")
		}
	})
}

// memory is contents in memory.
type memory map[string][]byte

func (m memory) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	if b, ok := m[d.Digest.String()]; ok {
		return b, nil
	}
	return nil, errNoFile
}

func (m memory) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	b, err := m.manifest(ctx, d)
	return io.NopCloser(bytes.NewReader(b)), err
}

func (memory) local(v1.Descriptor) io.ReaderAt { return nil }

func FuzzLayoutIndex(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"digest":"sha256:`+strings.Repeat("a", 64)+`","annotations":{"org.opencontainers.image.ref.name":"x"}}]}`), "x")
	f.Add([]byte(`null`), "")
	f.Fuzz(func(t *testing.T, raw []byte, name string) {
		x, err := parseLayoutIndex(raw)
		if err != nil {
			return
		}
		_, _ = x.find(name)
		d := v1.Descriptor{MediaType: types.OCIImageIndex, Digest: v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("b", 64)}}
		next, err := x.set([]named{{name: name, desc: d}})
		if err != nil {
			return
		}
		again, err := parseLayoutIndex(next)
		if err != nil {
			t.Fatal(err)
		}
		if name == "" || !utf8.ValidString(name) {
			return
		}
		if got, err := again.find(name); err != nil || got.Digest != d.Digest {
			t.Errorf("after set %q: %v, %v", name, got, err)
		}
	})
}

func FuzzDockerArchive(f *testing.F) {
	var b bytes.Buffer
	img := testImage(f, "amd64", gzipLayers(f, "a")...)
	must(writeSaved(context.Background(), &b, img, "x:v1", func(int64) {}))(f)
	f.Add(b.Bytes(), "")
	f.Add(b.Bytes()[:700], "x:v1")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, raw []byte, name string) {
		file := must(os.CreateTemp(dir, ""))(t)
		os.Remove(file.Name())
		must(file.Write(raw))(t)
		a, err := scanArchive(context.Background(), file)
		if err != nil {
			return
		}
		defer file.Close()
		for n, s := range a.files {
			if s.off < 0 || s.size < 0 || s.off+s.size > int64(len(raw)) {
				t.Errorf("%q: %+v of %d bytes", n, s, len(raw))
			}
		}
		s, err := newDockerArchive(a, name, Options{})
		if err != nil {
			return
		}
		for _, l := range s.Images()[0].Layers {
			if l.Size > int64(len(raw)) {
				t.Errorf("layer of %d bytes in %d", l.Size, len(raw))
			}
		}
	})
}
