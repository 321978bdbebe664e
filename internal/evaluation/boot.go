package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

const bootText = `
*Start* is the time from the exec of boot to the program's own, with a warm cache, in a root of so many small files; *no boot* is the same program in a root that is
already there. *Boot image* is what an engine pulls for that root. *Memory* is the anonymous memory of boot after a program has read an image of 1 GiB.
`

func bootSection() Section { return Section{Key: "boot", Title: "Boot itself", Text: bootText} }

// fileCounts are the roots that boot starts in.
var fileCounts = []int{1_000, 500_000}

// rootOf is an image with a program that prints the time, and n small files.
func (w *World) rootOf(ctx context.Context, n int) (*image, error) {
	name := "files-" + strconv.Itoa(n)
	return w.imageOf(ctx, name, func() (string, error) {
		now, err := w.now(ctx)
		if err != nil {
			return "", err
		}
		program, err := os.ReadFile(now)
		if err != nil {
			return "", err
		}
		files := map[string][]byte{"now": program}
		rng := rand.New(rand.NewPCG(1, uint64(n)))
		for i := range n {
			files[fmt.Sprintf("srv/d%03d/s%02d/file-%d.txt", i%257, i%41, i)] = fmt.Appendf(nil, "%x\n", rng.Uint64())
		}
		return w.cache.PackagesImage(ctx, name, nil, files, v1.Config{Cmd: []string{"/now"}, Env: []string{"PATH=/"}})
	})
}

// now is the path of the program that prints the time. Its bytes are the same in
// each run, and so is the image that it is in.
func (w *World) now(ctx context.Context) (string, error) {
	program := w.path("now")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	return program, build(ctx, w.root+"/internal/evaluation", program, "./now")
}

func bootRows(w *World) []Row {
	var rows []Row
	for _, n := range fileCounts {
		rows = append(rows, w.bootRow(n))
	}
	rows = append(rows, Row{
		Section: "boot", Name: "boot image", Unit: "MB", Once: true,
		Subjects: func() (all []Subject) {
			for _, n := range fileCounts {
				all = append(all, Subject{Name: fmt.Sprintf("%d files", n), Command: fmt.Sprintf("bootfs-convert --json files-%d:source files-%d:bootfs", n, n), Measure: func(ctx context.Context) (Measured, error) {
					i, err := w.rootOf(ctx, n)
					if err != nil {
						return Measured{}, err
					}
					return Measured{float64(i.report.BootBytes) / 1e6, map[string]float64{"B for each inode": float64(i.report.BootBytes) / float64(i.report.Files)}}, nil
				}})
			}
			all = append(all, Subject{Name: "boot binary", Command: "stat -c %s bin/boot-linux-amd64", Goals: []Goal{{Times: 10}}, Measure: func(context.Context) (Measured, error) {
				info, err := os.Stat(w.boot)
				if err != nil {
					return Measured{}, err
				}
				return Measured{Value: float64(info.Size()) / 1e6}, nil
			}})
			return all
		}(),
	}, w.memoryRow())
	return rows
}

func (w *World) bootRow(n int) Row {
	converted, plain := w.path(fmt.Sprintf("boot-%d", n)), w.path("boot-plain")
	start := func(ctx context.Context, dir string, argv ...string) (Measured, error) {
		d, err := testenv.StartTime(ctx, dir, argv...)
		return Measured{Value: float64(d) / float64(time.Millisecond)}, err
	}
	return Row{
		Section: "boot", Name: fmt.Sprintf("start, %d files", n), Unit: "ms", Against: "no boot",
		Prepare: func(ctx context.Context) (func() error, error) {
			i, err := w.rootOf(ctx, n)
			if err != nil {
				return nil, err
			}
			if err := w.exportBoot(ctx, i, converted); err != nil {
				return nil, err
			}
			if err := shell(ctx, `mkdir -p "$1"/proc "$1"/dev "$1"/mnt; cp "$2" "$1/now"`, plain, w.path("now")); err != nil {
				return nil, err
			}
			done := func() error {
				for _, d := range []string{"rootfs.castr", "rw"} {
					if err := unix.Unmount(filepath.Join(converted, ".bootfs", d), unix.MNT_DETACH); err != nil {
						return err
					}
				}
				return os.RemoveAll(converted)
			}
			_, err = start(ctx, converted, "/.bootfs/boot", "/now") // fills the cache
			return done, err
		},
		Subjects: []Subject{
			{Name: "no boot", Command: "/now", Measure: func(ctx context.Context) (Measured, error) { return start(ctx, plain, "/now") }},
			{Name: "bootfs", Command: "/.bootfs/boot /now", Goals: []Goal{{Times: 15}}, Measure: func(ctx context.Context) (Measured, error) {
				return start(ctx, converted, "/.bootfs/boot", "/now")
			}},
		},
	}
}

// exportBoot writes the boot image's files to dir, with a cache and a volume for
// what is written.
func (w *World) exportBoot(ctx context.Context, i *image, dir string) error {
	id, err := w.docker.Output(ctx, "create", i.converted)
	if err != nil {
		return err
	}
	id = strings.TrimSpace(id)
	if _, err := w.docker.Output(ctx, "export", id, "--output", dir+".tar"); err != nil {
		return err
	}
	if err := shell(ctx, `mkdir "$1"; tar -x -C "$1" -f "$1.tar"; rm "$1.tar"; mkdir -p "$1"/proc "$1"/dev "$1"/mnt`, dir); err != nil {
		return err
	}
	for _, d := range []string{"rootfs.castr", "rw"} {
		from := dir + "-" + d
		if err := os.MkdirAll(from, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(from, filepath.Join(dir, ".bootfs", d), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", d, err)
		}
	}
	_, err = w.docker.Output(ctx, "rm", "--volumes", id)
	return err
}

// memoryRow reads an image of 1 GiB through boot.
func (w *World) memoryRow() Row {
	var i *image
	return Row{
		Section: "boot", Name: "memory", Unit: "MiB",
		Prepare: func(ctx context.Context) (func() error, error) {
			var err error
			i, err = w.imageOf(ctx, "gibibyte", func() (string, error) {
				files := map[string][]byte{}
				for n := range 64 {
					files[fmt.Sprintf("srv/%d", n)] = text(uint64(n), 16<<20)
				}
				return w.cache.PackagesImage(ctx, "gibibyte", []string{"ca-certificates"}, files, v1.Config{Cmd: []string{"sleep", "infinity"}, Env: []string{debianPath}})
			})
			return func() error { return nil }, err
		},
		Subjects: []Subject{{
			Name: "bootfs", Command: "docker exec CONVERTED cat -r /srv; grep RssAnon /proc/BOOT/status", Goals: []Goal{{Times: 48}, {Times: 32}},
			Measure: func(ctx context.Context) (m Measured, err error) {
				defer func() {
					if e := w.removeContainers(context.WithoutCancel(ctx)); err == nil {
						err = e
					}
				}()
				id, err := w.docker.Output(ctx, append(append([]string{"run", "--detach", "--network", "host"}, lazyFlags...), i.converted)...)
				if err != nil {
					return m, err
				}
				id = strings.TrimSpace(id)
				if _, err := w.docker.Output(ctx, "exec", id, "sh", "-c", "cat /srv/* >/dev/null"); err != nil {
					return m, err
				}
				pid, err := w.docker.Output(ctx, "inspect", "--format={{.State.Pid}}", id)
				if err != nil {
					return m, err
				}
				n, err := strconv.Atoi(strings.TrimSpace(pid))
				if err != nil {
					return m, err
				}
				m.Value, err = statusMiB(n, "RssAnon")
				return m, err
			},
		}},
	}
}

// statusMiB returns an amount of memory that the kernel knows of a process, in MiB.
func statusMiB(pid int, name string) (float64, error) {
	file := fmt.Sprintf("/proc/%d/status", pid)
	status, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, name)
}

// text makes bytes that zstd makes 2.5 times shorter or so.
func text(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, size+16)
	for len(b) < size {
		b = fmt.Appendf(b, "%x ", rng.Uint32N(1<<20)*2654435761>>8)
	}
	return b[:size]
}
