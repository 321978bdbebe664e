package startset

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// build makes a tree from paths: "→ target" is a symlink, anything else the
// content of an executable file.
func build(files map[string]string) *tree.Tree {
	root := dir()
	for p, content := range files {
		at := root
		parts := strings.Split(strings.Trim(p, "/"), "/")
		for _, name := range parts[:len(parts)-1] {
			if at.Entries[name] == nil {
				at.Entries[name] = dir()
			}
			at = at.Entries[name]
		}
		at.Entries[parts[len(parts)-1]] = file(content)
	}
	return &tree.Tree{Root: root}
}

func dir() *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*tree.Inode{}}
}

func file(content string) *tree.Inode {
	if target, ok := strings.CutPrefix(content, "→ "); ok {
		return &tree.Inode{Mode: unix.S_IFLNK | 0o777, Target: target}
	}
	n := &tree.Inode{Mode: unix.S_IFREG | 0o755, Size: int64(len(content))}
	if n.Size > 0 {
		n.Content = tree.Content{Source: strings.NewReader(content), Extents: []tree.Extent{{Length: n.Size}}}
	}
	return n
}

// host makes a tree of some directories of this machine.
func host(t *testing.T, dirs ...string) *tree.Tree {
	t.Helper()
	out := build(nil)
	for _, d := range dirs {
		err := filepath.WalkDir(d, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			at := out.Root
			parts := strings.Split(strings.Trim(p, "/"), "/")
			for _, name := range parts[:len(parts)-1] {
				if at.Entries[name] == nil {
					at.Entries[name] = dir()
				}
				at = at.Entries[name]
			}
			name := parts[len(parts)-1]
			info, err := e.Info()
			if err != nil {
				return err
			}
			switch {
			case e.IsDir():
				if at.Entries[name] == nil {
					at.Entries[name] = dir()
				}
			case e.Type() == fs.ModeSymlink:
				target, err := os.Readlink(p)
				if err != nil {
					return err
				}
				at.Entries[name] = file("→ " + target)
			case e.Type().IsRegular():
				n := &tree.Inode{Mode: unix.S_IFREG | uint32(info.Mode().Perm()), Size: info.Size()}
				n.Content = tree.Content{Source: onDemand(p), Extents: []tree.Extent{{Length: n.Size}}}
				at.Entries[name] = n
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// onDemand is a file that is opened for each read.
type onDemand string

func (f onDemand) ReadAt(p []byte, off int64) (int, error) {
	r, err := os.Open(string(f))
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return r.ReadAt(p, off)
}

// TestFilesLikeLoader compares with what the machine's own loader would map.
func TestFilesLikeLoader(t *testing.T) {
	tr := host(t, "/bin", "/lib", "/lib64", "/usr/bin", "/usr/lib/x86_64-linux-gnu", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.cache")
	so := regexp.MustCompile(`(/\S+) \(0x`)
	for _, program := range []string{"sh", "casync", "skopeo", "tar", "umoci"} {
		t.Run(program, func(t *testing.T) {
			where, err := exec.LookPath(program)
			if err != nil {
				t.Fatal(err)
			}
			got := Files(tr, Program{Args: []string{program}})
			var want []string
			out, err := exec.Command("ldd", where).Output()
			if err != nil && !bytes.Contains(out, []byte("not a dynamic")) {
				t.Logf("ldd %s: %v: taken as static", where, err)
			}
			for _, m := range so.FindAllSubmatch(out, -1) {
				p, err := filepath.EvalSymlinks(string(m[1]))
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, p)
			}
			real, err := filepath.EvalSymlinks(where)
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, real)
			if len(want) > 1 {
				want = append(want, "/etc/ld.so.cache")
			}
			if got[0] != real {
				t.Errorf("the program is not the first: %v", got[0])
			}
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	tr := build(map[string]string{
		"/usr/bin/python3":            "→ python3.11",
		"/usr/bin/python3.11":         "interpreter",
		"/bin":                        "→ usr/bin",
		"/usr/bin/env":                "env",
		"/usr/bin/sh":                 "→ dash",
		"/usr/bin/dash":               "shell",
		"/usr/local/bin/entry.sh":     "#!/bin/sh -e\nexec \"$@\"\n",
		"/usr/local/bin/tool":         "#!/usr/bin/env -S LANG=C python3 -u\n",
		"/usr/local/bin/run":          "#!/usr/bin/env sh\nset -e # then python3\n/usr/bin/env; cd /app/data || exit\nrun && nginx -c \"/app/main.py\"\n",
		"/app/data":                   "→ /etc",
		"/usr/sbin/nginx":             "server",
		"/app/main.py":                "print()",
		"/app/loop":                   "#!/app/loop\n",
		"/opt/bin/python3":            "another",
		"/etc/not-a-program/file.txt": "x",
	})
	for _, tt := range []struct {
		name string
		p    Program
		want []string
	}{
		{"nothing", Program{}, nil},
		{"missing", Program{Args: []string{"nosuch", "", "/no/such"}}, nil},
		{"on PATH, through a link", Program{Args: []string{"python3"}}, []string{"/usr/bin/python3.11"}},
		{"another PATH", Program{Args: []string{"python3"}, Env: []string{"PATH=/opt/bin:/usr/bin"}}, []string{"/opt/bin/python3"}},
		{"PATH twice, the last counts", Program{Args: []string{"python3"}, Env: []string{"PATH=/opt/bin", "PATH=/usr/bin"}}, []string{"/usr/bin/python3.11"}},
		{"directory link", Program{Args: []string{"/bin/python3"}}, []string{"/usr/bin/python3.11"}},
		{"what a script of a shell runs", Program{Args: []string{"run", "main.py"}, WorkingDir: "/app"}, []string{
			"/usr/local/bin/run", "/usr/bin/env", "/usr/bin/dash", "/app/main.py", "/usr/sbin/nginx",
		}},
		{"script in the working directory", Program{Args: []string{"python3", "main.py"}, WorkingDir: "/app"}, []string{"/usr/bin/python3.11", "/app/main.py"}},
		{"entry point that runs its arguments", Program{Args: []string{"entry.sh", "nginx", "-g", "daemon off;"}},
			[]string{"/usr/local/bin/entry.sh", "/usr/bin/dash", "/usr/sbin/nginx"}},
		{"env -S", Program{Args: []string{"tool"}}, []string{"/usr/local/bin/tool", "/usr/bin/env", "/usr/bin/python3.11"}},
		{"shell form", Program{Args: []string{"/bin/sh", "-c", "cd /app; exec python3 main.py|nginx"}, WorkingDir: "/app"},
			[]string{"/usr/bin/dash", "/usr/bin/python3.11", "/app/main.py", "/usr/sbin/nginx"}},
		{"shell form behind an entry point", Program{Args: []string{"entry.sh", "sh", "-ec", "nginx"}},
			[]string{"/usr/local/bin/entry.sh", "/usr/bin/dash", "/usr/sbin/nginx"}},
		{"its own interpreter", Program{Args: []string{"/app/loop"}}, []string{"/app/loop"}},
		{"directory", Program{Args: []string{"/etc"}}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Files(tr, tt.p); !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// TestHostileLists wants an end soon where every word of a command line is
// looked for in very many directories, and very many files include all others.
func TestHostileLists(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	tr := build(map[string]string{"/bin/sh": "x", "/etc/ld.so.conf": strings.Repeat("include /c/*\n", 5000)})
	tr.Root.Entries["c"] = dir()
	for i := range 10_000 {
		tr.Root.Entries["c"].Entries[strconv.Itoa(i)] = tr.Lookup("/etc/ld.so.conf")
	}
	words := strings.Repeat("a b c d ", 64)
	args := []string{"sh"}
	for range 100 {
		args = append(args, "-c", words)
	}
	began := time.Now()
	Files(tr, Program{Args: args, Env: []string{"PATH=" + strings.Repeat("/x:", 1<<20)}})
	(&search{tree: tr, left: maxLookups}).loaderDirs()
	if d := time.Since(began); d > time.Minute {
		t.Errorf("took %s", d)
	}
}

// TestLibraryDirs wants the directories of the loader's configuration, each
// once it is reached, and an include that includes itself to end.
func TestLibraryDirs(t *testing.T) {
	tr := build(map[string]string{
		"/etc/ld.so.conf":              "include /etc/ld.so.conf.d/*.conf\n# /no\n/opt/lib # yes\n",
		"/etc/ld.so.conf.d/a.conf":     "/a/lib\ninclude *.conf\nrelative/dir\n",
		"/etc/ld.so.conf.d/b.conf.off": "/b/lib\n",
		"/etc/ld-musl-x86_64.path":     "/musl/lib:/usr/lib\n",
	})
	s := &search{tree: tr, left: maxLookups, seen: map[string]bool{}}
	got := s.loaderDirs()
	for _, want := range []string{"/opt/lib", "/a/lib", "/musl/lib", "/usr/lib"} {
		if !slices.Contains(got, want) {
			t.Errorf("%s is missing in %v", want, got[:min(8, len(got))])
		}
	}
	for _, never := range []string{"/b/lib", "/no", "relative/dir"} {
		if slices.Contains(got, never) {
			t.Errorf("%s should not be searched", never)
		}
	}
}

// FuzzReadObject wants no panic, no error but a plain one, and no more work
// than the limits allow, for any bytes in the place of a program.
func FuzzReadObject(f *testing.F) {
	for _, p := range []string{"/bin/sh", "/lib64/ld-linux-x86-64.so.2"} {
		b, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:min(len(b), 4096)])
	}
	f.Add([]byte("\x7fELF\x01\x02\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := readObject(bytes.NewReader(b))
		if err == nil && len(o.needed) > maxNeeded {
			t.Fatal("too many libraries")
		}
		Files(build(map[string]string{"/bin/x": string(b)}), Program{Args: []string{"x"}})
	})
}
