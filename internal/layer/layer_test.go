package layer

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	_ "github.com/vbatts/tar-split/archive/tar" // its corpus is read
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// openFiles counts the descriptors of this process that lead below dir.
func openFiles(t testing.TB, dir string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir) {
			n++
		}
	}
	return n
}

// someTar has a file in each range of sizes that is treated differently.
func someTar(t testing.TB) []byte {
	zeros := strings.Repeat("\x00", 3<<20)
	return pack(t, []item{
		dir(".", 0o755), reg("empty", ""), reg("small", "small"), sym("sym", "small"), hard("hard", "small"),
		reg("large", strings.Repeat("0123456789abcdef", 1<<17)),
		reg("lastlog", "x"+zeros+"y"+zeros), reg("allzero", zeros), reg("tail", zeros+"t"),
	})
}

func TestStoredForms(t *testing.T) {
	plain := someTar(t)
	want := manifest(t, mustMerge(t, plain))
	skippable := append([]byte{0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0}, "abc"...)
	half := len(plain) / 2
	stored := map[string][]byte{
		"plain":                  plain,
		"gzip":                   gz(t, plain),
		"gzip members (eStargz)": append(gz(t, plain[:half]), gz(t, plain[half:])...),
		"zstd":                   zst(t, plain),
		"zstd frames":            append(zst(t, plain[:half]), zst(t, plain[half:])...),
		"skippable zstd frames":  slices.Concat(skippable, zst(t, plain), skippable),
	}
	var extents []tree.Extent
	for name, b := range stored {
		for _, inPlace := range []bool{false, true} {
			if inPlace && name != "plain" {
				continue
			}
			t.Run(fmt.Sprintf("%s in place %v", name, inPlace), func(t *testing.T) {
				temp := t.TempDir()
				bl := blob("L", b)
				bl.DiffID = diffID(plain)
				if inPlace {
					bl.Open, bl.Plain = nil, bytes.NewReader(b)
				}
				var stored int64
				l, err := Read(t.Context(), bl, Options{TempDir: temp, Progress: func(n int64) { stored += n }})
				if err != nil {
					t.Fatal(err)
				}
				if stored != int64(len(b)) {
					t.Errorf("progress counted %d bytes, want %d", stored, len(b))
				}
				if list, _ := os.ReadDir(temp); len(list) != 0 {
					t.Errorf("the spool has a name: %v", list)
				}
				tr, err := Merge([]*Layer{l})
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range treecmp.Diff(manifest(t, tr), want) {
					t.Error(d)
				}
				// The layout of the root image follows the holes, so these must not
				// depend on how the layer is stored.
				logical := slices.Clone(tr.Lookup("/lastlog").Content.Extents)
				for i := range logical {
					logical[i].Physical = 0
				}
				if extents == nil {
					extents = logical
				}
				if !slices.Equal(extents, logical) {
					t.Errorf("extents %v, elsewhere %v", logical, extents)
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
				if n := openFiles(t, temp); n != 0 {
					t.Errorf("%d temporary files are still open", n)
				}
			})
		}
	}
	if want := []tree.Extent{{Length: 4096}, {Logical: 3 << 20, Length: 4096}}; !slices.Equal(extents, want) {
		t.Errorf("extents of a file of zeros but two bytes: %v, want %v", extents, want)
	}
}

// The name of its first file stands where a compressed layer has its magic.
func TestPlainLayerLikeBzip2(t *testing.T) {
	if mustMerge(t, pack(t, []item{reg("BZh9.txt", "x")})).Lookup("/BZh9.txt") == nil {
		t.Error("the file is missing")
	}
}

func TestReadErrors(t *testing.T) {
	plain := someTar(t)
	packed, packedZ := gz(t, plain), zst(t, plain)
	broken := bytes.Clone(packed)
	broken[len(broken)-6] ^= 1 // the CRC
	failing := blob("L", nil)
	failing.Open = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("no route") }
	wrong := blob("L", packed)
	wrong.DiffID = diffID([]byte("other"))
	tests := []struct {
		name   string
		blob   Blob
		limits Limits
		want   string
	}{
		{"open", failing, Limits{}, "no route"},
		{"diff id", wrong, Limits{}, "its plain content is " + diffID(plain) + ", the image's configuration says " + wrong.DiffID},
		{"truncated gzip", blob("L", packed[:len(packed)/2]), Limits{}, "gzip: unexpected EOF"},
		{"gzip header alone", blob("L", packed[:5]), Limits{}, "gzip: unexpected EOF"},
		{"gzip checksum", blob("L", broken), Limits{}, "gzip: invalid checksum"},
		{"truncated zstd", blob("L", packedZ[:len(packedZ)/2]), Limits{}, "zstd: unexpected EOF"},
		{"truncated tar", blob("L", plain[:len(plain)/2]), Limits{}, "unexpected EOF"},
		{"no tar", blob("L", bytes.Repeat([]byte("<html>"), 100)), Limits{}, "not a tar header"},
		{"bzip2", blob("L", []byte("BZh91AY&SY")), Limits{}, "bzip2"},
		{"xz", blob("L", []byte("\xfd7zXZ\x00")), Limits{}, "xz"},
		{"zstd window of 2 GiB", blob("L", []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 1, 0, 0}), Limits{}, "window size exceeded"},
		{"bytes", blob("L", packed), Limits{Bytes: 1 << 20}, "holds more than 1048576 bytes"},
		{"entries", blob("L", packed), Limits{Entries: 3}, "more than 3 entries"},
		{"metadata", blob("L", packed), Limits{Metadata: 8}, "more than 8 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			temp := t.TempDir()
			_, err := Read(t.Context(), tt.blob, Options{TempDir: temp, Limits: tt.limits})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "layer L: ") {
				t.Fatalf("got %v, want an error with %q", err, tt.want)
			}
			if n := openFiles(t, temp); n != 0 {
				t.Errorf("%d temporary files are still open", n)
			}
		})
	}
	if _, err := Read(t.Context(), blob("L", plain), Options{TempDir: "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("got %v, want an error that names the directory", err)
	}
}

// A read that hangs in the network ends with its context.
func TestReadCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	plain := someTar(t)
	go func() {
		_, _ = w.Write(plain[:1<<20])
		cancel()
		w.CloseWithError(ctx.Err())
	}()
	_, err := Read(ctx, Blob{Name: "L", Size: -1, Open: func(context.Context) (io.ReadCloser, error) { return r, nil }}, Options{TempDir: t.TempDir()})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want %v", err, context.Canceled)
	}
}

// TestSparseForms lets GNU tar pack a sparse file in each of its forms.
func TestSparseForms(t *testing.T) {
	src := t.TempDir()
	f, err := os.Create(filepath.Join(src, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range int64(100) { // more than fit in one header
		if _, err := f.WriteAt(bytes.Repeat([]byte{'a' + byte(i%26)}, 5000), i*i*1_000_000); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(1<<40 + 12345); err != nil {
		t.Fatal(err)
	}
	for name, size := range map[string]int64{"hole": 1 << 41, "short": 70000, "data-first": 2 << 20} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(name[:1]), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(src, name), size); err != nil {
			t.Fatal(err)
		}
	}
	long := strings.Repeat("n", 200)
	if err := os.WriteFile(filepath.Join(src, long), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(src, long), 1<<30); err != nil {
		t.Fatal(err)
	}
	want, err := treecmp.Dir(src)
	if err != nil {
		t.Fatal(err)
	}
	for _, form := range [][]string{
		{"--format=gnu"},
		{"--format=posix", "--sparse-version=0.0"},
		{"--format=posix", "--sparse-version=0.1"},
		{"--format=posix", "--sparse-version=1.0"},
	} {
		t.Run(strings.Join(form, " "), func(t *testing.T) {
			b, err := exec.Command("tar", append(form, "-C", src, "-S", "-c", ".")...).Output()
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			tr := mustMerge(t, b)
			got := manifest(t, tr)
			if form[0] == "--format=gnu" { // knows whole seconds only
				for p, e := range want {
					g := got[p]
					g.MtimeNsec = e.MtimeNsec
					got[p] = g
				}
			}
			for _, d := range treecmp.Diff(got, want) {
				t.Error(d)
			}
			if d := time.Since(start); d > time.Minute {
				t.Errorf("took %v: holes cost something", d)
			}
		})
	}
}

// TestEngineDiffers holds what Docker's engine does and umoci does not. On
// overlay2, and with containerd's snapshots, each layer is unpacked into a
// directory of its own.
func TestEngineDiffers(t *testing.T) {
	base := []item{dir(".", 0o755), dir("usr", 0o755), dir("usr/lib", 0o755), reg("usr/lib/so", "so"), sym("lib", "usr/lib"), reg("file", "x"),
		dir("d", 0o755), reg("d/x", "x")}
	overlayWhiteout := func(name string) item {
		return item{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, ModTime: testTime}}
	}
	tests := []struct {
		name   string
		layers [][]item
		there  []string
		gone   []string
	}{
		{"a directory takes the place of a symlink below", [][]item{base, {reg("lib/new", "n")}},
			[]string{"/lib/new", "/usr/lib/so"}, []string{"/usr/lib/new"}},
		{"the device 0:0 hides", [][]item{base, {overlayWhiteout("file"), overlayWhiteout("d"), overlayWhiteout("nothing")}},
			[]string{"/usr/lib/so"}, []string{"/file", "/d", "/nothing"}},
		{"a whiteout never hides its own layer", [][]item{base, {reg("file", "new"), reg(".wh.file", ""), reg(".wh.d", ""), reg("d/y", "y")}},
			[]string{"/file", "/d/y"}, []string{"/d/x"}},
		{"AUFS's own files", [][]item{base, {reg(".wh..wh.plnk/1.2", "linked"), reg(".wh..wh.aufs", ""), dir(".wh..wh.orph", 0o700), hard("p", ".wh..wh.plnk/1.2")}},
			[]string{"/p"}, []string{"/.wh..wh.plnk", "/.wh..wh.aufs", "/.wh..wh.orph"}},
		{"a link and a whiteout move a file", [][]item{base, {reg(".wh.file", ""), hard("moved", "file")}}, []string{"/moved"}, []string{"/file"}},
		{"a path through .. and from the root", [][]item{base, {reg("usr/../e", "x"), reg("/f", "x"), reg("./g/./h", "x")}}, []string{"/e", "/f", "/g/h"}, nil},
		{"a link to a link's place through a symlink below", [][]item{base, {hard("so", "lib/so")}}, []string{"/so"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var tars [][]byte
			for _, l := range tt.layers {
				tars = append(tars, pack(t, l))
			}
			tr := mustMerge(t, tars...)
			wellFormed(t, tr)
			for _, p := range tt.there {
				if tr.Lookup(p) == nil {
					t.Errorf("%s is missing", p)
				}
			}
			for _, p := range tt.gone {
				if tr.Lookup(p) != nil {
					t.Errorf("%s is there", p)
				}
			}
		})
	}
}

func TestXattrsThatLinuxRefuses(t *testing.T) {
	set := func(i item) item {
		for _, x := range []string{"user.x", "trusted.x", "trusted.overlay.redirect", "security.x", "system.posix_acl_access", "system.nfs4_acl", "com.apple.x", "user.", "user"} {
			i = i.with(xattr(x, "v"))
		}
		return i
	}
	tr := mustMerge(t, pack(t, []item{set(reg("reg", "")), set(dir("dir", 0o755)), set(sym("sym", "x")),
		set(item{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", ModTime: testTime}})}))
	for path, want := range map[string]string{
		"/reg":  "security.x system.posix_acl_access trusted.x user.x",
		"/dir":  "security.x system.posix_acl_access trusted.x user.x",
		"/sym":  "security.x trusted.x",
		"/fifo": "security.x system.posix_acl_access trusted.x",
	} {
		var got []string
		for _, x := range tr.Lookup(path).Xattrs {
			got = append(got, x.Name)
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s has %s, want %s", path, g, want)
		}
	}
}

func TestHostile(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	deep := strings.Repeat("d/", 2000)
	pax := func(records map[string]string) func(*tar.Header) {
		return func(h *tar.Header) { h.PAXRecords = records }
	}
	tests := []struct {
		name  string
		items []item
		want  string // "" = it is harmless
	}{
		{"..", []item{reg("../x", "x")}, `"../x": leads out of the root`},
		{".. deeper", []item{reg("a/../../x", "x")}, "leads out of the root"},
		{".. itself", []item{dir("..", 0o755)}, "leads out of the root"},
		{"absolute", []item{reg("/etc/passwd", "x")}, ""},
		{"empty name", []item{{Header: tar.Header{Typeflag: tar.TypeDir, Name: "/", Mode: 0o755}}}, ""},
		{"the root as a file", []item{reg(".", "x")}, "the root is not a directory"},
		{"the root as a link", []item{reg("a", "x"), hard(".", "a")}, "the root is not a directory"},
		{"the root as a whiteout device", []item{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "."}}}, "the root is not a directory"},
		{".wh.", []item{reg("a/.wh.", "")}, "names no file"},
		{".wh..", []item{reg("a/.wh..", "")}, "names no file"},
		{".wh...", []item{reg("a/.wh...", "")}, "names no file"},
		{".wh. of a whiteout", []item{reg("a/.wh..wh.x", "")}, ""},
		{"opaque root", []item{reg(".wh..wh..opq", "")}, ""},
		{"name of 256 bytes", []item{reg(strings.Repeat("n", 256), "")}, "a name of 256 bytes"},
		{"path of 4,096 bytes", []item{reg(strings.Repeat("d/", 2047)+"ee", "")}, "a path of 4096 bytes"},
		{"path of 4,095 bytes", []item{reg(strings.Repeat("d/", 2047)+"e", "")}, ""},
		{"deeper than 5,000", []item{sym("s", deep), reg("s/"+deep+"x", ""), sym("t", "s/"+deep), reg("t/"+deep+"x", "")}, "more than 5000 directories deep"},
		{"hard link out", []item{hard("a", "../../etc/shadow")}, "leads out of the root"},
		{"hard link to nothing", []item{hard("a", "b")}, `"a": hard link to "b": there is no such file`},
		{"hard link to itself", []item{hard("a", "a")}, "there is no such file"},
		{"hard link to a directory", []item{dir("b", 0o755), hard("a", "b")}, "a directory cannot have a second name"},
		{"hard link to the root", []item{hard("a", "/")}, "a directory cannot have a second name"},
		{"hard link through a symlink out", []item{sym("s", "../../../.."), reg("f", "x"), hard("a", "s/f")}, ""},
		{"hard link through a file", []item{reg("f", "x"), hard("a", "f/g")}, "not a directory"},
		{"hard link through a loop", []item{sym("s", "s"), hard("a", "s/g")}, "too many levels of symlinks"},
		{"parent is a file", []item{reg("f", "x"), reg("f/g", "x")}, `"f/g": a file in its path is not a directory`},
		{"parent is a loop", []item{sym("s", "s"), reg("s/g", "x")}, "too many levels of symlinks"},
		{"parent leads out", []item{sym("s", "../.."), reg("s/g", "x")}, ""},
		{"parent leads to a long name", []item{sym("s", strings.Repeat("n", 256)), reg("s/g", "x")}, "a name of 256 bytes"},
		{"empty symlink", []item{sym("s", "")}, "symlink to a path of 0 bytes"},
		{"symlink of 4,096 bytes", []item{sym("s", strings.Repeat("x", 4096))}, "symlink to a path of 4096 bytes"},
		{"owner -1", []item{reg("f", "").with(func(h *tar.Header) { h.Uid = 1<<32 - 1 })}, "owner 4294967295:0"},
		{"device", []item{{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "b", Devmajor: 4096}}}, "device 4096:0"},
		{"xattr of 64 KiB", []item{reg("f", "").with(xattr("user.x", strings.Repeat("x", 64<<10)))}, ""},
		{"xattr of more", []item{reg("f", "").with(xattr("user.x", strings.Repeat("x", 64<<10+1)))}, "of 65537 bytes"},
		{"NUL in a sparse file's name", []item{reg("f", "0\n"+strings.Repeat("\x00", 510)).with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a\x00b", "GNU.sparse.realsize": "0"}))}, "NUL"},
		{"sparse of 8 EiB", []item{reg("f", "0\n"+strings.Repeat("\x00", 510)).with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9223372036854775807"}))}, ""},
		{"sparse outside", []item{reg("f", "1\n100\n1\n"+strings.Repeat("\x00", 512-8)+"x").with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}))}, "sparse map"},
		{"sparse without data", []item{reg("f", "1\n0\n100\n"+strings.Repeat("\x00", 512-8)+"x").with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}))}, "sparse map"},
		{"sparse with data to spare", []item{reg("f", "1\n0\n1\n"+strings.Repeat("\x00", 512-6)+"xx").with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}))}, "1 bytes of the data have no place"},
		{"sparse backwards", []item{reg("f", "2\n5\n1\n4\n1\n"+strings.Repeat("\x00", 512-10)+"xx").with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}))}, "sparse map"},
		{"sparse map without end", []item{reg("f", "9999999\n"+strings.Repeat("1\n", 1<<20)).with(pax(map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}))}, "sparse map"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bounded.Case(t)
			tr, err := readMerge(t, packRaw(t, tt.items))
			switch {
			case tt.want == "" && err != nil:
				t.Fatal(err)
			case tt.want == "":
				wellFormed(t, tr)
			case err == nil || !strings.Contains(err.Error(), tt.want):
				t.Fatalf("got %v, want an error with %q", err, tt.want)
			case len(err.Error()) > 1000:
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

// packRaw is pack for headers that archive/tar refuses to write: the PAX
// header stands before a plain one.
func packRaw(t testing.TB, items []item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		records := ""
		for k, v := range i.PAXRecords {
			records += paxRecord(k, v)
		}
		if len(i.Linkname) > 100 {
			records += paxRecord("linkpath", i.Linkname)
			i.Linkname = "long"
		}
		if len(i.Name) > 100 {
			records += paxRecord("path", i.Name)
			i.Name = "long"
		}
		i.PAXRecords, i.Format = nil, tar.FormatGNU
		i.ModTime = i.ModTime.Truncate(time.Second)
		if records != "" {
			b.Write(rawHeader('x', "pax", int64(len(records)), nil))
			b.WriteString(records)
			b.Write(make([]byte, -len(records)&511))
		}
		if err := w.WriteHeader(&i.Header); err != nil {
			t.Fatalf("%s: %v", i.Name, err)
		}
		if _, err := io.WriteString(w, i.data); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	n += len(fmt.Sprint(n))
	if r := fmt.Sprintf("%d %s=%s\n", n, k, v); len(r) == n {
		return r
	}
	return fmt.Sprintf("%d %s=%s\n", n+1, k, v)
}

func rawHeader(typ byte, name string, size int64, change func(b []byte)) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x00")
	copy(b[108:], "0000000\x00")
	copy(b[116:], "0000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	copy(b[136:], "00000000000\x00")
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	if change != nil {
		change(b)
	}
	setChecksum(b)
	return b
}

func setChecksum(header []byte) {
	copy(header[148:], "        ")
	sum := 0
	for _, c := range header {
		sum += int(c)
	}
	copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
}

func TestRawHeaders(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	huge := func(b []byte) { copy(b[124:136], "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff") }
	negative := func(b []byte) { copy(b[124:136], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff") }
	end := make([]byte, 1024)
	tests := []struct {
		name string
		tar  []byte
		want string
	}{
		{"8 EiB declared", rawHeader('0', "f", 0, huge), "overflowing size"},
		{"4 EiB declared", rawHeader('0', "f", 0, func(b []byte) { huge(b); b[128] = 0x3f }), "unexpected EOF"},
		{"negative size", rawHeader('0', "f", 0, negative), "negative"},
		{"directory of negative size", slices.Concat(rawHeader('5', "d", 0, negative), end), ""},
		{"unknown type", slices.Concat(rawHeader('?', "f", 0, nil), end), `"f": tar entry of unknown type '?'`},
		{"contiguous", slices.Concat(rawHeader('7', "f", 0, nil), end), ""},
		{"PAX of 1 GiB", rawHeader('x', "f", 1<<30, nil), "more than 1 MiB"},
		{"long name of 1 GiB", rawHeader('L', "f", 1<<30, nil), "more than 1 MiB"},
		{"PAX alone", slices.Concat(rawHeader('x', "f", 12, nil), []byte("12 path=abc\n"), make([]byte, 500), end), ""},
		{"no end", rawHeader('0', "f", 0, nil), ""},
		{"one block of zeros", append(rawHeader('0', "f", 0, nil), end[:512]...), ""},
		{"zeros and then more", slices.Concat(rawHeader('0', "f", 0, nil), end[:512], rawHeader('0', "f", 0, nil)), "block of zeros"},
		{"garbage behind the end", slices.Concat(rawHeader('0', "f", 0, nil), end, []byte("garbage")), ""},
		{"nothing", nil, ""},
		{"half a header", rawHeader('0', "f", 0, nil)[:100], "unexpected EOF"},
		{"data without padding", append(rawHeader('0', "f", 3, nil), "abc"...), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bounded.Case(t)
			_, err := readMerge(t, tt.tar)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// Directories that nobody listed count too: a path of few bytes of compressed
// tar implies 2,000 of them.
func TestImpliedDirectoriesAreBounded(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	var items []item
	for i := range 50 {
		items = append(items, reg(fmt.Sprint(i, "/")+strings.Repeat("d/", 2000)+"x", ""))
	}
	l, err := Read(t.Context(), blob("L", pack(t, items)), Options{TempDir: t.TempDir(), Limits: Limits{Entries: 10_000}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Merge([]*Layer{l}); !errors.Is(err, errCount) {
		t.Fatalf("got %v, want %v", err, errCount)
	}
}

func TestMergeOnce(t *testing.T) {
	l, err := Read(t.Context(), blob("L", someTar(t)), Options{TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Merge([]*Layer{l}); err != nil {
		t.Fatal(err)
	}
	if _, err := Merge([]*Layer{l}); err == nil {
		t.Fatal("the second merge of a layer succeeded")
	}
}

// wellFormed checks what the packages behind this one rely on.
func wellFormed(t testing.TB, tr *tree.Tree) {
	t.Helper()
	links := map[*tree.Inode]uint32{}
	if err := tr.Walk(func(path string, n *tree.Inode) error {
		links[n]++
		for name, c := range n.Entries {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > maxName {
				t.Errorf("%.100q holds the name %.300q", path, name)
			}
			if c.IsDir() {
				links[n]++ // ".." in it
			}
		}
		if (n.Entries != nil) != n.IsDir() {
			t.Errorf("%.100q: mode %o, entries %v", path, n.Mode, n.Entries != nil)
		}
		if n.IsDir() {
			links[n]++ // "."
		}
		if n.Mode&unix.S_IFMT == unix.S_IFCHR && n.Rdev == 0 {
			t.Errorf("%.100q is an overlay whiteout", path)
		}
		if n.MtimeNsec >= 1e9 {
			t.Errorf("%.100q: %d ns", path, n.MtimeNsec)
		}
		for i, x := range n.Xattrs {
			if strings.HasPrefix(x.Name, "trusted.overlay.") || i > 0 && n.Xattrs[i-1].Name >= x.Name {
				t.Errorf("%.100q: xattr %q", path, x.Name)
			}
		}
		end := int64(0)
		for _, e := range n.Content.Extents {
			if e.Logical < end || e.Length <= 0 || e.Length > n.Size-e.Logical || e.Physical < 0 {
				t.Errorf("%.100q: extent %+v of a file of %d bytes", path, e, n.Size)
			}
			end = e.Logical + e.Length
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	for n, c := range links {
		if n.Nlink != c {
			t.Errorf("inode %o has link count %d, want %d", n.Mode, n.Nlink, c)
		}
	}
}

// TestCorpora reads the archives with which Go tests archive/tar, and those of
// tar-split, by which Docker's engine keeps layers (both BSD 3-clause). Nothing
// of them is read in another way than archive/tar does.
func TestCorpora(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	for name, b := range goCorpus(t) {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			sameAsArchiveTar(t, b)
		})
	}
	for name, b := range tarSplitCorpus(t) {
		t.Run("tar-split/"+name, func(t *testing.T) {
			bounded.Case(t)
			plain, _, err := Decompress(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			defer plain.Close()
			if b, err = io.ReadAll(plain); err != nil {
				t.Fatal(err)
			}
			sameAsArchiveTar(t, b)
		})
	}
}

func goCorpus(t testing.TB) map[string][]byte {
	return filesOf(t, filepath.Join(output(t, "go", "env", "GOROOT"), "src/archive/tar/testdata"))
}

func tarSplitCorpus(t testing.TB) map[string][]byte {
	module := output(t, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/vbatts/tar-split")
	return filesOf(t, filepath.Join(module, "archive/tar/testdata"), filepath.Join(module, "tar/asm/testdata"))
}

func output(t testing.TB, command ...string) string {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// filesOf returns the archives in dirs, by name. Those that the Go project keeps
// from virus scanners are decoded.
func filesOf(t testing.TB, dirs ...string) map[string][]byte {
	t.Helper()
	corpus := map[string][]byte{}
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*.tar*"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no archives in %s: %v", dir, err)
		}
		for _, name := range files {
			b, err := os.ReadFile(name)
			base := filepath.Base(name)
			if err == nil && strings.HasSuffix(base, ".base64") {
				b, err = base64.StdEncoding.AppendDecode(nil, b)
			} else if err == nil && strings.HasSuffix(base, ".bz2") {
				b, err = io.ReadAll(bzip2.NewReader(bytes.NewReader(b)))
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			corpus[base] = b
		}
	}
	return corpus
}
