package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/registrystore"
)

// TagPacks is a tag of a repository, and the packs that it leads to.
type TagPacks struct {
	Tag    string
	Digest string                         // of what it stands for
	Packs  []registrystore.PackDescriptor // each once; Start is not known
}

// ListPacks returns the tags of the repository at a store's address, and the
// packs that each of them keeps from the registry's garbage collector.
func ListPacks(ctx context.Context, address string, o Options) ([]TagPacks, error) {
	scheme, repo, ok := strings.Cut(address, "://")
	if !ok || scheme != "registry" && scheme != "registry+http" {
		return nil, fmt.Errorf("store %q: want registry://HOST/REPOSITORY", address)
	}
	ref, err := Parse("docker://"+repo+":latest", "")
	if err != nil {
		return nil, err
	}
	if host, _, _ := strings.Cut(repo, "/"); scheme == "registry+http" {
		o.Insecure = append(o.Insecure[:len(o.Insecure):len(o.Insecure)], host)
	}
	p, err := newRepository(ref, o)
	if err != nil {
		return nil, err
	}
	defer p.transport.CloseIdleConnections()
	puller, err := remote.NewPuller(p.options()...)
	if err != nil {
		return nil, err
	}
	tags, err := listTags(ctx, puller, p.ref.Context())
	var status *transport.Error
	if errors.As(err, &status) && status.StatusCode == http.StatusNotFound {
		return nil, &explained{fmt.Sprintf("%s has no repository %s", p.host(), p.ref.Context().RepositoryStr()), err}
	}
	if err != nil {
		return nil, p.explain(err)
	}
	l := &packLister{repository: p, puller: puller, data: make(map[v1.Hash][]registrystore.PackDescriptor)}
	out := make([]TagPacks, len(tags))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(remoteJobs)
	for i, tag := range tags {
		g.Go(func() (err error) {
			if out[i], err = l.tag(ctx, tag); err != nil {
				return fmt.Errorf("%s:%s: %w", p.ref.Context().Name(), tag, p.explain(err))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}

// What a registry may list: tags of a repository, and pages of them.
const (
	maxTags     = 100_000
	maxTagPages = 1000
)

// listTags returns the tags of a repository.
func listTags(ctx context.Context, puller *remote.Puller, repo name.Repository) ([]string, error) {
	l, err := puller.Lister(ctx, repo)
	if err != nil {
		return nil, err
	}
	var tags []string
	for pages := 0; l.HasNext(); pages++ {
		page, err := l.Next(ctx)
		if err != nil {
			return nil, err
		}
		if tags = append(tags, page.Tags...); len(tags) > maxTags || pages >= maxTagPages {
			return nil, fmt.Errorf("it lists more than %d tags, or more than %d pages of them", maxTags, maxTagPages)
		}
	}
	return tags, nil
}

// packLister reads what tags lead to.
type packLister struct {
	*repository
	puller *remote.Puller

	mu   sync.Mutex
	data map[v1.Hash][]registrystore.PackDescriptor // guarded by mu; by data manifest
}

func (l *packLister) tag(ctx context.Context, tag string) (TagPacks, error) {
	root, err := l.puller.Get(ctx, l.ref.Context().Tag(tag))
	if err != nil {
		return TagPacks{}, err
	}
	out := TagPacks{Tag: tag, Digest: root.Digest.String()}
	if len(root.Manifest) > maxManifest {
		return out, fmt.Errorf("it has %d bytes, at most %d are read", len(root.Manifest), maxManifest)
	}
	if !root.MediaType.IsIndex() {
		return out, nil // no converted image
	}
	x, err := v1.ParseIndexManifest(bytes.NewReader(root.Manifest))
	if err != nil {
		return out, err
	}
	seen := make(map[string]bool)
	for _, m := range x.Manifests {
		if m.Platform == nil || !m.Platform.Equals(*registrystore.DataPlatform()) {
			continue
		}
		packs, err := l.packs(ctx, m.Digest)
		if err != nil {
			return out, err
		}
		for _, p := range packs {
			if !seen[p.Digest] {
				seen[p.Digest] = true
				out.Packs = append(out.Packs, p)
			}
		}
	}
	return out, nil
}

// packs returns the packs of a data manifest; none if it is another one.
func (l *packLister) packs(ctx context.Context, d v1.Hash) ([]registrystore.PackDescriptor, error) {
	l.mu.Lock()
	packs, ok := l.data[d]
	l.mu.Unlock()
	if ok {
		return packs, nil
	}
	got, err := l.puller.Get(ctx, l.ref.Context().Digest(d.String()))
	if err != nil {
		return nil, err
	}
	if len(got.Manifest) > maxManifest {
		return nil, fmt.Errorf("manifest %s has %d bytes, at most %d are read", d, len(got.Manifest), maxManifest)
	}
	if got.MediaType.IsImage() {
		m, err := v1.ParseManifest(bytes.NewReader(got.Manifest))
		if err != nil {
			return nil, err
		}
		for _, layer := range m.Layers {
			if layer.MediaType == registrystore.MediaTypePack {
				packs = append(packs, registrystore.PackDescriptor{Digest: layer.Digest.String(), Size: layer.Size})
			}
		}
	}
	l.mu.Lock()
	l.data[d] = packs
	l.mu.Unlock()
	return packs, nil
}
