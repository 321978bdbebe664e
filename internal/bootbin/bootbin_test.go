package bootbin

import (
	"archive/tar"
	"bytes"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/gzip"
)

func TestOpen(t *testing.T) {
	files := fstest.MapFS{"boot-linux-amd64.tar.gz": {Data: []byte("a layer")}}
	for _, tt := range []struct{ platform, err string }{
		{"linux/amd64", ""},
		{"linux/riscv64", "make build"},
		{"linux/mips", "linux/riscv64, linux/s390x; give another with --boot FILE"},
		{"", "no boot binary for platform"},
	} {
		got, err := open(files, tt.platform)
		if tt.err == "" {
			if err != nil || string(got) != "a layer" {
				t.Errorf("open(%q): got %q, %v", tt.platform, got, err)
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
	layer, err := Open(platform)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	var bin []byte
	for r := tar.NewReader(z); ; {
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
