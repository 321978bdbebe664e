package boot

import (
	"fmt"
	"os"
	"runtime"
	"runtime/metrics"
	"strings"
)

// processStatus is what boot itself uses. What could not be found out is 0.
type processStatus struct {
	Goroutines     int    `json:"goroutines"`
	Threads        int    `json:"threads"`
	Descriptors    int    `json:"descriptors"`
	HeapBytes      uint64 `json:"heapBytes"`      // of objects that live, or are not yet collected
	ResidentBytes  int64  `json:"residentBytes"`  // with pages of files, of which the kernel can do without
	AnonymousBytes int64  `json:"anonymousBytes"` // memory of its own
}

func ownProcess() processStatus {
	p := processStatus{Goroutines: runtime.NumGoroutine()}
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(heap)
	if heap[0].Value.Kind() == metrics.KindUint64 {
		p.HeapBytes = heap[0].Value.Uint64()
	}
	if d, err := os.Open("/proc/self/fd"); err == nil {
		names, _ := d.Readdirnames(-1)
		d.Close()
		p.Descriptors = max(len(names)-1, 0) // without the one that has just been read
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return p
	}
	const kibi = 1 << 10
	for line := range strings.Lines(string(b)) {
		var n int64
		name, value, _ := strings.Cut(line, ":")
		if _, err := fmt.Sscan(value, &n); err != nil {
			continue
		}
		switch name {
		case "Threads":
			p.Threads = int(n)
		case "VmRSS":
			p.ResidentBytes = n * kibi
		case "RssAnon":
			p.AnonymousBytes = n * kibi
		}
	}
	return p
}
