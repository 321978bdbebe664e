package transport

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	id := "sha256:" + strings.Repeat("a", 64)
	for _, c := range []struct {
		in, bare string
		want     Ref
		err      string
	}{
		{in: "ubuntu", want: Ref{Registry, "", "ubuntu"}},
		{in: "ubuntu:24.04", want: Ref{Registry, "", "ubuntu:24.04"}},
		{in: "ubuntu", bare: Daemon, want: Ref{Daemon, "", "ubuntu"}},
		{in: "docker://ubuntu", bare: Daemon, want: Ref{Registry, "", "ubuntu"}},
		{in: "localhost:5000/a/b:c", want: Ref{Registry, "", "localhost:5000/a/b:c"}},
		{in: "host.example/x@" + id, want: Ref{Registry, "", "host.example/x@" + id}},
		{in: "docker-daemon:x:y", want: Ref{Daemon, "", "x:y"}},
		{in: "docker-daemon:" + id, want: Ref{Daemon, "", id}},
		{in: "docker-archive:/a/b.tar", want: Ref{DockerArchive, "/a/b.tar", ""}},
		{in: "docker-archive:b.tar:x:y", want: Ref{DockerArchive, "b.tar", "x:y"}},
		{in: "oci:dir", want: Ref{OCI, "dir", ""}},
		{in: "oci:dir:v1", want: Ref{OCI, "dir", "v1"}},
		{in: "oci-archive:f.tar:v1", want: Ref{OCIArchive, "f.tar", "v1"}},

		{in: "", err: "the name is missing"},
		{in: "docker://", err: "the name is missing"},
		{in: "docker:ubuntu", err: "did you mean docker://ubuntu or docker-daemon:ubuntu"},
		{in: "oci:", err: "the path after oci: is missing"},
		{in: "docker-archive:", err: "the path after docker-archive: is missing"},
		{in: "docker-archive:f:UPPER", err: "docker-archive:FILE[:NAME]"},
		{in: "dir:/tmp/x", err: "transport dir: is not supported"},
		{in: "https://x/y", err: "there is no transport https://"},
		{in: "a b", err: "docker-daemon:NAME"},
		{in: "x@sha256:../../etc", err: "an image is"},
		{in: "oci:a@b/c", want: Ref{OCI, "a@b/c", ""}},
		{in: "joe:s3cret@host.example/x", err: "image …@host.example/x: a name has no user and no password in it"},
		{in: "docker://joe:s3cret@host.example/x", err: "a name has no user"},
		{in: "https://joe:s3cret@host.example/x", err: "a name has no user"},
	} {
		got, err := Parse(c.in, c.bare)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("Parse(%q): got %v, %v, want an error with %q", c.in, got, err, c.err)
			} else if strings.Contains(err.Error(), "\n") {
				t.Errorf("Parse(%q): more than one line: %v", c.in, err)
			} else if strings.Contains(err.Error(), "s3cret") {
				t.Errorf("Parse(%q): the error has the password: %v", c.in, err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("Parse(%q, %q) = %+v, %v, want %+v", c.in, c.bare, got, err, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"a", "docker://a/b:c", "oci:d:e:f", "docker-archive:f", "docker-daemon:a@b", "oci-archive:::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Parse(s, "")
		if err != nil {
			return
		}
		again, err := Parse(r.String(), Daemon)
		if err != nil || again != r {
			t.Errorf("Parse(%q) = %+v; its String %q gives %+v, %v", s, r, r, again, err)
		}
	})
}

func TestParsePlatform(t *testing.T) {
	for in, want := range map[string]string{
		"linux/amd64": "linux/amd64", "amd64": "linux/amd64", "linux/arm/v7": "linux/arm/v7",
		"Linux/x86_64": "linux/amd64", "aarch64": "linux/arm64",
		"windows/amd64": "", "": "", "linux/": "", "linux/arm/": "", "linux/a/b/c": "",
	} {
		p, err := ParsePlatform(in)
		if got := p.String(); got != want || (err == nil) != (want != "") {
			t.Errorf("ParsePlatform(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		have, want string
		ok         bool
	}{
		{"linux/amd64", "linux/amd64", true},
		{"linux/arm64/v8", "linux/arm64", true},
		{"linux/arm64", "linux/arm64/v8", true},
		{"linux/arm/v7", "linux/arm/v6", false},
		{"linux/arm/v7", "linux/arm", true},
		{"linux/arm64", "linux/amd64", false},
	} {
		have, err := ParsePlatform(c.have)
		if err != nil {
			t.Fatal(err)
		}
		want, err := ParsePlatform(c.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := matches(have, want); got != c.ok {
			t.Errorf("matches(%s, %s) = %v", c.have, c.want, got)
		}
	}
}
