package local

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
)

// Remove removes chunk id, or another file in its place. Its subdirectory goes
// with its last file, as casync gc has it.
func (s *Store) Remove(ctx context.Context, id index.ID) error {
	err := ctx.Err()
	if err == nil {
		err = s.remove(id)
	}
	if err != nil && !isAny(err, unix.ENOENT) {
		return s.chunkError("remove", id, err)
	}
	return nil
}

func (s *Store) remove(id index.ID) error {
	shard, err := s.openShard(id)
	if err != nil {
		return err
	}
	defer unix.Close(shard)
	name := id.String()
	for _, file := range places(id) {
		var st unix.Stat_t
		err := unix.Fstatat(shard, file, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil {
			err = unix.Unlinkat(shard, file, 0)
		}
		switch {
		case err == nil:
			s.release(st.Size)
		case err != unix.ENOENT:
			return err
		}
	}
	// It fails where there are other files, and a writer that has just made it
	// for its own makes it again.
	unix.Unlinkat(int(s.dir.Fd()), name[:shardLen], unix.AT_REMOVEDIR)
	return nil
}

// Touch makes chunk id as young as one that is written now.
func (s *Store) Touch(ctx context.Context, id index.ID) error {
	err := ctx.Err()
	if err == nil {
		err = s.touch(id)
	}
	if err != nil {
		return s.chunkError("touch", id, err)
	}
	return nil
}

func (s *Store) touch(id index.ID) error {
	shard, err := s.openShard(id)
	if err != nil {
		return err
	}
	defer unix.Close(shard)
	now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
	for _, file := range places(id) {
		err = unix.UtimesNanoAt(shard, file, now, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil {
			// A collector that looked at the old time may have taken the name away
			// while the new one was set, and removes the file.
			err = unix.Faccessat(shard, file, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW)
		}
		if err != unix.ENOENT {
			break
		}
	}
	return err
}

// Expire removes chunk id if it was last modified before then.
func (s *Store) Expire(ctx context.Context, id index.ID, then time.Time) (bool, error) {
	removed, err := false, ctx.Err()
	if err == nil {
		removed, err = s.expire(id, then)
	}
	if err != nil && !isAny(err, unix.ENOENT) {
		return removed, s.chunkError("remove", id, err)
	}
	return removed, nil
}

func (s *Store) expire(id index.ID, then time.Time) (removed bool, err error) {
	shard, err := s.openShard(id)
	if err != nil {
		return false, err
	}
	defer unix.Close(shard)
	for _, file := range places(id) {
		ok, err := s.expireFile(shard, file, then)
		if err != nil && err != unix.ENOENT {
			return removed, err
		}
		removed = removed || ok
	}
	if removed {
		unix.Unlinkat(int(s.dir.Fd()), id.String()[:shardLen], unix.AT_REMOVEDIR)
	}
	return removed, nil
}

// expireFile removes a file if it was last modified before then. Somebody may
// touch it between the look at its time and its removal; so it loses its name
// first, and gets it back if it turns out to be young.
func (s *Store) expireFile(shard int, file string, then time.Time) (bool, error) {
	if old, _, err := modifiedBefore(shard, file, then); err != nil || !old {
		return false, err
	}
	aside := tempPrefix + rand.Text()
	if err := unix.Renameat(shard, file, shard, aside); err != nil {
		return false, err
	}
	old, size, err := modifiedBefore(shard, aside, then)
	if err != nil {
		return false, err
	}
	if !old {
		err := unix.Renameat2(shard, aside, shard, file, unix.RENAME_NOREPLACE)
		if isAny(err, unix.EINVAL, unix.ENOSYS, unix.ENOTSUP) {
			err = unix.Renameat(shard, aside, shard, file) // over the same bytes, at worst
		}
		if err != unix.EEXIST {
			return false, err
		}
	}
	if err := unix.Unlinkat(shard, aside, 0); err != nil || !old {
		return false, err
	}
	s.release(size)
	return true, nil
}

// modifiedBefore reports whether a file was last modified before then.
func modifiedBefore(dir int, file string, then time.Time) (old bool, size int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, file, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, 0, err
	}
	return time.Unix(st.Mtim.Unix()).Before(then), st.Size, nil
}

// Sweep removes what killed writers have left.
func (s *Store) Sweep(ctx context.Context, then time.Time, dry bool) (files int, bytes int64, err error) {
	for shard, names := range s.shards(ctx, &err) {
		dir, openErr := openat(int(s.dir.Fd()), shard, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if openErr != nil {
			continue // removed meanwhile
		}
		for _, name := range names {
			if !strings.HasPrefix(name, tempPrefix) {
				continue
			}
			old, size, err := modifiedBefore(dir, name, then)
			if err == nil && old && !dry {
				err = unix.Unlinkat(dir, name, 0)
			}
			if err == nil && old {
				files, bytes = files+1, bytes+size
			}
		}
		unix.Close(dir)
		if !dry {
			unix.Unlinkat(int(s.dir.Fd()), shard, unix.AT_REMOVEDIR) // fails where there are other files
		}
	}
	if err != nil {
		err = fmt.Errorf("chunk store %s: sweep: %w", s.name, err)
	}
	return files, bytes, err
}
