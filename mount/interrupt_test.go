package mount

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKilled(t *testing.T) {
	bit := func(s unix.Signal) uint64 { return 1 << (s - 1) }
	for _, test := range []struct {
		name                              string
		thread, process, blk, ign, caught uint64
		want                              bool
	}{
		{"nothing", 0, 0, 0, 0, 0, false},
		{"SIGKILL", bit(unix.SIGKILL), 0, 0, 0, 0, true},
		{"SIGKILL for the process", 0, bit(unix.SIGKILL), bit(unix.SIGTERM), 0, 0, true},
		{"SIGTERM", 0, bit(unix.SIGTERM), 0, 0, 0, true},
		{"SIGTERM behind a timer", 0, bit(unix.SIGTERM) | bit(unix.SIGALRM), 0, 0, bit(unix.SIGALRM), true},
		{"SIGTERM with a handler", 0, bit(unix.SIGTERM), 0, 0, bit(unix.SIGTERM), false},
		{"SIGTERM blocked", 0, bit(unix.SIGTERM), bit(unix.SIGTERM), 0, 0, false},
		{"SIGHUP ignored", 0, bit(unix.SIGHUP), 0, bit(unix.SIGHUP), 0, false},
		{"SIGURG of a Go program", bit(unix.SIGURG), 0, 0, 0, bit(unix.SIGURG), false},
		{"SIGSTOP", 0, bit(unix.SIGSTOP), 0, 0, 0, false},
		{"SIGCHLD", 0, bit(unix.SIGCHLD), 0, 0, 0, false},
		{"real-time", 0, 1 << 63, 0, 0, 0, true},
	} {
		status := fmt.Sprintf("Name:\tx\nSigQ:\t4/96365\nSigPnd:\t%016x\nShdPnd:\t%016x\nSigBlk:\t%016x\nSigIgn:\t%016x\nSigCgt:\t%016x\nCapInh:\t0\n",
			test.thread, test.process, test.blk, test.ign, test.caught)
		if got := killed([]byte(status)); got != test.want {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
	i := newInterrupts(-1)
	defer i.close()
	if i.final(uint32(os.Getpid())) {
		t.Error("this process is taken for killed")
	}
	if !i.final(0) || !i.final(1<<31) {
		t.Error("one that cannot be seen is taken for alive")
	}
}

// The device's descriptor is none of a child's standard streams.
func TestDeviceIsNotStdin(t *testing.T) {
	saved, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(0); err != nil {
		t.Fatal(err)
	}
	fd, err := openDevice()
	if err := unix.Dup3(saved, 0, 0); err != nil {
		t.Error(err)
	}
	_ = unix.Close(saved)
	if err != nil || fd < 3 {
		t.Fatalf("got descriptor %d, %v, want one above 2", fd, err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v, want FD_CLOEXEC", flags, err)
	}
	_ = unix.Close(fd)
}
