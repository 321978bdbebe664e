// Package local keeps chunks in a directory, in casync's .castr layout: chunk
// abcd… is the file abcd/abcd….cacnk. casync and desync read and write the same
// directory. Chunks that they have stored plain, in files without the suffix,
// are read where there is none with it.
//
// The directory may be a cache that others write to at the same time, crash
// in, or fill with surprises. A chunk is there completely or not at all, also
// after a power cut; whatever else stands in its place is an error at once,
// never a wait. What the bytes are worth is the caller's to verify.
package local

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

const (
	suffix   = chunkstore.Suffix
	shardLen = chunkstore.ShardLen
)

// tempPrefix starts the name of a chunk that is being written. casync and
// desync pass over hidden files and over those without suffix.
const tempPrefix = ".tmp-"

// Store is a chunk store in a directory.
type Store struct {
	dir   *os.File // the directory; never replaced, so that renaming it does no harm
	err   error    // why dir is nil
	name  string
	limit int64 // bytes of stored chunks, 0: none

	batched  bool          // Put leaves the way to the disk to Flush
	flushing chan struct{} // holds a value while a Flush is under way

	mu     sync.Mutex // guards what follows
	held   int64      // bytes of stored chunks; -1 until they have been counted; only with a limit
	staged []index.ID // chunks that wait for Flush
}

// Option changes what New, Open or Create return.
type Option func(*Store)

// WithLimit makes Put fail with chunkstore.ErrFull once the store holds n bytes of stored
// chunks. Other writers to the same directory are not counted after the first
// Put: it is a bound for a private cache.
func WithLimit(n int64) Option {
	return func(s *Store) { s.limit = n }
}

// New returns the store in the directory that root holds. It keeps a
// descriptor of its own and never follows a symbolic link out of or within it.
func New(root *os.Root, opts ...Option) *Store {
	dir, err := root.Open(".")
	s := &Store{dir: dir, err: err, name: root.Name(), held: -1, flushing: make(chan struct{}, 1)}
	for _, o := range opts {
		o(s)
	}
	return s
}

// Open returns the store in the existing directory dir.
func Open(dir string, opts ...Option) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("chunk store: %w", err)
	}
	defer root.Close()
	s := New(root, opts...)
	if s.err != nil {
		return nil, fmt.Errorf("chunk store %s: %w", dir, s.err)
	}
	return s, nil
}

// Create is Open, and makes dir and its parents where they are missing.
func Create(dir string, opts ...Option) (*Store, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("chunk store: %w", err)
	}
	return Open(dir, opts...)
}

// Close releases the directory.
func (s *Store) Close() error {
	if s.err != nil {
		return s.err
	}
	return s.dir.Close()
}

// String returns the directory's path.
func (s *Store) String() string { return s.name }

// openShard opens the subdirectory that holds id.
func (s *Store) openShard(id index.ID) (int, error) {
	if s.err != nil {
		return -1, s.err
	}
	return openat(int(s.dir.Fd()), id.String()[:shardLen], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// Get appends the stored form of chunk id to dst.
func (s *Store) Get(_ context.Context, id index.ID, dst []byte) ([]byte, error) {
	out, err := s.read(id, dst)
	if err != nil {
		return dst, s.chunkError("read", id, err)
	}
	return out, nil
}

func (s *Store) read(id index.ID, dst []byte) ([]byte, error) {
	shard, err := s.openShard(id)
	if err != nil {
		return nil, err
	}
	defer unix.Close(shard)
	fd, size, err := openChunk(shard, id)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	start := len(dst)
	dst = slices.Grow(dst, int(size))[:start+int(size)]
	for n := start; n < len(dst); {
		m, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, dst[n:]) })
		if err != nil {
			return nil, err
		}
		if m == 0 {
			return nil, fmt.Errorf("got %d bytes, want %d: %w", n-start, size, io.ErrUnexpectedEOF)
		}
		n += m
	}
	return dst, nil
}

// Has reports whether chunk id is there, as a file that may be one.
func (s *Store) Has(_ context.Context, id index.ID) (bool, error) {
	_, err := s.stat(id)
	if err != nil && !isAny(err, unix.ENOENT) && !errors.Is(err, errNoChunk) {
		return false, s.chunkError("look for", id, err)
	}
	return err == nil, nil
}

func (s *Store) stat(id index.ID) (*unix.Stat_t, error) {
	shard, err := s.openShard(id)
	if err != nil {
		return nil, err
	}
	defer unix.Close(shard)
	for _, file := range places(id) {
		var st unix.Stat_t
		if err = unix.Fstatat(shard, file, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			err = checkStat(&st)
		}
		if err == nil {
			return &st, nil
		}
		if err != unix.ENOENT {
			break
		}
	}
	return nil, err
}

// places are the names under which a chunk may stand, in the order in which they
// are looked at: in its stored form, plain as casync may have written it, and
// staged.
func places(id index.ID) [staged + 1]string {
	name := id.String()
	return [...]string{stored: name + suffix, plain: name, staged: tempPrefix + name}
}

const (
	stored = iota
	plain
	staged
)

// openChunk opens the file of a chunk and returns its size.
func openChunk(shard int, id index.ID) (fd int, size int64, err error) {
	names := places(id)
	for _, file := range names {
		if fd, size, err = openRegular(shard, file); err != unix.ENOENT {
			if file == names[staged] && (err == unix.ELOOP || errors.Is(err, errNoChunk)) {
				err = unix.ENOENT // what a power cut has left there is no fault
			}
			break
		}
	}
	return fd, size, err
}

// openRegular opens a file that may be a chunk, and nothing else that stands in
// its place, and returns its size.
func openRegular(dir int, name string) (fd int, size int64, err error) {
	// Without O_NONBLOCK, opening a FIFO would wait for its writer.
	fd, err = openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, 0, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		err = checkStat(&st)
	}
	if err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, st.Size, nil
}

// errNoChunk is wrapped when a file stands in a chunk's place that cannot be one.
var errNoChunk = errors.New("not a stored chunk")

// checkStat says why a file cannot be a chunk.
func checkStat(st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%w: got file type %#o, want a regular file", errNoChunk, st.Mode&unix.S_IFMT)
	}
	if st.Size < 1 || st.Size > chunkstore.MaxStored {
		return fmt.Errorf("%w: got %d bytes, want 1 to %d", errNoChunk, st.Size, chunkstore.MaxStored)
	}
	return nil
}

// Put stores frame as chunk id, over whatever stands there: that is how
// damage heals.
func (s *Store) Put(ctx context.Context, id index.ID, frame []byte) error {
	if len(frame) < 1 || len(frame) > chunkstore.MaxStored {
		return s.chunkError("write", id, fmt.Errorf("got %d bytes, want 1 to %d", len(frame), chunkstore.MaxStored))
	}
	if err := s.reserve(ctx, int64(len(frame))); err != nil {
		return s.chunkError("write", id, err)
	}
	if err := s.write(ctx, id, frame); err != nil {
		s.release(int64(len(frame)))
		return s.chunkError("write", id, err)
	}
	if s.manyStaged() {
		return s.Flush(ctx)
	}
	return nil
}

func (s *Store) write(ctx context.Context, id index.ID, frame []byte) error {
	if s.err != nil {
		return s.err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	name := id.String()
	temp := tempPrefix + rand.Text()
	shard, fd, made, err := s.createTemp(name[:shardLen], temp)
	if err != nil {
		return err
	}
	defer shard.Close()
	at := int(shard.Fd())
	if err = write(fd, frame); err == nil && s.batched && s.stage(at, temp, id) {
		unix.Close(fd)
		return nil
	}
	// The fsync comes before the rename: otherwise a power cut may leave the
	// chunk's name with no bytes behind it.
	if err == nil {
		err = fsync(fd)
	}
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = renameOver(at, temp, name+suffix)
	}
	if err != nil {
		unix.Unlinkat(at, temp, 0)
		return err
	}
	if s.batched {
		return nil // a chunk that a power cut takes the name from is missed, no more
	}
	// Until the directories are on disk, the chunk has no name there.
	if made {
		if err := syncDir(s.dir); err != nil {
			return err
		}
	}
	return syncDir(shard)
}

// renameOver gives the file temp another name, also that of an empty directory,
// which somebody may have put there.
func renameOver(dir int, temp, name string) error {
	err := unix.Renameat(dir, temp, dir, name)
	if err == unix.EISDIR {
		if err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err == nil {
			err = unix.Renameat(dir, temp, dir, name)
		}
	}
	return err
}

// createTemp makes the file temp in the subdirectory shard, and returns both.
// made says that it made the subdirectory too.
func (s *Store) createTemp(shard, temp string) (dir *os.File, fd int, made bool, err error) {
	const tries = 16
	for range tries {
		switch err = unix.Mkdirat(int(s.dir.Fd()), shard, 0o755); err {
		case nil:
			made = true
		case unix.EEXIST:
		default:
			return nil, -1, false, err
		}
		dir, err = s.openDir(shard)
		if isAny(err, unix.ENOTDIR, unix.ELOOP) {
			// Somebody put a file or a link in the subdirectory's place.
			unix.Unlinkat(int(s.dir.Fd()), shard, 0)
			continue
		}
		if err == nil {
			fd, err = openat(int(dir.Fd()), temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o444)
			if err == nil {
				return dir, fd, made, nil
			}
			dir.Close()
		}
		// casync gc removes a subdirectory that it finds empty. That may happen
		// after it was made and before a file is in it.
		if err != unix.ENOENT {
			break
		}
	}
	return nil, -1, false, err
}

// syncDir makes the names in a directory durable, on file systems that can.
func syncDir(dir *os.File) error {
	if err := dir.Sync(); err != nil && !isAny(err, unix.EINVAL, unix.ENOTSUP) {
		return err
	}
	return nil
}

func write(fd int, frame []byte) error {
	for len(frame) > 0 {
		n, err := ignoringEINTR(func() (int, error) { return unix.Write(fd, frame) })
		if err != nil {
			return err
		}
		frame = frame[n:]
	}
	return nil
}

func fsync(fd int) error {
	_, err := ignoringEINTR(func() (int, error) { return 0, unix.Fsync(fd) })
	return err
}

// reserve counts n bytes against the limit.
func (s *Store) reserve(ctx context.Context, n int64) error {
	if s.limit == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held < 0 {
		held, err := s.count(ctx)
		if err != nil {
			return fmt.Errorf("count what is there: %w", err)
		}
		s.held = held
	}
	if s.held+n > s.limit {
		return fmt.Errorf("%w: %d of %d bytes are taken, %d more are wanted", chunkstore.ErrFull, s.held, s.limit, n)
	}
	s.held += n
	return nil
}

func (s *Store) release(n int64) {
	if s.limit == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held >= 0 {
		s.held -= n
	}
}

// count returns the bytes of all chunks.
func (s *Store) count(ctx context.Context) (int64, error) {
	var sum int64
	for e, err := range s.entries(ctx) {
		if err != nil {
			return 0, err
		}
		sum += e.Size
	}
	return sum, nil
}

// chunkError adds what was done to which file.
func (s *Store) chunkError(did string, id index.ID, err error) error {
	if isAny(err, unix.ENOENT) && did != "write" {
		err = chunkstore.ErrNotFound
	}
	shard, file := chunkstore.Place(id)
	return &chunkstore.Error{Store: s.name, Did: did + " chunk " + shard + "/" + file, Err: err, Retry: true}
}

// openDir opens a directory of the store, but no symbolic link to one.
func (s *Store) openDir(name string) (*os.File, error) {
	fd, err := openat(int(s.dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(s.name, name)), nil
}

// openat is openat(2), close-on-exec and tried again when a signal came.
func openat(dir int, name string, flags int, perm uint32) (int, error) {
	return ignoringEINTR(func() (int, error) { return unix.Openat(dir, name, flags|unix.O_CLOEXEC, perm) })
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}

func isAny(err error, errnos ...unix.Errno) bool {
	return slices.ContainsFunc(errnos, func(e unix.Errno) bool { return errors.Is(err, e) })
}
