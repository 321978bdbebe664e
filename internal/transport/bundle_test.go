package transport

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// writeBundle writes the images of ref, and returns the file and the digest of
// its index. whole copies what ref stands for.
func writeBundle(t testing.TB, ref, name string, whole bool) (file, digest string) {
	t.Helper()
	ctx := context.Background()
	src := open(t, ref, Options{})
	file = filepath.Join(t.TempDir(), "bundle")
	b := must(OpenBundle(file, name, Options{}))(t)
	defer b.Close()
	var (
		images    []PlatformImage
		platforms []v1.Platform
		digests   []v1.Hash
	)
	for _, img := range src.Images() {
		boot := must(Writable(ctx, src, img))(t)
		images = append(images, PlatformImage{Platform: img.Platform, Boot: boot})
		platforms, digests = append(platforms, img.Platform), append(digests, must(boot.Digest())(t))
	}
	b.Names(platforms, digests)
	if whole {
		return file, must(b.CommitStored(ctx, src.(Stored)))(t)
	}
	return file, must(b.Commit(ctx, images))(t)
}

// TestBundle reads what a bundle holds as an OCI layout and as docker save's
// archive.
func TestBundle(t *testing.T) {
	images := map[string]v1.Image{
		"amd64": testImage(t, "amd64", gzipLayers(t, "boot", "amd64")...),
		"arm64": testImage(t, "arm64", gzipLayers(t, "boot", "arm64")...),
	}
	layout := "oci:" + t.TempDir() + ":lazy"
	want := commit(t, layout, Options{}, []string{"pack one", "pack two"}, images)
	file, digest := writeBundle(t, layout, "registry.example.com/app:1", true)
	if digest != want {
		t.Errorf("index %s, want that of the layout, %s", digest, want)
	}
	for _, ref := range []string{"oci-archive:" + file, "oci-archive:" + file + ":1"} {
		for _, img := range open(t, ref, Options{}).Images() {
			checkImage(t, img, images[img.Platform.Architecture], true)
		}
	}
	blobs := must(open(t, "oci-archive:"+file, Options{}).Blobs())(t)
	p := testPack("pack two")
	if rc, err := blobs.Range(t.Context(), p.Digest, 0, p.Size); err != nil {
		t.Error(err)
	} else {
		rc.Close()
	}
	other := map[string]string{"amd64": "arm64", "arm64": "amd64"}
	main := runtime.GOARCH
	if other[main] == "" {
		main = "amd64" // the first
	}
	for arch, name := range map[string]string{main: "registry.example.com/app:1", other[main]: "registry.example.com/app:1-" + other[main]} {
		s := open(t, "docker-archive:"+file+":"+name, Options{})
		if got := s.Images()[0]; got.Platform.Architecture != arch {
			t.Errorf("%s is for %s, want %s", name, got.Platform, arch)
		}
	}

	again, _ := writeBundle(t, layout, "registry.example.com/app:1", true)
	if !bytes.Equal(must(os.ReadFile(file))(t), must(os.ReadFile(again))(t)) {
		t.Error("the same bundle has other bytes")
	}
	for _, name := range []string{"app@sha256:" + strings.Repeat("0", 64), "UPPER:1"} {
		if _, err := OpenBundle(file, name, Options{}); err == nil {
			t.Errorf("name %q: got no error", name)
		}
	}
}

// TestBundleOfSaved makes a manifest for an image that has none, and keeps its
// configuration.
func TestBundleOfSaved(t *testing.T) {
	img := testImage(t, "amd64", gzipLayers(t, "boot", "amd64")...)
	saved := "docker-archive:" + filepath.Join(t.TempDir(), "saved.tar") + ":app:1"
	commit(t, saved, Options{}, nil, map[string]v1.Image{"amd64": img})
	file, _ := writeBundle(t, saved, "app:1", false)
	checkImage(t, open(t, "docker-archive:"+file, Options{}).Images()[0], img, false)
	got := open(t, "oci-archive:"+file, Options{}).Images()[0]
	if want := must(img.RawConfigFile())(t); !bytes.Equal(got.RawConfig, want) {
		t.Errorf("configuration %s, want %s", got.RawConfig, want)
	}
}

// TestUncommittedBundle leaves nothing behind.
func TestUncommittedBundle(t *testing.T) {
	dir := t.TempDir()
	b := must(OpenBundle(filepath.Join(dir, "bundle"), "", Options{}))(t)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if entries := must(os.ReadDir(dir))(t); len(entries) > 0 {
		t.Errorf("left behind: %v", entries)
	}
}
