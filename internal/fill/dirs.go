package fill

import (
	"container/list"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// beneath keeps a path below the directory that it starts from, in its mount,
// and off symlinks.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS

// errMounted says that something is mounted where a file would go.
var errMounted = errors.New("something is mounted there")

// dirs keeps directories of the root open, those that were used last.
type dirs struct {
	plan *plan
	root int

	mu    sync.Mutex // guards what follows
	limit int        // descriptors beside those in use
	open  map[uint32]*dir
	idle  list.List // of *dir, the one used last in front
}

// dir is an open directory.
type dir struct {
	number uint32 // in plan.dirTable
	fd     int
	users  int
	idle   *list.Element // in dirs.idle, nil while it is used
}

func (d *dirs) init(p *plan, root, limit int) {
	d.plan, d.root, d.limit = p, root, limit
	d.open = map[uint32]*dir{0: {fd: root, users: 1}}
}

func (d *dirs) close() {
	for _, o := range d.open {
		unix.Close(o.fd)
	}
}

// get returns directory number, open until put. It is errMounted where the
// directory is none of the root's own.
func (d *dirs) get(number uint32) (*dir, error) {
	if d.plan.dirTable[number].skipped {
		return nil, errMounted
	}
	if o := d.have(number); o != nil {
		return o, nil
	}
	// From the nearest one that is open, a path as long as the kernel takes at
	// a time.
	var names []string
	at := number
	var from *dir
	for from == nil {
		e := d.plan.dirTable[at].entry
		s, _, err := d.plan.entry(e)
		if err != nil {
			return nil, err
		}
		names = append(names, s)
		at = e.dir
		from = d.have(at)
	}
	defer d.put(from)
	fd := from.fd
	for len(names) > 0 {
		path := ""
		for len(names) > 0 && len(path)+len(names[len(names)-1]) < unix.PathMax-1 {
			if path != "" {
				path += "/"
			}
			path += names[len(names)-1]
			names = names[:len(names)-1]
		}
		next, err := openBeneath(fd, path)
		if fd != from.fd {
			unix.Close(fd)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.plan.dirPath(number), err)
		}
		fd = next
	}
	return d.keep(number, fd), nil
}

func openBeneath(fd int, path string) (int, error) {
	next, err := unix.Openat2(fd, path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: beneath})
	switch {
	case errors.Is(err, unix.EXDEV):
		return -1, errMounted
	case errors.Is(err, unix.ENOSYS):
		return -1, fmt.Errorf("this kernel has no openat2, which came with Linux 5.6: %w", err)
	}
	return next, err
}

func (d *dirs) have(number uint32) *dir {
	d.mu.Lock()
	defer d.mu.Unlock()
	o := d.open[number]
	if o == nil {
		return nil
	}
	o.users++
	if o.idle != nil {
		d.idle.Remove(o.idle)
		o.idle = nil
	}
	return o
}

// keep makes fd the directory number, unless another goroutine was faster.
func (d *dirs) keep(number uint32, fd int) *dir {
	d.mu.Lock()
	defer d.mu.Unlock()
	if o := d.open[number]; o != nil {
		unix.Close(fd)
		o.users++
		if o.idle != nil {
			d.idle.Remove(o.idle)
			o.idle = nil
		}
		return o
	}
	o := &dir{number: number, fd: fd, users: 1}
	d.open[number] = o
	return o
}

// put ends the use of o.
func (d *dirs) put(o *dir) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if o.users--; o.users > 0 {
		return
	}
	o.idle = d.idle.PushFront(o)
	for d.idle.Len() > d.limit {
		old := d.idle.Remove(d.idle.Back()).(*dir)
		delete(d.open, old.number)
		unix.Close(old.fd)
	}
}
