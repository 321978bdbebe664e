package boot

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What boot's memory grows to before the collector works harder, in bytes: a
// quarter of what the container may use, within these bounds. Well above half
// of the larger one is chunks, which the collector need not look into. A limit
// is better here than a lower GOGC: a start, which needs little, then collects
// nothing.
const (
	minMemoryGoal = 16 << 20
	maxMemoryGoal = 40 << 20
)

// besidesHeap is what boot's resident memory has apart from that: code, stacks,
// the mapped index.
const besidesHeap = 12 << 20

// memory is what boot may use, and what the container may.
type memory struct {
	goal  int64 // of boot's heap, in bytes
	limit int64 // of the container, in bytes; the machine's memory where it has none
}

// ownMemory finds out the limits and keeps to them. It undoes what the Go
// runtime took from the environment: GOGC and GOMEMLIMIT there are the app's,
// made for its heap and not for boot's.
func ownMemory() memory {
	m := memoryOf(memoryLimit())
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(m.goal)
	return m
}

// programStarts is how long the collector leaves a program alone that begins, and
// reads what was decoded for it.
const programStarts = time.Second

// collect has the collector work as usual. Until then, which is while the root is
// made, it only keeps to the goal.
func (m memory) collect() { debug.SetGCPercent(100) }

// memoryOf is what boot uses in a container that may use limit bytes.
func memoryOf(limit int64) memory {
	return memory{goal: min(max(limit/4, minMemoryGoal), maxMemoryGoal), limit: limit}
}

// chunks is how many bytes of decoded chunks boot keeps.
func (m memory) chunks() int { return int(m.goal * 2 / 5) }

// appScore is what the app's oom_score_adj is above boot's, in thousandths of
// the limit: as much as boot itself can have. Without it the kernel would kill
// boot, and with it the container, where it would have killed one of many small
// processes of the app.
func (m memory) appScore() int {
	const all = 1000
	return int(min((m.goal+besidesHeap)*all/m.limit+1, all))
}

// memoryLimit returns how many bytes the container may use.
func memoryLimit() int64 {
	limit := int64(1) << 62
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		limit = int64(info.Totalram) * int64(info.Unit)
	}
	// Version 2 and version 1 of control groups, as engines mount them.
	for _, file := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && n > 0 {
			limit = min(limit, n)
		}
	}
	return limit
}

// raiseScore adds to the calling process's oom_score_adj, which its program and
// all their children then have. Where that is refused, they are as likely a
// victim as boot.
func raiseScore(add int) {
	const (
		file    = "/proc/self/oom_score_adj"
		highest = 1000
	)
	b, err := os.ReadFile(file)
	if err != nil {
		return
	}
	if have, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
		_ = os.WriteFile(file, []byte(strconv.Itoa(min(have+add, highest))), 0)
	}
}
