package layer

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

// item is one tar entry of a test.
type item struct {
	tar.Header
	data string
}

var testTime = time.Unix(1700000000, 123456789)

func dir(name string, mode int64) item {
	return item{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: testTime}}
}

func reg(name, data string) item {
	return item{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: testTime, Size: int64(len(data))}, data}
}

func sym(name, target string) item {
	return item{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, ModTime: testTime}}
}

func hard(name, target string) item {
	return item{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, ModTime: testTime}}
}

func (i item) with(change func(*tar.Header)) item {
	change(&i.Header)
	return i
}

func xattr(name, value string) func(*tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = value
	}
}

func pack(t testing.TB, items []item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		i.Format = tar.FormatPAX
		if err := w.WriteHeader(&i.Header); err != nil {
			t.Fatalf("%s: %v", i.Name, err)
		}
		if _, err := io.WriteString(w, i.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// blob is a stored layer of a registry.
func blob(name string, stored []byte) Blob {
	return Blob{Name: name, Size: int64(len(stored)), Open: func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(stored)), nil
	}}
}

func diffID(plain []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(plain)) }

// readMerge is the way from plain tars to a tree. The way over the layers'
// records leads to the same one.
func readMerge(t testing.TB, tars ...[]byte) (*tree.Tree, error) {
	t.Helper()
	var layers, again []*Layer
	for i, b := range tars {
		bl := blob(fmt.Sprintf("layer-%d", i), b)
		bl.DiffID = diffID(b)
		l, err := Read(t.Context(), bl, Options{TempDir: t.TempDir()})
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { l.Close() })
		layers = append(layers, l)
		again = append(again, viaRecord(t, l))
	}
	tr, err := Merge(layers)
	trAgain, errAgain := Merge(again)
	if (err == nil) != (errAgain == nil) || err != nil && err.Error() != errAgain.Error() {
		t.Errorf("merged of records: %v, want %v", errAgain, err)
	}
	if err == nil {
		for _, d := range treecmp.Diff(manifest(t, trAgain), manifest(t, tr)) {
			t.Errorf("merged of records: %s", d)
		}
	}
	return tr, err
}

func mustMerge(t testing.TB, tars ...[]byte) *tree.Tree {
	t.Helper()
	tr, err := readMerge(t, tars...)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func manifest(t testing.TB, tr *tree.Tree) treecmp.Manifest {
	t.Helper()
	m, err := treecmp.Tree(tr)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// unpack is the foreign judge: umoci's view of an image with these layers.
func unpack(t testing.TB, tars ...[]byte) treecmp.Manifest {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	for _, b := range tars {
		if img, err = mutate.AppendLayers(img, plainLayer{static.NewLayer(gz(t, b), types.OCILayer), b}); err != nil {
			t.Fatal(err)
		}
	}
	base := t.TempDir()
	p, err := layout.Write(filepath.Join(base, "oci"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "x"})); err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(base, "bundle")
	out, err := exec.Command("umoci", "unpack", "--image", filepath.Join(base, "oci")+":x", bundle).CombinedOutput()
	if err != nil {
		t.Fatalf("umoci unpack: %v\n%s", err, out)
	}
	m, err := treecmp.Dir(filepath.Join(bundle, "rootfs"))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// plainLayer gives static's layer the DiffID of its content.
type plainLayer struct {
	v1.Layer
	plain []byte
}

func (l plainLayer) DiffID() (v1.Hash, error) { return v1.NewHash(diffID(l.plain)) }

func (l plainLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.plain)), nil
}

// unlisted names directories that no layer has an entry for; umoci leaves on
// them the time of its run.
func compare(t *testing.T, tars [][]byte, unlisted ...string) {
	t.Helper()
	got := manifest(t, mustMerge(t, tars...))
	want := unpack(t, tars...)
	for _, p := range append(unlisted, "/") {
		g, w := got[p], want[p]
		w.MtimeSec, w.MtimeNsec = g.MtimeSec, g.MtimeNsec
		want[p] = w
	}
	for _, d := range treecmp.Diff(got, want) {
		t.Error(d)
	}
}

func TestAgainstUmoci(t *testing.T) {
	long := strings.Repeat("n", 255)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"
	many := []item{dir("many", 0o755)}
	for i := range 3000 {
		many = append(many, reg(fmt.Sprintf("many/%06d", i), fmt.Sprint(i)))
	}
	at := func(sec, nsec int64) func(*tar.Header) {
		return func(h *tar.Header) { h.ModTime = time.Unix(sec, nsec) }
	}
	base := []item{
		dir(".", 0o755), dir("etc", 0o755), reg("etc/passwd", "root"), reg("etc/group", "root"),
		dir("tmp", 0o1777), dir("dir", 0o700), reg("dir/a", "aaa"), reg("dir/b", "bbb"), dir("dir/sub", 0o755), reg("dir/sub/c", "c"),
		sym("link", "dir/a"), hard("hard", "dir/a"), reg("file", "was a file"),
	}
	tests := []struct {
		name     string
		layers   [][]item
		unlisted []string
	}{
		{"types", [][]item{{
			dir(".", 0o755), dir("dev", 0o755), reg("empty", ""), reg("big", strings.Repeat("0123456789", 300000)),
			{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: testTime}},
			{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Mode: 0o660, Devmajor: 259, Devminor: 70000, ModTime: testTime, Gid: 6}},
			{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600, ModTime: testTime}},
			sym("sym", "../../nowhere"), sym("dev/abs", "/etc/passwd"),
		}}, nil},
		{"attributes", [][]item{{
			dir(".", 0o750),
			reg("setuid", "x").with(func(h *tar.Header) { h.Mode = 0o4755 }),
			reg("setgid", "x").with(func(h *tar.Header) { h.Mode, h.Gid = 0o2755, 42 }),
			dir("sticky", 0o1777), dir("sgiddir", 0o2775), reg("sgiddir/file", "x"),
			reg("none", "x").with(func(h *tar.Header) { h.Mode = 0 }),
			reg("owner", "x").with(func(h *tar.Header) { h.Uid, h.Gid = 4000000000, 70000 }),
			sym("symowner", "x").with(func(h *tar.Header) { h.Uid, h.Gid = 1, 2 }),
			reg("before1970", "x").with(at(-100, 250000000)), reg("epoch", "x").with(at(0, 0)), reg("late", "x").with(at(1<<33, 1)),
			dir("dirtime", 0o755).with(at(12345, 6789)), reg("dirtime/file", "x"),
		}}, nil},
		{"xattrs", [][]item{{
			dir(".", 0o755).with(xattr("user.root", "1")),
			reg("cap", "x").with(xattr("security.capability", capability)),
			reg("acl", "x").with(xattr("system.posix_acl_access", acl)),
			dir("dacl", 0o755).with(xattr("system.posix_acl_default", acl)),
			reg("user", "x").with(xattr("user.b", "2")).with(xattr("user.a", "\x00\xff=\n")),
			reg("trusted", "x").with(xattr("trusted.t", "1")).with(xattr("trusted.overlay.opaque", "y")),
		}, {
			reg("user", "y").with(xattr("user.c", "3")),
			dir("dacl", 0o755),
		}}, nil},
		{"names", [][]item{{
			dir(".", 0o755), reg(long, "x"), dir("d"+long[1:], 0o755), reg("d"+long[1:]+"/"+long, "x"),
			reg("latin\xe9\xff", "x"), reg("new\nline", "x"), reg(" ", "x"), reg("..x", "x"), reg("!", "x"), reg("ünï", "x"),
			sym("toLatin", "latin\xe9\xff"),
		}}, nil},
		{"many entries", [][]item{many}, nil},
		{"implied parents", [][]item{{reg("a/b/c", "x"), dir("a/b/d", 0o711)}, {reg("a/x/y", "z")}}, []string{"/a", "/a/b", "/a/x"}},
		{"implied parents keep what is below", [][]item{base, {reg("tmp/x", "x"), reg("dir/sub/d", "x")}}, []string{"/tmp", "/dir/sub"}},
		{"whiteouts", [][]item{base, {reg("dir/.wh.a", ""), reg(".wh.etc", ""), reg(".wh.link", "")}}, []string{"/dir"}},
		{"whiteout of nothing", [][]item{base, {reg("dir/.wh.zzz", "")}}, []string{"/dir"}},
		{"opaque", [][]item{base, {dir("dir", 0o755), reg("dir/.wh..wh..opq", ""), reg("dir/new", "n")}}, nil},
		{"opaque last", [][]item{base, {dir("dir", 0o755), reg("dir/new", "n"), dir("dir/sub", 0o700), reg("dir/.wh..wh..opq", "")}},
			[]string{"/dir/sub"}}, // umoci removes from it after setting its time
		{"whiteout and directory", [][]item{base, {reg(".wh.dir", ""), dir("dir", 0o711), reg("dir/new", "n")}}, nil},
		{"file over directory and back", [][]item{base, {reg("dir", "file now")}, {dir("dir", 0o700), reg("dir/z", "z")}}, nil},
		{"directory over file", [][]item{base, {dir("file", 0o755), reg("file/in", "x")}}, nil},
		{"symlink over directory", [][]item{base, {sym("dir", "etc")}}, nil},
		{"metadata only", [][]item{base, {dir("dir", 0o755).with(at(77, 7))}}, nil},
		{"replaced hard link", [][]item{base, {reg("hard", "other")}}, nil},
		{"hard links", [][]item{{dir(".", 0o755), reg("a", "data"), hard("b", "a"), hard("./c", "./b"), sym("s", "a"), hard("t", "s"), hard("u", "/a")}}, nil},
		{"hard links across layers", [][]item{base, {hard("again", "dir/b")}, {hard("again2", "again")}, {reg("dir/.wh.b", "")}}, []string{"/dir"}},
		{"hard link keeps attributes", [][]item{{dir(".", 0o755), reg("a", "data"),
			hard("b", "a").with(func(h *tar.Header) { h.Mode, h.Uid, h.ModTime = 0o777, 5, time.Unix(5, 5) })}}, nil},
		{"duplicates", [][]item{{dir(".", 0o755), reg("a", "1"), reg("a", "22"), dir("d", 0o700), reg("d/x", "x"), dir("d", 0o755), sym("a", "b")}}, nil},
		{"symlinked parent in its layer", [][]item{{dir(".", 0o755), dir("usr", 0o755), dir("usr/lib", 0o755), sym("lib", "usr/lib"), reg("lib/x", "x"), sym("up", "usr/lib/../../usr"), reg("up/y", "y")}}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var tars [][]byte
			for _, l := range tt.layers {
				tars = append(tars, pack(t, l))
			}
			compare(t, tars, tt.unlisted...)
		})
	}
}

// TestRandomLayers compares stacks of layers that nobody thought of. What they
// hold is kept to that on which umoci and engines agree.
func TestRandomLayers(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 0))
			var tars [][]byte
			live := map[string]bool{} // regular files of the layers so far
			for range 4 {
				items := []item{dir(".", 0o755)}
				seen := map[string]bool{}
				var own []string
				for range 60 {
					// Few names, so that types meet.
					p := fmt.Sprintf("%c", 'a'+rng.IntN(4))
					depth := rng.IntN(4)
					clash := false
					for i := 0; i < depth && !clash; i++ {
						switch {
						case !seen[p]:
							seen[p] = true
							items = append(items, dir(p, 0o700+rng.Int64N(64)).with(func(h *tar.Header) { h.ModTime = time.Unix(rng.Int64N(1e9), rng.Int64N(1e9)) }))
						case seen[p+"\x00"]: // is not a directory here
							clash = true
						}
						p += fmt.Sprintf("/%c", 'a'+rng.IntN(4))
					}
					if clash || seen[p] {
						continue
					}
					seen[p], seen[p+"\x00"] = true, true
					switch k := rng.IntN(8); {
					case k == 0 && len(tars) > 0:
						i := strings.LastIndexByte(p, '/') + 1
						items = append(items, reg(p[:i]+".wh."+p[i:], ""))
					case k == 1:
						items = append(items, sym(p, "nowhere"))
					case k == 2 && len(own) > 0:
						items = append(items, hard(p, own[rng.IntN(len(own))]))
					default:
						items = append(items, reg(p, fmt.Sprint(seed, p, rng.Uint32())))
						own = append(own, p)
						live[p] = true
					}
				}
				tars = append(tars, pack(t, items))
			}
			compare(t, tars)
		})
	}
}

func TestMain(m *testing.M) {
	unix.Umask(0o022) // umoci makes implied directories with it
	os.Exit(m.Run())
}
