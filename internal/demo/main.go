// Command demo shows what bootfs does, on this machine: it converts an image,
// runs source and converted image with a real Docker engine, and prints both
// side by side. make demo runs it.
//
// All that it makes lies in one directory, which may be removed at any time.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := &demo{}
	flag.StringVar(&d.convert, "convert", "bin/bootfs-convert", "the converter `FILE`")
	flag.StringVar(&d.image, "image", "", "source image `REF`, with a transport as in skopeo (default: Python on Debian, made here)")
	flag.StringVar(&d.dir, "dir", "demo.d", "`DIR` for everything that is made")
	flag.Parse()
	d.args = flag.Args()
	err := d.run(ctx)
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "demo: interrupted") // whatever that broke off
		os.Exit(130)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is one run of the demonstration.
type demo struct {
	convert, image, dir string
	args                []string // command in the container; none is the image's own

	registry *countingRegistry
	docker   *testenv.Docker
	report   convert.Report
}

func (d *demo) run(ctx context.Context) (err error) {
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return err
	}
	// Of an earlier run only the made source image is kept.
	for _, name := range []string{"registry", "rootfs.castr", "docker"} {
		if err := os.RemoveAll(filepath.Join(d.dir, name)); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(d.cache(), 0o755); err != nil {
		return err
	}

	if d.registry, err = startRegistry(filepath.Join(d.dir, "registry")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.registry.close()) }()
	say("An embedded registry listens on %s; its data are in %s.", d.registry.address, rel(d.registry.dir))

	if err := d.prepareSource(ctx); err != nil {
		return err
	}
	if err := d.convertImage(ctx); err != nil {
		return err
	}
	if err := d.findEngine(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.leaveEngine()) }()
	return d.compare(ctx)
}

func (d *demo) source() string    { return d.registry.address + "/demo:source" }
func (d *demo) converted() string { return d.registry.address + "/demo:converted" }
func (d *demo) cache() string     { return filepath.Join(d.dir, "rootfs.castr") }

// prepareSource puts the source image into the registry.
func (d *demo) prepareSource(ctx context.Context) error {
	from := d.image
	switch {
	case from == "":
		cache := &testenv.Cache{Dir: filepath.Join(d.dir, "cache"), Log: os.Stdout}
		if dir := os.Getenv("BOOTFS_CACHE"); dir != "" {
			cache.Dir = dir
		}
		if err := os.MkdirAll(cache.Dir, 0o755); err != nil {
			return err
		}
		layout, err := cache.PythonImage(ctx)
		if err != nil {
			return err
		}
		from = "oci:" + layout + ":" + testenv.Tag
	case !hasTransport(from):
		from = "docker://" + from
	}
	say("The source image is %s.", from)
	return command(exec.CommandContext(ctx, "skopeo", "copy", "--quiet", "--dest-tls-verify=false", from, "docker://"+d.source()))
}

// hasTransport tells "oci:dir" from "name:tag".
func hasTransport(ref string) bool {
	for _, t := range []string{"docker://", "docker-daemon:", "docker-archive:", "oci:", "oci-archive:", "dir:", "containers-storage:"} {
		if strings.HasPrefix(ref, t) {
			return true
		}
	}
	return false
}

func (d *demo) convertImage(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, d.convert, "--json", d.source(), d.converted())
	say("\n$ %s", strings.Join(cmd.Args, " "))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", d.convert, err)
	}
	if err := json.Unmarshal(out, &d.report); err != nil {
		return fmt.Errorf("%s --json: %w", d.convert, err)
	}
	if len(d.report.Platforms) != 1 {
		return fmt.Errorf("%s converted %d platforms, want the one of this machine", d.convert, len(d.report.Platforms))
	}
	p := d.report.Platforms[0]
	say("%d files, %s, in %d chunks; %d of them distinct, %s compressed, in %d packs; the boot image is %s. It took %.1f s.",
		p.Files, scratch.Bytes(p.RootBytes), p.Chunks, p.Distinct, scratch.Bytes(p.StoredBytes), p.Packs, scratch.Bytes(p.BootBytes), d.report.Seconds)
	return nil
}

// findEngine takes the machine's Docker engine, or starts one.
func (d *demo) findEngine(ctx context.Context) error {
	var err error
	if d.docker, err = testenv.FindDocker(ctx); err == nil {
		say("\nThe Docker engine of this machine answers and is used.")
		return nil
	}
	d.docker, err = testenv.StartDocker(ctx, filepath.Join(d.dir, "docker"))
	if err != nil {
		return err
	}
	say("\nNo Docker engine answers: a private one was started.")
	return nil
}

// leaveEngine takes away what the demo brought into the engine.
func (d *demo) leaveEngine() error {
	d.removeImages(context.Background())
	if err := d.docker.Close(); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(d.dir, "docker"))
}

func (d *demo) removeImages(ctx context.Context) {
	for _, image := range []string{d.source(), d.converted()} {
		d.docker.Output(ctx, "image", "rm", "--force", image) // it may not be there
	}
}

// compare runs the source image, the converted image on an empty node cache,
// and that once more on the cache as it is then.
func (d *demo) compare(ctx context.Context) error {
	d.removeImages(ctx)
	lazy := []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN"}
	if apparmor() {
		lazy = append(lazy, "--security-opt", "apparmor=unconfined")
	}
	lazy = append(lazy, "--env", "BOOTFS_PREFETCH=start", "--volume", d.cache()+":/.bootfs/rootfs.castr")
	runs := []*measured{
		{title: "source", image: d.source()},
		{title: "converted", image: d.converted(), flags: lazy},
		{title: "once more", image: d.converted(), flags: lazy},
	}
	for _, m := range runs {
		if err := d.measure(ctx, m); err != nil {
			return err
		}
	}
	for _, m := range runs[1:] {
		if m.output != runs[0].output {
			say("\nNote: the program printed something else this time (%s).", m.title)
		}
	}
	p := d.report.Platforms[0]
	say("\n%-26s%16s%16s%16s", "", runs[0].title, runs[1].title, runs[2].title)
	row := func(what string, value func(*measured) string) {
		fmt.Printf("%-26s%16s%16s%16s\n", what, value(runs[0]), value(runs[1]), value(runs[2]))
	}
	row("pulled by docker", func(m *measured) string { return scratch.Bytes(m.pulled) })
	row("fetched by the container", func(m *measured) string { return scratch.Bytes(m.fetched) })
	row("chunks in the node cache", func(m *measured) string {
		if m.flags == nil {
			return "-"
		}
		return fmt.Sprintf("%d of %d", m.chunks, p.Distinct)
	})
	row("seconds to pull", func(m *measured) string { return seconds(m.pull) })
	row("seconds to first output", func(m *measured) string { return seconds(m.first) })
	row("both", func(m *measured) string { return seconds(m.pull + m.first) })
	say("\nfind %s -name '*.cacnk' | wc -l   counts the chunks that were fetched.", rel(d.cache()))
	return nil
}

// apparmor tells whether Docker's containers run under AppArmor, whose default
// profile for them denies mounts.
func apparmor() bool {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(b), "Y")
}

// command runs cmd with its output going to the terminal.
func command(cmd *exec.Cmd) error {
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return nil
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// rel shortens a path for people.
func rel(path string) string {
	if wd, err := os.Getwd(); err == nil {
		if r, err := filepath.Rel(wd, path); err == nil && !strings.HasPrefix(r, "..") {
			return r
		}
	}
	return path
}
