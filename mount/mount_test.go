package mount

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

type entries = map[string]*tree.Inode

func dir(e entries) *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFDIR | 0o755, Entries: e}
}

func file(mode uint32, content []byte) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | mode, Size: int64(len(content))}
	if len(content) > 0 {
		n.Content = tree.Content{Source: bytes.NewReader(content), Extents: []tree.Extent{{Length: n.Size}}}
	}
	return n
}

// noise is size bytes that depend on seed alone.
func noise(seed uint64, size int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// aclFor is the value of a POSIX ACL xattr that lets the user uid read and
// leaves nothing to group and others.
func aclFor(uid uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 6, 1<<32 - 1}, {2, 4, uid}, {4, 0, 1<<32 - 1}, {0x10, 4, 1<<32 - 1}, {0x20, 0, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

func with(n *tree.Inode, xattrs ...tree.Xattr) *tree.Inode {
	n.Xattrs = xattrs
	return n
}

// programs from this machine, for the root images of the tests.
func program(t testing.TB, mode uint32, name string) *tree.Inode {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return file(mode, b)
}

// testTree has something of all that a root can hold.
func testTree(t testing.TB) *tree.Tree {
	root := dir(entries{
		"fifo":  {Mode: unix.S_IFIFO | 0o620},
		"sock":  {Mode: unix.S_IFSOCK | 0o755},
		"null":  {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
		"blk":   {Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(259, 70000)},
		"link":  {Mode: unix.S_IFLNK | 0o777, Target: "sizes/4096"},
		"long":  {Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", 4095)},
		"id":    program(t, 0o4755, "id"),
		"cat":   program(t, 0o755, "cat"),
		"700":   file(0o700, []byte("x")),
		"empty": dir(nil),
	})
	root.MtimeSec, root.MtimeNsec = -1<<33, 999999999
	root.Entries["cat"].Xattrs = []tree.Xattr{ // cap_net_raw+ep
		{Name: "security.capability", Value: []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
	}
	secret := dir(entries{"inside": file(0o644, []byte("x"))})
	secret.Mode = unix.S_IFDIR | 0o750
	root.Entries["secret"] = secret

	sizes := dir(entries{})
	for _, unit := range []int{1, 4096, 8192, 128 << 10, 1 << 20} {
		for size := unit - 1; size <= unit+1; size++ {
			n := file(0o644, noise(uint64(size), size))
			n.MtimeSec, n.MtimeNsec, n.UID, n.GID = int64(size), uint32(size), uint32(size), 1<<32-2
			sizes.Entries[strconv.Itoa(size)] = n
		}
	}
	root.Entries["sizes"] = sizes
	sparse := &tree.Inode{Mode: unix.S_IFREG | 0o600, Size: 1 << 40}
	sparse.Content.Source = bytes.NewReader(noise(1, 300))
	for _, off := range []int64{1 << 30, 7 << 30, 1<<40 - 300} {
		sparse.Content.Extents = append(sparse.Content.Extents, tree.Extent{Logical: off, Length: 300})
	}
	root.Entries["sparse"] = sparse

	hard := file(0o644, []byte("one inode, three names"))
	root.Entries["hard"] = dir(entries{"a": hard, "b": hard, "dir": dir(entries{"c": hard})})

	names := dir(entries{})
	for _, name := range []string{"!before", "...", "a b", "a\nb", "\xff\xfe", "é", strings.Repeat("n", 255), "x,y:z\\"} {
		names.Entries[name] = file(0o644, []byte(name))
	}
	root.Entries["names"] = names

	root.Entries["many"] = manyFiles(2000)

	root.Entries["xattrs"] = dir(entries{
		"acl":     with(file(0o640, []byte("for 4711")), tree.Xattr{Name: "system.posix_acl_access", Value: aclFor(4711)}),
		"trusted": with(file(0o644, nil), tree.Xattr{Name: "trusted.of", Value: []byte("root")}, tree.Xattr{Name: "user.of", Value: []byte("all")}),
		"large":   with(file(0o644, nil), tree.Xattr{Name: "user.large", Value: noise(2, 60<<10)}),
		"none":    with(file(0o644, nil), tree.Xattr{Name: "user.empty"}),
	})
	return &tree.Tree{Root: counted(root)}
}

func manyFiles(n int) *tree.Inode {
	many := dir(entries{})
	for i := range n {
		many.Entries[fmt.Sprintf("entry-%d", i)] = &tree.Inode{Mode: unix.S_IFREG | 0o644, UID: uint32(i)}
	}
	return many
}

// counted sets the link counts below n, as the merge of layers does.
func counted(n *tree.Inode) *tree.Inode {
	n.Nlink = 2
	for _, c := range n.Entries {
		if c.IsDir() {
			n.Nlink++
			counted(c)
		} else {
			c.Nlink++
		}
	}
	return n
}

// fakeImage is a root image in a file, or one that fails. before, if set, is
// called for each read and may wait or fail.
type fakeImage struct {
	path   string
	f      io.ReaderAt
	before atomic.Pointer[func(ctx context.Context, off int64) error]
	short  atomic.Bool // reads lack their last byte
	reads  atomic.Int64
	last   atomic.Int64 // offset of the last read
}

func (m *fakeImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	m.reads.Add(1)
	m.last.Store(off)
	if before := m.before.Load(); before != nil {
		if err := (*before)(ctx, off); err != nil {
			return 0, err
		}
	}
	if m.short.Load() {
		p = p[:len(p)-1]
	}
	return m.f.ReadAt(p, off)
}

func (m *fakeImage) set(before func(ctx context.Context, off int64) error) { m.before.Store(&before) }
func (m *fakeImage) heal()                                                 { m.before.Store(nil) }

// readsOver waits until there were more than n reads.
func (m *fakeImage) readsOver(t *testing.T, n int64) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); m.reads.Load() <= n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d reads, want more than %d", m.reads.Load(), n)
		}
	}
}

// atOnce is how long what must not wait may take on a busy machine. It is less than
// reads wait.
const atOnce = 20 * time.Second

func hang(ctx context.Context, _ int64) error {
	<-ctx.Done()
	return fmt.Errorf("chunk 0123 at 4711: %w", ctx.Err())
}

func imageOf(t testing.TB, root *tree.Tree) (*rootimage.Plan, *fakeImage) {
	t.Helper()
	plan, err := rootimage.New(root)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "rootfs.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if _, err := plan.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	return plan, &fakeImage{path: f.Name(), f: f}
}

// logLines is what a server logs.
type logLines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// served is a served root image.
type served struct {
	*Server
	dir   string
	image *fakeImage
	log   *logLines
}

func serve(t testing.TB, root *tree.Tree, change func(*Options)) *served {
	t.Helper()
	plan, image := imageOf(t, root)
	s := &served{dir: t.TempDir(), image: image, log: &logLines{}}
	o := Options{
		Meta:         plan.Meta(),
		Image:        image,
		XattrClasses: plan.XattrClasses(),
		Log:          slog.New(slog.NewTextHandler(s.log, nil)),
	}
	if change != nil {
		change(&o)
	}
	var err error
	if s.Server, err = Serve(s.dir, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", s.log)
		}
	})
	// This process is server and client in one. The Go runtime polls files that
	// it opens, in a way that cannot wait for itself; once told that it is not
	// supported, the kernel does not ask the server any more.
	for name, n := range root.Root.Entries {
		if n.IsRegular() {
			fd, err := unix.Open(filepath.Join(s.dir, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			_ = unix.Close(fd)
			break
		}
	}
	return s
}

// small is a tree with one file of two megabytes and a few others.
func small() (*tree.Tree, []byte) {
	content := noise(7, 2<<20)
	return &tree.Tree{Root: counted(dir(entries{
		"dir":   dir(entries{"file": file(0o644, content), "other": file(0o644, content[:5000])}),
		"short": file(0o644, []byte("short")),
		"link":  {Mode: unix.S_IFLNK | 0o777, Target: "short"},
	}))}, content
}

// mountKernel mounts the image with the kernel's own EROFS.
func mountKernel(t testing.TB, image string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount -t erofs: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

func dropCaches(t testing.TB) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

func TestSameAsKernel(t *testing.T) {
	root := testTree(t)
	s := serve(t, root, nil)
	got, err := treecmp.Dir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	want, err := treecmp.Tree(root)
	if err != nil {
		t.Fatal(err)
	}
	if diff := treecmp.Diff(got, want); len(diff) > 0 {
		t.Errorf("served and tree differ: %s", strings.Join(diff[:min(len(diff), 20)], "\n"))
	}
	kernelDir := mountKernel(t, s.image.path)
	kernel, err := treecmp.Dir(kernelDir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := treecmp.Diff(got, kernel); len(diff) > 0 {
		t.Errorf("served and kernel's mount differ: %s", strings.Join(diff[:min(len(diff), 20)], "\n"))
	}
	// What treecmp leaves out.
	for _, name := range []string{".", "link", "many", "sizes/4097", "hard/dir/c", "blk", "sparse", "empty"} {
		var g, w unix.Stat_t
		if err := errors.Join(unix.Lstat(filepath.Join(s.dir, name), &g), unix.Lstat(filepath.Join(kernelDir, name), &w)); err != nil {
			t.Fatal(err)
		}
		g.Dev, w.Dev = 0, 0
		if g != w {
			t.Errorf("stat %s:\n got %+v\nwant %+v", name, g, w)
		}
	}
	var g, w unix.Statfs_t
	if err := errors.Join(unix.Statfs(s.dir, &g), unix.Statfs(kernelDir, &w)); err != nil {
		t.Fatal(err)
	}
	if g.Blocks != w.Blocks || g.Bsize != w.Bsize || g.Namelen != w.Namelen || g.Files != uint64(len(want))-2 {
		t.Errorf("statfs:\n got %+v\nwant %+v with %d files", g, w, len(want)-2) // two names are hard links
	}
	if log := s.log.String(); log != "" {
		t.Errorf("the server has something to say: %s", log)
	}
}

func TestLargeDirectory(t *testing.T) {
	const n = 100000
	s := serve(t, &tree.Tree{Root: counted(manyFiles(n))}, nil)
	for range 2 { // from the server, then as the kernel keeps it
		list, err := os.ReadDir(s.dir)
		if err != nil || len(list) != n {
			t.Fatalf("got %d entries, %v, want %d", len(list), err, n)
		}
		for _, e := range list {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			if uid := info.Sys().(*syscall.Stat_t).Uid; e.Name() != fmt.Sprintf("entry-%d", uid) {
				t.Fatalf("%s has uid %d", e.Name(), uid)
			}
		}
	}
	// From the middle, after the kernel has forgotten all.
	f, err := os.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first, err := f.Readdirnames(n / 3)
	if err != nil {
		t.Fatal(err)
	}
	dropDentries(t)
	rest, err := f.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	all := append(first, rest...)
	slices.Sort(all)
	if len(slices.Compact(all)) != n {
		t.Errorf("got %d names in two parts, want %d", len(all), n)
	}
}

func TestLookupErrors(t *testing.T) {
	root, _ := small()
	s := serve(t, root, nil)
	var st unix.Stat_t
	for name, want := range map[string]error{
		"absent":                 unix.ENOENT,
		"dir/absent":             unix.ENOENT,
		"short/x":                unix.ENOTDIR,
		strings.Repeat("n", 255): unix.ENOENT,
		strings.Repeat("n", 256): unix.ENAMETOOLONG,
	} {
		for range 2 { // asked, then kept by the kernel
			if err := unix.Lstat(filepath.Join(s.dir, name), &st); err != want {
				t.Errorf("lstat %.40q: got %v, want %v", name, err, want)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(s.dir, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("create: got %v, want EROFS", err)
	}
	if err := os.Chmod(filepath.Join(s.dir, "short"), 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("chmod: got %v, want EROFS", err)
	}
}

func TestSeek(t *testing.T) {
	root := testTree(t)
	s := serve(t, root, nil)
	kernelDir := mountKernel(t, s.image.path)
	for _, name := range []string{"sparse", "sizes/4097", "sizes/0"} {
		fd, err := unix.Open(filepath.Join(s.dir, name), unix.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		kernelFD, err := unix.Open(filepath.Join(kernelDir, name), unix.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(kernelFD)
		for _, off := range []int64{0, 1, 4096, 4097, 1 << 30, 1<<30 + 1, 5 << 30, 7 << 30, 1<<40 - 300, 1<<40 - 1, 1 << 40, 1 << 41} {
			for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
				got, gotErr := unix.Seek(fd, off, whence)
				want, wantErr := unix.Seek(kernelFD, off, whence)
				if got != want || gotErr != wantErr {
					t.Errorf("%s: seek %d from %d: got %d, %v, kernel's EROFS %d, %v", name, whence, off, got, gotErr, want, wantErr)
				}
			}
		}
	}
}

// as runs a shell command as another user. The shell, not this process, runs
// the programs of the mount: a fork waits for the exec, and the exec for us.
func as(uid int, command string, args ...string) (string, error) {
	argv := append([]string{"--reuid", strconv.Itoa(uid), "--regid", strconv.Itoa(uid), "--clear-groups", "sh", "-c", command, "sh"}, args...)
	out, err := exec.Command("setpriv", argv...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func TestKernelChecksPermissions(t *testing.T) {
	s := serve(t, testTree(t), nil)
	for _, p := range []string{filepath.Dir(s.dir), s.dir} { // t.TempDir is for us only
		for ; p != "/"; p = filepath.Dir(p) {
			if st, err := os.Stat(p); err == nil && p != s.dir {
				_ = os.Chmod(p, st.Mode()|0o011)
			}
		}
	}
	for _, test := range []struct {
		uid     int
		command string
		want    string // in the output; "!" for a failure
	}{
		{4711, "cat $1/sizes/1 | wc -c", "1"},
		{4711, "cat $1/700", "!Permission denied"},
		{4711, "ls $1/secret", "!Permission denied"},
		{4711, "cat $1/secret/inside", "!Permission denied"},
		{4711, "cat $1/xattrs/acl", "for 4711"},
		{4712, "cat $1/xattrs/acl", "!Permission denied"},
		{4711, "$1/id -u", "0"},                                              // setuid
		{4711, "$1/cat /proc/self/status | grep CapEff", "0000000000002000"}, // file capability
		{4711, "$1/700", "!Permission denied"},
		{4711, "echo x > $1/null && echo good", "good"}, // a device
		{4711, "getfattr -d -m - $1/xattrs/trusted", "user.of=\"all\""},
		{0, "getfattr -d -m - $1/xattrs/trusted", "trusted.of=\"root\""},
	} {
		got, err := as(test.uid, test.command, s.dir)
		want, fails := strings.CutPrefix(test.want, "!")
		if (err != nil) != fails || !strings.Contains(got, want) {
			t.Errorf("as %d: %s: got %q, %v, want %q", test.uid, test.command, got, err, test.want)
		}
	}
	if got, _ := as(4711, "getfattr -d -m - $1/xattrs/trusted", s.dir); strings.Contains(got, "trusted.of") {
		t.Errorf("another user sees trusted xattrs: %s", got)
	}
}

func TestXattrClasses(t *testing.T) {
	root := testTree(t)
	buf := make([]byte, 1<<16)
	for _, test := range []struct {
		classes []string
		user    error // what getxattr of a user xattr gives
		list    error
		absent  error
	}{
		{nil, unix.EOPNOTSUPP, unix.EOPNOTSUPP, unix.EOPNOTSUPP},
		{[]string{"security"}, unix.EOPNOTSUPP, nil, unix.EOPNOTSUPP},
		{[]string{"security", "user"}, nil, nil, unix.ENODATA},
	} {
		s := serve(t, root, func(o *Options) { o.XattrClasses = test.classes })
		large := filepath.Join(s.dir, "xattrs/large")
		for range 2 {
			n, err := unix.Getxattr(large, "user.large", buf)
			if err != test.user || err == nil && !bytes.Equal(buf[:n], noise(2, 60<<10)) {
				t.Errorf("%v: user.large: got %d bytes, %v, want %v", test.classes, n, err, test.user)
			}
			if n, err := unix.Getxattr(large, "user.large", nil); err != test.user || err == nil && n != 60<<10 {
				t.Errorf("%v: size of user.large: got %d, %v, want %v", test.classes, n, err, test.user)
			}
			if _, err := unix.Getxattr(large, "user.absent", buf); err != test.absent {
				t.Errorf("%v: user.absent: got %v, want %v", test.classes, err, test.absent)
			}
			if n, err := unix.Listxattr(large, buf); err != test.list || err == nil && string(buf[:n]) != "user.large\x00" {
				t.Errorf("%v: list: got %q, %v, want %v", test.classes, buf[:max(n, 0)], err, test.list)
			}
		}
		if test.user == nil {
			if _, err := unix.Getxattr(large, "user.large", buf[:10]); err != unix.ERANGE {
				t.Errorf("a small buffer: got %v, want ERANGE", err)
			}
			if _, err := unix.Listxattr(large, buf[:10]); err != unix.ERANGE {
				t.Errorf("a small buffer for the list: got %v, want ERANGE", err)
			}
			if n, err := unix.Listxattr(large, nil); err != nil || n != 11 {
				t.Errorf("size of the list: got %d, %v, want 11", n, err)
			}
		}
	}
}

// No program that is started inherits a descriptor of /dev/fuse.
func TestDescriptorIsNotInherited(t *testing.T) {
	root, _ := small()
	serve(t, root, nil)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, e := range fds {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); target != "/dev/fuse" {
			continue
		}
		found++
		fd, _ := strconv.Atoi(e.Name())
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d: flags %#x, %v, want FD_CLOEXEC", fd, flags, err)
		}
	}
	if found != 1 {
		t.Errorf("got %d descriptors of /dev/fuse, want 1", found)
	}
	out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
	if err != nil || strings.Contains(string(out), "fuse") {
		t.Errorf("a child has %s, %v", out, err)
	}
}

// mountOptions returns the line of /proc/self/mountinfo for dir.
func mountInfo(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, " "+dir+" ") {
			return line
		}
	}
	return ""
}

func TestMountOptions(t *testing.T) {
	root, _ := small()
	s := serve(t, root, func(o *Options) { o.Name = "registry.example/app:1"; o.ReadAhead = 1 << 20 })
	info := mountInfo(t, s.dir)
	for _, want := range []string{" ro,relatime ", " fuse.bootfs registry.example/app:1 ", "default_permissions", "allow_other", "max_read=1048576"} {
		if !strings.Contains(info, want) {
			t.Errorf("got mountinfo %q, want %q in it", info, want)
		}
	}
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(s.dev), unix.Minor(s.dev))
	if b, err := os.ReadFile(name); err != nil || string(b) != "1024\n" {
		t.Errorf("read_ahead_kb: got %q, %v, want 1024", b, err)
	}
	// Where /sys is read-only or another's, as in a container.
	value := "512"
	if err := writeKernel("sysfs", "/nowhere", strings.TrimPrefix(name, "/sys/"), value); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "512\n" {
		t.Errorf("read_ahead_kb after a write to a detached sysfs: got %q, %v, want 512", b, err)
	}
}

// TestReadAhead has the kernel read ahead less than it would, and then more again.
func TestReadAhead(t *testing.T) {
	root, _ := small()
	s := serve(t, root, func(o *Options) { o.ReadAhead = 32 << 10 })
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(s.dev), unix.Minor(s.dev))
	for _, want := range []int{32, 128} {
		if b, err := os.ReadFile(name); err != nil || string(b) != fmt.Sprintf("%d\n", want) {
			t.Errorf("read_ahead_kb: got %q, %v, want %d", b, err, want)
		}
		if err := s.SetReadAhead(128 << 10); err != nil {
			t.Error(err)
		}
	}
	if info := mountInfo(t, s.dir); !strings.Contains(info, "max_read=131072") {
		t.Errorf("got mountinfo %q, want requests of 128 KiB", info)
	}
}

func TestServeErrors(t *testing.T) {
	root, _ := small()
	plan, image := imageOf(t, root)
	if _, err := Serve(t.TempDir(), Options{Meta: plan.Meta()[:4095], Image: image}); err == nil {
		t.Error("served truncated metadata")
	}
	absent := filepath.Join(t.TempDir(), "absent")
	if _, err := Serve(absent, Options{Meta: plan.Meta(), Image: image}); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), absent) {
		t.Errorf("mount on %s: got %v", absent, err)
	}
	if out, err := exec.Command("sh", "-c", "ls -l /proc/$PPID/fd | grep -c fuse").Output(); strings.TrimSpace(string(out)) != "0" {
		t.Errorf("got %s descriptors of /dev/fuse left, %v", out, err)
	}
}

// read reads a whole file in this process.
func read(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// A failed read is EIO, says why in the log, and works through the same open
// file once the fault has healed.
func TestErrorAndRecovery(t *testing.T) {
	root, content := small()
	s := serve(t, root, nil)
	s.image.set(func(context.Context, int64) error {
		return errors.New("chunk 0123: pack sha256:4567 at 89: got sha256 ab, want 01")
	})
	f, err := os.Open(filepath.Join(s.dir, "dir/file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, len(content))
	for range 3 {
		if n, err := f.ReadAt(p, 0); n != 0 || !errors.Is(err, unix.EIO) {
			t.Errorf("got %d bytes, %v, want EIO", n, err)
		}
	}
	for _, want := range []string{"path=/dir/file", "chunk 0123", "pack sha256:4567 at 89", "at 0 failed"} {
		if log := s.log.String(); !strings.Contains(log, want) {
			t.Errorf("the log lacks %q: %s", want, log)
		}
	}
	s.image.heal()
	if n, err := f.ReadAt(p, 0); n != len(p) || err != nil || !bytes.Equal(p, content) {
		t.Errorf("after healing: got %d bytes, %v", n, err)
	}

	// An image that reads short must not become zeros.
	dropCaches(t)
	s.image.short.Store(true)
	if n, err := f.ReadAt(p, 0); n != 0 || !errors.Is(err, unix.EIO) {
		t.Errorf("image reads short: got %d bytes, %v, want EIO", n, err)
	}
	s.image.short.Store(false)
	if n, err := f.ReadAt(p, 0); n != len(p) || err != nil || !bytes.Equal(p, content) {
		t.Errorf("after healing: got %d bytes, %v", n, err)
	}
}

// A program that reads in a loop does not fill the log.
func TestLogIsBounded(t *testing.T) {
	root, _ := small()
	s := serve(t, root, nil)
	s.image.set(func(context.Context, int64) error { return errors.New("broken") })
	for range 500 {
		_, _ = read(filepath.Join(s.dir, "short"))
	}
	time.Sleep(1100 * time.Millisecond)
	_, _ = read(filepath.Join(s.dir, "short"))
	log := s.log.String()
	if n := strings.Count(log, "\n"); n < maxLinesPerSecond || n > 5*maxLinesPerSecond {
		t.Errorf("got %d lines for 1000 failures", n)
	}
	if !strings.Contains(log, "lines left out") {
		t.Error("the log does not say that lines were left out")
	}
}

// hangingFile serves a small root in which the file dir/file waits for before, and
// all else needs no waiting. It returns the file's name and content.
func hangingFile(t *testing.T, limit time.Duration, before func(ctx context.Context, off int64) error) (s *served, name string, content []byte) {
	t.Helper()
	root, content := small()
	s = serve(t, root, func(o *Options) { o.ReadTimeout = limit })
	other, err := read(filepath.Join(s.dir, "dir/other"))
	if err != nil || !bytes.Equal(other, content[:5000]) {
		t.Fatal(err)
	}
	large := s.image.last.Load() + 8192 // large files lie behind small ones
	s.image.set(func(ctx context.Context, off int64) error {
		if off < large {
			return nil
		}
		return before(ctx, off)
	})
	return s, filepath.Join(s.dir, "dir/file"), content
}

// readAtOnce reads a file at so many places, and returns what became of each.
func readAtOnce(name string, places int) <-chan error {
	done := make(chan error, places)
	for i := range places {
		go func() {
			fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				done <- err
				return
			}
			defer unix.Close(fd)
			_, err = unix.Pread(fd, make([]byte, 4096), int64(i)*40960)
			done <- err
		}()
	}
	return done
}

// A read that waits for the network ends within the time limit, one way or the
// other.
func TestHang(t *testing.T) {
	const (
		limit = 3 * time.Second
		slack = 30 * time.Second // of a busy machine
		many  = 50
	)
	s, name, content := hangingFile(t, limit, hang)
	start := time.Now()
	reads := readAtOnce(name, many)
	var page sync.WaitGroup
	page.Go(func() { // a page fault: python maps the file and touches it
		out, err := exec.Command("python3", "-c",
			"import mmap,os,sys; m=mmap.mmap(os.open(sys.argv[1],os.O_RDONLY),0,prot=mmap.PROT_READ); m[1<<20]", name).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGBUS {
			t.Errorf("page fault: got %v, %s, want SIGBUS", err, out)
		}
		if took := time.Since(start); took > limit+slack {
			t.Errorf("the page fault took %v", took)
		}
	})
	for range many {
		err := <-reads
		if took := time.Since(start); err != unix.EIO || took < limit/attempts || took > limit+slack {
			t.Errorf("read: got %v after %v, want EIO within %v", err, took, limit)
		}
	}
	page.Wait()
	s.image.heal()
	if got, err := read(name); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after healing: %v", err)
	}
}

// Reads that hang hold up nothing else.
func TestBesideHang(t *testing.T) {
	const many = 50
	release, hanging := make(chan struct{}), make(chan struct{}, many)
	s, name, content := hangingFile(t, -1, func(ctx context.Context, off int64) error {
		select {
		case hanging <- struct{}{}:
		default:
		}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return hang(ctx, off)
		}
	})
	reads := readAtOnce(name, many)
	<-hanging
	dropDentries(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := filepath.WalkDir(s.dir, func(_ string, d os.DirEntry, err error) error {
			if err == nil {
				_, err = d.Info()
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		if _, err := os.Readlink(filepath.Join(s.dir, "link")); err != nil {
			t.Error(err)
		}
		if got, err := read(filepath.Join(s.dir, "dir/other")); err != nil || !bytes.Equal(got, content[:5000]) {
			t.Error("what need not wait cannot be read", err)
		}
	}()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		t.Error("metadata and what need not wait are held up by reads that hang")
	}
	close(release)
	<-done
	for range many {
		if err := <-reads; err != nil {
			t.Errorf("a read that was held: %v", err)
		}
	}
}

func dropDentries(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		t.Fatal(err)
	}
}

// A program that waits for bytes can be killed.
func TestInterrupt(t *testing.T) {
	root := dir(entries{})
	for i := range 6 {
		root.Entries[strconv.Itoa(i)] = file(0o644, noise(uint64(i), 1<<20))
	}
	s := serve(t, &tree.Tree{Root: counted(root)}, nil)
	s.image.set(hang)
	for i, test := range []struct {
		name    string
		command string
	}{
		{"read ahead", "exec cat $1"},
		{"direct", "exec dd if=$1 iflag=direct bs=1M of=/dev/null"}, // waits for its own request
		{"page fault", `exec python3 -c "import mmap,os,sys; m=mmap.mmap(os.open(sys.argv[1],os.O_RDONLY),0,prot=mmap.PROT_READ); m[0]" $1`},
	} {
		for j, signal := range []os.Signal{unix.SIGKILL, unix.SIGTERM} {
			reads := s.image.reads.Load()
			cmd := exec.Command("sh", "-c", test.command, "sh", filepath.Join(s.dir, strconv.Itoa(2*i+j)))
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			s.image.readsOver(t, reads)
			start := time.Now()
			_ = cmd.Process.Signal(signal)
			err := cmd.Wait()
			if took := time.Since(start); err == nil || took > atOnce {
				t.Errorf("%s, %v: ended with %v after %v", test.name, signal, err, took)
			}
		}
	}
}

// A signal that does not kill does not disturb a read, and one that does is
// heard also after it.
func TestSignals(t *testing.T) {
	root := &tree.Tree{Root: counted(dir(entries{"a": file(0o644, noise(1, 4096)), "b": file(0o644, noise(2, 4096))}))}
	s := serve(t, root, nil)
	const python = `
import mmap,os,signal,sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
print(os.preadv(os.open(sys.argv[1], os.O_RDONLY|os.O_DIRECT), [mmap.mmap(-1, 4096)], 0))
signal.setitimer(signal.ITIMER_REAL, 0)`
	s.image.set(func(ctx context.Context, _ int64) error {
		select {
		case <-time.After(500 * time.Millisecond):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	reads := s.image.reads.Load()
	out, err := exec.Command("python3", "-c", python, filepath.Join(s.dir, "a")).CombinedOutput()
	if got := s.image.reads.Load() - reads; string(out) != "4096\n" || err != nil || got != 1 {
		t.Errorf("got %q, %v, %d reads, want 4096 bytes with one", out, err, got)
	}

	s.image.set(hang)
	reads = s.image.reads.Load()
	cmd := exec.Command("python3", "-c", python, filepath.Join(s.dir, "b"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.image.readsOver(t, reads)
	time.Sleep(100 * time.Millisecond)
	start := time.Now()
	_ = cmd.Process.Signal(unix.SIGTERM)
	err = cmd.Wait()
	if took := time.Since(start); err == nil || took > atOnce {
		t.Errorf("ended with %v after %v", err, took)
	}
}

// Close does not wait for reads that hang, and works in any place.
func TestClose(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, s *served)
	}{
		{"idle", func(*testing.T, *served) {}},
		{"aborted by another", func(t *testing.T, s *served) {
			if err := abort(s.dev); err != nil {
				t.Fatal(err)
			}
			s.Wait()
		}},
		{"unmounted by another", func(t *testing.T, s *served) {
			if err := unix.Unmount(s.dir, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
		}},
		{"detached", func(t *testing.T, s *served) {
			if err := s.Detach(); err != nil {
				t.Fatal(err)
			}
		}},
		{"moved", func(t *testing.T, s *served) {
			to := t.TempDir()
			if err := unix.Mount("none", to, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(to, unix.MNT_DETACH) })
			inner := filepath.Join(to, "inner")
			if err := os.Mkdir(inner, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(s.dir, inner, "", unix.MS_MOVE, ""); err != nil {
				t.Fatal(err)
			}
		}},
		{"covered", func(t *testing.T, s *served) {
			if err := unix.Mount("none", s.dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = unix.Unmount(s.dir, unix.MNT_DETACH) // the tmpfs
				_ = unix.Unmount(s.dir, unix.MNT_DETACH) // what was served
			})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			root, _ := small()
			s := serve(t, root, nil)
			s.image.set(hang)
			var wg sync.WaitGroup
			open := make(chan struct{}, 8)
			for i := range 8 {
				wg.Go(func() {
					fd, err := unix.Open(filepath.Join(s.dir, "dir/file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
					open <- struct{}{}
					if err != nil {
						t.Error(err)
						return
					}
					defer unix.Close(fd)
					if _, err := unix.Pread(fd, make([]byte, 4096), int64(i)<<17); err == nil {
						t.Error("a read that hangs came back with bytes")
					}
				})
			}
			for range 8 {
				<-open
			}
			s.image.readsOver(t, 7)
			test.prepare(t, s)
			start := time.Now()
			for range 2 {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			s.Wait()
			wg.Wait()
			if took := time.Since(start); took > atOnce {
				t.Errorf("closing took %v", took)
			}
			if log := s.log.String(); log != "" {
				t.Errorf("the server has something to say: %s", log)
			}
			if test.name != "covered" && mountInfo(t, s.dir) != "" {
				t.Errorf("still mounted: %s", mountInfo(t, s.dir))
			}
		})
	}
}

// A normal umount ends the server.
func TestUnmount(t *testing.T) {
	root, _ := small()
	s := serve(t, root, nil)
	if out, err := exec.Command("umount", s.dir).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v: %s", err, out)
	}
	done := make(chan struct{})
	go func() { s.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		t.Fatal("still serving")
	}
	if log := s.log.String(); log != "" {
		t.Errorf("the server has something to say: %s", log)
	}
}

// Reads from everywhere at once, some of which fail: never wrong bytes.
func TestStress(t *testing.T) {
	root, content := small()
	s := serve(t, root, nil)
	s.image.set(func(ctx context.Context, off int64) error {
		switch rand.IntN(6) {
		case 0, 1, 2:
			return errors.New("unlucky")
		case 3:
			time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
		}
		return nil
	})
	var good, bad atomic.Int64
	var wg sync.WaitGroup
	end := time.Now().Add(1500 * time.Millisecond)
	for range 8 {
		wg.Go(func() {
			fd, err := unix.Open(filepath.Join(s.dir, "dir/file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(fd)
			p := make([]byte, 300000)
			for time.Now().Before(end) {
				off := rand.IntN(len(content))
				p := p[:1+rand.IntN(len(p)-1)]
				n, err := unix.Pread(fd, p, int64(off))
				if err != nil {
					bad.Add(1)
					if err != unix.EIO {
						t.Errorf("got %v", err)
					}
					continue
				}
				good.Add(1)
				if want := content[off:min(off+len(p), len(content))]; n == 0 || !bytes.Equal(p[:n], want[:n]) {
					t.Errorf("wrong bytes: %d at %d", n, off)
				}
			}
		})
	}
	wg.Go(func() {
		for time.Now().Before(end) {
			dropCaches(t)
			time.Sleep(20 * time.Millisecond)
		}
	})
	wg.Wait()
	if good.Load() == 0 || bad.Load() == 0 {
		t.Errorf("got %d good and %d failed reads, want both", good.Load(), bad.Load())
	}
	s.image.heal()
	if got, err := read(filepath.Join(s.dir, "dir/file")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("after the storm: %v", err)
	}
}

// Many servers come and go without leaving anything.
func TestManyMounts(t *testing.T) {
	root, content := small()
	plan, image := imageOf(t, root)
	dir := t.TempDir()
	for range 30 {
		s, err := Serve(dir, Options{Meta: plan.Meta(), Image: image, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sh", "-c", "cat $1/dir/other", "sh", dir).Output()
		if err != nil || !bytes.Equal(out, content[:5000]) {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(fds, func(e os.DirEntry) bool {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		return target == "/dev/fuse"
	}) {
		t.Error("a descriptor of /dev/fuse is left")
	}
}
