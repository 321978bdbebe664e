package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// startTime is [testenv.StartTime] in milliseconds.
func startTime(b *testing.B, dir string, argv ...string) (ms float64) {
	d, err := testenv.StartTime(b.Context(), dir, argv...)
	if err != nil {
		b.Fatal(err)
	}
	return float64(d) / 1e6
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
