package boot

import (
	"os"
	"os/exec"
	"testing"
)

func TestAppScore(t *testing.T) {
	for _, c := range []struct {
		limit int64
		goal  int64
		score int
	}{
		{1 << 20, minMemoryGoal, 1000},
		{64 << 20, minMemoryGoal, 438},
		{128 << 20, 32 << 20, 344},
		{512 << 20, maxMemoryGoal, 102},
		{32 << 30, maxMemoryGoal, 2},
	} {
		m := memoryOf(c.limit)
		if m.goal != c.goal || m.appScore() != c.score {
			t.Errorf("limit %d: goal %d, score %d; want %d and %d", c.limit, m.goal, m.appScore(), c.goal, c.score)
		}
		if m.chunks() > int(m.goal)/2 {
			t.Errorf("limit %d: %d bytes of chunks, more than half of %d", c.limit, m.chunks(), m.goal)
		}
	}
}

func TestMemoryLimitIsTheMachinesAtMost(t *testing.T) {
	if limit := memoryLimit(); limit < 64<<20 || limit > 1<<50 {
		t.Errorf("got %d bytes", limit)
	}
}

// TestRaiseScore does it in a process of its own: a score that was raised
// cannot be lowered again without a capability.
func TestRaiseScore(t *testing.T) {
	if os.Getenv("BOOTFS_TEST_RAISE") != "" {
		raiseScore(7)
		raiseScore(990)
		b, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			t.Fatal(err)
		}
		if got := string(b); got != "997\n" && got != "1000\n" {
			t.Errorf("got %q, want 997 above what it was, at most 1000", got)
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestRaiseScore$")
	cmd.Env = append(os.Environ(), "BOOTFS_TEST_RAISE=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
