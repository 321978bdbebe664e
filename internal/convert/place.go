package convert

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"
	"sync"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// chunkPlace is where the chunks of a conversion go: packs beside the image,
// packs in another repository, or single files in a directory or on a web
// server.
type chunkPlace struct {
	c       *conversion
	address string                // as recorded in the image; "" beside the image in a layout
	hostKey string                // of the server at address, as recorded; "" if it is not reached over SSH
	packs   transport.Destination // nil for single chunks
	own     bool                  // packs is not the image's destination
	loose   chunkstore.Writer     // nil for packs
}

// openChunkPlace prepares the store that the options ask for.
func openChunkPlace(ctx context.Context, c *conversion) (*chunkPlace, error) {
	store := c.o.Store
	p := &chunkPlace{c: c}
	var err error
	switch {
	case store == "":
		p.packs, p.address = c.dest, c.dest.StoreAddress()
	case strings.HasPrefix(store, "oci:"):
		return nil, errStore(store)
	case stores.Loose(store):
		if p.loose, err = openLoose(store, c.o.Access); err != nil {
			return nil, err
		}
		p.address = p.loose.String() // without credentials
		if s, ok := p.loose.(interface {
			HostKey(context.Context) (string, error)
		}); ok {
			// It is asked before anything is converted: who may not write there
			// learns it now.
			if p.hostKey, err = s.HostKey(ctx); err != nil {
				p.close()
				return nil, err
			}
		}
	default:
		if p.packs, err = p.open(ctx, "packs"); err != nil {
			return nil, err
		}
		p.address, p.own = p.packs.StoreAddress(), true
	}
	if host := loopbackHost(p.address); host != "" {
		c.o.Log.Warn("containers will look for their chunks at " + host + ", which inside a container is the container itself: " +
			"use a name that they can reach, or run them with --network host")
	}
	return p, nil
}

// openLoose opens a store of single chunks.
func openLoose(store string, a stores.Access) (chunkstore.Writer, error) {
	s, err := stores.Create(store, a)
	if err != nil && stores.Remote(store) { // nothing was tried yet but to understand it
		return nil, &Error{Usage, err}
	}
	return s, err
}

// open opens the repository of packs that the options name. What keeps packs
// in it is an image of their own: registries delete what no tag leads to.
func (p *chunkPlace) open(ctx context.Context, tag string) (transport.Destination, error) {
	store := p.c.o.Store
	if _, err := stores.Packs(store, stores.Access{}); err != nil { // says it without what may be a password
		return nil, &Error{Usage, err}
	}
	scheme, repo, _ := strings.Cut(store, "://")
	o := p.c.transport(p.c.upload)
	switch scheme {
	case "registry":
	case "registry+http":
		host, _, _ := strings.Cut(repo, "/")
		o.Insecure = append(o.Insecure[:len(o.Insecure):len(o.Insecure)], host)
	default:
		return nil, errStore(store)
	}
	ref, err := transport.Parse("docker://"+repo+":"+tag, "")
	if err != nil {
		return nil, &Error{Usage, fmt.Errorf("store %q: %w", store, err)}
	}
	return transport.OpenDestination(ctx, ref, o)
}

// errStore refuses a store of no kind that chunks can be written to.
func errStore(store string) error {
	return &Error{Usage, fmt.Errorf("store %q: want %s", store, stores.WrittenForms())}
}

// loopbackHost returns the host of a store's address if it names the machine
// itself, else "".
func loopbackHost(address string) string {
	u, err := url.Parse(address)
	if err != nil || !httpio.IsLoopback(u.Host) {
		return ""
	}
	return u.Host
}

// chunks puts the chunks of plan, which is of s, away, on top of what b has
// where it is not nil. list is nil for single chunks.
func (p *chunkPlace) chunks(ctx context.Context, plan *rootimage.Plan, start startSet, s *source, b *baseImage, platform string) (ch *chunked, list []registrystore.Pack, err error) {
	switch {
	case b != nil:
		if ch, list, err = p.chunksOn(ctx, b, plan, start, s, platform); err != nil {
			return nil, nil, err
		}
		ch.report.count(list)
		return ch, list, nil
	case p.loose != nil && s.cached():
		ch, err = p.looseOn(ctx, plan, s, platform)
		return ch, nil, err
	}
	progress := p.c.meter(platform, PhaseChunks, plan.Size())
	if p.loose != nil {
		l := &loose{store: p.loose}
		if ch, err = chunkImage(ctx, plan, startSet{}, l, progress.add); err != nil {
			return nil, nil, in(Destination, err)
		}
		ch.report.NewBytes, ch.report.ReusedBytes = l.written.Load(), l.reused.Load()
	} else {
		var r PlatformReport
		list, err = p.store(ctx, nil, &r, func(s *packs) (err error) {
			ch, err = chunkImage(ctx, plan, start, s, progress.add)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		to := &ch.report
		to.NewBytes, to.ReusedBytes = r.NewBytes, r.ReusedBytes
		to.NewChunkBytes, to.StartPackBytes = r.NewChunkBytes, r.StartPackBytes
		to.count(list)
	}
	progress.end()
	return ch, list, nil
}

// looseOn stores what a store of single chunks lacks of the root image of plan,
// most of whose chunks are known.
func (p *chunkPlace) looseOn(ctx context.Context, plan *rootimage.Plan, s *source, platform string) (*chunked, error) {
	clock := newClock()
	naming := p.c.meter(platform, PhaseNames, plan.Size())
	n, err := nameImage(ctx, plan, startSet{}, s, true, naming.add)
	if err != nil {
		return nil, err
	}
	naming.end()
	out := &chunked{index: n.index, report: n.report}
	out.report.NameSeconds = clock.lap()

	l := &loose{store: p.loose}
	rest := l.missing(ctx, n.distinct)
	var lost []span
	total := int64(0)
	for _, c := range rest {
		if total += int64(c.Size); c.cached {
			lost = append(lost, span{c.Offset, int64(c.Size)})
		}
	}
	s.fetch(plan, lost)
	at := make(map[index.ID]registrystore.Location)
	for _, c := range n.distinct {
		at[c.ID] = registrystore.Location{Length: c.stored}
	}
	out.report.StoredBytes = l.reused.Load()
	chunking := p.c.meter(platform, PhaseChunks, total)
	e := &encoder{plan: plan, sink: l, at: at, report: &out.report, progress: chunking.add}
	if err := e.run(ctx, rest); err != nil {
		return nil, err
	}
	chunking.end()
	for _, number := range n.first {
		out.locations = append(out.locations, at[n.distinct[number].ID])
	}
	out.report.NewBytes, out.report.ReusedBytes = l.written.Load(), l.reused.Load()
	return out, nil
}

// count takes the packs of an image, which are list, into account.
func (r *PlatformReport) count(list []registrystore.Pack) {
	r.Packs = len(list)
	r.UnusedBytes = -r.StoredBytes
	for _, p := range list {
		r.UnusedBytes += p.Size
	}
}

// store makes packs of the chunks that fill adds, and counts their bytes in r
// as far as the place did not have them. b may be nil.
func (p *chunkPlace) store(ctx context.Context, b *baseImage, r *PlatformReport, fill func(*packs) error) ([]registrystore.Pack, error) {
	var mu sync.Mutex
	there := make(map[string]bool) // guarded by mu; by digest of the pack
	w := registrystore.NewPackWriter(ctx, p.c.o.TempDir, func(ctx context.Context, pack registrystore.Pack) error {
		was, err := p.packs.PutPack(ctx, pack)
		if err != nil {
			return in(Destination, err)
		}
		mu.Lock()
		defer mu.Unlock()
		there[pack.Digest] = was
		return nil
	})
	s := &packs{w: w, base: b}
	err := fill(s)
	descriptors, errClose := w.Close()
	if err == nil {
		err = errClose
	}
	if err != nil {
		return nil, err
	}
	list := make([]registrystore.Pack, len(descriptors))
	for i, d := range descriptors {
		list[i] = registrystore.Pack{PackDescriptor: d} // at the destination: no Open
		if there[d.Digest] {
			r.ReusedBytes += d.Size
			continue
		}
		r.NewBytes += d.Size
		r.NewChunkBytes += s.written[i].added
		r.StartPackBytes += s.written[i].start
		r.RewrittenBytes += s.written[i].again
	}
	return list, nil
}

// commit makes the chunks of images last.
func (p *chunkPlace) commit(ctx context.Context, images []transport.PlatformImage) error {
	if !p.own {
		return nil
	}
	data := make([]transport.PlatformImage, len(images))
	for i := range images {
		data[i] = transport.PlatformImage{Platform: *registrystore.DataPlatform(), Boot: images[i].Data}
		images[i].Data = nil
	}
	// The name follows the content, so that no other image's packs lose theirs.
	tag, err := transport.PacksTag(data)
	if err != nil {
		return err
	}
	d, err := p.open(ctx, tag)
	if err != nil {
		return err
	}
	defer d.Close()
	_, err = d.Commit(ctx, data)
	return err
}

func (p *chunkPlace) close() {
	if p.own {
		p.packs.Close()
	}
	if c, ok := p.loose.(io.Closer); ok {
		c.Close()
	}
}
