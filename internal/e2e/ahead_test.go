package e2e

import (
	"testing"
)

// TestReadsGoOnInFiles reads a program of some MB without a start set: what follows
// in a file comes with a part of it that is read, and nothing of other files.
func TestReadsGoOnInFiles(t *testing.T) {
	through := newRangeLog(t)
	requests := through.during(func() {
		profileOf(t, w.image, "--run-flag=-eBOOTFS_MIRRORS=http://"+through.address, "--run-flag=-eBOOTFS_PREFETCH=none",
			"--", "sh", "-c", "exec cat /usr/bin/python3 >/dev/null")
	})
	read := profileOf(t, w.image, "--", "sh", "-c", "exec cat /usr/bin/python3 >/dev/null")
	want := storedOf(t, openImage(t, w.image), read)
	var moved, size int64
	for _, g := range read {
		size += g.Size
	}
	for _, q := range requests {
		moved += q.n.Load()
	}
	t.Logf("%d requests moved %d bytes; the chunks of the %d bytes that are read have %d: %.3f", len(requests), moved, size, want, float64(moved)/float64(want))
	// The kernel asks for 128 KiB at a time, which would be a request each.
	if kernel := int(size / (128 << 10)); len(requests) > kernel/2 {
		t.Errorf("%d requests, want at most half as many as the kernel's %d", len(requests), kernel)
	}
	if moved*100 > want*115 {
		t.Errorf("moved %d bytes, want at most 1.15 times the %d of the chunks that are read", moved, want)
	}
}
