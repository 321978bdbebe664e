package boot

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMeetingOutlivesAFlood runs out of descriptors while a follower comes.
func TestMeetingOutlivesAFlood(t *testing.T) {
	dir := t.TempDir()
	m, err := claim(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claim(dir); err != errClaimed {
		t.Fatalf("a second claim: %v", err)
	}
	addr, err := meetingAddress(dir)
	if err != nil {
		t.Fatal(err)
	}
	follower, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(follower)

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	err = unix.Connect(follower, &unix.SockaddrUnix{Name: addr.Name})
	time.Sleep(2 * acceptPause)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}

	m.ready(wordS3)
	if err := unix.SetsockoptTimeval(follower, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 120}); err != nil {
		t.Fatal(err)
	}
	word := make([]byte, 1)
	if n, err := unix.Read(follower, word); n != 1 || word[0] != wordS3 {
		t.Errorf("the follower was not let go with the right word: %d, %v, %v", n, word, err)
	}
}
