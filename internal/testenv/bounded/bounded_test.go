//go:build !race && !cgo

package bounded

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestBounds: what exceeds a bound fails, and says so.
func TestBounds(t *testing.T) {
	for name, want := range map[string]string{
		"TestMemory": "within 256 MiB",
		"TestTime":   "of CPU, want at most",
		"TestLeft":   "left behind: [",
		"TestFails":  "it fails",
		"TestPasses": "",
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^"+name+"$")
			cmd.Env = append(os.Environ(), exceed+"=1")
			out, err := cmd.CombinedOutput()
			if (err == nil) != (want == "") || !strings.Contains(string(out), want) {
				t.Errorf("got %v, want %q:\n%s", err, want, out)
			}
		})
	}
}

// exceed lets the tests below do what they must not.
const exceed = "BOOTFS_TEST_EXCEED"

func TestMemory(t *testing.T) {
	bad := os.Getenv(exceed) != ""
	if !Test(t) {
		return
	}
	size := Memory / 4
	if bad {
		size = Memory
	}
	b := make([]byte, size)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	if len(b) != size {
		t.Error(len(b))
	}
}

func TestTime(t *testing.T) {
	bad := os.Getenv(exceed) != ""
	if !Test(t) {
		return
	}
	const most = 100 * time.Millisecond
	within(t, most)
	for until := spent(t) + 2*most; bad && spent(t) < until; {
		for i := range 1 << 20 {
			sink += i
		}
	}
}

var sink int

func TestLeft(t *testing.T) {
	bad := os.Getenv(exceed) != ""
	if !Test(t) {
		return
	}
	f, err := os.CreateTemp("", "")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if !bad {
		os.Remove(f.Name())
	}
}

func TestFails(t *testing.T) {
	bad := os.Getenv(exceed) != ""
	if !Test(t) {
		return
	}
	if bad {
		t.Error("it fails")
	}
}

func TestPasses(t *testing.T) { Test(t) }
