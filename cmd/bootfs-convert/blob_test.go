package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/convert"
)

// call runs a command that is to succeed, and returns what it writes.
func call(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := tryCall(t, args...)
	if code != exitOK {
		t.Fatalf("bootfs-convert %s: exit code %d\n%s", strings.Join(args, " "), code, errs)
	}
	return out
}

func tryCall(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), args, stdio{&stdout, &stderr, func(string) string { return "" }})
	return code, stdout.String(), stderr.String()
}

// disk returns a block device, and the file behind it.
func disk(t *testing.T, content []byte) (device, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, content, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup (needs root): %v\n%s", err, out)
	}
	device = strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", device).Run() })
	return device, file
}

// TestDisk cuts a block device and restores it in place.
func TestDisk(t *testing.T) {
	content := sample(1, 8<<20)
	clear(content[3<<20 : 5<<20])
	device, _ := disk(t, content)
	dir := t.TempDir()
	caibx, castr := filepath.Join(dir, "disk.caibx"), filepath.Join(dir, "disk.castr")
	var made convert.BlobReport
	if err := json.Unmarshal([]byte(call(t, "make", "-q", "--json", device, caibx, "--store", castr)), &made); err != nil {
		t.Fatal(err)
	}
	if made.Bytes != int64(len(content)) {
		t.Errorf("got %d bytes, want %d", made.Bytes, len(content))
	}

	other := bytes.Clone(content)
	copy(other[1<<20:], "damage")
	copy(other[4<<20:], "where zeros are to be")
	for _, test := range []struct {
		name  string
		disk  []byte
		least int64 // chunks that are fetched, and the most of them
		most  int64
	}{
		{"damaged", other, 1, 3},
		{"larger, and all wrong", bytes.Repeat([]byte{7}, 9<<20), 50, int64(made.Distinct)},
		{"right", content, 0, 0},
	} {
		target, file := disk(t, test.disk)
		var got blobExtraction
		if err := json.Unmarshal([]byte(call(t, "extract", "-q", "--json", caibx, target, "--store", castr)), &got); err != nil {
			t.Fatal(err)
		}
		if n := got.Stores[0].Chunks; n < test.least || n > test.most {
			t.Errorf("%s: %d chunks were fetched, want %d to %d", test.name, n, test.least, test.most)
		}
		have, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(have[:len(content)], content) || !bytes.Equal(have[len(content):], test.disk[len(content):]) {
			t.Errorf("%s: the disk is not what was cut, and behind it as it was: %v", test.name, err)
		}
	}

	small, _ := disk(t, content[:1<<20])
	code, _, errs := tryCall(t, "extract", caibx, small, "--store", castr)
	if code != exitDestination || !strings.Contains(errs, "it has 1.0 MB, 8.4 MB are needed") {
		t.Errorf("a disk that is too small: got exit code %d, %s", code, errs)
	}
}
