package boot

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestHeldDir: what is mounted in a held directory stands before what lies
// there, and files are read from their beginning each time.
func TestHeldDir(t *testing.T) {
	outer, inner := t.TempDir(), t.TempDir()
	write := func(dir, name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write(outer, "ca.crt", "outer")
	write(outer, "host/ca.crt", "hidden")
	write(outer, "other/ca.crt", "")
	write(inner, "ca.crt", "inner")
	held, err := holdDir(outer)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(inner)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(write(t.TempDir(), "x", "file"))
	if err != nil {
		t.Fatal(err)
	}
	held = append(held, heldMount{at: "host", dir: root}, heldMount{at: "other/ca.crt", file: file})
	for name, want := range map[string]string{"ca.crt": "outer", "host/ca.crt": "inner", "other/ca.crt": "file"} {
		for range 2 {
			if got, err := fs.ReadFile(held, name); err != nil || string(got) != want {
				t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
			}
		}
	}
	for name, entries := range map[string]int{".": 3, "host": 1, "other": 1} {
		if got, err := fs.ReadDir(held, name); err != nil || len(got) != entries {
			t.Errorf("%s: got %v, %v, want %d entries", name, got, err, entries)
		}
		if info, err := fs.Stat(held, name); err != nil || !info.IsDir() {
			t.Errorf("%s: got %v, want a directory", name, err)
		}
	}
	for _, name := range []string{"missing", "host/missing", "other/ca.crt/x", "../x"} {
		if f, err := held.Open(name); err == nil {
			t.Errorf("%s: got %v", name, f)
		}
	}
}
