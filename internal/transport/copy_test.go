package transport

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

// TestCopyFaults damages the source, or lets the destination refuse: the error
// says which of them it was, and the destination has no image.
func TestCopyFaults(t *testing.T) {
	const pack = "bytes of a pack"
	refusing := startRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				http.Error(w, "no", http.StatusBadRequest)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	for name, tt := range map[string]struct {
		damage func(file string) error // of the pack; nil for none
		hosts  []string                // destinations beside local ones
		source bool
	}{
		"gone":      {os.Remove, []string{startRegistry(t, nil)}, true},
		"damaged":   {func(f string) error { return os.WriteFile(f, []byte(strings.ToUpper(pack)), 0o644) }, []string{startRegistry(t, nil)}, true},
		"short":     {func(f string) error { return os.Truncate(f, 3) }, []string{startRegistry(t, nil)}, true},
		"refused":   {nil, []string{refusing}, false},
		"no server": {nil, []string{"127.0.0.1:1"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			commit(t, "oci:"+dir+":x", Options{}, []string{pack}, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
			to := []string{"oci:" + filepath.Join(t.TempDir(), "x") + ":x", "oci-archive:" + filepath.Join(t.TempDir(), "x.tar") + ":x"}
			if tt.damage == nil {
				to = nil
			} else if err := tt.damage(filepath.Join(dir, "blobs", "sha256", testPack(pack).Digest[7:])); err != nil {
				t.Fatal(err)
			}
			for _, h := range tt.hosts {
				to = append(to, "docker://"+h+"/app:x")
			}
			for _, ref := range to {
				src := open(t, "oci:"+dir+":x", Options{})
				d, err := OpenDestination(t.Context(), mustParse(t, ref), Options{})
				if err == nil {
					_, err = Copy(t.Context(), src, d, Edition{})
					d.Close()
				}
				if err == nil || errors.As(err, new(*SourceError)) != tt.source {
					t.Errorf("%s: %v; want a fault of the source: %v", ref, err, tt.source)
				}
				if s, err := Open(t.Context(), mustParse(t, ref), Options{}); err == nil {
					s.Close()
					t.Errorf("%s has an image", ref)
				}
			}
		})
	}
}

// TestOpenBlob reads a blob from where an upload goes on.
func TestOpenBlob(t *testing.T) {
	const pack = "bytes of a pack"
	dir := t.TempDir()
	commit(t, "oci:"+dir+":x", Options{}, []string{pack}, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
	blobs := must(open(t, "oci:"+dir+":x", Options{}).Blobs())(t)
	b := openerBlob(v1.Hash{}, int64(len(pack)), func() (io.ReadCloser, error) {
		return OpenBlob(t.Context(), blobs, testPack(pack).Digest, int64(len(pack)))
	})
	for off := range int64(len(pack) + 1) {
		rc := must(b.open(t.Context(), off))(t)
		if got, err := io.ReadAll(rc); err != nil || string(got) != pack[off:] {
			t.Errorf("from %d on: %q, %v", off, got, err)
		}
		if _, err := rc.(io.Seeker).Seek(1, io.SeekStart); err == nil {
			t.Errorf("from %d on: it can be set back", off)
		}
		rc.Close()
	}
}

// TestHostileGraph walks manifests that are too many, too large or nonsense.
func TestHostileGraph(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	descriptor := func(raw []byte) string {
		h, n, err := v1.SHA256(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.index.v1+json","digest":%q,"size":%d}`, h, n)
	}
	large := memory{}
	var list []string
	for i := range maxManifestBytes/maxManifest + 1 {
		raw := []byte(fmt.Sprintf(`{"n":%d,"x":"%s"}`, i, strings.Repeat("x", maxManifest-100)))
		h, _, _ := v1.SHA256(bytes.NewReader(raw))
		large[h.String()] = raw
		list = append(list, descriptor(raw))
	}
	for name, tt := range map[string]struct {
		root string
		from memory
		want string
	}{
		"bytes":         {`{"manifests":[` + strings.Join(list, ",") + `]}`, large, "its manifests have more than"},
		"negative size": {`{"layers":[{"digest":"sha256:` + strings.Repeat("0", 64) + `","size":-1}]}`, memory{}, "claims -1 bytes"},
		"gone":          {`{"manifests":[` + list[0] + `]}`, memory{}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			h, n, err := v1.SHA256(strings.NewReader(tt.root))
			if err != nil {
				t.Fatal(err)
			}
			tt.from[h.String()] = []byte(tt.root)
			c := &copier{src: &layoutSource{resolved: resolved{from: tt.from}}}
			_, err = c.walk(t.Context(), v1.Descriptor{Digest: h, Size: n})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.As(err, new(*SourceError)) {
				t.Errorf("got %v, want a fault of the source with %q", err, tt.want)
			}
		})
	}
}

// FuzzGraph walks whatever two manifests lead to: each manifest once, behind
// those that it names, and no blob of a negative size.
func FuzzGraph(f *testing.F) {
	img := testImage(f, "amd64", gzipLayers(f, "a")...)
	image := must(img.RawManifest())(f)
	describe := func(raw []byte) v1.Descriptor {
		h, n, err := v1.SHA256(bytes.NewReader(raw))
		if err != nil {
			f.Fatal(err)
		}
		return v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: h, Size: n}
	}
	of := describe(image)
	f.Add(fmt.Appendf(nil, `{"manifests":[{"digest":%q,"size":%d},{"digest":%q,"size":%d}]}`, of.Digest, of.Size, of.Digest, of.Size), image)
	f.Add([]byte(`{"manifests":[{}]}`), []byte(`{"layers":[{"size":-1}]}`))
	f.Add([]byte(`{"config":{"digest":"sha256:../../x"}}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, root, other []byte) {
		from := memory{}
		for _, raw := range [][]byte{other, root} {
			from[describe(raw).Digest.String()] = raw
		}
		c := &copier{src: &layoutSource{resolved: resolved{from: from}}}
		g, err := c.walk(t.Context(), describe(root))
		if err != nil {
			return
		}
		if len(g.manifests) == 0 || len(g.manifests) > 2 {
			t.Errorf("%d manifests", len(g.manifests))
		}
		for _, b := range g.blobs {
			if b.Size < 0 {
				t.Errorf("a blob of %d bytes", b.Size)
			}
		}
		if _, err := referrersOf(root); err == nil {
			_ = subjectOf(root)
		}
	})
}

// TestHostileConfigs resolves an index of more configurations than are held.
func TestHostileConfigs(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	from := memory{}
	add := func(raw string) v1.Descriptor {
		h, n, err := v1.SHA256(strings.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		from[h.String()] = []byte(raw)
		return v1.Descriptor{Digest: h, Size: n}
	}
	var list []string
	for i := range maxManifestBytes/maxConfig + 1 {
		config := add(fmt.Sprintf(`{"os":"linux","architecture":"a%d","rootfs":{"type":"layers"},"author":"%s"}`, i, strings.Repeat("x", maxConfig-200)))
		image := add(fmt.Sprintf(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[]}`, config.Digest, config.Size))
		list = append(list, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d}`, image.Digest, image.Size))
	}
	root := add(`{"schemaVersion":2,"manifests":[` + strings.Join(list, ",") + `]}`)
	if _, _, err := resolve(t.Context(), from, root, nil); err == nil || !strings.Contains(err.Error(), "manifests and configurations have more than") {
		t.Errorf("got %v", err)
	}
	root = add(`{"schemaVersion":2,"manifests":[` + strings.Join(list[1:len(list)-1], ",") + `]}`)
	if images, _, err := resolve(t.Context(), from, root, nil); err != nil || len(images) != len(list)-2 {
		t.Errorf("with less: %d images, %v", len(images), err)
	}
}
