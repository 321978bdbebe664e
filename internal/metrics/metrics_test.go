package metrics

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseAddress(t *testing.T) {
	for value, want := range map[string]Address{
		"": {}, ":9100": {"tcp", ":9100"}, "127.0.0.1:9100": {"tcp", "127.0.0.1:9100"}, "[::1]:9100": {"tcp", "[::1]:9100"},
		"unix:/metrics/bootfs.sock": {"unix", "/metrics/bootfs.sock"},
	} {
		if got, err := ParseAddress(value); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", value, got, err, want)
		}
	}
	for _, value := range []string{"9100", ":0", ":http", ":99999", "unix:", "unix:relative", "unix:/a/../b", "unix:/", "::1"} {
		if _, err := ParseAddress(value); err == nil || !strings.Contains(err.Error(), "want ") {
			t.Errorf("%q: got %v", value, err)
		}
	}
}

func TestPage(t *testing.T) {
	var p Page
	p.Gauge("a_bytes", "Bytes.", 1<<40)
	p.Counter("b_total", "Times.", 0.25)
	p.Family("c", "gauge", "Each.")
	p.Sample("c", Truth(true), "x", "a\"b\\c\nd", "y", "\xff")
	p.Sample("c", Truth(false), "x", "")
	const want = `# HELP a_bytes Bytes.
# TYPE a_bytes gauge
a_bytes 1099511627776
# HELP b_total Times.
# TYPE b_total counter
b_total 0.25
# HELP c Each.
# TYPE c gauge
c{x="a\"b\\c\nd",y="?"} 1
c{x=""} 0
`
	if got := p.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestServe: a scraper gets metrics, and who sends no request or too much of one gets
// none.
func TestServe(t *testing.T) {
	at := Address{"unix", filepath.Join(t.TempDir(), "socket")}
	l, err := at.Listen(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go Serve(l, func(p *Page) { p.Gauge("up", "Whether.", 1) })
	ask := func(request string) string {
		t.Helper()
		c, err := net.Dial("unix", at.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		go func() { _, _ = io.WriteString(c, request) }() // which it need not read
		answer, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Fatal(err)
		}
		return string(answer)
	}
	for request, want := range map[string]string{
		"GET /metrics?x=y HTTP/1.1\r\nHost: h\r\n\r\n":                       "\r\nConnection: close\r\n\r\n# HELP up Whether.\n# TYPE up gauge\nup 1\n",
		"HEAD /metrics HTTP/1.1\r\n\r\n":                                     "\r\nContent-Length: 40\r\nConnection: close\r\n\r\n",
		"GET / HTTP/1.1\r\n\r\n":                                             "see /metrics\n",
		"POST /metrics HTTP/1.1\r\n\r\n":                                     "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
		strings.Repeat("x", 2*maxRequest):                                    "",
		"GET /metrics HTTP/1.1\r\n" + strings.Repeat("a: b\r\n", maxRequest): "",
	} {
		if answer := ask(request); !strings.HasSuffix(answer, want) || want == "" && answer != "" {
			t.Errorf("%.40q: got %q, want it to end with %q", request, answer, want)
		}
	}
}

// TestListen: a socket takes the place of one that was left, and of nothing else.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	at := Address{"unix", filepath.Join(dir, "socket")}
	allow := func(int) error { return nil }
	left, err := at.Listen(allow)
	if err != nil {
		t.Fatal(err)
	}
	defer left.Close()
	l, err := at.Listen(allow)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(at.address); err != nil || info.Mode() != os.ModeSocket|0o666 {
		t.Errorf("got %v, %v, want a socket for everybody", info, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(at.address); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	no := errors.New("not there")
	for _, test := range []struct {
		path   string
		inside func(int) error
		want   error
	}{
		{file, nil, unix.EADDRINUSE},
		{dir + "/none/socket", nil, unix.ENOENT},
		{dir + "/link/socket", allow, unix.ELOOP},
		{dir + "/socket", func(int) error { return no }, no},
	} {
		if _, err := (Address{"unix", test.path}).Listen(test.inside); !errors.Is(err, test.want) || !strings.Contains(err.Error(), "metrics cannot be served at "+test.path) {
			t.Errorf("%s: got %v, want %v", test.path, err, test.want)
		}
	}
	if l, err := (Address{"unix", dir + "/link/socket"}).Listen(nil); err != nil {
		t.Error(err)
	} else {
		l.Close()
	}
}

// TestReplacedSocket: who puts a link in the socket's place opens no other file to
// everybody.
func TestReplacedSocket(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(dir, "socket")); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, name := range []string{"socket", "secret"} {
		if err := openToAll(fd, name); err == nil || !strings.Contains(err.Error(), "replaced") {
			t.Errorf("%s: got %v, want a refusal", name, err)
		}
	}
	if info, err := os.Stat(secret); err != nil || info.Mode() != 0o600 {
		t.Errorf("got %v, %v, want mode 600 as before", info, err)
	}
}
