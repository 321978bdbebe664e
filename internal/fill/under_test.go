package fill

import (
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// TestUnder fills with one directory of the image, which has one of two names
// of a file.
func TestUnder(t *testing.T) {
	tr := sample()
	m := newImage(t, tr)
	dir := t.TempDir()
	r, err := m.fill(t, dir, Options{Under: "/b/"})
	if err != nil || r.Files != 3 || r.Bytes != int64(len("linked")) || m.fetched.Load() != 1 {
		t.Fatalf("%+v, %v, %d chunks fetched", r, err, m.fetched.Load())
	}
	compare(t, dir, want(t, &tree.Tree{Root: tr.Root.Entries["b"]}))
	// The journal is that of this directory.
	if r, err := m.fill(t, t.TempDir(), Options{Under: "twins"}); err != nil || r.Files != 3 {
		t.Errorf("%+v, %v", r, err)
	}
	for under, want := range map[string]string{"none/x": "none/x in the image: no such entry", "large": "want a directory", "large/x": "want a directory"} {
		if _, err := m.fill(t, t.TempDir(), Options{Under: under}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", under, err, want)
		}
	}
}
