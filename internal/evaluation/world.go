package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// World is what rows are measured in: a registry, the line of a node to it, and
// the engines of that node. What a row does not need is not started.
type World struct {
	dir   string // for all that is made; short, as sockets lie below it
	root  string // of the module bootfs
	cache *testenv.Cache

	convert, boot string // the programs under test
	self          string // this program

	registry *testenv.Registry
	line     *faultproxy.Line
	docker   *testenv.Docker
	images   map[string]*image
	stargz   string // the snapshotter's program
	closers  []func() error
}

// newWorld builds the programs under test. root is the directory of the module
// bootfs.
func newWorld(ctx context.Context, root string) (*World, error) {
	cache, err := testenv.OpenCache()
	if err != nil {
		return nil, err
	}
	cache.Log = os.Stderr
	dir, err := os.MkdirTemp("", "ev")
	if err != nil {
		return nil, err
	}
	w := &World{
		dir: dir, root: root, cache: cache, images: map[string]*image{}, convert: filepath.Join(dir, "bootfs-convert"),
		boot: filepath.Join(root, "bin", "boot-"+runtime.GOOS+"-"+runtime.GOARCH),
	}
	if w.self, err = os.Executable(); err != nil {
		return nil, err
	}
	// As make build does it: the converter has the boot binary in it, compressed.
	boot := exec.CommandContext(ctx, "go", "run", "./internal/bootbin/gen", runtime.GOOS+"/"+runtime.GOARCH)
	boot.Dir = root
	if _, err := output(boot); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	if err := build(ctx, root, w.convert, "./cmd/bootfs-convert"); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func build(ctx context.Context, dir, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	_, err := output(cmd)
	return err
}

// Close ends all that was started and removes what was made.
func (w *World) Close() error {
	var errs []error
	for i := len(w.closers) - 1; i >= 0; i-- {
		errs = append(errs, w.closers[i]())
	}
	return errors.Join(append(errs, os.RemoveAll(w.dir))...)
}

// path is a place in the world's directory.
func (w *World) path(elem ...string) string {
	return filepath.Join(append([]string{w.dir}, elem...)...)
}

// node starts the registry, the line to it and the Docker engine.
func (w *World) node(ctx context.Context) error {
	if w.docker != nil {
		return nil
	}
	registry, err := testenv.StartRegistry(ctx, w.path("registry"), "")
	if err != nil {
		return err
	}
	w.closers = append(w.closers, registry.Close)
	line, err := faultproxy.NewLine(registry.Address)
	if err != nil {
		return err
	}
	w.closers = append(w.closers, func() error { line.Close(); return nil })
	docker, err := testenv.StartDocker(ctx, w.path("docker"))
	if err != nil {
		return err
	}
	w.closers = append(w.closers, docker.Close)
	w.registry, w.line, w.docker = registry, line, docker
	return nil
}

// image is a source image and what was made of it, in the registry, by the
// addresses that the node has for them.
type image struct {
	layout            string // the source, as an OCI layout
	source, converted string
	report            conversion
	estargz           string // "" until it is made
}

// conversion is what bootfs-convert --json says of the one platform.
type conversion struct {
	SourceBytes, Files, RootBytes, StoredBytes, NewBytes, BootBytes, StartBytes int64
	Chunks, Distinct                                                            int
}

// imageOf puts an image into the registry, under a name, and converts it.
func (w *World) imageOf(ctx context.Context, name string, layout func() (string, error)) (*image, error) {
	if i := w.images[name]; i != nil {
		return i, nil
	}
	if err := w.node(ctx); err != nil {
		return nil, err
	}
	dir, err := layout()
	if err != nil {
		return nil, err
	}
	w.line.Set(faultproxy.Speed{})
	repository := w.line.Addr() + "/" + name
	i := &image{layout: dir, source: repository + ":source", converted: repository + ":bootfs"}
	if err := testenv.Push(ctx, dir, i.source); err != nil {
		return nil, err
	}
	if i.report, err = w.convertImage(ctx, "--base", "none", i.source, i.converted); err != nil {
		return nil, err
	}
	w.images[name] = i
	return i, nil
}

// convertImage runs bootfs-convert and returns its report.
func (w *World) convertImage(ctx context.Context, args ...string) (conversion, error) {
	var report struct {
		Platforms []struct {
			SourceBytes, Files, RootBytes, StoredBytes, NewBytes, BootBytes, StartBytes int64

			Chunks   int
			Distinct int `json:"distinctChunks"`
		}
	}
	out, err := output(exec.CommandContext(ctx, w.convert, append([]string{"-q", "--json"}, args...)...))
	if err != nil {
		return conversion{}, err
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return conversion{}, err
	}
	if len(report.Platforms) != 1 {
		return conversion{}, fmt.Errorf("bootfs-convert %v: got %d platforms, want 1", args, len(report.Platforms))
	}
	return conversion(report.Platforms[0]), nil
}

// output runs a command to its end; an error carries what it printed.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stdout.String() + stderr.String())
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, said)
	}
	return stdout.Bytes(), nil
}

// shell runs a script of bash with arguments $1 and so on.
func shell(ctx context.Context, script string, args ...string) error {
	_, err := output(exec.CommandContext(ctx, "bash", append([]string{"-euo", "pipefail", "-c", script, "bash"}, args...)...))
	return err
}

// dropCaches takes out of the page cache what is not in use.
func dropCaches() error {
	if err := exec.Command("sync").Run(); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// emptyNode removes all containers, images and volumes of the engine.
func (w *World) emptyNode(ctx context.Context) error {
	if err := w.removeContainers(ctx); err != nil {
		return err
	}
	_, err := w.docker.Output(ctx, "system", "prune", "--all", "--force", "--volumes")
	return err
}

func (w *World) removeContainers(ctx context.Context) error {
	ids, err := w.docker.Output(ctx, "ps", "--all", "--quiet", "--no-trunc")
	if err != nil || ids == "" {
		return err
	}
	_, err = w.docker.Output(ctx, append([]string{"rm", "--force", "--volumes"}, strings.Fields(ids)...)...)
	return err
}

// lazyFlags are what docker run needs for a mounted root.
var lazyFlags = []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN"}
