package chunkstore

import (
	"archive/zip"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

// moduleDir is where the source of a module lies that this one requires.
func moduleDir(t testing.TB, path string) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", path).Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		t.Fatalf("module %s: %v", path, err)
	}
	return dir
}

// zstdCorpus returns the files of a zip in the corpus of klauspost/compress, by
// name (BSD 3-clause).
func zstdCorpus(t testing.TB, name string) map[string][]byte {
	t.Helper()
	z, err := zip.OpenReader(filepath.Join(moduleDir(t, "github.com/klauspost/compress"), "zstd/testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	files := map[string][]byte{}
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[f.Name] = b
	}
	return files
}

// reads wants the chunk plain of frame, and no other one, shorter or longer.
func reads(t *testing.T, name string, frame, plain []byte) {
	t.Helper()
	c := index.Chunk{ID: index.SHA256.Sum(plain), Size: len(plain)}
	if got, err := Decode(nil, frame, index.SHA256, c); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("%s: got %d bytes, %v, want %d", name, len(got), err, len(plain))
	}
	for _, size := range []int{len(plain) - 1, len(plain) + 1} {
		if size > 0 {
			refuses(t, name, frame, index.Chunk{ID: c.ID, Size: size})
		}
	}
}

func refuses(t *testing.T, name string, frame []byte, c index.Chunk) {
	t.Helper()
	var corrupt *CorruptError
	if got, err := Decode(nil, frame, index.SHA256, c); len(got) > 0 || !errors.As(err, &corrupt) {
		t.Errorf("%s as a chunk of %d bytes: got %d bytes, %v", name, c.Size, len(got), err)
	}
}

// TestZstdCorpus reads the frames of klauspost/compress's corpus: those of
// zstd's own generator with the plain bytes beside them, damaged ones, those
// that fuzzers have found, and headers of all kinds.
func TestZstdCorpus(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	for _, name := range []string{"good.zip", "decoder.zip"} {
		bounded.Case(t)
		files := zstdCorpus(t, name)
		pairs := 0
		for base, plain := range files {
			if frame, ok := files[base+".zst"]; ok && len(plain) > 0 {
				pairs++
				reads(t, base, frame, plain)
			}
		}
		if pairs < 10 {
			t.Errorf("%s: %d frames with their plain bytes", name, pairs)
		}
	}
	for _, name := range []string{"bad.zip", "regression.zip", "decode-regression.zip", "headers.zip", "fuzz/decode-corpus-raw.zip", "fuzz/decode-oss.zip"} {
		bounded.Case(t)
		files := zstdCorpus(t, name)
		if len(files) == 0 {
			t.Errorf("%s is empty", name)
		}
		for base, frame := range files {
			for _, size := range []int{1, 1000, 64 << 10} {
				refuses(t, name+" "+base, frame, index.Chunk{Size: size})
			}
		}
	}
}

// TestEncodeCorpus compresses what other compressors have stumbled over.
func TestEncodeCorpus(t *testing.T) {
	for name, plain := range zstdCorpus(t, "comp-crashers.zip") {
		if len(plain) > 0 && len(plain) <= chunker.MaxSize {
			reads(t, name, Encode(nil, plain), plain)
		}
	}
}

// TestXZCorpus reads the test files of XZ Utils (public domain), which
// mikelolasagasti/xz carries. xz itself says what is in the good ones.
func TestXZCorpus(t *testing.T) {
	dir := filepath.Join(moduleDir(t, "github.com/mikelolasagasti/xz"), "testdata")
	files, err := filepath.Glob(dir + "/*/*.xz")
	if err != nil || len(files) < 60 {
		t.Fatalf("%d files in %s, %v", len(files), dir, err)
	}
	if !bounded.Test(t) {
		return
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			bounded.Case(t)
			frame, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			base := filepath.Base(name)
			var plain []byte
			if strings.HasPrefix(base, "good-1-") {
				if plain, err = exec.Command("xz", "-dc", name).Output(); err != nil {
					t.Fatal(err)
				}
			}
			// Chunks have no filter before LZMA2, unless its dictionary is as small as
			// the chunk; and neither two streams nor none.
			filtered := strings.Contains(base, "delta") || strings.Contains(base, "sparc") || strings.Contains(base, "x86")
			if len(plain) > 0 && !filtered {
				reads(t, base, frame, plain)
				return
			}
			for _, size := range []int{1, 13, 1000, 64 << 10} {
				refuses(t, base, frame, index.Chunk{Size: size})
			}
		})
	}
}
