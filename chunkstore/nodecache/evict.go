package nodecache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A cache of which more than highShare of the limit is taken is evicted from
// until no more than lowShare is: so an eviction is worth its walk, and writers
// go on meanwhile.
const (
	highShare = 0.95
	lowShare  = 0.90
)

// reserveSlack is how much more than the reserve an eviction leaves free, as a
// share of it.
const reserveSlack = 0.1

// prunePause is how often Prune looks whether another process still evicts.
const prunePause = 100 * time.Millisecond

// sweepEvery is how often what killed processes have left is looked for.
const sweepEvery = time.Hour

// Eviction is what one pass has done.
type Eviction struct {
	Skipped   bool  // another process is at it
	Before    int64 // bytes of the cache before the pass, about
	Chunks    int64 // chunks that were removed
	Bytes     int64 // of them
	Leftovers int64 // files that killed processes had left, and such as cannot be chunks
	LeftBytes int64 // of them
	Short     int64 // bytes that should have been removed and could not be
}

// Evict removes what was not used for the longest time if the cache has grown
// over its limit or into the reserve, and now and then what killed processes
// have left. Any process may call it at any time, while others read and write: a
// reader whose chunk goes has it, or misses it.
func (c *Cache) Evict(ctx context.Context) (Eviction, error) {
	return c.evict(ctx, func(held int64) int64 {
		var goal int64
		if c.limit > 0 && held > c.high() {
			goal = held - int64(lowShare*float64(c.limit))
		}
		return max(goal, c.lacks(), c.refused(held))
	}, false)
}

// Prune removes what was not used for the longest time until the chunks take no
// more than size bytes and the reserve is free, and all that killed processes
// have left. Where another process is evicting it waits for that, for a while.
func (c *Cache) Prune(ctx context.Context, size int64) (Eviction, error) {
	for {
		e, err := c.evict(ctx, func(held int64) int64 { return max(0, held-size, c.lacks()) }, true)
		if err != nil || !e.Skipped {
			return e, err
		}
		select {
		case <-time.After(prunePause):
		case <-ctx.Done():
			return e, ctx.Err()
		}
	}
}

// lacks returns how many bytes of the disk are to become free again, 0 while the
// reserve is.
func (c *Cache) lacks() int64 {
	disk := c.space()
	reserve := c.reserve.of(disk.size)
	if disk.free >= reserve {
		return 0
	}
	return reserve + int64(reserveSlack*float64(reserve)) - disk.free
}

// refused returns how much to remove after the disk has refused a chunk, though
// the reserve is free: it may lack inodes, or there is a quota.
func (c *Cache) refused(held int64) int64 {
	if !c.noSpace.Swap(false) {
		return 0
	}
	return max(1, int64((1-lowShare)*float64(held)))
}

// evict removes as many bytes as goal says, given those of the cache. With whole
// it samples nothing and sweeps.
func (c *Cache) evict(ctx context.Context, goal func(held int64) int64, whole bool) (Eviction, error) {
	if err := c.writable(); err != nil {
		return Eviction{}, fmt.Errorf("node cache %s: %w", c, err)
	}
	lock, held := c.lockEviction()
	if held {
		c.lockedOut.Store(0)
	} else if since := c.lockedOut.Load(); since == 0 || time.Since(time.Unix(since, 0)) < lockPatience {
		c.lockedOut.CompareAndSwap(0, time.Now().Unix())
		return Eviction{Skipped: true}, nil
	}
	if lock != nil {
		defer lock.Close()
	}
	written := c.written()
	s, err := c.look(ctx, whole)
	if err != nil {
		return Eviction{}, err
	}
	e := Eviction{Before: s.scaled(s.bytes)}
	if n := goal(e.Before); n > 0 {
		err = c.shrink(ctx, s, n, &e)
	}
	if err == nil && (whole || c.sweepDue()) {
		if err = c.sweep(ctx, s, &e); err == nil && lock != nil {
			now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
			err = unix.UtimesNanoAt(int(c.dir.Fd()), lockName, now, unix.AT_SYMLINK_NOFOLLOW)
		}
	}
	c.settle(e, written)
	if err != nil {
		return e, fmt.Errorf("node cache %s: evict: %w", c, err)
	}
	return e, nil
}

// shrink removes n bytes of what s has found: that which was used least lately.
func (c *Cache) shrink(ctx context.Context, s *survey, n int64, e *Eviction) error {
	slices.SortFunc(s.files, func(a, b file) int { return a.used.Compare(b.used) })
	left := func() int64 { return n - e.Bytes - e.LeftBytes }
	now := time.Now()
	if s.exact() {
		for _, f := range s.files {
			if left() <= 0 {
				break
			}
			if err := c.removeOld(ctx, f, now, e); err != nil {
				return err
			}
		}
		e.Short = max(0, left())
		return nil
	}
	// Others than those that were seen go by the same rule: what was last used
	// before the time before which the sample has as much as has to go. With a
	// little more than that, the last subdirectories need not be read.
	var sum int64
	then := now
	for _, f := range s.files {
		if sum += f.size; s.scaled(sum) > n+n/8 {
			then = f.used
			break
		}
	}
	for _, shard := range s.shards {
		if left() <= 0 {
			break
		}
		var failed error
		err := c.files(ctx, shard, maxNames, now, func(dir int, f file) {
			if failed == nil && left() > 0 && !f.used.After(then) {
				failed = c.removeAt(dir, f, now, e)
			}
		})
		if err = errors.Join(err, failed); err != nil {
			return err
		}
		c.removeShard(shard)
	}
	e.Short = max(0, left())
	return nil
}

// removeOld removes f unless it was used since it was seen.
func (c *Cache) removeOld(ctx context.Context, f file, now time.Time, e *Eviction) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	dir, err := unix.Openat(int(c.dir.Fd()), f.shard, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // somebody else has removed it, and what was in it
	}
	defer unix.Close(dir)
	again := file{shard: f.shard, name: f.name, kind: kindOf(f.shard, f.name)}
	if again.stat(dir, now) != nil || again.used.After(f.used) {
		return nil
	}
	if err := c.removeAt(dir, again, now, e); err != nil {
		return err
	}
	c.removeShard(f.shard)
	return nil
}

// removeAt removes a file and counts it. A file that is being written stays. An
// error says that nothing can be removed.
func (c *Cache) removeAt(dir int, f file, now time.Time, e *Eviction) error {
	if f.kind == isTemp && f.used.After(now.Add(-leftAfter)) {
		return nil
	}
	err := unix.Unlinkat(dir, f.name, 0)
	if err == unix.EISDIR {
		err = unix.Unlinkat(dir, f.name, unix.AT_REMOVEDIR)
	}
	switch {
	case errors.Is(err, unix.EROFS):
		return err
	case err != nil:
		return nil // removed by another, or not to be removed by anybody
	case f.kind == isChunk:
		e.Chunks, e.Bytes = e.Chunks+1, e.Bytes+f.size
	default:
		e.Leftovers, e.LeftBytes = e.Leftovers+1, e.LeftBytes+f.size
	}
	return nil
}

// removeShard removes a subdirectory if it is empty. A writer that has just made
// it makes it again.
func (c *Cache) removeShard(shard string) {
	unix.Unlinkat(int(c.dir.Fd()), shard, unix.AT_REMOVEDIR)
}

// sweepDue reports whether the last sweep is long ago.
func (c *Cache) sweepDue() bool {
	var st unix.Stat_t
	if err := unix.Fstatat(int(c.dir.Fd()), lockName, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false
	}
	age := time.Since(time.Unix(st.Mtim.Unix()))
	return age > sweepEvery || age < -sweepEvery
}

// sweep removes what killed processes have left in the subdirectories of s, and
// in the cache's own directory.
func (c *Cache) sweep(ctx context.Context, s *survey, e *Eviction) error {
	now := time.Now()
	old := func(dir int, f file) error {
		if f.kind == isNoUse || f.kind == isTemp || f.isStaged() && f.used.Before(now.Add(-leftAfter)) {
			return c.removeAt(dir, f, now, e)
		}
		return nil
	}
	for _, shard := range s.shards {
		var failed error
		err := c.names(ctx, shard, maxNames, func(dir int, name string) bool {
			f := file{shard: shard, name: name, kind: kindOf(shard, name)}
			if f.kind != foreign && f.stat(dir, now) == nil {
				failed = old(dir, f)
			}
			return failed == nil
		})
		if err = errors.Join(err, failed); err != nil {
			return err
		}
		c.removeShard(shard)
	}
	var failed error
	err := c.names(ctx, ".", maxNames, func(dir int, name string) bool {
		f := file{name: name, kind: kindOf("", name)}
		if f.kind == isTemp && f.stat(dir, now) == nil {
			failed = c.removeAt(dir, f, now, e)
		}
		return failed == nil
	})
	return errors.Join(err, failed)
}

// isStaged says that a chunk has still to come to disk.
func (f *file) isStaged() bool { return f.kind == isChunk && strings.HasPrefix(f.name, tempPrefix) }

// errReadOnly says that a cache cannot be written.
var errReadOnly = fmt.Errorf("the cache is read-only: %w", unix.EROFS)

// writable returns an error if the cache is on a mount that cannot be written.
func (c *Cache) writable() error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(c.dir.Fd()), &st); err == nil && st.Flags&unix.ST_RDONLY != 0 {
		return errReadOnly
	}
	return nil
}
