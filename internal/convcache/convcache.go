// Package convcache keeps what a conversion has learned about the layers of an
// image, so that the next one of an image with the same layers need not fetch,
// unpack, cut and hash them.
//
// A [Record] is about one layer, and is found by the digest of the layer's
// plain tar (its DiffID): the entries that the tar lists, and the chunks of
// those units of the root image that have a file of the layer. [Record.Seal]
// makes of it the bytes that a [Place] holds, a
// directory or an artefact in a registry; [Open] reads them back, and refuses
// what is damaged or of another version. [Cache] asks several places and
// answers with what is good. An [Image] joins the records of an image's
// layers: it knows the chunks of a unit by the files in it.
//
// A record says what a layer lists without the layer being read, so whoever
// can write to a place decides what is converted. No fault of a place fails a
// conversion: it costs the time that the cache would have saved.
package convcache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Place is where records are kept.
type Place interface {
	// Get returns what is kept under name. Its error wraps [fs.ErrNotExist]
	// when there is nothing.
	Get(ctx context.Context, name string) ([]byte, error)
	// Put keeps records by name. A place that belongs to one image gives up
	// all others.
	Put(ctx context.Context, records map[string][]byte) error
	// String names the place for messages, without credentials.
	String() string
}

// Cache is the places of one conversion.
type Cache struct {
	From []Place // asked in order
	To   []Place
	Log  *slog.Logger

	kept  map[string]*Record // what To is going to hold, by DiffID
	limit int                // in the place of maxLoaded, in tests
}

const (
	// recordsAtOnce is how many records are fetched at a time.
	recordsAtOnce = 4
	// maxLoaded is what the records of one image may take in memory, in bytes.
	// What is beyond is read from the layers.
	maxLoaded = 160 << 20
)

// Load returns the records of the layers with these DiffIDs, as far as a place
// has them.
func (c *Cache) Load(ctx context.Context, diffIDs []string) map[string]*Record {
	ids := slices.Compact(slices.Sorted(slices.Values(diffIDs)))
	found := make([]*Record, len(ids))
	o := opener{left: cmp.Or(c.limit, maxLoaded)}
	var g errgroup.Group
	g.SetLimit(recordsAtOnce)
	for i, id := range ids {
		g.Go(func() error {
			found[i] = c.load(ctx, id, &o)
			return nil
		})
	}
	_ = g.Wait() // no record is no error
	out := make(map[string]*Record)
	for i, r := range found {
		if r != nil {
			out[ids[i]] = r
		}
	}
	return out
}

// opener opens records one after the other, as far as there is memory for them.
type opener struct {
	mu   sync.Mutex
	left int // guarded by mu; bytes
}

func (o *opener) open(diffID string, sealed []byte) (*Record, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r, err := Open(diffID, sealed)
	if err != nil {
		return nil, err
	}
	n := r.memory()
	if n > o.left {
		return nil, fmt.Errorf("it takes %d bytes of memory, and %d are left for the records of the image", n, o.left)
	}
	o.left -= n
	return r, nil
}

func (c *Cache) load(ctx context.Context, diffID string, o *opener) *Record {
	name, err := Name(diffID)
	if err != nil {
		return nil
	}
	for _, p := range c.From {
		sealed, err := p.Get(ctx, name)
		if err == nil {
			var r *Record
			if r, err = o.open(diffID, sealed); err == nil {
				return r
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			c.Log.Info(fmt.Sprintf("cache %s: %s is not used: %v", p, name, err))
		}
	}
	return nil
}

// Keep lets Save write the record of a layer. Platforms may share one: their
// units come together.
func (c *Cache) Keep(diffID string, r *Record) {
	if old := c.kept[diffID]; old != nil {
		for _, u := range old.Units {
			r.add(old.Layers, u)
		}
	}
	if c.kept == nil {
		c.kept = make(map[string]*Record)
	}
	c.kept[diffID] = r
}

// Save writes the records that were kept. A place that does not take them is a
// warning.
func (c *Cache) Save(ctx context.Context) {
	records := make(map[string][]byte)
	for id, r := range c.kept {
		name, err := Name(id)
		if err == nil {
			records[name], err = r.Seal(id)
		}
		if err != nil {
			delete(records, name)
			c.Log.Info(fmt.Sprintf("layer %s is not cached: %v", id, err))
		}
	}
	for _, p := range c.To {
		if err := p.Put(ctx, records); err != nil && ctx.Err() == nil {
			c.Log.Warn(fmt.Sprintf("cache %s was not written: %v", p, err))
		}
	}
}
