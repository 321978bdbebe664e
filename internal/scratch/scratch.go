// Package scratch keeps temporary files that leave nothing behind, and looks
// whether there is room for them before they are written.
package scratch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNoSpace is wrapped by errors that say that a directory is too small.
var ErrNoSpace = errors.New("too little temporary space")

// Check compares the bytes that are needed in dir with what is left there.
// "" means os.TempDir().
func Check(dir string, need int64) error {
	dir = or(dir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNoSpace, dir, err)
	}
	if have := int64(st.Bavail) * int64(st.Bsize); have < need {
		return fmt.Errorf("%w: %s has %s free, about %s are needed", ErrNoSpace, dir, Bytes(have), Bytes(need))
	}
	return nil
}

// File returns a new file in dir that has no name there: it is gone when it
// is closed, however and whenever the process ends.
func File(dir string) (*os.File, error) {
	dir = or(dir)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(unnamed)")), nil
	}
	// Not all file systems can do that. Where they cannot, a process that is
	// killed between the next two calls leaves an empty file.
	f, err := os.CreateTemp(dir, "bootfs-*")
	if err != nil {
		return nil, Explain(dir, err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Explain makes err say that dir is full, if that is what it means.
func Explain(dir string, err error) error {
	full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
	if !full || errors.Is(err, ErrNoSpace) {
		return err
	}
	return fmt.Errorf("%w: %s: %w", ErrNoSpace, or(dir), err)
}

func or(dir string) string {
	if dir == "" {
		return os.TempDir()
	}
	return dir
}

// Bytes formats a size for people, in powers of 1000.
func Bytes(n int64) string {
	if n > -1000 && n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), ""
	for _, unit = range []string{"kB", "MB", "GB", "TB", "PB", "EB"} {
		f /= 1000
		if f > -999.5 && f < 999.5 {
			break
		}
	}
	if f > -9.95 && f < 9.95 {
		return fmt.Sprintf("%.1f %s", f, unit)
	}
	return fmt.Sprintf("%.0f %s", f, unit)
}
