package main

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// comeAndGo are files of the kernel's that depend on what else the machine does
// at the moment, and the device that a container has for its own root.
var comeAndGo = regexp.MustCompile(`^/proc/([0-9]+|self|thread-self|net|fs/.+|irq|tty/driver|sys/net/.*/(conf|neigh)|sys/fs/binfmt_misc|sys/kernel/sched_domain)(/|$)|^/dev/(fuse|pts/.+)$`)

// kernelFiles opens every file of /proc and /dev for reading and for writing,
// and tells of /sys how its directories differ.
func kernelFiles() {
	try := func(path string, flags int) string {
		fd, err := unix.Open(path, flags|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return errorName(err)
		}
		check(unix.Close(fd))
		return "ok"
	}
	walk := func(top string, each func(path, outcome string)) {
		check(filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			switch {
			case comeAndGo.MatchString(path):
				if d != nil && d.IsDir() {
					return fs.SkipDir
				}
			case err != nil:
				each(path, errorName(err))
			case d.IsDir():
				// An empty file system over it hides what it holds.
				var st unix.Statfs_t
				check(unix.Statfs(path, &st))
				each(path, fmt.Sprintf("directory, read-only: %v, %#x", st.Flags&unix.ST_RDONLY != 0, st.Type))
			case d.Type()&fs.ModeSymlink == 0:
				each(path, try(path, unix.O_RDONLY)+" "+try(path, unix.O_WRONLY))
			}
			return nil
		}))
	}
	for _, top := range []string{"/proc", "/dev"} {
		walk(top, func(path, outcome string) { fmt.Println(path, outcome) })
	}
	kinds := map[string]bool{}
	walk("/sys", func(path, outcome string) {
		parts := strings.SplitN(path, "/", 5)
		kinds[strings.Join(parts[:min(len(parts), 3)], "/")+" "+outcome] = true
	})
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		fmt.Println(k)
	}
	mounts := strings.Split(string(got(os.ReadFile("/proc/self/mountinfo"))), "\n")
	var over []string
	for _, m := range mounts {
		if f := strings.Fields(m); len(f) > 5 && (strings.HasPrefix(f[4], "/proc") || strings.HasPrefix(f[4], "/sys")) {
			over = append(over, f[4]+" "+f[5])
		}
	}
	slices.Sort(over)
	fmt.Println(strings.Join(over, "\n"))
}
