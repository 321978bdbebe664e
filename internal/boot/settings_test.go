package boot

import (
	"strings"
	"testing"
	"time"
)

func TestFailureSettings(t *testing.T) {
	for env, want := range map[string]settings{
		"BOOTFS_ON_FAILURE=":      {},
		"BOOTFS_ON_FAILURE=error": {},
		"BOOTFS_ON_FAILURE=hold":  {hold: true},
		"BOOTFS_READ_TIMEOUT=":    {},
		"BOOTFS_READ_TIMEOUT=3s":  {readTimeout: 3 * time.Second},
		"BOOTFS_READ_TIMEOUT=2m":  {readTimeout: 2 * time.Minute},
	} {
		s, err := readSettings([]string{env})
		if err != nil || s.hold != want.hold || s.readTimeout != want.readTimeout {
			t.Errorf("%s: got %+v, %v", env, s, err)
		}
	}
	for _, env := range []string{"BOOTFS_ON_FAILURE=wait", "BOOTFS_READ_TIMEOUT=60", "BOOTFS_READ_TIMEOUT=1s", "BOOTFS_READ_TIMEOUT=-5s"} {
		name, value, _ := strings.Cut(env, "=")
		if _, err := readSettings([]string{env}); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), value) {
			t.Errorf("%s: got %v, want a line that says what is wrong", env, err)
		}
	}
}
