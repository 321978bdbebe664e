package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// dataImage pushes the small image with bytes of random data in files of all
// sizes at source: each is a file below /data that has the SHA-256 of its
// content as its name.
func dataImage(t *testing.T, source string, bytesInAll int) {
	t.Helper()
	small, _ := fidelityImage(t, "plain")
	from, err := name.ParseReference(small)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(from)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.NewChaCha8([32]byte{5})
	sizes := rand.New(random)
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	write := func(h *tar.Header, data []byte) {
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	write(&tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	for left := bytesInAll; left > 0; {
		size := min(left, 1<<(10+sizes.IntN(9))+sizes.IntN(1000)) // 1 to 257 kB
		left -= size
		data := make([]byte, size)
		random.Read(data)
		write(&tar.Header{Name: fmt.Sprintf("data/%x", sha256.Sum256(data)), Mode: 0o644, Size: int64(size)}, data)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithCompressionLevel(1))
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		t.Fatal(err)
	}
	to, err := name.ParseReference(source)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(to, img); err != nil {
		t.Fatal(err)
	}
}

// convertAndPull converts source to image and pulls both.
func convertAndPull(t *testing.T, source, image string) {
	t.Helper()
	convertAndPullWith(t, w.boot, source, image)
}

// convertAndPullWith is convertAndPull with another boot binary.
func convertAndPullWith(t *testing.T, boot, source, image string) {
	t.Helper()
	if out, err := w.command("-q", "--boot", boot, source, image).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	for _, ref := range []string{source, image} {
		if r := docker(t, "pull", "--quiet", ref); r.code != 0 {
			t.Fatal(r.stderr)
		}
	}
}
