package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/layer"
)

// maxManifests bounds how many manifests one name may lead to, and
// maxManifestBytes how many bytes those have that are held at once: a manifest
// with a thousand layers has 200 kB. What is parsed of them takes as much again.
const (
	maxManifests     = 1000
	maxManifestBytes = 32 << 20
)

// contents is where blobs lie under their digests: a registry's repository or
// an OCI layout. The bytes are unverified.
type contents interface {
	// manifest returns the bytes of a manifest, at most maxManifest.
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
	// local returns a blob that lies in a local file, or nil.
	local(d v1.Descriptor) io.ReaderAt
}

// resolved is what was found under a name, and where.
type resolved struct {
	from    contents
	root    v1.Descriptor
	beside  *layoutIndex // of a layout; nil in a registry
	images  []Image
	skipped []Skipped
}

func (r *resolved) Images() []Image     { return r.images }
func (r *resolved) Skipped() []Skipped  { return r.skipped }
func (r *resolved) Root() v1.Descriptor { return r.root }

func (r *resolved) resolve(ctx context.Context, c contents, root v1.Descriptor, want []v1.Platform) (err error) {
	r.from, r.root = c, root
	r.images, r.skipped, err = resolve(ctx, c, root, want)
	return err
}

func (r *resolved) Manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	return readManifest(ctx, r.from, d)
}

func (r *resolved) Blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	rc, err := r.from.blob(ctx, d)
	if err != nil {
		return nil, err
	}
	return verify(rc, d)
}

// resolver turns the manifest that a name stands for into images.
type resolver struct {
	contents contents
	want     []v1.Platform

	images    []Image
	skipped   []Skipped
	platforms []v1.Platform // all Linux platforms seen, for messages
	seen      int
	bytes     int64 // of the manifests and configurations seen
}

// charge counts what is held of a document.
func (r *resolver) charge(raw []byte) error {
	if r.bytes += int64(len(raw)); r.bytes > maxManifestBytes {
		return fmt.Errorf("its manifests and configurations have more than %d bytes", maxManifestBytes)
	}
	return nil
}

// resolve reads what root describes: an image, or an index of images.
func resolve(ctx context.Context, c contents, root v1.Descriptor, want []v1.Platform) ([]Image, []Skipped, error) {
	r := &resolver{contents: c, want: want}
	if err := r.add(ctx, root, 0); err != nil {
		return nil, nil, err
	}
	for _, w := range want {
		if !slices.ContainsFunc(r.images, func(i Image) bool { return matches(i.Platform, w) }) {
			return nil, nil, fmt.Errorf("no image for platform %s; there is one for %s", w, orNone(platformList(r.platforms)))
		}
	}
	if len(r.images) == 0 {
		return nil, nil, errors.New("the index names no image for a Linux platform")
	}
	return r.images, r.skipped, nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// manifestTypes are the media types that are asked for.
var manifestTypes = []string{
	string(types.OCIImageIndex), string(types.OCIManifestSchema1),
	string(types.DockerManifestList), string(types.DockerManifestSchema2), "*/*",
}

// manifestFields are the fields by which the kinds of manifest are told apart.
type manifestFields struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     types.MediaType `json:"mediaType"`
	Manifests     json.RawMessage `json:"manifests"`
	Config        json.RawMessage `json:"config"`
	Layers        json.RawMessage `json:"layers"`
	FSLayers      json.RawMessage `json:"fsLayers"`
}

func (r *resolver) add(ctx context.Context, d v1.Descriptor, depth int) error {
	if r.seen++; r.seen > maxManifests || depth > 3 {
		return fmt.Errorf("the index holds more than %d manifests or nests deeper than 3", maxManifests)
	}
	raw, err := readManifest(ctx, r.contents, d)
	if err == nil {
		err = r.charge(raw)
	}
	if err != nil {
		return err
	}
	var f manifestFields
	if err := json.Unmarshal(raw, &f); err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if f.SchemaVersion == 1 || f.FSLayers != nil {
		return fmt.Errorf("manifest %s is of Docker's schema 1, which is not supported; push the image again with a newer Docker", d.Digest)
	}
	isIndex, isImage := f.Manifests != nil, f.Config != nil || f.Layers != nil
	if isIndex == isImage {
		return fmt.Errorf("manifest %s is neither an image nor an index", d.Digest)
	}
	// The type decides how others read the same digest: what disagrees with
	// it is a trick.
	for _, mt := range []types.MediaType{d.MediaType, f.MediaType} {
		if mt.IsIndex() && !isIndex || mt.IsImage() && !isImage {
			return fmt.Errorf("manifest %s claims to be %s, its fields say otherwise", d.Digest, mt)
		}
	}
	if isIndex {
		return r.addIndex(ctx, d, raw, depth)
	}
	return r.addImage(ctx, d, raw)
}

func (r *resolver) addIndex(ctx context.Context, d v1.Descriptor, raw []byte, depth int) error {
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("index %s: %w", d.Digest, err)
	}
	for _, m := range index.Manifests {
		if reason := r.skip(m); reason != "" {
			s := Skipped{Digest: m.Digest.String(), Reason: reason, Of: m.Annotations[annotationReference], Descriptor: m}
			if m.Platform != nil {
				s.Platform = m.Platform.String()
			}
			r.skipped = append(r.skipped, s)
			continue
		}
		if m.Platform != nil {
			r.platforms = append(r.platforms, *m.Platform)
			if !matchesAny(*m.Platform, r.want) {
				continue
			}
		}
		if err := r.add(ctx, m, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// skip says why a manifest of an index is no image to convert, or "".
func (r *resolver) skip(m v1.Descriptor) string {
	switch {
	case m.Annotations[annotationReferenceType] != "":
		return strings.TrimSuffix(m.Annotations[annotationReferenceType], "-manifest")
	case m.Annotations[AnnotationType] != "":
		return "artifact " + m.Annotations[AnnotationType]
	case m.ArtifactType != "" && !types.MediaType(m.ArtifactType).IsConfig():
		return "artifact " + m.ArtifactType
	case !m.MediaType.IsImage() && !m.MediaType.IsIndex():
		return fmt.Sprintf("media type %q", m.MediaType)
	case m.Platform == nil:
		return ""
	case m.Platform.OS == "unknown":
		return "attestation"
	case m.Platform.OS != "linux":
		return "not a Linux platform"
	case r.has(*m.Platform):
		return secondImage
	}
	return ""
}

// secondImage is why an image is skipped: engines take the first that fits.
const secondImage = "a second image for the platform"

func (r *resolver) has(p v1.Platform) bool {
	return slices.ContainsFunc(r.images, func(i Image) bool { return i.Platform.Equals(p) })
}

func (r *resolver) addImage(ctx context.Context, d v1.Descriptor, raw []byte) error {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if !m.Config.MediaType.IsConfig() {
		return fmt.Errorf("manifest %s is no image: its configuration is %q", d.Digest, m.Config.MediaType)
	}
	rawConfig, err := readAll(ctx, r.contents, m.Config, maxConfig)
	if err == nil {
		err = r.charge(rawConfig)
	}
	if err != nil {
		return fmt.Errorf("configuration of %s: %w", d.Digest, err)
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(rawConfig))
	if err != nil {
		return fmt.Errorf("configuration %s: %w", m.Config.Digest, err)
	}
	platform, err := imagePlatform(d, config)
	if err != nil {
		return fmt.Errorf("image %s: %w", d.Digest, err)
	}
	if d.Platform == nil {
		r.platforms = append(r.platforms, platform)
		if !matchesAny(platform, r.want) {
			return nil
		}
		if r.has(platform) {
			r.skipped = append(r.skipped, Skipped{Digest: d.Digest.String(), Platform: platform.String(), Reason: secondImage})
			return nil
		}
	}
	if got, want := len(m.Layers), len(config.RootFS.DiffIDs); got != want {
		return fmt.Errorf("image %s: its manifest lists %d layers, its configuration %d", d.Digest, got, want)
	}
	img := Image{
		Platform: platform, Digest: d.Digest.String(), Config: config, RawConfig: rawConfig,
		Annotations: m.Annotations,
	}
	for i, l := range m.Layers {
		if !isLayer(l.MediaType) {
			return fmt.Errorf("image %s: layer %s is %q, which cannot be read", d.Digest, l.Digest, l.MediaType)
		}
		if l.Size < 0 {
			return fmt.Errorf("image %s: layer %s claims %d bytes", d.Digest, l.Digest, l.Size)
		}
		img.Layers = append(img.Layers, r.layer(l, config.RootFS.DiffIDs[i]))
	}
	r.images = append(r.images, img)
	return nil
}

// isLayer knows, beside the standard types, those that others write for zstd.
func isLayer(mt types.MediaType) bool {
	switch mt {
	case "application/vnd.docker.image.rootfs.diff.tar.zstd", "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":
		return true
	}
	return mt.IsLayer()
}

func (r *resolver) layer(d v1.Descriptor, diffID v1.Hash) layer.Blob {
	b := layer.Blob{
		Name:      d.Digest.String(),
		DiffID:    diffID.String(),
		Digest:    d.Digest.String(),
		MediaType: string(d.MediaType),
		Size:      d.Size,
		Open: func(ctx context.Context) (io.ReadCloser, error) {
			rc, err := r.contents.blob(ctx, d)
			if err != nil {
				return nil, err
			}
			return verify(rc, d)
		},
	}
	if d.Digest == diffID {
		b.Plain = r.contents.local(d)
	}
	return b
}

// readManifest reads a manifest and checks its bytes.
func readManifest(ctx context.Context, c contents, d v1.Descriptor) ([]byte, error) {
	if d.Size > maxManifest {
		return nil, fmt.Errorf("manifest %s: its descriptor claims %d bytes, at most %d are read", d.Digest, d.Size, maxManifest)
	}
	raw, err := c.manifest(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	h, err := v1.Hasher(d.Digest.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	h.Write(raw)
	if got := fmt.Sprintf("%x", h.Sum(nil)); got != d.Digest.Hex {
		return nil, fmt.Errorf("manifest %s: its %d bytes have the digest %s:%s", d.Digest, len(raw), d.Digest.Algorithm, got)
	}
	return raw, nil
}

// imagePlatform is what the index says of an image, or else what the image
// says of itself.
func imagePlatform(d v1.Descriptor, c *v1.ConfigFile) (v1.Platform, error) {
	if d.Platform != nil {
		return *d.Platform, nil
	}
	p := v1.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant, OSVersion: c.OSVersion}
	if p.OS == "" {
		p.OS = "linux"
	}
	if p.OS != "linux" {
		return p, fmt.Errorf("it is for %s; only Linux images can be converted", p)
	}
	return p, nil
}
