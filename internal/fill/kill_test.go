package fill

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
)

// What TestMain does instead of tests, in a process that a test started.
const (
	childRoot  = "FILL_ROOT"  // fill this directory with sample
	childKill  = "FILL_KILL"  // die before chunk number N is delivered
	childPlace = "FILL_PLACE" // die when the N-th part of a file is in place
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childRoot); dir != "" {
		if err := fillAsChild(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is a process that fills dir with sample, run by the words of wrapper.
func child(t testing.TB, dir string, env []string, wrapper ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	try(t, err)
	args := append(wrapper, self)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(append(os.Environ(), childRoot+"="+dir), env...)
	return cmd
}

// fillAsChild prints the report and how many chunks were fetched.
func fillAsChild(dir string) error {
	m, err := makeImage(sample())
	if err != nil {
		return err
	}
	die := func() {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	if n, err := strconv.ParseInt(os.Getenv(childKill), 10, 64); err == nil {
		m.before = func(i int64, _ index.Chunk) error {
			if i == n {
				die()
			}
			return nil
		}
	}
	var progress func(done, total int64)
	if n, err := strconv.ParseInt(os.Getenv(childPlace), 10, 64); err == nil {
		var calls atomic.Int64
		progress = func(int64, int64) {
			if calls.Add(1) == n {
				die()
			}
		}
	}
	r, err := m.root(context.Background(), dir, Options{Last: isBootLink(dir), Progress: progress})
	fmt.Printf("%+v fetched %d of %d\n", r, m.fetched.Load(), len(m.chunks))
	return err
}

// TestKilled kills a fill at many moments, several times in a row each: what is
// there under the names that come last is whole at all times, and the call that
// is left alone makes the right tree without what is complete.
func TestKilled(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	manifest := wantOver(t, tr)
	program := tr.Root.Entries["program"]
	for name, kills := range map[string][]struct {
		env     []string
		wrapper []string
	}{
		"at chunks": {{env: []string{childKill + "=2"}}, {env: []string{childKill + "=200"}}, {env: []string{childKill + "=500"}}},
		"at pieces": {{env: []string{childPlace + "=3"}}, {env: []string{childPlace + "=150"}}, {env: []string{childPlace + "=400"}}, {env: []string{childPlace + "=250"}}},
		"at the tree": {
			{wrapper: kill("mkdirat", 1)}, {wrapper: kill("mkdirat", 3)}, {wrapper: kill("symlinkat", 1)}, {wrapper: kill("mknodat", 2)},
			{wrapper: kill("unlinkat", 2)}, {wrapper: kill("linkat", 1)},
		},
		"at attributes": {{wrapper: kill("fchown", 1)}, {wrapper: kill("fsetxattr", 1)}, {wrapper: kill("utimensat", 20)}, {wrapper: kill("utimensat", 40)}},
		"at renames":    {{wrapper: kill("renameat", 1)}, {wrapper: kill("renameat", 2)}, {wrapper: kill("renameat", 3)}, {wrapper: kill("renameat", 4)}},
		"at the end":    {{wrapper: kill("syncfs", 1)}, {wrapper: kill("fsync", 1)}},
		"at writes":     {{wrapper: kill("write", 1)}, {wrapper: kill("write", 3)}, {wrapper: kill("pwrite64", 20)}, {wrapper: kill("pwrite64", 60)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			bootImage(t, dir, t.TempDir())
			killed := 0
			for _, k := range kills {
				// Not each of them meets its call: an earlier one may have come further.
				out, err := child(t, dir, k.env, k.wrapper...).CombinedOutput()
				if err != nil && !wasKilled(err) {
					t.Fatalf("%v %v: %v\n%s", k.env, k.wrapper, err, out)
				}
				if err != nil {
					killed++
				}
				at := filepath.Join(dir, "program")
				if target, err := os.Readlink(at); err == nil && target == bootLink {
					continue
				}
				var st unix.Stat_t
				if err := unix.Lstat(at, &st); err != nil || st.Mode != program.Mode || st.Size != program.Size || st.Uid != program.UID || st.Mtim.Sec != program.MtimeSec {
					t.Fatalf("program is neither what it was nor what it will be: %+v, %v", st, err)
				}
			}
			if killed == 0 {
				t.Error("no fill was killed")
			}
			finish(t, m, dir)
			compareOver(t, dir, manifest)
		})
	}
}

func kill(call string, when int) []string {
	return []string{"strace", "-f", "-qqq", "-o", "/dev/null", "-e", "trace=" + call, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, when)}
}

// wasKilled reports whether a process ended as strace and the kernel say it when
// it was killed.
func wasKilled(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled()
}

// finish fills dir in this process and checks that nothing is fetched that the
// journal has.
func finish(t *testing.T, m *image, dir string) {
	t.Helper()
	noted := map[index.ID]bool{}
	b, err := os.ReadFile(filepath.Join(dir, ".state", journalName))
	if !errors.Is(err, fs.ErrNotExist) {
		try(t, err)
	}
	j := &journal{done: make([]uint64, (m.x.Len()+63)/64)}
	if len(b) > headerSize {
		j.replay(b[headerSize:], m.x.Len())
	}
	for i := range m.x.Len() {
		if c, _ := m.x.At(i); j.has(i) {
			noted[c.ID] = true
		}
	}
	again := newImage(t, sample())
	again.before = func(_ int64, c index.Chunk) error {
		if noted[c.ID] {
			t.Errorf("chunk %s is in the journal and was fetched again", c.ID)
		}
		return nil
	}
	r, err := again.fill(t, dir, Options{Last: isBootLink(dir)})
	if err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if len(noted) > 0 && r.Resumed == 0 {
		t.Errorf("%d chunks are in the journal: %+v", len(noted), r)
	}
}

// TestKilledAnytime kills fills at random times after they have begun.
func TestKilledAnytime(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	manifest := wantOver(t, tr)
	kills := 0
	for range 4 {
		dir := t.TempDir()
		bootImage(t, dir, t.TempDir())
		for range 5 {
			cmd := child(t, dir, nil)
			try(t, cmd.Start())
			for {
				if _, err := os.Stat(filepath.Join(dir, ".state", journalName)); err == nil {
					break
				}
				time.Sleep(time.Millisecond)
			}
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			try(t, cmd.Process.Kill())
			if err := cmd.Wait(); wasKilled(err) {
				kills++
			} else if err != nil {
				t.Fatal(err)
			}
		}
		finish(t, m, dir)
		compareOver(t, dir, manifest)
	}
	if kills == 0 {
		t.Error("every fill ended before it was killed")
	}
}

// TestResume counts the chunks that a fill fetches after one that was killed:
// those that were not delivered, and those that were just being written.
func TestResume(t *testing.T) {
	tr := sample()
	whole := newImage(t, tr)
	if _, err := whole.fill(t, t.TempDir(), Options{}); err != nil {
		t.Fatal(err)
	}
	all := int(whole.fetched.Load())
	for _, n := range []int{20, all / 2, all - 5} {
		dir := t.TempDir()
		if err := child(t, dir, []string{childKill + "=" + strconv.Itoa(n)}).Run(); !wasKilled(err) {
			t.Fatal(err)
		}
		m := newImage(t, tr)
		if r, err := m.fill(t, dir, Options{}); err != nil || r.Resumed == 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if got, most := int(m.fetched.Load()), all-n+workers(); got > most {
			t.Errorf("killed at chunk %d of %d: %d were fetched again, want %d at most", n, all, got, most)
		}
	}
}

// TestPowerCut has the journal of another run of the kernel: what it says is
// not believed, unless it says that all is done.
func TestPowerCut(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir := t.TempDir()
	bootImage(t, dir, t.TempDir())
	if err := child(t, dir, []string{childKill + "=500"}).Run(); !wasKilled(err) {
		t.Fatal(err)
	}
	anotherBoot := func() {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, ".state", journalName), os.O_RDWR, 0)
		try(t, err)
		_, err = f.WriteAt([]byte("00000000"), int64(headerSize-bootIDSize))
		try(t, err, f.Close())
	}
	anotherBoot()
	// What the power cut left: empty files, and some with zeros.
	try(t, os.WriteFile(filepath.Join(dir, "many/small100"), nil, 0o644), os.WriteFile(filepath.Join(dir, "many/small101"), make([]byte, 37*101), 0o644))
	r, err := m.fill(t, dir, Options{Last: isBootLink(dir)})
	if err != nil || r.Resumed != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	anotherBoot()
	before := m.fetched.Load()
	if r, err = m.fill(t, dir, Options{}); err != nil || r.Bytes != 0 || m.fetched.Load() != before {
		t.Errorf("complete before the power cut: %+v, %v", r, err)
	}
	compareOver(t, dir, wantOver(t, tr))
}

// TestStale has files that are not what the journal says of them.
func TestStale(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	for name, damage := range map[string]func(at string) error{
		"gone":      os.Remove,
		"truncated": func(at string) error { return os.Truncate(at, 5) },
		"a symlink": func(at string) error { return errors.Join(os.Remove(at), os.Symlink("/etc/passwd", at)) },
		"a FIFO":    func(at string) error { return errors.Join(os.Remove(at), unix.Mkfifo(at, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := killInLarge(t)
			try(t, damage(filepath.Join(dir, "large")))
			if r, err := m.fill(t, dir, Options{}); err != nil || r.Resumed != 0 {
				t.Fatalf("%+v, %v", r, err)
			}
			compare(t, dir, want(t, tr))
		})
	}
}

// killInLarge kills fills of new directories until one of them has a part of
// the file large that the journal knows, and returns that.
func killInLarge(t *testing.T) string {
	t.Helper()
	m := newImage(t, sample())
	p, err := newPlan(&Options{Meta: m.meta, Index: m.x})
	try(t, err)
	for n := 100; ; n += 50 {
		dir := t.TempDir()
		if err := child(t, dir, []string{childKill + "=" + strconv.Itoa(n)}).Run(); !wasKilled(err) {
			t.Fatalf("before chunk %d: %v", n, err)
		}
		b, err := os.ReadFile(filepath.Join(dir, ".state", journalName))
		try(t, err)
		j := &journal{done: make([]uint64, (m.x.Len()+63)/64)}
		j.replay(b[headerSize:], m.x.Len())
		for i, at := range p.regular {
			if p.path(at) != "/large" {
				continue
			}
			inode, err := p.inode(p.regular[i])
			try(t, err)
			left, all, err := p.wanted(inode, j.has)
			try(t, err)
			if left > 0 && left < all {
				return dir
			}
		}
	}
}

// TestTwoAtOnce starts a fill while another one runs.
func TestTwoAtOnce(t *testing.T) {
	m := newImage(t, sample())
	dir := t.TempDir()
	var second error
	m.before = func(n int64, _ index.Chunk) error {
		if n == 5 {
			_, second = newImage(t, sample()).fill(t, dir, Options{})
		}
		return nil
	}
	if _, err := m.fill(t, dir, Options{}); err != nil {
		t.Error(err)
	}
	if second == nil || !strings.Contains(second.Error(), "another process is filling it") {
		t.Errorf("the second one: %v", second)
	}
}

// TestJournal reads journals that were cut off or damaged anywhere.
func TestJournal(t *testing.T) {
	file, err := os.CreateTemp(t.TempDir(), "")
	try(t, err)
	defer file.Close()
	j := &journal{file: file, done: make([]uint64, 2)}
	same := make([]uint32, 128)
	same[3], same[70], same[1] = 70, 3, 1
	try(t, j.add(3, same), j.add(1, same))
	try(t, j.finish())
	b, err := os.ReadFile(file.Name())
	try(t, err)
	if len(b) != 16+12+8 {
		t.Fatalf("%d bytes", len(b))
	}
	for cut := range len(b) + 1 {
		got := &journal{done: make([]uint64, 2)}
		good, complete := got.replay(b[:cut], 100)
		want := 0
		for _, end := range []int{16, 28, 36} {
			if cut >= end {
				want = end
			}
		}
		if good != want || complete != (cut == len(b)) || got.has(3) != (cut >= 16) || got.has(70) != (cut >= 16) || got.has(1) != (cut >= 28) {
			t.Errorf("cut at %d: %d good bytes, complete %v, chunks %b", cut, good, complete, got.done)
		}
	}
	for i := range b {
		damaged := append([]byte(nil), b...)
		damaged[i] ^= 1
		got := &journal{done: make([]uint64, 2)}
		if _, complete := got.replay(damaged, 100); complete {
			t.Errorf("damaged at %d: it is complete", i)
		}
	}
	// A position that the image does not have, and a count of 2^32-2.
	far := &journal{file: file, done: make([]uint64, 1)}
	far.replay(binary.LittleEndian.AppendUint32(nil, 1<<32-2), 5)
	if good, _ := far.replay(b, 5); good != len(b) || far.done[0] != 1<<3|1<<1 {
		t.Errorf("an index of 5 chunks: %d good bytes, chunks %b", good, far.done)
	}
}

// TestFaults has system calls that fail as a broken or a full disk makes them
// fail: the error is one line, and the next call makes the right tree. What was
// in the page cache when the disk failed is written again.
func TestFaults(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	manifest := wantOver(t, tr)
	for call, test := range map[string]struct{ errno, want string }{
		"pwrite64":  {"EIO:when=30", "input/output error"},
		"syncfs":    {"EIO", "write it to disk: input/output error"},
		"fsync":     {"EIO", "input/output error"},
		"renameat":  {"EIO:when=2", "input/output error"},
		"symlinkat": {"EDQUOT", "what is in place stays"},
		"mkdirat":   {"ENOSPC", "what is in place stays"},
		"fsetxattr": {"ENOSPC", ": set its xattr "},
		"openat2":   {"ENOSYS", "no openat2, which came with Linux 5.6"},
	} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			bootImage(t, dir, t.TempDir())
			out, err := child(t, dir, nil, "strace", "-f", "-qqq", "-o", "/dev/null", "-e", "trace="+call, "-e", "inject="+call+":error="+test.errno).CombinedOutput()
			if err == nil || !strings.Contains(string(out), test.want) || strings.Count(string(out), "\n") != 2 {
				t.Errorf("got %v, %s\nwant %q", err, out, test.want)
			}
			if call == "syncfs" {
				if b, err := os.ReadFile(filepath.Join(dir, ".state", journalName)); err != nil || len(b) != 0 {
					t.Errorf("the journal says of %d bytes that they are in place, %v", len(b), err)
				}
			}
			finish(t, m, dir)
			compareOver(t, dir, manifest)
		})
	}
}
