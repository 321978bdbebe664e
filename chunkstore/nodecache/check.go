package nodecache

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// maxFaults bounds how many faults a Checkup lists.
const maxFaults = 1000

// Fault is a file in a chunk's place that is not the chunk.
type Fault struct {
	File   string `json:"file"` // below the cache's directory
	Reason string `json:"reason"`
}

// Checkup is the result of reading a whole cache.
type Checkup struct {
	Chunks  int64   `json:"chunks"` // that were read
	Bytes   int64   `json:"bytes"`  // stored, of those
	Damaged int64   `json:"damaged"`
	Removed int64   `json:"removed"`
	Faults  []Fault `json:"faults"` // the first 1000 of those that are damaged
}

// CheckOptions say what to do beside looking.
type CheckOptions struct {
	Remove   bool        // remove what is damaged
	Progress func(int64) // is told of stored bytes that were read; may be nil
}

// Check reads every chunk of the cache and compares it with its name, whichever
// digest that is. Others may use the cache meanwhile.
func (c *Cache) Check(ctx context.Context, o CheckOptions) (*Checkup, error) {
	shards, err := c.shards(ctx)
	if err != nil {
		return nil, err
	}
	result := &Checkup{Faults: []Fault{}}
	var mu sync.Mutex // guards result
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	buffers := sync.Pool{New: func() any { return new([2][]byte) }}
	for _, shard := range shards {
		g.Go(func() error {
			buf := buffers.Get().(*[2][]byte)
			defer buffers.Put(buf)
			now := time.Now()
			return c.files(ctx, shard, maxNames, now, func(dir int, f file) {
				if f.kind == isTemp {
					return
				}
				n, err := f.check(dir, buf)
				if errors.Is(err, unix.ENOENT) {
					return // evicted meanwhile
				}
				removed := false
				if err != nil && o.Remove {
					var e Eviction
					_ = c.removeAt(dir, f, now, &e)
					removed = e.Chunks+e.Leftovers > 0
				}
				if o.Progress != nil {
					o.Progress(f.size)
				}
				mu.Lock()
				defer mu.Unlock()
				result.Chunks, result.Bytes = result.Chunks+1, result.Bytes+n
				if err == nil {
					return
				}
				result.Damaged++
				if removed {
					result.Removed++
				}
				if len(result.Faults) < maxFaults {
					result.Faults = append(result.Faults, Fault{File: shard + "/" + f.name, Reason: err.Error()})
				}
			})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("node cache %s: %w", c, err)
	}
	return result, nil
}

// check returns nil if the file in dir is the chunk that its name says, and its
// size.
func (f *file) check(dir int, buf *[2][]byte) (int64, error) {
	if f.kind != isChunk {
		return 0, errors.New("not a regular file of a chunk's size")
	}
	fd, err := unix.Openat(dir, f.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	in := os.NewFile(uintptr(fd), f.name)
	defer in.Close()
	if info, err := in.Stat(); err != nil || !info.Mode().IsRegular() {
		return 0, errors.New("not a regular file of a chunk's size")
	}
	frame := buf[0][:0]
	for len(frame) <= chunkstore.MaxStored {
		if len(frame) == cap(frame) {
			frame = append(frame, 0)[:len(frame)]
		}
		n, err := in.Read(frame[len(frame):cap(frame)])
		frame = frame[:len(frame)+n]
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	buf[0] = frame
	if cap(buf[1]) < chunker.MaxSize {
		buf[1] = make([]byte, chunker.MaxSize)
	}
	digits := strings.TrimSuffix(strings.TrimPrefix(f.name, tempPrefix), chunkstore.Suffix)
	id, err := index.ParseID(digits)
	if err != nil {
		return 0, err
	}
	_, _, err = chunkstore.Identify(buf[1], frame, id)
	var corrupt *chunkstore.CorruptError
	if errors.As(err, &corrupt) {
		err = fmt.Errorf("got %s, want %s", corrupt.Got, corrupt.Want)
	}
	return int64(len(frame)), err
}

// Age is how much of a cache was last used that long ago.
type Age struct {
	Within time.Duration // 0: longer ago than the one before
	Chunks int64
	Bytes  int64 // of the disk
}

// ages are those of Usage.
var ages = []time.Duration{time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 30 * 24 * time.Hour, 0}

// Usage is what a cache holds.
type Usage struct {
	Sampled   bool // the counts are estimates
	Chunks    int64
	Bytes     int64 // of the disk
	Leftovers int64 // files that are being written, were left so, or cannot be chunks
	LeftBytes int64
	Ages      []Age // by last use, the youngest first
	Oldest    time.Time
	Newest    time.Time
	DiskFree  int64 // bytes
	DiskSize  int64
	Reserve   int64 // bytes of it that the cache is to leave free
}

// Usage looks at the cache; with whole at all of it, else at a sample where it is
// large.
func (c *Cache) Usage(ctx context.Context, whole bool) (*Usage, error) {
	s, err := c.look(ctx, whole)
	if err != nil {
		return nil, err
	}
	disk := c.space()
	u := &Usage{Sampled: !s.exact(), Ages: make([]Age, len(ages)), DiskFree: disk.free, DiskSize: disk.size, Reserve: c.reserve.of(disk.size)}
	for i, within := range ages {
		u.Ages[i].Within = within
	}
	now := time.Now()
	for _, f := range s.files {
		if f.kind != isChunk {
			u.Leftovers, u.LeftBytes = u.Leftovers+1, u.LeftBytes+f.size
			continue
		}
		u.Chunks, u.Bytes = u.Chunks+1, u.Bytes+f.size
		if u.Oldest.IsZero() || f.used.Before(u.Oldest) {
			u.Oldest = f.used
		}
		if f.used.After(u.Newest) {
			u.Newest = f.used
		}
		for i, within := range ages {
			if within == 0 || now.Sub(f.used) <= within {
				u.Ages[i].Chunks, u.Ages[i].Bytes = u.Ages[i].Chunks+1, u.Ages[i].Bytes+f.size
				break
			}
		}
	}
	for _, n := range []*int64{&u.Chunks, &u.Bytes, &u.Leftovers, &u.LeftBytes} {
		*n = s.scaled(*n)
	}
	for i := range u.Ages {
		u.Ages[i].Chunks, u.Ages[i].Bytes = s.scaled(u.Ages[i].Chunks), s.scaled(u.Ages[i].Bytes)
	}
	return u, nil
}

// asidePrefix starts the name of a subdirectory with a cache that was set aside.
const asidePrefix = ".bootfs-aside-"

// SetAside makes room for a new cache in dir, which has one in a format that is
// not known here: that goes into a hidden subdirectory, whose path is returned.
func SetAside(dir string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fmt.Errorf("node cache: %w", err)
	}
	defer root.Close()
	self, err := root.Open(".")
	if err != nil {
		return "", fmt.Errorf("node cache: %w", err)
	}
	defer self.Close()
	aside := asidePrefix + rand.Text()[:8]
	if err := root.Mkdir(aside, 0o755); err != nil {
		return "", fmt.Errorf("node cache: %w", err)
	}
	// The marker goes last: until then, nobody takes the rest for a cache of this
	// format.
	for last := range 2 {
		names, err := self.Readdirnames(-1)
		if err != nil && err != io.EOF {
			return "", fmt.Errorf("node cache: %w", err)
		}
		for _, name := range names {
			if strings.HasPrefix(name, asidePrefix) || name == markerName && last == 0 || name == "lost+found" {
				continue
			}
			if err := root.Rename(name, aside+"/"+name); err != nil {
				return "", fmt.Errorf("node cache: %w", err)
			}
		}
		if _, err := self.Seek(0, io.SeekStart); err != nil {
			return "", fmt.Errorf("node cache: %w", err)
		}
	}
	return dir + "/" + aside, nil
}

// Unmark removes a marker that cannot be read, so that the chunks are those of a
// casync store.
func Unmark(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("node cache: %w", err)
	}
	defer root.Close()
	if err := root.RemoveAll(markerName); err != nil {
		return fmt.Errorf("node cache: %w", err)
	}
	return nil
}
