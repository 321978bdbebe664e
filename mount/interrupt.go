package mount

import (
	"bytes"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// interruptStep is how long a killed program waits at most until the server
// sees it.
const interruptStep = 50 * time.Millisecond

// interrupts tells what a FUSE INTERRUPT means. The kernel sends one when the
// waiting thread gets any signal, and only for the first. If it came for a
// timer, a child or a garbage collector, the read must go on: from a disk it
// would not fail either, many programs are not made for it, and a page fault
// has no way to try again. If it came to kill, the thread cannot die before it
// has its answer.
type interrupts struct {
	proc   int // descriptor of the directory /proc, to see who waits; -1 if there is none
	device int // descriptor of /dev/fuse, valid as long as requests are answered
}

// newInterrupts opens /proc now: later it may be reachable only through the
// mount itself.
func newInterrupts(device int) *interrupts {
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		proc = -1
	}
	return &interrupts{proc, device}
}

func (i *interrupts) close() {
	if i.proc >= 0 {
		_ = unix.Close(i.proc)
	}
}

// final reports whether nobody waits for the answer to thread tid any more: it
// is being killed, or the connection has ended. A thread that cannot be seen
// counts as one that is.
func (i *interrupts) final(tid uint32) bool {
	device := []unix.PollFd{{Fd: int32(i.device)}}
	if _, err := unix.Poll(device, 0); err == nil && device[0].Revents&unix.POLLERR != 0 {
		return true
	}
	if tid == 0 || i.proc < 0 {
		return true
	}
	fd, err := unix.Openat(i.proc, strconv.FormatUint(uint64(tid), 10)+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer func() { _ = unix.Close(fd) }()
	var buf [4096]byte
	n, err := unix.Read(fd, buf[:])
	return err != nil || killed(buf[:n])
}

// harmless are signals that do not end a program by themselves.
const harmless = 1<<(unix.SIGCHLD-1) | 1<<(unix.SIGCONT-1) | 1<<(unix.SIGURG-1) | 1<<(unix.SIGWINCH-1) |
	1<<(unix.SIGSTOP-1) | 1<<(unix.SIGTSTP-1) | 1<<(unix.SIGTTIN-1) | 1<<(unix.SIGTTOU-1)

// killed reports whether a signal is pending that ends the thread with this
// /proc/…/status.
func killed(status []byte) bool {
	mask := func(field string) uint64 {
		_, rest, _ := bytes.Cut(status, []byte("\n"+field+":\t"))
		digits, _, _ := bytes.Cut(rest, []byte("\n"))
		m, _ := strconv.ParseUint(string(digits), 16, 64)
		return m
	}
	pending := mask("SigPnd") | mask("ShdPnd")
	return pending&^(mask("SigBlk")|mask("SigIgn")|mask("SigCgt")|harmless) != 0
}
