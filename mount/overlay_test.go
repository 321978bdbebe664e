package mount

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// overlayOf mounts an overlay over lower, its upper on a file system of its
// own: overlayfs refuses one that is itself an overlay.
func overlayOf(t *testing.T, lower string) (target, upper string) {
	t.Helper()
	base := t.TempDir()
	if err := unix.Mount("none", base, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(base, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	target, upper = filepath.Join(base, "ta,r:g\\et"), filepath.Join(base, "up,p:e\\r")
	work := filepath.Join(base, "wo,r:k\\")
	for _, d := range []string{target, upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := Overlay(target, lower, upper, work); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return target, upper
}

func TestOverlay(t *testing.T) {
	root := testTree(t)
	s := serve(t, root, nil)
	target, upper := overlayOf(t, s.dir)

	sh := func(command string) string {
		t.Helper()
		out, err := exec.Command("sh", "-ec", strings.ReplaceAll(command, "$1", `"$1"`), "sh", target).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", command, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	want := noise(1<<20, 1<<20)
	if got, err := exec.Command("cat", filepath.Join(target, "sizes/1048576")).Output(); err != nil || !bytes.Equal(got, want) {
		t.Error("a file below differs", err)
	}

	// A change of owner or mode copies no contents, and a directory can move.
	reads := s.image.reads.Load()
	sh("chown -R 7:7 $1/sizes $1/hard; chmod 640 $1/sizes/4097; mv $1/sizes $1/moved")
	if got := s.image.reads.Load(); got != reads {
		t.Errorf("chown and mv read %d times from the image", got-reads)
	}
	if got := sh("stat -c %u:%a:%s $1/moved/4097"); got != "7:640:4097" {
		t.Errorf("got %s", got)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(upper, "moved/1048576"), &st); err != nil || st.Blocks != 0 {
		t.Errorf("the copy above holds %d blocks, %v, want none", st.Blocks, err)
	}

	// Contents are copied when they change, and all that hangs on a file with
	// them.
	sh("printf tail >> $1/moved/1048576; echo new > $1/new; rm $1/names/x*; mkdir $1/empty/x")
	sh("setfattr -n user.more -v x $1/xattrs/acl; echo more >> $1/xattrs/acl")
	dropCaches(t)
	if got, err := exec.Command("cat", filepath.Join(target, "moved/1048576")).Output(); err != nil || !bytes.Equal(got, append(want, "tail"...)) {
		t.Errorf("a changed file differs: %d bytes, %v", len(got), err)
	}
	if got := sh("getfacl -cpE $1/xattrs/acl; tail -n1 $1/xattrs/acl; cat $1/new; ls $1/names | wc -l"); !strings.Contains(got, "user:4711:r--") {
		t.Errorf("got %s", got)
	}
	if got := sh("getfattr -d -m security $1/cat"); !strings.Contains(got, "security.capability") {
		t.Errorf("got %s", got)
	}
	if got := sh("touch $1/cat && getfattr -d -m security $1/cat; stat -c %a $1/id; touch $1/id; stat -c %a $1/id"); strings.Count(got, "4755") != 2 {
		t.Errorf("got %s", got)
	}
	sh("mknod $1/device c 1 3; echo x > $1/device; echo x > $1/null; find $1 > /dev/null; ls -lR $1 > /dev/null")
	if log := s.log.String(); log != "" {
		t.Errorf("the server has something to say: %s", log)
	}

	// The image itself cannot change.
	if _, err := os.Lstat(filepath.Join(s.dir, "sizes/4097")); err != nil {
		t.Error(err)
	}
}

// A restarted container finds its changes again: the same upper over a new
// mount of the same image.
func TestOverlayAgain(t *testing.T) {
	root := testTree(t)
	upper := t.TempDir()
	if err := unix.Mount("none", upper, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(upper, unix.MNT_DETACH) })
	for _, d := range []string{"target", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(upper, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	target := filepath.Join(upper, "target")
	sum := fmt.Sprintf("%x", sha256.Sum256(noise(1<<20, 1<<20)))
	for i, start := range []struct{ command, want string }{
		{"chown 7 $1/sizes/1048576 $1/hard/a; mv $1/names $1/names2; echo more >> $1/sizes/1; rm -r $1/many; ls -lR $1 >/dev/null", ""},
		{"stat -c %u:%h $1/sizes/1048576 $1/hard/a $1/hard/b; ls $1/names2 | wc -l; cat $1/sizes/1 | wc -c", "7:1 7:1 0:3 8 6"},
		{"test ! -e $1/many; sha256sum < $1/sizes/1048576; mkdir $1/many; ls -lR $1 >/dev/null", sum + " -"},
		{"echo x >> $1/sizes/1048576; cat $1/sizes/1048576 | wc -c; ls $1/many; cat $1/hard/a", "1048578 one inode, three names"},
	} {
		s := serve(t, root, nil)
		if err := Overlay(target, s.dir, filepath.Join(upper, "upper"), filepath.Join(upper, "work")); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sh", "-ec", start.command, "sh", target).CombinedOutput()
		if got := strings.Join(strings.Fields(string(out)), " "); err != nil || got != start.want {
			t.Errorf("start %d: %s: got %q, %v, want %q", i, start.command, got, err, start.want)
		}
		if err := unix.Unmount(target, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		dropCaches(t)
	}
}

// What is below an overlay can end at once, as the boot process does it.
func TestCloseBelowOverlay(t *testing.T) {
	root, _ := small()
	s := serve(t, root, nil)
	target, _ := overlayOf(t, s.dir)
	if err := unix.Unmount(s.dir, unix.MNT_DETACH); err != nil { // the overlay holds it
		t.Fatal(err)
	}
	s.image.set(hang)
	cmd := exec.Command("cat", filepath.Join(target, "dir/file"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for s.image.reads.Load() == 0 {
		unix.Select(0, nil, nil, nil, &unix.Timeval{Usec: 1000})
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("a read that hangs came back with bytes")
	}
}

// In a user namespace trusted xattrs cannot be written.
func TestOverlayInUserNamespace(t *testing.T) {
	if os.Getenv("OVERLAY_IN") == "" {
		cmd := exec.Command("unshare", "--user", "--map-root-user", "--mount", os.Args[0], "-test.run", "^TestOverlayInUserNamespace$", "-test.v")
		cmd.Env = append(os.Environ(), "OVERLAY_IN=namespace")
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestOverlayInUserNamespace")) {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	base := t.TempDir()
	if err := unix.Mount("none", base, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(base, unix.MNT_DETACH) })
	for _, d := range []string{"target", "lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root, content := small()
	s := serve(t, root, nil)
	target := filepath.Join(base, "target")
	if err := Overlay(target, s.dir, filepath.Join(base, "upper"), filepath.Join(base, "work")); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sh", "-ec", "rm -r $1/dir; mkdir $1/dir; echo x >> $1/short; ls $1/dir; cat $1/short", "sh", target).CombinedOutput()
	if err != nil || string(out) != "shortx\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if got, err := exec.Command("cat", filepath.Join(s.dir, "dir/file")).Output(); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the image below: %v", err)
	}
	if err := unix.Unmount(target, 0); err != nil {
		t.Error(err)
	}
}

func TestOverlayErrors(t *testing.T) {
	base := t.TempDir()
	err := Overlay(filepath.Join(base, "absent"), base, base, base)
	if err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("got %v, want an error that names the target", err)
	}
}

// A file with holes keeps them when it is copied up: 1 TiB would not fit.
func TestOverlayCopiesNoHoles(t *testing.T) {
	s := serve(t, testTree(t), nil)
	target, _ := overlayOf(t, s.dir)
	f, err := os.OpenFile(filepath.Join(target, "sparse"), os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("tail"); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	// Each of its three pieces is copied with the block of the image around it.
	if st.Size != 1<<40+4 || st.Blocks*512 > 128<<20 {
		t.Errorf("%d bytes in %d blocks, want %d and at most 128 MiB", st.Size, st.Blocks, 1<<40+4)
	}
	got := make([]byte, 304)
	if _, err := f.ReadAt(got, 1<<40-300); err != nil || !bytes.Equal(got, append(noise(1, 300), "tail"...)) {
		t.Errorf("its end differs, %v", err)
	}
}
