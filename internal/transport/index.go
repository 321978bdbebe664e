package transport

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

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

// Annotations of an attestation manifest's descriptor in the index. The first
// two are BuildKit's: what kind it is, and which manifest of the index it
// describes, by which tools find it.
const (
	annotationReferenceType = "vnd.docker.reference.type"
	annotationReference     = "vnd.docker.reference.digest"
	// AnnotationSource names the manifest that the attestation was made for,
	// the source of the boot image.
	AnnotationSource = "vnd.bootfs.source.digest"
)

// ociIndex is the index of a converted image.
type ociIndex struct {
	raw  []byte
	desc v1.Descriptor
}

// newIndex lists the boot manifests and, behind them, the data manifests and
// attestations: engines that take the first manifest they can run find it
// first.
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
	var data, attestations []ocispec.Descriptor
	for _, img := range images {
		var boot string
		if img.Boot != nil {
			d, err := partial.Descriptor(img.Boot)
			if err != nil {
				return nil, fmt.Errorf("boot image for %s: %w", img.Platform, err)
			}
			m.Manifests = append(m.Manifests, ociDescriptor(d, img.Platform))
			boot = d.Digest.String()
			for _, a := range img.Attestations {
				attestations = append(attestations, attestationDescriptor(a, boot))
			}
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
	m.Manifests = append(append(m.Manifests, data...), attestations...)
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

// ReplaceManifests returns an index with other manifests in the place of some,
// also where annotations name them. Nothing else of it changes.
func ReplaceManifests(index []byte, with map[v1.Hash]v1.Descriptor) ([]byte, error) {
	var m ocispec.Index
	if err := json.Unmarshal(index, &m); err != nil {
		return nil, err
	}
	for i := range m.Manifests {
		d := &m.Manifests[i]
		for old, next := range with {
			if string(d.Digest) == old.String() {
				d.Digest, d.Size = digest.Digest(next.Digest.String()), next.Size
			}
			for k, v := range d.Annotations {
				if v == old.String() {
					d.Annotations[k] = next.Digest.String()
				}
			}
		}
	}
	return json.Marshal(m)
}

// attestationDescriptor is d for the boot image in the place of its source.
func attestationDescriptor(d v1.Descriptor, boot string) ocispec.Descriptor {
	p := d.Platform
	if p == nil {
		p = registrystore.DataPlatform()
	}
	o := ociDescriptor(&d, *p)
	o.Annotations = maps.Clone(d.Annotations)
	o.Annotations[AnnotationSource] = d.Annotations[annotationReference]
	o.Annotations[annotationReference] = boot
	return o
}

func ociDescriptor(d *v1.Descriptor, p v1.Platform) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: string(d.MediaType), Digest: digest.Digest(d.Digest.String()), Size: d.Size,
		Platform: &ocispec.Platform{
			Architecture: p.Architecture, OS: p.OS, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures, Variant: p.Variant,
		},
	}
}

// imageWriter stores what images are made of, each part whole or not at all.
// It is safe for concurrent use.
type imageWriter interface {
	// put stores a blob, unless it is there.
	put(ctx context.Context, b blob) (reused bool, err error)
	// putManifest stores a manifest under its digest, when all that it names
	// is there.
	putManifest(ctx context.Context, d v1.Descriptor, raw []byte) error
}

// jobsAt is how many blobs are put at a time.
func jobsAt(w imageWriter) int {
	if o, ok := w.(interface{ jobs() int }); ok {
		return o.jobs()
	}
	return remoteJobs
}

// receiver is a destination that holds manifests beside one another.
type receiver interface {
	Destination
	imageWriter
	// hasManifest may say no where asking is no cheaper than storing.
	hasManifest(ctx context.Context, d v1.Descriptor) (bool, error)
	// tag gives a manifest that is there a name of its own, at once or with
	// finish.
	tag(ctx context.Context, name string, d v1.Descriptor, raw []byte) error
	// lookup returns the manifest that a name stands for before the commit; an
	// error that wraps fs.ErrNotExist if there is none.
	lookup(ctx context.Context, name string) ([]byte, error)
	// finish makes the destination's name stand for a manifest that is there.
	finish(ctx context.Context, d v1.Descriptor, raw []byte) error
}

// commitImages is Commit of a receiver.
func commitImages(ctx context.Context, w receiver, images []PlatformImage) (string, error) {
	x, err := putImages(ctx, w, images)
	if err != nil {
		return "", err
	}
	if err := w.finish(ctx, x.desc, x.raw); err != nil {
		return "", fmt.Errorf("index %s: %w", x.desc.Digest, err)
	}
	return x.desc.Digest.String(), nil
}

// blob is what an imageWriter stores.
type blob struct {
	digest v1.Hash
	size   int64  // bytes
	from   string // repository of the same registry that may have it, "" for none
	// open reads it from byte off on.
	open func(ctx context.Context, off int64) (io.ReadCloser, error)
	// file has no name and holds the blob, as its maker has written it; nil if
	// there is none.
	file *os.File
}

func bytesBlob(d v1.Hash, b []byte) blob {
	return blob{digest: d, size: int64(len(b)), open: func(_ context.Context, off int64) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b[off:])), nil
	}}
}

// bytesOf is the blob that b is.
func bytesOf(b []byte) blob {
	sum := sha256.Sum256(b)
	return bytesBlob(v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}, b)
}

// openerBlob is a blob that can only be opened at its beginning.
func openerBlob(d v1.Hash, size int64, open func() (io.ReadCloser, error)) blob {
	return blob{digest: d, size: size, open: func(ctx context.Context, off int64) (io.ReadCloser, error) {
		rc, err := open()
		if err != nil || off == 0 {
			return rc, err
		}
		if s, ok := rc.(io.Seeker); ok {
			_, err = s.Seek(off, io.SeekStart)
		} else {
			_, err = io.CopyN(io.Discard, &progressReader{ctx, rc, func(int64) {}}, off)
		}
		if err != nil {
			rc.Close()
			return nil, fmt.Errorf("blob %s up to byte %d: %w", d, off, err)
		}
		return rc, nil
	}}
}

// putImage stores all that img is made of, its manifest last.
func putImage(ctx context.Context, w imageWriter, img v1.Image) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	g, inner := errgroup.WithContext(ctx)
	g.SetLimit(jobsAt(w))
	for _, l := range layers {
		g.Go(func() error {
			d, err := l.Digest()
			if err != nil {
				return err
			}
			size, err := l.Size()
			if err != nil {
				return err
			}
			_, err = w.put(inner, openerBlob(d, size, l.Compressed))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	name, err := img.ConfigName()
	if err != nil {
		return err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	if _, err := w.put(ctx, bytesBlob(name, config)); err != nil {
		return err
	}
	d, err := partial.Descriptor(img)
	if err != nil {
		return err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return err
	}
	return w.putManifest(ctx, *d, raw)
}

// putImages stores what images are made of and the index of them, which it
// returns.
func putImages(ctx context.Context, w imageWriter, images []PlatformImage) (*ociIndex, error) {
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
	if err := w.putManifest(ctx, x.desc, x.raw); err != nil {
		return nil, fmt.Errorf("index %s: %w", x.desc.Digest, err)
	}
	return x, nil
}

// packBlob is a pack that is to be stored.
func packBlob(p registrystore.Pack) (blob, error) {
	d, err := v1.NewHash(p.Digest)
	if err != nil {
		return blob{}, fmt.Errorf("pack: %w", err)
	}
	l, err := p.Layer()
	if err != nil {
		return blob{}, err
	}
	b := openerBlob(d, p.Size, l.Compressed)
	b.file = p.File
	return b, nil
}

// putPack stores a pack.
func putPack(ctx context.Context, w imageWriter, p registrystore.Pack) (bool, error) {
	b, err := packBlob(p)
	if err != nil {
		return false, err
	}
	return w.put(ctx, b)
}

// KeepTag is the tag that a conversion with Options.KeepTag leaves beside the
// one that it was asked for: it names the index by its digest and is never
// moved.
func KeepTag(index v1.Hash) string { return "keep-" + index.Hex }
