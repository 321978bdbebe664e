package boot

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// held is what boot reads after the switch of the root: files and directories
// that the user mounted, whose mounts are then the app's or have no path any
// more. Each is held by descriptor, and what lies in a directory is looked up
// each time, so that a file that was replaced counts.
type held []heldMount // those around others before them

type heldMount struct {
	path string // in the engine's root
	fd   int    // O_PATH; never closed
}

// hold opens those of paths that are there.
func hold(paths ...string) (held, error) {
	outerFirst := func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b)) }
	var h held
	for _, p := range slices.Compact(slices.SortedFunc(slices.Values(paths), outerFirst)) {
		fd, err := openPath(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", p, err)
		}
		h = append(h, heldMount{p, fd})
	}
	return h, nil
}

// withMounts returns paths and every mount point below them: a directory's
// descriptor leads past what was mounted in it, once that is gone.
func withMounts(paths []string) ([]string, error) {
	inner, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(paths, func(p string) bool { return strings.HasPrefix(m.Mountpoint, p+"/") }), false
	})
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	all := slices.Clone(paths)
	for _, m := range inner {
		all = append(all, m.Mountpoint)
	}
	return all, nil
}

// way returns the path that leads to p by descriptor.
func (h held) way(p string) (string, bool) {
	for _, m := range slices.Backward(h) {
		if below, ok := strings.CutPrefix(p, m.path); ok && (below == "" || below[0] == '/' || m.path == "/") {
			return path.Join(byDescriptor(m.fd), below), true
		}
	}
	return "", false
}

// stat returns what stands at p.
func (h held) stat(p string) (fs.FileInfo, error) {
	at, ok := h.way(p)
	if !ok {
		return nil, &fs.PathError{Op: "stat", Path: p, Err: fs.ErrNotExist}
	}
	return os.Stat(at)
}

// openPath opens p, whatever it is, to be reached by descriptor later.
func openPath(p string) (int, error) { return unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0) }

// byDescriptor is a path that leads to what fd stands for.
func byDescriptor(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// heldDir is a held directory as an fs.FS.
type heldDir struct {
	held held
	path string // in the engine's root
}

// Open implements fs.FS.
func (d heldDir) Open(name string) (fs.File, error) {
	at, ok := d.held.way(path.Join(d.path, name))
	if !ok || !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return os.Open(at)
}

// Stat implements fs.StatFS: nothing is opened, which a FIFO would block.
func (d heldDir) Stat(name string) (fs.FileInfo, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
	}
	return d.held.stat(path.Join(d.path, name))
}
