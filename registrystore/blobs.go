package registrystore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
)

// Blobs reads ranges of blobs by digest. It is safe for concurrent use.
type Blobs interface {
	// Range reads n bytes of the blob from byte off on: the reader gives
	// exactly these, or a *chunkstore.Error. Cancelling ctx ends it too. It must be
	// closed.
	Range(ctx context.Context, digest string, off, n int64) (io.ReadCloser, error)
	// String names the place for messages, without credentials.
	String() string
}

// Failed returns what Range returns when it could not read a blob of the place.
func Failed(place, digest string, err error) *chunkstore.Error {
	return &chunkstore.Error{Store: place, Did: "read blob " + digest, Err: err}
}

// ReadRange appends n bytes of a blob from byte off on to dst. On an error it
// returns dst with the bytes that came before it.
func ReadRange(ctx context.Context, b Blobs, digest string, off, n int64, dst []byte) ([]byte, error) {
	r, err := b.Range(ctx, digest, off, n)
	if err != nil {
		return dst, err
	}
	defer r.Close()
	dst = slices.Grow(dst, int(n))
	got, err := io.ReadFull(r, dst[len(dst):len(dst)+int(n)])
	return dst[:len(dst)+got], err
}

// checkDigest refuses what is not a SHA-256 digest, before it becomes part of
// a path or URL.
func checkDigest(digest string) error {
	digits, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(digits) != 64 || strings.Trim(digits, "0123456789abcdef") != "" {
		return fmt.Errorf("digest %.100q, want sha256: and 64 hex digits", digest)
	}
	return nil
}

// checkRange refuses what a slice could not hold.
func checkRange(digest string, off, n int64) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	if off < 0 || n < 0 || off > math.MaxInt64-n || n > math.MaxInt {
		return fmt.Errorf("%d bytes at %d", n, off)
	}
	return nil
}

// NewLayoutBlobs reads from the OCI layout in directory dir. It holds the
// directory, if that exists already: boot's mounts move after it was opened.
func NewLayoutBlobs(dir string) Blobs {
	l := &layoutBlobs{path: dir}
	l.dir, _ = os.Open(dir) // Range tries again
	return l
}

type layoutBlobs struct {
	path string
	dir  *os.File // nil: it was not there yet
}

func (l *layoutBlobs) String() string { return "oci:" + l.path }

// open opens a blob. A layout may be on a shared volume: neither a FIFO nor a
// symbolic link in the place of a blob is followed.
func (l *layoutBlobs) open(digest string) (*os.File, error) {
	dir := l.dir
	if dir == nil {
		var err error
		if dir, err = os.Open(l.path); err != nil {
			return nil, err
		}
		defer dir.Close()
	}
	name := filepath.Join("blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
	for {
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		name = filepath.Join(l.path, name)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

func (l *layoutBlobs) Range(ctx context.Context, digest string, off, n int64) (io.ReadCloser, error) {
	fail := func(err error) error { return Failed(l.String(), digest, err) }
	if err := checkRange(digest, off, n); err != nil {
		return nil, fail(err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fail(err)
	}
	f, err := l.open(digest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fail(fmt.Errorf("%w: no such blob in the layout", chunkstore.ErrNotFound))
	}
	if err != nil {
		return nil, fail(err)
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s is not a regular file", f.Name())
	case off+n > info.Size():
		err = fmt.Errorf("%d bytes at %d of a blob of %d", n, off, info.Size())
	}
	if err != nil {
		f.Close()
		return nil, fail(err)
	}
	return &fileRange{SectionReader: io.NewSectionReader(f, off, n), file: f, fail: fail}, nil
}

// fileRange is a range of an open file.
type fileRange struct {
	*io.SectionReader
	file *os.File
	fail func(error) error
}

func (r *fileRange) Read(p []byte) (int, error) {
	n, err := r.SectionReader.Read(p)
	if err != nil && err != io.EOF {
		err = r.fail(err)
	}
	return n, err
}

func (r *fileRange) Close() error { return r.file.Close() }
