package bootbin

import (
	"bytes"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/zstd"
)

func TestOpen(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("boot"), 1000)
	packed := enc.EncodeAll(want, nil)
	files := fstest.MapFS{
		"boot-linux-amd64.zst": {Data: packed},
		"boot-linux-arm64.zst": {Data: packed[:len(packed)-1]},
		"boot-linux-s390x.zst": {Data: enc.EncodeAll(make([]byte, maxSize+1), nil)},
	}
	for _, tt := range []struct{ platform, err string }{
		{"linux/amd64", ""},
		{"linux/arm64", "boot binary for linux/arm64: "},
		{"linux/s390x", "boot binary for linux/s390x: "},
		{"linux/riscv64", "make build"},
		{"linux/mips", "linux/riscv64, linux/s390x; give another with --boot FILE"},
		{"", "no boot binary for platform"},
	} {
		got, err := open(files, tt.platform)
		if tt.err == "" {
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("open(%q): got %d bytes, %v, want %d", tt.platform, len(got), err, len(want))
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
	bin, err := Open(platform)
	if err != nil {
		t.Fatal(err)
	}
	const limit = 12 << 20
	if !bytes.HasPrefix(bin, []byte("\x7fELF")) || len(bin) > limit {
		t.Errorf("boot binary for %s: got %d bytes that begin %q, want an ELF file of at most %d", platform, len(bin), bin[:min(4, len(bin))], limit)
	}
}
