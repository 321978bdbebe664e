package e2e

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// readAll reads all files of dataImage's and says how many were right and how
// many wrong; the last line of a sha256sum that is killed may be a part. It then waits for as many seconds as /signal/sleep says.
const readAll = `cd /data && sha256sum * | awk 'length($1 $2) == 128 { if ($1 == $2) right++; else wrong++ } END { print right + 0, wrong + 0 }'; sleep $(cat /signal/sleep)`

// TestBootKilled kills boot with SIGKILL at random moments of the start, of
// reading ahead, of reading and of writing to the node cache, in both modes. The
// container ends with it, whole and at once; what is in the cache is right, and
// the next start, of the same container or of another, reads right bytes.
func TestBootKilled(t *testing.T) {
	rounds := 8
	if soak {
		rounds = 200
	}
	source, image := w.proxy.address+"/killed:source", w.proxy.address+"/killed:converted"
	dataImage(t, source, 16<<20)
	convertAndPull(t, source, image)
	cache, signal := t.TempDir(), t.TempDir()
	want := docker(t, "run", "--rm", "--volume", sleeping(t, signal, 0), source, "sh", "-c", readAll)
	if want.code != 0 || !strings.HasSuffix(want.stdout, " 0\n") {
		t.Fatalf("the source image: %+v", want)
	}
	began := time.Now()
	if r := run(t, "--volume", signal+":/signal", image, "sh", "-c", readAll); r.code != 0 || r.stdout != want.stdout {
		t.Fatalf("the converted image: %+v", r)
	}
	whole := time.Since(began)
	const seed = 1
	rng := rand.New(rand.NewPCG(seed, 0))
	moments := make(map[string]int)
	for round := range rounds {
		if round%4 == 0 {
			emptyDir(t, cache)
		}
		mode := flags
		if round%2 == 1 {
			mode = fillFlags
		}
		args := append([]string{"create", "--volume", cache + ":/.bootfs/rootfs.castr", "--volume", sleeping(t, signal, 600),
			"--env", "BOOTFS_PREFETCH=" + []string{"none", "start", "all"}[rng.IntN(3)]}, mode...)
		r := docker(t, append(args, image, "sh", "-c", readAll)...)
		if r.code != 0 {
			t.Fatal(r.stderr)
		}
		id := strings.TrimSpace(r.stdout)
		removeAtEnd(t, id)

		// Early moments are tried more often: more goes on in the start.
		after := time.Duration(rng.Float64() * rng.Float64() * float64(whole))
		what := fmt.Sprintf("round %d (seed %d), killed after %v", round, seed, after)
		started := make(chan result, 1)
		go func() { started <- docker(t, "start", id) }()
		boot := bootOf(t, id)
		time.Sleep(after)
		if err := unix.Kill(boot, unix.SIGKILL); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if r := <-started; r.code != 0 {
			t.Errorf("%s: docker start: %+v", what, r)
		}
		eventually(t, what+": the container ends", func() bool {
			return docker(t, "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", id).stdout == "exited 137\n"
		})
		if left := processesOf(t, id, "cgroup"); len(left) > 0 {
			t.Errorf("%s: processes %v are left", what, left)
		}
		switch out := docker(t, "logs", id).stdout; {
		case out == want.stdout:
			moments["after all was read"]++
		case out == "" || strings.HasSuffix(out, " 0\n"): // awk may live a moment longer
			moments["before all was read"]++
		default:
			t.Errorf("%s: it had read %q, want %q", what, out, want.stdout)
		}
		checkChunkFiles(t, what, cache)

		sleeping(t, signal, 0)
		again := []string{"start", "--attach", id}
		if rng.IntN(2) == 0 {
			again = append(append([]string{"run", "--rm", "--volume", cache + ":/.bootfs/rootfs.castr", "--volume", signal + ":/signal"}, mode...), image, "sh", "-c", readAll)
		}
		r = docker(t, again...)
		// A container that was started again has the old log, but not here.
		if r.code != 0 || r.stdout != want.stdout {
			t.Fatalf("%s, the next start (docker %s): exit %d, %q, want %q; stderr %q", what, again[0], r.code, r.stdout, want.stdout, r.stderr)
		}
		checkChunkFiles(t, what+", after the next start", cache)
		if r := docker(t, "rm", "--force", "--volumes", id); r.code != 0 {
			t.Fatal(r.stderr)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounts), id) {
			t.Errorf("%s: a mount of the container is left", what)
		}
	}
	t.Logf("%d kills: %v", rounds, moments)
	if left := hiddenFiles(t, cache); left > rounds*mostStaged {
		t.Errorf("%d files in the making are left in the cache", left)
	}
}

// mostStaged is how many chunks may be on their way to the disk when a boot is
// killed: each leaves a hidden file, which the cache can make use of.
const mostStaged = 1100

// sleeping makes readAll sleep for so many seconds and returns the volume that
// says it to it.
func sleeping(t *testing.T, dir string, seconds int) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "sleep"), []byte(strconv.Itoa(seconds)), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir + ":/signal"
}

// emptyDir removes what is in dir.
func emptyDir(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// bootOf waits for the first process of container id to be boot and returns its
// process id, which is the program's where that has taken boot's place already, or 0
// if the container has ended.
func bootOf(t *testing.T, id string) int {
	t.Helper()
	var started result // of a container that runs, or has run
	deadline := time.Now().Add(2 * time.Minute)
	for n := 1; time.Now().Before(deadline); n++ {
		late := n%500 == 0
		for _, pid := range processesOf(t, id, "cgroup") {
			exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if err == nil && exe == "/.bootfs/boot" {
				return pid
			}
			late = late || err == nil && !strings.Contains(exe, "runc")
		}
		if !late {
			time.Sleep(time.Millisecond)
			continue
		}
		started = docker(t, "inspect", "--format", "{{.State.Status}} {{.State.Pid}}", id)
		if status, pid, _ := strings.Cut(strings.TrimSpace(started.stdout), " "); status == "running" || status == "exited" {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("container %s has no process called boot: %+v", id, started)
	return 0
}

// processesOf returns the processes in whose /proc file what stands.
func processesOf(t *testing.T, what, file string) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if b, err := os.ReadFile(filepath.Join("/proc", e.Name(), file)); err == nil && strings.Contains(string(b), what) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// checkChunkFiles checks that what has a chunk's name below dir is that chunk,
// and returns how many there are.
func checkChunkFiles(t *testing.T, when, dir string) (n int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		id, ok := chunkstore.AtPlace(filepath.Base(filepath.Dir(file)), d.Name())
		if !ok {
			return nil // hidden
		}
		frame, err := os.ReadFile(file)
		var h zstd.Header
		if err == nil {
			err = h.Decode(frame)
		}
		if err == nil {
			_, err = chunkstore.Decode(nil, frame, index.SHA256, index.Chunk{ID: id, Size: int(h.FrameContentSize)})
		}
		if err != nil {
			t.Errorf("%s: %s has %d bytes: %v", when, file, len(frame), err)
		}
		n++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// hiddenFiles returns how many files of a cache are in the making.
func hiddenFiles(t *testing.T, dir string) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", ".*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}
