package testenv

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// TestSSHD logs in as people do, and looks whether the server leaves anything.
func TestSSHD(t *testing.T) {
	const password = "s3cret word"
	s, err := StartSSHD(t.Context(), t.TempDir(), SSHDOptions{
		Password: password,
		Setup:    "useradd --password '*' --no-create-home --home-dir / alice; install -d -o alice /srv/alices",
	})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	t.Cleanup(func() {
		if !closed {
			s.Close()
		}
	})
	trusted := func() ssh.HostKeyCallback {
		_, _, key, _, _, err := ssh.ParseKnownHosts([]byte(s.HostKey))
		if err != nil {
			t.Fatal(err)
		}
		return ssh.FixedHostKey(key)
	}
	text, err := os.ReadFile(s.Key)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey(text)
	if err != nil {
		t.Fatal(err)
	}
	login := func(user string, method ssh.AuthMethod) (*ssh.Client, error) {
		return ssh.Dial("tcp", s.Address, &ssh.ClientConfig{
			User: user, Auth: []ssh.AuthMethod{method}, HostKeyCallback: trusted(), Timeout: time.Minute})
	}
	for user, method := range map[string]ssh.AuthMethod{"root": ssh.Password(password), "alice": ssh.PublicKeys(key)} {
		c, err := login(user, method)
		if err != nil {
			t.Fatalf("%s: %v\n%s", user, err, s.Log())
		}
		defer c.Close()
		session, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := session.Output("id -un; stat -c %U /srv/alices; command -v casync")
		if want := user + "\nalice\n/usr/bin/casync\n"; err != nil || string(out) != want {
			t.Errorf("%s: got %q, %v, want %q", user, out, err, want)
		}
	}
	if c, err := login("root", ssh.Password("wr0ng")); err == nil {
		c.Close()
		t.Error("a wrong password is accepted")
	}
	if _, err := os.Stat(filepath.Join(s.Srv, "alices")); err != nil {
		t.Error(err)
	}
	for _, host := range []string{"/etc/passwd", "/etc/shadow"} {
		if b, err := os.ReadFile(host); err != nil || bytes.Contains(b, []byte("alice:")) {
			t.Errorf("%s: %v, or the machine has the server's user", host, err)
		}
	}

	running := descendants(s.daemon.cmd.Process.Pid)
	closed = true
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if len(running) < 2 {
		t.Errorf("got processes %v for two connections", running)
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		out := alive(running)
		if len(out) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("processes of the connections live on: %v", out)
		}
	}

	// At the same address, with another key.
	was := s.HostKey
	if err := s.NewHostKey(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	closed = false
	if s.HostKey == was {
		t.Error("the host key is the old one")
	}
	if c, err := login("root", ssh.PublicKeys(key)); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

// alive returns those of pids that have not ended.
func alive(pids []int) []int {
	return slices.DeleteFunc(slices.Clone(pids), func(pid int) bool { return syscall.Kill(pid, 0) != nil })
}
