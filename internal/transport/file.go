package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/scratch"
)

// openRegular opens a file for reading that others may have put there: a FIFO
// in its place must not hang the caller.
func openRegular(root *os.Root, name string) (*os.File, int64, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", filepath.Join(root.Name(), name))
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// replacement is a file that takes the place of another in one step.
type replacement struct {
	*os.File
	path   string
	placed bool // it has its name
}

// What stands around the name of a file in the making.
const (
	temporaryPrefix = "."
	temporarySuffix = ".bootfs-"
)

// newReplacement starts the next content of path, in a file beside it: a
// rename works only within one filesystem.
func newReplacement(path string) (*replacement, error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s exists and is not a regular file", path)
	}
	for {
		f, err := os.CreateTemp(filepath.Dir(path), temporaryPrefix+filepath.Base(path)+temporarySuffix+"*")
		if err != nil {
			return nil, err
		}
		if ours(f) {
			return &replacement{File: f, path: path}, nil
		}
		f.Close() // sweep came between
	}
}

// ours locks a file in the making, which says that somebody is making it, and
// reports whether it still has its name then.
func ours(f *os.File) bool {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return false
	} // where there are no locks, nothing is swept
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 0
}

// sweep removes what killed processes left of the next content of path.
func sweep(path string) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), temporaryPrefix+filepath.Base(path)+temporarySuffix) {
			continue
		}
		name := filepath.Join(filepath.Dir(path), e.Name())
		f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.Remove(name)
		}
		f.Close()
	}
}

// commit puts the file in its place. Its content is on the disk before it has
// the name, and the name is before commit returns: a power cut leaves the old
// file or the new one.
func (r *replacement) commit(mode os.FileMode) error {
	err := errors.Join(r.Chmod(mode), r.Sync(), r.File.Close())
	if err == nil {
		err = os.Rename(r.Name(), r.path)
	}
	if err != nil {
		os.Remove(r.Name())
		return err
	}
	r.placed = true
	return syncDir(filepath.Dir(r.path))
}

// nameFile gives f, which has no name, that of path, where nothing is yet, as
// commit gives a replacement its. It fails where path is on another filesystem.
func nameFile(f *os.File, path string, mode os.FileMode) error {
	var file, dir unix.Stat_t
	err := errors.Join(unix.Fstat(int(f.Fd()), &file), unix.Stat(filepath.Dir(path), &dir))
	if err == nil && file.Dev != dir.Dev {
		err = unix.EXDEV
	}
	if err == nil {
		err = errors.Join(f.Chmod(mode), f.Sync())
	}
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
		return fmt.Errorf("name %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// abandon removes the file. It does nothing after a commit.
func (r *replacement) abandon() {
	if r.File.Close() == nil {
		os.Remove(r.Name())
	}
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// maxSpooled is how many bytes are spooled, as many as a layer may have.
const maxSpooled = 1 << 40

// spool copies r to a file without a name in dir, so that nothing stays behind
// however the process ends.
func spool(ctx context.Context, dir string, r io.Reader, progress func(int64)) (*os.File, int64, error) {
	f, err := scratch.File(dir)
	if err != nil {
		return nil, 0, err
	}
	n, err := io.Copy(f, io.LimitReader(&progressReader{ctx: ctx, r: r, progress: progress}, maxSpooled+1))
	if err == nil && n > maxSpooled {
		err = fmt.Errorf("it holds more than %d bytes: refused", maxSpooled)
	}
	if err != nil {
		f.Close()
		return nil, 0, scratch.Explain(dir, err)
	}
	return f, n, nil
}

// progressReader reports what passes, and ends with its context.
type progressReader struct {
	ctx      context.Context
	r        io.Reader
	progress func(int64)
}

func (p *progressReader) Read(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, context.Cause(p.ctx)
	}
	n, err := p.r.Read(b)
	if n > 0 {
		p.progress(int64(n))
	}
	return n, err
}
