package registrystore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Media types of what stands beside a boot image.
const (
	// MediaTypePack is a pack: zstd frames behind one another.
	MediaTypePack types.MediaType = "application/vnd.bootfs.pack.v1+zstd"
	// MediaTypeLocators is the file of locators of a boot image that has none
	// itself, beside its packs.
	MediaTypeLocators types.MediaType = "application/vnd.bootfs.locators.v1"
	// ArtifactTypeData marks the manifest that lists packs.
	ArtifactTypeData = "application/vnd.bootfs.data.v1"

	// MediaTypeEmpty is that of a configuration that says nothing.
	MediaTypeEmpty types.MediaType = "application/vnd.oci.empty.v1+json"
)

// DataPlatform is the platform of a data manifest in an index. Engines never
// choose it; BuildKit marks its attestations so.
func DataPlatform() *v1.Platform {
	return &v1.Platform{OS: "unknown", Architecture: "unknown"}
}

// DataManifest returns the manifest that lists packs as its layers. It is an
// image only for the programs that copy it: its configuration is empty. Packs
// without Open must be at the destination when it is written there.
func DataManifest(packs []Pack) (v1.Image, error) { return dataManifest(packs, nil) }

// LocatedManifest is the DataManifest of an image that was converted to a loose
// store: its boot image does not know these packs, so that the manifest lists the
// file of their locators behind them.
func LocatedManifest(packs []Pack, locators []byte) (v1.Image, error) {
	h, n, err := v1.SHA256(bytes.NewReader(locators))
	if err != nil {
		return nil, err
	}
	return dataManifest(packs, &packLayer{digest: h, mediaType: MediaTypeLocators, pack: Pack{
		PackDescriptor: PackDescriptor{Digest: h.String(), Size: n},
		Open:           func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(locators)), nil },
	}})
}

// dataManifest lists packs and then, if it is not nil, last.
func dataManifest(packs []Pack, last *packLayer) (v1.Image, error) {
	empty := []byte("{}")
	sum, _, err := v1.SHA256(bytes.NewReader(empty))
	if err != nil {
		return nil, err
	}
	img := &dataImage{config: empty, manifest: v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  ArtifactTypeData,
		Config:        v1.Descriptor{MediaType: MediaTypeEmpty, Size: int64(len(empty)), Digest: sum},
		Layers:        []v1.Descriptor{},
	}}
	seen := make(map[v1.Hash]bool)
	for _, p := range packs {
		layer, err := p.Layer()
		if err != nil {
			return nil, err
		}
		if d := layer.(packLayer).digest; !seen[d] {
			seen[d] = true
			img.layers = append(img.layers, layer)
			img.manifest.Layers = append(img.manifest.Layers, v1.Descriptor{MediaType: MediaTypePack, Size: p.Size, Digest: d})
		}
	}
	if last != nil {
		img.layers = append(img.layers, *last)
		img.manifest.Layers = append(img.manifest.Layers, v1.Descriptor{MediaType: last.mediaType, Size: last.pack.Size, Digest: last.digest})
	}
	if img.raw, err = json.Marshal(img.manifest); err != nil {
		return nil, err
	}
	if img.digest, _, err = v1.SHA256(bytes.NewReader(img.raw)); err != nil {
		return nil, err
	}
	return img, nil
}

// dataImage is a v1.Image whose layers are packs.
type dataImage struct {
	config   []byte
	manifest v1.Manifest
	raw      []byte
	digest   v1.Hash
	layers   []v1.Layer
}

func (d *dataImage) Layers() ([]v1.Layer, error)               { return d.layers, nil }
func (d *dataImage) MediaType() (types.MediaType, error)       { return d.manifest.MediaType, nil }
func (d *dataImage) Size() (int64, error)                      { return int64(len(d.raw)), nil }
func (d *dataImage) ConfigName() (v1.Hash, error)              { return d.manifest.Config.Digest, nil }
func (d *dataImage) ConfigFile() (*v1.ConfigFile, error)       { return &v1.ConfigFile{}, nil }
func (d *dataImage) RawConfigFile() ([]byte, error)            { return d.config, nil }
func (d *dataImage) Digest() (v1.Hash, error)                  { return d.digest, nil }
func (d *dataImage) Manifest() (*v1.Manifest, error)           { return d.manifest.DeepCopy(), nil }
func (d *dataImage) RawManifest() ([]byte, error)              { return d.raw, nil }
func (d *dataImage) LayerByDiffID(h v1.Hash) (v1.Layer, error) { return d.LayerByDigest(h) }

func (d *dataImage) LayerByDigest(h v1.Hash) (v1.Layer, error) {
	for _, l := range d.layers {
		if l.(packLayer).digest == h {
			return l, nil
		}
	}
	return nil, fmt.Errorf("data manifest %s has no pack %s", d.digest, h)
}

// Layer returns the pack as a layer, for programs that write images.
func (p Pack) Layer() (v1.Layer, error) {
	digest, err := v1.NewHash(p.Digest)
	if err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	return packLayer{pack: p, digest: digest, mediaType: MediaTypePack}, nil
}

type packLayer struct {
	pack      Pack
	digest    v1.Hash
	mediaType types.MediaType
}

func (l packLayer) Digest() (v1.Hash, error)             { return l.digest, nil }
func (l packLayer) DiffID() (v1.Hash, error)             { return l.digest, nil }
func (l packLayer) Size() (int64, error)                 { return l.pack.Size, nil }
func (l packLayer) MediaType() (types.MediaType, error)  { return l.mediaType, nil }
func (l packLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }

// Compressed opens the pack. Writers of layouts open a layer before they look
// whether it is there already, so a missing pack fails when it is read.
func (l packLayer) Compressed() (io.ReadCloser, error) {
	if l.pack.Open == nil {
		return io.NopCloser(missing{l.digest}), nil
	}
	return l.pack.Open()
}

type missing struct{ digest v1.Hash }

func (m missing) Read([]byte) (int, error) {
	return 0, fmt.Errorf("pack %s: %w", m.digest, errMissing)
}

var errMissing = errors.New("it should be at the destination already, and is not")
