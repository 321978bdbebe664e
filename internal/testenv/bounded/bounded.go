// Package bounded runs tests of hostile input with the bounds that every parser
// promises: a test calls [Test] first, and its cases [Case].
package bounded

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Memory is what all cases of a test may take together, in bytes.
	Memory = 256 << 20
	// CPU is the time on one core that a case may take: five times what is
	// promised, as busy machines are slow.
	CPU = 5 * time.Second
)

// inside is set in the process that has the bounds.
const inside = "BOOTFS_TEST_BOUNDED"

// Test reports whether the calling test shall run. At first it does not: Test
// runs it in a process of its own, in which no more than [Memory] can be
// allocated, and fails if that fails or leaves a temporary file behind.
func Test(t *testing.T) bool {
	t.Helper()
	if !enforced {
		return true
	}
	if os.Getenv(inside) != "" {
		limit(t)
		return true
	}
	var elements []string
	for _, e := range strings.Split(t.Name(), "/") {
		elements = append(elements, "^"+regexp.QuoteMeta(e)+"$")
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run="+strings.Join(elements, "/"))
	cmd.Env = append(os.Environ(), inside+"=1", "TMPDIR="+dir, fmt.Sprintf("GOMEMLIMIT=%d", Memory*3/4))
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("\n--- PASS: ")) {
		t.Errorf("within %d MiB: %v\n%s", Memory>>20, err, withoutIdle(out))
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	return false
}

// withoutIdle returns what a test printed without the goroutines that did
// nothing when memory was at its end.
func withoutIdle(out []byte) []byte {
	if i := bytes.Index(out, []byte(" gp=0x")); i >= 0 {
		if n := bytes.Index(out[i:], []byte("\n\n")); n >= 0 {
			return out[:i+n]
		}
	}
	return out
}

// limit bounds what is allocated from now on. What is only reserved, as the Go
// runtime does at its start, does not count.
func limit(t *testing.T) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	var kib uint64
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmData:") {
			if _, err := fmt.Sscanf(line, "VmData: %d kB", &kib); err != nil {
				t.Fatal(err)
			}
		}
	}
	most := kib<<10 + Memory
	if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: most, Max: most}); err != nil {
		t.Fatal(err)
	}
}

// Case fails the calling test if it takes more than [CPU] until it ends.
func Case(t *testing.T) {
	t.Helper()
	if enforced {
		within(t, CPU)
	}
}

func within(t *testing.T, most time.Duration) {
	t.Helper()
	before := spent(t)
	t.Cleanup(func() {
		if took := spent(t) - before; took > most {
			t.Errorf("it took %s of CPU, want at most %s", took, most)
		}
	})
}

func spent(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
