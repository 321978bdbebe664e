package mount

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Apart calls f, which may touch what s serves, and returns its error.
//
// The kernel lets nobody go who waits for an answer that the server has begun to
// make, not even to die. A server that is killed makes none, and the kernel gives
// its requests up once the device is closed everywhere: never, if a thread that
// waits holds it, as threads share their descriptors. So f runs on a thread with
// descriptors of its own, which are those of the process without the device. What
// f opens is closed when it returns.
func (s *Server) Apart(f func() error) error {
	done := make(chan error)
	go func() { done <- apart(s.device, f) }()
	return <-done
}

// apart is called on a goroutine of its own, and ends its thread.
func apart(device int, f func() error) error {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread does not end before the process: it waits for another.
		defer runtime.UnlockOSThread()
		done := make(chan error)
		go func() { done <- apart(device, f) }()
		return <-done
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return fmt.Errorf("have descriptors of one's own: %w", err)
	}
	if err := unix.Close(device); err != nil {
		return fmt.Errorf("close a copy of the FUSE device: %w", err)
	}
	return f()
}
