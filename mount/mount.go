// Package mount makes a root image a directory: [Serve] mounts it read-only
// through FUSE, [Overlay] puts a writable layer over it.
//
// The server answers everything but file contents out of the image's metadata,
// which is mapped memory, so a lookup or stat never waits for the network, and
// a read that does holds up nobody else. The kernel keeps what it was told:
// the image never changes, so names, attributes, symlinks and pages stay valid
// for ever. A read ends with the right bytes or with an errno within
// Options.ReadTimeout, and what failed is tried anew by the next read.
//
// A process must not touch what it serves: a page fault or a read of its own
// mount can wait for a thread that waits for it, and if it is killed then it never
// ends. Serve and Close keep to that, and the caller should; [Server.Apart] is for
// names and attributes, which no thread waits for.
package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

// DefaultReadTimeout is what Options.ReadTimeout means when it is 0.
const DefaultReadTimeout = 60 * time.Second

const (
	// The kernel reads ahead this much by default, and no more than maxRequest
	// at once, in bytes.
	defaultRequest = 128 << 10
	maxRequest     = 1 << 20

	// maxBackground is how many requests for read-ahead the kernel has under
	// way at once. Those that wait for the network must leave room for those
	// whose bytes are at hand; its default is 12.
	maxBackground = 64

	// closeWait bounds how long Close waits for the server to end. Aborting the
	// connection ends every read, but one that just begins may miss it and is
	// ended after missWait.
	closeWait = 5 * time.Second
	missWait  = 100 * time.Millisecond
)

// Image is the root image to be served.
type Image interface {
	// ReadAt fills p with the image's bytes from off: all of them, or it
	// returns an error. It returns soon after ctx ended.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}

// FileReader is implemented by images that fetch what follows in a file that is
// read.
type FileReader interface {
	// ReadFile is ReadAt of a file whose bytes go on until end in the image.
	ReadFile(ctx context.Context, p []byte, off, end int64) (int, error)
}

// Options of Serve.
type Options struct {
	Meta  []byte // the front region of the root image; must stay as it is until the server has stopped
	Image Image

	// XattrClasses are the classes of extended attributes that occur in the
	// image: "security", "system", "trusted", "user". The kernel asks for xattrs
	// often and does not keep the answers, so a class that is not listed is
	// answered without a look, and with none listed the kernel stops asking.
	XattrClasses []string

	// ReadTimeout bounds how long a read waits for its bytes; 0 is
	// DefaultReadTimeout, and less than 0 is no bound: a read then ends when it
	// has its bytes, is interrupted, or the mount is closed.
	ReadTimeout time.Duration
	// ReadAhead is how far the kernel reads ahead, in bytes, at most 1 MiB; 0
	// leaves its default of 128 KiB. A page fault reads as much around it, so
	// more is good for large files and bad for programs that are started from
	// a slow store. Where the kernel cannot be told of more, its default stays.
	// [Server.SetReadAhead] changes it.
	ReadAhead int

	// Place is the name of a directory of the root that is there only to mount
	// something on, which those see who have that mount. For everybody else no
	// file has the name, and none can be made of it. "" is for none.
	Place string

	Name string       // shown as the source of the mount; empty is "bootfs"
	Log  *slog.Logger // failed reads; nil is slog.Default
}

// Server serves one mount.
type Server struct {
	dir    string
	dev    uint64 // of the mount, as unix.Mkdev
	device int    // descriptor of /dev/fuse, go-fuse's
	held   int    // a copy of the mount, after Detach; else -1
	stop   context.CancelFunc
	done   chan struct{} // closed when nothing is served any more

	closing sync.Once
	err     error // of Close; set by closing
}

// Serve mounts the root image on dir and serves it until Close, or until the
// mount is gone. It returns when the mount can be used. The mount is read-only
// and open to all users, with the kernel checking modes and ACLs; setuid bits,
// file capabilities and device nodes work as on a disk.
//
// If the kernel refuses, errors.Is finds its errno: unix.ENOENT or unix.ENODEV
// without a FUSE device, unix.EPERM without the capability or the device's
// permission, unix.EACCES under a security module.
func Serve(dir string, o Options) (*Server, error) {
	meta, err := erofs.NewReader(o.Meta)
	if err != nil {
		return nil, fmt.Errorf("serve %s: %w", dir, err)
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if o.ReadTimeout == 0 {
		o.ReadTimeout = DefaultReadTimeout
	}
	if o.Name == "" {
		o.Name = "bootfs"
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	ctx, stop := context.WithCancel(context.Background())
	request := min(max(o.ReadAhead, defaultRequest), maxRequest)
	fs := newRootFS(ctx, meta, &o)
	server, err := connect(dir, request, &o, fs)
	if err != nil {
		stop()
		return nil, err
	}
	s := &Server{dir: dir, device: fs.interrupts.device, held: -1, stop: stop, done: make(chan struct{})}
	go func() {
		server.Serve()
		stop()
		fs.interrupts.close()
		close(s.done)
	}()
	s.dev, err = mountDev(dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve %s: %w", dir, err), unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH))
	}
	if o.ReadAhead > defaultRequest {
		if err := s.SetReadAhead(request); err != nil {
			o.Log.Debug("the kernel keeps its read-ahead", "mount", dir, "err", err)
		}
	}
	return s, nil
}

// SetReadAhead changes how far the kernel reads ahead in files that are opened from
// now on, in bytes. Not every container may do that.
func (s *Server) SetReadAhead(bytes int) error { return setReadAhead(s.dev, bytes) }

// connect mounts dir and returns the go-fuse server at the other end, which
// has greeted the kernel and not yet begun to serve.
func connect(dir string, request int, o *Options, fs *rootFS) (*fuse.Server, error) {
	fd, err := openDevice()
	if err != nil {
		return nil, err
	}
	// go-fuse could mount by itself, but opens the device such that a child
	// inherits it, and asks for nosuid and nodev and not for default_permissions.
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,default_permissions,allow_other,max_read=%d",
		fd, unix.S_IFDIR, os.Geteuid(), os.Getegid(), request)
	if err := unix.Mount(o.Name, dir, "fuse.bootfs", unix.MS_RDONLY, data); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("mount a FUSE file system on %s: %w", dir, err)
	}
	fs.interrupts = newInterrupts(fd)
	// From here on fd belongs to go-fuse, which closes it also when it fails.
	server, err := fuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		MaxWrite:                 request,
		MaxReadAhead:             o.ReadAhead, // the kernel's default is the most
		MaxBackground:            maxBackground,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		EnableAcl:                slices.Contains(o.XattrClasses, "system"),
		ExtraCapabilities:        fuse.CAP_NO_OPENDIR_SUPPORT,
		DisabledCapabilities:     fuse.CAP_PASSTHROUGH, // it would cost the overlay a level of stacking
		DisableSplice:            true,
		// It complains of answers that nobody waits for any more: of readers that
		// were killed.
		Logger: slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	})
	if err != nil {
		fs.interrupts.close()
		return nil, errors.Join(fmt.Errorf("serve %s: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH))
	}
	return server, nil
}

// openDevice opens a new connection to the kernel. No program that is started
// from here inherits it: who holds it keeps the mount alive and can read every
// request. Descriptors 0 to 2 are left alone: go-fuse does not take 0, and a
// child's standard streams are set to them.
func openDevice() (int, error) {
	const device = "/dev/fuse"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: device, Err: err}
	}
	if fd > 2 {
		return fd, nil
	}
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	_ = unix.Close(fd)
	if err != nil {
		return -1, &os.PathError{Op: "dup", Path: device, Err: err}
	}
	return high, nil
}

// Wait returns when the mount is gone and nothing is served any more.
func (s *Server) Wait() { <-s.done }

// Detach takes the mount from its directory, and goes on to serve who has it
// open or has mounted something on it, such as an overlay. It must not be called
// beside Close.
func (s *Server) Detach() error {
	held, err := unix.OpenTree(unix.AT_FDCWD, s.dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: s.dir, Err: err}
	}
	if err := unix.Unmount(s.dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		_ = unix.Close(held)
		return &os.PathError{Op: "unmount", Path: s.dir, Err: err}
	}
	s.held = held
	return nil
}

// Close ends the mount at once: it aborts the connection, so that reads under
// way fail instead of waiting for the network, and takes the mount from its
// directory. Who still holds files of it gets errors. It works as well when the
// mount has been moved or covered, given a fusectl file system or the rights
// to make one. Close returns when the server has stopped; it can be called
// again.
func (s *Server) Close() error {
	s.closing.Do(func() { s.err = s.close() })
	return s.err
}

func (s *Server) close() error {
	err := s.attach()
	if err == nil {
		err = s.unmount()
	}
	if err != nil {
		if abortErr := abort(s.dev); abortErr != nil {
			err = errors.Join(err, abortErr)
		} else {
			err = nil
		}
	}
	select {
	case <-s.done: // whoever unmounted it
		return nil
	case <-time.After(missWait):
	}
	s.stop()
	select {
	case <-s.done:
		return nil
	case <-time.After(closeWait):
		return errors.Join(fmt.Errorf("close the mount on %s: still serving after %v", s.dir, closeWait), err)
	}
}

// attach puts a detached mount back, as only a mount that has a directory can be
// made to abort its connection. In a user namespace there is no fusectl.
func (s *Server) attach() error {
	if s.held < 0 {
		return nil
	}
	defer unix.Close(s.held)
	if err := unix.MoveMount(s.held, "", unix.AT_FDCWD, s.dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: s.dir, Err: err}
	}
	return nil
}

// unmount aborts the connection and unmounts dir, if dir still shows this
// mount: another one there is not ours to take away.
func (s *Server) unmount() error {
	dev, err := mountDev(s.dir)
	if err != nil {
		return err
	}
	if dev != s.dev {
		return fmt.Errorf("unmount %s: another mount stands there", s.dir)
	}
	if err := unix.Unmount(s.dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: s.dir, Err: err}
	}
	return nil
}
