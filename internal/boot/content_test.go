package boot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

func TestReadConfig(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	digits := strings.Repeat("0f", 32)
	for _, c := range []struct{ name, text, fails string }{
		{"good", `{"version":1,"indexDigest":"sha256:` + digits + `"}`, ""},
		{"another version", `{"version":2,"indexDigest":"sha256:` + digits + `"}`, "format version 2"},
		{"no JSON", `version 1`, "config.json"},
		{"empty", ``, "config.json"},
		{"no digest", `{"version":1}`, "index digest"},
		{"endless", strings.Repeat(" ", 2<<20), "more than 1048576 bytes"},
		{"a short digest", `{"version":1,"indexDigest":"sha256:0f"}`, "index digest"},
		// It becomes the name of a directory.
		{"a path", `{"version":1,"indexDigest":"sha256:` + strings.Repeat("../", 21) + `a"}`, "index digest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bounded.Case(t)
			path := filepath.Join(t.TempDir(), "config.json")
			if err := os.WriteFile(path, []byte(c.text), 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := readConfig(path)
			if (err != nil) != (c.fails != "") || err != nil && !strings.Contains(err.Error(), c.fails) {
				t.Errorf("got %v, want an error with %q", err, c.fails)
			}
		})
	}
}
