// Package metrics serves figures to Prometheus: a page in its text format, at an
// address that a user has named.
//
//	at, err := metrics.ParseAddress(os.Getenv("BOOTFS_METRICS"))
//	l, err := at.Listen(nil)
//	go metrics.Serve(l, func(p *metrics.Page) { p.Gauge("app_up", "Whether it works.", 1) })
//
// It speaks HTTP as far as a scraper needs it: the server of net/http would add
// 440 kB to a boot binary. Clients may be hostile: they get some seconds each, and
// few are answered at a time.
package metrics

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Address is where metrics are served. The zero value is nowhere.
type Address struct {
	network string // "tcp" or "unix"; "" for nowhere
	address string // HOST:PORT, or the path of a socket
}

// ParseAddress reads [HOST]:PORT, unix:PATH with an absolute path, or "" for
// nowhere.
func ParseAddress(s string) (Address, error) {
	if s == "" {
		return Address{}, nil
	}
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			return Address{}, fmt.Errorf("%q: want unix: and the absolute path of a socket", s)
		}
		return Address{"unix", p}, nil
	}
	_, port, err := net.SplitHostPort(s)
	if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 {
		return Address{}, fmt.Errorf("%q: want [HOST]:PORT or unix:PATH", s)
	}
	return Address{"tcp", s}, nil
}

// IsNowhere reports whether nothing is to be served.
func (a Address) IsNowhere() bool { return a.network == "" }

// String returns HOST:PORT or the path of the socket.
func (a Address) String() string { return a.address }

// Listen listens there. A socket is open to every process that reaches it, and
// takes the place of one that a process has left which was killed.
//
// inside, unless nil, gets the directory of the socket as a descriptor and may
// refuse it. Then no link is followed on the way there: it may lead through a
// volume, where others could make it lead elsewhere.
func (a Address) Listen(inside func(dir int) error) (l net.Listener, err error) {
	switch a.network {
	case "unix":
		l, err = listenAt(a.address, inside)
	default:
		l, err = net.Listen(a.network, a.address)
	}
	if err != nil {
		return nil, fmt.Errorf("metrics cannot be served at %s: %w", a, err)
	}
	return l, nil
}

// listenAt listens at the socket p. The directory is never closed: closing the
// listener removes the socket there.
func listenAt(p string, inside func(dir int) error) (net.Listener, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC}
	if inside != nil {
		how.Resolve = unix.RESOLVE_NO_SYMLINKS
	}
	dir, err := unix.Openat2(unix.AT_FDCWD, filepath.Dir(p), how)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Dir(p), Err: err}
	}
	l, err := listenIn(dir, filepath.Base(p), inside)
	if err != nil {
		unix.Close(dir)
	}
	return l, err
}

func listenIn(dir int, name string, inside func(dir int) error) (net.Listener, error) {
	if inside != nil {
		if err := inside(dir); err != nil {
			return nil, err
		}
	}
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		_ = unix.Unlinkat(dir, name, 0) // listening fails if it stays
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)})
	if err != nil {
		return nil, err
	}
	if err := openToAll(dir, name); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// openToAll lets everybody connect to a socket. Who can write to its directory may
// have put something else in its place, such as a link to a file of this
// container: that is left as it is.
func openToAll(dir int, name string) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("somebody has replaced the socket %s", name)
	}
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o666)
}
