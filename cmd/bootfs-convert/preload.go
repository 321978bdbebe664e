package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

type preloadFlags struct {
	readFlags
	cache string
	size  string
	start bool
}

func newPreload(c *common) *cobra.Command {
	f := &preloadFlags{readFlags: readFlags{common: c}}
	cmd := &cobra.Command{
		Use:   "preload REF... --cache DIR",
		Short: "Fetch the chunks of converted images into a node cache, before they run",
		Long: `Fetch all chunks of the converted images REF into the node cache DIR, so that
their containers need no store: with DIR mounted at /.bootfs/rootfs.castr they run
without a network, and BOOTFS_OFFLINE=1 has them use none. Of an image for several
platforms that of this machine counts, or those of --platform.

What is in the cache and good is not fetched, so that a preload that was
interrupted goes on where it was. What is damaged is replaced. In the end every
chunk was read from DIR and compared with its name, and is on the disk: or the
exit code is 6, and what is missing is listed. Where the cache may have no more than
--size, what else is in it makes room, used least lately first; chunks that do not fit
into nine tenths of that, which boots leave of a cache that has grown too large, are
refused before anything is fetched.

The chunks are looked for in --store, beside the image (in a registry, an OCI
layout, or an archive of bundle), and then where the image says.`,
		Example: `  bootfs-convert preload registry.example.com/app:1.0-lazy --cache /var/cache/bootfs
  bootfs-convert preload --start-set app.example.com/app:lazy app.example.com/db:lazy --cache /var/cache/bootfs
  bootfs-convert preload oci-archive:app.bundle --cache /var/cache/bootfs
  docker run --network none -e BOOTFS_OFFLINE=1 -v /var/cache/bootfs:/.bootfs/rootfs.castr …`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("got no arguments, want REF...; see %s --help", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPreload(cmd.Context(), f, args)
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.cache, "cache", "", "`DIR` of the node cache; it is made")
	cmd.Flags().StringVar(&f.size, "size", c.getenv(envCacheSize), "`SIZE` that the chunks of the cache may have, as in 20GiB (default: any, or $"+envCacheSize+")")
	cmd.Flags().BoolVar(&f.start, "start-set", false, "only the chunks that a program reads before it does anything")
	return cmd
}

// preloading is the result of preload.
type preloading struct {
	Cache    string           `json:"cache"`
	Complete bool             `json:"complete"`
	Images   []preloadedImage `json:"images"`
	Seconds  float64          `json:"seconds"`
}

// preloadedImage is the result for one platform of an image.
type preloadedImage struct {
	Image     string                   `json:"image"`
	Platform  string                   `json:"platform"`
	Chunks    int                      `json:"chunks"`    // that are wanted
	RootBytes int64                    `json:"rootBytes"` // of them, plain
	Had       converted.Amount         `json:"had"`       // that were in the cache
	Fetched   converted.Amount         `json:"fetched"`
	Missing   []converted.MissingChunk `json:"missing"`
	Seconds   float64                  `json:"seconds"`
}

func runPreload(ctx context.Context, f *preloadFlags, names []string) error {
	began := time.Now()
	if f.cache == "" {
		return usagef("--cache DIR is missing: the directory that containers get at /.bootfs/rootfs.castr")
	}
	limit, reserve, err := f.room()
	if err != nil {
		return err
	}
	d := f.display()
	defer d.close()
	wanted, done, err := f.wanted(ctx, d, names)
	defer done()
	if err != nil {
		return err
	}
	cache, err := f.openCache(ctx, d, wanted, limit, reserve)
	if err != nil {
		return err
	}
	defer cache.Close()
	result := preloading{Cache: f.cache, Complete: true}
	for _, w := range wanted {
		began := time.Now()
		progress, end := meter(d, w.image, phaseFetch, w.size)
		p, err := w.image.Preload(ctx, w.chunks, cache, progress)
		if err != nil {
			return &convert.Error{Part: convert.Source, Err: fmt.Errorf("%s: %w", w.name, err)}
		}
		end()
		for _, c := range w.chunks {
			cache.Adopt(c.ID) // if it is there, it is good
		}
		result.Complete = result.Complete && len(p.Missing) == 0
		result.Images = append(result.Images, preloadedImage{
			Image: w.name, Platform: w.image.Platform.String(), Chunks: len(w.chunks), RootBytes: w.size,
			Had: p.Had, Fetched: p.Fetched, Missing: p.Missing, Seconds: time.Since(began).Seconds(),
		})
	}
	if err := cmp.Or(cache.Flush(ctx), cache.sync()); err != nil && result.Complete {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	d.close()
	result.Seconds = time.Since(began).Seconds()
	if f.json {
		err = f.writeJSON(result)
	} else {
		_, err = io.WriteString(f.stdout, result.text())
	}
	if err != nil || result.Complete {
		return err
	}
	return result.incomplete(cache.failed())
}

// wanted is what one image wants in the cache.
type wanted struct {
	name   string
	image  *converted.Image
	chunks []index.Chunk
	size   int64 // of chunks, plain bytes
}

// wanted opens the images. done closes them, also after an error.
func (f *preloadFlags) wanted(ctx context.Context, d display, names []string) (all []wanted, done func(), err error) {
	var opened []*converted.Opened
	done = func() {
		for _, o := range opened {
			o.Close()
		}
	}
	for _, name := range names {
		o, err := f.open(ctx, name, d)
		if err != nil {
			return nil, done, err
		}
		opened = append(opened, o)
		images := o.Images
		if len(f.platforms) == 0 {
			one, err := f.one(o)
			if err != nil {
				return nil, done, err
			}
			images = []*converted.Image{one}
		}
		for _, img := range images {
			w := wanted{name: name, image: img}
			w.chunks, err = img.Chunks(f.start)
			if errors.Is(err, errors.ErrUnsupported) {
				return nil, done, usagef("--start-set: %s: %w", name, err)
			}
			if err != nil {
				return nil, done, &convert.Error{Part: convert.Source, Err: fmt.Errorf("%s: %w", name, err)}
			}
			for _, c := range w.chunks {
				w.size += int64(c.Size)
			}
			all = append(all, w)
		}
	}
	return all, done, nil
}

// preloadCache is the cache as preload writes to it: what the Fetcher only logs,
// as it can go on without a cache, is remembered.
type preloadCache struct {
	*nodecache.Cache
	mu    sync.Mutex // guards what follows
	err   error      // the first of a write
	flush error      // the first of the way to the disk
}

// Put implements chunkstore.Writer.
func (c *preloadCache) Put(ctx context.Context, id index.ID, frame []byte) error {
	return c.note(ctx, &c.err, c.Cache.Put(ctx, id, frame))
}

// Flush implements chunkstore.Flusher.
func (c *preloadCache) Flush(ctx context.Context) error {
	return c.note(ctx, &c.flush, c.Cache.Flush(ctx))
}

func (c *preloadCache) note(ctx context.Context, in *error, err error) error {
	if err != nil && ctx.Err() == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		*in = cmp.Or(*in, err)
	}
	return err
}

// failed returns why a chunk could not be written, nil if all could.
func (c *preloadCache) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.err, c.flush)
}

// sync makes what was written there last: the chunks are on the disk, but not
// yet all of their names.
func (c *preloadCache) sync() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flush != nil {
		return fmt.Errorf("bring what was fetched to the disk: %w", c.flush)
	}
	d, err := os.Open(c.String())
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("%s: bring it to the disk: %w", c, err)
	}
	return nil
}

// room returns what the cache may take, in bytes, 0 for any, and what it leaves free.
func (f *preloadFlags) room() (limit int64, reserve nodecache.Reserve, err error) {
	if f.size != "" {
		if limit, err = nodecache.ParseSize(f.size); err != nil {
			return 0, reserve, usagef("--size: %w", err)
		}
	}
	reserve = nodecache.DefaultReserve
	if s := f.getenv(envCacheReserve); s != "" {
		if reserve, err = nodecache.ParseReserve(s); err != nil {
			return 0, reserve, usagef("%s: %w", envCacheReserve, err)
		}
	}
	return limit, reserve, nil
}

// openCache opens the cache, refuses images that it could not keep, and makes
// room for the others.
func (f *preloadFlags) openCache(ctx context.Context, d display, all []wanted, limit int64, reserve nodecache.Reserve) (*preloadCache, error) {
	sizes, err := storedSizes(all)
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	var need int64
	for _, n := range sizes {
		need += n
	}
	// Boots that find a cache larger than it may be leave nine tenths.
	keeps := limit / 10 * 9
	if limit > 0 && need > keeps {
		return nil, &convert.Error{Part: convert.Destination, Err: fmt.Errorf("the chunks have %s on the disk, and of the %s that %s may have nine tenths last: nothing was fetched; allow it more with --size, or give it a part with --start-set",
			scratch.Bytes(need), scratch.Bytes(limit), f.cache)}
	}
	// Without the limit: a writer that others fill the cache beside lets chunks go.
	open, err := nodecache.Open(f.cache, nodecache.Options{Reserve: reserve, Log: f.logger(d)})
	if err != nil {
		return nil, &convert.Error{Part: convert.Destination, Err: err}
	}
	c := &preloadCache{Cache: open}
	if limit > 0 {
		if err := c.makeRoom(ctx, sizes, keeps); err != nil {
			return nil, &convert.Error{Part: convert.Destination, Err: errors.Join(err, c.Close())}
		}
	}
	return c, nil
}

// makeRoom removes what else is in the cache, used least lately first, until
// chunks of these sizes fit in without more than limit bytes in all.
func (c *preloadCache) makeRoom(ctx context.Context, sizes map[index.ID]int64, limit int64) error {
	for id, n := range sizes {
		err := c.Touch(ctx, id) // so that it stays
		if errors.Is(err, chunkstore.ErrNotFound) {
			limit -= n
		} else if err != nil {
			return err
		}
	}
	_, err := c.Prune(ctx, limit)
	return err
}

// diskBlock is what the size of a file is rounded up to, in bytes.
const diskBlock = 4096

// storedSizes returns what each of the chunks takes of the disk, 0 for those of
// loose stores, which tell it only when they are fetched.
func storedSizes(all []wanted) (map[index.ID]int64, error) {
	sizes := make(map[index.ID]int64)
	for _, w := range all {
		for _, c := range w.chunks {
			n, err := w.image.StoredBytes(c)
			if err != nil {
				return nil, err
			}
			sizes[c.ID] = max(sizes[c.ID], (n+diskBlock-1)/diskBlock*diskBlock)
		}
	}
	return sizes, nil
}

// missingLines is how many of the chunks that are missing are listed.
const missingLines = 10

// text is the result for people.
func (r *preloading) text() string {
	var b strings.Builder
	for _, p := range r.Images {
		for n, m := range p.Missing {
			if n == missingLines {
				fmt.Fprintf(&b, "… and %d more\n", len(p.Missing)-n)
				break
			}
			fmt.Fprintf(&b, "missing: chunk %s, %d bytes at %d: %s\n", m.Chunk, m.Size, m.Offset, strings.TrimPrefix(m.Reason, "chunk "+m.Chunk+": "))
		}
		fmt.Fprintf(&b, "%s, %s: %d of %d chunks are in %s: %d (%s) were there, %d (%s) fetched in %.1f s\n",
			p.Image, p.Platform, p.Had.Chunks+p.Fetched.Chunks, p.Chunks, r.Cache,
			p.Had.Chunks, scratch.Bytes(p.Had.Bytes), p.Fetched.Chunks, scratch.Bytes(p.Fetched.Bytes), p.Seconds)
	}
	return b.String()
}

// incomplete ends a preload that has listed what is missing.
func (r *preloading) incomplete(failed error) error {
	missing, chunks := 0, 0
	for _, p := range r.Images {
		missing, chunks = missing+len(p.Missing), chunks+p.Chunks
	}
	if failed != nil {
		return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("%d of %d chunks are missing in %s: %w", missing, chunks, r.Cache, failed)}
	}
	return fmt.Errorf("%w: %d of %d are not in %s; the same command again goes on from here", errMissing, missing, chunks, r.Cache)
}
