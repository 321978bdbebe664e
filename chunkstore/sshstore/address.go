package sshstore

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path"
	"strings"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// address is where a store lies.
type address struct {
	name     string // for people
	user     string
	host     string // host:port
	dir      string // on the server; relative to the home directory without a slash
	sftpOnly bool
}

func (a address) String() string { return a.name }

// Is reports whether address is one that New takes.
func Is(address string) bool {
	return strings.HasPrefix(address, "ssh://") || strings.HasPrefix(address, "sftp://")
}

// parseAddress reads an address. Its errors show nothing of what may be a
// password.
func parseAddress(s, user string) (address, error) {
	fail := func(why string) (address, error) {
		return address{}, fmt.Errorf("store %q: %s: want ssh://user@host[:port]/path or sftp://user@host[:port]/path", httpio.WithoutUser(s), why)
	}
	if !Is(s) {
		return fail("unknown kind")
	}
	u, err := url.Parse(s)
	if err != nil {
		var e *url.Error // its text has the whole address
		if errors.As(err, &e) {
			err = e.Err
		}
		if strings.Contains(s, "@") {
			return fail("no address")
		}
		return fail(err.Error())
	}
	if _, has := u.User.Password(); has {
		return fail("a password does not belong into an address")
	}
	if name := u.User.Username(); name != "" {
		user = name
	}
	dir := path.Clean(u.Path)
	if home, ok := strings.CutPrefix(dir, "/~/"); ok {
		// With "./" no program takes it for an option or a host.
		dir = "./" + home
	}
	switch {
	case u.Hostname() == "":
		return fail("no host")
	case user == "":
		return fail("no user")
	case u.RawQuery != "" || u.Fragment != "":
		return fail("text behind the path")
	case dir == "/" || dir == "." || dir == "/~":
		return fail("no path")
	case strings.ContainsFunc(dir+user+u.Host, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fail("control characters")
	}
	port := u.Port()
	if port == "" {
		port = "22"
	}
	u.User = url.User(user) // the next one to read the name may be somebody else
	return address{
		name:     u.String(),
		user:     user,
		host:     net.JoinHostPort(u.Hostname(), port),
		dir:      dir,
		sftpOnly: u.Scheme == "sftp",
	}, nil
}

// quote makes s one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
