package transport

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/container-bootfs/bootfs/internal/scratch"
)

// TestPackOfAFile puts packs that lie in files without a name into a layout.
func TestPackOfAFile(t *testing.T) {
	for name, tt := range map[string]struct {
		dir     string // of the file
		there   string // what has the pack's name already
		renamed bool   // the file itself is in the layout then
	}{
		"the same filesystem":    {dir: t.TempDir(), renamed: true},
		"another filesystem":     {dir: "/dev/shm"},
		"after a power cut":      {dir: t.TempDir(), there: "pa"},
		"the same pack is there": {dir: t.TempDir(), there: "pack"},
	} {
		t.Run(name, func(t *testing.T) {
			layout := t.TempDir()
			d := must(OpenDestination(t.Context(), mustParse(t, "oci:"+layout), Options{}))(t)
			f := must(scratch.File(tt.dir))(t)
			defer f.Close()
			if _, err := f.WriteString("pack"); err != nil {
				t.Fatal(err)
			}
			p := testPack("pack")
			p.File = f
			path := filepath.Join(layout, "blobs", "sha256", p.Digest[len("sha256:"):])
			if tt.there != "" {
				if err := os.WriteFile(path, []byte(tt.there), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if was, err := d.PutPack(t.Context(), p); err != nil || was != (tt.there == "pack") {
				t.Fatalf("PutPack: got %v, %v", was, err)
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != "pack" {
				t.Errorf("got %q, %v", b, err)
			}
			have, want := must(os.Stat(path))(t), must(f.Stat())(t)
			if got := os.SameFile(have, want); got != tt.renamed {
				t.Errorf("the layout has the file itself: got %v, want %v", got, tt.renamed)
			}
			if have.Mode().Perm() != 0o644 {
				t.Errorf("its mode is %v", have.Mode())
			}
			// Without a commit, the layout is what it was.
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(path); tt.there != "pack" && !os.IsNotExist(err) {
				t.Errorf("after Close: %v", err)
			}
		})
	}
}
