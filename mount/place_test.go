package mount

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// seesPlace prints what a program finds of a place in the directory that is its
// argument, and takePlace what it can do with it.
const (
	seesPlace = `
import os, sys
os.chdir(sys.argv[1])
print(*[n for n in os.listdir(".") if "place" in n], end="")
for f in os.stat, os.lstat, os.listdir, os.chdir, lambda p: os.open(p, os.O_RDONLY), lambda p: os.stat(p + "/file"), lambda p: os.listdir(os.open(p, os.O_RDONLY)):
    try: print("seen:", f(".place"))
    except FileNotFoundError: pass
    except OSError as e: print(e)
`
	takePlace = `
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(sys.argv[1])
def exchange(a, b):
    if libc.renameat2(-100, a.encode(), -100, b.encode(), 2): raise OSError()
for name, f in {
    "rmdir": lambda p: os.rmdir(p), "unlink": lambda p: os.unlink(p), "rename": lambda p: os.rename(p, "moved"),
    "mkdir": lambda p: os.mkdir(p), "mkdir in it": lambda p: os.mkdir(p + "/d"), "mknod": lambda p: os.mknod(p), "link": lambda p: os.symlink("/", p),
    "create": lambda p: os.open(p, os.O_CREAT | os.O_RDWR), "create in it": lambda p: os.open(p + "/f", os.O_CREAT | os.O_RDWR),
    "chmod": lambda p: os.chmod(p, 0o777), "chown": lambda p: os.chown(p, 7, 7), "utime": lambda p: os.utime(p), "setxattr": lambda p: os.setxattr(p, "user.x", b"y"),
    "rename over it": lambda p: (os.makedirs("d", exist_ok=True), os.rename("d", p)),
    "exchange": lambda p: (os.makedirs("e", exist_ok=True), exchange("e", p)),
    "rename a file over it": lambda p: (open("f", "w").close(), os.rename("f", p)),
}.items():
    try: f(".place"); print("worked:", name)
    except OSError: pass
`
)

// TestPlace: a place can be mounted on, and otherwise it is not there, below a
// writable layer as well. Nobody can remove, replace or use it.
func TestPlace(t *testing.T) {
	root, _ := small()
	for _, classes := range [][]string{nil, {"security", "system", "trusted", "user"}} {
		s := serve(t, root, func(o *Options) { o.Place, o.XattrClasses = ".place", classes })
		overlay, upper := overlayOf(t, s.dir)
		for _, top := range []string{s.dir, overlay} {
			hidden := func(when string) {
				t.Helper()
				out, err := exec.Command("python3", "-c", seesPlace, top).CombinedOutput()
				if err != nil || len(out) > 0 {
					t.Errorf("%s: %v\n%s", when, err, out)
				}
			}
			place := filepath.Join(top, ".place")
			hidden("at first")
			if err := unix.Mount("none", place, "tmpfs", 0, "size=64k"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(place, "file"), []byte("seen"), 0o600); err != nil {
				t.Error(err)
			}
			if b, err := read(filepath.Join(place, "file")); err != nil || string(b) != "seen" {
				t.Errorf("what is mounted there: %q, %v", b, err)
			}
			// Others, whose mount namespace lacks that mount, try to be rid of the place.
			cmd := exec.Command("unshare", "-m", "sh", "-c", `umount "$1/.place" && python3 -c "$2" "$1"`, "sh", top, takePlace)
			if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%v\n%s", err, out)
			}
			if b, err := read(filepath.Join(place, "file")); err != nil || string(b) != "seen" {
				t.Errorf("what is mounted there, after others have tried to take it away: %q, %v", b, err)
			}
			if err := unix.Unmount(place, 0); err != nil {
				t.Error(err)
			}
			hidden("in the end")
		}
		if _, err := os.Lstat(filepath.Join(upper, ".place")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("in the writable layer: %v", err)
		}
		if s.log.String() != "" {
			t.Errorf("the log says:\n%s", s.log)
		}
	}
}
