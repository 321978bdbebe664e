package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/mount"
)

// root is the container's new root, standing.
type root struct {
	masks []mask // what the engine hides and protects below /proc
	top   int    // its directory, O_PATH
}

// makeRoot mounts the root image and a writable layer on it, brings the engine's
// mounts into it and puts it over the present root.
//
// The calling process keeps the present root. Every process that the engine
// brings into the container from now on starts in the new one, as setns leads
// to the topmost root.
func makeRoot(c *content, cwd string, log *logger) (*root, error) {
	engine, err := readMounts()
	if err != nil {
		return nil, err
	}
	// Nothing that happens in the root may show on the host, and move_mount
	// refuses shared parents. The app's /proc must go without the engine's, where
	// a volume with :rshared has made all of these peers. The volumes keep what
	// was asked for.
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE, ""); err != nil {
		return nil, whyNoMount(fmt.Errorf("the container may not mount: %w", err))
	}
	for _, point := range engine.points {
		if point != "/proc" && point != "/sys" && point != "/dev" {
			continue
		}
		if err := unix.Mount("", point, "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return nil, fmt.Errorf("make %s private: %w", point, err)
		}
	}
	if err := c.serve(bootimage.LowerPath); err != nil {
		return nil, whyNoMount(err)
	}
	if err := mountWritable(c.server, c.config.IndexDigest, engine.readOnly, log); err != nil {
		return nil, whyNoMount(errors.Join(err, c.server.Close()))
	}
	if err := c.server.Apart(engine.addAccounts); err != nil {
		return nil, err
	}
	// The overlay holds its layers by itself, and the cache is held by
	// descriptor: detached, they have no path in any namespace made from here.
	for _, dir := range engine.own {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return nil, fmt.Errorf("detach %s: %w", dir, err)
		}
	}
	if err := c.server.Detach(); err != nil {
		return nil, fmt.Errorf("detach the mount of the root image: %w", err)
	}
	top, err := unix.Open(bootimage.RootPath, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", bootimage.RootPath, err)
	}
	if err := c.server.Apart(func() error { return engine.copyInto(top, cwd) }); err != nil {
		return nil, err
	}
	if engine.readOnly {
		if err := unix.Mount("", bootimage.RootPath, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return nil, fmt.Errorf("make the root read-only: %w", err)
		}
	}
	if err := unix.MoveMount(top, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("switch the root: %w", err)
	}
	return &root{masks: engine.masks, top: top}, nil
}

// mountWritable mounts the overlay of the root image at bootimage.RootPath. Its
// upper layer lies in the volume, under the root's name, so that a volume that
// is carried to another version of the image starts afresh.
func mountWritable(lower *mount.Server, rootName string, readOnly bool, log *logger) error {
	if readOnly {
		return overlayOnTmpfs(lower, "size=4m")
	}
	dir, err := claimUpper(rootName, log)
	if err == nil {
		err = overlayIn(lower, dir)
	}
	if err == nil {
		return nil
	}
	if failed := overlayOnTmpfs(lower, ""); failed != nil {
		return failed
	}
	log.Warn(fmt.Sprintf("what the container writes is kept in memory: %v", err))
	return nil
}

// claimUpper returns the directory of the volume that holds the writable layer
// of the named root, locked for this container.
func claimUpper(rootName string, log *logger) (string, error) {
	const volume = bootimage.WritablePath
	var st unix.Statfs_t
	if err := unix.Statfs(volume, &st); err != nil {
		return "", fmt.Errorf("%s: %w", volume, err)
	}
	if st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return "", fmt.Errorf("no volume is mounted at %s", volume)
	}
	others, err := filepath.Glob(filepath.Join(volume, "root-*"))
	if err != nil {
		return "", err
	}
	dir := upperDir(rootName)
	if err := os.Mkdir(dir, 0o700); err == nil {
		if len(others) > 0 {
			log.Warn("the writable layer of another version of this image stays aside in its volume; this version starts with a fresh one")
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	// The lock lives as long as the descriptor, that is as long as boot.
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unix.Close(fd)
		return "", fmt.Errorf("another container uses the volume at %s: %w", volume, err)
	}
	return dir, nil
}

// upperDir is the directory of the volume for the writable layer of the named
// root.
func upperDir(rootName string) string {
	return filepath.Join(bootimage.WritablePath, "root-"+strings.TrimPrefix(rootName, "sha256:")[:32])
}

func overlayOnTmpfs(lower *mount.Server, options string) error {
	if err := unix.Mount("bootfs", bootimage.TmpPath, "tmpfs", 0, strings.Trim("mode=0700,"+options, ",")); err != nil {
		return fmt.Errorf("mount a tmpfs at %s: %w", bootimage.TmpPath, err)
	}
	if err := overlayIn(lower, bootimage.TmpPath); err != nil {
		return err
	}
	return unix.Unmount(bootimage.TmpPath, unix.MNT_DETACH)
}

// overlayIn mounts the overlay with its upper layer in dir.
func overlayIn(lower *mount.Server, dir string) error {
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return lower.Apart(func() error {
		// The root directory of an overlay shows the attributes of its upper layer.
		if err := likeLower(upper); err != nil {
			return err
		}
		return mount.Overlay(bootimage.RootPath, bootimage.LowerPath, upper, work)
	})
}

// likeLower gives a new upper directory the owner and mode of the lower root.
func likeLower(upper string) error {
	var st unix.Stat_t
	if err := unix.Stat(bootimage.LowerPath, &st); err != nil {
		return fmt.Errorf("%s: %w", bootimage.LowerPath, err)
	}
	if err := unix.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown %s: %w", upper, err)
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod %s: %w", upper, err)
	}
	return nil
}

// engineMounts is what the engine mounted in the container.
type engineMounts struct {
	readOnly bool     // --read-only
	points   []string // of the mounts on the root, as the engine made them
	own      []string // bootfs's own volumes, which the app must not see
	masks    []mask
}

// A mask is a mount below the engine's /proc that hides or protects a part of
// it. A new /proc has none of them.
type mask struct {
	Path  string
	Bind  bool    // the path itself, mounted with Flags; otherwise another file over it
	Flags uintptr // MS_RDONLY and the like
}

func readMounts() (*engineMounts, error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	return sortMounts(all)
}

func sortMounts(all []*mountinfo.Info) (*engineMounts, error) {
	root, err := rootMount(all)
	if err != nil {
		return nil, err
	}
	e := engineMounts{readOnly: mountFlags(root.Options)&unix.MS_RDONLY != 0}
	for _, m := range all {
		switch {
		case ownMount(m.Mountpoint):
			e.own = append([]string{m.Mountpoint}, e.own...) // innermost first, for unmounting
		case m.Parent == root.ID && m.ID != root.ID:
			e.points = append(e.points, m.Mountpoint)
		}
		if strings.HasPrefix(m.Mountpoint, "/proc/") {
			e.masks = append(e.masks, mask{Path: m.Mountpoint, Bind: m.FSType == "proc", Flags: mountFlags(m.Options)})
		}
	}
	return &e, nil
}

// rootMount returns the mount at /, the topmost of several.
func rootMount(mounts []*mountinfo.Info) (*mountinfo.Info, error) {
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint == "/" {
			return m, nil
		}
	}
	return nil, errors.New("read the mount table: no mount at /")
}

func ownMount(mountpoint string) bool {
	return strings.HasPrefix(mountpoint, bootimage.Dir+"/") || strings.HasPrefix(mountpoint, bootimage.SecretsPrefix)
}

func mountFlags(options string) uintptr {
	var flags uintptr
	for option := range strings.SplitSeq(options, ",") {
		switch option {
		case "ro":
			flags |= unix.MS_RDONLY
		case "nosuid":
			flags |= unix.MS_NOSUID
		case "nodev":
			flags |= unix.MS_NODEV
		case "noexec":
			flags |= unix.MS_NOEXEC
		}
	}
	return flags
}

// copyInto puts copies of the mounts to the same places below the directory
// top, and makes what the engine makes in a root. A place that the source image
// lacks is made.
//
// The mounts themselves stay in the engine's root. Boot reads some: its view of
// processes, and what the resolver follows when the engine connects the
// container to another network. And a process that the engine brought into the
// container before the switch keeps that root until its exec: it still needs
// /dev/null, /proc and the volume that it shall work in.
func (e *engineMounts) copyInto(top int, cwd string) error {
	for _, point := range e.points {
		if err := copyMount(top, point); err != nil {
			return fmt.Errorf("bring the mount at %s into the root: %w", point, err)
		}
	}
	// Programs ask this file whether they run in Docker.
	if _, err := os.Lstat("/.dockerenv"); err == nil {
		fd, err := place(top, "/.dockerenv", unix.S_IFREG|0o755)
		if err != nil {
			return fmt.Errorf("make /.dockerenv: %w", err)
		}
		unix.Close(fd)
	}
	// Docker and podman make this link, by which old programs find the mounts.
	if err := copyLink(top, "/etc/mtab"); err != nil {
		return fmt.Errorf("make /etc/mtab: %w", err)
	}
	fd, err := place(top, cwd, unix.S_IFDIR|0o755)
	if err != nil {
		return fmt.Errorf("make the working directory: %w", err)
	}
	return unix.Close(fd)
}

// maxAccounts is the size of the largest passwd or group that is looked into,
// in bytes.
const maxAccounts = 1 << 20

// engineAccounts returns the users and groups as the engine has them in its
// root: podman adds one to those of the image when it is told a user whom the
// image does not know.
func engineAccounts() (map[string][]byte, error) {
	texts := make(map[string][]byte)
	for _, p := range []string{"/etc/passwd", "/etc/group"} {
		if info, err := os.Lstat(p); err != nil || !info.Mode().IsRegular() || info.Size() > maxAccounts {
			continue
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return nil, err
		}
		texts[p] = text
	}
	return texts, nil
}

// addAccounts brings the users and groups of the engine into the new root.
func (e *engineMounts) addAccounts() error {
	texts, err := engineAccounts()
	for p, text := range texts {
		if !slices.Contains(e.points, p) {
			err = errors.Join(err, addAccount(p, text))
		}
	}
	if err != nil {
		return fmt.Errorf("bring the engine's users into the root: %w", err)
	}
	return nil
}

// addAccount makes text, which the engine has at p, that of the new root, if
// it is longer than in the image and nobody has changed that.
func addAccount(p string, text []byte) error {
	var was, is unix.Stat_t
	for dir, st := range map[string]*unix.Stat_t{bootimage.LowerPath: &was, bootimage.RootPath: &is} {
		fd, err := openInside(dir, p, unix.O_PATH)
		if err != nil {
			return nil // no file, or one by way of links
		}
		err = unix.Fstat(fd, st)
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if was.Mode&unix.S_IFMT != unix.S_IFREG || is.Size != was.Size || is.Mtim != was.Mtim || int64(len(text)) <= was.Size {
		return nil
	}
	// Emptied, it is not copied from the image: there is no network yet.
	fd, err := openInside(bootimage.RootPath, p, unix.O_WRONLY|unix.O_TRUNC)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), p)
	_, err = f.Write(text)
	return errors.Join(err, f.Close())
}

// openInside opens the file p below dir. Links are not followed.
func openInside(dir, p string, flags int) (int, error) {
	top, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(top)
	return unix.Openat2(top, p, &unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS})
}

// copyLink makes the symbolic link p of the engine's root below the directory
// top, where one is there and the source image has nothing in its place.
func copyLink(top int, p string) error {
	target, err := os.Readlink(p)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return err
	}
	dir, err := place(top, path.Dir(p), unix.S_IFDIR|0o755)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if err := unix.Symlinkat(target, dir, path.Base(p)); !errors.Is(err, unix.EEXIST) {
		return pathError(p, err)
	}
	return nil
}

func copyMount(top int, point string) error {
	from, err := unix.OpenTree(unix.AT_FDCWD, point, unix.OPEN_TREE_CLOEXEC|unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(from)
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	kind := uint32(unix.S_IFREG | 0o644)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		kind = unix.S_IFDIR | 0o755
	}
	to, err := place(top, point, kind)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	if err := unix.MoveMount(from, "", to, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// place opens the file p below the directory top, following symbolic links
// inside top only. It makes what is missing: the last component with the type
// and permissions in mode, directories above it.
func place(top int, p string, mode uint32) (int, error) {
	const maxLinks = 40
	for range maxLinks {
		how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
		fd, err := unix.Openat2(top, p, how)
		if !errors.Is(err, unix.ENOENT) {
			return fd, pathError(p, err)
		}
		parent, err := place(top, path.Dir(p), unix.S_IFDIR|0o755)
		if err != nil {
			return -1, err
		}
		err = makeFile(parent, path.Base(p), mode)
		if errors.Is(err, unix.EEXIST) {
			// A dangling link: the engine makes its target, so do we.
			p, err = linkTarget(parent, p)
		}
		unix.Close(parent)
		if err != nil {
			return -1, pathError(p, err)
		}
	}
	return -1, pathError(p, unix.ELOOP)
}

func makeFile(dir int, name string, mode uint32) error {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.Mkdirat(dir, name, mode&0o7777)
	}
	return unix.Mknodat(dir, name, mode, 0)
}

func linkTarget(dir int, p string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, path.Base(p), buf)
	if err != nil {
		return p, err
	}
	target := string(buf[:n])
	if path.IsAbs(target) {
		return target, nil
	}
	return path.Join(path.Dir(p), target), nil
}

func pathError(p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: "place", Path: p, Err: err}
}
