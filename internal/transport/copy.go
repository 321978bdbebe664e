package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/registrystore"
)

// Edition is what Copy writes in the place of, or beside, what its source has.
// The zero value changes nothing.
type Edition struct {
	// Root is the index to write, nil for the source's.
	Root []byte
	// Own holds manifests and blobs that Root leads to and the source has not.
	Own map[v1.Hash][]byte
	// Packs lie elsewhere than the image; Data are the manifests that list
	// them, which get a tag of their own: PacksTag.
	Packs []registrystore.Pack
	Data  []PlatformImage
}

// Copied is what Copy did.
type Copied struct {
	Digest    string   // of what the destination's name now stands for
	Sent      int64    // bytes of blobs
	Reused    int64    // bytes of blobs that the destination, or its registry, had
	Signed    []string // digests of the signatures and the like that came along
	Manifests int      // of the image
}

// SourceError is a fault of what is copied, not of where it goes.
type SourceError struct{ Err error }

func (e *SourceError) Error() string { return e.Err.Error() }
func (e *SourceError) Unwrap() error { return e.Err }

// ofSource marks err, which may be nil.
func ofSource(err error) error {
	if err == nil {
		return nil
	}
	return &SourceError{err}
}

// sourceReader reads a blob of a source.
type sourceReader struct{ io.ReadCloser }

func (r sourceReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != io.EOF {
		err = ofSource(err)
	}
	return n, err
}

// Copy writes what src stands for to dst, byte for byte: digests stay, and so
// do the signatures and other manifests that refer to it or to a manifest in
// it. The name of the destination is set last. An error that wraps a
// [SourceError] is of src, or of where the packs lie.
func Copy(ctx context.Context, src Source, dst Destination, e Edition) (*Copied, error) {
	c, err := newCopier(src, dst)
	if err != nil {
		return nil, err
	}
	c.own = e.Own
	out := &Copied{}
	root := c.src.Root()
	if e.Root != nil {
		if root, err = describe(e.Root, string(types.OCIImageIndex)); err != nil {
			return nil, err
		}
		if c.own == nil {
			c.own = map[v1.Hash][]byte{}
		}
		c.own[root.Digest] = e.Root
	}
	image, err := c.walk(ctx, root)
	if err != nil {
		return nil, err
	}
	if err := c.putPacks(ctx, e.Packs); err != nil {
		return nil, err
	}
	if err := c.put(ctx, image); err != nil {
		return nil, err
	}
	if len(e.Data) > 0 {
		if err := c.tagPacks(ctx, e.Data); err != nil {
			return nil, err
		}
	}
	var subjects []v1.Hash
	for _, m := range image.manifests {
		subjects = append(subjects, m.desc.Digest)
	}
	if out.Signed, err = c.putAttached(ctx, subjects); err != nil {
		return nil, err
	}
	raw := image.manifests[len(image.manifests)-1].raw
	if err := c.dst.finish(ctx, root, raw); err != nil {
		return nil, err
	}
	out.Digest, out.Sent, out.Reused, out.Manifests = root.Digest.String(), c.sent.Load(), c.reused.Load(), len(image.manifests)
	return out, nil
}

// CopyAttached writes to dst what signs or describes manifests of src, under
// the names by which it belongs to them, and returns the digests of it. dst may
// still be open for its image.
func CopyAttached(ctx context.Context, src Source, dst Destination, subjects []v1.Hash) ([]string, error) {
	c, err := newCopier(src, dst)
	if err != nil {
		return nil, err
	}
	return c.putAttached(ctx, subjects)
}

// CopyManifests writes manifests of src, with all that they lead to, to dst,
// which may still be open for its image. They get no name there.
func CopyManifests(ctx context.Context, src Source, dst Destination, list []v1.Descriptor) error {
	c, err := newCopier(src, dst)
	if err != nil {
		return err
	}
	for _, d := range list {
		g, err := c.walk(ctx, d)
		if err != nil {
			return err
		}
		if err := c.put(ctx, g); err != nil {
			return err
		}
	}
	return nil
}

// Attached returns the digests of what signs or describes manifests of src.
func Attached(ctx context.Context, src Source, subjects []v1.Hash) ([]string, error) {
	from, ok := src.(Stored)
	if !ok {
		return nil, nil
	}
	c := &copier{src: from}
	all, err := c.findAttached(ctx, subjects)
	var out []string
	for _, s := range all {
		for _, a := range s.list {
			out = append(out, a.desc.Digest.String())
		}
	}
	return out, err
}

// Blobs returns the digests of the blobs that what src stands for leads to.
func Blobs(ctx context.Context, src Stored) (map[string]bool, error) {
	g, err := (&copier{src: src}).walk(ctx, src.Root())
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool)
	for _, b := range g.blobs {
		out[b.Digest.String()] = true
	}
	return out, nil
}

// OpenBlob reads a blob to its end, over connections that break, and ends with
// io.EOF only if its bytes were those of its digest. Its other errors are
// SourceErrors.
func OpenBlob(ctx context.Context, blobs registrystore.Blobs, digest string, size int64) (io.ReadCloser, error) {
	h, err := v1.NewHash(digest)
	if err != nil {
		return nil, err
	}
	d := v1.Descriptor{Digest: h, Size: size}
	r := newResumed(ctx, blobs, d, 0)
	v, err := verify(r, d)
	if err != nil {
		return nil, err
	}
	return &openedBlob{sourceReader{v}, r}, nil
}

// openedBlob is a blob that is verified if it is read from its beginning.
type openedBlob struct {
	io.ReadCloser
	from *resumed
}

// Seek makes byte off the first to be read, of an upload that goes on there:
// the registry checks the whole.
func (b *openedBlob) Seek(off int64, whence int) (int64, error) {
	if whence != io.SeekStart || b.from.off != 0 {
		return 0, errors.ErrUnsupported
	}
	b.from.off, b.ReadCloser = off, sourceReader{b.from}
	return off, nil
}

// PacksPrefix begins the tags that keep packs which lie in another repository
// than their image.
const PacksPrefix = "packs-"

// PacksTag is the tag that keeps packs which lie in another repository than
// their image: it is named by the manifests that list them.
func PacksTag(data []PlatformImage) (string, error) {
	var all strings.Builder
	for _, d := range data {
		h, err := d.Boot.Digest()
		if err != nil {
			return "", err
		}
		all.WriteString(h.String())
	}
	h, _, err := v1.SHA256(strings.NewReader(all.String()))
	return PacksPrefix + h.Hex[:min(len(h.Hex), 32)], err
}

// copier is one Copy.
type copier struct {
	src  Stored
	dst  receiver
	own  map[v1.Hash][]byte
	from string // repository of the same registry that has the blobs, or ""

	sent, reused atomic.Int64
	seen         int   // manifests, of all walks
	seenBytes    int64 // of them
}

func newCopier(src Source, dst Destination) (*copier, error) {
	from, ok := src.(Stored)
	to, ok2 := dst.(receiver)
	if !ok || !ok2 {
		return nil, errors.New("only a registry and OCI layouts keep manifests as they are")
	}
	c := &copier{src: from, dst: to}
	if s, ok := src.(*registrySource); ok {
		if d, ok := dst.(*registryDestination); ok {
			c.from = d.sibling(s.address())
		}
	}
	return c, nil
}

// stored is a manifest as it is.
type stored struct {
	desc v1.Descriptor
	raw  []byte
}

// graph is a manifest and all that it leads to.
type graph struct {
	manifests []stored // each behind those that it names
	blobs     []v1.Descriptor
	known     map[v1.Hash]bool // of both
}

// walk reads the manifests that root leads to.
func (c *copier) walk(ctx context.Context, root v1.Descriptor) (*graph, error) {
	g := &graph{known: make(map[v1.Hash]bool)}
	return g, ofSource(c.add(ctx, g, root, 0))
}

func (c *copier) add(ctx context.Context, g *graph, d v1.Descriptor, depth int) error {
	if g.known[d.Digest] {
		return nil
	}
	g.known[d.Digest] = true
	if c.seen++; c.seen > maxManifests || depth > 3 {
		return fmt.Errorf("there are more than %d manifests, or they nest deeper than 3", maxManifests)
	}
	raw, ok := c.own[d.Digest]
	if !ok {
		var err error
		if raw, err = c.src.Manifest(ctx, d); err != nil {
			return err
		}
	}
	if c.seenBytes += int64(len(raw)); c.seenBytes > maxManifestBytes {
		return fmt.Errorf("its manifests have more than %d bytes", maxManifestBytes)
	}
	var m struct {
		Manifests []v1.Descriptor `json:"manifests"`
		Config    *v1.Descriptor  `json:"config"`
		Layers    []v1.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	for _, child := range m.Manifests {
		if err := c.add(ctx, g, child, depth+1); err != nil {
			return err
		}
	}
	blobs := m.Layers
	if m.Config != nil {
		blobs = append(blobs, *m.Config)
	}
	for _, b := range blobs {
		if b.Size < 0 {
			return fmt.Errorf("manifest %s: blob %s claims %d bytes", d.Digest, b.Digest, b.Size)
		}
		// Layers that must not be distributed are where their URLs say.
		if g.known[b.Digest] || len(b.URLs) > 0 && !b.MediaType.IsDistributable() {
			continue
		}
		g.known[b.Digest] = true
		g.blobs = append(g.blobs, b)
	}
	g.manifests = append(g.manifests, stored{d, raw})
	return nil
}

// put stores what a graph consists of at the destination.
func (c *copier) put(ctx context.Context, g *graph) error {
	jobs, inner := errgroup.WithContext(ctx)
	jobs.SetLimit(jobsAt(c.dst))
	for _, d := range g.blobs {
		jobs.Go(func() error { return c.putBlob(inner, c.blob(d)) })
	}
	if err := jobs.Wait(); err != nil {
		return err
	}
	for _, m := range g.manifests {
		if err := c.putManifest(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// blob is one of the source, or of the edition's own.
func (c *copier) blob(d v1.Descriptor) blob {
	if b, ok := c.own[d.Digest]; ok {
		return bytesBlob(d.Digest, b)
	}
	b := blob{digest: d.Digest, size: d.Size, from: c.from}
	b.open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
		var rc io.ReadCloser
		var err error
		if off == 0 {
			rc, err = c.src.Blob(ctx, d)
		} else {
			// The registry checks the whole; what came before was checked by it
			// as little.
			rc, err = openFrom(ctx, c.src, d, off)
		}
		if err != nil {
			return nil, ofSource(err)
		}
		return sourceReader{rc}, nil
	}
	return b
}

// openFrom reads a blob from byte off on, unverified.
func openFrom(ctx context.Context, s Stored, d v1.Descriptor, off int64) (io.ReadCloser, error) {
	blobs, err := s.Blobs()
	if err != nil {
		return nil, err
	}
	return newResumed(ctx, blobs, d, off), nil
}

func (c *copier) putBlob(ctx context.Context, b blob) error {
	reused, err := c.dst.put(ctx, b)
	if err != nil {
		return fmt.Errorf("blob %s: %w", b.digest, err)
	}
	if reused {
		c.reused.Add(b.size)
	} else {
		c.sent.Add(b.size)
	}
	return nil
}

func (c *copier) putManifest(ctx context.Context, m stored) error {
	if ok, err := c.dst.hasManifest(ctx, m.desc); err != nil || ok {
		return err
	}
	if err := c.dst.putManifest(ctx, m.desc, m.raw); err != nil {
		return fmt.Errorf("manifest %s: %w", m.desc.Digest, err)
	}
	return nil
}

func (c *copier) putPacks(ctx context.Context, packs []registrystore.Pack) error {
	jobs, inner := errgroup.WithContext(ctx)
	jobs.SetLimit(jobsAt(c.dst))
	for _, p := range packs {
		jobs.Go(func() error {
			reused, err := c.dst.PutPack(inner, p)
			if err == nil {
				if reused {
					c.reused.Add(p.Size)
				} else {
					c.sent.Add(p.Size)
				}
			}
			return err
		})
	}
	return jobs.Wait()
}

// tagPacks keeps packs that no manifest of the image lists.
func (c *copier) tagPacks(ctx context.Context, data []PlatformImage) error {
	tag, err := PacksTag(data)
	if err != nil {
		return err
	}
	x, err := putImages(ctx, c.dst, data)
	if err != nil {
		return err
	}
	return c.dst.tag(ctx, tag, x.desc, x.raw)
}

// signed is a manifest with what is attached to it.
type signed struct {
	subject v1.Hash
	list    []attachment
	graphs  []*graph // of list
}

// findAttached reads what is attached to subjects, and to that, and so on.
func (c *copier) findAttached(ctx context.Context, subjects []v1.Hash) ([]signed, error) {
	var all []signed
	done := make(map[v1.Hash]bool)
	for depth := 0; len(subjects) > 0 && depth < 4; depth++ {
		found := make([]signed, len(subjects))
		jobs, inner := errgroup.WithContext(ctx)
		jobs.SetLimit(remoteJobs)
		for i, h := range subjects {
			if done[h] {
				continue
			}
			done[h] = true
			jobs.Go(func() (err error) {
				found[i].subject = h
				found[i].list, err = c.src.attached(inner, h)
				return err
			})
		}
		if err := jobs.Wait(); err != nil {
			return nil, fmt.Errorf("signatures: %w", ofSource(err))
		}
		subjects = nil
		for _, s := range found {
			var kept []attachment
			for _, a := range s.list {
				g, err := c.walk(ctx, a.desc)
				if err != nil {
					return nil, fmt.Errorf("signatures of %s: %w", s.subject, err)
				}
				root := g.manifests[len(g.manifests)-1]
				if a.tag == "" && subjectOf(root.raw) != s.subject {
					continue // somebody's list says so, the manifest does not
				}
				kept = append(kept, a)
				s.graphs = append(s.graphs, g)
				subjects = append(subjects, a.desc.Digest)
			}
			if s.list = kept; len(kept) > 0 {
				all = append(all, s)
			}
		}
	}
	return all, nil
}

// putAttached copies what is attached to subjects.
func (c *copier) putAttached(ctx context.Context, subjects []v1.Hash) ([]string, error) {
	all, err := c.findAttached(ctx, subjects)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, s := range all {
		var referrers []v1.Descriptor
		for i, a := range s.list {
			if err := c.put(ctx, s.graphs[i]); err != nil {
				return nil, fmt.Errorf("signatures of %s: %w", s.subject, err)
			}
			out = append(out, a.desc.Digest.String())
			if a.tag == "" {
				referrers = append(referrers, a.desc)
				continue
			}
			m := s.graphs[i].manifests
			if err := c.dst.tag(ctx, a.tag, a.desc, m[len(m)-1].raw); err != nil {
				return nil, fmt.Errorf("tag %s: %w", a.tag, err)
			}
		}
		if err := c.refer(ctx, s.subject, referrers); err != nil {
			return nil, fmt.Errorf("referrers of %s: %w", s.subject, err)
		}
	}
	return out, nil
}

// refer makes manifests that are there known as referrers of subject, where
// the destination does not see to that itself: by the fallback tag, which keeps
// those that it lists already.
func (c *copier) refer(ctx context.Context, subject v1.Hash, referrers []v1.Descriptor) error {
	if d, ok := c.dst.(*registryDestination); ok && (len(referrers) == 0 || d.up.tracksReferrers(ctx, subject)) || len(referrers) == 0 {
		return nil
	}
	tag := subjectTag(subject)
	old, err := c.dst.lookup(ctx, tag)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	list := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	if err == nil {
		if err := json.Unmarshal(old, &list); err != nil {
			return err
		}
	}
	changed := false
	for _, d := range referrers {
		if !slices.ContainsFunc(list.Manifests, func(have v1.Descriptor) bool { return have.Digest == d.Digest }) {
			list.Manifests = append(list.Manifests, d)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	raw, err := json.Marshal(list)
	if err != nil {
		return err
	}
	d, err := describe(raw, string(types.OCIImageIndex))
	if err != nil {
		return err
	}
	if err := c.dst.putManifest(ctx, d, raw); err != nil {
		return err
	}
	return c.dst.tag(ctx, tag, d, raw)
}
