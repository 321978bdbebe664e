package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// modeFlags are what docker run is told for a mode.
func modeFlags(mode string) []string {
	flags := []string{"--env", "BOOTFS_MODE=" + mode}
	if mode == "fuse" {
		flags = append(flags, "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN")
	}
	return flags
}

// inMode returns the small image, converted, in a mode.
func inMode(t *testing.T, mode string) *subject {
	t.Helper()
	return (&subject{name: mode, flags: modeFlags(mode)}).of(t, "plain")
}

// buildImage builds an image with docker build in a directory with the file "added".
func buildImage(t *testing.T, dockerfile string, args ...string) (image string, r result) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"Dockerfile": dockerfile, "added": "added\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	image = strings.ToLower(filepath.Base(filepath.Dir(dir)))
	r = docker(t, append(append([]string{"build", "--no-cache", "--force-rm", "--tag", image}, args...), dir)...)
	if r.code == 0 {
		t.Cleanup(func() { w.docker.Command(t.Context(), "rmi", "--force", image).Run() })
	}
	return image, r
}

// TestPackageDatabase asks dpkg itself what the boot image says of the packages
// in the root, as scanners do that look into images which do not run.
func TestPackageDatabase(t *testing.T) {
	query := []string{"--show", "--showformat=${Package} ${Version} ${Architecture} ${Status}\\n"}
	want := docker(t, append([]string{"run", "--rm", "--network", "host", w.source, "dpkg-query"}, query...)...)
	id := (&subject{name: "converted", image: w.image}).create(t, w.image)
	dir := t.TempDir()
	for _, name := range []string{"/var/lib/dpkg", "/etc/os-release", "/usr/lib/os-release"} {
		if r := docker(t, "cp", "--follow-link", id+":"+name, dir); r.code != 0 {
			t.Fatal(r.stderr)
		}
	}
	got, err := exec.Command("dpkg-query", append([]string{"--admindir=" + filepath.Join(dir, "dpkg")}, query...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	if want.code != 0 || string(got) != want.stdout || strings.Count(want.stdout, "\n") < 100 {
		t.Errorf("the source has\n%sthe boot image says\n%s", want.stdout, got)
	}
	release, err := os.ReadFile(filepath.Join(dir, "os-release"))
	if err != nil {
		t.Fatal(err)
	}
	docker(t, "run", "--rm", "--network", "host", w.source, "cat", "/etc/os-release").want(t, string(release))
}

// TestSourceIsTold looks for the source's digest where scanners and policies
// look for the base of an image.
func TestSourceIsTold(t *testing.T) {
	source, _ := fidelityImage(t, "plain")
	converted := w.proxy.address + "/told:converted"
	if out, err := w.command("--boot", w.boot, source, converted).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	inspect := func(args ...string) []byte {
		out, err := exec.Command("skopeo", append([]string{"inspect", "--tls-verify=false"}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	digest := strings.TrimSpace(string(inspect("--format={{.Digest}}", "docker://"+source)))
	var index v1.IndexManifest
	if err := json.Unmarshal(inspect("--raw", "docker://"+converted), &index); err != nil {
		t.Fatal(err)
	}
	var boot v1.Manifest
	if err := json.Unmarshal(inspect("--raw", "docker://"+w.proxy.address+"/told@"+index.Manifests[0].Digest.String()), &boot); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"org.opencontainers.image.base.name":   source,
		"org.opencontainers.image.base.digest": digest,
	} {
		if boot.Annotations[key] != want {
			t.Errorf("%s is %q, want %q", key, boot.Annotations[key], want)
		}
	}
}

// TestFromConverted builds on a converted image, which docs/running.md advises
// against, and finds what it says.
func TestFromConverted(t *testing.T) {
	fuse, fill := inMode(t, "fuse"), inMode(t, "fill")

	t.Run("COPY", func(t *testing.T) {
		image, r := buildImage(t, "FROM "+fuse.image+"\nCOPY added /etc/added\nENV KEPT=yes\n")
		if r.code != 0 {
			t.Fatal(r)
		}
		// What lies in the boot image is below the mounted root, or in the filled one.
		fuse.run(t, image, "sh", "-c", "ls /etc/added 2>&1; echo $KEPT").want(t, "ls: /etc/added: No such file or directory\nyes\n")
		fill.run(t, image, "sh", "-c", "cat /etc/added; echo $KEPT").want(t, "added\nyes\n")
	})
	t.Run("RUN", func(t *testing.T) {
		image, r := buildImage(t, "FROM "+fuse.image+"\nRUN echo made >/etc/made\n", "--network", "host")
		if r.code != 0 || !strings.Contains(r.stdout, "the root is filled in place") {
			t.Fatal(r)
		}
		size := func(image string) (n int64) {
			if err := json.Unmarshal([]byte(docker(t, "image", "inspect", "--format", "{{.Size}}", image).stdout), &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		if source, built := size(subjects[0].of(t, "plain").image), size(image); built < source {
			t.Errorf("the built image has %d bytes and its source %d: the root is not in it", built, source)
		}
		// The root is there, whole: nothing is mounted or fetched any more.
		for _, s := range []*subject{fuse, fill} {
			built := &subject{name: s.name, image: image, flags: s.flags}
			built.run(t, "--network", "none", image, "cat", "/etc/made").want(t, "made\n")
		}
	})
}

// TestDockerPush pushes a converted image with docker, which sends the boot
// image and knows of no packs.
func TestDockerPush(t *testing.T) {
	old, err := testenv.StartRegistry(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := old.Close(); err != nil {
			t.Error(err)
		}
	})
	fuse, fill := inMode(t, "fuse"), inMode(t, "fill")
	image := old.Address + "/app:lazy"
	if out, err := w.command("copy", "--rewrite-store", fuse.image, image).CombinedOutput(); err != nil {
		t.Fatalf("copy: %v\n%s", err, out)
	}
	pushed := w.proxy.address + "/pushed/app:lazy"
	for _, args := range [][]string{{"pull", "--quiet", image}, {"tag", image, pushed}, {"push", "--quiet", pushed}} {
		if r := docker(t, args...); r.code != 0 {
			t.Fatal(r)
		}
	}
	raw, err := exec.Command("skopeo", "inspect", "--raw", "--tls-verify=false", "docker://"+pushed).Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(raw, []byte(`"layers"`)) || bytes.Contains(raw, []byte(`"manifests"`)) {
		t.Errorf("docker pushed more than the boot image:\n%s", raw)
	}
	for _, s := range []*subject{fuse, fill} {
		s.run(t, pushed, "echo", "up").want(t, "up\n") // its packs are where they were
	}
	if err := os.RemoveAll(filepath.Join(old.Dir, "data")); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*subject{fuse, fill} {
		r := s.run(t, pushed, "echo", "up")
		if r.code != 125 || !strings.Contains(r.stderr, "404 Not Found") || !strings.Contains(r.stderr, "bootfs-convert copy") {
			t.Errorf("%s without its packs: %v", s.name, r)
		}
	}
}

// TestDockerSave takes a converted image through an archive of docker's, which
// holds the boot image, and finds the packs where they were.
func TestDockerSave(t *testing.T) {
	fuse := inMode(t, "fuse")
	const tagged = "saved:lazy"
	archive := filepath.Join(t.TempDir(), "image.tar")
	for _, args := range [][]string{{"tag", fuse.image, tagged}, {"save", "--output", archive, tagged}, {"rmi", tagged}, {"load", "--input", archive}} {
		if r := docker(t, args...); r.code != 0 {
			t.Fatal(r)
		}
	}
	t.Cleanup(func() { w.docker.Command(t.Context(), "rmi", "--force", tagged).Run() })
	fuse.run(t, tagged, "echo", "up").want(t, "up\n")
}

// TestDockerExport looks at what an export of a running container has of its
// root.
func TestDockerExport(t *testing.T) {
	for mode, want := range map[string]string{"fuse": ".bootfs/", "fill": "-rwxr-xr-x"} {
		s := inMode(t, mode)
		id := s.start(t, s.image, "sleep", "600")
		eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
		archive := filepath.Join(t.TempDir(), "root.tar")
		if r := docker(t, "export", "--output", archive, id); r.code != 0 {
			t.Fatal(r)
		}
		out, err := exec.Command("tar", "--list", "--verbose", "--file", archive, "bin/busybox").CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s; want %s", mode, err, out, want)
		}
	}
}
