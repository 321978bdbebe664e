package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"slices"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

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
// is not uploaded, and the tag is set last.
func (a *Artifact) Put(ctx context.Context, files map[string][]byte) error {
	empty := bytesOf([]byte("{}"))
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  a.kind.Type,
		Config:        v1.Descriptor{MediaType: registrystore.MediaTypeEmpty, Size: empty.size, Digest: empty.digest},
		Layers:        []v1.Descriptor{},
	}
	blobs := []blob{empty}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		b := bytesOf(files[name])
		blobs = append(blobs, b)
		m.Layers = append(m.Layers, v1.Descriptor{
			MediaType: a.kind.MediaType, Size: b.size, Digest: b.digest,
			Annotations: map[string]string{annotationTitle: name},
		})
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := a.push(ctx, blobs, raw); err != nil {
		return a.explain(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.read, a.err, a.files = false, nil, nil
	return nil
}

func (a *Artifact) push(ctx context.Context, blobs []blob, manifest []byte) error {
	up := newUploader(a.repository, func(int64) {})
	g, inner := errgroup.WithContext(ctx)
	g.SetLimit(remoteJobs)
	for _, b := range blobs {
		g.Go(func() error {
			_, err := up.put(inner, b)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	d := bytesOf(manifest)
	_, err := up.putManifest(ctx, a.ref.Identifier(), v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: d.size, Digest: d.digest}, manifest)
	return err
}

// Close ends the use of the artifact.
func (a *Artifact) Close() error {
	a.transport.CloseIdleConnections()
	return nil
}
