package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// disk is a filesystem of its own whose power can be cut.
type disk struct {
	t     *testing.T
	image string
	dir   string // where it is mounted
	kind  string
}

func newDisk(t *testing.T, kind string) *disk {
	t.Helper()
	d := &disk{t, filepath.Join(t.TempDir(), "disk"), t.TempDir(), kind}
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.image, 400<<20); err != nil { // xfs wants 300 MiB
		t.Fatal(err)
	}
	d.run("mkfs."+kind, "-q", d.image)
	d.mount()
	t.Cleanup(func() { unix.Unmount(d.dir, unix.MNT_DETACH) })
	return d
}

func (d *disk) run(name string, args ...string) {
	d.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func (d *disk) mount() {
	d.t.Helper()
	options := "loop"
	if d.kind == "xfs" {
		options += ",nouuid" // the one before the cut may be mounted somewhere
	}
	d.run("mount", "-t", d.kind, "-o", options, d.image, d.dir)
}

// cut makes an end of all writing, as a power cut does: of what was not on disk,
// nothing comes there any more, with or without the end of the journal.
func (d *disk) cut(journal bool) {
	d.t.Helper()
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
		logFlush   = 1
		noLogFlush = 2
	)
	how := noLogFlush
	if journal {
		how = logFlush
	}
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), shutdown, how); err != nil {
		d.t.Fatalf("shutdown of %s: %v", d.kind, err)
	}
}

// sync brings all to the disk.
func (d *disk) sync() {
	d.t.Helper()
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		d.t.Fatal(err)
	}
}

// restart mounts what is on the disk as the machine would that has power again.
// It mounts a copy: in another mount namespace somebody may have the filesystem
// for longer, and who mounts it then gets the one without power.
func (d *disk) restart() {
	d.t.Helper()
	time.Sleep(200 * time.Millisecond) // what the loop device was given before the cut
	copied := d.image + ".copy"
	d.run("cp", "--sparse=always", d.image, copied)
	if err := unix.Unmount(d.dir, unix.MNT_DETACH); err != nil {
		d.t.Fatal(err)
	}
	d.image = copied
	d.mount()
}

// TestPowerCuts cuts the power of the disk that boot, preload and bootfs-convert
// write to. What runs on does not notice, if the disk was only a cache. After the
// restart all that has a chunk's name is that chunk, whole; an image in a layout
// is the old or the new one; and all works again.
func TestPowerCuts(t *testing.T) {
	rounds := 4
	if soak {
		rounds = 50
	}
	source, image := w.proxy.address+"/cut:source", w.proxy.address+"/cut:converted"
	dataImage(t, source, 16<<20)
	convertAndPull(t, source, image)
	small, _ := fidelityImage(t, "plain")
	signal := t.TempDir()
	want := docker(t, "run", "--rm", "--volume", sleeping(t, signal, 0), source, "sh", "-c", readAll)
	if want.code != 0 || !strings.HasSuffix(want.stdout, " 0\n") {
		t.Fatalf("the source image: %+v", want)
	}
	const seed = 1
	rng := rand.New(rand.NewPCG(seed, 0))
	for round := range rounds {
		kind := "ext4"
		if round%6 == 5 {
			kind = "xfs"
		}
		subject := []string{"boot", "preload", "store", "layout"}[round%4]
		name := fmt.Sprintf("round %d, seed %d, %s on %s", round, seed, subject, kind)
		t.Run(name, func(t *testing.T) {
			d := newDisk(t, kind)
			cache := filepath.Join(d.dir, "rootfs.castr")
			if err := os.Mkdir(cache, 0o755); err != nil {
				t.Fatal(err)
			}
			d.sync()
			boot := append(append([]string{"run", "--volume", cache + ":/.bootfs/rootfs.castr", "--volume", signal + ":/signal",
				"--env", "BOOTFS_PREFETCH=all"}, flags...), image, "sh", "-c", readAll)
			after, journal := time.Duration(rng.Int64N(int64(1500*time.Millisecond))), rng.IntN(2) == 0
			// ended runs a command, cuts the power meanwhile, and tells how it ended.
			ended := func(cmd *exec.Cmd) (string, error) {
				t.Helper()
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(after)
				d.cut(journal)
				err := cmd.Wait()
				return out.String(), err
			}
			switch subject {
			case "boot":
				r := docker(t, append([]string{"create"}, boot[1:]...)...)
				id := strings.TrimSpace(r.stdout)
				removeAtEnd(t, id)
				started := make(chan result, 1)
				go func() { started <- docker(t, "start", "--attach", id) }()
				bootOf(t, id)
				time.Sleep(after)
				d.cut(journal)
				if r := <-started; r.code != 0 || r.stdout != want.stdout {
					t.Errorf("as its cache went, cut after %v: exit %d, %q, want %q; stderr %q", after, r.code, r.stdout, want.stdout, r.stderr)
				}
				docker(t, "rm", "--force", "--volumes", id)
			case "preload":
				out, err := ended(w.command("preload", "--cache", cache, image))
				t.Logf("cut after %v: %v: %.200s", after, err, out)
			case "store":
				out, err := ended(w.command("-q", "--boot", w.boot, "--store", cache, source, w.registry.Address+"/cut:stored"))
				t.Logf("cut after %v: %v: %.200s", after, err, out)
			case "layout":
				to := "oci:" + filepath.Join(d.dir, "layout") + ":cut"
				if out, err := w.command("-q", "--boot", w.boot, small, to).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				older := layoutIndex(t, to)
				d.sync()
				out, err := ended(w.command("-q", "--boot", w.boot, source, to))
				t.Logf("cut after %v: %v: %.200s", after, err, out)
				d.restart()
				if got := layoutIndex(t, to); got != older && got != layoutIndex(t, image) {
					t.Errorf("index %s is neither that of the old image nor that of the new one", got)
				}
				if out, err := w.command("-q", "--boot", w.boot, source, to).CombinedOutput(); err != nil {
					t.Errorf("the next conversion: %v: %s", err, out)
				}
				if out, err := w.command("check", "-q", source, to).CombinedOutput(); err != nil {
					t.Errorf("check: %v: %s", err, out)
				}
				return
			}
			d.restart()
			t.Logf("%d chunks were on disk", checkChunkFiles(t, name, cache))
			if subject == "store" {
				if out, err := w.command("-q", "--boot", w.boot, "--store", cache, source, w.registry.Address+"/cut:stored").CombinedOutput(); err != nil {
					t.Errorf("the next conversion: %v: %s", err, out)
				}
				if out, err := w.command("check", "-q", source, w.registry.Address+"/cut:stored").CombinedOutput(); err != nil {
					t.Errorf("check: %v: %s", err, out)
				}
			}
			r := docker(t, append([]string{"run", "--rm"}, boot[1:]...)...)
			if r.code != 0 || r.stdout != want.stdout {
				t.Errorf("the next start: exit %d, %q, want %q; stderr %q", r.code, r.stdout, want.stdout, r.stderr)
			}
			checkChunkFiles(t, name+", after the next start", cache)
		})
	}
}

// layoutIndex reads a converted image whole and returns its index digest.
func layoutIndex(t *testing.T, image string) string {
	t.Helper()
	ref, err := transport.Parse(image, "")
	if err != nil {
		t.Fatal(err)
	}
	o, err := converted.Open(t.Context(), ref, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	root, err := o.Images[0].Spool(t.Context(), t.TempDir(), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	root.Close()
	return o.Images[0].Config.IndexDigest
}
