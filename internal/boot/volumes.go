package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/fill"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Engines initialise an empty volume with what the image has at the mount point
// when they create a container. Of a converted image they copy what the boot
// image has there, which is little, and boot brings the rest.
//
// What an engine has copied it from has the mark of the boot image: so boot
// knows of the engine itself that the volume was empty and that nobody asked for
// it to stay so. Where the boot image has no directory, nothing is copied and
// nothing is known: there, a volume of the engine's that is empty at the
// container's first start is taken for one, and gets the mark from boot.
//
// The mark goes when the volume is complete. Until then the content is made in
// the mark, out of sight, so that a start that was killed is carried on by the
// next one, and what others have put into the volume meanwhile stays.

// Names in the mark.
const (
	volumeTree  = "tree"  // the content, until it is complete
	volumeState = "state" // of its fill
)

const (
	// volumePause is how often boot looks whether another container has done
	// with a volume.
	volumePause = 50 * time.Millisecond
	// volumePatience is how long another container may fill a volume without
	// getting on: more than fill gives to a store.
	volumePatience = 2 * fill.DefaultPatience
)

// engineVolume matches the root of a volume's mount in mountinfo: Docker's and
// Podman's volumes/NAME/_data, nerdctl's volumes/NAMESPACE/NAME/_data. Neither a
// host's directory nor what Kubernetes mounts looks like that.
var engineVolume = regexp.MustCompile(`(^|/)volumes(/[^/]+){1,2}/_data$`)

// startedPath notes which container has been started: what docker commit makes
// of it is another one.
const startedPath = bootimage.Dir + "/started"

// volume is a volume to be initialised.
type volume struct {
	point string // where it is mounted, in the engine's root
	under string // what the source has there, without symlinks
	dir   int    // its root, writable, without what is mounted in it if possible
}

// initVolumes completes the volumes that the engine has initialised from the
// boot image.
func (c *content) initVolumes(ctx context.Context, out *console) error {
	volumes, err := c.newVolumes()
	if err != nil {
		return err
	}
	defer func() {
		for _, v := range volumes {
			unix.Close(v.dir)
		}
	}()
	for _, v := range volumes {
		if err := c.initVolume(ctx, v, out); err != nil {
			return fmt.Errorf("initialise the volume at %s: %w", v.point, err)
		}
	}
	return nil
}

// newVolumes returns the mounts that have the mark, and gives it to those that
// an engine would have initialised had it known what the source has there.
func (c *content) newVolumes() (marked []volume, err error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	var fresh []volume // which nobody has marked
	defer func() {
		for _, v := range fresh {
			unix.Close(v.dir)
		}
		if err != nil {
			for _, v := range marked {
				unix.Close(v.dir)
			}
			marked = nil
		}
	}()
	reader, err := erofs.NewReader(c.meta)
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, m := range slices.Backward(all) { // the topmost of several at one place
		_, known := slices.BinarySearch(c.config.Marked, m.Mountpoint)
		if m.Mountpoint == "/" || ownMount(m.Mountpoint) || seen[m.Mountpoint] || !known && !engineVolume.MatchString(m.Root) {
			continue
		}
		seen[m.Mountpoint] = true
		under, ok := resolveDir(reader, m.Mountpoint)
		if !ok {
			continue // and nothing to bring
		}
		isMarked := hasMark(m.Mountpoint)
		if !isMarked && (known || !isEmpty(m.Mountpoint, all)) {
			continue
		}
		v := volume{point: m.Mountpoint, under: under}
		v.dir, err = openVolume(m)
		if errors.Is(err, errElsewhere) {
			continue // nobody sees it
		}
		if err != nil {
			return nil, fmt.Errorf("initialise the volume at %s: %w", v.point, err)
		}
		if isMarked {
			marked = append(marked, v)
		} else {
			fresh = append(fresh, v)
		}
	}
	if len(fresh) == 0 || startedBefore(all) {
		return marked, nil
	}
	for len(fresh) > 0 {
		v := fresh[0]
		if err := unix.Mkdirat(v.dir, bootimage.VolumeMark, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("initialise the volume at %s: %w", v.point, err)
		}
		marked, fresh = append(marked, v), fresh[1:]
	}
	// From now on the marks say what is to do. A volume that the program empties
	// stays so when the container is restarted.
	if err := noteStarted(all); err != nil {
		return nil, fmt.Errorf("note that the container was started: %w", err)
	}
	return marked, nil
}

func hasMark(dir string) bool {
	info, err := os.Lstat(path.Join(dir, bootimage.VolumeMark))
	return err == nil && info.IsDir()
}

// isEmpty reports whether a volume holds nothing but places to mount other
// things at, which the engine has made. One that cannot be read is not empty.
func isEmpty(dir string, mounts []*mountinfo.Info) bool {
	d, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(100)
		for _, e := range entries {
			at := path.Join(dir, e.Name())
			var mounted, above bool
			for _, m := range mounts {
				mounted = mounted || m.Mountpoint == at
				above = above || strings.HasPrefix(m.Mountpoint, at+"/")
			}
			if !mounted && !(above && e.IsDir() && isEmpty(at, mounts)) {
				return false
			}
		}
		if err != nil {
			return len(entries) == 0
		}
	}
}

// resolveDir returns the path of the directory to which p leads in the image.
func resolveDir(r *erofs.Reader, p string) (string, bool) {
	type place struct {
		path string
		nid  uint64
	}
	end, err := tree.Follow(place{"/", r.RootNID()}, p, func(dir place, name string, _ bool) (next place, link string, err error) {
		n, err := r.Inode(dir.nid)
		if err != nil {
			return place{}, "", err
		}
		nid, err := r.Lookup(n, name)
		if err != nil {
			return place{}, "", err
		}
		if n, err = r.Inode(nid); err == nil && n.Mode&unix.S_IFMT == unix.S_IFLNK {
			var target []byte
			target, err = r.Readlink(n)
			link = string(target)
		}
		return place{path.Join(dir.path, name), nid}, link, err
	})
	if err != nil {
		return "", false
	}
	n, err := r.Inode(end.nid)
	return end.path, err == nil && n.IsDir()
}

// errElsewhere says that a path does not lead to what is mounted there.
var errElsewhere = errors.New("the path leads elsewhere")

// openVolume opens the root of a volume: by a mount of boot's own, which shows
// the directories below what is mounted in the volume, and is writable even
// where the program's is not. A container that may not mount has the program's.
func openVolume(m *mountinfo.Info) (int, error) {
	readOnly := mountFlags(m.Options)&unix.MS_RDONLY != 0
	fd, err := unix.Open(m.Mountpoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// Who shares a volume in which another one is mounted can put a symlink in
	// the place of that.
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err == nil && st.Mask&unix.STATX_MNT_ID != 0 && st.Mnt_id != uint64(m.ID) {
		unix.Close(fd)
		return -1, errElsewhere
	}
	if own, err := unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC); err == nil {
		if readOnly {
			err = unix.MountSetattr(own, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
		}
		if err == nil {
			unix.Close(fd)
			return own, nil
		}
		unix.Close(own)
	}
	if readOnly {
		unix.Close(fd)
		return -1, errors.New("it is mounted read-only, and boot may not change that: start the container once without \":ro\", or with --cap-add SYS_ADMIN")
	}
	return fd, nil
}

// startedBefore reports whether this container has noted that it was started.
func startedBefore(mounts []*mountinfo.Info) bool {
	b, err := os.ReadFile(startedPath)
	return err == nil && string(b) == containerName(mounts)
}

// noteStarted writes the note, also below --read-only.
func noteStarted(mounts []*mountinfo.Info) error {
	at, err := rootMount(mounts)
	if err != nil {
		return err
	}
	root, err := openVolume(at)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	return os.WriteFile(path.Join(byDescriptor(root), startedPath), []byte(containerName(mounts)), 0o600)
}

// containerName tells the container's root from that of others: an overlay's
// upper directory stays the same for all its life.
func containerName(mounts []*mountinfo.Info) string {
	root, err := rootMount(mounts)
	if err != nil {
		return ""
	}
	for option := range strings.SplitSeq(root.VFSOptions, ",") {
		if dir, ok := strings.CutPrefix(option, "upperdir="); ok {
			return dir
		}
	}
	return ""
}

// initVolume completes a volume, unless another container does or has done it.
func (c *content) initVolume(ctx context.Context, v volume, out *console) error {
	meter := newMeter(out, "filling the volume at "+v.point) // or waiting for who does
	defer meter.stop()
	mark, err := lockMark(ctx, v.dir)
	if err != nil || mark < 0 {
		return err
	}
	defer unix.Close(mark)
	if err := unix.Mkdirat(mark, volumeTree, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	tree, err := openDirAt(mark, volumeTree)
	if err != nil {
		return fmt.Errorf("%s/%s: %w", bootimage.VolumeMark, volumeTree, err)
	}
	defer unix.Close(tree)
	report, err := fill.Root(ctx, byDescriptor(tree), fill.Options{
		Meta: c.meta, Index: c.index, Fetcher: c.fetcher, Order: c.packOrder(),
		Under: v.under, State: path.Join(byDescriptor(mark), volumeState),
		Patience: c.patience(), Progress: meter.set, Log: c.log,
	})
	if err != nil {
		if inner := errors.Unwrap(err); inner != nil {
			err = inner // without the path of a descriptor
		}
		return err
	}
	for _, line := range report.Left {
		c.log.Warn("not in the volume at " + v.point + ": " + line)
	}
	var st unix.Stat_t
	if err := unix.Fstat(tree, &st); err != nil {
		return err
	}
	link, _ := os.ReadFile(bootimage.LinkPath) // none: no links
	if err := settle(tree, v.dir, link); err != nil {
		return err
	}
	for _, at := range c.config.Marked {
		if below, ok := strings.CutPrefix(at, strings.TrimSuffix(v.under, "/")+"/"); ok {
			removeMark(v.dir, below)
		}
	}
	// All that is in its place has reached the disk, and so does in this order
	// what is done to directories: where the mark is gone, nothing else is missing.
	if err := os.RemoveAll(path.Join(byDescriptor(v.dir), bootimage.VolumeMark)); err != nil {
		return err
	}
	c.log.Info("a volume is initialised", "at", v.point, "files", report.Files, "bytes", report.Bytes+report.Resumed)
	return setTime(v.dir, st)
}

// packOrder is the order in which the packs hold the chunks, nil where they lie
// in loose stores.
func (c *content) packOrder() iter.Seq[int] {
	if c.locators == nil {
		return nil
	}
	return c.locators.PackOrder()
}

// lockMark opens the mark of a volume for this boot alone, or returns -1 when
// there is none any more. The lock goes with the descriptor, that is with boot.
func lockMark(ctx context.Context, volume int) (int, error) {
	var (
		last  [2]unix.Stat_t
		since = time.Now()
	)
	for {
		mark, err := openDirAt(volume, bootimage.VolumeMark)
		if errors.Is(err, fs.ErrNotExist) {
			return -1, nil
		}
		if err != nil {
			return -1, fmt.Errorf("%s: %w", bootimage.VolumeMark, err)
		}
		var held, named unix.Stat_t
		err = unix.Flock(mark, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) { // a file system without locks has no second container either
			err = unix.Fstat(mark, &held)
			if err == nil {
				err = unix.Fstatat(volume, bootimage.VolumeMark, &named, unix.AT_SYMLINK_NOFOLLOW)
			}
			if err == nil && held.Ino == named.Ino {
				return mark, nil
			}
			unix.Close(mark)
			continue // it was removed before we had it
		}
		// Whoever has it makes these two change.
		var now [2]unix.Stat_t
		_ = unix.Fstat(mark, &now[0])
		_ = unix.Fstatat(mark, volumeState+"/journal", &now[1], 0)
		unix.Close(mark)
		if now[0].Mtim != last[0].Mtim || now[1].Mtim != last[1].Mtim {
			last, since = now, time.Now()
		}
		if time.Since(since) > volumePatience {
			return -1, fmt.Errorf("another container has been doing that for %s without getting on", volumePatience)
		}
		select {
		case <-ctx.Done():
			return -1, ctx.Err()
		case <-time.After(volumePause):
		}
	}
}

// openDirAt opens a directory that is no symlink and nothing mounted.
func openDirAt(dir int, name string) (int, error) {
	return unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
}

// removeMark removes the mark of a directory below dir, and leaves its time as
// it is.
func removeMark(dir int, below string) {
	at, err := openDirAt(dir, below)
	if err != nil {
		return
	}
	defer unix.Close(at)
	var st unix.Stat_t
	if unix.Fstat(at, &st) == nil && unix.Unlinkat(at, bootimage.VolumeMark, unix.AT_REMOVEDIR) == nil {
		_ = setTime(at, st) // nothing depends on it
	}
}

// removeMarks removes the marks from the root, before it is filled.
func (c *content) removeMarks() {
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(root)
	for _, at := range c.config.Marked {
		removeMark(root, strings.TrimPrefix(at, "/"))
	}
}
