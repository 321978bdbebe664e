package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/layer"
)

// Bundle is an OCI layout in a tar file that docker load reads, too: beside
// index.json there is manifest.json, which names the same blobs. So one file
// brings a boot image to engines of every kind, and its packs to whoever reads
// the layout. What is committed in the same way gives the same bytes.
type Bundle struct {
	*ociArchiveDestination
	saved map[v1.Hash][]string // names of boot manifests for docker load
	list  []savedImage         // what manifest.json lists
}

// OpenBundle prepares a Bundle in the file at path. Engines call the image name;
// "" leaves it without one.
func OpenBundle(path, name string, o Options) (*Bundle, error) {
	full, err := repoTag(name)
	if err != nil {
		return nil, fmt.Errorf("name %q: %w", name, err)
	}
	tag := full[strings.LastIndex(full, ":")+1:]
	d, err := openOCIArchiveDestination(Ref{Transport: OCIArchive, Path: path, Name: tag}, o)
	if err != nil {
		return nil, err
	}
	d.image = full
	return &Bundle{ociArchiveDestination: d, saved: make(map[v1.Hash][]string)}, nil
}

// Names says which boot manifests docker load enters, before they are written,
// and returns the name of each, "" for none. That of several platforms which is
// this machine's, or else the first, has the name of the Bundle; engines that
// know one platform of an image only need another name for each of the others.
func (b *Bundle) Names(platforms []v1.Platform, manifests []v1.Hash) []string {
	main := 0
	for i, p := range platforms {
		if p.Architecture == runtime.GOARCH {
			main = i
			break
		}
	}
	names := make([]string, len(manifests))
	for i, h := range manifests {
		tags := []string{}
		if b.image != "" {
			names[i] = b.image
			if i != main {
				names[i] += "-" + strings.ReplaceAll(strings.TrimPrefix(platforms[i].String(), "linux/"), "/", "-")
			}
			tags = append(tags, names[i])
		}
		b.saved[h] = tags
	}
	return names
}

func (b *Bundle) putManifest(ctx context.Context, d v1.Descriptor, raw []byte) error {
	if tags, ok := b.saved[d.Digest]; ok {
		m, err := v1.ParseManifest(bytes.NewReader(raw))
		if err != nil {
			return err
		}
		s := savedImage{Config: blobPath(m.Config.Digest), RepoTags: tags}
		for _, l := range m.Layers {
			s.Layers = append(s.Layers, blobPath(l.Digest))
		}
		b.list = append(b.list, s)
	}
	return b.ociArchiveDestination.putManifest(ctx, d, raw)
}

func (b *Bundle) finish(ctx context.Context, d v1.Descriptor, raw []byte) error {
	m, err := json.Marshal(b.list)
	if err != nil {
		return err
	}
	if err := b.tar.add(dockerManifest, int64(len(m)), bytes.NewReader(m)); err != nil {
		return err
	}
	return b.ociArchiveDestination.finish(ctx, d, raw)
}

// Commit implements Destination.
func (b *Bundle) Commit(ctx context.Context, images []PlatformImage) (string, error) {
	return commitImages(ctx, b, images)
}

// CommitStored is Commit of all that the name of src stands for, as it is.
func (b *Bundle) CommitStored(ctx context.Context, src Stored) (string, error) {
	c, err := newCopier(src, b)
	if err != nil {
		return "", err
	}
	g, err := c.walk(ctx, src.Root())
	if err != nil {
		return "", err
	}
	if err := c.put(ctx, g); err != nil {
		return "", err
	}
	root := g.manifests[len(g.manifests)-1]
	if err := b.finish(ctx, root.desc, root.raw); err != nil {
		return "", err
	}
	return root.desc.Digest.String(), nil
}

// maxPlainLayer bounds a layer of an image that docker save wrote, in bytes.
const maxPlainLayer = 1 << 40

// Writable returns an image of src for a destination: as it is stored, or, where
// src keeps no manifests, with one that lists its plain layers.
func Writable(ctx context.Context, src Source, img Image) (v1.Image, error) {
	w := &writable{ctx: ctx, config: img.RawConfig, layers: make(map[v1.Hash]*writableLayer)}
	if s, ok := src.(Stored); ok {
		return w.stored(s, img)
	}
	return w.made(img)
}

// writable is a partial.CompressedImageCore.
type writable struct {
	ctx              context.Context
	config, manifest []byte
	mediaType        types.MediaType
	layers           map[v1.Hash]*writableLayer
}

func (w *writable) stored(src Stored, img Image) (v1.Image, error) {
	h, err := v1.NewHash(img.Digest)
	if err != nil {
		return nil, err
	}
	if w.manifest, err = src.Manifest(w.ctx, v1.Descriptor{Digest: h}); err != nil {
		return nil, ofSource(err)
	}
	m, err := v1.ParseManifest(bytes.NewReader(w.manifest))
	if err != nil {
		return nil, ofSource(err)
	}
	w.mediaType = m.MediaType
	for _, d := range m.Layers {
		w.layers[d.Digest] = &writableLayer{d, func() (io.ReadCloser, error) { return src.Blob(w.ctx, d) }}
	}
	return partial.CompressedToImage(w)
}

func (w *writable) made(img Image) (v1.Image, error) {
	config, _, err := v1.SHA256(bytes.NewReader(w.config))
	if err != nil {
		return nil, err
	}
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(w.config)), Digest: config},
		Layers:        []v1.Descriptor{},
	}
	for _, l := range img.Layers {
		d := v1.Descriptor{MediaType: types.OCIUncompressedLayer}
		if d.Digest, err = v1.NewHash(l.DiffID); err != nil {
			return nil, ofSource(err)
		}
		open := func() (io.ReadCloser, error) { return layer.OpenPlain(w.ctx, l, maxPlainLayer, nil) }
		// A manifest, and a header of a tar, state the size in front of the bytes.
		if d.Size, err = sizeOf(open); err != nil {
			return nil, ofSource(fmt.Errorf("layer %s: %w", l.Name, err))
		}
		m.Layers = append(m.Layers, d)
		w.layers[d.Digest] = &writableLayer{d, open}
	}
	w.mediaType = m.MediaType
	if w.manifest, err = json.Marshal(m); err != nil {
		return nil, err
	}
	return partial.CompressedToImage(w)
}

func sizeOf(open func() (io.ReadCloser, error)) (int64, error) {
	rc, err := open()
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(io.Discard, rc)
	return n, errors.Join(err, rc.Close())
}

func (w *writable) RawConfigFile() ([]byte, error)      { return w.config, nil }
func (w *writable) RawManifest() ([]byte, error)        { return w.manifest, nil }
func (w *writable) MediaType() (types.MediaType, error) { return w.mediaType, nil }

func (w *writable) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	if l, ok := w.layers[h]; ok {
		return l, nil
	}
	return nil, fmt.Errorf("the image has no layer %s", h)
}

// writableLayer is a layer where it lies.
type writableLayer struct {
	desc v1.Descriptor
	open func() (io.ReadCloser, error)
}

func (l *writableLayer) Digest() (v1.Hash, error)            { return l.desc.Digest, nil }
func (l *writableLayer) Size() (int64, error)                { return l.desc.Size, nil }
func (l *writableLayer) MediaType() (types.MediaType, error) { return l.desc.MediaType, nil }

func (l *writableLayer) Compressed() (io.ReadCloser, error) {
	rc, err := l.open()
	if err != nil {
		return nil, ofSource(err)
	}
	return sourceReader{rc}, nil
}
