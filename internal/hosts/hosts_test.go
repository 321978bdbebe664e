package hosts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// dir returns a Dir with the named files: name, content, name, …
func dir(files ...string) Dir {
	m := fstest.MapFS{}
	for i := 0; i < len(files); i += 2 {
		m[files[i]] = &fstest.MapFile{Data: []byte(files[i+1])}
	}
	return Dir{Name: "/certs.d", FS: m}
}

func newHosts(t testing.TB, o Options) *Hosts {
	t.Helper()
	h, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// describe returns what matters of endpoints, one in a line.
func describe(list []Endpoint) string {
	var lines []string
	for _, e := range list {
		line := e.Scheme + "://" + e.Host + e.Path
		if e.Namespace != "" {
			line += " ns=" + e.Namespace
		}
		if e.Plain != (e.Scheme == "http") {
			line += " plain"
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func TestRegistry(t *testing.T) {
	const twoMirrors = `
server = "https://registry.example.com"

[host."https://zulu.example.com"]
  capabilities = ["pull"]
[host."https://zulu.example.com".header]
  x-who = "me"
[host."http://alpha.internal:8080/prefix"]
  capabilities = ["pull", "resolve"]
  skip_verify = true
[host."https://push.example.com"]
  capabilities = ["push"]
`
	for _, tt := range []struct {
		name    string
		o       Options
		host    string
		want    []string
		problem string
	}{
		{name: "nothing known", host: "registry.example.com", want: []string{"https://registry.example.com/v2"}},
		{name: "loopback", host: "127.0.0.1:5000", want: []string{"http://127.0.0.1:5000/v2"}},
		{name: "insecure", o: Options{Insecure: []string{"10.0.0.1:5000"}}, host: "10.0.0.1:5000", want: []string{"http://10.0.0.1:5000/v2"}},
		{name: "insecure at another port", o: Options{Insecure: []string{"10.0.0.1:5000"}}, host: "10.0.0.1", want: []string{"https://10.0.0.1/v2"}},
		{
			name: "containerd's order", o: Options{Dirs: []Dir{dir("registry.example.com/hosts.toml", twoMirrors)}}, host: "registry.example.com",
			want: []string{
				"https://zulu.example.com/v2 ns=registry.example.com",
				"http://alpha.internal:8080/prefix/v2 ns=registry.example.com",
				"https://registry.example.com/v2",
			},
		},
		{
			name: "no server named", o: Options{Dirs: []Dir{dir("registry.example.com/hosts.toml", `[host."mirror:5000"]`)}}, host: "registry.example.com",
			want: []string{"https://mirror:5000/v2 ns=registry.example.com", "https://registry.example.com/v2"},
		},
		{
			name: "another server", o: Options{Dirs: []Dir{dir("_default/hosts.toml", `server = "https://only.example.com"`)}}, host: "registry.example.com",
			want: []string{"https://only.example.com/v2 ns=registry.example.com"},
		},
		{
			name: "server without pull", host: "r:1", problem: "leaves no host to pull from",
			o: Options{Dirs: []Dir{dir("r:1/hosts.toml", "server = 'https://r:1'\ncapabilities = ['push']")}},
		},
		{
			name: "default, and a directory of its own", host: "r:1", want: []string{"https://own/v2 ns=r:1", "https://r:1/v2"},
			o: Options{Dirs: []Dir{dir("_default/hosts.toml", "[host.'https://default']", "r:1/hosts.toml", "[host.'https://own']")}},
		},
		{
			name: "port in the directory's name", host: "r:1", want: []string{"https://first/v2 ns=r:1", "https://r:1/v2"},
			o: Options{Dirs: []Dir{dir("r_1_/hosts.toml", "[host.'https://first']", "r:1/hosts.toml", "[host.'https://second']")}},
		},
		{
			name: "override_path", host: "r", want: []string{"https://harbor/v2/proxy ns=r", "https://x/api ns=r", "https://y ns=r", "https://r/v2"},
			o: Options{Dirs: []Dir{dir("r/hosts.toml", `
				[host."https://harbor/v2/proxy"]
				override_path = true
				[host."https://x/api/"]
				override_path = true
				[host."https://y"]
				override_path = true
			`)}},
		},
		{
			name: "Docker Hub", host: "index.docker.io",
			o:    Options{Dirs: []Dir{dir("docker.io/hosts.toml", "server = 'https://registry-1.docker.io'\n[host.'http://spegel:5000']")}},
			want: []string{"http://spegel:5000/v2 ns=docker.io", "https://registry-1.docker.io/v2"},
		},
		{
			name: "BOOTFS_MIRRORS", host: "registry.example.com",
			o: Options{
				Mirrors: "http://all:5000 other.example.com=https://no registry.example.com=https://one/cache  https://harbor/v2/proxy bare:1",
				Dirs:    []Dir{dir("registry.example.com/hosts.toml", "[host.'https://harbor/v2/proxy']\noverride_path=true\n[host.'https://file']")},
			},
			want: []string{
				"http://all:5000/v2 ns=registry.example.com",
				"https://one/cache/v2 ns=registry.example.com",
				"https://harbor/v2/proxy ns=registry.example.com",
				"https://bare:1/v2 ns=registry.example.com",
				"https://file/v2 ns=registry.example.com",
				"https://registry.example.com/v2",
			},
		},
		{name: "mirror of Docker Hub", o: Options{Mirrors: "docker.io=http://m"}, host: "index.docker.io", want: []string{"http://m/v2 ns=docker.io", "https://index.docker.io/v2"}},
		{
			name: "certificates only", o: Options{Dirs: []Dir{dir("r/ca.crt", "x"), dir("r/hosts.toml", "[host.'https://m']")}}, host: "r",
			want: []string{"https://m/v2 ns=r", "https://r/v2"},
		},
		{name: "not TOML", o: Options{Dirs: []Dir{dir("r/hosts.toml", "[host")}}, host: "r", problem: "/certs.d/r/hosts.toml: "},
		{name: "unknown capability", o: Options{Dirs: []Dir{dir("r/hosts.toml", "[host.x]\ncapabilities=['fly']")}}, host: "r", problem: `host "x": unknown capability "fly"`},
		{name: "no URL", o: Options{Dirs: []Dir{dir("r/hosts.toml", "server = 'ftp://x'")}}, host: "r", problem: "not an http:// or https:// address"},
		{name: "ca of another kind", o: Options{Dirs: []Dir{dir("r/hosts.toml", "ca = 7.5\nclient = true")}}, host: "r", problem: "client: true is neither"},
		{name: "odd pair", o: Options{Dirs: []Dir{dir("r/hosts.toml", "client = [['a', 'b', 'c']]")}}, host: "r", problem: "client: 3 files in a pair"},
		{name: "twice", o: Options{Dirs: []Dir{dir("r/hosts.toml", "ca = 'a'\nca = 'b'")}}, host: "r", problem: `"ca" stands twice`},
		{name: "too long", o: Options{Dirs: []Dir{dir("r/hosts.toml", strings.Repeat("#", maxHostsFile+1))}}, host: "r", problem: "more than 65536 bytes"},
		{name: "too deep", o: Options{Dirs: []Dir{dir("r/hosts.toml", "x = "+strings.Repeat("[", 100)+strings.Repeat("]", 100))}}, host: "r", problem: "nested too deeply"},
		{name: "out of the directory", o: Options{Dirs: []Dir{dir("passwd/ca.crt", "")}}, host: "../passwd", want: []string{"https://../passwd/v2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			list, err := newHosts(t, tt.o).Registry(tt.host)
			if tt.problem != "" {
				if err == nil || !strings.Contains(err.Error(), tt.problem) || strings.Contains(err.Error(), "\n") {
					t.Errorf("got %v, want one line with %q", err, tt.problem)
				}
				return
			}
			if got, want := describe(list), strings.Join(tt.want, "\n"); err != nil || got != want {
				t.Errorf("got %v\n%s\nwant\n%s", err, got, want)
			}
		})
	}
}

func TestOrigin(t *testing.T) {
	for _, tt := range []struct {
		toml, want string
	}{
		{"", "https://r/v2"},
		{"[host.'https://m']", "https://r/v2"},
		{"server = 'http://r'", "http://r/v2"},
		{"server = 'https://other'\n[host.'https://m']", "https://r/v2"},
	} {
		e, err := newHosts(t, Options{Dirs: []Dir{dir("r/hosts.toml", tt.toml)}}).Origin("r")
		if got := describe([]Endpoint{e}); err != nil || got != tt.want {
			t.Errorf("%q: got %s, %v, want %s", tt.toml, got, err, tt.want)
		}
	}
}

func TestBadMirrors(t *testing.T) {
	for list, want := range map[string]string{
		"ftp://m":                     "not an http:// or https:// address",
		"http://":                     "not an http:// or https:// address",
		"r=":                          "not an http:// or https:// address",
		"http://joe:s3cret@m":         "credentials",
		"ok:1 http://m?x=1":           "not an http:// or https:// address",
		"http://m/%zz":                "not a URL",
		"r=http://joe:s3cret@m/%zz":   "not a URL",
		"r.example.com=registry://m/": "not an http:// or https:// address",
	} {
		_, err := New(Options{Mirrors: list})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: got %v, want %q", list, err, want)
		}
	}
}

// TestPaths: where the files are that a hosts.toml names.
func TestPaths(t *testing.T) {
	for _, tt := range []struct {
		path   string
		local  bool
		name   string // for messages
		inside bool   // it is read through the directory
	}{
		{"ca.crt", false, "/certs.d/r/ca.crt", true},
		{"ca.crt", true, "/certs.d/r/ca.crt", true},
		{"../shared/ca.crt", false, "/certs.d/shared/ca.crt", true},
		{"../../ca.crt", true, "/ca.crt", false},
		{"/etc/containerd/certs.d/x/ca.crt", false, "/certs.d/x/ca.crt", true},
		{"/etc/containerd/certs.d/x/ca.crt", true, "/etc/containerd/certs.d/x/ca.crt", false},
		{"/etc/ssl/ca.crt", false, "/certs.d/r/ca.crt", true},
	} {
		d := dir()
		d.Local = tt.local
		f := file{&d, "r"}.join(tt.path)
		if f.name() != tt.name || filepath.IsAbs(f.path) == tt.inside {
			t.Errorf("%s, local %v: got %q (%s), want %s", tt.path, tt.local, f.path, f.name(), tt.name)
		}
	}
}

// TestNoFiles: what is no file, or too much, is neither read nor waited for.
func TestNoFiles(t *testing.T) {
	name := t.TempDir()
	root, err := os.OpenRoot(name)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	d := Dir{Name: name, FS: root.FS()}
	if err := os.MkdirAll(filepath.Join(name, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(name, "large"), make([]byte, maxCertificate+1), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(name, "escape")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"dir": "not a file", "large": "more than 1048576 bytes", "escape": "escapes", "../x": "invalid", "missing": "no such file",
	} {
		if _, err := (file{&d, path}).read(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
}

func FuzzHosts(f *testing.F) {
	for _, s := range []string{
		"", "server = 'https://x'", "[host.'https://x']\nca = ['a', 'b']\nclient = [['a', 'b'], 'c']\nskip_verify = true", "[[host]]\nx = 1",
		"[host.x.header]\na = 'b'\nc = ['d']", "host = {x = {ca = 'a'}}", "a.b.c = {d = [1, 2.5, 1979-05-27]}\n[a.b]", "dial_timeout = '1s'", "x = \"\\u00e9\"",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h := newHosts(t, Options{Dirs: []Dir{dir("r/hosts.toml", string(b))}})
		list, err := h.Registry("r")
		if err == nil && len(list) == 0 || err != nil && len(list) > 0 {
			t.Errorf("got %d endpoints, %v", len(list), err)
		}
		for _, e := range list {
			if e.Host == "" || !slices.Contains([]string{"http", "https"}, e.Scheme) || strings.HasSuffix(e.Path, "/") {
				t.Errorf("got %+v", fmt.Sprint(e))
			}
		}
	})
}
