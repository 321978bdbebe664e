package fill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// TestDockerCapabilities fills with what Docker gives a container: no
// SYS_ADMIN, no DAC_READ_SEARCH.
func TestDockerCapabilities(t *testing.T) {
	dir := t.TempDir()
	bootImage(t, dir, t.TempDir())
	out, err := child(t, dir, nil, "setpriv", "--bounding-set",
		"-all,+chown,+dac_override,+fsetid,+fowner,+mknod,+net_raw,+setgid,+setuid,+setfcap,+setpcap,+net_bind_service,+sys_chroot,+kill,+audit_write",
		"--inh-caps=-all").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("Left:[]")) {
		t.Fatalf("%v\n%s", err, out)
	}
	compareOver(t, dir, wantOver(t, sample()))
}

// TestFewCapabilities takes away what devices, file capabilities and owners
// need. Only the last is an error.
func TestFewCapabilities(t *testing.T) {
	const most = "-all,+chown,+dac_override,+fsetid,+fowner,+setgid,+setuid"
	dir := t.TempDir()
	out, err := child(t, dir, nil, "setpriv", "--bounding-set", most, "--inh-caps=-all").CombinedOutput()
	want := "Left:[device nodes: operation not permitted xattrs security.capability: operation not permitted]"
	if err != nil || !strings.Contains(string(out), want) {
		t.Fatalf("%v\n%s\nwant %s", err, out, want)
	}
	m := wantOver(t, sample())
	delete(m, "/dockerenv")
	delete(m, "/null")
	delete(m, "/disk")
	program := m["/program"]
	program.Xattrs = map[string]string{"user.x": "y"}
	m["/program"] = program
	compare(t, dir, m)

	out, err = child(t, t.TempDir(), nil, "setpriv", "--bounding-set", strings.Replace(most, "+chown,", "", 1), "--inh-caps=-all").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "set its owner") {
		t.Errorf("without CHOWN: %v\n%s", err, out)
	}
}

// TestTrusted leaves out xattrs that only SYS_ADMIN may set, and those that
// speak to an overlay never are.
func TestTrusted(t *testing.T) {
	tr := sample()
	large := tr.Root.Entries["large"]
	large.Xattrs = []tree.Xattr{{Name: "trusted.overlay.opaque", Value: []byte("y")}, {Name: "trusted.x", Value: []byte("x")}}
	m := newImage(t, tr)
	dir := t.TempDir()
	if r, err := m.fill(t, dir, Options{}); err != nil || r.Left != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	large.Xattrs = large.Xattrs[1:]
	compare(t, dir, want(t, tr))
	if n, err := unix.Lgetxattr(filepath.Join(dir, "large"), "trusted.overlay.opaque", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("trusted.overlay.opaque: %d bytes, %v", n, err)
	}
}

// TestFewDescriptors fills a tree deeper and wider than a process may have
// files open.
func TestFewDescriptors(t *testing.T) {
	dir := t.TempDir()
	if out, err := child(t, dir, nil, "prlimit", "--nofile=32:32").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	compare(t, dir, want(t, sample()))
}

// TestDeep has paths longer than the kernel takes at once.
func TestDeep(t *testing.T) {
	name := strings.Repeat("d", 200)
	deep := dirNode(map[string]*tree.Inode{"file": fileNode([]byte("deep")), "link": {Mode: unix.S_IFLNK | 0o777, Target: "file"}})
	for range 50 {
		deep = dirNode(map[string]*tree.Inode{name: deep})
	}
	m := newImage(t, &tree.Tree{Root: deep})
	dir := t.TempDir()
	if r, err := m.fill(t, dir, Options{}); err != nil || r.Files != 53 {
		t.Fatalf("%+v, %v", r, err)
	}
	at, err := unix.Open(dir, unix.O_PATH, 0)
	try(t, err)
	for range 50 {
		next, err := unix.Openat(at, name, unix.O_PATH, 0)
		try(t, err, unix.Close(at))
		at = next
	}
	defer unix.Close(at)
	fd, err := unix.Openat(at, "link", unix.O_RDONLY, 0)
	try(t, err)
	f := os.NewFile(uintptr(fd), "link")
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || string(b) != "deep" {
		t.Errorf("got %q, %v", b, err)
	}
	if err := os.RemoveAll(dir); err != nil { // which a test's own clean-up cannot do by path
		t.Error(err)
	}
}

// TestNoSpace fills a file system that is too small, or becomes so.
func TestNoSpace(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	mount := func(t *testing.T, size string) (dir string, resize func(string)) {
		dir = t.TempDir()
		try(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+size))
		t.Cleanup(func() { try(t, unix.Unmount(dir, unix.MNT_DETACH)) })
		return dir, func(size string) { try(t, unix.Mount("", dir, "", unix.MS_REMOUNT, "size="+size)) }
	}
	t.Run("before", func(t *testing.T) {
		dir, _ := mount(t, "1m")
		before := m.fetched.Load()
		_, err := m.fill(t, dir, Options{})
		if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "6.3 MB") || !strings.Contains(err.Error(), "1.0 MB is free") || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v", err)
		}
		if n := m.fetched.Load() - before; n != 0 {
			t.Errorf("%d chunks were fetched", n)
		}
	})
	t.Run("meanwhile", func(t *testing.T) {
		dir, resize := mount(t, "9m")
		filler := filepath.Join(dir, "neighbour")
		var once atomic.Bool
		m.before = func(n int64, _ index.Chunk) error {
			if once.CompareAndSwap(false, true) {
				return os.WriteFile(filler, make([]byte, 7<<20), 0o600)
			}
			return nil
		}
		_, err := m.fill(t, dir, Options{})
		m.before = nil
		if !errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "the next start goes on from there") || strings.Contains(err.Error(), "\n") {
			t.Fatalf("got %v", err)
		}
		try(t, os.Remove(filler))
		resize("12m")
		r, err := m.fill(t, dir, Options{})
		if err != nil || r.Resumed == 0 {
			t.Errorf("with room again: %+v, %v", r, err)
		}
		compare(t, dir, want(t, tr))
	})
}

// TestMissing has a chunk that no store has: the error names it and a file,
// nothing that comes last is touched, and the next call goes on from there.
func TestMissing(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir := t.TempDir()
	bootImage(t, dir, t.TempDir())
	c, err := m.x.At(m.x.Len() - 1)
	try(t, err)
	delete(m.chunks, c.ID)
	_, err = m.fill(t, dir, Options{Last: isBootLink(dir)})
	if !errors.Is(err, errGone) || !strings.Contains(err.Error(), c.ID.String()) || !strings.Contains(err.Error(), ": /") {
		t.Errorf("got %v", err)
	}
	if target, err := os.Readlink(filepath.Join(dir, "program")); err != nil || target != bootLink {
		t.Errorf("program: %q, %v", target, err)
	}
	finish(t, m, dir)
	compareOver(t, dir, wantOver(t, tr))
}

// slow is a fetcher whose store does not answer.
type slow struct{ *image }

func (slow) FetchBatch(ctx context.Context, cs []index.Chunk, _ func(int, []byte) error) error {
	<-ctx.Done()
	return fmt.Errorf("chunk %s: gave up: %w", cs[0].ID, context.Cause(ctx))
}

func TestPatience(t *testing.T) {
	m := newImage(t, sample())
	dir := t.TempDir()
	_, err := Root(t.Context(), dir, Options{Meta: m.meta, Index: m.x, Fetcher: slow{m}, State: filepath.Join(dir, ".state"), Patience: 50 * time.Millisecond})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no chunk has arrived for 50ms") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := Root(ctx, dir, Options{Meta: m.meta, Index: m.x, Fetcher: slow{m}, State: filepath.Join(dir, ".state")}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestShuffled has chunks in an order that opens every file before the first
// is complete.
func TestShuffled(t *testing.T) {
	entries := map[string]*tree.Inode{}
	for i := range 600 {
		entries[fmt.Sprint(i)] = fileNode(noise(uint64(i), 40_000))
	}
	tr := &tree.Tree{Root: dirNode(entries)}
	m := newImage(t, tr)
	order := func(yield func(int) bool) {
		for start := range 20 {
			for pos := start; pos < m.x.Len(); pos += 20 {
				if !yield(pos) || !yield(-1) || !yield(m.x.Len()) {
					return
				}
			}
		}
	}
	dir := t.TempDir()
	if r, err := m.fill(t, dir, Options{Order: order}); err != nil || r.Bytes != 600*40_000 {
		t.Fatalf("%+v, %v", r, err)
	}
	compare(t, dir, want(t, tr))
}

// TestMemory fills a large root and looks how much of the heap it takes.
func TestMemory(t *testing.T) {
	const files, size = 30, 4 << 20
	content := noise(5, size)
	entries := map[string]*tree.Inode{}
	for i := range files {
		n := fileNode(content)
		n.Content.Source = patched{content, i} // no chunk comes twice
		entries[fmt.Sprint(i)] = n
	}
	small := map[string]*tree.Inode{}
	for i := range 3000 {
		small[fmt.Sprint(i)] = fileNode([]byte(fmt.Sprint(i)))
	}
	entries["small"] = dirNode(small)
	m := newImage(t, &tree.Tree{Root: dirNode(entries)})
	defer debug.SetGCPercent(debug.SetGCPercent(20))
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	peak := uint64(0)
	m.before = func(n int64, _ index.Chunk) error {
		if n%500 == 0 {
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapInuse)
		}
		return nil
	}
	dir := t.TempDir()
	if _, err := m.fill(t, dir, Options{}); err != nil {
		t.Fatal(err)
	}
	grown := int64(peak) - int64(before.HeapInuse)
	t.Logf("%d MB filled, the heap grew by %d kB", files*size>>20, grown>>10)
	if grown > 64<<20 || peak == 0 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
}

// patched is content with a number in each of its KiB.
type patched struct {
	content []byte
	number  int
}

func (p patched) ReadAt(b []byte, off int64) (int, error) {
	n := copy(b, p.content[off:])
	for i := range b[:n] {
		if (off+int64(i))%1024 == 0 {
			b[i] = byte(p.number)
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// TestPlanSize counts the memory of the tables: a root may have millions of
// files.
func TestPlanSize(t *testing.T) {
	const files = 20_000
	entries := map[string]*tree.Inode{}
	for i := range files {
		entries[fmt.Sprint(i)] = fileNode([]byte{byte(i)})
	}
	m := newImage(t, &tree.Tree{Root: dirNode(entries)})
	p, err := newPlan(&Options{Meta: m.meta, Index: m.x})
	try(t, err)
	size := cap(p.regular)*8 + cap(p.extents)*16 + cap(p.others)*8 + cap(p.dirTable)*16 + cap(p.same)*4
	if size > 40*files {
		t.Errorf("%d bytes for each file", size/files)
	}
	if !slices.IsSortedFunc(p.extents, func(a, b extent) int { return int(a.block) - int(b.block) }) {
		t.Error("extents are not sorted")
	}
}
