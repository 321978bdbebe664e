package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"slices"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/registrystore"
)

// Artifact is a set of named files under a tag of a registry. It is safe for
// concurrent use.
type Artifact struct {
	*repository
	kind ArtifactKind

	mu     sync.Mutex               // guards what follows
	read   bool                     // the manifest was asked for
	err    error                    // that it was read with
	files  map[string]v1.Descriptor // by name
	reader registrystore.Blobs
}

// ArtifactKind says what the files of an artifact are.
type ArtifactKind struct {
	Type      string          // artifactType of the manifest
	MediaType types.MediaType // of each file
	MaxFile   int64           // no file has more bytes
}

// annotationTitle holds the name of a file, where other tools look for it too.
const annotationTitle = "org.opencontainers.image.title"

// NewArtifact names an artifact, which need not be there. ref is an image name
// in a registry, without a transport.
func NewArtifact(ref string, kind ArtifactKind, o Options) (*Artifact, error) {
	p, err := newRepository(Ref{Transport: Registry, Name: ref}, o)
	if err != nil {
		return nil, err
	}
	return &Artifact{repository: p, kind: kind}, nil
}

func (a *Artifact) String() string { return a.ref.Name() }

// Get returns the file called name. Its error wraps [fs.ErrNotExist] when
// there is no such file or no such artifact.
func (a *Artifact) Get(ctx context.Context, name string) ([]byte, error) {
	d, blobs, err := a.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if d.Size < 0 || d.Size > a.kind.MaxFile {
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", d.Size, a.kind.MaxFile)
	}
	b, err := registrystore.ReadRange(ctx, blobs, d.Digest.String(), 0, d.Size, nil)
	if err != nil {
		return nil, err
	}
	if got, _, err := v1.SHA256(bytes.NewReader(b)); err != nil || got != d.Digest {
		return nil, fmt.Errorf("its digest is %s, want %s", got, d.Digest)
	}
	return b, nil
}

// find looks a file up in the manifest, which is read once.
func (a *Artifact) find(ctx context.Context, name string) (v1.Descriptor, registrystore.Blobs, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.read {
		a.read, a.err = true, a.load(ctx)
	}
	if a.err != nil {
		return v1.Descriptor{}, nil, a.err
	}
	d, ok := a.files[name]
	if !ok {
		return d, nil, fs.ErrNotExist
	}
	return d, a.reader, nil
}

func (a *Artifact) load(ctx context.Context) (err error) {
	if a.reader, err = a.blobs(); err != nil {
		return err
	}
	puller, err := remote.NewPuller(a.options()...)
	if err != nil {
		return err
	}
	got, err := puller.Get(ctx, a.ref)
	var status *transport.Error
	if errors.As(err, &status) && status.StatusCode == http.StatusNotFound {
		return nil
	}
	if err != nil {
		return a.explain(err)
	}
	if len(got.Manifest) > maxManifest {
		return fmt.Errorf("its manifest has %d bytes, at most %d are read", len(got.Manifest), maxManifest)
	}
	var m v1.Manifest
	if err := json.Unmarshal(got.Manifest, &m); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	if m.ArtifactType != a.kind.Type {
		return fmt.Errorf("it is a manifest of type %.80q, want %q", m.ArtifactType, a.kind.Type)
	}
	a.files = make(map[string]v1.Descriptor)
	for _, l := range m.Layers {
		a.files[l.Annotations[annotationTitle]] = l
	}
	return nil
}

// Put makes the artifact consist of these files. What the registry has of them
// is not uploaded.
func (a *Artifact) Put(ctx context.Context, files map[string][]byte) error {
	img, err := a.kind.image(files)
	if err != nil {
		return err
	}
	pusher, err := remote.NewPusher(a.options()...)
	if err != nil {
		return err
	}
	whole, err := partial.CompressedToImage(img)
	if err != nil {
		return err
	}
	if err := pusher.Push(ctx, a.ref, whole); err != nil {
		return a.explain(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.read, a.err, a.files = false, nil, nil
	return nil
}

// Close ends the use of the artifact.
func (a *Artifact) Close() error {
	a.transport.CloseIdleConnections()
	return nil
}

// artifactImage is an artifact as the programs that write images see one.
type artifactImage struct {
	raw    []byte
	layers []memoryLayer
}

func (k ArtifactKind) image(files map[string][]byte) (*artifactImage, error) {
	empty := []byte("{}")
	sum, _, err := v1.SHA256(bytes.NewReader(empty))
	if err != nil {
		return nil, err
	}
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  k.Type,
		Config:        v1.Descriptor{MediaType: registrystore.MediaTypeEmpty, Size: int64(len(empty)), Digest: sum},
		Layers:        []v1.Descriptor{},
	}
	img := &artifactImage{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		l := memoryLayer{bytes: files[name], mediaType: k.MediaType}
		if l.digest, _, err = v1.SHA256(bytes.NewReader(l.bytes)); err != nil {
			return nil, err
		}
		img.layers = append(img.layers, l)
		m.Layers = append(m.Layers, v1.Descriptor{
			MediaType: k.MediaType, Size: int64(len(l.bytes)), Digest: l.digest,
			Annotations: map[string]string{annotationTitle: name},
		})
	}
	img.raw, err = json.Marshal(m)
	return img, err
}

func (i *artifactImage) RawConfigFile() ([]byte, error)      { return []byte("{}"), nil }
func (i *artifactImage) RawManifest() ([]byte, error)        { return i.raw, nil }
func (i *artifactImage) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

func (i *artifactImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range i.layers {
		if l.digest == h {
			return l, nil
		}
	}
	return nil, fmt.Errorf("artifact has no file %s", h)
}

// memoryLayer is a blob in memory.
type memoryLayer struct {
	bytes     []byte
	digest    v1.Hash
	mediaType types.MediaType
}

func (l memoryLayer) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l memoryLayer) Size() (int64, error)                { return int64(len(l.bytes)), nil }
func (l memoryLayer) MediaType() (types.MediaType, error) { return l.mediaType, nil }
func (l memoryLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.bytes)), nil
}
