package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

// TestAgainstUmoci takes a real Debian image the whole way to a loose store.
// casync puts the root image together from it, which fsck.erofs and the kernel
// judge; the kernel's mount of it and our own, lazy one must be what umoci
// makes of the source, file by file.
func TestAgainstUmoci(t *testing.T) {
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	source, err := cache.PythonImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	convert := func(args ...string) {
		t.Helper()
		if out, err := command(t, dir, append([]string{"-q"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("bootfs-convert: %v\n%s", err, out)
		}
	}
	manifest := func(dir string) treecmp.Manifest {
		t.Helper()
		m, err := treecmp.Dir(dir)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	run("umoci", "unpack", "--image", source+":"+testenv.Tag, at("umoci"))
	want := manifest(at("umoci/rootfs"))
	if len(want) < 5000 {
		t.Fatalf("umoci unpacked %d files, want a whole Debian", len(want))
	}

	convert("--boot", "/bin/true", "--store", at("castr"), "oci:"+source, "oci:"+at("converted"))
	convert("extract", "--index", at("rootfs.caibx"), "oci:"+at("converted"))
	run("casync", "extract", "--store="+at("castr"), at("rootfs.caibx"), at("erofs"))
	run("fsck.erofs", at("erofs"))
	if err := os.Mkdir(at("kernel"), 0o755); err != nil {
		t.Fatal(err)
	}
	run("mount", "-t", "erofs", "-o", "loop,ro", at("erofs"), at("kernel"))
	diff := treecmp.Diff(manifest(at("kernel")), want)
	run("umount", at("kernel"))
	report(t, "casync's root image under the kernel", diff)

	if err := os.Mkdir(at("fuse"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, dir, "mount", "oci:"+at("converted"), at("fuse"))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("mount: %v", err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for {
		if _, err := os.Stat(at("fuse/etc")); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the mount is not there after 2 min")
		}
		time.Sleep(20 * time.Millisecond)
	}
	report(t, "the lazy mount", treecmp.Diff(manifest(at("fuse")), want))
}

func report(t *testing.T, what string, diff []string) {
	t.Helper()
	for i, d := range diff {
		if i == 20 {
			t.Errorf("… and %d more", len(diff)-i)
			return
		}
		t.Errorf("%s: %s", what, d)
	}
}
