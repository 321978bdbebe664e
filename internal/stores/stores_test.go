package stores

import (
	"strings"
	"testing"
)

// TestRefusalsHideCredentials: what is said of an address goes to a log.
func TestRefusalsHideCredentials(t *testing.T) {
	for _, address := range []string{
		"https://user:hidden@host/path",
		"ssh://user:hidden@host/path",
		"s3+https://host/bucket?secret=hidden",
		"registry://user:hidden@host/repo",
		"registry://user:hid/hidden@host/repo",
		"registry://host/user:hidden@repo",
		"registry+http://user:hidden@host/repo",
	} {
		_, err := Open(address, Source{})
		if err == nil || strings.Contains(err.Error(), "hid") || !strings.Contains(err.Error(), address[:strings.Index(address, ":")]) {
			t.Errorf("%s: got %v, want an error that names the scheme and no password", address, err)
		}
	}
}
