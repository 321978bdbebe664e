package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// noSockets is a seccomp profile with which a container ends as soon as one of
// its processes opens a socket that could lead to a network, be it to look up a
// name.
func noSockets(t *testing.T) (flag []string) {
	t.Helper()
	type arg struct {
		Index int    `json:"index"`
		Value int    `json:"value"`
		Op    string `json:"op"`
	}
	type rule struct {
		Names  []string `json:"names"`
		Action string   `json:"action"`
		Args   []arg    `json:"args"`
	}
	var rules []rule
	for _, family := range []int{unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET} {
		rules = append(rules, rule{[]string{"socket"}, "SCMP_ACT_KILL_PROCESS", []arg{{0, family, "SCMP_CMP_EQ"}}})
	}
	b, err := json.Marshal(map[string]any{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "seccomp.json")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return []string{"--security-opt", "seccomp=" + file}
}

// preload fills a cache with all chunks of an image.
func preload(t *testing.T, image string, more ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	preloadTo(t, image, dir, more...)
	return dir
}

// preloadTo is preload with a directory.
func preloadTo(t *testing.T, image, dir string, more ...string) {
	t.Helper()
	if out, err := w.command(append([]string{"preload", "-q", image, "--cache", dir}, more...)...).CombinedOutput(); err != nil {
		t.Fatalf("preload: %v\n%s", err, out)
	}
}

// namesChunk matches a line of boot that says of which chunk it is.
var namesChunk = regexp.MustCompile(`chunk [0-9a-f]{64}: `)

// TestOffline forbids the network to containers that could use it: with a
// preloaded cache they open no socket, without one they end at once.
func TestOffline(t *testing.T) {
	watched := append([]string{"run", "--rm", "--network", "host"}, noSockets(t)...)
	const bySIGSYS = 128 + int(unix.SIGSYS)
	if r := docker(t, append(watched, "--env", "BOOTFS_MODE=fill", w.image, "true")...); r.code != bySIGSYS {
		t.Errorf("a boot that fetches: exit %d, want %d as it opens a socket\n%s", r.code, bySIGSYS, r.stderr)
	}
	cache := []string{"--volume", preload(t, w.image) + ":/.bootfs/rootfs.castr"}
	for mode, flags := range map[string][]string{
		"fuse": {"--env", "BOOTFS_MODE=fuse", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN"},
		"fill": {"--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet"},
	} {
		t.Run(mode, func(t *testing.T) {
			flags := append(append(watched, flags...), "--env", "BOOTFS_OFFLINE=1")
			docker(t, append(append(flags, cache...), w.image, "python3", "-c", "import ssl, os; print([v for v in os.environ if v.startswith('BOOTFS')])")...).want(t, "[]\n")

			r := docker(t, append(flags, w.image, "python3", "-c", "print(1)")...)
			if r.code != 125 || strings.Count(r.stderr, "\n") != 1 || !namesChunk.MatchString(r.stderr) ||
				!strings.Contains(r.stderr, "no network is used: fill the cache with bootfs-convert preload IMAGE --cache DIR, and add -v DIR:/.bootfs/rootfs.castr") {
				t.Errorf("without a cache: exit %d, want 125 and one line that says what to do, got:\n%s", r.code, r.stderr)
			}
		})
	}
	if r := docker(t, append(watched, "--env", "BOOTFS_OFFLINE=yes", w.image, "true")...); r.code != 125 || r.stderr != "bootfs: BOOTFS_OFFLINE=\"yes\": want 1, or 0\n" {
		t.Errorf("a setting that cannot be read: exit %d, %q", r.code, r.stderr)
	}
}

// TestPreloadGoesOn kills a preload on its way. The next one fetches the rest.
func TestPreloadGoesOn(t *testing.T) {
	dir := t.TempDir()
	killed := w.command("preload", "-q", w.image, "--cache", dir)
	before := w.proxy.bytes.Load()
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	within(t, 5*time.Minute, "a part is fetched, and some of it is on the disk", func() bool {
		return w.proxy.bytes.Load()-before > 30<<20 && chunksIn(t, dir) > 0
	})
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = killed.Wait() // that it was killed
	var v struct {
		Complete bool
		Images   []struct {
			Chunks       int
			Had, Fetched converted.Amount
		}
	}
	for i, want := range []string{"the rest", "nothing"} {
		r := output(t, w.command("preload", "-q", "--json", w.image, "--cache", dir))
		if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || r.code != 0 {
			t.Fatalf("preload: %v: %+v", err, r)
		}
		p := v.Images[0]
		t.Logf("%d chunks were there, %d fetched", p.Had.Chunks, p.Fetched.Chunks)
		if !v.Complete || p.Had.Chunks == 0 || p.Had.Chunks+p.Fetched.Chunks != p.Chunks || i == 1 && p.Fetched.Chunks > 0 {
			t.Errorf("got %+v, want %s fetched", v, want)
		}
	}
}

// cutOffMachine is an engine that has never seen a network, nor an image.
type cutOffMachine struct{ *testenv.Docker }

func startCutOff(t *testing.T) cutOffMachine {
	t.Helper()
	dir, err := os.MkdirTemp("", "cutoff") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	d, err := testenv.StartCutOffDocker(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(d.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return cutOffMachine{d}
}

// docker runs the client of the machine's engine.
func (m cutOffMachine) docker(t *testing.T, args ...string) result {
	t.Helper()
	return output(t, m.Command(t.Context(), args...))
}

// output runs a command to its end.
func output(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatalf("%s: %v", cmd, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// bundle writes an image to a file, under another name.
func bundle(t *testing.T, image, name string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "bundle")
	if out, err := w.command("bundle", "-q", "--name", name, image, file).CombinedOutput(); err != nil {
		t.Fatalf("bundle: %v\n%s", err, out)
	}
	return file
}

// TestMachineWithoutNetwork carries an image to a machine that has no network, in
// one file. The cache that is filled from it is then damaged: the boot image
// alone tells what is wrong.
func TestMachineWithoutNetwork(t *testing.T) {
	t.Parallel()
	source := sumsOf(docker(t, "run", "--rm", "--user", "root", w.source, "sh", "-c", sums).stdout)
	file := bundle(t, w.image, "app:lazy")
	m := startCutOff(t)
	if r := m.docker(t, "load", "--input", file); r.code != 0 || !strings.Contains(r.stdout, "Loaded image: app:lazy\n") {
		t.Fatalf("docker load: %+v\n%s", r, m.Log())
	}
	cache := filepath.Join(t.TempDir(), "cache")
	if r := output(t, testenv.CutOff(w.convert, "preload", "-q", "oci-archive:"+file, "--cache", cache)); r.code != 0 {
		t.Fatalf("preload: %+v", r)
	}
	offline := []string{"--network", "none", "--env", "BOOTFS_OFFLINE=1", "--user", "root"}
	fuse := append([]string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN"}, offline...)
	fill := append([]string{"--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet"}, offline...)
	// read runs a container that prints the sum of every file.
	read := func(t *testing.T, flags []string, cache string, more ...string) result {
		t.Helper()
		args := append(append([]string{"run", "--rm"}, flags...), "--volume", cache+":/.bootfs/rootfs.castr")
		return m.docker(t, append(append(args, more...), "app:lazy", "sh", "-c", sums)...)
	}
	right := func(t *testing.T, r result) {
		t.Helper()
		if got := sumsOf(r.stdout); r.code != 0 || r.stderr != "" || !maps.Equal(withoutOwn(got), source) {
			t.Errorf("exit %d, %d files, want %d as in the source\n%.2000s", r.code, len(got), len(source), r.stderr)
		}
	}
	t.Run("fuse", func(t *testing.T) { right(t, read(t, fuse, cache)) })
	t.Run("fill", func(t *testing.T) { right(t, read(t, fill, cache)) })

	// What reads the files is in memory when the cache is damaged.
	hostile := filepath.Join(t.TempDir(), "hostile")
	if out, err := exec.Command("cp", "-a", cache, hostile).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	args := append(append([]string{"run", "--detach", "--env", "BOOTFS_PREFETCH=none"}, fuse...), "--volume", hostile+":/.bootfs/rootfs.castr", "app:lazy",
		"sh", "-c", "echo /etc/passwd | xargs sha256sum; find /etc -maxdepth 1 -print0 >/dev/null; echo up; exec sleep 3000")
	r := m.docker(t, args...)
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	id := strings.TrimSpace(r.stdout)
	within(t, 5*time.Minute, "the container is up", func() bool { return strings.HasSuffix(m.docker(t, "logs", id).stdout, "up\n") })
	damaged := damageChunks(t, hostile, 200)

	r = m.docker(t, "exec", id, "sh", "-c", sums)
	failed := strings.Count(r.stderr, "Input/output error")
	t.Logf("%d chunks damaged: %d files read, %d refused", damaged, strings.Count(r.stdout, "\n"), failed)
	got := sumsOf(r.stdout)
	for file, sum := range got {
		if source[file] != sum {
			t.Errorf("%s: sha256 %s, in the source image %s", file, sum, source[file])
		}
	}
	if failed == 0 || len(got)+failed != len(source) {
		t.Errorf("%d files read and %d refused, the source image has %d", len(got), failed, len(source))
	}
	eventually(t, "the log says which chunk, and what to do", func() bool {
		log := m.docker(t, "logs", id).stderr
		return namesChunk.MatchString(log) && strings.Contains(log, "bootfs-convert preload IMAGE --cache DIR")
	})
	if r := read(t, fill, hostile); r.code != 125 || strings.Count(r.stderr, "\n") != 1 || !namesChunk.MatchString(r.stderr) {
		t.Errorf("a fill from the damaged cache: exit %d, want 125 and a line that names a chunk:\n%.2000s", r.code, r.stderr)
	}
	if r := m.docker(t, "rm", "--force", "--volumes", id); r.code != 0 {
		t.Error(r.stderr)
	}

	// A store in a directory heals it, offline as well: the fill reads every chunk.
	right(t, read(t, fill, hostile, "--env", "BLOB_STORE=/store", "--volume", cache+":/store:ro"))
	for _, f := range faultsOf(t, file, hostile) {
		if f.Offset >= metadataOf(t, file) { // the metadata are in the boot image, and not fetched
			t.Errorf("after the fill, %s: chunk %s at %d", f.Reason, f.Chunk, f.Offset)
		}
	}
	if r := output(t, testenv.CutOff(w.convert, "preload", "-q", "oci-archive:"+file, "--cache", hostile)); r.code != 0 || len(faultsOf(t, file, hostile)) > 0 {
		t.Errorf("preload again: %+v", r)
	}
}

// faultsOf returns what a cache lacks of the image in a bundle.
func faultsOf(t *testing.T, bundle, cache string) []converted.VerifiedDamage {
	t.Helper()
	var v struct {
		Roots []converted.Verification `json:"roots"`
	}
	r := output(t, w.command("verify", "-q", "--json", "--store", cache, "oci-archive:"+bundle))
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || len(v.Roots) != 1 {
		t.Fatalf("verify: %v: %+v", err, r)
	}
	return v.Roots[0].Faults
}

// metadataOf is how many bytes the metadata of the image in a bundle have.
func metadataOf(t *testing.T, bundle string) int64 {
	t.Helper()
	var v struct {
		Platforms []struct{ MetaBytes int64 }
	}
	r := output(t, w.command("inspect", "-q", "--json", "oci-archive:"+bundle))
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || len(v.Platforms) != 1 {
		t.Fatalf("inspect: %v: %+v", err, r)
	}
	return v.Platforms[0].MetaBytes
}

// withoutOwn leaves out what stands in a root that was filled and is bootfs's
// own.
func withoutOwn(sums map[string]string) map[string]string {
	maps.DeleteFunc(sums, func(file, _ string) bool { return strings.HasPrefix(file, "/.bootfs/") })
	return sums
}

// damageChunks does something to n chunks of a cache, in turn each of what a
// hostile or unlucky neighbour could do, and returns how many it has found.
func damageChunks(t *testing.T, cache string, n int) int {
	t.Helper()
	chunks, err := filepath.Glob(filepath.Join(cache, "????", "*.cacnk"))
	if err != nil || len(chunks) < 2*n {
		t.Fatalf("%d chunks in the cache: %v", len(chunks), err)
	}
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(chunks), func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
	for i, file := range chunks[:n] {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		switch i % 5 {
		case 0:
			b[len(b)/2] ^= 0x10
		case 1:
			b = b[:len(b)/2]
		case 2:
			b = nil
		case 3:
			if b, err = os.ReadFile(chunks[n+i]); err != nil { // another's, and good
				t.Fatal(err)
			}
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if i%5 == 4 {
			continue
		}
		if err := os.WriteFile(file, b, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// TestBundleInOtherEngines loads a bundle where index.json counts.
func TestBundleInOtherEngines(t *testing.T) {
	t.Parallel()
	_, image := fidelityImage(t, "plain")
	file, cache := bundle(t, image, "registry.example.com/app:lazy"), preload(t, image)
	dir := t.TempDir()
	t.Run("podman", func(t *testing.T) {
		p, err := testenv.StartPodman(t.Context(), dir, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
		if r := output(t, p.Command(t.Context(), "load", "--input", file)); r.code != 0 || !strings.Contains(r.stdout, "registry.example.com/app:lazy") {
			t.Fatalf("podman load: %+v", r)
		}
		output(t, p.Command(t.Context(), "run", "--rm", "--network", "none", "--env", "BOOTFS_OFFLINE=1", "--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet",
			"--volume", cache+":/.bootfs/rootfs.castr", "registry.example.com/app:lazy", "echo", "loaded")).want(t, "loaded\n")
	})
	t.Run("containerd", func(t *testing.T) {
		c, err := testenv.StartContainerd(t.Context(), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
		if r := output(t, c.Command(t.Context(), "image", "import", file)); r.code != 0 {
			t.Fatalf("ctr image import: %+v", r)
		}
		output(t, c.Command(t.Context(), "image", "list", "--quiet")).want(t, "registry.example.com/app:lazy\n")
	})
}
