package e2e

import (
	"bytes"
	"runtime"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// TestAttestationsAreNotPulled converts an image that BuildKit attested: the
// engine takes the boot image and leaves the attestation, as it does with the
// source.
func TestAttestationsAreNotPulled(t *testing.T) {
	const size = 8 << 20 // of the attestation, bytes
	ref := func(s string) name.Reference {
		r, err := name.ParseReference(s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	img, err := remote.Image(ref(w.source))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	statement, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1),
		static.NewLayer(bytes.Repeat([]byte("attested"), size/8), "application/vnd.in-toto+json"))
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
		mutate.IndexAddendum{Add: statement, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}, Annotations: map[string]string{
			"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": digest.String()}}})
	source, converted := w.proxy.address+"/attested:source", w.proxy.address+"/attested:converted"
	if err := remote.WriteIndex(ref(source), index); err != nil {
		t.Fatal(err)
	}
	if out, err := w.command("--boot", w.boot, source, converted).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	list, err := remote.Index(ref(converted))
	if err != nil {
		t.Fatal(err)
	}
	m, err := list.IndexManifest()
	if err != nil || len(m.Manifests) != 3 {
		t.Fatalf("%v; the index lists %+v", err, m)
	}
	pulled := w.proxy.measure(func() {
		if r := docker(t, "pull", "--quiet", converted); r.code != 0 {
			t.Errorf("docker pull: %s", r.stderr)
		}
	})
	if pulled >= size {
		t.Errorf("the engine pulled %d bytes, the attestation has %d", pulled, size)
	}
	run(t, converted, "python3", "-c", "print('ok')").want(t, "ok\n")
}
