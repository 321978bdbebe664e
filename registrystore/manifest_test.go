package registrystore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var emptyIndex = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)

// ociIndex is an index of given bytes.
type ociIndex struct {
	imageIndex
	raw []byte
}

type imageIndex = v1.ImageIndex

func (x ociIndex) RawManifest() ([]byte, error) { return x.raw, nil }
func (x ociIndex) Size() (int64, error)         { return int64(len(x.raw)), nil }
func (x ociIndex) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(x.raw))
	return h, err
}

// indexOf returns what a conversion pushes: an image and its data manifest.
func indexOf(t *testing.T, packs []Pack) v1.ImageIndex {
	t.Helper()
	boot, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	boot = mutate.ConfigMediaType(mutate.MediaType(boot, types.OCIManifestSchema1), types.OCIConfigJSON)
	data, err := DataManifest(packs)
	if err != nil {
		t.Fatal(err)
	}
	x := mutate.AppendManifests(emptyIndex,
		mutate.IndexAddendum{Add: boot, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm", Variant: "v7", OSVersion: "1", OSFeatures: []string{"f"}}}},
		mutate.IndexAddendum{Add: data, Descriptor: v1.Descriptor{Platform: DataPlatform(), Annotations: map[string]string{"b": "c<d>", "a": "e"}}},
	)
	m, err := x.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	// skopeo writes any index anew, as image-spec's types have it.
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var oci ocispec.Index
	if err := json.Unmarshal(raw, &oci); err != nil {
		t.Fatal(err)
	}
	for i := range oci.Manifests {
		oci.Manifests[i].ArtifactType = ""
	}
	if raw, err = json.Marshal(oci); err != nil {
		t.Fatal(err)
	}
	return ociIndex{x, raw}
}

func TestDataManifest(t *testing.T) {
	im := newImage(t, 150)
	img, err := DataManifest(append(im.packs, im.packs[0]))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		SchemaVersion           int
		MediaType, ArtifactType string
		Config                  struct {
			MediaType, Digest string
			Size              int
		}
		Layers []struct {
			MediaType, Digest string
			Size              int64
		}
	}
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	// The empty descriptor as the OCI image specification states it.
	const empty = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
	if got.SchemaVersion != 2 || got.MediaType != "application/vnd.oci.image.manifest.v1+json" || got.ArtifactType != "application/vnd.bootfs.data.v1" ||
		got.Config.MediaType != "application/vnd.oci.empty.v1+json" || got.Config.Digest != empty || got.Config.Size != 2 {
		t.Errorf("got %s", raw)
	}
	if len(got.Layers) != len(im.packs) {
		t.Fatalf("got %d layers, want %d", len(got.Layers), len(im.packs))
	}
	for i, p := range im.packs {
		if l := got.Layers[i]; l.Digest != p.Digest || l.Size != p.Size || l.MediaType != string(MediaTypePack) {
			t.Errorf("layer %d: got %+v, want %+v", i, l, p.PackDescriptor)
		}
	}
	again, err := DataManifest(im.packs)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := img.Digest()
	if b, _ := again.Digest(); a != b {
		t.Errorf("got digests %s and %s for the same packs", a, b)
	}
	if _, err := DataManifest([]Pack{{PackDescriptor: PackDescriptor{Digest: "sha256:0"}}}); err == nil {
		t.Error("a broken digest was taken")
	}
}

func TestDataManifestWithoutPacks(t *testing.T) {
	img, err := DataManifest(nil)
	if err != nil {
		t.Fatal(err)
	}
	if raw, _ := img.RawManifest(); !strings.Contains(string(raw), `"layers":[]`) {
		t.Errorf("got %s, want an empty list of layers", raw)
	}
}

// TestDataManifestOfStoredPacks writes a manifest whose packs the destination
// has, without their bytes, and one whose packs it lacks.
func TestDataManifestOfStoredPacks(t *testing.T) {
	im := newImage(t, 40)
	var known []Pack
	for _, p := range im.packs {
		known = append(known, Pack{PackDescriptor: p.PackDescriptor})
	}
	data, err := DataManifest(known)
	if err != nil {
		t.Fatal(err)
	}
	host := goRegistry(t)
	ref, err := name.ParseReference(host + "/app:tag")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, data); err == nil || !strings.Contains(err.Error(), "at the destination") {
		t.Errorf("registry without the packs: got %v", err)
	}
	push(t, host, "app", im.packs)
	if err := remote.Write(ref, data); err != nil {
		t.Errorf("registry with the packs: %v", err)
	}
	dir, err := layout.Write(t.TempDir(), emptyIndex)
	if err != nil {
		t.Fatal(err)
	}
	if err := dir.AppendImage(data); err == nil || !strings.Contains(err.Error(), "at the destination") {
		t.Errorf("layout without the packs: got %v", err)
	}
	full, err := DataManifest(im.packs)
	if err != nil {
		t.Fatal(err)
	}
	if err := dir.AppendImage(full); err != nil {
		t.Fatal(err)
	}
	if err := dir.AppendImage(data); err != nil {
		t.Errorf("layout with the packs: %v", err)
	}
}

// TestSkopeoCopiesPacks has skopeo copy an image between two registries and to
// a layout, and the registry collect garbage: the packs stay.
func TestSkopeoCopiesPacks(t *testing.T) {
	t.Parallel()
	im := newImage(t, 150)
	from, _ := dockerRegistry(t)
	to, config := dockerRegistry(t)
	ref, err := name.ParseReference(from + "/app:tag")
	if err != nil {
		t.Fatal(err)
	}
	index := indexOf(t, im.packs)
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
	}
	policy := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	copyAll := func(src, dst string) {
		t.Helper()
		run("skopeo", "--policy", policy, "copy", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false", src, dst)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	copyAll("docker://"+from+"/app:tag", "docker://"+to+"/other/place:new")
	copyAll("docker://"+to+"/other/place:new", "oci:"+dir+":new")

	run("docker-registry", "garbage-collect", config)
	im.readAll(t, im.storeAt(t, "registry://"+to+"/other/place", RemoteOptions{}))
	im.readAll(t, NewStore(NewLayoutBlobs(dir), im.locators, im.index))

	copied, err := name.ParseReference(to + "/other/place:new")
	if err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Head(copied)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := index.Digest(); desc.Digest != want {
		t.Errorf("the copy is %s, want %s", desc.Digest, want)
	}

	// Without its tag the image goes, and the error says what may have happened.
	if err := remote.Delete(copied.Context().Digest(desc.Digest.String())); err != nil {
		t.Fatal(err)
	}
	run("docker-registry", "garbage-collect", "--delete-untagged", config)
	s := im.storeAt(t, "registry://"+to+"/other/place", RemoteOptions{})
	id := im.ids(t, 0, 1)[0]
	_, err = s.Get(t.Context(), id, nil)
	if want := fmt.Sprintf("registry://%s/other/place: read chunk %s: blob %s: 404 Not Found: ", to, id, im.packs[0].Digest); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want %s…", err, want)
	}
	if has, err := s.Has(t.Context(), id); has || err != nil {
		t.Errorf("Has: got %v, %v, want false", has, err)
	}
}
