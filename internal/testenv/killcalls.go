package testenv

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// markCall is a system call that no program makes for other reasons.
const markCall = unix.SYS_SCHED_GET_PRIORITY_MIN

// MarkCalls says that the system calls which KillAtCall counts begin now.
func MarkCalls() { _, _, _ = unix.RawSyscall(markCall, 0, 0, 0) }

// KillAtCall starts cmd and kills it with SIGKILL as one of its threads enters
// the n-th system call, from 1, after it has called MarkCalls: that call is not
// made any more. killed is false if the process has ended by itself before.
func KillAtCall(cmd *exec.Cmd, n int) (killed bool, err error) {
	// A tracer is a thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	pid := cmd.Process.Pid
	defer cmd.Process.Release()
	defer unix.Kill(pid, unix.SIGKILL)
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return false, err
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(pid, options); err != nil {
		return false, err
	}
	calls := -1 // since the mark; -1: before it
	for next, signal := pid, 0; ; {
		if err := unix.PtraceSyscall(next, signal); err != nil && err != unix.ESRCH {
			return false, fmt.Errorf("go on after %d calls: %w", calls, err)
		}
		// Children of other threads are not ours to reap.
		if next, err = unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil); err != nil {
			return false, fmt.Errorf("wait after %d calls: %w", calls, err)
		}
		signal = 0
		switch {
		case next == pid && (status.Exited() || status.Signaled()):
			if status.ExitStatus() != 0 {
				err = fmt.Errorf("it ended after %d calls with status %d, signal %v", calls, status.ExitStatus(), status.Signal())
			}
			return false, err
		case !status.Stopped():
		case status.StopSignal() == unix.SIGTRAP|0x80:
			call, err := enters(next)
			if err != nil {
				return false, err
			}
			switch {
			case call < 0:
			case calls < 0 && call == markCall:
				calls = 0
			case calls >= 0:
				calls++
			}
			if calls == n {
				return true, killAll(pid)
			}
		case status.StopSignal() != unix.SIGTRAP && status.StopSignal() != unix.SIGSTOP:
			signal = int(status.StopSignal())
		}
	}
}

// enters returns the number of the system call that thread tid is about to
// make, -1 if it comes back from one.
func enters(tid int) (int64, error) {
	var info struct {
		op   uint8
		_    [7]byte
		_, _ uint64
		nr   uint64
		_    [7]uint64
	}
	const entry = 1 // PTRACE_SYSCALL_INFO_ENTRY
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	switch {
	case errno == unix.ESRCH:
		return -1, nil // killed meanwhile
	case errno != 0:
		return 0, errno
	case info.op != entry:
		return -1, nil
	}
	return int64(info.nr), nil
}

// killAll ends process pid and waits for all of its threads.
func killAll(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case got == pid && status.Signaled():
			return nil
		case got == pid && status.Exited():
			return fmt.Errorf("process %d ended with status %d", pid, status.ExitStatus())
		}
	}
}
