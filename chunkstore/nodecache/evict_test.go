package nodecache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("BOOTFS_TEST_EVICT"); dir != "" {
		evictForEver(dir)
	}
	os.Exit(m.Run())
}

func path(dir string, id index.ID) string {
	shard, name := chunkstore.Place(id)
	return filepath.Join(dir, shard, name)
}

// write puts a file in the place of chunk id, last used some time ago.
func write(t testing.TB, dir string, id index.ID, content []byte, ago time.Duration) {
	t.Helper()
	file := path(dir, id)
	if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, content, 0o644); err != nil {
		t.Fatal(err)
	}
	age(t, file, ago)
}

func age(t testing.TB, file string, ago time.Duration) {
	t.Helper()
	at := time.Now().Add(-ago)
	if err := os.Chtimes(file, at, at); err != nil {
		t.Fatal(err)
	}
}

// put writes a chunk to disk.
func put(t testing.TB, c *Cache, id index.ID, frame []byte) {
	t.Helper()
	if err := errors.Join(c.Put(t.Context(), id, frame), c.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func exists(file string) bool {
	_, err := os.Lstat(file)
	return err == nil
}

// usage is how much of the disk the files below dir take.
func usage(t testing.TB, dir string) int64 {
	t.Helper()
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, infoErr := d.Info(); infoErr == nil {
				sum += info.Sys().(*unixStat).Blocks * 512
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // evicted meanwhile
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return sum
}

// TestEvict: what was not used for the longest time goes, and no more than has
// to.
func TestEvict(t *testing.T) {
	dir := t.TempDir()
	const n, size = 100, 8 << 10
	var ids []index.ID
	for i := range n {
		id, _ := chunk(uint64(i), 100)
		write(t, dir, id, make([]byte, size), time.Duration(i)*time.Hour)
		ids = append(ids, id)
	}
	for _, test := range []struct {
		limit int64
		left  int
	}{{0, 100}, {n * size, 90}, {n * size, 90}, {80 * size, 72}} {
		e, err := open(t, dir, Options{Limit: test.limit}).Evict(t.Context())
		if err != nil || e.Short != 0 || e.Skipped {
			t.Errorf("limit %d: got %+v, %v", test.limit, e, err)
		}
		for i, id := range ids {
			if got, want := exists(path(dir, id)), i < test.left; got != want {
				t.Errorf("limit %d: chunk %d, used %d hours ago: is there: %v, want %v", test.limit, i, i, got, want)
			}
		}
	}
	e, err := open(t, dir, Options{}).Prune(t.Context(), 10*size)
	if err != nil || e.Chunks != 62 || e.Bytes != 62*size || usage(t, dir) != 10*size {
		t.Errorf("pruned: got %+v, %v, %d bytes left, want %d", e, err, usage(t, dir), 10*size)
	}
	if _, err := open(t, dir, Options{}).Prune(t.Context(), 0); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "[0-9a-f]*")); len(left) > 0 {
		t.Errorf("pruned to nothing: got %v, want no subdirectory", left)
	}
}

// TestEvictSampled: a large cache is not looked at whole, and what is evicted is
// about right.
func TestEvictSampled(t *testing.T) {
	dir := mount(t, "tmpfs", 0, "")
	const n, block = 20_000, 4 << 10
	r := rand.New(rand.NewPCG(1, 2))
	hours := make(map[index.ID]int)
	for range n {
		var id index.ID
		for i := range id {
			id[i] = byte(r.Uint32())
		}
		hours[id] = r.IntN(1000)
		write(t, dir, id, []byte{1}, time.Duration(hours[id])*time.Hour)
	}
	c := open(t, dir, Options{Limit: n * block})
	s, err := c.look(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	got := s.scaled(s.bytes)
	t.Logf("looked at %d of %d subdirectories; %.2f %% off", s.seen, len(s.shards), 100*(float64(got)/(n*block)-1))
	if s.exact() || s.seen > len(s.shards)/2 {
		t.Errorf("looked at %d of %d subdirectories, want a sample", s.seen, len(s.shards))
	}
	if got < 0.97*n*block || got > 1.03*n*block {
		t.Errorf("got %d bytes, want about %d", got, n*block)
	}
	e, err := c.Evict(t.Context())
	if err != nil || e.Short > n*block/50 {
		t.Errorf("got %+v, %v", e, err)
	}
	if left := usage(t, dir); left < 0.87*n*block || left > 0.93*n*block {
		t.Errorf("got %.1f %% of the limit left, want about 90 %%", 100*float64(left)/(n*block))
	}
	wrong := 0
	for id, h := range hours {
		there := exists(path(dir, id))
		if h < 870 && !there || h > 930 && there {
			wrong++
		}
	}
	// Where enough has gone, the rest of the subdirectories is not read.
	if wrong > n/50 {
		t.Errorf("%d chunks are there and older, or gone and younger, than those that were to go", wrong)
	}
}

// TestUse: a chunk that is read becomes young, and no other.
func TestUse(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{})
	var files []string
	for i := range 3 {
		id, frame := chunk(uint64(i), 100)
		put(t, c, id, frame)
		files = append(files, path(dir, id))
	}
	age(t, files[0], 24*time.Hour)
	age(t, files[1], 24*time.Hour)
	age(t, files[2], useGrain/2)
	id, _ := chunk(0, 100)
	lately, _ := chunk(2, 100)
	for _, id := range []index.ID{lately, id} {
		if _, err := c.Get(t.Context(), id, nil); err != nil {
			t.Fatal(err)
		}
	}
	ago := func(file string) time.Duration {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		return time.Since(info.ModTime())
	}
	for end := time.Now().Add(time.Minute); ago(files[0]) > useGrain && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if got := ago(files[0]); got > useGrain {
		t.Errorf("the chunk that was read: got %v, want a moment", got)
	}
	if got := ago(files[1]); got < 24*time.Hour {
		t.Errorf("the chunk that was not read: got %v, want a day", got)
	}
	if got := ago(files[2]); got < useGrain/2 {
		t.Errorf("the chunk that was used lately: got %v, want %v and more", got, useGrain/2)
	}
}

// TestSweep: what killed writers have left goes when it is old, and the last
// sweep is remembered.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{Limit: 1 << 30})
	id, frame := chunk(1, 100)
	put(t, c, id, frame)
	shard := filepath.Dir(path(dir, id))
	staged, _ := chunk(2, 100)
	stagedShard := filepath.Dir(path(dir, staged))
	if err := os.Mkdir(stagedShard, 0o755); err != nil {
		t.Fatal(err)
	}
	old := []string{filepath.Join(shard, tempPrefix+"old"), filepath.Join(dir, tempPrefix+"old"), filepath.Join(stagedShard, tempPrefix+staged.String())}
	kept := []string{filepath.Join(shard, tempPrefix+"new"), filepath.Join(shard, "other"), filepath.Join(dir, "other"), filepath.Join(shard, ".hidden")}
	for i, f := range append(old, kept...) {
		if err := os.WriteFile(f, frame, 0o644); err != nil {
			t.Fatal(err)
		}
		if i < len(old) || i > len(old) {
			age(t, f, 2*leftAfter)
		}
	}
	for round, gone := range []bool{false, true, true} {
		if _, err := c.Evict(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, f := range old {
			if exists(f) == gone {
				t.Errorf("round %d: %s: is there: %v", round, f, !gone)
			}
		}
		for _, f := range append(kept, path(dir, id)) {
			if !exists(f) {
				t.Errorf("round %d: %s is gone", round, f)
			}
		}
		switch round {
		case 0:
			age(t, filepath.Join(dir, lockName), 2*sweepEvery)
		case 1:
			if c.sweepDue() {
				t.Error("a sweep is due after a sweep")
			}
			if exists(stagedShard) {
				t.Error("an empty subdirectory is left")
			}
		}
	}
}

// TestEvictHostile puts into a cache what does not belong there. An eviction ends
// soon, is not misled, and harms nothing outside.
func TestEvictHostile(t *testing.T) {
	outside := t.TempDir()
	valuable := filepath.Join(outside, "valuable")
	id, frame := chunk(1, 100)
	name := filepath.Base(path("", id))
	for _, f := range []string{valuable, filepath.Join(outside, name)} {
		if err := os.WriteFile(f, frame, 0o644); err != nil {
			t.Fatal(err)
		}
		age(t, f, 10000*time.Hour)
	}
	for _, test := range []struct {
		name string
		make func(file string) error
		stay bool // it is none of ours, or cannot be removed
	}{
		{"empty", func(f string) error { return os.WriteFile(f, nil, 0o644) }, false},
		{"huge and sparse", func(f string) error {
			if err := os.WriteFile(f, nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(f, 1<<40)
		}, false},
		{"FIFO", func(f string) error { return unix.Mkfifo(f, 0o644) }, false},
		{"device", func(f string) error { return unix.Mknod(f, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }, false},
		{"directory", func(f string) error { return os.Mkdir(f, 0o755) }, false},
		{"directory with files", func(f string) error { return errors.Join(os.Mkdir(f, 0o755), os.WriteFile(f+"/x", frame, 0o644)) }, true},
		{"link outside", func(f string) error { return os.Symlink(valuable, f) }, false},
		{"subdirectory is a link outside", func(f string) error {
			return errors.Join(os.Remove(filepath.Dir(f)), os.Symlink(outside, filepath.Dir(f)))
		}, true},
		{"subdirectory is a FIFO", func(f string) error {
			return errors.Join(os.Remove(filepath.Dir(f)), unix.Mkfifo(filepath.Dir(f), 0o644))
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			const n, size = 20, 8 << 10
			var ids []index.ID
			for i := range n {
				other, _ := chunk(uint64(100+i), 100)
				write(t, dir, other, make([]byte, size), time.Duration(i)*time.Hour)
				ids = append(ids, other)
			}
			file := path(dir, id)
			if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), test.make(file)); err != nil {
				t.Fatal(err)
			}
			// Something long ago, so that the evictor meets it first.
			age(t, path(dir, ids[n-1]), 9000*time.Hour)
			for round := range 2 {
				e, err := open(t, dir, Options{Limit: n * size}).Evict(t.Context())
				if err != nil || e.Short != 0 {
					t.Errorf("round %d: got %+v, %v", round, e, err)
				}
			}
			for i, other := range ids {
				if got, want := exists(path(dir, other)), i < 18; got != want {
					t.Errorf("chunk %d: is there: %v, want %v", i, got, want)
				}
			}
			// A subdirectory that had nothing else is gone with it.
			info, err := os.Lstat(filepath.Dir(file))
			if got := exists(file) || err == nil && !info.IsDir(); got != test.stay {
				t.Errorf("it is there: %v, want %v", got, test.stay)
			}
			for _, f := range []string{valuable, filepath.Join(outside, name)} {
				if got, err := os.ReadFile(f); err != nil || !bytes.Equal(got, frame) {
					t.Errorf("%s was changed: %v", f, err)
				}
			}
		})
	}
}

// TestFutureTimes: a chunk whose time lies in the future is not kept for ever.
func TestFutureTimes(t *testing.T) {
	dir := t.TempDir()
	const size = 8 << 10
	for i := range 20 {
		id, _ := chunk(uint64(i), 100)
		ago := time.Duration(i) * time.Minute
		if i < 2 {
			ago = -1000 * time.Hour
		}
		write(t, dir, id, make([]byte, size), ago)
	}
	if _, err := open(t, dir, Options{Limit: 20 * size}).Evict(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		id, _ := chunk(uint64(i), 100)
		if got, want := exists(path(dir, id)), i >= 2; got != want {
			t.Errorf("chunk %d: is there: %v, want %v", i, got, want)
		}
	}
}

// TestManyFiles: a great many files that are no chunks, in the cache and in one
// of its subdirectories, keep nobody.
func TestManyFiles(t *testing.T) {
	dir := mount(t, "tmpfs", 0, "")
	n := 20_000
	if os.Getenv("BOOTFS_SOAK") != "" {
		n = 1_000_000
	}
	id, frame := chunk(1, 100)
	write(t, dir, id, frame, 0)
	shard := filepath.Dir(path(dir, id))
	digits := strings.TrimSuffix(filepath.Base(path(dir, id)), chunkstore.Suffix)
	for i := range n {
		f := filepath.Join(dir, fmt.Sprint("junk-", i))
		switch i % 3 {
		case 1:
			f = filepath.Join(shard, fmt.Sprint("junk-", i))
		case 2:
			f = filepath.Join(shard, digits[:52]+fmt.Sprintf("%012x", i)+chunkstore.Suffix)
		}
		fd, err := unix.Open(f, unix.O_CREAT|unix.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	const size = 8 << 10
	for i := range 20 {
		id, _ := chunk(uint64(100+i), 100)
		write(t, dir, id, make([]byte, size), time.Duration(i+1)*time.Hour)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := open(t, dir, Options{Limit: 20 * size})
	for range 2 {
		if e, err := c.Evict(ctx); err != nil || e.Short != 0 {
			t.Fatalf("got %+v, %v", e, err)
		}
	}
	if !exists(path(dir, id)) {
		t.Error("the chunk that was used last is gone")
	}
	if got := usage(t, dir); got > 20*size {
		t.Errorf("got %d bytes, want at most %d", got, 20*size)
	}
	if _, err := c.Prune(ctx, 20*size); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(shard, digits[:52]+"*")); len(left) != 1 {
		t.Errorf("got %d files of the names of chunks, want the chunk alone", len(left))
	}
}

// TestLock: while one evicts, another does not. A lock that is held for long
// keeps nobody from evicting.
func TestLock(t *testing.T) {
	dir := t.TempDir()
	const size = 8 << 10
	for i := range 20 {
		id, _ := chunk(uint64(i), 100)
		write(t, dir, id, make([]byte, size), time.Duration(i)*time.Hour)
	}
	other := open(t, dir, Options{})
	lock, held := other.lockEviction()
	if !held || lock == nil {
		t.Fatal("got no lock")
	}
	defer lock.Close()
	c := open(t, dir, Options{Limit: 20 * size})
	for range 2 {
		if e, err := c.Evict(t.Context()); err != nil || !e.Skipped || e.Chunks != 0 {
			t.Errorf("locked: got %+v, %v", e, err)
		}
	}
	c.lockedOut.Store(time.Now().Add(-lockPatience).Unix() - 1)
	if e, err := c.Evict(t.Context()); err != nil || e.Skipped || e.Chunks != 2 {
		t.Errorf("locked for long: got %+v, %v", e, err)
	}
	lock.Close()
	if _, err := c.Evict(t.Context()); err != nil || c.lockedOut.Load() != 0 {
		t.Errorf("free again: got %v, locked out since %d", err, c.lockedOut.Load())
	}
	// What stands in the lock's place is no reason not to evict either.
	if err := errors.Join(os.Remove(filepath.Join(dir, lockName)), unix.Mkfifo(filepath.Join(dir, lockName), 0o644)); err != nil {
		t.Fatal(err)
	}
	if e, err := open(t, dir, Options{Limit: 10 * size}).Evict(t.Context()); err != nil || e.Skipped || e.Chunks != 9 {
		t.Errorf("no lock: got %+v, %v", e, err)
	}
}

func TestReadOnly(t *testing.T) {
	dir := mount(t, "tmpfs", 0, "")
	id, frame := chunk(1, 100)
	put(t, open(t, dir, Options{}), id, frame)
	age(t, path(dir, id), 24*time.Hour)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	c := open(t, dir, Options{Limit: 1})
	if got, err := c.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("Get: got %d bytes, %v", len(got), err)
	}
	if err := c.Put(t.Context(), id, frame); !errors.Is(err, unix.EROFS) || strings.Contains(err.Error(), "\n") {
		t.Errorf("Put: got %v, want one line", err)
	}
	if _, err := c.Evict(t.Context()); !errors.Is(err, unix.EROFS) {
		t.Errorf("Evict: got %v", err)
	}
}

// swarm has writers put more chunks than may stay, each through a Cache of its
// own as another process would, while readers read what is there. It returns how
// many chunks were written, and refused.
func swarm(t *testing.T, dir string, o Options, chunks int, sample func()) (written, refused int64) {
	t.Helper()
	const writers, readers = 4, 4
	ids, frames := make([]index.ID, chunks), make([][]byte, chunks)
	for i := range chunks {
		frames[i] = bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 20_000)
		ids[i] = index.SHA256.Sum(frames[i])
	}
	var done atomic.Bool
	var writing, reading sync.WaitGroup
	var next, put, full, read atomic.Int64
	for range writers {
		c := open(t, dir, o)
		writing.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= chunks {
					return
				}
				switch err := c.Put(t.Context(), ids[i], frames[i]); {
				case err == nil:
					put.Add(1)
				case errors.Is(err, chunkstore.ErrFull):
					full.Add(1)
					time.Sleep(time.Millisecond)
				default:
					t.Error(err)
				}
			}
		})
	}
	for r := range readers {
		c := open(t, dir, o)
		reading.Go(func() {
			random := rand.New(rand.NewPCG(uint64(r), 0))
			for !done.Load() {
				i := random.IntN(max(1, min(chunks, int(next.Load()))))
				frame, err := c.Get(t.Context(), ids[i], nil)
				if errors.Is(err, chunkstore.ErrNotFound) {
					continue
				}
				if err != nil || !bytes.Equal(frame, frames[i]) {
					t.Errorf("chunk %d: got %d bytes, %v, want the %d that were put, or none", i, len(frame), err, len(frames[i]))
					return
				}
				read.Add(1)
				time.Sleep(100 * time.Microsecond)
			}
		})
	}
	reading.Go(func() {
		for !done.Load() {
			sample()
			time.Sleep(5 * time.Millisecond)
		}
	})
	writing.Wait()
	done.Store(true)
	reading.Wait()
	if read.Load() == 0 {
		t.Error("nothing was read")
	}
	return put.Load(), full.Load()
}

// TestLimitHolds: four writers and four readers of one cache that may hold a
// fraction of what they write.
func TestLimitHolds(t *testing.T) {
	dir := mount(t, "tmpfs", 0, "")
	const limit = 8 << 20
	var most int64
	written, refused := swarm(t, dir, Options{Limit: limit}, 800, func() { most = max(most, usage(t, dir)) })
	t.Logf("%d chunks written, %d refused; at most %.1f %% of the limit", written, refused, 100*float64(most)/limit)
	// Writers that know of one another only by looking may together be over it a
	// little, for a moment.
	if most > limit*11/10 {
		t.Errorf("got %d bytes, want at most %d", most, limit)
	}
	if most < limit/2 || written < 100 {
		t.Errorf("got %d bytes and %d chunks written, want the cache to be used", most, written)
	}
	if e, err := open(t, dir, Options{Limit: limit}).Evict(t.Context()); err != nil || e.Before > limit*11/10 {
		t.Errorf("afterwards: got %+v, %v", e, err)
	}
}

// TestReserveHolds: the same against the free space of a small file system.
func TestReserveHolds(t *testing.T) {
	for _, test := range []struct {
		name string
		dir  func() string
	}{
		{"tmpfs", func() string { return mount(t, "tmpfs", 0, "size=24m") }},
		{"ext4", func() string { return mountDisk(t, 40<<20) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := test.dir()
			reserve, err := ParseReserve("30%")
			if err != nil {
				t.Fatal(err)
			}
			c := open(t, dir, Options{})
			want := reserve.of(c.space().size)
			least := c.space().free
			written, refused := swarm(t, dir, Options{Reserve: reserve}, 1200, func() { least = min(least, c.space().free) })
			t.Logf("%d chunks written, %d refused; at least %.1f MB were free, %.1f are reserved", written, refused, float64(least)/1e6, float64(want)/1e6)
			// The four writers may each have a MiB on its way when they look.
			if least < want-4*spaceAfter-1<<20 {
				t.Errorf("got %d bytes free, want %d", least, want)
			}
			if written < 300 {
				t.Errorf("got %d chunks written, want the cache to be used", written)
			}
		})
	}
}

// TestTwoEvictors: what several evict at once is no less than what one leaves.
func TestTwoEvictors(t *testing.T) {
	dir := t.TempDir()
	const n, size = 300, 8 << 10
	for i := range n {
		id, _ := chunk(uint64(i), 100)
		write(t, dir, id, make([]byte, size), time.Duration(i)*time.Hour)
	}
	var wait sync.WaitGroup
	var skipped, removed atomic.Int64
	for range 4 {
		c := open(t, dir, Options{Limit: n * size})
		wait.Go(func() {
			for range 5 {
				e, err := c.Evict(t.Context())
				if err != nil {
					t.Error(err)
				}
				if e.Skipped {
					skipped.Add(1)
				}
				removed.Add(e.Chunks)
			}
		})
	}
	wait.Wait()
	if got := removed.Load(); got != n/10 {
		t.Errorf("got %d chunks removed, want %d (%d passes were skipped)", got, n/10, skipped.Load())
	}
}

// evictForEver fills and evicts, until it is killed.
func evictForEver(dir string) {
	c, err := Open(dir, Options{Limit: 1 << 20})
	if err != nil {
		panic(err)
	}
	for i := uint64(0); ; i++ {
		id, frame := chunk(i%200, 20_000)
		if err := c.Put(context.Background(), id, frame); err != nil && !errors.Is(err, chunkstore.ErrFull) {
			panic(err)
		}
		if i%10 == 0 {
			if _, err := c.Prune(context.Background(), 300_000); err != nil {
				panic(err)
			}
		}
	}
}

// TestEvictorKilled: an evictor that is killed leaves a cache of whole chunks,
// which the next one evicts from.
func TestEvictorKilled(t *testing.T) {
	dir := mount(t, "tmpfs", 0, "")
	rounds := 10
	if os.Getenv("BOOTFS_SOAK") != "" {
		rounds = 200
	}
	frames := make(map[index.ID][]byte)
	for i := range uint64(200) {
		id, frame := chunk(i, 20_000)
		frames[id] = frame
	}
	for round := range rounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "BOOTFS_TEST_EVICT="+dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20*time.Millisecond + rand.N(100*time.Millisecond))
		cmd.Process.Kill()
		cmd.Wait()
		c := open(t, dir, Options{Limit: 1 << 20})
		for e, err := range c.List(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			if got, err := c.Get(t.Context(), e.ID, nil); err != nil || !bytes.Equal(got, frames[e.ID]) {
				t.Errorf("round %d: chunk %s: got %d bytes, %v", round, e.ID, len(got), err)
			}
		}
		// What the killed one has left is young, and stays: as if it were later.
		left, err := filepath.Glob(filepath.Join(dir, "*", tempPrefix+"*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range left {
			age(t, file, 2*leftAfter)
		}
		if e, err := c.Prune(t.Context(), 100_000); err != nil || e.Skipped || e.Short != 0 {
			t.Errorf("round %d: got %+v, %v", round, e, err)
		}
		c.Close()
	}
}
