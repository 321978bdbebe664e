package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

// run fills the root.
func (f *filler) run(ctx context.Context) error {
	full, flushed := make(chan struct{}), make(chan error, 1)
	go func() { flushed <- f.flush(full) }()
	err := f.fill(ctx)
	close(full)
	began := time.Now()
	if failed := <-flushed; err == nil {
		err = failed
	}
	if err == nil {
		err = f.syncfs()
	}
	if err != nil {
		return err
	}
	f.sync = time.Since(began)
	return f.journal.finish()
}

// fill makes the tree, that which comes last at the end.
func (f *filler) fill(ctx context.Context) error {
	g, running := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := f.makeDirs(running); err != nil {
			return err
		}
		close(f.dirsMade)
		return f.each(running, f.others, false, f.makeOther)
	})
	g.Go(func() error { return f.fetchAll(running) })
	err := g.Wait()
	if err == nil {
		err = f.makeLinks(ctx, false)
	}
	if err == nil {
		err = f.makeLast(ctx)
	}
	if err == nil {
		err = f.makeLinks(ctx, true)
	}
	if err == nil {
		err = f.finishDirs(ctx)
	}
	return err
}

// flushBytes is after how many bytes of files they are sent to the disk.
const flushBytes = 32 << 20

// flush sends to the disk what is written while more is on its way, so that
// little is left to wait for in the end: the kernel itself would not begin for
// half a minute.
func (f *filler) flush(full <-chan struct{}) error {
	for last := f.progress.resumed; ; {
		select {
		case <-full:
			return nil
		case <-f.progress.flush:
		}
		if done := f.progress.done.Load(); done-last >= flushBytes {
			last = done
			if err := f.syncfs(); err != nil {
				return err
			}
		}
	}
}

// syncfs waits until all that was written is on the disk. A failure is told
// once, and may be that of anything written before: what the journal says of it
// is no longer true.
func (f *filler) syncfs() error {
	err := unix.Syncfs(f.dirs.root)
	if err != nil {
		err = errors.Join(fmt.Errorf("write it to disk: %w", err), f.journal.file.Truncate(0))
	}
	return err
}

// at opens the directory of n, if it is one of the root's own, and calls fn
// with it and the name there.
func (f *filler) at(n name, fn func(dir int, name string, nid uint64) error) error {
	s, nid, err := f.entry(n)
	if err != nil {
		return err
	}
	d, err := f.dirs.get(n.dir)
	if errors.Is(err, errMounted) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.dirs.put(d)
	if err := fn(d.fd, s, nid); err != nil && !errors.Is(err, errMounted) {
		return fmt.Errorf("%s: %w", f.path(n), err)
	}
	return nil
}

// each calls fn for the names that are to be put in place at the end, or for
// the others.
func (f *filler) each(ctx context.Context, names []name, last bool, fn func(name) error) error {
	for _, n := range names {
		if n.last() != last {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(n); err != nil {
			return err
		}
	}
	return nil
}

// makeDirs makes the directories, parents first, for their owner alone: their
// attributes come when they are full. Those that stand there already stay.
func (f *filler) makeDirs(ctx context.Context) error {
	var state unix.Stat_t
	if err := unix.Fstat(f.journal.fd(), &state); err != nil {
		return err
	}
	if err := prepareDir(f.dirs.root, state); err != nil {
		return err
	}
	for i := 1; i < len(f.dirTable); i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &f.dirTable[i]
		if f.dirTable[e.entry.dir].skipped {
			e.skipped = true
			continue
		}
		s, _, err := f.entry(e.entry)
		if err != nil {
			return err
		}
		parent, err := f.dirs.get(e.entry.dir)
		if err == nil {
			err = makeDir(parent.fd, s, state)
			f.dirs.put(parent)
		}
		if errors.Is(err, errMounted) {
			f.o.Log.Debug("left alone, as something is mounted there", "path", f.dirPath(uint32(i)))
			e.skipped = true
		} else if err != nil {
			return fmt.Errorf("%s: %w", f.dirPath(uint32(i)), err)
		}
	}
	f.promote()
	return nil
}

// makeDir makes the directory name in parent.
func makeDir(parent int, name string, state unix.Stat_t) error {
	err := unix.Mkdirat(parent, name, 0o700)
	for range 2 {
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		fd, failed := openBeneath(parent, name)
		if failed == nil {
			defer unix.Close(fd)
			return prepareDir(fd, state)
		}
		if !errors.Is(failed, unix.ENOTDIR) && !errors.Is(failed, unix.ELOOP) {
			return failed
		}
		if mounted(parent, name) {
			return errMounted
		}
		if err := unix.Unlinkat(parent, name, 0); err != nil {
			return fmt.Errorf("make room for a directory: %w", err)
		}
		err = unix.Mkdirat(parent, name, 0o700)
	}
	return err
}

// prepareDir makes a directory that was there before take files: what it would
// hand down to them goes, and its owner may write there.
func prepareDir(fd int, state unix.Stat_t) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Dev == state.Dev && st.Ino == state.Ino {
		return errors.New("the image has a directory where the journal of the fill is")
	}
	mode := st.Mode & 0o7777
	if ready := mode&^unix.S_ISGID | 0o700; ready != mode {
		if err := unix.Fchmod(fd, ready); err != nil {
			return fmt.Errorf("make it writable: %w", err)
		}
	}
	err := unix.Fremovexattr(fd, "system.posix_acl_default")
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("remove its default ACL: %w", err)
	}
	return nil
}

// mounted reports whether something is mounted at name in dir, which is no
// directory.
func mounted(dir int, name string) bool {
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV})
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.EXDEV)
}

// makeOther makes what has no bytes.
func (f *filler) makeOther(at name) error {
	return f.at(at, func(dir int, name string, nid uint64) error {
		n, err := f.r.Inode(nid)
		if err != nil {
			return err
		}
		if !at.last() {
			made, err := f.create(dir, name, n)
			if err == nil && made {
				return f.finishAt(dir, name, n)
			}
			if !errors.Is(err, unix.EEXIST) {
				return err
			}
		}
		aside := otherName(nid)
		if err := unlink(f.journal.fd(), aside); err != nil {
			return err
		}
		made, err := f.create(f.journal.fd(), aside, n)
		if err != nil || !made {
			return err
		}
		if err := f.finishAt(f.journal.fd(), aside, n); err != nil {
			return err
		}
		return f.place(aside, dir, name)
	})
}

// create makes an inode without bytes, unless it may not be made here.
func (f *filler) create(dir int, name string, n erofs.Inode) (made bool, err error) {
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := f.r.Readlink(n)
		if err != nil {
			return false, err
		}
		err = unix.Symlinkat(string(target), dir, name)
		return err == nil, err
	case unix.S_IFREG:
		fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return false, err
		}
		defer unix.Close(fd)
		return true, unix.Ftruncate(fd, n.Size)
	}
	err = unix.Mknodat(dir, name, n.Mode&unix.S_IFMT|0o600, int(n.Rdev))
	if errors.Is(err, unix.EPERM) {
		f.left.add(fmt.Sprintf("device nodes: %v", err))
		return false, nil
	}
	return err == nil, err
}

// Names in the state directory.
func asideName(regular uint32) string { return "file-" + strconv.FormatUint(uint64(regular), 16) }
func otherName(nid uint64) string     { return "other-" + strconv.FormatUint(nid, 16) }

const linkName = "link"

// place renames what is complete in the state directory over name in dir. It
// stays where it is if something is mounted there: it may have other names.
func (f *filler) place(aside string, dir int, name string) error {
	for range 2 {
		err := unix.Renameat(f.journal.fd(), aside, dir, name)
		switch {
		case errors.Is(err, unix.EBUSY):
			return errMounted
		case !errors.Is(err, unix.EISDIR):
			return err
		}
		if err := removeDir(dir, name); err != nil {
			return err
		}
	}
	return unix.EISDIR
}

func unlink(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// removeDir removes a directory that stands where the image has a file. It is
// errMounted if something is mounted there or below.
func removeDir(parent int, name string) error {
	err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.EBUSY) {
		return errMounted
	}
	if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	fd, err := openBeneath(parent, name)
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	for {
		entries, err := d.ReadDir(100)
		for _, e := range entries {
			if e.IsDir() {
				err = removeDir(fd, e.Name())
			} else {
				err = unix.Unlinkat(fd, e.Name(), 0)
			}
			if errors.Is(err, unix.EBUSY) {
				err = errMounted
			}
			if err != nil {
				return err
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	return unix.Unlinkat(parent, name, unix.AT_REMOVEDIR)
}

// makeLinks makes the further names of files that stand: those that have to
// do with what comes last, or the others.
func (f *filler) makeLinks(ctx context.Context, last bool) error {
	for _, l := range f.links {
		if (l.name.last() || l.first.last()) != last {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.makeLink(l); err != nil {
			return err
		}
	}
	return nil
}

func (f *filler) makeLink(l link) error {
	return f.at(l.first, func(fromDir int, from string, nid uint64) error {
		aside := otherName(nid)
		if l.regular != noFile {
			aside = asideName(l.regular)
		}
		if exists(f.journal.fd(), aside) { // something is mounted where it belongs
			fromDir, from = f.journal.fd(), aside
		}
		return f.at(l.name, func(dir int, name string, _ uint64) error {
			err := unix.Linkat(fromDir, from, dir, name, 0)
			if !errors.Is(err, unix.EEXIST) {
				return err
			}
			var a, b unix.Stat_t
			if err := unix.Fstatat(fromDir, from, &a, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return err
			}
			if err := unix.Fstatat(dir, name, &b, unix.AT_SYMLINK_NOFOLLOW); err == nil && a.Ino == b.Ino && a.Dev == b.Dev {
				return nil
			}
			if err := unlink(f.journal.fd(), linkName); err != nil {
				return err
			}
			if err := unix.Linkat(fromDir, from, f.journal.fd(), linkName, 0); err != nil {
				return err
			}
			return f.place(linkName, dir, name)
		})
	})
}

// home is where a regular file goes: to the first of its names, or to another
// one after promote.
func (f *filler) home(number uint32) name {
	if at, ok := f.moved[number]; ok {
		return at
	}
	return f.regular[number]
}

// promote gives what has its first name below a mount the first of its other
// names that has not.
func (f *filler) promote() {
	instead := map[name]name{}
	for i := range f.links {
		l := &f.links[i]
		if !f.dirTable[l.first.dir].skipped {
			continue
		}
		first, ok := instead[l.first]
		switch {
		case ok:
		case f.dirTable[l.name.dir].skipped:
			continue
		default:
			first = l.name
			instead[l.first] = first
			if l.regular != noFile {
				f.moved[l.regular] = first
			} else {
				f.others = append(f.others, first)
			}
		}
		l.first = first
	}
	f.links = slices.DeleteFunc(f.links, func(l link) bool { return l.name == l.first })
}

func exists(dir int, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// makeLast puts in place what was kept back.
func (f *filler) makeLast(ctx context.Context) error {
	for i := range f.regular {
		at := f.home(uint32(i))
		if !at.last() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		err := f.at(at, func(dir int, name string, _ uint64) error {
			err := f.place(asideName(uint32(i)), dir, name)
			if errors.Is(err, unix.ENOENT) {
				return nil // an earlier call has come so far
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return f.each(ctx, f.others, true, f.makeOther)
}

// finishDirs gives the directories their attributes, children first: filling
// one changes its time, and its mode may forbid what its owner has to do.
func (f *filler) finishDirs(ctx context.Context) error {
	for i := len(f.dirTable) - 1; i >= 0; i-- {
		if err := ctx.Err(); err != nil {
			return err
		}
		d, err := f.dirs.get(uint32(i))
		if errors.Is(err, errMounted) {
			continue
		}
		if err != nil {
			return err
		}
		n, err := f.r.Inode(uint64(f.dirTable[i].nid))
		if err == nil {
			err = f.finishFd(d.fd, n, 0)
		}
		f.dirs.put(d)
		if err != nil {
			return fmt.Errorf("%s: %w", f.dirPath(uint32(i)), err)
		}
	}
	return nil
}
