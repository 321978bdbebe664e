package bootbin

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/gzip"
)

func TestOpen(t *testing.T) {
	files := fstest.MapFS{
		"boot-linux-amd64.tar.gz": {Data: []byte("a layer")}, "boot-linux-amd64.diffid": {Data: []byte("its name")},
		"boot-linux-arm64.tar.gz": {Data: []byte("a layer")}, // of a make that was ended
	}
	for _, tt := range []struct{ platform, err string }{
		{"linux/amd64", ""},
		{"linux/riscv64", "make build"},
		{"linux/arm64", "make build"},
		{"linux/mips", "linux/riscv64, linux/s390x; give another with --boot FILE"},
		{"", "no boot binary for platform"},
	} {
		got, id, err := open(files, tt.platform)
		if tt.err == "" {
			if err != nil || string(got) != "a layer" || id != "its name" {
				t.Errorf("open(%q): got %q, %q, %v", tt.platform, got, id, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("open(%q): got %v, want an error with %q", tt.platform, err, tt.err)
		}
	}
}

// TestEmbedded checks what was really built in; make test builds that of this
// machine first.
func TestEmbedded(t *testing.T) {
	platform := "linux/" + runtime.GOARCH
	layer, diffID, err := Open(platform)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(plain)); got != diffID {
		t.Errorf("the layer of the boot binary for %s: its DiffID is %s, written down is %s", platform, got, diffID)
	}
	var bin []byte
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if bin, err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Every node pulls it. Other machines' code is larger.
	limit := 10_000_000
	if runtime.GOARCH != "amd64" {
		limit = 12_000_000
	}
	if !bytes.HasPrefix(bin, []byte("\x7fELF")) || len(bin) > limit {
		t.Errorf("boot binary for %s: got %d bytes that begin %q, want an ELF file of at most %d", platform, len(bin), bin[:min(4, len(bin))], limit)
	}
}
