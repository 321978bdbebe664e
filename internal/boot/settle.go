package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// settle moves what is in from into to. What stands there already stays, but
// for links to boot, which have that content; directories are merged and get
// the attributes of those in from.
func settle(from, to int, link []byte) error {
	var st unix.Stat_t // before it loses what is in it
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	names, err := namesIn(from)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := unix.Renameat2(from, name, to, name, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // a file system that cannot tell
			if _, failed := lstatAt(to, name); errors.Is(failed, fs.ErrNotExist) {
				err = unix.Renameat(from, name, to, name)
			} else {
				err = unix.EEXIST
			}
		}
		if errors.Is(err, unix.EEXIST) {
			err = settleOver(from, to, name, link)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return likeDir(from, st, to)
}

// settleOver is settle for a name that is taken.
func settleOver(from, to int, name string, link []byte) error {
	inside, err := openDirAt(from, name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		if isLinkAt(to, name, link) {
			return unix.Renameat(from, name, to, name)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(inside)
	outside, err := openDirAt(to, name)
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
		return nil // something else stands there, or is mounted
	case err != nil:
		return err
	}
	defer unix.Close(outside)
	return settle(inside, outside, link)
}

func namesIn(dir int) ([]string, error) {
	d, err := os.Open(byDescriptor(dir))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func lstatAt(dir int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

// isLinkAt reports whether a file is a copy of the links to boot.
func isLinkAt(dir int, name string, link []byte) bool {
	st, err := lstatAt(dir, name)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || len(link) == 0 || st.Size != int64(len(link)) {
		return false
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	b := make([]byte, len(link))
	n, err := unix.Read(fd, b)
	return err == nil && string(b[:n]) == string(link)
}

// likeDir gives the directory to the attributes of from, whose stat is st.
func likeDir(from int, st unix.Stat_t, to int) error {
	at := byDescriptor(to)
	if err := unix.Chown(at, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("set its owner: %w", err)
	}
	if err := unix.Chmod(at, st.Mode&0o7777); err != nil {
		return fmt.Errorf("set its mode: %w", err)
	}
	if err := likeXattrs(byDescriptor(from), at); err != nil {
		return err
	}
	return setTime(to, st)
}

func setTime(dir int, st unix.Stat_t) error {
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, byDescriptor(dir), []unix.Timespec{st.Atim, st.Mtim}, 0); err != nil {
		return fmt.Errorf("set its time: %w", err)
	}
	return nil
}

// likeXattrs copies xattrs. Those of from are what could be set in this place.
func likeXattrs(from, to string) error {
	size, err := unix.Listxattr(from, nil)
	if err != nil || size <= 0 {
		return nil // a file system that has none
	}
	list := make([]byte, size)
	if size, err = unix.Listxattr(from, list); err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Getxattr(from, name, value)
		if err != nil || name == "security.selinux" {
			continue // the volume has a label of its own
		}
		if err := unix.Setxattr(to, name, value[:n], 0); err != nil {
			return fmt.Errorf("set its xattr %s: %w", name, err)
		}
	}
	return nil
}
