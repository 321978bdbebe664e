package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// The tree that native speed is measured at: many small files, and a large one.
var (
	toolbox     = application{name: "toolbox", packages: []string{"openjdk-17-jdk-headless", "golang-go"}, config: v1.Config{Cmd: []string{"sleep", "infinity"}, Env: []string{debianPath}}}
	manyFiles   = "/usr/lib/go-1.19"
	manySources = "/usr/share/go-1.19"
	largeFile   = "/usr/lib/jvm/java-17-openjdk-amd64/lib/modules"
)

const nativeText = `
The same tree, a JDK and a Go toolchain on Debian, in a container on Docker's overlay2, in one of bootfs with all chunks in the node's cache, and mounted by
others: squashfs (zstd) through squashfuse, the kernel's own EROFS of mkfs.erofs, and fuse-overlayfs over the directory. A program in the container does the task
and measures itself. *Warm* is the second time, *cold* the first with an empty page cache of the node; *random* is %d reads of 4 KiB.
`

func nativeSection() Section {
	return Section{Key: "native", Title: "After the start", Text: fmt.Sprintf(nativeText, randomReads), Ratios: true}
}

func nativeRows(w *World) []Row {
	var rows []Row
	for _, t := range []struct {
		name, task, path string
		cold             bool
		goal             float64 // of overlay2's speed
	}{
		{"warm read, many files", "read", manySources, false, 0.95},
		{"warm read, one file", "sequential", largeFile, false, 0.95},
		{"warm stat", "stat", "/usr", false, 0.95},
		{"warm readdir", "readdir", "/usr", false, 0.95},
		{"warm ls -lR", "ls-lR", "/usr", false, 0.95},
		{"cold sequential", "sequential", largeFile, true, 0.7},
		{"cold random 4 KiB", "random", largeFile, true, 0.3},
		{"cold read, many files", "read", manyFiles, true, 0.7},
	} {
		rows = append(rows, w.nativeRow(t.name, t.task, t.path, t.cold, t.goal))
	}
	return rows
}

// place is where a tree can be worked on.
type place interface {
	// probe does a task at a path of the tree and returns the seconds that it took.
	probe(ctx context.Context, task, path string) (float64, error)
	close() error
}

func (w *World) nativeRow(name, task, path string, cold bool, goal float64) Row {
	var i *image
	row := Row{
		Section: "native", Name: name, Unit: "s", Against: "overlay2",
		Prepare: func(ctx context.Context) (func() error, error) {
			var err error
			if i, err = w.application(ctx, toolbox); err != nil {
				return nil, err
			}
			return func() error { return w.removeContainers(context.WithoutCancel(ctx)) }, w.preload(ctx, i)
		},
	}
	subject := func(name, command string, open func(ctx context.Context) (place, error), goals ...Goal) {
		row.Subjects = append(row.Subjects, Subject{Name: name, Command: command, Goals: goals, Measure: func(ctx context.Context) (m Measured, err error) {
			p, err := open(ctx)
			if err != nil {
				return m, err
			}
			defer func() { err = errors.Join(err, p.close()) }()
			if cold {
				err = dropCaches()
			} else {
				_, err = p.probe(ctx, task, path)
			}
			if err != nil {
				return m, err
			}
			m.Value, err = p.probe(ctx, task, path)
			return m, err
		}})
	}
	subject("overlay2", "docker exec SOURCE probe "+task+" "+path, func(ctx context.Context) (place, error) {
		return w.openContainer(ctx, i.source)
	})
	// In times, a speed of 0.95 is 1/0.95.
	subject("bootfs", "docker exec CONVERTED probe "+task+" "+path, func(ctx context.Context) (place, error) {
		return w.openContainer(ctx, i.converted, append([]string{"--volume", w.path("native.castr") + ":/.bootfs/rootfs.castr"}, lazyFlags...)...)
	}, Goal{1 / goal, "overlay2"})
	subject("squashfuse", "mksquashfs TREE tree.squashfs -comp zstd; squashfuse_ll tree.squashfs DIR; probe "+task+" DIR"+path, func(ctx context.Context) (place, error) {
		file, err := w.treeFile(ctx, i, "squashfs", `mksquashfs "$1" "$2" -comp zstd -quiet -no-progress -processors 2`)
		if err != nil {
			return nil, err
		}
		return w.openFuse(ctx, "squashfuse_ll", "-f", file)
	})
	subject("kernel EROFS", "mkfs.erofs tree.erofs TREE; mount -o loop tree.erofs DIR; probe "+task+" DIR"+path, func(ctx context.Context) (place, error) {
		file, err := w.treeFile(ctx, i, "erofs", `mkfs.erofs --quiet "$2" "$1"`)
		if err != nil {
			return nil, err
		}
		return w.openMount(ctx, "-t", "erofs", "-o", "loop,ro", file)
	})
	subject("fuse-overlayfs", "fuse-overlayfs -o lowerdir=TREE DIR; probe "+task+" DIR"+path, func(ctx context.Context) (place, error) {
		tree, err := w.tree(ctx, i)
		if err != nil {
			return nil, err
		}
		return w.openFuse(ctx, "fuse-overlayfs", "-f", "-o", "lowerdir="+tree)
	})
	return row
}

// preload pulls both forms of an image and fills the node cache of the converted
// one.
func (w *World) preload(ctx context.Context, i *image) error {
	for _, ref := range []string{i.source, i.converted} {
		if _, err := w.docker.Output(ctx, "pull", "--quiet", ref); err != nil {
			return err
		}
	}
	_, err := output(exec.CommandContext(ctx, w.convert, "preload", "-q", i.converted, "--cache", w.path("native.castr")))
	return err
}

// container is a place in a container.
type container struct {
	w  *World
	id string
}

func (w *World) openContainer(ctx context.Context, ref string, flags ...string) (place, error) {
	args := append([]string{"run", "--detach", "--network", "host", "--volume", w.self + ":/probe:ro"}, flags...)
	id, err := w.docker.Output(ctx, append(args, ref)...)
	return container{w, strings.TrimSpace(id)}, err
}

func (c container) probe(ctx context.Context, task, path string) (float64, error) {
	out, err := c.w.docker.Output(ctx, "exec", c.id, "/probe", "probe", task, path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(out), 64)
}

func (c container) close() error {
	_, err := c.w.docker.Output(context.Background(), "rm", "--force", "--volumes", c.id)
	return err
}

// tree is the image's root filesystem in a directory.
func (w *World) tree(ctx context.Context, i *image) (string, error) {
	dir := w.path("tree-" + filepath.Base(i.layout))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(dir+".part", 0o755); err != nil {
		return "", err
	}
	id, err := w.docker.Output(ctx, "create", i.source)
	if err != nil {
		return "", err
	}
	id = strings.TrimSpace(id)
	cmd := w.docker.Command(ctx, "export", id, "--output", dir+".tar")
	if _, err := output(cmd); err != nil {
		return "", err
	}
	if err := shell(ctx, `tar -x --numeric-owner -C "$1" -f "$2"; rm "$2"`, dir+".part", dir+".tar"); err != nil {
		return "", err
	}
	if _, err := w.docker.Output(ctx, "rm", id); err != nil {
		return "", err
	}
	return dir, os.Rename(dir+".part", dir)
}

// treeFile is a file that a script makes of the tree, $1 to $2.
func (w *World) treeFile(ctx context.Context, i *image, kind, script string) (string, error) {
	file := w.path("tree-" + filepath.Base(i.layout) + "." + kind)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	tree, err := w.tree(ctx, i)
	if err != nil {
		return "", err
	}
	return file, shell(ctx, script, tree, file)
}

// mounted is a place on the host.
type mounted struct {
	dir   string
	self  string
	serve *exec.Cmd // nil: the kernel serves it
}

func (w *World) openMount(ctx context.Context, args ...string) (place, error) {
	dir, err := os.MkdirTemp(w.dir, "mnt")
	if err != nil {
		return nil, err
	}
	_, err = output(exec.CommandContext(ctx, "mount", append(args, dir)...))
	return &mounted{dir: dir, self: w.self}, err
}

// openFuse mounts what a program serves, to which the directory is the last
// argument.
func (w *World) openFuse(ctx context.Context, name string, args ...string) (place, error) {
	dir, err := os.MkdirTemp(w.dir, "mnt")
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(name, append(args, dir)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The signal comes when the thread that forked ends.
		runtime.LockOSThread()
		started <- cmd.Start()
		cmd.Wait()
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	m := &mounted{dir: dir, self: w.self, serve: cmd}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC {
			return m, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("%s: not mounted in 30 s", name), cmd.Process.Kill(), os.RemoveAll(dir))
}

func (m *mounted) probe(ctx context.Context, task, path string) (float64, error) {
	out, err := output(exec.CommandContext(ctx, m.self, "probe", task, m.dir+path))
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
}

func (m *mounted) close() error {
	err := unix.Unmount(m.dir, unix.MNT_DETACH)
	if m.serve != nil {
		m.serve.Process.Kill()
	}
	return errors.Join(err, os.Remove(m.dir))
}
