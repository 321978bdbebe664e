package main

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// attested pushes an index as BuildKit makes them, an image with a manifest of
// attestations, and signs both. It returns the digests of image and attestation
// and of the signatures.
func attested(t *testing.T, ref, dir string) (image, attestation v1.Hash, signatures []string) {
	t.Helper()
	p, err := layout.FromPath(strings.TrimSuffix(strings.TrimPrefix(dir, "oci:"), ":src"))
	if err != nil {
		t.Fatal(err)
	}
	index, err := p.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	list, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	image = list.Manifests[0].Digest
	img, err := index.Image(image)
	if err != nil {
		t.Fatal(err)
	}
	statement := artifact(t, `{"predicateType":"https://spdx.dev/Document"}`, nil)
	if attestation, err = statement.Digest(); err != nil {
		t.Fatal(err)
	}
	made := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
		mutate.IndexAddendum{Add: statement, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}, Annotations: map[string]string{
			"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": image.String()}}})
	if err := remote.WriteIndex(reference(t, ref), made); err != nil {
		t.Fatal(err)
	}
	repo := ref[:strings.LastIndexByte(ref, ':')]
	for _, h := range []v1.Hash{digestAt(t, ref), image} {
		d, err := remote.Get(reference(t, repo+"@"+h.String()))
		if err != nil {
			t.Fatal(err)
		}
		signatures = append(signatures, sign(t, repo, d.Descriptor)...)
	}
	return image, attestation, signatures
}

// TestAttestations converts a source that is signed and attested: by default
// all of it is at the destination, where tools look for it.
func TestAttestations(t *testing.T) {
	first, _ := memoryRegistry(t)
	src := first + "/src:1"
	image, attestation, signatures := attested(t, src, layoutOf(t, layerOf(t, 1<<20, 9)))
	real := realRegistry(t)
	layout := "oci:" + filepath.Join(t.TempDir(), "x") + ":1"
	for _, dst := range []string{real + "/dst:1", layout, "oci-archive:" + filepath.Join(t.TempDir(), "x.tar")} {
		var r convert.Report
		if err := json.Unmarshal([]byte(bootfs(t, "--json", "--boot", "/bin/true", src, dst)), &r); err != nil {
			t.Fatal(err)
		}
		if len(r.Attestations) != 1 || r.Attestations[0] != attestation.String() || len(r.Signatures) != len(signatures) || len(r.Skipped) != 0 {
			t.Errorf("%s: carried %q and %q, left out %q", dst, r.Attestations, r.Signatures, r.Skipped)
		}
		index := indexOf(t, dst)
		if len(index.Manifests) != 3 || index.Manifests[0].Platform.OS != "linux" {
			t.Fatalf("%s: index %+v", dst, index.Manifests)
		}
		boot, last := index.Manifests[0].Digest, index.Manifests[2]
		if last.Digest != attestation || last.Platform.OS != "unknown" || last.Annotations["vnd.docker.reference.type"] != "attestation-manifest" ||
			last.Annotations["vnd.docker.reference.digest"] != boot.String() || last.Annotations[transport.AnnotationSource] != image.String() {
			t.Errorf("%s: the attestation is listed as %+v", dst, last)
		}
		rootOf(t, dst)
	}
	// The layout has them all: what is copied from there has.
	bootfs(t, "copy", layout, real+"/copied:1")
	got, err := remote.Image(reference(t, real+"/copied@"+attestation.String()))
	if err == nil {
		_, err = got.Layers()
	}
	if err != nil {
		t.Error(err)
	}
	for i, h := range []v1.Hash{digestAt(t, src), image} {
		wantSigned(t, real+"/dst", v1.Descriptor{Digest: h}, signatures[3*i:])
	}

	archive := "docker-archive:" + filepath.Join(t.TempDir(), "x.tar")
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--attestations", "refuse", src, real + "/refused:1"}, exitSource, "carry them over or drop them with --attestations"},
		{[]string{"--attestations", "drop", src, real + "/dropped:1"}, exitOK, "left out: " + attestation.String() + " (attestation)"},
		{[]string{"--store", t.TempDir(), src, archive}, exitOK, "cannot hold the source's 7 attestations and signatures"},
		{[]string{"--attestations", "refuse", layoutOf(t, layerOf(t, 1<<20, 9)), real + "/none:1"}, exitOK, ""},
		{[]string{"--attestations", "lose", src, real + "/x:1"}, exitUsage, "want carry, refuse or drop"},
	} {
		out, err := command(t, t.TempDir(), append([]string{"--boot", "/bin/true"}, tt.args...)...).CombinedOutput()
		code := 0
		if e, ok := err.(*exec.ExitError); ok {
			code = e.ExitCode()
		}
		if code != tt.code || !strings.Contains(string(out), tt.says) {
			t.Errorf("%q: exit %d, %s; want %d and %q", tt.args, code, out, tt.code, tt.says)
		}
	}
	if index := indexOf(t, real+"/dropped:1"); len(index.Manifests) != 2 {
		t.Errorf("after drop: %+v", index.Manifests)
	}
}

// indexOf reads the index that an image's name stands for.
func indexOf(t *testing.T, image string) *v1.IndexManifest {
	t.Helper()
	ref, err := transport.Parse(image, "")
	if err != nil {
		t.Fatal(err)
	}
	s, err := transport.Open(t.Context(), ref, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	stored := s.(transport.Stored)
	raw, err := stored.Manifest(t.Context(), stored.Root())
	if err != nil {
		t.Fatal(err)
	}
	index, err := v1.ParseIndexManifest(strings.NewReader(string(raw)))
	if err != nil {
		t.Fatal(err)
	}
	return index
}
