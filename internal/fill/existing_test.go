package fill

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

// try fails the test for the first of errs.
func try(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

const bootLink = "/.bootfs/boot"

// bootImage puts into dir what a boot image may have where sample has files,
// and what it cannot have but somebody may have made: wrong types, symlinks out
// of the root, directories that hand down what they have. outside is where
// such symlinks lead to.
func bootImage(t testing.TB, dir, outside string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	try(t,
		os.Symlink(bootLink, at("program")),
		os.WriteFile(at("guarded"), []byte("of the boot image"), 0o666),
		os.MkdirAll(at("locked"), 0o755), unix.Chmod(at("locked"), 0o2755), os.Chown(at("locked"), 0, 77),
		os.Mkdir(at("many"), 0o755),
		unix.Setxattr(at("many"), "system.posix_acl_default", acl, 0),
		os.Symlink(outside, at("many/"+strings.Repeat("n", 255))),
		os.Symlink(outside, at("a")),
		os.WriteFile(at("b"), nil, 0o644),
		os.Symlink(bootLink, at("link")),
		os.MkdirAll(at("large/with/children"), 0o755), os.WriteFile(at("large/with/file"), nil, 0o644),
		os.Mkdir(at("null"), 0o755),
		os.WriteFile(at("fifo"), nil, 0o644), os.Link(at("fifo"), at("zeros")),
		os.WriteFile(at("dockerenv"), nil, 0o755),
	)
}

// isBootLink stands for what boot passes as Options.Last.
func isBootLink(dir string) func(string) bool {
	return func(path string) bool {
		target, err := os.Readlink(filepath.Join(dir, path))
		return err == nil && target == bootLink
	}
}

// wantOver is want of a root that had been bootImage.
func wantOver(t *testing.T, tr *tree.Tree) treecmp.Manifest {
	t.Helper()
	m := want(t, tr)
	m["/dockerenv"] = treecmp.Entry{Mode: unix.S_IFREG | 0o755, Nlink: 1, Link: "/dockerenv"}
	return m
}

// compareOver compares what stands in dir with m; of /dockerenv counts that it is there.
func compareOver(t *testing.T, dir string, m treecmp.Manifest) {
	t.Helper()
	own, err := treecmp.Dir(dir)
	try(t, err)
	if _, ok := own["/dockerenv"]; !ok {
		t.Error("what the image does not name is gone")
	}
	m = maps.Clone(m)
	m["/dockerenv"] = own["/dockerenv"]
	compare(t, dir, m)
}

// TestExisting fills the root of a boot image.
func TestExisting(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir, outside := t.TempDir(), t.TempDir()
	bootImage(t, dir, outside)
	m.before = func(int64, index.Chunk) error {
		for _, name := range []string{"program", "link"} {
			if target, err := os.Readlink(filepath.Join(dir, name)); err != nil || target != bootLink {
				t.Errorf("%s before the last chunk: %q, %v", name, target, err)
			}
		}
		return nil
	}
	r, err := m.fill(t, dir, Options{Last: isBootLink(dir)})
	if err != nil || r.Left != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("outside of the root: %v, %v", left, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, ".state")); err != nil || len(left) != 1 {
		t.Errorf("left beside the journal: %v, %v", left, err)
	}
	compareOver(t, dir, wantOver(t, tr))
}

// TestMounted fills a root in which volumes are mounted: they are left as they
// are, and so is what is below them.
func TestMounted(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir, volume := t.TempDir(), t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	try(t, os.Mkdir(at("a"), 0o755), os.Mkdir(at("many"), 0o755), os.WriteFile(at("large"), nil, 0o640), os.WriteFile(at("guarded"), nil, 0o640),
		os.WriteFile(at("program"), nil, 0o640), os.Mkdir(at("twins"), 0o755),
		os.WriteFile(filepath.Join(volume, "mine"), []byte("mine"), 0o600))
	bind := func(from, to string) {
		t.Helper()
		try(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
		t.Cleanup(func() { try(t, unix.Unmount(to, unix.MNT_DETACH)) })
	}
	bind(volume, at("a"))
	bind(filepath.Join(volume, "mine"), at("large"))
	bind(filepath.Join(volume, "mine"), at("program"))
	bind(filepath.Join(volume, "mine"), at("guarded"))
	try(t, unix.Mount("tmpfs", at("many"), "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { try(t, unix.Unmount(at("many"), unix.MNT_DETACH)) })
	// A directory that the image does not have keeps its mount as well.
	try(t, os.MkdirAll(at("twins/x"), 0o755))
	bind(volume, at("twins/x"))

	r, err := m.fill(t, dir, Options{Last: func(p string) bool { return p == "program" }})
	if err != nil || r.Left != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, name := range []string{"large", "guarded", "program", "twins/x/mine", "a/mine"} {
		if b, err := os.ReadFile(at(name)); err != nil || string(b) != "mine" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if left, err := os.ReadDir(at("many")); err != nil || len(left) != 0 {
		t.Errorf("in a mounted directory: %v, %v", left, err)
	}
	if left, err := os.ReadDir(at("a")); err != nil || len(left) != 1 {
		t.Errorf("in a mounted directory: %v, %v", left, err)
	}
	if b, err := os.ReadFile(at("b/two")); err != nil || string(b) != "linked" {
		t.Errorf("b/two, whose first name is below a mount: %q, %v", b, err)
	}
	if target, err := os.Readlink(at("b/l")); err != nil || target != "/etc/passwd" {
		t.Errorf("b/l, whose first name is below a mount: %q, %v", target, err)
	}
	// The same chunks are also a file's that nothing is mounted over.
	if b, err := os.ReadFile(at("twins/y")); err != nil || len(b) != 100_000 {
		t.Errorf("twins/y: %d bytes, %v", len(b), err)
	}
}

// TestMountedLinks has a file mounted over the first name of an inode: its
// other names come all the same.
func TestMountedLinks(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	try(t, os.Mkdir(at("a"), 0o755), os.WriteFile(at("a/one"), nil, 0o644), os.WriteFile(at("host"), []byte("host"), 0o644),
		unix.Mount(at("host"), at("a/one"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { try(t, unix.Unmount(at("a/one"), unix.MNT_DETACH)) })
	if r, err := m.fill(t, dir, Options{}); err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	for name, text := range map[string]string{"a/one": "host", "b/two": "linked"} {
		if b, err := os.ReadFile(at(name)); err != nil || string(b) != text {
			t.Errorf("%s: %q, %v, want %q", name, b, err, text)
		}
	}
}

// TestStateInImage has an image with a directory at the journal's place.
func TestStateInImage(t *testing.T) {
	tr := sample()
	tr.Root.Entries[".state"] = dirNode(map[string]*tree.Inode{"journal": fileNode([]byte("hostile"))})
	dir := t.TempDir()
	if _, err := newImage(t, tr).fill(t, dir, Options{}); err == nil || !strings.Contains(err.Error(), "/.state: the image has a directory where the journal") {
		t.Errorf("got %v", err)
	}
	for _, kind := range []uint32{unix.S_IFREG, unix.S_IFLNK} {
		tr.Root.Entries[".state"] = &tree.Inode{Mode: kind | 0o777, Target: "/"}
		dir := t.TempDir()
		_, err := newImage(t, tr).fill(t, dir, Options{})
		if err == nil || !strings.Contains(err.Error(), "/.state") {
			t.Errorf("type %o: got %v", kind, err)
		}
		if _, err := os.Stat(filepath.Join(dir, ".state", journalName)); err != nil {
			t.Errorf("type %o: the journal is gone: %v", kind, err)
		}
	}
}

// TestStateElsewhere has its state directory in another file system.
func TestStateElsewhere(t *testing.T) {
	m := newImage(t, sample())
	dir, other := t.TempDir(), t.TempDir()
	try(t, unix.Mount("tmpfs", other, "tmpfs", 0, ""))
	t.Cleanup(func() { try(t, unix.Unmount(other, unix.MNT_DETACH)) })
	_, err := m.fill(t, dir, Options{State: other})
	if err == nil || !errors.Is(err, unix.EXDEV) || !strings.Contains(err.Error(), other+" is not in the mount that is filled") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "program")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was filled all the same: %v", err)
	}
}
