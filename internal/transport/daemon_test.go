package transport

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// A real engine: what it saves is read, what is written it loads and pulls,
// and a load that breaks changes nothing.
func TestDaemon(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	// A socket's path is short.
	dir := must(os.MkdirTemp("/tmp", "bootfs-engine-"))(t)
	defer os.RemoveAll(dir)
	engine := must(testenv.StartDocker(ctx, dir))(t)
	defer func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	o := Options{DockerHost: "unix://" + engine.Socket, TempDir: t.TempDir()}

	img := testImage(t, "amd64", gzipLayers(t, "boot", "x")...)
	id := commit(t, "docker-daemon:example/app:v1", o, nil, map[string]v1.Image{"amd64": img})
	if got := strings.TrimSpace(must(engine.Output(ctx, "image", "inspect", "--format", "{{.Id}}", "example/app:v1"))(t)); got != id {
		t.Errorf("the engine has %s under the name, Commit returned %s", got, id)
	}
	for _, ref := range []string{"docker-daemon:example/app:v1", "docker-daemon:docker.io/example/app:v1", "docker-daemon:" + id} {
		s := open(t, ref, o)
		checkImage(t, s.Images()[0], img, false)
		if s.Images()[0].Layers[0].Plain == nil {
			t.Errorf("%s: the layers are not read in place", ref)
		}
	}
	if entries := must(os.ReadDir(o.TempDir))(t); len(entries) != 0 {
		t.Errorf("left in the temporary directory: %v", entries)
	}

	failing := brokenImage{testImage(t, "amd64", gzipLayers(t, "a", "b")...), func() error { return errBroken }}
	d := must(OpenDestination(ctx, mustParse(t, "docker-daemon:example/app:v1"), o))(t)
	if _, err := d.Commit(ctx, []PlatformImage{{Platform: platform("amd64"), Boot: failing}}); err == nil {
		t.Error("Commit of a broken image succeeded")
	}
	d.Close()
	checkImage(t, open(t, "docker-daemon:example/app:v1", o).Images()[0], img, false)

	for ref, want := range map[string]string{
		"docker-daemon:nobody:v1":      "has no such image",
		"docker-daemon:example/app:v9": "has no such image",
	} {
		if _, err := Open(ctx, mustParse(t, ref), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", ref, err, want)
		}
	}
	if _, err := Open(ctx, mustParse(t, "docker-daemon:example/app:v1"), Options{DockerHost: o.DockerHost, Platforms: []v1.Platform{platform("arm64")}}); err == nil || !strings.Contains(err.Error(), "it is for linux/amd64") {
		t.Errorf("another platform: %v", err)
	}

	t.Run("pull of an index with packs", func(t *testing.T) {
		host := startRegistry(t, nil)
		ref := host + "/example/app:v2"
		digest := commit(t, ref, Options{}, []string{"pack one", "pack two"}, map[string]v1.Image{
			"amd64": img, "arm64": testImage(t, "arm64", gzipLayers(t, "other")...),
		})
		out := must(engine.Output(ctx, "pull", ref))(t)
		if !strings.Contains(out, digest) {
			t.Errorf("docker pull says %s, want digest %s", out, digest)
		}
		if got := strings.TrimSpace(must(engine.Output(ctx, "image", "inspect", "--format", "{{.Id}}", ref))(t)); got != id {
			t.Errorf("pulled image %s, want %s", got, id)
		}
	})

	t.Run("archive", func(t *testing.T) {
		file := t.TempDir() + "/x.tar"
		commit(t, "docker-archive:"+file+":loaded:v3", Options{}, nil, map[string]v1.Image{"amd64": img})
		if out := must(engine.Output(ctx, "load", "-i", file))(t); !strings.Contains(out, "loaded:v3") {
			t.Errorf("docker load: %s", out)
		}
		must(engine.Output(ctx, "save", "-o", file, "loaded:v3"))(t)
		checkImage(t, open(t, "docker-archive:"+file+":loaded:v3", Options{}).Images()[0], img, false)
	})
}

func TestDaemonUnreachable(t *testing.T) {
	o := Options{DockerHost: "unix:///nonexistent/docker.sock"}
	for _, f := range []func() error{
		func() error { _, err := Open(context.Background(), mustParse(t, "docker-daemon:x"), o); return err },
		func() error {
			_, err := OpenDestination(context.Background(), mustParse(t, "docker-daemon:x"), o)
			return err
		},
	} {
		if err := f(); err == nil || !strings.Contains(err.Error(), "cannot reach the Docker daemon at unix:///nonexistent/docker.sock") {
			t.Errorf("got %v", err)
		}
	}
}
