package mount

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Overlay mounts on target a writable view of lower, whose changes go to
// upper; work is an empty directory on the same file system as upper, which
// must not be an overlay itself.
//
// Where the kernel lets it, a directory of lower can be renamed and a change of
// mode or owner copies no contents. An upper that was made that way needs it
// again.
func Overlay(target, lower, upper, work string) error {
	data := "lowerdir=" + escapeOption(lower) + ",upperdir=" + escapeOption(upper) + ",workdir=" + escapeOption(work)
	var failed error
	for _, more := range []string{
		",redirect_dir=on,metacopy=on",
		",userxattr", // in a user namespace, which has no trusted xattrs: without them nothing could be removed
		"",           // a kernel that knows none of these
	} {
		err := unix.Mount("overlay", target, "overlay", 0, data+more)
		if err == nil {
			return nil
		}
		if failed == nil {
			failed = err
		}
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPERM) {
			break
		}
	}
	return fmt.Errorf("mount an overlay of %s and %s on %s: %w", lower, upper, target, failed)
}

// escapeOption writes path such that overlayfs reads it as one path.
func escapeOption(path string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`, `:`, `\:`).Replace(path)
}
