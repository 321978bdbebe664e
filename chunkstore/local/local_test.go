package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("BOOTFS_TEST_WRITE"); dir != "" {
		writeForEver(dir)
	}
	if dir := os.Getenv("BOOTFS_TEST_WRITE_BATCHED"); dir != "" {
		writeForEver(dir, Batched())
	}
	if once := os.Getenv("BOOTFS_TEST_ONCE"); once != "" {
		writeOnce(once)
	}
	os.Exit(m.Run())
}

func create(t testing.TB, dir string, opts ...Option) *Store {
	t.Helper()
	s, err := Create(dir, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestContract(t *testing.T) {
	storetest.Run(t, func() chunkstore.Writer { return create(t, filepath.Join(t.TempDir(), "a", "b.castr")) })
}

// TestContractByDescriptor: a store whose directory has lost its path.
func TestContractByDescriptor(t *testing.T) {
	storetest.Run(t, func() chunkstore.Writer {
		dir := filepath.Join(t.TempDir(), "store")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		s := New(root)
		t.Cleanup(func() { s.Close() })
		root.Close()
		if err := os.Rename(dir, dir+".elsewhere"); err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func chunk(seed uint64, n int) (index.ID, []byte) {
	plain := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range plain {
		plain[i] = byte(r.Uint32())
	}
	return index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
}

func path(dir string, id index.ID) string {
	return filepath.Join(dir, id.String()[:4], id.String()+".cacnk")
}

func TestLayout(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir)
	id, frame := chunk(1, 100)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path(dir, id))
	if err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v, want the frame", len(got), err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*", "*"))
	hidden, _ := filepath.Glob(filepath.Join(dir, "*", ".*"))
	if n := len(files) + len(hidden); n != 1 {
		t.Errorf("got %d files, want 1: nothing temporary stays", n)
	}
}

// TestHostile puts what is no chunk in a chunk's place. Each of it is an error
// within a moment, nothing outside is touched, and Put heals it.
func TestHostile(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	id, frame := chunk(1, 100)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, frame, 0o644); err != nil {
		t.Fatal(err)
	}
	outsideDir := t.TempDir()
	if err := os.WriteFile(filepath.Join(outsideDir, id.String()+suffix), frame, 0o644); err != nil {
		t.Fatal(err)
	}
	shard := func(file string) string { return filepath.Dir(file) }
	for _, test := range []struct {
		name string
		make func(file string) error
		has  bool // Has may answer without an error
	}{
		{"empty", func(f string) error { return os.WriteFile(f, nil, 0o644) }, true},
		{"too large", func(f string) error {
			if err := os.WriteFile(f, nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(f, chunkstore.MaxStored+1)
		}, true},
		{"FIFO", func(f string) error { return unix.Mkfifo(f, 0o644) }, true},
		{"socket", func(f string) error {
			// A socket's path is limited to 108 bytes.
			short := filepath.Join(os.TempDir(), fmt.Sprint("bootfs-test-", os.Getpid()))
			l, err := net.Listen("unix", short)
			if err != nil {
				return err
			}
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			defer l.Close()
			return os.Rename(short, f)
		}, true},
		{"device", func(f string) error { return unix.Mknod(f, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }, true},
		{"directory", func(f string) error { return os.Mkdir(f, 0o755) }, true},
		{"link to a chunk outside", func(f string) error { return os.Symlink(outside, f) }, true},
		{"link to a chunk inside", func(f string) error {
			if err := os.WriteFile(f+".x", frame, 0o644); err != nil {
				return err
			}
			return os.Symlink(filepath.Base(f)+".x", f)
		}, true},
		{"dangling link", func(f string) error { return os.Symlink("nowhere", f) }, true},
		{"link to itself", func(f string) error { return os.Symlink(filepath.Base(f), f) }, true},
		{"subdirectory is a link outside", func(f string) error {
			if err := os.Remove(shard(f)); err != nil {
				return err
			}
			return os.Symlink(outsideDir, shard(f))
		}, false},
		{"subdirectory is a link inside", func(f string) error {
			if err := os.Rename(shard(f), shard(f)+".x"); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(shard(f)+".x", filepath.Base(f)), frame, 0o644); err != nil {
				return err
			}
			return os.Symlink(filepath.Base(shard(f))+".x", shard(f))
		}, false},
		{"subdirectory is a file", func(f string) error {
			if err := os.Remove(shard(f)); err != nil {
				return err
			}
			return os.WriteFile(shard(f), nil, 0o644)
		}, false},
		{"subdirectory is a FIFO", func(f string) error {
			if err := os.Remove(shard(f)); err != nil {
				return err
			}
			return unix.Mkfifo(shard(f), 0o644)
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			bounded.Case(t)
			dir := t.TempDir()
			s := create(t, dir)
			file := path(dir, id)
			if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := test.make(file); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			got, err := s.Get(t.Context(), id, []byte("kept"))
			if err == nil || string(got) != "kept" {
				t.Errorf("Get: got %d bytes, error %v, want an error", len(got), err)
			} else if !strings.Contains(err.Error(), id.String()) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Get: got error %q, want one line with the chunk's name", err)
			}
			if ok, err := s.Has(t.Context(), id); ok || test.has && err != nil {
				t.Errorf("Has: got %v, %v, want false", ok, err)
			}
			for range s.List(t.Context()) {
			}
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Errorf("Put: %v", err)
			}
			if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
				t.Errorf("Get behind Put: got %d bytes, %v", len(got), err)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			for _, f := range []string{outside, filepath.Join(outsideDir, id.String()+suffix)} {
				if got, err := os.ReadFile(f); err != nil || !bytes.Equal(got, frame) {
					t.Errorf("%s was changed: %v", f, err)
				}
			}
		})
	}
}

// TestPlain: chunks that desync has stored without compression.
func TestPlain(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir)
	id, frame := chunk(1, 100)
	plain, err := chunkstore.Decode(nil, frame, index.SHA256, index.Chunk{ID: id, Size: 100})
	if err != nil {
		t.Fatal(err)
	}
	file := strings.TrimSuffix(path(dir, id), suffix)
	write := func() {
		t.Helper()
		os.Mkdir(filepath.Dir(file), 0o755)
		if err := os.WriteFile(file, plain, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, stored []byte, entries int) {
		t.Helper()
		got, err := s.Get(t.Context(), id, nil)
		has, errHas := s.Has(t.Context(), id)
		if !bytes.Equal(got, stored) || (err == nil) != (stored != nil) || has != (stored != nil) || errHas != nil {
			t.Errorf("%s: got %d bytes, %v, Has %v, %v, want %d bytes", what, len(got), err, has, errHas, len(stored))
		}
		if n := len(ids(t, s)); n != entries {
			t.Errorf("%s: List: got %d chunks, want %d", what, n, entries)
		}
	}
	write()
	want("plain", plain, 1)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	want("both", frame, 1)
	if err := s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	want("removed", nil, 0)
	write()
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Stores: []chunkstore.Store{s}})
	defer f.Close()
	if got, err := f.Fetch(t.Context(), index.Chunk{ID: id, Size: 100}, nil); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("fetched: got %d bytes, %v", len(got), err)
	}
}

func TestListPassesOver(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir)
	id, frame := chunk(1, 100)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	other, _ := chunk(2, 100)
	shard := filepath.Dir(path(dir, id))
	for _, f := range []string{
		filepath.Join(shard, tempPrefix+"x"),
		filepath.Join(shard, other.String()+suffix), // in another's subdirectory
		filepath.Join(shard, id.String()),
		filepath.Join(shard, strings.ToUpper(id.String())+suffix),
		filepath.Join(shard, "x"+suffix),
		filepath.Join(dir, id.String()+suffix),
		filepath.Join(dir, "abcd"),
	} {
		if err := os.WriteFile(f, frame, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var got []index.ID
	for e, err := range s.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.ID)
	}
	if len(got) != 1 || got[0] != id {
		t.Errorf("got %v, want only %v", got, id)
	}
}

func TestOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	if _, err := Open(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: got %v, want %v", err, os.ErrNotExist)
	}
	if err := os.WriteFile(dir, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a file: got no error")
	}
	if _, err := Create(dir); err == nil {
		t.Error("a file: Create: got no error")
	}
}

// TestUnusable: a directory that could not be opened is an error of each call.
func TestUnusable(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	root.Close()
	s := New(root)
	id, frame := chunk(1, 100)
	if _, err := s.Get(t.Context(), id, nil); err == nil || errors.Is(err, chunkstore.ErrNotFound) {
		t.Errorf("Get: got %v", err)
	}
	if _, err := s.Has(t.Context(), id); err == nil {
		t.Error("Has: got no error")
	}
	if err := s.Put(t.Context(), id, frame); err == nil {
		t.Error("Put: got no error")
	}
	for _, err := range s.List(t.Context()) {
		if err == nil {
			t.Error("List: got no error")
		}
	}
	if err := s.Close(); err == nil {
		t.Error("Close: got no error")
	}
}

func TestLimit(t *testing.T) {
	dir := t.TempDir()
	free := create(t, dir)
	var frames [][]byte
	var ids []index.ID
	for i := range 4 {
		id, frame := chunk(uint64(i), 1000)
		ids, frames = append(ids, id), append(frames, frame)
	}
	n := int64(len(frames[0])) // random bytes of one length have stored forms of one length
	if err := free.Put(t.Context(), ids[0], frames[0]); err != nil {
		t.Fatal(err)
	}
	s := create(t, dir, WithLimit(3*n))
	for i := 1; i < 3; i++ {
		if err := s.Put(t.Context(), ids[i], frames[i]); err != nil {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	err := s.Put(t.Context(), ids[3], frames[3])
	if !errors.Is(err, chunkstore.ErrFull) {
		t.Errorf("chunk 3: got %v, want ErrFull", err)
	}
	if ok, err := s.Has(t.Context(), ids[3]); ok || err != nil {
		t.Errorf("chunk 3: Has: got %v, %v, want false", ok, err)
	}
	for i := range 3 {
		if _, err := s.Get(t.Context(), ids[i], nil); err != nil {
			t.Error(err)
		}
	}
}

// TestFailedPutIsNotCounted: what was not stored takes nothing of the limit.
func TestFailedPutIsNotCounted(t *testing.T) {
	s := create(t, t.TempDir(), WithLimit(1500))
	id, frame := chunk(1, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 5 {
		if err := s.Put(ctx, id, frame); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v, want %v", err, context.Canceled)
		}
	}
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Error(err)
	}
}

func mount(t *testing.T, source, fstype string, flags uintptr, data string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
		t.Fatalf("mount %s (needs root): %v", fstype, err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// TestNoSpace: a full disk is Put's error, leaves nothing half written, and
// passes.
func TestNoSpace(t *testing.T) {
	dir := mount(t, "tmpfs", "tmpfs", 0, "size=256k")
	s := create(t, dir)
	var stored []index.ID
	frames := make(map[index.ID][]byte)
	var err error
	for i := uint64(0); err == nil && i < 100; i++ {
		id, frame := chunk(i, 20000)
		if err = s.Put(t.Context(), id, frame); err == nil {
			stored = append(stored, id)
			frames[id] = frame
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("got %v, want %v", err, unix.ENOSPC)
	}
	if temps, _ := filepath.Glob(filepath.Join(dir, "*", ".*")); len(temps) > 0 {
		t.Errorf("left behind: %v", temps)
	}
	for _, id := range stored {
		if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frames[id]) {
			t.Errorf("chunk %s: got %d bytes, %v", id, len(got), err)
		}
	}
	if err := os.Remove(path(dir, stored[0])); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), stored[0], frames[stored[0]]); err != nil {
		t.Errorf("with space again: %v", err)
	}
}

func TestReadOnly(t *testing.T) {
	dir := mount(t, "tmpfs", "tmpfs", 0, "")
	s := create(t, dir)
	id, frame := chunk(1, 1000)
	other, _ := chunk(2, 1000)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), other, frame); !errors.Is(err, unix.EROFS) {
		t.Errorf("got %v, want %v", err, unix.EROFS)
	}
	if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

// TestGarbageCollected: casync gc removes a subdirectory as soon as it is
// empty, also under a writer's hands.
func TestGarbageCollected(t *testing.T) {
	dir := t.TempDir()
	s := create(t, dir)
	id, frame := chunk(1, 1000)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				os.Remove(path(dir, id))
				os.Remove(filepath.Dir(path(dir, id)))
				time.Sleep(10 * time.Microsecond)
			}
		}
	}()
	for range 100 {
		if err := s.Put(t.Context(), id, frame); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	<-done
}

// writeForEver puts chunk after chunk, until it is killed.
func writeForEver(dir string, opts ...Option) {
	s, err := Create(dir, opts...)
	if err != nil {
		panic(err)
	}
	for i := uint64(0); ; i++ {
		id, frame := chunk(i%50, 30000)
		if err := s.Put(context.Background(), id, frame); err != nil {
			panic(err)
		}
		if i%7 == 0 {
			if err := s.Flush(context.Background()); err != nil {
				panic(err)
			}
		}
	}
}

// TestKilled: a writer that is killed leaves complete chunks.
func TestKilled(t *testing.T) {
	t.Run("batched", func(t *testing.T) { testKilled(t, "BOOTFS_TEST_WRITE_BATCHED") })
	t.Run("one by one", func(t *testing.T) { testKilled(t, "BOOTFS_TEST_WRITE") })
}

func testKilled(t *testing.T, variable string) {
	dir := t.TempDir()
	for range 20 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), variable+"="+dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10*time.Millisecond + rand.N(40*time.Millisecond))
		cmd.Process.Kill()
		cmd.Wait()
		checkComplete(t, create(t, dir))
	}
	s := create(t, dir)
	n := 0
	for range s.List(t.Context()) {
		n++
	}
	if n == 0 {
		t.Error("got no chunks, want those that were written before the kills")
	}
}

// checkComplete checks that each chunk of s is one of writeForEver's.
func checkComplete(t *testing.T, s *Store) int {
	t.Helper()
	n := 0
	for e, err := range s.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		frame, err := s.Get(t.Context(), e.ID, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := chunkstore.Decode(nil, frame, index.SHA256, index.Chunk{ID: e.ID, Size: 30000}); err != nil {
			t.Error(err)
		}
		n++
	}
	return n
}

// TestPowerCut stops an ext4 in mid-flight, as a power cut would. What Put had
// returned for is there afterwards, and nothing else under a chunk's name.
func TestPowerCut(t *testing.T) {
	disk, dir := newDisk(t)
	for round := range 3 {
		run(t, "mount", "-o", "loop,commit=300", disk, dir)
		s, err := Create(filepath.Join(dir, "store"))
		if err != nil {
			t.Fatal(err)
		}
		before := checkComplete(t, s)
		if before != 10*round {
			t.Errorf("round %d: got %d chunks, want the %d that were put", round, before, 10*round)
		}
		for i := range 10 {
			id, frame := chunk(uint64(10*round+i), 30000)
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Fatal(err)
			}
		}
		cutPower(t, dir)
		s.Close()
		disk = restart(t, disk, dir)
	}
	run(t, "mount", "-o", "loop", disk, dir)
	s, err := Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if n := checkComplete(t, s); n != 30 {
		t.Errorf("got %d chunks, want the 30 that were put", n)
	}
}

// newDisk makes a file with an ext4 and a directory to mount it at.
func newDisk(t *testing.T) (disk, dir string) {
	t.Helper()
	disk = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", disk)
	dir = t.TempDir()
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return disk, dir
}

// restart unmounts a disk whose power was cut, and returns a copy of what has come
// to it. In a mount namespace that was made meanwhile somebody may have the
// file system for longer, and who mounts the disk then gets the one without power.
func restart(t *testing.T, disk, dir string) (copied string) {
	t.Helper()
	time.Sleep(200 * time.Millisecond) // the loop device has what it was given before the cut
	copied = disk + "+"
	run(t, "cp", "--sparse=always", disk, copied)
	run(t, "umount", dir)
	return copied
}

// cutPower loses all that the ext4 at dir has not written to its disk.
func cutPower(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN
		noLogFlush = 2
	)
	if err := unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noLogFlush); err != nil {
		t.Fatalf("ext4 shutdown: %v", err)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func BenchmarkGet(b *testing.B) {
	s := create(b, b.TempDir())
	id, frame := chunk(1, 30000)
	if err := s.Put(b.Context(), id, frame); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	var buf []byte
	for b.Loop() {
		var err error
		if buf, err = s.Get(b.Context(), id, buf[:0]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPut(b *testing.B) {
	for _, writers := range []int{1, 4, 16} {
		b.Run(fmt.Sprint("writers=", writers), func(b *testing.B) {
			s := create(b, b.TempDir())
			_, frame := chunk(1, 30000)
			b.SetBytes(int64(len(frame)))
			b.SetParallelism(writers / 2)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					var id index.ID
					for i := range id {
						id[i] = byte(rand.Uint32())
					}
					if err := s.Put(b.Context(), id, frame); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
