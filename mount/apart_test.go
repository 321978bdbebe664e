package mount

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// apartServes is set in the process that TestApartIsKilled kills.
const apartServes = "BOOTFS_TEST_APART_SERVES"

// TestApartIsKilled kills a server while a thread of its own process waits for its
// answer.
func TestApartIsKilled(t *testing.T) {
	if os.Getenv(apartServes) != "" {
		waitForOneself(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestApartIsKilled$")
	cmd.Env = append(os.Environ(), apartServes+"=1", "TMPDIR="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS} // its mount ends with it
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	dev, err := strconv.ParseUint(strings.TrimSpace(said), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // the thread waits by now
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		t.Errorf("the process is still there")
		if err := abort(dev); err != nil {
			t.Fatal(err)
		}
		<-ended
	}
}

// waitForOneself serves a file, writes the device number of the mount once a read
// has come to the server, and never answers it.
func waitForOneself(t *testing.T) {
	root, _ := small()
	s := serve(t, root, func(o *Options) { o.ReadTimeout = -1 })
	s.image.set(func(context.Context, int64) error {
		fmt.Println(s.dev)
		select {}
	})
	t.Fatal(s.Apart(func() error {
		// Past the page cache: who waits for a page could be killed.
		fd, err := unix.Open(filepath.Join(s.dir, "dir/file"), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		page := make([]byte, 2*os.Getpagesize())
		at := os.Getpagesize() - int(uintptr(unsafe.Pointer(&page[0])))%os.Getpagesize()
		_, err = unix.Read(fd, page[at:at+os.Getpagesize()])
		return err
	}))
}

// TestApart: f has the descriptors of the process but for the device, and what it
// opens is not the process's.
func TestApart(t *testing.T) {
	root, content := small()
	s := serve(t, root, nil)
	shared, err := unix.Open(t.TempDir(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(shared)
	var st unix.Stat_t
	own := -1
	if err := s.Apart(func() error {
		if err := unix.Fstat(s.device, &st); err != unix.EBADF {
			t.Errorf("the device: got %v, want EBADF", err)
		}
		if err := unix.Fstat(shared, &st); err != nil {
			t.Errorf("a descriptor of the process: %v", err)
		}
		if got, err := os.Readlink(filepath.Join(s.dir, "link")); err != nil || got != "short" {
			t.Errorf("a link of the mount: got %q, %v", got, err)
		}
		var err error
		own, err = unix.FcntlInt(uintptr(shared), unix.F_DUPFD_CLOEXEC, 900)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(own, &st); err != unix.EBADF {
		t.Errorf("descriptor %d that f has opened: got %v, want EBADF", own, err)
	}
	if err := unix.Fstat(s.device, &st); err != nil {
		t.Errorf("the device, after it: %v", err)
	}
	if got, err := read(filepath.Join(s.dir, "dir/file")); err != nil || string(got) != string(content) {
		t.Errorf("a file, after it: %d bytes, %v", len(got), err)
	}
	if err := s.Apart(func() error { return unix.EXDEV }); err != unix.EXDEV {
		t.Errorf("got %v, want f's error", err)
	}
}
