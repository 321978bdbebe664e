package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convcache"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/registrystore"
)

// CachePlace is where a conversion cache is kept. One of the fields is set.
type CachePlace struct {
	Dir    string // a directory
	Ref    string // an artefact in a registry, by the name of an image
	Inline bool   // an artefact beside the destination, under its tag and CacheSuffix
}

// CacheSuffix is what the tag of an inline cache has behind the image's.
const CacheSuffix = "-bootfs-cache"

// The artefact that keeps a conversion cache in a registry.
var cacheArtifact = transport.ArtifactKind{
	Type:      "application/vnd.bootfs.cache.v1",
	MediaType: "application/vnd.bootfs.cache.layer.v1",
	MaxFile:   convcache.MaxSealed,
}

// openCache opens the places that the options name; nil when there are none.
func (c *conversion) openCache() (*convcache.Cache, func(), error) {
	var artifacts []*transport.Artifact
	done := func() {
		for _, a := range artifacts {
			a.Close()
		}
	}
	open := func(flag string, places []CachePlace) (out []convcache.Place, err error) {
		for _, p := range places {
			ref := p.Ref
			switch {
			case p.Dir != "":
				out = append(out, convcache.Dir(p.Dir))
				continue
			case p.Inline:
				if ref, err = c.o.Destination.WithTagSuffix(CacheSuffix); err != nil {
					return nil, &Error{Usage, fmt.Errorf("%s type=inline: %w", flag, err)}
				}
			}
			a, err := transport.NewArtifact(ref, cacheArtifact, c.o.Transport)
			if err != nil {
				return nil, &Error{Usage, fmt.Errorf("%s %s: %w", flag, ref, err)}
			}
			artifacts = append(artifacts, a)
			out = append(out, a)
		}
		return out, nil
	}
	from, err := open("--cache-from", c.o.CacheFrom)
	if err != nil {
		return nil, done, err
	}
	to, err := open("--cache-to", c.o.CacheTo)
	if err != nil || len(from)+len(to) == 0 {
		return nil, done, err
	}
	return &convcache.Cache{From: from, To: to, Log: c.o.Log}, done, nil
}

// source is the tree of a source image, and what a cache knows of it.
type source struct {
	root   *tree.Tree
	report PlatformReport // its figures on layers
	image  *convcache.Image
	lazy   []*lazyLayer // by layer; nil where it was read
	close  func()       // the tree's contents cannot be read any more

	entries map[string][]byte // records of the layers that were read, by DiffID
	chunks  *chunkReader      // of earlier conversions

	mu  sync.Mutex
	err error // guarded by mu; the first with which a file could not be read
}

// readTree reads the layers of img and merges them. Layers that the cache knows
// are left until one of their files is read that no chunk of an earlier
// conversion holds; b and the store are where such chunks are. The source is to
// be closed where there is one, with an error too.
func (c *conversion) readTree(ctx context.Context, img transport.Image, b *baseImage, useCache bool) (_ *source, err error) {
	s := &source{lazy: make([]*lazyLayer, len(img.Layers)), entries: make(map[string][]byte)}
	layers := make([]*layer.Layer, len(img.Layers))
	records := make(map[string]*convcache.Record)
	ids := make([]string, len(img.Layers))
	for i, l := range img.Layers {
		ids[i] = l.DiffID
	}
	if useCache && c.cache != nil {
		records = c.cache.Load(ctx, ids)
		s.chunks = c.earlierChunks(b)
		if s.chunks != nil {
			s.know(ctx, c, img.Layers, layers, records)
		}
	}
	s.image = convcache.NewImage(ids, records)

	var blobs []layer.Blob
	total := int64(0)
	for i, l := range img.Layers {
		s.report.SourceBytes += max(0, l.Size)
		if layers[i] == nil {
			blobs = append(blobs, l)
			total += max(0, l.Size)
		}
	}
	if len(c.o.CacheFrom) > 0 {
		if _, err := CheckSpace(c.o.TempDir, blobs, 0, c.o.Log); err != nil {
			return nil, err
		}
	}
	progress := c.meter(img.Platform.String(), PhaseLayers, total)
	fresh, closeFresh, err := ReadLayers(ctx, blobs, c.o.TempDir, progress.add)
	if err != nil {
		return nil, err
	}
	s.close = func() {
		closeFresh()
		s.chunks.close()
		for _, l := range s.lazy {
			l.close()
		}
	}
	progress.end()
	for i := range layers {
		if layers[i] == nil {
			layers[i], fresh = fresh[0], fresh[1:]
			if c.cache != nil && len(c.cache.To) > 0 {
				s.entries[ids[i]] = layers[i].Record()
			}
		}
	}
	s.root, err = layer.Merge(layers)
	return s, in(Source, err)
}

// know makes layers of records, and takes those out that cannot be.
func (s *source) know(ctx context.Context, c *conversion, blobs []layer.Blob, layers []*layer.Layer, records map[string]*convcache.Record) {
	for i, b := range blobs {
		r := records[b.DiffID]
		if r == nil {
			continue
		}
		lazy := &lazyLayer{ctx: ctx, c: c, blob: b, record: r.Entries}
		var err error
		layers[i], err = layer.FromRecord(b.Name, r.Entries, layer.Limits{}, func(entry int, n *tree.Inode) io.ReaderAt {
			return &lazyFile{source: s, layer: lazy, number: int32(i), entry: int32(entry), inode: n}
		})
		if err != nil {
			c.o.Log.Info(fmt.Sprintf("cache: %v", err))
			delete(records, b.DiffID)
			layers[i] = nil
			continue
		}
		s.lazy[i] = lazy
	}
}

// finish completes the figures on layers. It fails if a file could not be read:
// not all who read files tell.
func (s *source) finish(r *PlatformReport) error {
	r.SourceBytes = s.report.SourceBytes
	for _, l := range s.lazy {
		if l != nil && !l.opened() {
			r.CachedLayers++
			r.CachedBytes += max(0, l.blob.Size)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return in(Source, s.err)
}

// cached reports whether a layer is known without having been read.
func (s *source) cached() bool {
	return slices.ContainsFunc(s.lazy, func(l *lazyLayer) bool { return l != nil })
}

// units are the units of plan, with the chunks of those that are known. s may
// be nil.
func (s *source) units(plan *rootimage.Plan) iter.Seq[unit] {
	if s == nil || !s.cached() {
		return unitsOf(plan)
	}
	return func(yield func(unit) bool) {
		for u := range plan.Units() {
			out := unit{Offset: u.Offset, Size: u.Size, Open: func() io.Reader { return plan.Open(u) }}
			out.Chunks = s.image.Chunks(filesOf(plan, u))
			if !yield(out) {
				return
			}
		}
	}
}

// filesOf are the files of a unit as a cache names them.
func filesOf(plan *rootimage.Plan, u rootimage.Unit) []convcache.File {
	var files []convcache.File
	for n := range plan.Files(u) {
		files = append(files, convcache.File{Layer: n.Content.Layer, Entry: n.Content.Entry, Blocks: uint32(erofs.Blocks(n))})
	}
	return files
}

// fetch opens the layers whose files have a byte in spans, several at a time.
func (s *source) fetch(plan *rootimage.Plan, spans []span) {
	wanted := make([]bool, len(s.lazy))
	for u := range plan.Units() {
		if overlaps(spans, u.Offset, u.Size) {
			for n := range plan.Files(u) {
				wanted[n.Content.Layer] = true
			}
		}
	}
	var g errgroup.Group
	g.SetLimit(layersAtOnce)
	for i, l := range s.lazy {
		if l != nil && wanted[i] {
			g.Go(func() error {
				_, _ = l.open(errNoChunk) // fails again where a file is read
				return nil
			})
		}
	}
	_ = g.Wait()
}

var errNoChunk = errors.New("its chunks are not all at the destination")

// keep gives the cache what is known of the image now.
func (c *conversion) keep(s *source, plan *rootimage.Plan, ch *chunked) error {
	if c.cache == nil || len(c.cache.To) == 0 {
		return nil
	}
	x, err := index.Open(ch.index)
	if err != nil {
		return err
	}
	var units []convcache.Unit
	pos := 0
	for u := range plan.Units() {
		out := convcache.Unit{Files: filesOf(plan, u)}
		for left := u.Size; left > 0; pos++ {
			chunk, err := x.At(pos)
			if err != nil {
				return err
			}
			out.Chunks = append(out.Chunks, convcache.Chunk{
				ID: chunk.ID, Size: chunk.Size, Stored: ch.locations[pos].Length, Zero: isZero(chunk),
			})
			left -= int64(chunk.Size)
		}
		units = append(units, out)
	}
	for id, r := range s.image.Records(s.entries, units) {
		c.cache.Keep(id, r)
	}
	return nil
}

// zeroIDs are the names of chunks of zeros, by size.
var zeroIDs sync.Map

func isZero(c index.Chunk) bool {
	id, ok := zeroIDs.Load(c.Size)
	if !ok {
		id, _ = zeroIDs.LoadOrStore(c.Size, index.SHA256.Sum(make([]byte, c.Size)))
	}
	return id == c.ID
}

// lazyLayer is a layer that a cache knows. Its blob is read when it must be.
type lazyLayer struct {
	ctx    context.Context // of the conversion
	c      *conversion
	blob   layer.Blob
	record []byte

	once  sync.Once
	layer *layer.Layer
	err   error
	done  bool
}

// open reads the layer, once. why is told.
func (l *lazyLayer) open(why error) (*layer.Layer, error) {
	l.once.Do(func() {
		l.c.o.Log.Info(fmt.Sprintf("layer %s is read after all: %v", l.blob.Name, why))
		l.done = true
		l.layer, l.err = layer.Read(l.ctx, l.blob, layer.Options{TempDir: l.c.o.TempDir})
		if l.err == nil && !bytes.Equal(l.layer.Record(), l.record) {
			l.err = fmt.Errorf("layer %s: the cache's record is not of this layer", l.blob.Name)
		}
		l.err = scratch.Explain(l.c.o.TempDir, l.err)
	})
	return l.layer, l.err
}

// opened reports whether the blob was read. Nothing may read the layer's files
// any more.
func (l *lazyLayer) opened() bool { return l.done }

func (l *lazyLayer) close() {
	if l != nil && l.layer != nil {
		l.layer.Close()
	}
}

// lazyFile reads a file of a lazyLayer, at its own offsets.
type lazyFile struct {
	source *source
	layer  *lazyLayer
	number int32 // of the layer
	entry  int32
	inode  *tree.Inode
}

func (f *lazyFile) ReadAt(p []byte, off int64) (int, error) {
	chunks, at := f.source.image.Find(f.number, f.entry)
	err := errNoChunk
	if place, ok := blockOffset(f.inode, off); ok && chunks != nil {
		if err = f.source.chunks.read(f.layer.ctx, chunks, p, at+place); err == nil {
			return len(p), nil
		}
	}
	l, err := f.layer.open(err)
	if err == nil {
		if file := l.File(int(f.entry)); file != nil {
			return file.ReadAt(p, off)
		}
		err = errors.New("the cache's record is not of this layer")
	}
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	if f.source.err == nil {
		f.source.err = err
	}
	return 0, err
}

// blockOffset says where byte off of a file stands behind the first block of
// the file in the root image; false in a hole.
func blockOffset(n *tree.Inode, off int64) (int64, bool) {
	var at int64
	for _, s := range erofs.Segments(n) {
		if off < s.Offset {
			return 0, false
		}
		if off < s.Offset+s.Size {
			return at + off - s.Offset, true
		}
		at += (s.Size + erofs.BlockSize - 1) &^ (erofs.BlockSize - 1)
	}
	return 0, false
}

// chunkReader reads the chunks of earlier conversions.
type chunkReader struct {
	fetcher *chunkstore.Fetcher

	mu     sync.Mutex
	recent []plainChunk // guarded by mu; the latest last
	next   index.ID     // guarded by mu; the chunk behind the last that was fetched
	broken error        // guarded by mu; why nothing is fetched any more
}

type plainChunk struct {
	id    index.ID
	plain []byte
}

const (
	recentChunks = 48
	// aheadChunks are fetched together where a file is read from front to back.
	aheadChunks  = 16
	chunkTimeout = 30 * time.Second
)

// earlierChunks returns a reader of the chunks that b or the store has; nil if
// there are none.
func (c *conversion) earlierChunks(b *baseImage) *chunkReader {
	var list []chunkstore.Store
	switch {
	case c.to.loose != nil:
		list = []chunkstore.Store{c.to.loose}
	case b != nil:
		for _, p := range b.places {
			list = append(list, registrystore.NewStore(p.blobs, b.locators, b.parsed))
		}
	default:
		return nil
	}
	return &chunkReader{fetcher: chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: list, Log: c.o.Log})}
}

func (r *chunkReader) close() {
	if r != nil {
		r.fetcher.Close()
	}
}

// read fills p with the bytes from off on of chunks, which stand behind one
// another.
func (r *chunkReader) read(ctx context.Context, chunks []convcache.Chunk, p []byte, off int64) error {
	for k, c := range chunks {
		if off >= int64(c.Size) {
			off -= int64(c.Size)
			continue
		}
		if len(p) == 0 {
			break
		}
		n := min(len(p), c.Size-int(off))
		if c.Zero {
			clear(p[:n])
		} else {
			plain, err := r.chunk(ctx, chunks[k:])
			if err != nil {
				return err
			}
			copy(p[:n], plain[off:])
		}
		p, off = p[n:], 0
	}
	if len(p) > 0 {
		return io.ErrUnexpectedEOF // a record that knows less of the file than the layer
	}
	return nil
}

// chunk returns the bytes of the first of chunks. Where reads follow one
// another, it fetches some of the others too.
func (r *chunkReader) chunk(ctx context.Context, chunks []convcache.Chunk) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	want := chunks[0].ID
	if i := slices.IndexFunc(r.recent, func(c plainChunk) bool { return c.id == want }); i >= 0 {
		c := r.recent[i]
		r.recent = append(slices.Delete(r.recent, i, i+1), c)
		return c.plain, nil
	}
	if r.broken != nil {
		return nil, r.broken
	}
	count := 1
	if want == r.next {
		count = min(aheadChunks, len(chunks))
	}
	var list []index.Chunk
	for _, c := range chunks[:count] {
		if !c.Zero {
			list = append(list, index.Chunk{ID: c.ID, Size: c.Size})
		}
	}
	limited, cancel := context.WithTimeout(ctx, chunkTimeout)
	defer cancel()
	var got []byte
	err := r.fetcher.FetchBatch(limited, list, func(i int, plain []byte) error {
		b := bytes.Clone(plain)
		if i == 0 {
			got = b
		}
		r.recent = append(r.recent, plainChunk{list[i].ID, b})
		return nil
	})
	r.recent = slices.Delete(r.recent, 0, max(0, len(r.recent)-recentChunks))
	if count < len(chunks) {
		r.next = chunks[count].ID
	}
	if got != nil {
		return got, nil // what was fetched ahead is not needed yet
	}
	var corrupt *chunkstore.CorruptError
	if err != nil && !errors.Is(err, chunkstore.ErrNotFound) && !errors.As(err, &corrupt) {
		r.broken = err // one that does not answer costs its timeout once
	}
	return nil, err
}
