package nodecache

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

const (
	// useGrain is how exact the time of a chunk's last use is.
	useGrain = 10 * time.Minute
	// usesKept is how many chunks wait to have it set. More are forgotten: what
	// is used often comes again.
	usesKept = 1024
)

// use notes that chunk id was read. It does not wait.
func (c *Cache) use(id index.ID) {
	if c.readOnly || c.usesLost.Load() {
		return
	}
	select {
	case c.uses <- id:
	default:
	}
}

// noteUses makes the chunks that are read young, until the cache is closed.
func (c *Cache) noteUses() {
	for {
		select {
		case <-c.ctx.Done():
			return
		case id := <-c.uses:
			if !c.isOld(id) {
				continue
			}
			if err := c.Touch(c.ctx, id); err != nil && !errors.Is(err, chunkstore.ErrNotFound) {
				c.usesLost.Store(true) // the cache is read-only, or another's
				return
			}
		}
	}
}

// isOld reports whether chunk id was last used a while ago, as its file says.
func (c *Cache) isOld(id index.ID) bool {
	shard, name := chunkstore.Place(id)
	dir, err := unix.Openat(int(c.dir.Fd()), shard, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(dir)
	now := time.Now()
	f := file{shard: shard, name: name, kind: isChunk}
	return f.stat(dir, now) == nil && now.Sub(f.used) > useGrain
}
