package boot

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// followTimeout bounds how long an exec waits for a start that makes no
// progress.
const followTimeout = 60 * time.Second

// acceptPause is how long no follower is answered after one could not be.
const acceptPause = 50 * time.Millisecond

// dialPause is how long a follower waits before it looks for boot again.
const dialPause = 10 * time.Millisecond

// errClaimed says that another boot is making the root of this container.
var errClaimed = errors.New("another boot has this container")

// A meeting is where the boot of a container and the processes that the engine
// starts beside it find each other: an exec or a health check that arrives
// before the root stands runs boot through a link and must wait for the first.
//
// It is an abstract socket named after the boot image's directory (device and
// inode), which all processes of a container share and no two containers do:
// binding it decides atomically who is first, and the kernel gives it up with
// its owner.
type meeting struct {
	listener *net.UnixListener
	stands   chan struct{} // closed once the root stands
	word     byte          // that followers get then; one of those below
}

const (
	wordReady = 1
	wordS3    = 2 // ready, and the variables with credentials for S3 are boot's own
)

func meetingAddress(dir string) (*net.UnixAddr, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("@bootfs/%x/%x", st.Dev, st.Ino)}, nil
}

// execed reports whether the engine started the calling process beside the
// container's own: its parent is outside the PID namespace, and PID 1 is in the
// same mount namespace. On a busy machine such a process can get here before
// the container's own, whose part it must not take: it ends with its program.
//
// Where the PID namespace is the host's or another container's this cannot be
// told, and whoever claims first makes the root.
func execed() bool {
	if os.Getpid() == 1 || os.Getppid() != 0 {
		return false
	}
	first, err := rootMount(1)
	if err != nil {
		return false
	}
	own, err := rootMount(os.Getpid())
	return err == nil && own == first
}

// rootMount returns the ID of the mount at / as the process sees it. No two
// mounts of a machine have the same.
func rootMount(pid int) (int, error) {
	mounts, err := mountinfo.PidMountInfo(pid)
	if err != nil {
		return 0, err
	}
	for _, m := range mounts {
		if m.Mountpoint == "/" {
			return m.ID, nil
		}
	}
	return 0, fmt.Errorf("no mount at /")
}

// claim makes the calling process the boot of the container, or fails with
// errClaimed.
func claim(dir string) (*meeting, error) {
	addr, err := meetingAddress(dir)
	if err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", addr)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, errClaimed
	}
	if err != nil {
		return nil, fmt.Errorf("claim the container: %w", err)
	}
	m := &meeting{listener: l, stands: make(chan struct{}), word: wordReady}
	go m.answer()
	return m, nil
}

// answer holds each follower until the root stands, then writes it the word.
// A follower whose connection ends without it knows that boot failed.
func (m *meeting) answer() {
	for {
		conn, err := m.listener.Accept()
		if err != nil {
			// Descriptors can run out, as any neighbour on the network may connect.
			// A follower would wait for nothing if that ended the answers.
			time.Sleep(acceptPause)
			continue
		}
		go func() {
			defer conn.Close()
			<-m.stands
			_, _ = conn.Write([]byte{m.word})
		}()
	}
}

// ready lets the followers go. s3 says that the variables with credentials for
// S3 are boot's own.
func (m *meeting) ready(s3 bool) {
	if s3 {
		m.word = wordS3
	}
	close(m.stands)
}

// follow waits until the boot of the container has made the root, enters it and
// becomes c's program there. It returns only on failure.
func follow(dir string, c *caller) error {
	addr, err := meetingAddress(dir)
	if err != nil {
		return err
	}
	conn, err := dial(addr)
	if err != nil {
		return fmt.Errorf("reach the container's boot: %w", err)
	}
	if err := sameNamespaceRoot(conn); err != nil {
		return err
	}
	_ = conn.SetReadDeadline(time.Now().Add(followTimeout))
	word := make([]byte, 1)
	if _, err := io.ReadFull(conn, word); err != nil {
		return fmt.Errorf("wait for the container's root: boot ended or took more than %s: %w", followTimeout, err)
	}
	conn.Close()

	runtime.LockOSThread()
	if err := enterRoot(); err != nil {
		return err
	}
	if err := becomeUser(c.uid, c.gid, c.groups); err != nil {
		return err
	}
	return execProgram(c.program, c.argv, c.withoutOwnEnv(word[0] == wordS3).env, c.cwd)
}

// dial connects to the boot of the container, which may not have come to its
// claim yet.
func dial(addr *net.UnixAddr) (*net.UnixConn, error) {
	for deadline := time.Now().Add(followTimeout); ; time.Sleep(dialPause) {
		conn, err := net.DialUnix("unix", nil, addr)
		if err == nil || !errors.Is(err, unix.ECONNREFUSED) || time.Now().After(deadline) {
			return conn, err
		}
	}
}

// sameNamespaceRoot refuses an answer from a process that cannot be this
// container's boot: on the host's network, any process may take any name.
func sameNamespaceRoot(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) {
		peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if peerErr != nil {
		return fmt.Errorf("identify the container's boot: %w", peerErr)
	}
	if peer.Pid == 0 || peer.Uid != 0 {
		return fmt.Errorf("the meeting point of this container is held by a process of uid %d outside it: it cannot be started on this network namespace", peer.Uid)
	}
	return nil
}

// enterRoot moves the calling thread to the topmost root of its own mount
// namespace: the one that boot has put over the engine's. The thread must be
// locked and is good for nothing but exec afterwards.
func enterRoot() error {
	// setns refuses a thread that shares its root with others.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter the root: unshare: %w", err)
	}
	fd, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("enter the root: /proc/self/ns/mnt: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNS); err != nil {
		return whichCapability(fmt.Errorf("enter the root: setns: %w", err), capability.CAP_SYS_CHROOT)
	}
	return nil
}
