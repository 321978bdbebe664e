package transport

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// FuzzBundle reads any file in place of a bundle: what it is taken for lies in
// the file, and its blobs have the bytes of their digests or end with an error.
func FuzzBundle(f *testing.F) {
	layout := "oci:" + f.TempDir() + ":lazy"
	commit(f, layout, Options{}, []string{"pack one", "pack two"}, map[string]v1.Image{
		"amd64": testImage(f, "amd64", gzipLayers(f, "boot", "amd64")...),
		"arm64": testImage(f, "arm64", gzipLayers(f, "boot", "arm64")...),
	})
	file, _ := writeBundle(f, layout, "registry.example.com/app:1", true)
	bundle := must(os.ReadFile(file))(f)
	f.Add(bundle)
	f.Add(bundle[:len(bundle)/2])
	for _, change := range []struct{ old, new string }{
		{`"size":`, `"size":9`}, {`"size":`, `"size":-`}, {`sha256:`, `sha256:../`}, {`application/vnd.oci.image.manifest`, `application/vnd.oci.image.index`},
		{`"manifests":[`, `"manifests":[null,`}, {`"schemaVersion":2`, `"schemaVersion":1`},
	} {
		f.Add(rewritten(f, bundle, change.old, change.new))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := filepath.Join(dir, "bundle")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx := context.Background()
		src, err := Open(ctx, Ref{Transport: OCIArchive, Path: path}, Options{TempDir: dir})
		if err != nil {
			return
		}
		defer src.Close()
		stored := src.(Stored)
		if len(src.Images()) == 0 {
			t.Error("neither an image nor an error")
		}
		list := []v1.Descriptor{stored.Root()}
		for _, s := range src.Skipped() {
			list = append(list, s.Descriptor)
		}
		for _, d := range list {
			if b, err := stored.Manifest(ctx, d); err == nil {
				if h, _, _ := v1.SHA256(bytes.NewReader(b)); h != d.Digest || len(b) > maxManifest {
					t.Errorf("manifest %s has %d bytes, %s", d.Digest, len(b), h)
				}
			}
			rc, err := stored.Blob(ctx, d)
			if err != nil {
				continue
			}
			if h, n, err := v1.SHA256(rc); err == nil && (h != d.Digest || n != d.Size) {
				t.Errorf("blob %s of %d bytes has %d, %s", d.Digest, d.Size, n, h)
			}
			rc.Close()
		}
		blobs := must(src.Blobs())(t)
		for _, img := range src.Images() {
			for _, l := range img.Layers {
				for _, off := range []int64{0, 1, l.Size - 1, l.Size, -1} {
					rc, err := blobs.Range(ctx, l.Digest, off, 1)
					if err != nil {
						continue
					}
					if n, _ := io.Copy(io.Discard, rc); n != 1 {
						t.Errorf("layer of %d bytes: %d at %d", l.Size, n, off)
					}
					rc.Close()
				}
			}
		}
	})
}

// rewritten is a tar whose small files, all that are JSON, have new in the place
// of old.
func rewritten(t testing.TB, archive []byte, old, new string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b := must(io.ReadAll(r))(t)
		b = bytes.ReplaceAll(b, []byte(old), []byte(new))
		h.Size = int64(len(b))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		must(w.Write(b))(t)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
