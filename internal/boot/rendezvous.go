package boot

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// followTimeout bounds how long an exec waits for a boot that says nothing;
// patienceEvery is how often one that is at work asks for patience.
const (
	followTimeout = 60 * time.Second
	patienceEvery = 10 * time.Second
)

// carryOnAfter is how long an exec waits for a boot that is not there before it
// carries on the fill that one has left. A boot that was killed while it put the
// last programs in place has perhaps put that in the place of its own link with
// which the container begins: then no boot comes.
const carryOnAfter = 5 * time.Second

// acceptPause is how long no follower is answered after one could not be.
const acceptPause = 50 * time.Millisecond

// dialPause is how long a follower waits before it looks for the boot again.
const dialPause = 10 * time.Millisecond

// errClaimed says that another boot is making the root of this container.
var errClaimed = errors.New("another boot has this container")

// errNoBoot says that there is none: not yet, or no longer.
var errNoBoot = errors.New("the container's boot is not there")

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
	reporter atomic.Pointer[reporter]
}

const (
	wordReady = 1
	wordS3    = 2 // ready, and the variables with credentials for S3 are boot's own
	wordWait  = 3 // not yet

	askStatus = 's' // is sent by who wants to know the status before the root stands
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
	first, err := lowestRoot(1)
	if err != nil {
		return false
	}
	own, err := lowestRoot(os.Getpid())
	return err == nil && own == first
}

// lowestRoot returns the ID of the mount at / as the process sees it. No two
// mounts of a machine have the same. Of several it is that of the engine, below the
// one that boot may put over it at this moment.
func lowestRoot(pid int) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, mountinfo.SingleEntryFilter("/"))
	if err != nil {
		return 0, err
	}
	if len(mounts) == 0 {
		return 0, fmt.Errorf("no mount at /")
	}
	return mounts[0].ID, nil
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
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Descriptors can run out, as any neighbour on the network may connect.
			// A follower would wait for nothing if that ended the answers.
			time.Sleep(acceptPause)
			continue
		}
		go func() {
			defer conn.Close()
			asked := make(chan struct{})
			go m.listen(conn, asked)
			patience := time.NewTicker(patienceEvery)
			defer patience.Stop()
			for {
				select {
				case <-m.stands:
					_, _ = conn.Write([]byte{m.word})
					return
				case <-asked:
					m.tell(conn)
					return
				case <-patience.C:
					if _, err := conn.Write([]byte{wordWait}); err != nil {
						return
					}
				}
			}
		}()
	}
}

// listen closes asked when the follower wants to know the status. Whoever is on
// the same network can connect: one in no PID namespace of this container is not
// answered. After the start the app could ask, too, and nobody is.
func (m *meeting) listen(conn net.Conn, asked chan struct{}) {
	var b [1]byte
	if _, err := conn.Read(b[:]); err != nil || b[0] != askStatus {
		return
	}
	if peer, err := peerOf(conn.(*net.UnixConn)); err == nil && peer.Pid != 0 {
		close(asked)
	}
}

// tell writes the status, unless the root stands by now: then that is what the
// follower is told.
func (m *meeting) tell(conn net.Conn) {
	_ = conn.SetWriteDeadline(time.Now().Add(tellTimeout))
	select {
	case <-m.stands:
		_, _ = conn.Write([]byte{m.word})
		return
	default:
	}
	if r := m.reporter.Load(); r != nil {
		_ = r.writeStatus(conn)
	}
}

// leave gives the container up to another boot.
func (m *meeting) leave() { m.listener.Close() }

// ready lets the followers go with word.
func (m *meeting) ready(word byte) {
	m.word = word
	close(m.stands)
}

// await waits at the meeting in dir for the word of the container's boot. It
// returns errNoBoot where there is none.
func await(dir string) (word byte, err error) {
	conn, err := dialMeeting(dir)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	for {
		_ = conn.SetReadDeadline(time.Now().Add(followTimeout))
		var b [1]byte
		switch _, err := io.ReadFull(conn, b[:]); {
		case errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET):
			return 0, errNoBoot
		case err != nil:
			return 0, fmt.Errorf("wait %s for the container's root: %w", followTimeout, err)
		case b[0] != wordWait:
			return b[0], nil
		}
	}
}

// dialMeeting reaches the container's boot at the meeting in dir. It returns
// errNoBoot where there is none.
func dialMeeting(dir string) (*net.UnixConn, error) {
	addr, err := meetingAddress(dir)
	if err != nil {
		return nil, err
	}
	conn, err := net.DialUnix("unix", nil, addr)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, errNoBoot
	}
	if err != nil {
		return nil, fmt.Errorf("reach the container's boot: %w", err)
	}
	if err := sameNamespaceRoot(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// follow enters the root that the boot of the container has mounted and becomes
// c's program there. It returns only on failure.
func follow(c *caller, s3 bool) error {
	runtime.LockOSThread()
	if err := enterRoot(); err != nil {
		return err
	}
	return c.withoutOwnEnv(s3).become()
}

// sameNamespaceRoot refuses an answer from a process that cannot be this
// container's boot: on the host's network, any process may take any name.
func sameNamespaceRoot(conn *net.UnixConn) error {
	peer, err := peerOf(conn)
	if err != nil {
		return fmt.Errorf("identify the container's boot: %w", err)
	}
	if peer.Pid == 0 || peer.Uid != 0 {
		return fmt.Errorf("the meeting point of this container is held by a process of uid %d outside it: it cannot be started on this network namespace", peer.Uid)
	}
	return nil
}

// peerOf returns who was at the other end when the connection was made. Its Pid
// is 0 if that is in no PID namespace of this container.
func peerOf(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) {
		peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return peer, peerErr
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
