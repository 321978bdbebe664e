package boot

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"golang.org/x/sys/unix"
)

// mounted is a directory in which files and directories are
// mounted one by one, as "-v FILE:DIR/NAME" does; gone detaches them, as the
// switch of the root does.
func mounted(t *testing.T, files, dirs map[string]string) (dir string, gone func()) {
	t.Helper()
	dir = t.TempDir()
	write := func(path, text string) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var points []string
	bind := func(from, name string) {
		to := filepath.Join(dir, name)
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("bind %s: %v", to, err)
		}
		points = append(points, to)
	}
	gone = func() {
		for _, p := range points {
			if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
				t.Errorf("detach %s: %v", p, err)
			}
		}
		points = nil
	}
	t.Cleanup(gone)
	for name, text := range dirs {
		from := t.TempDir()
		write(filepath.Join(from, filepath.Base(name)), text)
		write(filepath.Join(dir, name), "hidden")
		bind(from, filepath.Dir(name))
	}
	for name, text := range files {
		from := filepath.Join(t.TempDir(), "x")
		write(from, text)
		write(filepath.Join(dir, name), "")
		bind(from, name)
	}
	return dir, gone
}

func holdAll(t *testing.T, dir string) held {
	t.Helper()
	paths, err := withMounts([]string{dir, dir + "-not"})
	if err != nil {
		t.Fatal(err)
	}
	h, err := hold(paths...)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestHeldDir: what is mounted in a held directory stands before what lies
// there, also when the mounts are gone.
func TestHeldDir(t *testing.T) {
	dir, gone := mounted(t, map[string]string{"other/ca.crt": "file"}, map[string]string{"host/ca.crt": "inner"})
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), []byte("outer"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := heldDir{holdAll(t, dir), dir}
	gone()
	for name, want := range map[string]string{"ca.crt": "outer", "host/ca.crt": "inner", "other/ca.crt": "file"} {
		for range 2 {
			if got, err := fs.ReadFile(d, name); err != nil || string(got) != want {
				t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
			}
		}
	}
	for name, entries := range map[string]int{".": 4, "host": 1, "other": 1} {
		if got, err := fs.ReadDir(d, name); err != nil || len(got) != entries {
			t.Errorf("%s: got %v, %v, want %d entries", name, got, err, entries)
		}
		if info, err := fs.Stat(d, name); err != nil || !info.IsDir() {
			t.Errorf("%s: got %v, want a directory", name, err)
		}
	}
	if info, err := fs.Stat(d, "fifo"); err != nil || info.Mode().IsRegular() {
		t.Errorf("a FIFO: got %v, %v", info, err)
	}
	for _, name := range []string{"missing", "host/missing", "other/ca.crt/x", "../x", "/ca.crt"} {
		if f, err := d.Open(name); err == nil {
			t.Errorf("%s: got %v", name, f)
		}
		if _, err := d.Stat(name); err == nil {
			t.Errorf("%s: it is there", name)
		}
	}
}

// TestSecretsMountedOneByOne: a secret that is a mount of its own is read when
// the mount is gone.
func TestSecretsMountedOneByOne(t *testing.T) {
	dir, gone := mounted(t, map[string]string{
		"config.json": `{"auths": {"h": {"username": "joe", "password": "one"}}}`,
		"credentials": "two",
		"id_ed25519":  "three",
	}, nil)
	s := secrets{holdAll(t, dir), []string{dir}}
	gone()
	for kind, want := range map[*secretKind]string{s3Credentials: "two", sshKey: "three", sshPassphrase: ""} {
		if b, err := s.read(kind); err != nil || string(b) != want {
			t.Errorf("%v: got %q, %v, want %q", kind.names, b, err, want)
		}
	}
	a, err := s.Resolve(host("h"))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := authn.Authorization(t.Context(), a); err != nil || c.Password != "one" {
		t.Errorf("got %+v, %v", c, err)
	}
}

// TestTokenMountedAlone: a token whose file is a mount of its own is read when
// the mount has moved away.
func TestTokenMountedAlone(t *testing.T) {
	dir, gone := mounted(t, map[string]string{"token": "jwt"}, nil)
	name := filepath.Join(dir, "token")
	read := secrets{}.s3(&settings{env: []string{"AWS_WEB_IDENTITY_TOKEN_FILE=" + name}}).Sources.ReadFile
	gone()
	if b, err := read(name); err != nil || string(b) != "jwt" {
		t.Errorf("got %q, %v", b, err)
	}
	if _, err := read(name + "-not"); err == nil || !strings.Contains(err.Error(), name+"-not: ") {
		t.Errorf("another file: got %v", err)
	}
}
