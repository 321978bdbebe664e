package main

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// TestMemory converts an image that is larger than the memory it may take:
// half a gigabyte that does not compress, and 40,000 small files. Images of any
// size take the same but for 1 kB for each file and chunk; 10 GiB with 156,000
// files and 229,000 chunks were measured at 374 MiB.
func TestMemory(t *testing.T) {
	const limit = 400 << 20
	archive := filepath.Join(t.TempDir(), "image.tar")
	writeArchive(t, archive, 40_000, 32, 16<<20)
	tmp := t.TempDir()
	cmd := command(t, tmp, "-q", "--boot", "/bin/true", "docker-archive:"+archive, "oci:"+filepath.Join(t.TempDir(), "dst")+":x")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	peak := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
	t.Logf("peak %d MiB, %.1f s of CPU", peak>>20, (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds())
	if peak > limit {
		t.Errorf("peak of %d MiB, want at most %d", peak>>20, limit>>20)
	}
}

// writeArchive writes what docker save would for an image of one layer.
func writeArchive(t *testing.T, name string, small, large int, size int64) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	layer, err := os.Create(filepath.Join(t.TempDir(), "layer.tar"))
	check(err)
	defer layer.Close()
	sum := sha256.New()
	w := tar.NewWriter(io.MultiWriter(layer, sum))
	random := rand.NewChaCha8([32]byte{1})
	add := func(name string, size int64) {
		check(w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size}))
		_, err := io.CopyN(w, random, size)
		check(err)
	}
	for i := range small {
		add(fmt.Sprintf("small/%d/%d", i/500, i), int64(i%3000))
	}
	for i := range large {
		add(fmt.Sprintf("large/%d", i), size)
	}
	check(w.Close())
	length, err := layer.Seek(0, io.SeekEnd)
	check(err)
	_, err = layer.Seek(0, io.SeekStart)
	check(err)

	f, err := os.Create(name)
	check(err)
	defer f.Close()
	a := tar.NewWriter(f)
	file := func(name string, b string) {
		check(a.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}))
		_, err := io.WriteString(a, b)
		check(err)
	}
	file("manifest.json", `[{"Config":"config.json","RepoTags":["big:latest"],"Layers":["layer.tar"]}]`)
	file("config.json", fmt.Sprintf(`{"os":"linux","architecture":%q,"config":{"Cmd":["/x"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, runtime.GOARCH, sum.Sum(nil)))
	check(a.WriteHeader(&tar.Header{Name: "layer.tar", Typeflag: tar.TypeReg, Mode: 0o644, Size: length}))
	_, err = io.Copy(a, layer)
	check(err)
	check(a.Close())
}
