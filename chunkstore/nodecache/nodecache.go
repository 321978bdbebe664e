// Package nodecache keeps chunks in a directory that the containers of a node
// share. Its layout is casync's .castr, from which casync and desync read; what it
// needs besides are hidden files, at which casync's collector stops.
//
// Any number of processes may read, write and evict at the same time, and any
// of them may be killed at any point. Whoever shares the directory may also put
// anything there: that costs hits, and never more.
package nodecache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/index"
)

// Options say how a cache is kept.
type Options struct {
	// Limit is how many bytes of the disk the chunks may take; 0 is no limit.
	Limit int64
	// Reserve is the free space that the cache leaves on its file system; the
	// zero value is none.
	Reserve Reserve
	// Log takes what a person should know; nil discards it.
	Log *slog.Logger
}

// Cache is a node cache. It is safe for concurrent use.
type Cache struct {
	*local.Store
	dir     *os.File // as Store has it, to reach the hidden files
	limit   int64    // bytes, 0: none
	reserve Reserve
	log     *slog.Logger
	room    room
	claims  claims

	readOnly bool

	marked    atomic.Bool  // the marker is there, or cannot be written
	noSpace   atomic.Bool  // the disk has refused a chunk
	lockedOut atomic.Int64 // since when another process has the evictor's lock, in seconds of Unix; 0: it has not
	usesLost  atomic.Bool  // the times of chunks cannot be set
	uses      chan index.ID

	ctx    context.Context // of what goes on in the background
	cancel context.CancelFunc
}

var (
	_ chunkstore.Writer  = (*Cache)(nil)
	_ chunkstore.Lister  = (*Cache)(nil)
	_ chunkstore.Remover = (*Cache)(nil)
	_ chunkstore.Flusher = (*Cache)(nil)
	_ chunkstore.Claimer = (*Cache)(nil)
)

// Open returns the cache in dir, which it makes if it is missing. The error is a
// *VersionError when the cache was written in a format that is not known here:
// it is to be left alone.
func Open(dir string, o Options) (*Cache, error) {
	// Where nothing can be made, an existing directory will do.
	if err := os.MkdirAll(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("node cache: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("node cache: %w", err)
	}
	defer root.Close()
	held, err := root.Open(".")
	if err != nil {
		return nil, fmt.Errorf("node cache: %w", err)
	}
	c := &Cache{
		Store:   local.New(root, local.Batched()),
		dir:     held,
		limit:   o.Limit,
		reserve: o.Reserve,
		log:     o.Log,
		uses:    make(chan index.ID, usesKept),
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.readOnly = c.writable() != nil
	c.ctx, c.cancel = context.WithCancel(context.Background())
	marked, err := c.checkMarker()
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	c.marked.Store(marked)
	if !c.readOnly {
		c.room.background.Go(c.noteUses)
	}
	return c, nil
}

// Close ends what goes on in the background and releases the directory.
func (c *Cache) Close() error {
	c.cancel()
	c.room.background.Wait()
	c.closeLocks()
	return errors.Join(c.Store.Close(), c.dir.Close())
}

// Get appends the stored form of chunk id to dst.
func (c *Cache) Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error) {
	frame, err := c.Store.Get(ctx, id, dst)
	if err == nil {
		c.use(id)
	}
	return frame, err
}

// Put stores frame as chunk id, over whatever stands there: that is how damage
// heals. It fails with chunkstore.ErrFull where the cache may not grow, and
// starts an eviction before that.
func (c *Cache) Put(ctx context.Context, id index.ID, frame []byte) error {
	if c.readOnly {
		return fmt.Errorf("node cache %s: %w", c, errReadOnly)
	}
	n := (int64(len(frame)) + block - 1) / block * block
	if err := c.take(ctx, n); err != nil {
		return fmt.Errorf("node cache %s: %w", c, err)
	}
	if !c.marked.Swap(true) {
		// The cache works without it, and as well where it cannot be written.
		if err := c.writeMarker(); err != nil {
			c.log.Debug("cannot mark the cache", "cache", c.String(), "error", err)
		}
	}
	err := c.Store.Put(ctx, id, frame)
	c.wrote(n, err)
	return err
}

// open opens a hidden file of the cache, never another thing in its place.
func (c *Cache) open(name string, flags int) (*os.File, error) {
	for {
		// Without O_NONBLOCK, opening a FIFO would wait for its writer.
		fd, err := unix.Openat(int(c.dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o644)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: c.String() + "/" + name, Err: err}
		}
		f := os.NewFile(uintptr(fd), c.String()+"/"+name)
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
			err = fmt.Errorf("%s: got file type %#o, want a regular file", f.Name(), st.Mode&unix.S_IFMT)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
}
