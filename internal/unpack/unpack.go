// Package unpack writes a tree into a directory, as a root filesystem that
// chroot or a runtime could use.
//
// Everything that a tree holds is written: owners, modes with setuid, times,
// xattrs with capabilities and ACLs, hard links, devices, holes. A caller who
// is not root gets the part that any user may write, and is told how much was
// left out. The tree cannot lead a write out of the directory: entries are
// created one by one in directories that Dir has created itself.
package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// Report counts what was done.
type Report struct {
	Files   int64 // inodes
	Bytes   int64 // of contents that were written
	Omitted int64 // inodes that lack an owner, a mode bit, an xattr or themselves, because the caller is not root
}

// Options of Dir. The zero value is good.
type Options struct {
	// Unprivileged leaves out what only root may write.
	Unprivileged bool
	Progress     func(bytes int64) // may be nil
}

// Dir writes t into dir, which is made, or exists and is empty.
func Dir(ctx context.Context, t *tree.Tree, dir string, o Options) (*Report, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(root)
	if names, err := os.ReadDir(dir); err != nil {
		return nil, err
	} else if len(names) > 0 {
		return nil, fmt.Errorf("%s is not empty: it has %q", dir, names[0].Name())
	}
	w := &writer{ctx: ctx, o: o, root: root, first: make(map[*tree.Inode]string), buf: make([]byte, 1<<20)}
	if err := w.walk(t.Root); err != nil {
		return nil, err
	}
	return &w.report, nil
}

type writer struct {
	ctx    context.Context
	o      Options
	root   int                    // descriptor of the directory
	first  map[*tree.Inode]string // path of the first name of inodes with several
	buf    []byte
	report Report
}

// level is a directory that is being filled.
type level struct {
	node  *tree.Inode
	name  string
	names []string // entries that are left
}

// walk fills the root. Only the directory at hand is open, and parents are
// reached through "..": a tree may be deeper than there are descriptors, and
// its paths longer than the kernel takes.
func (w *writer) walk(root *tree.Inode) error {
	at, err := unix.Openat(w.root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { unix.Close(at) }()
	move := func(name string) error {
		next, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(at)
			at = next
		}
		return err
	}
	stack := []level{{root, "", root.Names()}}
	where := func(name string) string {
		parts := make([]string, 0, len(stack)+1)
		for _, l := range stack {
			parts = append(parts, l.name)
		}
		return strings.Join(append(parts, name), "/")
	}
	for {
		top := &stack[len(stack)-1]
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if len(top.names) == 0 {
			// Its attributes last: filling it changed its time, and its mode
			// may forbid what its owner has to do. That goes for looking into
			// it as well, so they are set from the directory above.
			w.report.Files++
			name := "."
			if len(stack) > 1 {
				name = top.name
				if err := move(".."); err != nil {
					return fmt.Errorf("%s: %w", where(".."), err)
				}
			}
			if err := w.attributes(at, name, top.node); err != nil {
				return fmt.Errorf("%s: %w", where(""), err)
			}
			if len(stack) == 1 {
				return nil
			}
			stack = stack[:len(stack)-1]
			continue
		}
		name := top.names[0]
		top.names = top.names[1:]
		n := top.node.Entries[name]
		if n.IsDir() {
			err := unix.Mkdirat(at, name, 0o700)
			if err == nil {
				err = move(name)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", where(name), err)
			}
			stack = append(stack, level{n, name, n.Names()})
			continue
		}
		if err := w.entry(at, name, where, n); err != nil {
			return fmt.Errorf("%s: %w", where(name), err)
		}
	}
}

// entry writes anything but a directory.
func (w *writer) entry(at int, name string, where func(string) string, n *tree.Inode) error {
	if n.Nlink > 1 {
		if p, ok := w.first[n]; ok {
			return unix.Linkat(w.root, p, at, name, 0)
		}
	}
	w.report.Files++
	var err error
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		err = w.file(at, name, n)
	case unix.S_IFLNK:
		err = unix.Symlinkat(n.Target, at, name)
	default:
		err = unix.Mknodat(at, name, n.Mode&unix.S_IFMT|0o600, int(n.Rdev))
		if w.o.Unprivileged && errors.Is(err, unix.EPERM) {
			w.report.Omitted++
			return nil
		}
	}
	if err != nil {
		return err
	}
	if n.Nlink > 1 {
		w.first[n] = path.Clean(strings.TrimPrefix(where(name), "/"))
	}
	return w.attributes(at, name, n)
}

// file writes the bytes of a regular file and leaves its holes.
func (w *writer) file(at int, name string, n *tree.Inode) error {
	fd, err := unix.Openat(at, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	for _, e := range n.Content.Extents {
		r := io.NewSectionReader(n, e.Logical, e.Length)
		out := io.NewOffsetWriter(f, e.Logical)
		for {
			if err := w.ctx.Err(); err != nil {
				return err
			}
			k, err := r.Read(w.buf)
			if k > 0 {
				if _, err := out.Write(w.buf[:k]); err != nil {
					return err
				}
				w.report.Bytes += int64(k)
				if w.o.Progress != nil {
					w.o.Progress(int64(k))
				}
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	if err := f.Truncate(n.Size); err != nil {
		return err
	}
	return f.Close()
}

// attributes sets owner, mode, xattrs and time of the entry name in at, in the
// one order in which none undoes another: chown clears setuid and capabilities.
func (w *writer) attributes(at int, name string, n *tree.Inode) error {
	omitted := false
	link := n.IsSymlink()
	if !w.o.Unprivileged {
		if err := unix.Fchownat(at, name, int(n.UID), int(n.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("owner: %w", err)
		}
	} else if int(n.UID) != os.Geteuid() || int(n.GID) != os.Getegid() {
		omitted = true
	}
	if !link {
		mode := n.Mode & 0o7777
		if w.o.Unprivileged && mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			// For another owner or group than the image's.
			mode, omitted = mode&^(unix.S_ISUID|unix.S_ISGID), true
		}
		if err := unix.Fchmodat(at, name, mode, 0); err != nil {
			return fmt.Errorf("mode: %w", err)
		}
	}
	for _, x := range n.Xattrs {
		// No call sets xattrs by descriptor and name, and not all inodes can be opened.
		p := "/proc/self/fd/" + strconv.Itoa(at) + "/" + name
		err := unix.Lsetxattr(p, x.Name, x.Value, 0)
		if w.o.Unprivileged && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)) {
			omitted = true
			continue
		}
		if err != nil {
			return fmt.Errorf("xattr %s: %w", x.Name, err)
		}
	}
	t := unix.Timespec{Sec: n.MtimeSec, Nsec: int64(n.MtimeNsec)}
	if err := unix.UtimesNanoAt(at, name, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("time: %w", err)
	}
	if omitted {
		w.report.Omitted++
	}
	return nil
}
