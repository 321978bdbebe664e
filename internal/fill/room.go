package fill

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/scratch"
)

// ErrNoSpace is wrapped by errors that say that the root is too small.
var ErrNoSpace = errors.New("too little space")

// room compares what is to come with what is left in dir.
func (f *filler) room(dir string) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.dirs.root, &st); err != nil {
		return err
	}
	need := f.progress.total - f.progress.resumed
	if have := int64(st.Bavail) * int64(st.Bsize); have < need {
		return fmt.Errorf("%w: %s is needed, %s is free", ErrNoSpace, scratch.Bytes(need), scratch.Bytes(have))
	}
	return nil
}

// explain makes err say what a full disk means.
func explain(dir string, err error) error {
	if errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	free := "none"
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil {
		free = scratch.Bytes(int64(st.Bavail) * int64(st.Bsize))
	}
	return fmt.Errorf("%w: %w: %s is free; what is in place stays, and the next start goes on from there", ErrNoSpace, err, free)
}

// openFiles is how many descriptors each of the two sets may keep open.
func openFiles() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 8
	}
	// Half of them are for connections, and for what is in use.
	return int(min(max(l.Cur/4, 4), 256))
}
