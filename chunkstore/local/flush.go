package local

import (
	"context"
	"crypto/rand"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
)

// Batched makes Put return as soon as the chunk can be read, by everybody, and
// Flush see to it that it stays: for a cache, where a chunk that a power cut
// takes is fetched again, and neither a start nor a neighbour shall wait for the
// disk. A chunk that is not on disk yet has a hidden name, which Get, Has, List,
// Remove, Touch and Expire find and casync passes over. Sweep removes what a
// killed writer has left under one, unless somebody adopts it.
func Batched() Option {
	return func(s *Store) { s.batched = true }
}

const (
	// flushParallel fsyncs run at a time: the file system commits what several
	// wait for at the price of one.
	flushParallel = 16
	// flushGroup is how many chunks are opened at a time and begin their way to
	// the disk together.
	flushGroup = 64
	// stagedMost is how many chunks may wait for Flush before a Put waits, too.
	stagedMost = 1024
)

// stage gives the file temp in the directory shard the staged name of id, and
// reports whether it has it.
func (s *Store) stage(shard int, temp string, id index.ID) bool {
	names := places(id)
	if unix.Faccessat(shard, names[stored], unix.F_OK, unix.AT_SYMLINK_NOFOLLOW) == nil {
		return false // over what is damaged, which is found first
	}
	if unix.Renameat(shard, temp, shard, names[staged]) != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.staged = append(s.staged, id)
	return true
}

// Flush returns when the chunks whose Put has returned are on disk and have
// their names, or with the first error.
func (s *Store) Flush(ctx context.Context) error {
	select {
	case s.flushing <- struct{}{}:
		defer func() { <-s.flushing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	ids := s.staged
	s.staged = nil
	s.mu.Unlock()

	var first error
	for len(ids) > 0 {
		if err := ctx.Err(); err != nil {
			s.mu.Lock()
			s.staged = append(s.staged, ids...)
			s.mu.Unlock()
			return err
		}
		group := ids[:min(len(ids), flushGroup)]
		ids = ids[len(group):]
		if err := s.settle(group); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Adopt has the next Flush see to chunk id, too, which a writer that was killed
// may have left staged. The caller has found it to be good.
func (s *Store) Adopt(id index.ID) {
	shard, err := s.openShard(id)
	if err != nil {
		return // it is not there
	}
	defer unix.Close(shard)
	if unix.Faccessat(shard, places(id)[staged], unix.F_OK, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.staged = append(s.staged, id)
}

func (s *Store) manyStaged() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.staged) >= stagedMost
}

// settle brings staged chunks to disk and gives them their names.
func (s *Store) settle(ids []index.ID) error {
	files := make([]stagedFile, len(ids))
	for i, id := range ids {
		files[i] = s.openStaged(id)
	}
	work := make(chan *stagedFile, len(files))
	for i := range files {
		work <- &files[i]
	}
	close(work)
	var workers sync.WaitGroup
	for range min(len(files), flushParallel) {
		workers.Go(func() {
			for f := range work {
				if f.err == nil {
					f.err = f.settle()
				}
				f.close()
			}
		})
	}
	workers.Wait()
	var first error
	for _, f := range files {
		// Without its name it was removed, or another writer of the same chunk was
		// faster.
		if f.err == nil || isAny(f.err, unix.ENOENT) {
			continue
		}
		s.release(f.size)
		if first == nil {
			first = s.chunkError("write", f.id, f.err)
		}
	}
	return first
}

// stagedFile is a chunk on its way to the disk.
type stagedFile struct {
	id        index.ID
	shard, fd int // descriptors; -1: none
	size      int64
	err       error
}

func (s *Store) openStaged(id index.ID) stagedFile {
	f := stagedFile{id: id, fd: -1}
	if f.shard, f.err = s.openShard(id); f.err != nil {
		return f
	}
	if f.fd, f.size, f.err = openRegular(f.shard, places(id)[staged]); f.err == nil {
		// All of a group are on their way before the first one is waited for.
		// Where that cannot be, fsync does all of it.
		_ = unix.SyncFileRange(f.fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	}
	return f
}

func (f *stagedFile) close() {
	for _, fd := range []int{f.fd, f.shard} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// settle gives a chunk its name once it is on disk. Another process may stage
// the same chunk meanwhile, and then the staged name is that of a file that is
// not on disk. So that name goes first, and what it was is looked at.
func (f *stagedFile) settle() error {
	names := places(f.id)
	if err := fsync(f.fd); err != nil {
		unix.Unlinkat(f.shard, names[staged], 0)
		return err
	}
	temp := tempPrefix + rand.Text()
	if err := unix.Renameat(f.shard, names[staged], f.shard, temp); err != nil {
		return err
	}
	fd, _, err := openRegular(f.shard, temp)
	if err == nil {
		if !sameFile(f.fd, fd) {
			err = fsync(fd)
		}
		unix.Close(fd)
	}
	if err == nil {
		err = renameOver(f.shard, temp, names[stored])
	}
	if err != nil {
		unix.Unlinkat(f.shard, temp, 0)
	}
	return err
}

// sameFile reports whether two descriptors are of one file.
func sameFile(a, b int) bool {
	var x, y unix.Stat_t
	return unix.Fstat(a, &x) == nil && unix.Fstat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}
