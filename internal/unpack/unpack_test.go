package unpack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

func dir(entries map[string]*tree.Inode) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFDIR | 0o755, Nlink: 2, MtimeSec: 1_000_000_000, MtimeNsec: 5, Entries: entries}
	for _, e := range entries {
		if e.IsDir() {
			n.Nlink++
		}
	}
	return n
}

func file(b []byte) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o644, MtimeSec: 12345, MtimeNsec: 678, Nlink: 1, Size: int64(len(b))}
	if len(b) > 0 {
		n.Content = tree.Content{Source: bytes.NewReader(b), Extents: []tree.Extent{{Length: n.Size}}}
	}
	return n
}

// capability is a security.capability of cap_net_raw+ep.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// acl is user::rw-, user:1:r--, group::r--, mask::r--, other::---.
var acl = []byte("\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x01\x00\x00\x00" +
	"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")

func sampleTree() *tree.Tree {
	program := file([]byte("program"))
	program.Mode, program.UID, program.GID = unix.S_IFREG|0o6755, 5, 6
	program.Xattrs = []tree.Xattr{{Name: "security.capability", Value: capability}, {Name: "user.x", Value: []byte("y")}}
	linked := file([]byte("linked"))
	linked.Nlink = 2
	guarded := file([]byte("guarded"))
	guarded.Mode = unix.S_IFREG | 0o640
	guarded.Xattrs = []tree.Xattr{{Name: "system.posix_acl_access", Value: acl}}
	sparse := file([]byte("end"))
	sparse.Size = 1 << 40
	sparse.Content.Extents = []tree.Extent{{Logical: 1<<40 - 3, Length: 3}}
	locked := dir(map[string]*tree.Inode{"inside": file([]byte("x"))})
	locked.Mode = unix.S_IFDIR | 0o1500
	locked.UID = 7
	shut := dir(map[string]*tree.Inode{"inside": file([]byte("x"))}) // not even its owner may look in
	shut.Mode = unix.S_IFDIR
	name := strings.Repeat("d", 200)
	deep := dir(nil)
	for range 50 { // paths of 10,000 bytes
		deep = dir(map[string]*tree.Inode{name: deep})
	}
	return &tree.Tree{Root: dir(map[string]*tree.Inode{
		"program": program, "guarded": guarded, "locked": locked, "shut": shut, "deep": deep,
		"a":     dir(map[string]*tree.Inode{"one": linked}),
		"b":     dir(map[string]*tree.Inode{"two": linked, "\xfe\n": file(nil)}),
		"link":  {Mode: unix.S_IFLNK | 0o777, Nlink: 1, MtimeSec: 99, UID: 3, Target: "/etc/passwd"},
		"null":  {Mode: unix.S_IFCHR | 0o666, Nlink: 1, Rdev: unix.Mkdev(1, 3)},
		"fifo":  {Mode: unix.S_IFIFO | 0o600, Nlink: 1},
		"holes": sparse,
	})}
}

func TestDir(t *testing.T) {
	want := sampleTree()
	sparse := want.Root.Entries["holes"]
	out := filepath.Join(t.TempDir(), "new", "root")
	r, err := Dir(t.Context(), want, out, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Omitted != 0 || r.Files != 66 || r.Bytes != 7+6+7+1+1+3 {
		t.Errorf("report %+v", r)
	}
	// A comparison would read the terabyte, and the deep paths by name.
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(out, "holes"), &st); err != nil || st.Size != sparse.Size || st.Blocks > 100 {
		t.Errorf("sparse file: %d bytes in %d blocks, %v", st.Size, st.Blocks, err)
	}
	if err := os.Remove(filepath.Join(out, "holes")); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command("rm", "-r", filepath.Join(out, "deep")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	delete(want.Root.Entries, "holes")
	delete(want.Root.Entries, "deep")
	want.Root.Nlink--
	if err := unix.UtimesNano(out, []unix.Timespec{{Sec: 1_000_000_000, Nsec: 5}, {Sec: 1_000_000_000, Nsec: 5}}); err != nil {
		t.Fatal(err)
	}
	got, err := treecmp.Dir(out)
	if err != nil {
		t.Fatal(err)
	}
	m, err := treecmp.Tree(want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := treecmp.Diff(got, m); diff != nil {
		t.Errorf("%s", strings.Join(diff, "\n"))
	}
}

func TestDirRefuses(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Dir(t.Context(), sampleTree(), full, Options{}); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("a directory with a file: %v", err)
	}
	if _, err := Dir(t.Context(), sampleTree(), filepath.Join(full, "x"), Options{}); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
	long := &tree.Tree{Root: dir(map[string]*tree.Inode{"a": dir(map[string]*tree.Inode{strings.Repeat("n", 256): file(nil)})})}
	if _, err := Dir(t.Context(), long, filepath.Join(full, "long"), Options{}); !errors.Is(err, syscall.ENAMETOOLONG) || !strings.HasPrefix(err.Error(), "/a/nnn") {
		t.Errorf("a name of 256 bytes: %v", err)
	}
}

// TestDirUnprivileged runs this test again as nobody.
func TestDirUnprivileged(t *testing.T) {
	const env = "UNPACK_INTO"
	if out := os.Getenv(env); out != "" {
		r, err := Dir(t.Context(), sampleTree(), out, Options{Unprivileged: true})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("omitted", r.Omitted)
		return
	}
	base := t.TempDir()
	for d := base; d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The test binary lies where nobody may not look.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe, home := filepath.Join(base, "unpack.test"), filepath.Join(base, "home")
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(home, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestDirUnprivileged$", "-test.v")
	cmd.Env, cmd.Dir = append(os.Environ(), env+"="+filepath.Join(home, "root")), home
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("omitted 66\n")) {
		t.Fatalf("%v: %s", err, out)
	}
	info, err := os.Stat(filepath.Join(home, "root", "program"))
	if err != nil || info.Mode() != 0o755 {
		t.Errorf("program has mode %v, %v: want no setuid for another owner", info.Mode(), err)
	}
	if _, err := os.Stat(filepath.Join(home, "root", "null")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("device: %v", err)
	}
}
