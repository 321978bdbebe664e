package mount

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

// posixOne and posixDir name the test that a child of TestPosix runs, and where.
const posixOne, posixDir = "POSIX_ONE", "POSIX_DIR"

// TestPosix runs go-fuse's tests of POSIX behaviour on a writable root, each in
// a directory that the image has.
func TestPosix(t *testing.T) {
	if name := os.Getenv(posixOne); name != "" {
		posixtest.All[name](t, os.Getenv(posixDir))
		return
	}
	root, _ := small()
	dirs := entries{}
	for name := range posixtest.All {
		dirs[name] = dir(nil)
	}
	root.Root.Entries["posix"] = counted(dir(dirs))
	s := serve(t, root, nil)
	merged, _ := overlayOf(t, s.dir)
	for name, test := range posixtest.All {
		t.Run(name, func(t *testing.T) {
			at := filepath.Join(merged, "posix", name)
			if why, holds := posixNowhere[name]; holds {
				// No file system passes it: this one must fail as an ordinary one.
				got, want := posixFailure(t, name, at), posixFailure(t, name, t.TempDir())
				if got != want || !strings.Contains(got, why) {
					t.Errorf("got %q, in an ordinary directory %q, want both to say %q", got, want, why)
				}
				return
			}
			test(t, at)
		})
	}
}

// posixNowhere are the tests that cannot pass on Linux, with what they say:
// FcntlFlockLocksFile wants a process's lock to stand in its own way.
var posixNowhere = map[string]string{"FcntlFlockLocksFile": "FcntlFlock returned <nil>, expected EAGAIN"}

// posixFailure runs one of the tests in a process of its own and returns what
// it complains of, "" if it passes.
func posixFailure(t *testing.T, name, dir string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestPosix$", "-test.v")
	cmd.Env = append(os.Environ(), posixOne+"="+name, posixDir+"="+dir)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return ""
	}
	var complaints []string
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "    ") {
			complaints = append(complaints, strings.TrimSpace(line))
		}
	}
	return strings.Join(complaints, "\n")
}
