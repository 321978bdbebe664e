package e2e

import (
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// TestConverterImage builds the Dockerfile and converts an image of the engine
// with it, by the two bare names that people give it.
func TestConverterImage(t *testing.T) {
	t.Parallel()
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	root, err := cache.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	imported := w.docker.Command(t.Context(), "import", "-", "ubuntu:latest")
	tar := exec.CommandContext(t.Context(), "tar", "-C", root, "-c", ".")
	if imported.Stdin, err = tar.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := tar.Start(); err != nil {
		t.Fatal(err)
	}
	if out, err := imported.CombinedOutput(); err != nil {
		t.Fatalf("docker import: %v\n%s", err, out)
	}
	if err := tar.Wait(); err != nil {
		t.Fatal(err)
	}

	// bin/bootfs-convert is what make test has built.
	if r := docker(t, "build", "--network=none", "--target=prebuilt", "--build-arg=BASE=ubuntu:latest", "--tag=converter", "../.."); r.code != 0 {
		t.Fatalf("docker build: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	output := t.TempDir()
	if r := docker(t, "run", "--rm", "-i", "--network=none",
		"-v", w.docker.Socket+":/var/run/docker.sock", "-v", output+":/output",
		"converter", "ubuntu:latest", "ubuntu-converted:latest"); r.code != 0 {
		t.Fatalf("convert: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}

	chunks := 0
	if err := filepath.WalkDir(filepath.Join(output, "rootfs.castr"), func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".cacnk") {
			chunks++
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if chunks < 100 {
		t.Errorf("/output/rootfs.castr holds %d chunks, want those of a Debian root", chunks)
	}
	docker(t, "run", "--rm", "--device=/dev/fuse", "--cap-add=SYS_ADMIN", "--network=none", "-v", output+":/output:ro",
		"ubuntu-converted:latest", "sh", "-c", "cat /etc/debian_version >/dev/null && echo ok").want(t, "ok\n")
}
