package fill

import (
	"bytes"
	"container/list"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
)

// files are those that have some of their chunks and want more.
type files struct {
	mu    sync.Mutex // guards what follows
	limit int        // descriptors beside those in use
	byNum map[uint32]*file
	idle  list.List // of *file that are open, the one used last in front
}

// file is a file of several chunks that is being written. It is open while it
// has users, and after them as long as there is room.
type file struct {
	opening sync.Mutex // held while it is made or opened again

	// Guarded by files.mu.
	number uint32
	users  int
	idle   *list.Element
	fd     int   // -1: not open
	left   int64 // bytes to come; -1: not known yet
	aside  bool  // it is in the state directory
}

func (s *files) init(limit int) {
	s.limit = limit
	s.byNum = map[uint32]*file{}
}

func (s *files) close() {
	for _, o := range s.byNum {
		if o.fd >= 0 {
			unix.Close(o.fd)
		}
	}
}

// use returns file number, which may have to be opened, until drop.
func (s *files) use(number uint32) *file {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.byNum[number]
	if o == nil {
		o = &file{number: number, fd: -1, left: -1}
		s.byNum[number] = o
	}
	o.users++
	if o.idle != nil {
		s.idle.Remove(o.idle)
		o.idle = nil
	}
	return o
}

func (s *files) drop(o *file) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.users--; o.users > 0 || o.fd < 0 {
		return
	}
	o.idle = s.idle.PushFront(o)
	for s.idle.Len() > s.limit {
		old := s.idle.Remove(s.idle.Back()).(*file)
		unix.Close(old.fd)
		old.fd, old.idle = -1, nil
	}
}

// wrote notes that n bytes of o are in place, and reports whether they were the
// last ones: then o is the caller's.
func (s *files) wrote(o *file, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.left -= n; o.left > 0 {
		return false
	}
	delete(s.byNum, o.number)
	return true
}

// put writes the chunk at position pos of the index to all places that it has
// in files.
func (f *filler) put(pos int, plain []byte) error {
	for at := uint32(pos); ; {
		c, err := f.x.At(int(at))
		if err != nil {
			return err
		}
		if !f.journal.has(int(at)) {
			if err := f.putAt(c, plain); err != nil {
				return err
			}
		}
		if at = f.same[at]; at == uint32(pos) {
			return nil
		}
	}
}

func (f *filler) putAt(c index.Chunk, plain []byte) error {
	return f.pieces(c, func(p piece) error {
		err := f.putPiece(p, plain[p.at:p.at+p.size])
		if err != nil {
			return fmt.Errorf("%s: %w", f.path(f.home(p.file)), err)
		}
		f.progress.add(int64(p.size))
		return nil
	})
}

func (f *filler) putPiece(p piece, b []byte) error {
	at := f.home(p.file)
	if f.dirTable[at.dir].skipped {
		return nil
	}
	name, _, err := f.entry(at)
	if err != nil {
		return err
	}
	d, err := f.dirs.get(at.dir)
	if err != nil {
		return err
	}
	defer f.dirs.put(d)
	if int64(p.size) == p.n.Size {
		err = f.putWhole(d.fd, name, p, b)
	} else {
		err = f.putPart(d.fd, name, p, b)
	}
	if errors.Is(err, errMounted) {
		return nil
	}
	return err
}

// putWhole makes a file of which all bytes are there.
func (f *filler) putWhole(dir int, name string, p piece, b []byte) error {
	mode := p.n.Mode & 0o777
	fd, aside, err := f.make(dir, name, p.file, mode)
	if err != nil {
		return err
	}
	err = writeAt(fd, b, 0)
	if err == nil && allZero(b) {
		err = unix.Ftruncate(fd, p.n.Size)
	}
	return f.complete(fd, aside, dir, name, p, mode, err)
}

// complete ends a file that has all its bytes.
func (f *filler) complete(fd int, aside bool, dir int, name string, p piece, created uint32, err error) error {
	if err == nil {
		err = f.finishFd(fd, p.n, created)
	}
	if failed := unix.Close(fd); err == nil {
		err = failed
	}
	if err == nil && aside && !f.home(p.file).last() {
		err = f.place(asideName(p.file), dir, name)
	}
	return err
}

// make makes file number: at its place if that is free, else aside.
func (f *filler) make(dir int, name string, number, mode uint32) (fd int, aside bool, err error) {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if !f.home(number).last() {
		fd, err = unix.Openat(dir, name, flags|unix.O_EXCL, mode)
		if !errors.Is(err, unix.EEXIST) {
			return fd, false, err
		}
	}
	// What a killed call has left of it may have been given another owner.
	if err := unlink(f.journal.fd(), asideName(number)); err != nil {
		return -1, false, err
	}
	fd, err = unix.Openat(f.journal.fd(), asideName(number), flags|unix.O_EXCL, mode)
	return fd, true, err
}

// putPart writes a part of a file.
func (f *filler) putPart(dir int, name string, p piece, b []byte) error {
	o := f.files.use(p.file)
	err := f.ready(o, dir, name, p.n)
	if err == nil {
		err = writeAt(o.fd, b, p.off)
	}
	if err != nil {
		f.files.drop(o)
		return err
	}
	if f.files.wrote(o, int64(p.size)) {
		return f.complete(o.fd, o.aside, dir, name, p, partMode, nil)
	}
	f.files.drop(o)
	return nil
}

// partMode is the mode of a file that is not complete.
const partMode = 0o600

// ready opens o, which is made if it has not been yet.
func (f *filler) ready(o *file, dir int, name string, n erofs.Inode) error {
	o.opening.Lock()
	defer o.opening.Unlock()
	if o.fd >= 0 {
		return nil
	}
	if o.left >= 0 { // it was closed to make room for others
		where := name
		if o.aside {
			dir, where = f.journal.fd(), asideName(o.number)
		}
		fd, err := unix.Openat(dir, where, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		f.files.set(o, fd, o.left, o.aside)
		return err
	}
	left, all, err := f.wanted(n, f.journal.has)
	if err != nil {
		return err
	}
	if left < all {
		fd, aside, err := f.reopen(dir, name, o.number, n)
		f.files.set(o, fd, left, aside)
		return err
	}
	fd, aside, err := f.make(dir, name, o.number, partMode)
	if err == nil {
		err = unix.Ftruncate(fd, n.Size)
	}
	f.files.set(o, fd, left, aside)
	return err
}

func (s *files) set(o *file, fd int, left int64, aside bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o.fd, o.left, o.aside = fd, left, aside
}

// reopen opens a file of which an earlier call has written a part.
func (f *filler) reopen(dir int, name string, number uint32, n erofs.Inode) (fd int, aside bool, err error) {
	const flags = unix.O_WRONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err = unix.Openat(f.journal.fd(), asideName(number), flags, 0)
	if aside = err == nil; !aside && errors.Is(err, unix.ENOENT) && !f.home(number).last() {
		fd, err = unix.Openat(dir, name, flags, 0)
	}
	if err != nil {
		return -1, false, fmt.Errorf("%w: %w", errStale, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != n.Size {
		unix.Close(fd)
		return -1, false, errStale
	}
	return fd, aside, nil
}

// writeAt writes b unless it is all zeros, which a new file has anyway.
func writeAt(fd int, b []byte, off int64) error {
	if allZero(b) {
		return nil
	}
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

var zeros [4096]byte

func allZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
