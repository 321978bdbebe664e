package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/container-bootfs/bootfs/registrystore"
)

// Annotations of a data manifest's descriptor in the index.
const (
	// AnnotationType holds the artifact type. The field for it is unknown to
	// older tools, which would drop it when they copy the index.
	AnnotationType = "vnd.bootfs.artifact.type"
	// AnnotationBoot names the boot manifest whose packs are listed.
	AnnotationBoot = "vnd.bootfs.boot.digest"
)

// ociIndex is the index of a converted image. It implements remote.Taggable
// with a media type.
type ociIndex struct {
	raw  []byte
	desc v1.Descriptor
}

func (x *ociIndex) RawManifest() ([]byte, error)        { return x.raw, nil }
func (x *ociIndex) MediaType() (types.MediaType, error) { return types.OCIImageIndex, nil }

// newIndex lists the boot manifests and, behind them, the data manifests:
// engines that take the first manifest they can run find it first.
//
// Its JSON is laid out as image-spec's types are, and has the fields that they
// always had: skopeo copy --all parses an index and writes it anew, and the
// digest must survive that.
func newIndex(images []PlatformImage) (*ociIndex, error) {
	if len(images) == 0 {
		return nil, errors.New("no image to commit")
	}
	m := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	m.SchemaVersion = 2
	var data []ocispec.Descriptor
	for _, img := range images {
		var boot string
		if img.Boot != nil {
			d, err := partial.Descriptor(img.Boot)
			if err != nil {
				return nil, fmt.Errorf("boot image for %s: %w", img.Platform, err)
			}
			m.Manifests = append(m.Manifests, ociDescriptor(d, img.Platform))
			boot = d.Digest.String()
		}
		if img.Data != nil {
			d, err := partial.Descriptor(img.Data)
			if err != nil {
				return nil, fmt.Errorf("data manifest for %s: %w", img.Platform, err)
			}
			o := ociDescriptor(d, *registrystore.DataPlatform())
			o.Annotations = map[string]string{AnnotationType: registrystore.ArtifactTypeData}
			if img.Boot != nil {
				o.Annotations[AnnotationBoot] = boot
			}
			data = append(data, o)
		}
	}
	m.Manifests = append(m.Manifests, data...)
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	h, n, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	return &ociIndex{raw: raw, desc: v1.Descriptor{MediaType: types.OCIImageIndex, Size: n, Digest: h}}, nil
}

func ociDescriptor(d *v1.Descriptor, p v1.Platform) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: string(d.MediaType), Digest: digest.Digest(d.Digest.String()), Size: d.Size,
		Platform: &ocispec.Platform{
			Architecture: p.Architecture, OS: p.OS, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures, Variant: p.Variant,
		},
	}
}

// blobWriter stores blobs under their digests, each whole or not at all. It is
// safe for concurrent use.
type blobWriter interface {
	// put stores the blob that open reads, unless it is there.
	put(ctx context.Context, d v1.Hash, size int64, open func() (io.ReadCloser, error)) (reused bool, err error)
}

func putBytes(ctx context.Context, w blobWriter, d v1.Hash, b []byte) error {
	_, err := w.put(ctx, d, int64(len(b)), func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b)), nil
	})
	return err
}

// putImage stores all that img is made of, its manifest last.
func putImage(ctx context.Context, w blobWriter, img v1.Image) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			return err
		}
		size, err := l.Size()
		if err != nil {
			return err
		}
		if _, err := w.put(ctx, d, size, l.Compressed); err != nil {
			return err
		}
	}
	name, err := img.ConfigName()
	if err != nil {
		return err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	if err := putBytes(ctx, w, name, config); err != nil {
		return err
	}
	d, err := img.Digest()
	if err != nil {
		return err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return err
	}
	return putBytes(ctx, w, d, raw)
}

// putImages stores what images are made of and the index of them, which it
// returns.
func putImages(ctx context.Context, w blobWriter, images []PlatformImage) (*ociIndex, error) {
	x, err := newIndex(images)
	if err != nil {
		return nil, err
	}
	for _, img := range images {
		if img.Boot != nil {
			if err := putImage(ctx, w, img.Boot); err != nil {
				return nil, fmt.Errorf("boot image for %s: %w", img.Platform, err)
			}
		}
		if img.Data != nil {
			if err := putImage(ctx, w, img.Data); err != nil {
				return nil, fmt.Errorf("data manifest for %s: %w", img.Platform, err)
			}
		}
	}
	if err := putBytes(ctx, w, x.desc.Digest, x.raw); err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	return x, nil
}

// putPack stores a pack.
func putPack(ctx context.Context, w blobWriter, p registrystore.Pack) (bool, error) {
	d, err := v1.NewHash(p.Digest)
	if err != nil {
		return false, fmt.Errorf("pack: %w", err)
	}
	l, err := p.Layer()
	if err != nil {
		return false, err
	}
	return w.put(ctx, d, p.Size, l.Compressed)
}
