package main

import (
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/convert"
)

func TestPace(t *testing.T) {
	for _, tt := range []struct {
		done, total int64
		took        time.Duration
		want        string
	}{
		{100e6, 300e6, 10 * time.Second, ", 10 MB/s, 20s left"},
		{1e9, 100e9, 20 * time.Second, ", 50 MB/s, 33m0s left"},
		{300e6, 300e6, 10 * time.Second, ", 30 MB/s"},
		{300e6, 200e6, 10 * time.Second, ", 30 MB/s"}, // more than was expected
		{100e6, 0, 4 * time.Second, ", 25 MB/s"},
		{0, 300e6, 10 * time.Second, ""},
		{100e6, 300e6, 0, ""},
	} {
		if got := pace(convert.Event{Done: tt.done, Total: tt.total}, tt.took); got != tt.want {
			t.Errorf("%d of %d in %v: got %q, want %q", tt.done, tt.total, tt.took, got, tt.want)
		}
	}
}
