package convert

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	remote "github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// base is an image whose packs a new one may refer to.
type base struct {
	source transport.Source
	images []*baseImage
}

// baseImage is one platform of a base.
type baseImage struct {
	platform v1.Platform
	digest   string // of the boot manifest
	index    string // digest of the index
	own      string // what it records as its own base
	packs    []registrystore.PackDescriptor
	gone     []bool                              // by pack: it cannot be read
	chunks   map[index.ID]registrystore.Location // of its distinct chunks that lie in packs
	parsed   *index.Index
	locators *registrystore.Locators
	places   []place // where its packs may be, the likeliest first
}

// place is where packs are read from.
type place struct {
	blobs   registrystore.Blobs
	address string // as stores are named; "" for a layout
}

// openBase opens the base that the options name, or what the destination's
// name stands for until now; nil when there is none. The latter is nobody's
// request, so it fails nothing.
func (c *conversion) openBase(ctx context.Context, images []input) (*base, error) {
	o := c.o
	if o.Canonical || c.to.packs == nil {
		return nil, nil
	}
	ref := o.Destination
	if o.Base != nil {
		ref = *o.Base
	}
	t := o.Transport
	t.Platforms, t.TempDir, t.Progress = nil, o.TempDir, nil
	src, err := transport.Open(ctx, ref, t)
	if err != nil && o.Base != nil {
		return nil, in(Source, fmt.Errorf("base %w", err))
	}
	if err != nil {
		if ctx.Err() == nil && !isAbsent(err) {
			o.Log.Info("no packs are reused: " + err.Error())
		}
		return nil, ctx.Err()
	}
	b := &base{source: src}
	var reasons []error
	for _, img := range images {
		i, err := c.openBaseImage(ctx, src, img.Platform)
		switch {
		case err == nil:
			b.images = append(b.images, i)
		case ctx.Err() != nil:
			src.Close()
			return nil, ctx.Err()
		default:
			reasons = append(reasons, fmt.Errorf("base %s: %s: %w", ref, img.Platform, err))
		}
	}
	// Of several platforms, one may be new.
	if len(b.images) > 0 {
		for _, err := range reasons {
			o.Log.Info("no packs are reused: " + err.Error())
		}
		return b, nil
	}
	src.Close()
	if o.Base != nil {
		return nil, in(Source, errors.Join(reasons...))
	}
	for _, err := range reasons {
		if !errors.Is(err, assembly.ErrNotConverted) {
			o.Log.Info("no packs are reused: " + err.Error())
		}
	}
	return nil, nil
}

// isAbsent reports whether err says that there is no image of a name.
func isAbsent(err error) bool {
	var status *remote.Error
	return errors.As(err, &status) && status.StatusCode == http.StatusNotFound || errors.Is(err, fs.ErrNotExist)
}

// openBaseImage opens the image of src for platform p.
func (c *conversion) openBaseImage(ctx context.Context, src transport.Source, p v1.Platform) (*baseImage, error) {
	i := slices.IndexFunc(src.Images(), func(img transport.Image) bool {
		q := img.Platform
		return q.OS == p.OS && q.Architecture == p.Architecture && (q.Variant == p.Variant || q.Variant == "" || p.Variant == "")
	})
	if i < 0 {
		return nil, errors.New("it has no image for this platform")
	}
	img := src.Images()[i]
	contents, err := assembly.ReadIndex(ctx, img)
	if err != nil {
		return nil, err
	}
	conf := contents.Config
	switch {
	case conf.Profile != Profile:
		return nil, fmt.Errorf("it was cut with profile %.20q, this program cuts with %q", conf.Profile, Profile)
	case contents.Locators == nil:
		return nil, errors.New("its chunks are in a loose store, not in packs")
	}
	out := &baseImage{platform: p, digest: img.Digest, index: conf.IndexDigest, own: conf.Base}
	if err := out.read(contents); err != nil {
		return nil, err
	}
	if beside, err := src.Blobs(); err != nil {
		return nil, err
	} else if beside != nil {
		out.places = append(out.places, place{beside, src.StoreAddress()})
	}
	for _, address := range conf.Stores {
		if address == src.StoreAddress() || !strings.HasPrefix(address, "registry") {
			continue
		}
		blobs, err := stores.Packs(address, c.o.Access)
		if err != nil {
			return nil, err
		}
		out.places = append(out.places, place{blobs, address})
	}
	return out, nil
}

// read takes over index and locators, which anybody may have made: what an
// honest converter would not write is refused.
func (b *baseImage) read(c *assembly.Contents) error {
	x, err := index.Open(c.Index)
	if err != nil {
		return err
	}
	if err := x.Verify(); err != nil {
		return err
	}
	if x.Digest() != index.SHA256 {
		return errors.New("its chunks are not named by SHA-256")
	}
	l, err := registrystore.OpenLocators(c.Locators, x)
	if err != nil {
		return err
	}
	if err := l.Verify(); err != nil {
		return err
	}
	for i := range l.Packs() {
		p, err := l.Pack(i)
		if err != nil {
			return err
		}
		b.packs = append(b.packs, p)
	}
	b.parsed, b.locators = x, l
	b.gone = make([]bool, len(b.packs))
	b.chunks = make(map[index.ID]registrystore.Location, x.Len())
	used := make([]int64, len(b.packs))
	for pos := range x.Len() {
		chunk, err := x.At(pos)
		if err != nil {
			return err
		}
		at, err := l.At(pos)
		if err != nil {
			return err
		}
		if old, ok := b.chunks[chunk.ID]; ok && old != at {
			return fmt.Errorf("its locators have chunk %s at two places", chunk.ID)
		} else if ok || at.Length == 0 {
			continue
		}
		b.chunks[chunk.ID] = at
		if used[at.Pack] += int64(at.Length); used[at.Pack] > b.packs[at.Pack].Size {
			return fmt.Errorf("its locators put more into pack %s than that holds", b.packs[at.Pack].Digest)
		}
	}
	return nil
}

// find returns where chunk id lies, if its pack can be read as far as is known.
func (b *baseImage) find(id index.ID) (registrystore.Location, bool) {
	at, ok := b.chunks[id]
	return at, ok && !b.gone[at.Pack]
}

// has reports whether chunk id lies in a pack of b, which may be nil.
func (b *baseImage) has(id index.ID) bool {
	if b == nil {
		return false
	}
	_, ok := b.chunks[id]
	return ok
}

// of returns the base of a platform, nil if there is none.
func (b *base) of(p v1.Platform) *baseImage {
	if b == nil {
		return nil
	}
	i := slices.IndexFunc(b.images, func(i *baseImage) bool { return i.platform.Equals(p) })
	if i < 0 {
		return nil
	}
	return b.images[i]
}

func (b *base) close() {
	if b != nil {
		b.source.Close()
	}
}
