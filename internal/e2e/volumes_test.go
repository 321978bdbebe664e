package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// volumeModes are the modes in which volumes are initialised, as flags.
var volumeModes = map[string][]string{
	"fuse": append([]string{"--env", "BOOTFS_MODE=fuse"}, flags...),
	"fill": {"--env", "BOOTFS_MODE=fill", "--network", "host"},
}

// initialised is what a volume at /vol/full has to hold.
func initialised(t *testing.T) string {
	t.Helper()
	source, _ := fidelityImage(t, "plain")
	name := freshVolume(t)
	docker(t, "run", "--rm", "--network", "host", "-v", name+":/vol/full", source, "true").want(t, "")
	return hostTree(t, volumeDir(t, name))
}

// A start that is stopped or killed while it fills a volume leaves one that does
// not count as initialised: the next start carries on, of this container or of
// another.
func TestVolumeOfStoppedStart(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	want := initialised(t)
	for mode, flags := range volumeModes {
		for _, how := range []string{"stop --time 60", "kill"} {
			t.Run(mode+" "+how, func(t *testing.T) {
				release := w.proxy.hold(t)
				name := freshVolume(t)
				volume := volumeDir(t, name)
				id := strings.TrimSpace(docker(t, append(append([]string{"create", "-v", name + ":/vol/full"}, flags...), image, "sh", "-c", "cat /vol/full/file")...).stdout)
				removeAtEnd(t, id)
				docker(t, "start", id).want(t, id+"\n")
				eventually(t, "the volume is being filled", func() bool {
					_, err := os.Stat(filepath.Join(volume, bootimage.VolumeMark, "state/journal"))
					return err == nil
				})
				docker(t, append(strings.Fields(how), id)...).want(t, id+"\n")
				status := map[string]string{"stop --time 60": "143\n", "kill": "137\n"}[how]
				docker(t, "wait", id).want(t, status)
				if _, err := os.Stat(filepath.Join(volume, bootimage.VolumeMark)); err != nil {
					t.Errorf("the volume counts as initialised: %v", err)
				}
				release()
				docker(t, "start", "--attach", id).want(t, "content\n")
				if got := hostTree(t, volume); got != want {
					t.Errorf("got  %s\nwant %s", got, want)
				}
			})
		}
	}
}

// Containers that start at once on one new volume all find it complete.
func TestVolumeOfSeveral(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	want := initialised(t)
	name := freshVolume(t)
	release := w.proxy.hold(t)
	var ids []string
	for _, mode := range []string{"fuse", "fill", "fuse"} {
		id := strings.TrimSpace(docker(t, append(append([]string{"create", "-v", name + ":/vol/full"}, volumeModes[mode]...), image, "sh", "-c", "cat /vol/full/file; ls -A /vol/full/sub")...).stdout)
		removeAtEnd(t, id)
		docker(t, "start", id).want(t, id+"\n")
		ids = append(ids, id)
	}
	release()
	for _, id := range ids {
		docker(t, "wait", id).want(t, "0\n")
		docker(t, "logs", id).want(t, "content\nrun\n")
	}
	if got := hostTree(t, volumeDir(t, name)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// What cannot be had ends the container, in words that name the volume.
func TestVolumeWithoutChunks(t *testing.T) {
	source, _ := fidelityImage(t, "plain")
	const image = "small:elsewhere"
	store := t.TempDir()
	if out, err := w.command("--boot", w.boot, "--store", store, "docker-daemon:"+source, "docker-daemon:"+image).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	r := run(t, "-v", t.TempDir()+":"+store, "-v", freshVolume(t)+":/vol/full", image, "ls", "/vol/full")
	if r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, "initialise the volume at /vol/full: ") {
		t.Errorf("%+v", r)
	}
}

// secondVersion is the small image with one file more, in its converted form.
func secondVersion(t *testing.T) string {
	t.Helper()
	source, _ := fidelityImage(t, "plain")
	id := strings.TrimSpace(docker(t, "create", source).stdout)
	removeAtEnd(t, id)
	docker(t, "cp", hostFile(t, "version", "two\n", 0o644), id+":/etc/version").want(t, "")
	if r := docker(t, "commit", id, "small:second"); r.code != 0 {
		t.Fatal(r.stderr)
	}
	image := w.proxy.address + "/small:second-converted"
	if out, err := w.command("--boot", w.boot, "docker-daemon:small:second", image).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	return image
}

// Compose 1 recreates a container onto another version with the named volumes
// of the old one.
func TestCompose(t *testing.T) {
	_, first := fidelityImage(t, "plain")
	second := secondVersion(t)
	sample, err := os.ReadFile("../../samples/compose/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		// Below 1.27, and in an engine without a bridge.
		"base.yaml": "version: \"3.7\"\n" + string(sample),
		"more.yaml": `version: "3.7"
services:
  app:
    network_mode: host
    command: [sh, -c, "cat /etc/version /etc/mine /data/mine 2>/dev/null; echo up; exec sleep 600"]
    volumes: ["data:/data"]
volumes:
  data:
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	compose := func(image string, args ...string) string {
		t.Helper()
		cmd := exec.Command("docker-compose", append([]string{"-p", "fidelity", "-f", filepath.Join(dir, "base.yaml"), "-f", filepath.Join(dir, "more.yaml")}, args...)...)
		cmd.Env = append(append(os.Environ(), w.docker.Env()...), "IMAGE="+image, "COMPOSE_HTTP_TIMEOUT=600") // it waits a minute
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("docker-compose %v: %v\n%s", args, err, err.(*exec.ExitError).Stderr)
		}
		return strings.TrimSpace(string(out))
	}
	t.Cleanup(func() { compose(first, "down", "--volumes", "--timeout", "0") })
	// up starts a version and returns what it says of itself.
	up := func(image string) (id, said string) {
		t.Helper()
		compose(image, "up", "--detach", "--timeout", "0")
		id = compose(image, "ps", "--quiet", "app")
		untilUp(t, id)
		return id, docker(t, "logs", id).stdout
	}
	id, said := up(first)
	if said != "up\n" {
		t.Errorf("the first version says %q", said)
	}
	docker(t, "exec", id, "sh", "-c", "echo of the first >/etc/mine; echo kept >/data/mine").want(t, "")
	if _, said = up(second); said != "two\nkept\nup\n" {
		t.Errorf("the second version says %q", said)
	}
	if _, said = up(first); said != "kept\nup\n" {
		t.Errorf("the first version, again, says %q", said)
	}
}

// Compose 2 gives the anonymous volumes of a container to the one that takes
// its place, the writable layer among them: each version has its own in it.
func TestRecreatedWithVolumes(t *testing.T) {
	_, first := fidelityImage(t, "plain")
	second := secondVersion(t)
	const script = "cat /etc/version /etc/mine 2>/dev/null; echo of $0 >/etc/mine"
	last := ""
	for _, c := range []struct {
		name, image, says string
		warned            bool
	}{
		{"first", first, "", false},
		{"second", second, "two\n", true},
		{"first", first, "of first\n", false},
		{"second", second, "two\nof second\n", false},
	} {
		args := append([]string{"create"}, flags...)
		if last != "" {
			args = append(args, "--volumes-from", last)
		}
		last = strings.TrimSpace(docker(t, append(args, c.image, "sh", "-c", script, c.name)...).stdout)
		removeAtEnd(t, last)
		r := docker(t, "start", "--attach", last)
		r.want(t, c.says)
		if got := strings.Contains(r.stderr, "the writable layer of another version of this image stays aside"); got != c.warned {
			t.Errorf("the %s version: stderr %q", c.name, r.stderr)
		}
	}
}
