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
	"strings"
	"syscall"
	"testing"
)

// TestMemory converts an image that is larger than the memory it may take:
// 416 MiB that does not compress, and 40,000 small files. Then it does
// so once more, with the first as base and with a cache, and half of the large
// files changed. Images of any size take the same but for 1 kB for each file
// and chunk; 10 GiB with 156,000 files and 229,000 chunks were measured at
// 373 MiB, and at 378 MiB with the base.
func TestMemory(t *testing.T) {
	const limit = 400 << 20
	dst, cache := "oci:"+filepath.Join(t.TempDir(), "dst")+":x", filepath.Join(t.TempDir(), "cache")
	for changed := range 2 {
		archive := filepath.Join(t.TempDir(), "image.tar")
		writeArchive(t, archive, 40_000, 26, 13*changed, 16<<20)
		cmd := command(t, t.TempDir(), "-q", "--boot", "/bin/true", "--cache-from", cache, "--cache-to", cache, "docker-archive:"+archive, dst)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		peak := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
		t.Logf("peak %d MiB, %.1f s of CPU", peak>>20, (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds())
		if peak > limit {
			t.Errorf("peak of %d MiB, want at most %d", peak>>20, limit>>20)
		}
	}
}

// writeArchive writes what docker save would for an image of two layers: many
// small files below, large ones above. changed says how many of the large ones
// are those of another version.
func writeArchive(t *testing.T, name string, small, large, changed int, size int64) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(name)
	check(err)
	defer f.Close()
	a := tar.NewWriter(f)
	add := func(w *tar.Writer, name string, size int64, content io.Reader) {
		check(w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size}))
		_, err := io.CopyN(w, content, size)
		check(err)
	}
	layer := func(name string, fill func(*tar.Writer)) (sum []byte) {
		spool, err := os.Create(filepath.Join(t.TempDir(), name))
		check(err)
		defer spool.Close()
		h := sha256.New()
		w := tar.NewWriter(io.MultiWriter(spool, h))
		fill(w)
		check(w.Close())
		length, err := spool.Seek(0, io.SeekCurrent)
		check(err)
		_, err = spool.Seek(0, io.SeekStart)
		check(err)
		add(a, name, length, spool)
		check(os.Remove(spool.Name()))
		return h.Sum(nil)
	}
	first := layer("small.tar", func(w *tar.Writer) {
		random := rand.NewChaCha8([32]byte{1})
		for i := range small {
			add(w, fmt.Sprintf("small/%d/%d", i/500, i), int64(i%3000), random)
		}
	})
	second := layer("large.tar", func(w *tar.Writer) {
		for i := range large {
			seed := [32]byte{2, byte(i), byte(i >> 8)}
			if i < changed {
				seed[0]++
			}
			add(w, fmt.Sprintf("large/%d", i), size, rand.NewChaCha8(seed))
		}
	})
	manifest := `[{"Config":"config.json","RepoTags":["big:latest"],"Layers":["small.tar","large.tar"]}]`
	config := fmt.Sprintf(`{"os":"linux","architecture":%q,"config":{"Cmd":["/x"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x","sha256:%x"]}}`, runtime.GOARCH, first, second)
	add(a, "manifest.json", int64(len(manifest)), strings.NewReader(manifest))
	add(a, "config.json", int64(len(config)), strings.NewReader(config))
	check(a.Close())
}
