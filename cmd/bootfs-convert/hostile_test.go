package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// What a conversion of hostile input may take, as the kernel enforces it: bytes
// of memory, and seconds of CPU, which are five times the promised one.
const (
	hostileMemory = 256 << 20
	hostileCPU    = 5
)

// TestHostileImages converts images that nobody means well with. Each ends
// within the bounds, with an image or with one line that names what is wrong,
// and leaves nothing else behind.
func TestHostileImages(t *testing.T) {
	file := func(name, text string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(text)), Mode: 0o644}
	}
	link := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
	}
	symlink := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	entries := func(headers ...*tar.Header) func(io.Writer) error {
		return func(w io.Writer) error {
			t := tar.NewWriter(w)
			for _, h := range headers {
				if err := t.WriteHeader(h); err != nil {
					return err
				}
				if _, err := io.CopyN(t, zeroReader{}, h.Size); err != nil {
					return err
				}
			}
			return t.Close()
		}
	}
	raw := func(b ...[]byte) func(io.Writer) error {
		return func(w io.Writer) error {
			_, err := w.Write(bytes.Join(b, nil))
			return err
		}
	}
	deep := strings.Repeat("d/", 2000)
	for _, c := range []struct {
		name  string
		layer func(io.Writer) error
		want  string // in the error; "": it is converted
	}{
		{"..", entries(file("../x", "x")), `"../x": leads out of the root`},
		{"absolute", entries(file("/etc/passwd", "x")), ""},
		{"whiteout of nothing", entries(file("a/.wh.", "")), "names no file"},
		{"whiteout of the parent", entries(file("a/.wh...", "")), "names no file"},
		{"opaque root", entries(file("a", "x"), file(".wh..wh..opq", "")), ""},
		{"hard link through a symlink", entries(symlink("s", "../../../../etc"), link("a", "s/shadow")), "no such file"},
		{"hard link out", entries(link("a", "../../etc/shadow")), "leads out of the root"},
		{"symlink loop", entries(symlink("s", "s"), file("s/x", "x")), "too many levels of symlinks"},
		{"duplicates", entries(file("a", "1"), symlink("a", "b"), file("a/b", "2")), ""},
		{"the same thousands of times", func(w io.Writer) error {
			var list []*tar.Header
			for range 20_000 {
				list = append(list, file("a", "x"), &tar.Header{Typeflag: tar.TypeDir, Name: "a", Mode: 0o755})
			}
			return entries(list...)(w)
		}, ""},
		{"NUL in a name", raw(pax("path=a\x00b"), header('0', "f", 0), zeroBlocks), "malformed PAX records"},
		{"no UTF-8", raw(header('0', "\xff\xfe\x80", 0), zeroBlocks), ""},
		{"255 bytes", entries(file(strings.Repeat("n", 255), "x")), ""},
		{"256 bytes", entries(file(strings.Repeat("n", 256), "x")), "a name of 256 bytes"},
		{"device", entries(&tar.Header{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8, Mode: 0o666}), ""},
		{"device out of range", entries(&tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 4096}), "device 4096:0"},
		{"PAX size of 8 EiB", raw(pax("size=9223372036854775807"), header('0', "f", 1), zeroBlocks), "overflowing size"},
		{"PAX size of 4 EiB", raw(pax("size=4611686018427387904"), header('0', "f", 1), zeroBlocks), "unexpected EOF"},
		{"PAX size that is negative", raw(pax("size=-1"), header('0', "f", 1), zeroBlocks), "negative"},
		{"PAX size of 0 over data", raw(pax("size=0"), header('0', "f", 512), bytes.Repeat([]byte("x"), 512), zeroBlocks), "checksum"},
		{"PAX records of 1 GiB", raw(header('x', "f", 1<<30)), "more than 1 MiB"},
		{"sparse file of 8 EiB", raw(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=9223372036854775807"),
			header('0', "lastlog", 512), append([]byte("0\n"), make([]byte, 510)...), zeroBlocks), `lastlog`},
		{"sparse file of 1 TiB", raw(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=1099511627776"),
			header('0', "lastlog", 512), append([]byte("0\n"), make([]byte, 510)...), zeroBlocks), ""},
		{"deeper than 5,000", entries(symlink("s", deep), file("s/"+deep+"x", ""), symlink("t", "s/"+deep), file("t/"+deep+"x", "")), "more than 5000 directories deep"},
		{"4,000 deep", entries(symlink("s", deep), file("s/"+deep+"x", "")), ""},
		{"256 MiB of zeros", entries(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: 256 << 20}), ""},
		{"10,000 entries in one directory", func(w io.Writer) error { return many(w, 10_000) }, ""},
		{"no archive", raw([]byte(strings.Repeat("bootfs", 1000))), "not a tar header"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			convertHostile(t, compressed(t, c.layer), hostileMemory, hostileCPU, c.want)
		})
	}
	for _, c := range []struct {
		name string
		blob []byte
		want string
	}{
		{"zstd frame of 9 bytes that claims 512 MiB", []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa4, 0, 0, 0, 0x20}, "zstd: "},
		{"gzip without an end", compressed(t, entries(file("a", "x"))).blob[:20], "unexpected EOF"},
		{"bzip2", []byte("BZh91AY&SY0"), "bzip2"},
		{"empty", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			convertHostile(t, stored{c.blob, sha256.Sum256(c.blob)}, hostileMemory, hostileCPU, c.want)
		})
	}
}

// TestMillionEntries has a million files in one directory, which is a legal
// image: the file system's own limits are not reached. As many as a large image
// has are converted within the bounds of the others; a million need three times
// their memory, and seven times the time that is promised.
func TestMillionEntries(t *testing.T) {
	n, memory, cpu := 200_000, uint64(hostileMemory), hostileCPU
	if os.Getenv("BOOTFS_SOAK") != "" {
		n, memory, cpu = 1_000_000, 3*hostileMemory, 7*hostileCPU
	}
	convertHostile(t, compressed(t, func(w io.Writer) error { return many(w, n) }), memory, cpu, "")
}

// convertHostile converts an image of one layer in a process that gets so much
// memory, in bytes, and CPU, in seconds. want is part of its error, or "".
func convertHostile(t *testing.T, layer stored, memory uint64, cpu int, want string) {
	t.Helper()
	dir := t.TempDir()
	archive, tmp, dst := filepath.Join(dir, "image.tar"), filepath.Join(dir, "tmp"), filepath.Join(dir, "dst")
	writeHostile(t, archive, layer)
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, tmp, "-q", "--boot", "/bin/true", "docker-archive:"+archive, "oci:"+dst+":x")
	prlimit, err := exec.LookPath("prlimit")
	if err != nil {
		t.Fatal(err)
	}
	// The shell gives the command its name, by which it is known.
	cmd.Args = append([]string{prlimit, fmt.Sprintf("--data=%d", memory), fmt.Sprintf("--cpu=%d", cpu),
		"bash", "-c", `exec -a bootfs-convert "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = prlimit
	out, err := cmd.CombinedOutput()
	text := string(out)
	switch {
	case want == "" && err != nil:
		t.Errorf("%v: %.2000s", err, text)
	case want != "" && (err == nil || !strings.Contains(text, want) || strings.Count(text, "\n") != 1 || len(text) > 2000):
		t.Errorf("got %v, %.2000s\nwant one line with %q", err, text, want)
	}
	if _, err := os.Stat(dst); errors.Is(err, os.ErrNotExist) != (want != "") {
		t.Errorf("the destination: %v", err)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// stored is a layer as an image has it.
type stored struct {
	blob   []byte
	diffID [sha256.Size]byte
}

// compressed returns the layer that plain writes, with gzip.
func compressed(t *testing.T, plain func(io.Writer) error) stored {
	t.Helper()
	var packed bytes.Buffer
	sum := sha256.New()
	z, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err == nil {
		err = plain(io.MultiWriter(sum, z))
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return stored{packed.Bytes(), [sha256.Size]byte(sum.Sum(nil))}
}

// writeHostile writes what docker save would of an image with one layer.
func writeHostile(t *testing.T, name string, layer stored) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, part := range []struct {
		name string
		b    []byte
	}{
		{"manifest.json", []byte(`[{"Config":"config.json","RepoTags":["x:latest"],"Layers":["layer.tar"]}]`)},
		{"config.json", fmt.Appendf(nil, `{"os":"linux","architecture":%q,"config":{"Cmd":["/x"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, runtime.GOARCH, layer.diffID)},
		{"layer.tar", layer.blob},
	} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: part.name, Size: int64(len(part.b)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(part.b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// many writes n empty files in one directory.
func many(w io.Writer, n int) error {
	t := tar.NewWriter(w)
	for i := range n {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d/%07d", i), Mode: 0o644}); err != nil {
			return err
		}
	}
	return t.Close()
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// zeroBlocks end a tar.
var zeroBlocks = make([]byte, 1024)

// header is the header of a tar entry, whatever it says.
func header(kind byte, name string, size int64) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x0000000000000\x00        ", size))
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// pax is a header with records for the next one.
func pax(records ...string) []byte {
	var text string
	for _, r := range records {
		n := len(r) + 3
		for len(fmt.Sprint(n))+len(r)+2 != n {
			n++
		}
		text += fmt.Sprintf("%d %s\n", n, r)
	}
	b := append(header('x', "pax", int64(len(text))), text...)
	return append(b, make([]byte, -len(text)&511)...)
}
