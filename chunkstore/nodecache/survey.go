package nodecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// A survey looks at subdirectories in random order until it has seen so many
// chunks. Chunks are named by hashes, so it is a fair sample of them: what it
// finds holds for the whole cache to about one percent.
const (
	sampleChunks = 8192
	sampleShards = 256 // at least, so that a few strange ones do not decide
)

// What others may have put into a directory is looked at so far.
const (
	maxNames      = 1 << 20 // of the cache's directory; it should have 65,536
	maxShardNames = 4096    // of a subdirectory, by a survey that samples; a cache of a million chunks has 15 there
	namesAtOnce   = 512
)

// leftAfter is when a file that is being written is taken for one that a killed
// process has left.
const leftAfter = time.Hour

// kind is what a file in a subdirectory is.
type kind int

const (
	foreign kind = iota // none of ours
	isChunk             // a chunk, or one that will be
	isTemp              // it is being written, or was left so
	isNoUse             // it stands in a chunk's place and cannot be one
)

// file is one in a subdirectory of the cache.
type file struct {
	shard string
	name  string
	kind  kind
	size  int64     // bytes of the disk
	used  time.Time // the last time; zero for what is of no use
}

// kindOf tells from a name what a file may be.
func kindOf(shard, name string) kind {
	digits, temp := strings.CutPrefix(name, tempPrefix)
	digits = strings.TrimSuffix(digits, chunkstore.Suffix)
	id, err := index.ParseID(digits)
	switch {
	case err == nil && digits == id.String() && strings.HasPrefix(digits, shard):
		return isChunk // also one that has still to come to disk
	case temp:
		return isTemp
	}
	return foreign
}

// stat completes f, which has its names.
func (f *file) stat(dir int, now time.Time) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, f.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	f.size, f.used = st.Blocks*512, time.Unix(st.Mtim.Unix())
	if f.kind == isChunk && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 && st.Size <= chunkstore.MaxStored {
		f.size = max(f.size, st.Size)
	} else if f.kind == isChunk {
		f.kind = isNoUse
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		f.size = 0 // nothing is gained by its end, which may not come
	}
	// A time in the future would keep a file for ever.
	if f.kind == isNoUse || f.used.After(now.Add(leftAfter)) {
		f.used = time.Time{}
	}
	return nil
}

// shards returns the names of the subdirectories, in random order.
func (c *Cache) shards(ctx context.Context) ([]string, error) {
	var all []string
	err := c.names(ctx, ".", maxNames, func(_ int, name string) bool {
		if chunkstore.IsShard(name) {
			all = append(all, name)
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("node cache %s: %w", c, err)
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all, nil
}

// names calls yield for up to limit names in a directory of the cache, until it
// returns false. What is no directory has none.
func (c *Cache) names(ctx context.Context, dir string, limit int, yield func(dir int, name string) bool) error {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	var fd int
	var err error
	for {
		if fd, err = unix.Openat(int(c.dir.Fd()), dir, flags, 0); err != unix.EINTR {
			break
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil // removed meanwhile, or none of ours
	case err != nil:
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	for limit > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		names, err := f.Readdirnames(min(limit, namesAtOnce))
		limit -= len(names)
		for _, name := range names {
			if !yield(fd, name) {
				return nil
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// files calls yield for each file of ours in a subdirectory.
func (c *Cache) files(ctx context.Context, shard string, limit int, now time.Time, yield func(dir int, f file)) error {
	return c.names(ctx, shard, limit, func(dir int, name string) bool {
		f := file{shard: shard, name: name, kind: kindOf(shard, name)}
		if f.kind != foreign && f.stat(dir, now) == nil {
			yield(dir, f)
		}
		return true
	})
}

// survey is what a look at the cache has found.
type survey struct {
	shards []string // all subdirectories, those that were looked at first
	seen   int      // how many those are
	files  []file   // in them
	chunks int64    // how many of files are chunks
	bytes  int64    // of files
}

// exact says that the survey has seen the whole cache.
func (s *survey) exact() bool { return s.seen == len(s.shards) }

// scaled returns what n of the files that were seen are in the whole cache.
func (s *survey) scaled(n int64) int64 {
	if s.seen == 0 {
		return 0
	}
	return int64(float64(n) / float64(s.seen) * float64(len(s.shards)))
}

// look surveys the cache; with whole it samples nothing.
func (c *Cache) look(ctx context.Context, whole bool) (*survey, error) {
	shards, err := c.shards(ctx)
	if err != nil {
		return nil, err
	}
	s := &survey{shards: shards}
	limit, now := maxShardNames, time.Now()
	if whole {
		limit = maxNames
	}
	for _, shard := range shards {
		if !whole && s.chunks >= sampleChunks && s.seen >= sampleShards {
			break
		}
		err := c.files(ctx, shard, limit, now, func(_ int, f file) {
			s.bytes += f.size
			if f.kind == isChunk {
				s.chunks++
			}
			// Of files that are no use, a few are enough to know of them.
			if f.kind != isNoUse || len(s.files) < 2*sampleChunks {
				s.files = append(s.files, f)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("node cache %s: %w", c, err)
		}
		s.seen++
	}
	return s, nil
}

// space is what a file system has, in bytes. Both are 0 where it does not say.
type space struct{ size, free int64 }

func (c *Cache) space() space {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(c.dir.Fd()), &st); err != nil {
		return space{}
	}
	return space{size: int64(st.Blocks) * st.Bsize, free: int64(st.Bavail) * st.Bsize}
}
