package nodecache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/index"
)

func claim(t *testing.T, c *Cache, id index.ID, want bool) (release func()) {
	t.Helper()
	release, ok := c.Claim(id)
	if ok != want {
		t.Fatalf("claim of %s: got %v, want %v", id, ok, want)
	}
	return release
}

func TestClaim(t *testing.T) {
	dir := t.TempDir()
	a, b := open(t, dir, Options{}), open(t, dir, Options{})
	one, _ := chunk(1, 10)
	two, _ := chunk(2, 10)
	release := claim(t, a, one, true)
	claim(t, b, one, false)
	claim(t, a, one, false) // another call of the same process
	claim(t, b, two, true)
	claim(t, a, two, false)
	release()
	claim(t, b, one, true)
	claim(t, a, one, false)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	// What b holds after it was closed ends with its claims.
	claim(t, a, one, false)
}

// TestClaimOfReaders: a lock file that may only be read serves for claims, too.
func TestClaimOfReaders(t *testing.T) {
	dir := t.TempDir()
	id, _ := chunk(1, 10)
	writer := open(t, dir, Options{})
	claim(t, writer, id, true)()
	var readers []*Cache
	for range 2 {
		c := open(t, dir, Options{})
		f, err := os.Open(filepath.Join(dir, lockName))
		if err != nil {
			t.Fatal(err)
		}
		c.claims.locks = &locks{File: f}
		readers = append(readers, c)
	}
	all := append(readers, writer)
	for i, owner := range all {
		release := claim(t, owner, id, true)
		for j, other := range all {
			if j != i {
				claim(t, other, id, false)
			}
		}
		release()
	}
}

// TestClaimWithoutLocks: what stands in the place of the lock file costs that
// others are not told, and nothing else.
func TestClaimWithoutLocks(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, surprise := range map[string]func(string) error{
		"FIFO":             func(f string) error { return unix.Mkfifo(f, 0o644) },
		"directory":        func(f string) error { return os.Mkdir(f, 0o755) },
		"symlink":          func(f string) error { return os.Symlink(outside, f) },
		"dangling":         func(f string) error { return os.Symlink(outside+"2", f) },
		"character device": func(f string) error { return unix.Mknod(f, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := surprise(filepath.Join(dir, lockName)); err != nil {
				t.Fatal(err)
			}
			a, b := open(t, dir, Options{}), open(t, dir, Options{})
			id, _ := chunk(1, 10)
			release := claim(t, a, id, true)
			claim(t, a, id, false)
			claim(t, b, id, true)
			release()
			claim(t, a, id, true)
		})
	}
	if _, err := os.Lstat(outside + "2"); err == nil {
		t.Error("a file was made outside of the cache")
	}
}

// TestClaimInAReplacedFile: processes find one another again soon after the lock
// file was removed or replaced, and what is claimed meanwhile stays claimed.
func TestClaimInAReplacedFile(t *testing.T) {
	dir := t.TempDir()
	lock := filepath.Join(dir, lockName)
	a, b := open(t, dir, Options{}), open(t, dir, Options{})
	one, _ := chunk(1, 10)
	two, _ := chunk(2, 10)
	for name, replace := range map[string]func() error{
		"removed":  func() error { return os.Remove(lock) },
		"replaced": func() error { return errors.Join(os.WriteFile(lock+"2", nil, 0o644), os.Rename(lock+"2", lock)) },
	} {
		release := claim(t, a, one, true)
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(claimsCheck + 50*time.Millisecond)
		releaseTwo := claim(t, a, two, true)
		claim(t, b, two, false)
		claim(t, a, one, false)
		before := a.claims.locks
		release()
		releaseTwo()
		if a.claims.locks != before || before.held != 0 {
			t.Errorf("%s: got %d claims left in the file", name, before.held)
		}
		claim(t, b, two, true)()
	}
}

// What the processes of the tests here are told.
const (
	flightCache  = "BOOTFS_TEST_FLIGHT_CACHE" // directory
	flightStore  = "BOOTFS_TEST_FLIGHT_STORE" // URL
	flightChunks = 200
	flightSize   = 3000 // bytes of a chunk
)

// flight reads all chunks as a boot does: in batches ahead, and one by one at
// random meanwhile.
func flight() error {
	cache, err := Open(os.Getenv(flightCache), Options{})
	if err != nil {
		return err
	}
	defer cache.Close()
	store, err := httpstore.New(os.Getenv(flightStore), httpstore.Options{})
	if err != nil {
		return err
	}
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Cache: cache, Stores: []chunkstore.Store{store}})
	defer f.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var all []index.Chunk
	for i := range flightChunks {
		id, _ := chunk(uint64(i), flightSize)
		all = append(all, index.Chunk{ID: id, Size: flightSize})
	}
	errs := make(chan error, 2)
	go func() {
		for _, i := range rand.Perm(len(all)) {
			if _, err := f.Fetch(ctx, all[i], nil); err != nil {
				errs <- err
				return
			}
		}
		errs <- nil
	}()
	go func() {
		var failed error
		for i := 0; i < len(all) && failed == nil; i += 8 {
			failed = f.FetchBatch(ctx, all[i:min(i+8, len(all))], func(int, []byte) error { return nil })
		}
		errs <- failed
	}()
	return errors.Join(<-errs, <-errs)
}

// upstream is a web server with chunks that counts what it is asked for.
type upstream struct {
	*httptest.Server
	frames map[string][]byte // by path, without the process

	mu      sync.Mutex // guards what follows
	fetched int
	on      map[int]func(process string) // called before the answer to a request, by its number
}

func newUpstream(t *testing.T) *upstream {
	u := &upstream{frames: make(map[string][]byte)}
	for i := range flightChunks {
		id, frame := chunk(uint64(i), flightSize)
		dir, name := chunkstore.Place(id)
		u.frames["/"+dir+"/"+name] = frame
	}
	u.Server = httptest.NewServer(u)
	t.Cleanup(u.Close)
	return u
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	process, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	frame := u.frames["/"+path]
	if frame == nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	u.mu.Lock()
	u.fetched++
	on := u.on[u.fetched]
	u.mu.Unlock()
	if on != nil {
		on(process)
	}
	time.Sleep(5 * time.Millisecond)
	w.Write(frame)
}

// TestOneFlight lets several processes read the same chunks through one cold
// cache. Whatever happens to some of them, and to the file with the claims, the
// others read all of it, in time; and as long as there is no one who keeps them
// from it on purpose, they fetch little more than once what all of them need.
func TestOneFlight(t *testing.T) {
	if os.Getenv(flightCache) != "" {
		if err := flight(); err != nil {
			t.Fatal(err)
		}
		return
	}
	signal := func(s syscall.Signal) func(*os.Process) { return func(p *os.Process) { p.Signal(s) } }
	for _, test := range []struct {
		name      string
		processes int
		before    func(lock string) error
		// on does something to the process that has just asked for its n-th chunk of
		// all, or to the file.
		on    map[int]func(*os.Process)
		after func(lock string) error // when half is fetched
		lost  int                     // processes that do not end
		most  float64                 // fetches of a chunk
	}{
		{name: "two", processes: 2, most: 1.2},
		{name: "many", processes: 8, most: 1.2},
		{name: "killed", processes: 8, on: map[int]func(*os.Process){50: signal(unix.SIGKILL), 120: signal(unix.SIGKILL)}, lost: 2, most: 1.2},
		{name: "stopped", processes: 6, on: map[int]func(*os.Process){60: signal(unix.SIGSTOP)}, lost: 1, most: 1.2},
		{name: "all is locked for ever", processes: 3, before: lockAll(t), most: 3},
		{name: "a FIFO", processes: 3, before: func(lock string) error { return unix.Mkfifo(lock, 0o644) }, most: 3},
		{name: "a symlink", processes: 3, before: func(lock string) error { return os.Symlink("/etc/passwd", lock) }, most: 3},
		{name: "a directory", processes: 3, before: func(lock string) error { return os.Mkdir(lock, 0o755) }, most: 3},
		{name: "removed", processes: 3, after: os.Remove, most: 2},
		{name: "replaced by a FIFO", processes: 3, after: func(lock string) error { return errors.Join(os.Remove(lock), unix.Mkfifo(lock, 0o644)) }, most: 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			lock := filepath.Join(dir, lockName)
			if test.before != nil {
				if err := test.before(lock); err != nil {
					t.Fatal(err)
				}
			}
			u := newUpstream(t)
			cmds, outs := make([]*exec.Cmd, test.processes), make([]bytes.Buffer, test.processes)
			lost := make(map[string]bool)
			var mu sync.Mutex // guards lost
			u.mu.Lock()
			u.on = make(map[int]func(string))
			for n, do := range test.on {
				u.on[n] = func(process string) {
					mu.Lock()
					defer mu.Unlock()
					var i int
					fmt.Sscan(process, &i)
					lost[process] = true
					do(cmds[i].Process)
				}
			}
			if test.after != nil {
				u.on[flightChunks/2] = func(string) {
					if err := test.after(lock); err != nil {
						t.Error(err)
					}
				}
			}
			u.mu.Unlock()
			mu.Lock() // until all are started
			for i := range cmds {
				cmds[i] = exec.Command(os.Args[0], "-test.run", "^TestOneFlight$", "-test.timeout", "5m")
				cmds[i].Env = append(os.Environ(), flightCache+"="+dir, fmt.Sprintf("%s=%s/%d", flightStore, u.URL, i))
				cmds[i].Stdout, cmds[i].Stderr = &outs[i], &outs[i]
				if err := cmds[i].Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { cmds[i].Process.Kill() })
			}
			mu.Unlock()
			start := time.Now()
			ended := make(chan int)
			for i := range cmds {
				go func() { cmds[i].Wait(); ended <- i }()
			}
			for running := len(cmds); running > test.lost; {
				i := <-ended
				mu.Lock()
				gone := lost[fmt.Sprint(i)]
				mu.Unlock()
				if gone {
					continue
				}
				running--
				if !cmds[i].ProcessState.Success() {
					t.Errorf("process %d: %v\n%s", i, cmds[i].ProcessState, &outs[i])
				}
			}
			took := time.Since(start)
			for i := range cmds {
				cmds[i].Process.Kill()
			}
			u.mu.Lock()
			ratio := float64(u.fetched) / flightChunks
			u.mu.Unlock()
			t.Logf("%d processes in %v, %.2f fetches of each chunk", test.processes, took.Round(time.Millisecond), ratio)
			if ratio < 1 || ratio > test.most {
				t.Errorf("got %.2f fetches of each chunk, want at most %.1f", ratio, test.most)
			}
			if took > time.Minute {
				t.Errorf("got all in %v, want it within a few seconds", took)
			}
		})
	}
}

// lockAll locks all that there is to lock, as a hostile neighbour may.
func lockAll(t *testing.T) func(lock string) error {
	return func(lock string) error {
		f, err := os.OpenFile(lock, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		t.Cleanup(func() { f.Close() })
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	}
}

// claimFrom is a cache whose first chunk a process in another user namespace
// claims.
const claimFrom = "BOOTFS_TEST_CLAIM_FROM"

// TestClaimFromOtherNamespace: containers whose users are others on the host see
// one another's claims.
func TestClaimFromOtherNamespace(t *testing.T) {
	id, _ := chunk(1, 10)
	if dir := os.Getenv(claimFrom); dir != "" {
		c := open(t, dir, Options{})
		_, ok := c.Claim(id)
		fmt.Printf("claimed: %v\n", ok)
		os.Stdin.Read(make([]byte, 1))
		return
	}
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	c := open(t, dir, Options{})
	release := claim(t, c, id, true)
	// elsewhere starts a process that claims the chunk, as the user that is 100000
	// here and root there, until end is called.
	elsewhere := func(want bool) (end func()) {
		cmd := exec.Command("/proc/self/exe", "-test.run", "^TestClaimFromOtherNamespace$")
		cmd.Env = append(os.Environ(), claimFrom+"="+dir)
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1000}}
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids,
			Credential: &syscall.Credential{},
		}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 100)
		n, err := out.Read(got)
		if line := fmt.Sprintf("claimed: %v\n", want); err != nil || string(got[:n]) != line {
			t.Errorf("got %q, %v, want %q", got[:n], err, line)
		}
		return func() { in.Close(); cmd.Wait() }
	}
	elsewhere(false)()
	release()
	end := elsewhere(true)
	claim(t, c, id, false)
	end()
	claim(t, c, id, true)
}

// BenchmarkClaim measures a claim and its end, beside those of others.
func BenchmarkClaim(b *testing.B) {
	for _, others := range []int{0, 1000, 10000} {
		b.Run(fmt.Sprint("others=", others), func(b *testing.B) {
			dir := b.TempDir()
			c, other := open(b, dir, Options{}), open(b, dir, Options{})
			for i := range others {
				if _, ok := other.Claim(index.SHA256.Sum([]byte{byte(i), byte(i >> 8)})); !ok {
					b.Fatal("not claimed")
				}
			}
			id, _ := chunk(1, 10)
			for b.Loop() {
				release, ok := c.Claim(id)
				if !ok {
					b.Fatal("not claimed")
				}
				release()
			}
		})
	}
}
