package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// mountDev returns the device number of what is mounted on dir, without a
// question to the server of that mount.
func mountDev(dir string) (uint64, error) {
	var st unix.Statx_t
	flags := unix.AT_STATX_DONT_SYNC | unix.AT_NO_AUTOMOUNT | unix.AT_SYMLINK_NOFOLLOW
	if err := unix.Statx(unix.AT_FDCWD, dir, flags, 0, &st); err != nil {
		return 0, &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), nil
}

// setReadAhead sets how far the kernel reads ahead on the file system dev.
func setReadAhead(dev uint64, bytes int) error {
	name := fmt.Sprintf("class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev))
	return writeKernel("sysfs", "/sys", name, strconv.Itoa(bytes>>10))
}

// abort ends the FUSE connection of the file system dev: every request, under
// way or to come, fails.
func abort(dev uint64) error {
	name := fmt.Sprintf("%d/abort", unix.Minor(dev))
	return writeKernel("fusectl", "/sys/fs/fuse/connections", name, "1")
}

// writeKernel writes value to the file name of the file system fsType, which
// is mounted on dir, read-only or not at all in a container. Then it is
// mounted once more, on no directory, for the moment of the write.
func writeKernel(fsType, dir, name, value string) error {
	file := filepath.Join(dir, name)
	fd, err := unix.Open(file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		file = fsType + ":" + name
		fd, err = openDetached(fsType, name)
	}
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		_ = unix.Close(fd)
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: file, Err: err}
	}
	return nil
}

// openDetached opens the file name of a new mount of fsType for writing.
func openDetached(fsType, name string) (int, error) {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(root) }()
	return unix.Openat(root, name, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
}
