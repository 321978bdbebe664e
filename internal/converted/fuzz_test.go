package converted

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// bundle is a source with one data manifest, all of whose blobs are one.
type bundle struct {
	transport.Stored
	skipped  transport.Skipped
	manifest []byte
	blob     []byte
}

func (b *bundle) Skipped() []transport.Skipped { return []transport.Skipped{b.skipped} }

func (b *bundle) Manifest(context.Context, v1.Descriptor) ([]byte, error) { return b.manifest, nil }

func (b *bundle) Blob(context.Context, v1.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b.blob)), nil
}

// FuzzLocatorsBeside looks for locators in any data manifest of a bundle, as a
// preload does of an image whose chunks were in a loose store: it finds none, or
// such as belong to the image's index.
func FuzzLocatorsBeside(f *testing.F) {
	var file bytes.Buffer
	w := index.NewWriter(&file, chunker.V1, index.SHA256)
	var at []registrystore.Location
	for i := range 5 {
		plain := fmt.Appendf(nil, "chunk %d", i%4)
		if err := w.Append(index.SHA256.Sum(plain), len(plain)); err != nil {
			f.Fatal(err)
		}
		at = append(at, registrystore.Location{Pack: i % 2, Offset: int64(i%4) * 10, Length: 10})
	}
	at[4] = at[0]
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	x, err := index.Open(file.Bytes())
	if err != nil {
		f.Fatal(err)
	}
	digest := func(s string) string { return "sha256:" + fmt.Sprintf("%064s", s) }
	locators, err := registrystore.EncodeLocators(x, []registrystore.PackDescriptor{{Digest: digest("1"), Size: 100}, {Digest: digest("2"), Size: 100}}, at)
	if err != nil {
		f.Fatal(err)
	}
	manifest, err := json.Marshal(v1.Manifest{SchemaVersion: 2, Layers: []v1.Descriptor{
		{MediaType: registrystore.MediaTypePack, Size: 100}, {MediaType: registrystore.MediaTypeLocators, Size: int64(len(locators))},
	}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(manifest, locators)
	f.Add(manifest, locators[:len(locators)-1])
	f.Add(manifest, []byte(nil))
	for _, change := range []struct{ old, new string }{{`"size":`, `"size":-`}, {`"size":`, `"size":99999999`}, {`.locators.`, `.other.`}, {`"layers":[`, `"layers":[null,`}, {`[`, `{`}} {
		f.Add(bytes.ReplaceAll(manifest, []byte(change.old), []byte(change.new)), locators)
	}
	const boot = "sha256:of the boot image"
	skipped := transport.Skipped{Descriptor: v1.Descriptor{Annotations: map[string]string{
		transport.AnnotationType: registrystore.ArtifactTypeData, transport.AnnotationBoot: boot,
	}}}
	f.Fuzz(func(t *testing.T, manifest, blob []byte) {
		l, err := locatorsBeside(t.Context(), &bundle{skipped: skipped, manifest: manifest, blob: blob}, &Image{Digest: boot, Index: x})
		if err != nil || l == nil {
			return
		}
		for pos := range x.Len() {
			at, err := l.At(pos)
			if err != nil {
				continue
			}
			if p, err := l.Pack(at.Pack); at.Length > 0 && (err != nil || at.Offset < 0 || at.Offset+int64(at.Length) > p.Size) {
				t.Errorf("chunk %d lies at %+v of %+v (%v)", pos, at, p, err)
			}
		}
	})
}
