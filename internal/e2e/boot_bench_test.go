package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// containerRoot in the environment makes the test binary the first process of
// a container with that root: the least that an engine does.
const containerRoot = "E2E_CONTAINER_ROOT"

// enterContainer makes dir the root of this process's mount namespace, with
// /proc and /dev/fuse, prints the time and becomes the program.
func enterContainer(dir string, argv []string) error {
	dev := filepath.Join(dir, "dev")
	for _, step := range []func() error{
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, "") },
		func() error { return unix.Mount("proc", filepath.Join(dir, "proc"), "proc", 0, "") },
		func() error { return unix.Mount("tmpfs", dev, "tmpfs", 0, "") },
		func() error {
			return unix.Mknod(filepath.Join(dev, "fuse"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229)))
		},
		func() error { return unix.PivotRoot(dir, filepath.Join(dir, "mnt")) },
		func() error { return unix.Chdir("/") },
		func() error { return unix.Unmount("/mnt", unix.MNT_DETACH) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	fmt.Println(time.Now().UnixNano())
	return unix.Exec(argv[0], argv, []string{"PATH=/usr/local/bin:/usr/bin:/bin", "BOOTFS_PREFETCH=none"})
}

// startTime runs argv in a container with the root dir and returns how long it
// took from its exec to the program's own: argv must end in one that prints the
// time.
func startTime(b *testing.B, dir string, argv ...string) (ms float64) {
	cmd := exec.Command("/proc/self/exe", argv...)
	cmd.Env = []string{containerRoot + "=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("%v: %v\n%s", argv, err, stderr.String())
	}
	fields := strings.Fields(string(out))
	if len(fields) != 2 {
		b.Fatalf("%v: got %q, want two times", argv, out)
	}
	from, err1 := strconv.ParseInt(fields[0], 10, 64)
	to, err2 := strconv.ParseInt(fields[1], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		b.Fatal(err)
	}
	return float64(to-from) / 1e6
}

// BenchmarkBoot measures the way from boot's exec to the app's, with a warm
// cache, beside the app's own exec in a root that is already there. The app is
// date, so both times include its dynamic linking.
func BenchmarkBoot(b *testing.B) {
	converted, native := b.TempDir(), b.TempDir()
	exportImage(b, w.image, converted)
	exportImage(b, w.source, native)
	cache := filepath.Join(converted, ".bootfs/rootfs.castr")
	for _, dir := range []string{cache, filepath.Join(converted, ".bootfs/rw")} {
		if err := unix.Mount(b.TempDir(), dir, "", unix.MS_BIND, ""); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				b.Error(err)
			}
		})
	}
	lazy := []string{"/.bootfs/boot", "/usr/bin/date", "+%s%N"}
	startTime(b, converted, lazy...) // fills the cache

	var boot, plain float64
	for b.Loop() {
		boot += startTime(b, converted, lazy...)
		plain += startTime(b, native, lazy[1:]...)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(boot/float64(b.N), "boot-ms")
	b.ReportMetric(plain/float64(b.N), "plain-ms")
}

// exportImage writes the root filesystem of an image into dir.
func exportImage(b *testing.B, image, dir string) {
	b.Helper()
	script := `id=$(docker create "$1" true) && docker export "$id" | tar -x -C "$2" && docker rm --volumes "$id"`
	cmd := exec.Command("bash", "-o", "pipefail", "-c", script, "bash", image, dir)
	cmd.Env = append(os.Environ(), w.docker.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("export %s: %v\n%s", image, err, out)
	}
}

// BenchmarkFirstOutput measures from docker run to the end of a program that
// loads what Python services load, in each mode; pulling counts where the engine
// has to pull what it runs.
func BenchmarkFirstOutput(b *testing.B) {
	docker := func(b *testing.B, args ...string) {
		b.Helper()
		if _, err := w.docker.Output(b.Context(), args...); err != nil {
			b.Fatal(err)
		}
	}
	cache := b.TempDir()
	mode := func(image string, args ...string) []string {
		return append(append([]string{"run", "--rm", "--network", "host"}, args...), image)
	}
	for _, c := range []struct {
		name, image string
		run         []string
	}{
		{"source", w.source, mode(w.source)},
		{"fuse", w.image, mode(w.image, "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN")},
		{"fill", w.image, mode(w.image, "--env", "BOOTFS_MODE=fill")},
		{"fill-cache", w.image, mode(w.image, "--env", "BOOTFS_MODE=fill", "--volume", cache+":/.bootfs/rootfs.castr")},
	} {
		b.Run(c.name, func(b *testing.B) {
			docker(b, c.run...) // fills the cache, if it has one
			for b.Loop() {
				b.StopTimer()
				docker(b, "rmi", "--force", c.image)
				b.StartTimer()
				docker(b, "pull", "--quiet", c.image)
				docker(b, c.run...)
			}
		})
	}
}
