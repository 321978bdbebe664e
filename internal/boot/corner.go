package boot

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/answer"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/mount"
)

const (
	// maxAsking is how many are told the status at a time.
	maxAsking = 8
	// tellTimeout bounds how long one of them takes to read it.
	tellTimeout = 5 * time.Second
)

// openCorner mounts bootimage.Dir in the root whose directory is top, with boot's
// binary, the socket of the status and, unless record is nil, that of the record. It
// shows in the mount namespace of boot, which is that of what the engine brings in;
// the app's was copied before. The root image has a place for it that nobody sees
// (mount.Options.Place).
//
// It is called while the app starts, so that it costs the start nothing.
func openCorner(s *mount.Server, top int, r *reporter, record *recorder) error {
	const tmp = bootimage.TmpPath
	if err := unix.Mount("bootfs", tmp, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0555,size=16k"); err != nil {
		return fmt.Errorf("mount a tmpfs at %s: %w", tmp, err)
	}
	sockets := []string{bootimage.SocketPath}
	if record != nil {
		sockets = append(sockets, bootimage.RecordPath)
	}
	ls, err := fillCorner(tmp, sockets)
	if err == nil {
		if err = s.Apart(func() error { return moveToCorner(tmp, top) }); err == nil {
			go serveStatus(ls[0], r)
			if record != nil {
				go record.answer(ls[1])
			}
			return nil
		}
	}
	for _, l := range ls {
		l.Close()
	}
	return errors.Join(err, unix.Unmount(tmp, unix.MNT_DETACH))
}

// moveToCorner moves the mount at dir to bootimage.Dir in the root whose directory
// is top.
func moveToCorner(dir string, top int) error {
	at, err := unix.Openat2(top, filepath.Base(bootimage.Dir), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return fmt.Errorf("%s in the root: %w", bootimage.Dir, err)
	}
	defer unix.Close(at)
	return unix.MoveMount(unix.AT_FDCWD, dir, at, "", unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// fillCorner makes what is in it, in dir. It returns a listener for each of
// sockets, also after an error those that there are.
func fillCorner(dir string, sockets []string) (ls []*net.UnixListener, err error) {
	binary := filepath.Join(dir, filepath.Base(bootimage.BootPath))
	if err := os.WriteFile(binary, nil, 0o555); err != nil {
		return nil, err
	}
	if err := unix.Mount(bootimage.BootPath, binary, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("bind %s: %w", bootimage.BootPath, err)
	}
	for _, s := range sockets {
		socket := filepath.Join(dir, filepath.Base(s))
		l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: socket})
		if err != nil {
			return ls, err
		}
		l.SetUnlinkOnClose(false) // by a name that is another's then
		ls = append(ls, l)
		if err := os.Chmod(socket, 0o666); err != nil {
			return ls, err
		}
	}
	for _, p := range []string{binary, dir} {
		err = errors.Join(err, unix.Mount("", p, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""))
	}
	if err != nil {
		return ls, fmt.Errorf("protect %s: %w", dir, err)
	}
	return ls, nil
}

// serveStatus writes the status to everybody who connects.
func serveStatus(l net.Listener, r *reporter) {
	answer.Each(l, maxAsking, tellTimeout, func(conn net.Conn) { _ = r.writeStatus(conn) })
}
