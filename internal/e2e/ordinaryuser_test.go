package e2e

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// nobody is a user without any rights, and his group.
const nobody = 65534

// TestOrdinaryUser converts as a user who is not root and has no daemon of his
// own: between registries, from an archive to a layout, and through a socket
// of the engine that he may use.
func TestOrdinaryUser(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "nobody")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	home, tmp := filepath.Join(dir, "home"), filepath.Join(dir, "tmp")
	for _, d := range []string{home, tmp} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(d, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program, boot := filepath.Join(dir, "bootfs-convert"), filepath.Join(dir, "boot")
	for from, to := range map[string]string{w.convert: program, w.boot: boot} {
		if out, err := exec.Command("install", "-m", "755", from, to).CombinedOutput(); err != nil {
			t.Fatalf("install: %v\n%s", err, out)
		}
	}
	bootfs := func(args ...string) (string, error) {
		cmd := exec.Command(program, append([]string{"-q"}, args...)...)
		cmd.Env = []string{"HOME=" + home, "TMPDIR=" + tmp, "PATH=" + os.Getenv("PATH"), "DOCKER_HOST=unix://" + filepath.Join(dir, "docker.sock")}
		cmd.Dir = home
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	archive := filepath.Join(dir, "source.tar")
	if out, err := exec.Command("skopeo", "--insecure-policy", "copy", "oci:"+w.layout, "docker-archive:"+archive+":python:source").CombinedOutput(); err != nil {
		t.Fatalf("skopeo: %v\n%s", err, out)
	}
	engine(t, filepath.Join(dir, "docker.sock"))
	store := filepath.Join(home, "store")
	for _, args := range [][]string{
		{"--boot", boot, w.source, w.proxy.address + "/nobody:registry"},
		{"--boot", boot, "docker-archive:" + archive, "oci:layout:1"},
		{"--boot", boot, "--store", store, "docker-daemon:" + w.source, "docker-daemon:nobody:daemon"},
		{"check", "docker-archive:" + archive, "oci:layout:1"},
		{"copy", "oci:layout:1", w.proxy.address + "/nobody:copied"},
	} {
		if out, err := bootfs(args...); err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	for _, args := range [][]string{
		{w.proxy.address + "/nobody:registry"},
		{"--env", "BLOB_STORE=registry://" + w.proxy.address + "/nobody", w.proxy.address + "/nobody:copied"},
		{"--volume", store + ":" + store + ":ro", "nobody:daemon"},
	} {
		runBeside(t, append(args, "python3", "-c", "import ssl; print('ok')")...).want(t, "ok\n")
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
	// What he may not do is told in a line.
	if err := os.Chown(filepath.Join(dir, "docker.sock"), 0, 0); err != nil {
		t.Fatal(err)
	}
	out, err := bootfs("--boot", boot, "docker-daemon:"+w.source, "oci:other:1")
	if err == nil || !strings.Contains(out, "no permission to use the Docker daemon") || strings.Count(out, "\n") != 1 {
		t.Errorf("without the right to the socket: %v, %s", err, out)
	}
}

// engine serves the engine at a socket of nobody's until the test ends.
func engine(t *testing.T, socket string) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.Chmod(socket, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(socket, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				d, err := net.Dial("unix", w.docker.Socket)
				if err != nil {
					return
				}
				defer d.Close()
				go func() {
					io.Copy(d, c)
					d.(*net.UnixConn).CloseWrite()
				}()
				io.Copy(c, d)
			}()
		}
	}()
}
