package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// containerRoot in the environment makes this program the first process of a
// container with that root: the least that an engine does.
const containerRoot = "BOOTFS_TEST_CONTAINER_ROOT"

// EnterContainer returns at once, unless this process was started by [StartTime].
// A program that calls that calls this first.
func EnterContainer() {
	if dir := os.Getenv(containerRoot); dir != "" {
		fmt.Fprintln(os.Stderr, "enter the container:", enterContainer(dir, os.Args[1:]))
		os.Exit(1)
	}
}

// enterContainer makes dir the root of this process's mount namespace, with
// /proc and /dev/fuse, prints the time and becomes the program.
func enterContainer(dir string, argv []string) error {
	dev := filepath.Join(dir, "dev")
	for _, step := range []func() error{
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, "") },
		func() error { return unix.Mount("proc", filepath.Join(dir, "proc"), "proc", 0, "") },
		func() error { return unix.Mount("tmpfs", dev, "tmpfs", 0, "") },
		func() error {
			return unix.Mknod(filepath.Join(dev, "fuse"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229)))
		},
		func() error { return unix.PivotRoot(dir, filepath.Join(dir, "mnt")) },
		func() error { return unix.Chdir("/") },
		func() error { return unix.Unmount("/mnt", unix.MNT_DETACH) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	fmt.Println(time.Now().UnixNano())
	return unix.Exec(argv[0], argv, []string{"PATH=/usr/local/bin:/usr/bin:/bin", "BOOTFS_PREFETCH=none"})
}

// StartTime runs argv in a container with the root dir, which has directories
// proc, dev and mnt, and returns how long it took from its exec to the
// program's own: argv must end in one that prints the time in nanoseconds.
func StartTime(ctx context.Context, dir string, argv ...string) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", argv...)
	cmd.Env = []string{containerRoot + "=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%v: %w\n%s", argv, err, stderr.String())
	}
	fields := strings.Fields(string(out))
	if len(fields) != 2 {
		return 0, fmt.Errorf("%v: got %q, want two times", argv, out)
	}
	from, err1 := strconv.ParseInt(fields[0], 10, 64)
	to, err2 := strconv.ParseInt(fields[1], 10, 64)
	return time.Duration(to - from), errors.Join(err1, err2)
}
