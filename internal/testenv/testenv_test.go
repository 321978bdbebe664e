package testenv

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEverything takes an image of several layers through a registry and an
// engine, as the end-to-end tests do, without bootfs between.
func TestEverything(t *testing.T) {
	ctx := t.Context()
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	cache.Log = t.Output()
	image, err := cache.PythonImage(ctx)
	if err != nil {
		t.Fatal(err)
	}
	small, err := cache.ScratchImage(ctx)
	if err != nil {
		t.Fatal(err)
	}

	dir := shortDir(t)
	reg, err := StartRegistry(ctx, filepath.Join(dir, "registry"), "")
	if err != nil {
		t.Fatal(err)
	}
	closeAtEnd(t, reg)
	docker, err := StartDocker(ctx, filepath.Join(dir, "docker"))
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	t.Cleanup(func() {
		if !closed {
			docker.Close()
		}
	})

	python, scratch := reg.Address+"/test/python:1", reg.Address+"/test/scratch:1"
	for ref, layout := range map[string]string{python: image, scratch: small} {
		if err := Push(ctx, layout, ref); err != nil {
			t.Fatal(err)
		}
		if _, err := docker.Output(ctx, "pull", "--quiet", ref); err != nil {
			t.Fatal(err, docker.Log())
		}
	}

	t.Run("size", func(t *testing.T) {
		out, err := docker.Output(ctx, "image", "inspect", "--format={{.Size}} {{len .RootFS.Layers}}", python)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("bytes and layers: %s", out)
		if size, layers, _ := strings.Cut(strings.TrimSpace(out), " "); len(size) < 9 || size < "250000000" || layers != "4" {
			t.Errorf("got %s bytes in %s layers, want at least 250000000 in 4", size, layers)
		}
	})
	t.Run("program", func(t *testing.T) {
		out, err := docker.Output(ctx, "run", "--rm", "--network=host", python)
		if err != nil {
			t.Fatal(err, docker.Log())
		}
		if !strings.HasSuffix(out, "\nok\n") {
			t.Errorf("got %q, want the last line ok", out)
		}
	})
	t.Run("application layer", func(t *testing.T) {
		const script = `
			set -e
			id -un; pwd; echo $APP_STARTED
			stat -c '%a %U %h %y %n' data/notes.txt /usr/local/bin/testapp-setuid /usr/local/bin/testapp
			stat -c '%F %t %T' null pipe
			ls /usr/share/doc; test ! -e /usr/share/man; test ! -e /etc/issue.net; stat -c %a /usr /usr/local
			/usr/local/bin/testapp-setuid env | grep -o '"euid":[0-9]*'
			/usr/local/bin/testapp-netraw status | grep CapPrm`
		out, err := docker.Output(ctx, "run", "--rm", "--network=none", "--env=TZ=UTC", python, "sh", "-c", script)
		if err != nil {
			t.Fatal(err, docker.Log())
		}
		want := []string{
			"app", "/app", "yes",
			"640 app 2 2024-01-02 03:04:05.123456789 +0000 data/notes.txt",
			"4755 root 1 2024-01-02 03:04:05.000000000 +0000 /usr/local/bin/testapp-setuid",
			"755 root 2 2024-01-02 03:04:05.000000000 +0000 /usr/local/bin/testapp",
			"character special file 1 3", "fifo 0 0",
			"README", "755", "755",
			`"euid":0`,
			"CapPrm:\t0000000000002000",
		}
		if got := strings.Split(strings.TrimSpace(out), "\n"); !slices.Equal(got, want) {
			t.Errorf("got\n%s\nwant\n%s", out, strings.Join(want, "\n"))
		}
	})
	t.Run("pod", func(t *testing.T) {
		pod, err := StartPod(ctx, docker, scratch, "sleep")
		if err != nil {
			t.Fatal(err, docker.Log())
		}
		closeAtEnd(t, pod)
		addr, err := pod.Forward(reg.Address)
		if err != nil {
			t.Fatal(err)
		}
		const script = `import sys, urllib.request as r; print(r.urlopen("http://"+sys.argv[1]+"/v2/", timeout=10).status)`
		out, err := docker.Output(ctx, "run", "--rm", "--network="+pod.Network, python, "python3", "-c", script, addr)
		if err != nil {
			t.Fatal(err, docker.Log())
		}
		if out != "200\n" {
			t.Errorf("got %q from the registry through the pod, want 200", out)
		}
		if _, err := docker.Output(ctx, "run", "--rm", "--network="+pod.Network, python, "python3", "-c", script, reg.Address); err == nil {
			t.Errorf("the pod reached the host's loopback")
		}
	})
	t.Run("nothing left", func(t *testing.T) {
		if _, err := docker.Output(ctx, "run", "--detach", "--network=host", scratch, "sleep"); err != nil {
			t.Fatal(err)
		}
		closed = true
		if err := docker.Close(); err != nil {
			t.Error(err)
		}
		if points, err := mountsBelow(dir); err != nil || len(points) > 0 {
			t.Errorf("mounts left: %q, %v", points, err)
		}
		if left := processesNaming(t, dir+"/docker"); len(left) > 0 {
			t.Errorf("processes left:\n%s", strings.Join(left, "\n"))
		}
	})
}

func TestRegistryStartsAgain(t *testing.T) {
	dir := t.TempDir()
	reg, err := StartRegistry(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := reg.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := StartRegistry(t.Context(), dir, reg.Address)
	if err != nil {
		t.Fatal(err)
	}
	if again.Address != reg.Address {
		t.Errorf("got address %s, want the earlier %s", again.Address, reg.Address)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestRegistryReportsFailure(t *testing.T) {
	dir := t.TempDir()
	reg, err := StartRegistry(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	_, err = StartRegistry(t.Context(), t.TempDir(), reg.Address)
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("got %v, want the log of a registry whose address is taken", err)
	}
}

func TestStartDockerRefusesLongPath(t *testing.T) {
	_, err := StartDocker(t.Context(), filepath.Join(t.TempDir(), strings.Repeat("d", 100)))
	if err == nil || !strings.Contains(err.Error(), "shorter directory") {
		t.Errorf("got %v, want a hint at a shorter directory", err)
	}
}

func TestCacheEntry(t *testing.T) {
	c := &Cache{Dir: t.TempDir()}
	failed := errors.New("failed")
	if _, err := c.entry("x", "recipe", func(tmp string) error {
		os.Mkdir(tmp, 0o755)
		return failed
	}); !errors.Is(err, failed) {
		t.Errorf("got %v, want the maker's error", err)
	}
	makes := 0
	for range 2 {
		path, err := c.entry("x", "recipe", func(tmp string) error {
			makes++
			return os.Mkdir(tmp, 0o755)
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if makes != 1 {
		t.Errorf("made %d times, want once", makes)
	}
}

func TestDiff(t *testing.T) {
	old, new := t.TempDir(), t.TempDir()
	write := func(root, name, data string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o644), os.Chtimes(path, made, made)); err != nil {
			t.Fatal(err)
		}
	}
	for _, root := range []string{old, new} {
		write(root, "same/deep/file", "same")
		write(root, "kept/a", "a")
	}
	write(old, "kept/gone", "x")
	write(old, "changed/f", "1")
	write(new, "changed/f", "22")
	write(old, "wasdir/child", "x")
	write(new, "wasdir", "now a file")
	write(new, "links/one", "linked")
	if err := os.Link(filepath.Join(new, "links/one"), filepath.Join(new, "links/two")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(filepath.Join(new, "links/one"), "user.x", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}

	for _, tt := range []struct {
		name, old string
		want      []string
	}{
		{"against the old", old, []string{
			"changed/", "changed/f", "kept/", "kept/.wh.gone",
			"links/", "links/one user.x=1", "links/two -> links/one", "wasdir",
		}},
		{"whole", "", []string{
			"changed/", "changed/f", "kept/", "kept/a",
			"links/", "links/one user.x=1", "links/two -> links/one", "same/", "same/deep/", "same/deep/file", "wasdir",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := diff(&b, tt.old, new); err != nil {
				t.Fatal(err)
			}
			var got []string
			r := tar.NewReader(&b)
			for {
				h, err := r.Next()
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				s := h.Name
				if h.Linkname != "" {
					s += " -> " + h.Linkname
				}
				if v, ok := h.PAXRecords["SCHILY.xattr.user.x"]; ok {
					s += " user.x=" + v
				}
				got = append(got, s)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

// TestFileAttributes lets the kernel judge the attributes that are made here.
func TestFileAttributes(t *testing.T) {
	f := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(f, nil, 0o640); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"security.capability":     capability(13),
		"system.posix_acl_access": accessACL(33),
	} {
		if err := unix.Setxattr(f, name, []byte(value), 0); err != nil {
			t.Errorf("set %s: %v", name, err)
		}
	}
	out, err := run(context.Background(), "getcap", f)
	if err != nil || !strings.Contains(string(out), "cap_net_raw=ep") {
		t.Errorf("getcap: got %q, %v, want cap_net_raw=ep", out, err)
	}
	out, err = run(context.Background(), "getfacl", "--absolute-names", "--numeric", f)
	if err != nil || !strings.Contains(string(out), "user:33:r--") {
		t.Errorf("getfacl: got %q, %v, want user:33:r--", out, err)
	}
}

func closeAtEnd(t *testing.T, c io.Closer) {
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// shortDir is a temporary directory with a path that leaves room for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// processesNaming lists the command lines that contain s.
func processesNaming(t *testing.T, s string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && bytes.Contains(b, []byte(s)) {
			found = append(found, string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	return found
}
