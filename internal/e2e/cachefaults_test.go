package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/registrystore"
)

// A cacheFault is what goes wrong with the node cache, whose store is good: no
// read may fail.
type cacheFault struct {
	name string
	// begin makes it go wrong, and returns what heals it; nil: nothing need be.
	begin func(c *cacheCase) (heal func())
	full  bool // all chunks were in the cache before
	sick  bool // the cache is on a disk that fails on demand
	tmpfs bool // the cache is on a small disk of its own
	// What is known only when the cache is opened does not befall a container that runs.
	opened bool
	// What is in the cache in the end of what was read.
	start, read, prefetch string
}

// damages reports whether what is in the cache is spoiled, and not the way to it.
func (f cacheFault) damages() bool { return f.full && !f.sick }

// What a cell of the cache's table says behind the bytes.
const (
	kept    = "kept"
	healed  = "healed"
	notKept = "not kept"
	later   = "healed when read"
	asFits  = "kept as far as there is room"
)

// files makes f change the file of each chunk of the cache; good is another place
// where all chunks are.
func files(f func(file, good string) error) func(*cacheCase) func() {
	return func(c *cacheCase) func() {
		for _, file := range c.chunkFiles() {
			rel, err := filepath.Rel(c.below, file)
			if err == nil {
				err = f(file, filepath.Join(c.env.loose, rel))
			}
			c.check(err)
		}
		return nil
	}
}

// instead is files with something else in the file's place.
func instead(f func(file, good string) error) func(*cacheCase) func() {
	return files(func(file, good string) error {
		if err := os.Remove(file); err != nil {
			return err
		}
		return f(file, good)
	})
}

// answers makes the disk fail so.
func answers(errno unix.Errno, what operations) func(*cacheCase) func() {
	return func(c *cacheCase) func() {
		c.disk.fail(errno, what)
		return func() { c.disk.fail(0, 0) }
	}
}

// hidden puts something in the place of a hidden file of the cache.
func hidden(name string, f func(path string) error) func(*cacheCase) func() {
	return func(c *cacheCase) func() {
		path := filepath.Join(c.below, name)
		c.check(os.RemoveAll(path))
		c.check(f(path))
		return nil
	}
}

// cacheFaults are the rows.
var cacheFaults = []cacheFault{
	{name: "the disk is full (ENOSPC)", tmpfs: true, begin: fillUp, start: asFits, read: asFits, prefetch: asFits},
	{name: "I/O errors (EIO), whatever is done", sick: true, full: true, begin: answers(unix.EIO, toLookUp|toOpen|toRead|toWrite), start: kept, read: kept, prefetch: kept},
	{name: "I/O errors (EIO) of reads", sick: true, full: true, begin: answers(unix.EIO, toRead), start: kept, read: kept, prefetch: kept},
	{name: "I/O errors (EIO) of writes", sick: true, begin: answers(unix.EIO, toWrite), start: notKept, read: notKept, prefetch: notKept},
	{name: "no descriptor is left (EMFILE)", sick: true, begin: answers(unix.EMFILE, toOpen), start: notKept, read: notKept, prefetch: notKept},
	{name: "it has become read-only (EROFS)", sick: true, begin: answers(unix.EROFS, toWrite), start: notKept, read: notKept, prefetch: notKept},
	{name: "access is refused (EACCES)", sick: true, begin: answers(unix.EACCES, toOpen|toWrite), start: notKept, read: notKept, prefetch: notKept},
	{name: "it has been emptied", full: true, begin: func(c *cacheCase) func() {
		entries, err := os.ReadDir(c.below)
		c.check(err)
		for _, e := range entries {
			c.check(os.RemoveAll(filepath.Join(c.below, e.Name())))
		}
		return nil
	}, start: healed, read: healed, prefetch: healed},
	{name: "files of 0 bytes", full: true, begin: instead(func(file, _ string) error { return os.WriteFile(file, nil, 0o444) }), start: healed, read: healed, prefetch: healed},
	{name: "truncated files", full: true, begin: files(func(file, _ string) error {
		info, err := os.Stat(file)
		if err != nil {
			return err
		}
		return os.Truncate(file, info.Size()/2+1)
	}), start: healed, read: healed, prefetch: later},
	{name: "files with a flipped byte", full: true, begin: instead(func(file, good string) error {
		b, err := os.ReadFile(good)
		if err != nil {
			return err
		}
		b[len(b)/2] ^= 0xff
		return os.WriteFile(file, b, 0o444)
	}), start: healed, read: healed, prefetch: later},
	{name: "other bytes, in good form", full: true, begin: instead(func(file, _ string) error {
		return os.WriteFile(file, zeros, 0o444)
	}), start: healed, read: healed, prefetch: later},
	{name: "symlinks to good files", full: true, begin: instead(func(file, good string) error { return os.Symlink(good, file) }), start: healed, read: healed, prefetch: healed},
	{name: "FIFOs", full: true, begin: instead(func(file, _ string) error { return unix.Mkfifo(file, 0o666) }), start: healed, read: healed, prefetch: healed},
	{name: "empty directories", full: true, begin: instead(func(file, _ string) error { return os.Mkdir(file, 0o755) }), start: healed, read: healed, prefetch: healed},
	{name: "directories with a file", full: true, begin: instead(func(file, _ string) error {
		if err := os.Mkdir(file, 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(file, "file"), nil, 0o444)
	}), start: notKept, read: notKept, prefetch: notKept},
	{name: "a file in the place of each subdirectory", full: true, begin: func(c *cacheCase) func() {
		shards, err := filepath.Glob(filepath.Join(c.below, "[0-9a-f][0-9a-f][0-9a-f][0-9a-f]"))
		c.check(err)
		for _, shard := range shards {
			c.check(os.RemoveAll(shard))
			c.check(os.WriteFile(shard, nil, 0o644))
		}
		return nil
	}, start: healed, read: healed, prefetch: healed},
	{name: "a FIFO in the place of the locks", begin: hidden(".bootfs-lock", func(path string) error { return unix.Mkfifo(path, 0o666) }), start: kept, read: kept, prefetch: kept},
	{name: "a marker of another version", opened: true, begin: hidden(".bootfs-cache", func(path string) error {
		return os.WriteFile(path, []byte(`{"version":99}`), 0o644)
	}), start: notKept},
}

// cacheReads is how long a read may take: a busy machine's registry is no fault of
// the cache.
const cacheReads = 5 * time.Minute

// zeros is a zstd frame with 128 KiB of zeros.
var zeros = []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0x00, 0x00, 0x02, 0x00, 0x03, 0x00, 0x10, 0x00}

// fillUp takes all space of the cache's disk.
func fillUp(c *cacheCase) func() {
	f, err := os.Create(filepath.Join(c.below, ".other"))
	if c.check(err); err != nil {
		return nil
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	if err := err.(*fs.PathError).Err; err != unix.ENOSPC {
		c.bad("fill the disk: %v", err)
	}
	return nil
}

// cacheCase is a reader with a cache that fails.
type cacheCase struct {
	*faultCase
	row   cacheFault
	disk  *sickDisk // nil: none
	dir   string    // the cache
	below string    // its files, where the disk does not fail
}

func (c *cacheCase) check(err error) {
	if err != nil {
		c.bad("%v", err)
	}
}

// chunkFiles are the files of the cache that have names of chunks.
func (c *cacheCase) chunkFiles() []string {
	files, err := filepath.Glob(filepath.Join(c.below, "*", "*"+chunkstore.Suffix))
	c.check(err)
	if len(files) == 0 {
		c.bad("no chunks are in the cache")
	}
	return files
}

// newCacheCase makes the cache of a row.
func newCacheCase(t *testing.T, env *faultEnv, row cacheFault) *cacheCase {
	c := &cacheCase{faultCase: &faultCase{env: env}, row: row, below: t.TempDir()}
	if row.tmpfs {
		if err := unix.Mount("tmpfs", c.below, "tmpfs", 0, "size=256k"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(c.below, unix.MNT_DETACH) })
	}
	if row.full {
		if err := os.CopyFS(c.below, os.DirFS(env.loose)); err != nil {
			t.Fatal(err)
		}
	}
	c.dir = c.below
	if row.sick {
		c.disk, c.dir = mountSickDisk(t, c.below)
	}
	return c
}

// open returns a reader with the cache, and what ends it.
func (c *cacheCase) open() (r *faultReader, end func()) {
	cache, err := nodecache.Open(c.dir, nodecache.Options{})
	if err != nil {
		c.bad("%v", err)
		return nil, nil
	}
	packs, err := c.packs(c.env.registry, registrystore.RemoteOptions{})
	c.check(err)
	x := c.env.image.Index
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: x.Digest(), Cache: cache, Stores: []chunkstore.Store{packs}})
	return &faultReader{c: c.faultCase, fetcher: f, image: lazy.New(x, f, lazy.Options{})}, func() {
		c.check(f.Close())
		c.check(cache.Close())
	}
}

// left says what the cache has of so many chunks, once it has healed.
func (c *cacheCase) left(positions []int, some bool) string {
	s, err := local.Open(c.below)
	if err != nil {
		c.bad("%v", err)
		return ""
	}
	defer s.Close()
	good := 0
	for _, i := range positions {
		chunk, err := c.env.image.Index.At(i)
		c.check(err)
		frame, err := s.Get(context.Background(), chunk.ID, nil)
		if err == nil {
			_, err = chunkstore.Decode(nil, frame, c.env.image.Index.Digest(), chunk)
		}
		if err == nil {
			good++
		}
	}
	switch {
	case c.row.tmpfs && good < len(positions):
		return asFits
	case good == 0:
		return notKept
	case good < len(positions) && !some:
		return fmt.Sprintf("%d of %d kept", good, len(positions))
	case c.row.damages():
		return healed
	}
	return kept
}

// stored are the positions of all chunks that a store has: not those of zeros.
func (e *faultEnv) stored() []int {
	var all []int
	for i := range e.image.Index.Len() {
		if c, err := e.image.Index.At(i); err == nil && c.ID != index.ID(e.image.Index.Digest().Sum(make([]byte, c.Size))) {
			all = append(all, i)
		}
	}
	return all
}

func (c *cacheCase) heal(f func()) {
	if f != nil {
		f()
	}
}

// start runs a container with the cache.
func (c *cacheCase) start(t *testing.T) (cell string) {
	heal := c.row.begin(c)
	r := run(t, "--volume", c.dir+":/.bootfs/rootfs.castr", "--env", "BOOTFS_PREFETCH=none", "--env", fmt.Sprintf("BOOTFS_READ_TIMEOUT=%v", cacheReads), c.env.ref)
	if r.code != 0 || r.stdout != "ok\n" {
		c.bad("exit %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
	c.heal(heal)
	return fine + "; " + c.left(c.env.stored(), true)
}

// read reads chunks that nobody has read before.
func (c *cacheCase) read() (cell string) {
	r, end := c.open()
	if r == nil {
		return ""
	}
	warm, cold, _ := c.chunks()
	c.check(r.within(cacheReads, warm))
	heal := c.row.begin(c)
	some := []int{cold, cold + 1, cold + 2, cold + 3}
	for _, i := range some {
		c.check(r.within(cacheReads, i))
	}
	end()
	c.heal(heal)
	return fine + "; " + c.left(some, false)
}

// prefetch fetches all chunks ahead, and reads them.
func (c *cacheCase) prefetch() (cell string) {
	r, end := c.open()
	if r == nil {
		return ""
	}
	heal := c.row.begin(c)
	positions := c.env.stored()
	c.check(r.image.Prefetch(context.Background(), slices.Values(positions)))
	end()
	c.heal(heal)
	left := c.left(positions, false)
	if left != notKept || !c.row.damages() {
		return all + "; " + left
	}
	if r, end = c.open(); r == nil {
		return ""
	}
	for _, i := range positions {
		c.check(r.within(cacheReads, i))
	}
	end()
	if left = c.left(positions, false); left == healed {
		left = later
	}
	return all + "; " + left
}

// cacheTable lets each fault of the node cache meet each way in which a container
// reads. No read fails, and what was damaged is good again where it can be.
func cacheTable(t *testing.T, env *faultEnv) string {
	if r := docker(t, "pull", "--quiet", env.ref); r.code != 0 {
		t.Fatal(r.stderr)
	}
	page := failureCache
	for _, row := range cacheFaults {
		must := "data"
		if row.damages() && row.read == healed {
			must = "data, and healed"
		}
		page += fmt.Sprintf("| %s | %s |", row.name, must)
		cell := func(column, want string, do func(*cacheCase) string) {
			// The registry of a busy machine may fail too.
			var got string
			var c *cacheCase
			for range 3 {
				c = newCacheCase(t, env, row)
				if got = do(c); got == want && len(c.out.wrong) == 0 || c.out.corrupt {
					break
				}
				t.Logf("cache: %s, %s: got %q; %s", row.name, column, got, strings.Join(c.out.wrong, "; "))
			}
			if got != want {
				t.Errorf("cache: %s, %s: got %q, want %q", row.name, column, got, want)
			}
			for _, s := range c.out.wrong {
				t.Errorf("cache: %s, %s: %s", row.name, column, s)
			}
			page += " " + got + " |"
		}
		cell("start", fine+"; "+row.start, func(c *cacheCase) string { return c.start(t) })
		if row.opened {
			page += " – | – |\n"
			continue
		}
		cell("read", fine+"; "+row.read, (*cacheCase).read)
		cell("prefetch", all+"; "+row.prefetch, (*cacheCase).prefetch)
		page += "\n"
	}
	return page
}
