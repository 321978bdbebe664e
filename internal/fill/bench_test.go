package fill_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/fill"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// BenchmarkFill fills the root of the Python image from a registry, in an
// overlay as an engine has it, and does in turn what else brings the same files
// to the same disk: docker pull of the source, tar -x of the root from a plain
// archive, and bootfs-convert extract. Medians.
func BenchmarkFill(b *testing.B) {
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "fill")
	check(err)
	b.Cleanup(func() { check(os.RemoveAll(dir)) })
	convert := filepath.Join(dir, "bootfs-convert")
	run := func(name string, args ...string) {
		b.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			b.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	run("go", "build", "-o", convert, "../../cmd/bootfs-convert")
	cache, err := testenv.OpenCache()
	check(err)
	layout, err := cache.PythonImage(ctx)
	check(err)
	registry, err := testenv.StartRegistry(ctx, filepath.Join(dir, "registry"), "")
	check(err)
	b.Cleanup(func() { check(registry.Close()) })
	docker, err := testenv.StartDocker(ctx, filepath.Join(dir, "docker"))
	check(err)
	b.Cleanup(func() { check(docker.Close()) })
	source, image := registry.Address+"/python:source", registry.Address+"/python:converted"
	check(testenv.Push(ctx, layout, source))
	run(convert, "-q", source, image)

	ref, err := transport.Parse("docker://"+image, "")
	check(err)
	opened, err := converted.Open(ctx, ref, converted.Options{})
	check(err)
	b.Cleanup(func() { check(opened.Close()) })
	img := opened.Images[0]

	archive := filepath.Join(dir, "root.tar")
	var syncs []float64
	ways := []struct {
		name string
		do   func(out string) // into a new directory
	}{
		{"fill", func(out string) {
			f, err := img.Fetcher(nil)
			check(err)
			defer f.Close()
			r, err := fill.Root(ctx, out, fill.Options{
				Meta: img.Meta, Index: img.Index, Fetcher: f, Order: img.Locators.PackOrder(), State: filepath.Join(out, ".state"),
			})
			check(err)
			syncs = append(syncs, r.Sync.Seconds())
		}},
		{"pull", func(string) {
			_, err := docker.Output(ctx, "pull", "--quiet", source)
			check(err)
		}},
		{"tar", func(out string) {
			if _, err := os.Stat(archive); err != nil {
				return
			}
			run("tar", "--xattrs", "--xattrs-include=*", "-xpf", archive, "-C", out)
		}},
		{"extract", func(out string) { run(convert, "extract", "-q", image, filepath.Join(out, "root")) }},
	}
	seconds := make([][]float64, len(ways))
	for b.Loop() {
		for i, way := range ways {
			root := overlay(b, dir)
			unix.Sync() // nobody writes what another one left
			began := time.Now()
			way.do(root.merged)
			seconds[i] = append(seconds[i], time.Since(began).Seconds())
			if way.name == "fill" {
				check(os.RemoveAll(filepath.Join(root.merged, ".state")))
				if _, err := os.Stat(archive); err != nil {
					run("tar", "--xattrs", "--xattrs-include=*", "-cf", archive, "-C", root.merged, ".")
				}
			}
			if way.name == "pull" {
				_, err := docker.Output(ctx, "rmi", source)
				check(err)
			}
			root.remove(b)
		}
	}
	for i, way := range ways {
		slices.Sort(seconds[i])
		b.ReportMetric(seconds[i][len(seconds[i])/2], "s/"+way.name)
	}
	slices.Sort(syncs)
	b.ReportMetric(syncs[len(syncs)/2], "s/fill-sync")
	b.ReportMetric(0, "ns/op")
}

type overlayDir struct{ base, merged string }

// overlay mounts an empty overlay below dir.
func overlay(b *testing.B, dir string) overlayDir {
	b.Helper()
	base, err := os.MkdirTemp(dir, "overlay")
	if err != nil {
		b.Fatal(err)
	}
	o := overlayDir{base, filepath.Join(base, "merged")}
	for _, name := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, name), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", base)
	if err := unix.Mount("overlay", o.merged, "overlay", 0, options); err != nil {
		b.Fatal(err)
	}
	return o
}

func (o overlayDir) remove(b *testing.B) {
	b.Helper()
	if err := unix.Unmount(o.merged, 0); err != nil {
		b.Fatal(err)
	}
	if err := os.RemoveAll(o.base); err != nil {
		b.Fatal(err)
	}
}
