package fill

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

// left collects what could not be made, by kind.
type left struct {
	mu   sync.Mutex
	seen map[string]bool
}

func (l *left) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen == nil {
		l.seen = map[string]bool{}
	}
	l.seen[line] = true
}

func (l *left) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for line := range l.seen {
		out = append(out, line)
	}
	slices.Sort(out)
	return out
}

// umask returns the process's file mode creation mask, all ones if it cannot
// be known without changing it.
func umask() uint32 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 1<<32 - 1
	}
	for line := range strings.Lines(string(b)) {
		if digits, ok := strings.CutPrefix(line, "Umask:"); ok {
			if mask, err := strconv.ParseUint(strings.TrimSpace(digits), 8, 12); err == nil {
				return uint32(mask)
			}
		}
	}
	return 1<<32 - 1
}

// finishFd gives the open file fd the attributes of n, in the one order in
// which none undoes another: chown clears setuid and capabilities, and every
// call but the last changes a time. created is the mode that the file was
// just made with, or 0.
func (f *filler) finishFd(fd int, n erofs.Inode, created uint32) error {
	if created == 0 || n.UID != f.owner.uid || n.GID != f.owner.gid {
		if err := unix.Fchown(fd, int(n.UID), int(n.GID)); err != nil {
			return fmt.Errorf("set its owner %d:%d: %w", n.UID, n.GID, err)
		}
	}
	if mode := n.Mode & 0o7777; created == 0 || created&0o7777&^f.owner.umask != mode {
		if err := unix.Fchmod(fd, mode); err != nil {
			return fmt.Errorf("set its mode %04o: %w", mode, err)
		}
	}
	if err := f.xattrs(n, func(name string, value []byte) error { return unix.Fsetxattr(fd, name, value, 0) }); err != nil {
		return err
	}
	// futimens: the C library's form of utimensat without a path.
	ts := times(n)
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0); errno != 0 {
		return fmt.Errorf("set its time: %w", errno)
	}
	return nil
}

// finishAt is finishFd of what cannot be opened.
func (f *filler) finishAt(dir int, name string, n erofs.Inode) error {
	if n.UID != f.owner.uid || n.GID != f.owner.gid {
		if err := unix.Fchownat(dir, name, int(n.UID), int(n.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set its owner %d:%d: %w", n.UID, n.GID, err)
		}
	}
	if n.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Fchmodat(dir, name, n.Mode&0o7777, 0); err != nil {
			return fmt.Errorf("set its mode %04o: %w", n.Mode&0o7777, err)
		}
	}
	// No call before Linux 6.13 sets xattrs by descriptor and name.
	path := "/proc/self/fd/" + strconv.Itoa(dir) + "/" + name
	if err := f.xattrs(n, func(x string, value []byte) error { return unix.Lsetxattr(path, x, value, 0) }); err != nil {
		return err
	}
	ts := times(n)
	if err := unix.UtimesNanoAt(dir, name, ts[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set its time: %w", err)
	}
	return nil
}

func times(n erofs.Inode) [2]unix.Timespec {
	t := unix.Timespec{Sec: n.MtimeSec, Nsec: int64(n.MtimeNsec)}
	return [2]unix.Timespec{t, t}
}

// xattrs calls set for each xattr of n. Those that cannot be set here are left,
// unless the disk is full or broken.
func (f *filler) xattrs(n erofs.Inode, set func(name string, value []byte) error) error {
	var failed error
	err := f.r.Xattrs(n, func(name string, value []byte) bool {
		if strings.HasPrefix(name, "trusted.overlay.") {
			return true // they would speak to a file system below, not to a program
		}
		err := set(name, value)
		switch {
		case err == nil:
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
			failed = fmt.Errorf("set its xattr %s: %w", name, err)
		default: // not here: for want of a capability, or of a file system that has them
			class, _, _ := strings.Cut(name, ".")
			if class == "security" {
				class = name // of which each has rules of its own
			} else {
				class += ".*"
			}
			f.left.add(fmt.Sprintf("xattrs %s: %v", class, err))
		}
		return failed == nil
	})
	if failed != nil {
		return failed
	}
	return err
}
