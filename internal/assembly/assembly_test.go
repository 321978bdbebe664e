package assembly

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// testTree makes a tree of lines: "PATH MODE [UID:GID] [= CONTENT | -> TARGET]",
// with parents of mode 0755. A mode without type is a regular file's.
func testTree(t testing.TB, lines ...string) *tree.Tree {
	t.Helper()
	root := &tree.Inode{Mode: modeDir | 0o755, Entries: map[string]*tree.Inode{}}
	for _, line := range lines {
		var (
			name, rest, _ = strings.Cut(line, " ")
			n             = &tree.Inode{MtimeSec: 1234}
		)
		if before, content, ok := strings.Cut(rest, " = "); ok {
			rest, n.Size = before, int64(len(content))
			n.Content = tree.Content{Source: strings.NewReader(content), Extents: []tree.Extent{{Length: n.Size}}}
		} else if before, target, ok := strings.Cut(rest, " -> "); ok {
			rest, n.Target = before, target
		}
		if _, err := fmt.Sscanf(rest, "%o %d:%d", &n.Mode, &n.UID, &n.GID); err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "unexpected") {
			t.Fatalf("%q: %v", line, err)
		}
		switch {
		case n.Target != "":
			n.Mode = modeSymlink | 0o777
		case strings.HasSuffix(name, "/"):
			n.Mode |= modeDir
			n.Entries = map[string]*tree.Inode{}
		default:
			n.Mode |= modeRegular
		}
		dir := root
		parts := strings.Split(strings.Trim(name, "/"), "/")
		for _, p := range parts[:len(parts)-1] {
			if dir.Entries[p] == nil {
				dir.Entries[p] = &tree.Inode{Mode: modeDir | 0o755, MtimeSec: 1234, Entries: map[string]*tree.Inode{}}
			}
			dir = dir.Entries[p]
		}
		dir.Entries[parts[len(parts)-1]] = n
	}
	return &tree.Tree{Root: root}
}

// testBoot is no program, but has the headers of one.
func testBoot(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1}
	copy(h.Ident[:], []byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1})
	if err := binary.Write(&b, binary.LittleEndian, h); err != nil {
		t.Fatal(err)
	}
	return append(b.Bytes(), bytes.Repeat([]byte("boot binary "), 1000)...)
}

func testInput(t testing.TB, src *tree.Tree, rawConfig string) Input {
	t.Helper()
	index := []byte("the index")
	return Input{
		Source: transport.Image{
			Config:      must(v1.ParseConfigFile(strings.NewReader(rawConfig)))(t),
			RawConfig:   []byte(rawConfig),
			Annotations: map[string]string{"a": "b", annotationBaseName: "base of the source"},
		},
		Tree: src,
		Boot: must(NewBootLayer(testBoot(t)))(t),
		Config: bootimage.Config{
			Version: bootimage.Version, Profile: "v1",
			IndexDigest: fmt.Sprintf("sha256:%x", sha256.Sum256(index)),
			Stores:      []string{"registry://host/x"},
			Source:      bootimage.Source{Name: "app:v1", Digest: "sha256:1234"},
		},
		Index: index, Locators: []byte("the locators"), Meta: bytes.Repeat([]byte("metadata"), 1000),
	}
}

// listing describes the files of a layer, one a line.
func listing(t testing.TB, l v1.Layer) []string {
	t.Helper()
	rc := must(l.Uncompressed())(t)
	defer rc.Close()
	var lines []string
	for r := tar.NewReader(rc); ; {
		h, err := r.Next()
		if err == io.EOF {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("%s %o %d:%d", h.Name, h.Mode, h.Uid, h.Gid)
		switch h.Typeflag {
		case tar.TypeSymlink:
			line += " -> " + h.Linkname
		case tar.TypeLink:
			line += " = " + h.Linkname
		case tar.TypeReg:
			line += fmt.Sprintf(" %d bytes", h.Size)
		}
		lines = append(lines, line)
	}
}

const config = `{"os":"linux","architecture":"amd64","created":"2020-01-02T03:04:05Z","rootfs":{"type":"layers","diff_ids":[]},` +
	`"history":[{"created_by":"debootstrap"},{"created_by":"ENV x=y","empty_layer":true}],"x-unknown":[1],` +
	`"config":{"User":"app","WorkingDir":"/srv/app","Entrypoint":["/entry.sh","bin/tool"],"Cmd":["python3","--x=/etc/passwd"],"Env":["PATH=/usr/local/bin:/bin:/vol/bin:/opt/link:relative:"],` +
	`"Labels":{"l":"m"},"StopSignal":"SIGINT","Volumes":{"/vol":{},"/vollink":{}},` +
	`"Healthcheck":{"Test":["CMD-SHELL","/opt/probe --quick || exit 1"],"StartInterval":5000000000}}}`

var testFiles = []string{
	"/bin 777 -> usr/bin", "/lib 777 -> usr/lib", "/lib64 777 -> usr/lib64", "/tmp/ 1777", "/root/ 700", "/proc/ 555", "/dev 777 -> /tmp",
	"/usr/bin/python3 777 -> python3.11", "/usr/bin/python3.11 755 = python", "/usr/bin/sudo 4755 = sudo", "/usr/bin/notes 644 = text",
	"/usr/bin/awk 777 -> /etc/alternatives/awk", "/etc/alternatives/awk 777 -> /usr/bin/mawk", "/usr/bin/mawk 755 = mawk",
	"/usr/bin/sh 777 -> dash", "/usr/bin/dash 755 = dash", "/usr/bin/X11 777 -> .", "/usr/bin/dangling 777 -> nowhere",
	"/usr/bin/ld.so 777 -> /lib64/ld-linux-x86-64.so.2", "/usr/bin/libx.so.1.2 755 = library", "/usr/bin/loader 777 -> ld.so",
	"/usr/lib64/ld-linux-x86-64.so.2 777 -> ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 755 = loader",
	"/usr/sbin/off-path 755 = x", "/usr/local/bin/ 2775 0:50", "/usr/local/bin/tool 755 = tool",
	"/vol/bin/hidden 755 = x", "/data/v/x 755 = x", "/vollink 777 -> /data/v", "/opt/link 777 -> /data/v", "/opt/probe 755 = probe", "/opt/unnamed 755 = x",
	"/opt/app/bin/run 750 = x", "/opt/app/bin/notes 644 = x", "/opt/app/plugin.so 755 = library", "/opt/again 777 -> app/bin/run", "/opt/current 777 -> app/bin", "/opt/texts 777 -> ../srv/texts", "/srv/texts/a 644 = text",
	"/entry.sh 777 -> usr/local/bin/entry.sh", "/usr/local/bin/entry.sh 700 = #!/bin/sh", "/srv/app/ 750 1000:1000", "/srv/app/bin/tool 711 = x",
	"/etc/passwd 644 = app:x:1000:1000::/:/bin/sh\n", "/etc/group 777 -> /data/group", "/data/group 640 0:42 = root:x:0:", "/etc/os-release 777 -> ../usr/lib/os-release", "/usr/lib/os-release 644 = ID=debian",
	"/var/lib/dpkg/status 644 = Package: x", "/var/lib/dpkg/status.d/libc 644 = Package: libc", "/var/run 777 -> /run", "/run/ 755", "/var/spool/mail 777 -> ../mail", "/var/mail/ 2775 0:8",
	"/var/lib/rpm/Packages 644 = rpm",
}

func TestBootImage(t *testing.T) {
	img := must(BootImage(testInput(t, testTree(t, testFiles...), config)))(t)
	layers := must(img.Layers())(t)
	if got, want := listing(t, layers[0]), []string{".bootfs/ 755 0:0", ".bootfs/boot 4755 0:0 12064 bytes"}; !slices.Equal(got, want) {
		t.Errorf("first layer:\n%s", strings.Join(got, "\n"))
	}
	// All but those that are empty in the source.
	marked := strings.Fields("/data /data/v /etc /etc/alternatives /opt /opt/app /opt/app/bin /srv /srv/app /srv/app/bin /srv/texts /usr /usr/bin /usr/lib " +
		"/usr/lib/x86_64-linux-gnu /usr/lib64 /usr/local /usr/local/bin /usr/sbin /var /var/lib /var/lib/dpkg /var/lib/dpkg/status.d /var/lib/rpm /var/spool /vol")
	written := testInput(t, testTree(t), config).Config
	written.Marked = marked
	configBytes := len(must(json.Marshal(written))(t))
	const boot = " 4755 0:0 = .bootfs/link"
	want := []string{
		fmt.Sprintf(".bootfs/config.json 644 0:0 %d bytes", configBytes),
		".bootfs/link 4755 0:0 246 bytes",
		".bootfs/lower/ 755 0:0", ".bootfs/root/ 755 0:0",
		".bootfs/rootfs.caibx 644 0:0 9 bytes", ".bootfs/rootfs.castr/ 755 0:0", ".bootfs/rootfs.meta 644 0:0 8000 bytes", ".bootfs/rootfs.packs 644 0:0 12 bytes",
		".bootfs/rw/ 700 0:0", ".bootfs/secrets/ 700 0:0", ".bootfs/tmp/ 700 0:0",
		"bin 777 0:0 -> usr/bin",
		"data/ 755 0:0", "data/group 640 0:42 9 bytes", "data/v/ 755 0:0",
		"dev/ 755 0:0", // a symlink in the source
		"entry.sh" + boot,
		"etc/ 755 0:0", "etc/alternatives/ 755 0:0", "etc/alternatives/awk" + boot, "etc/group 777 0:0 -> /data/group", "etc/os-release 777 0:0 -> ../usr/lib/os-release", "etc/passwd 644 0:0 27 bytes",
		"lib 777 0:0 -> usr/lib", "lib64 777 0:0 -> usr/lib64",
		"opt/ 755 0:0", "opt/again" + boot, "opt/app/ 755 0:0", "opt/app/bin/ 755 0:0", "opt/app/bin/run" + boot, "opt/current 777 0:0 -> app/bin", "opt/link 777 0:0 -> /data/v",
		"opt/probe" + boot, "opt/unnamed" + boot,
		"proc/ 555 0:0", "root/ 700 0:0", "run/ 755 0:0",
		"srv/ 755 0:0", "srv/app/ 750 1000:1000", "srv/app/bin/ 755 0:0", "srv/app/bin/tool" + boot, "srv/texts/ 755 0:0",
		"sys/ 755 0:0", "tmp/ 1777 0:0",
		"usr/ 755 0:0", "usr/bin/ 755 0:0", "usr/bin/X11 777 0:0 -> .",
		"usr/bin/awk" + boot, "usr/bin/dash" + boot, "usr/bin/mawk" + boot, "usr/bin/python3" + boot, "usr/bin/python3.11" + boot, "usr/bin/sh" + boot, "usr/bin/sudo" + boot,
		"usr/lib/ 755 0:0", "usr/lib/os-release 644 0:0 9 bytes", "usr/lib64/ 755 0:0",
		"usr/local/ 755 0:0", "usr/local/bin/ 2775 0:50", "usr/local/bin/entry.sh" + boot, "usr/local/bin/tool" + boot,
		"usr/sbin/ 755 0:0", "usr/sbin/off-path" + boot,
		"var/ 755 0:0", "var/lib/ 755 0:0", "var/lib/dpkg/ 755 0:0", "var/lib/dpkg/status 644 0:0 10 bytes",
		"var/lib/dpkg/status.d/ 755 0:0", "var/lib/dpkg/status.d/libc 644 0:0 13 bytes", "var/lib/rpm/ 755 0:0", "var/lib/rpm/Packages 644 0:0 3 bytes",
		"usr/lib/x86_64-linux-gnu/ 755 0:0", "var/mail/ 2775 0:8", "var/spool/ 755 0:0",
		"var/run 777 0:0 -> /run",
		"vol/ 755 0:0", "vollink 777 0:0 -> /data/v",
	}
	for _, at := range marked {
		want = append(want, at[1:]+"/"+bootimage.VolumeMark+"/ 700 0:0")
	}
	slices.SortFunc(want, func(a, b string) int {
		a, _, _ = strings.Cut(a, " ")
		b, _, _ = strings.Cut(b, " ")
		return strings.Compare(strings.TrimSuffix(a, "/"), strings.TrimSuffix(b, "/"))
	})
	// Hard links come after what they name.
	slices.SortStableFunc(want, func(a, b string) int { return strings.Count(a, boot) - strings.Count(b, boot) })
	if got := listing(t, layers[1]); !slices.Equal(got, want) {
		t.Errorf("second layer, - want, + got:\n%s", difference(want, got))
	}
}

func difference(want, got []string) string {
	var out []string
	for _, w := range want {
		if !slices.Contains(got, w) {
			out = append(out, "- "+w)
		}
	}
	for _, g := range got {
		if !slices.Contains(want, g) {
			out = append(out, "+ "+g)
		}
	}
	return strings.Join(out, "\n")
}

func TestConfigIsKept(t *testing.T) {
	img := must(BootImage(testInput(t, testTree(t, testFiles...), config)))(t)
	raw := must(img.RawConfigFile())(t)
	var got, want map[string]any
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(config), &want); err != nil {
		t.Fatal(err)
	}
	c := want["config"].(map[string]any)
	c["Entrypoint"] = []any{bootimage.BootPath, "/entry.sh", "bin/tool"}
	c["Volumes"].(map[string]any)[bootimage.WritablePath] = map[string]any{}
	history := got["history"].([]any)
	if len(history) != 4 || history[0].(map[string]any)["created_by"] != "debootstrap" {
		t.Errorf("history %v", history)
	}
	for i, h := range history {
		if empty := h.(map[string]any)["empty_layer"] == true; empty != (i < 2) {
			t.Errorf("history %d: empty_layer is %v", i, empty)
		}
	}
	for _, changed := range []string{"history", "rootfs"} {
		delete(got, changed)
		delete(want, changed)
	}
	if g, w := must(json.Marshal(got))(t), must(json.Marshal(want))(t); !bytes.Equal(g, w) {
		t.Errorf("got  %s\nwant %s", g, w)
	}
	m := must(img.Manifest())(t)
	if a := m.Annotations; a["a"] != "b" || a[annotationBaseName] != "app:v1" || a[annotationBaseDigest] != "sha256:1234" {
		t.Errorf("annotations %v", a)
	}

	for name, c := range map[string]string{
		"no config at all": `{"os":"linux"}`,
		"null":             `{"os":"linux","config":null,"history":null}`,
		"null in history":  `{"os":"linux","history":[null]}`,
		"nothing":          "null\n",
		"other case":       `{"OS":"linux","Config":{"entrypoint":["/x"],"volumes":{"/v":null}}}`,
	} {
		cf := must(must(BootImage(testInput(t, testTree(t), c)))(t).ConfigFile())(t)
		if cf.Config.Entrypoint[0] != bootimage.BootPath || len(cf.History) != 2+strings.Count(c, "[null]") || len(cf.RootFS.DiffIDs) != 2 {
			t.Errorf("%s: %+v", name, cf)
		}
		if _, ok := cf.Config.Volumes[bootimage.WritablePath]; !ok {
			t.Errorf("%s: volumes %v", name, cf.Config.Volumes)
		}
		if strings.Contains(c, "/x") && (len(cf.Config.Entrypoint) != 2 || len(cf.Config.Volumes) != 2) {
			t.Errorf("%s: %+v", name, cf.Config)
		}
	}
}

func TestReproducible(t *testing.T) {
	a := must(BootImage(testInput(t, testTree(t, testFiles...), config)))(t)
	reversed := slices.Clone(testFiles)
	slices.Reverse(reversed)
	sorted := slices.Clone(testFiles)
	slices.Sort(sorted) // other insertion orders: maps must not decide
	b := must(BootImage(testInput(t, testTree(t, sorted...), config)))(t)
	if x, y := must(a.Digest())(t), must(b.Digest())(t); x != y {
		t.Errorf("digests %s and %s of the same input", x, y)
	}
	other := must(BootImage(testInput(t, testTree(t, "/bin/x 755 = x"), `{"os":"linux"}`)))(t)
	if x, y := must(must(a.Layers())(t)[0].Digest())(t), must(must(other.Layers())(t)[0].Digest())(t); x != y {
		t.Errorf("the layer of the same binary is %s and %s", x, y)
	}
}

// Frozen: another digest means that every image of a release gets other bytes.
func TestGoldenBootLayer(t *testing.T) {
	l := must(NewBootLayer(bytes.Repeat([]byte("boot binary "), 1000)))(t).layer
	const diffID = "sha256:b69c1c9b843bb8810bb230a0611d798014b7da2f500d01564ebbe06c533c196a"
	if got := must(l.DiffID())(t).String(); got != diffID {
		t.Errorf("DiffID: got %s, want %s", got, diffID)
	}
	const digest = "sha256:5d3118ba75ae7c3bdc95a22d529fb4b4043c7c8b4fee44e6a4ff2d1f045fe7f4"
	if got := must(l.Digest())(t).String(); got != digest {
		t.Errorf("digest: got %s, want %s; if a new compressor makes the difference, say so in the CHANGELOG", got, digest)
	}
}

func TestRefusedInput(t *testing.T) {
	in := testInput(t, testTree(t, "/.bootfs/boot 755 = x"), config)
	if _, err := BootImage(in); err == nil || !strings.Contains(err.Error(), "converted already") {
		t.Errorf("a converted source: %v", err)
	}
	in = testInput(t, testTree(t), config)
	in.Boot = must(NewBootLayer([]byte("#!/bin/sh")))(t)
	if _, err := BootImage(in); err == nil || !strings.Contains(err.Error(), "no ELF executable") {
		t.Errorf("a script as boot binary: %v", err)
	}
	if _, err := NewBootLayer(nil); err == nil {
		t.Error("no boot binary: no error")
	}
	many := testTree(t, "/bin/x 755 = x")
	bin := many.Lookup("/bin").Entries
	for i := range maxSkeleton {
		bin[fmt.Sprint(i)] = bin["x"]
	}
	if _, err := BootImage(testInput(t, many, config)); err == nil || !strings.Contains(err.Error(), `PATH directory "/bin"`) {
		t.Errorf("too many executables: %v", err)
	}
}

// Where every file is executable, by its mode, the upper directories get links.
func TestLinksAreBounded(t *testing.T) {
	src := testTree(t, "/bin/x 755 = x", "/data/deep/x 755 = x", "/srv/run 755 = x", "/zzz 755 = x")
	for i := range maxElsewhere {
		src.Lookup("/data/deep").Entries[fmt.Sprint(i)] = src.Lookup("/zzz")
	}
	img := must(BootImage(testInput(t, src, `{"os":"linux","config":{"Env":["PATH=/bin"]}}`)))(t)
	links := map[string]bool{}
	for _, line := range listing(t, must(img.Layers())(t)[1]) {
		if name, ok := strings.CutSuffix(line, " 4755 0:0 = .bootfs/link"); ok {
			links[name] = true
		}
	}
	for _, name := range []string{"bin/x", "zzz", "srv/run"} {
		if !links[name] {
			t.Errorf("no link at %s", name)
		}
	}
	if len(links) != maxElsewhere+1 {
		t.Errorf("%d links, want %d and the one on PATH", len(links), maxElsewhere)
	}
}

// Symlinks of a hostile source lead round in circles, up, and through files.
func TestHostileLinks(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	src := testTree(t, "/bin 777 -> /sbin", "/sbin 777 -> bin", "/usr/bin 777 -> ../../../../x", "/x/y 755 = x", "/etc 777 -> .",
		"/proc 777 -> /etc", "/var 777 -> /x/y", "/passwd 644 = p", "/group/ 755", "/opt 777 -> opt/opt", "/volume 777 -> /")
	in := testInput(t, src, `{"os":"linux","config":{"Entrypoint":["/x/y/z","../../x/y","/etc/etc/x/y"],"Env":["PATH=/bin:/usr/bin:/etc/x"],"WorkingDir":"/opt/w"}}`)
	img := must(BootImage(in))(t)
	got := listing(t, must(img.Layers())(t)[1])
	for _, want := range []string{"x/y 4755 0:0 = .bootfs/link", "proc/ 755 0:0", "usr/bin 777 0:0 -> ../../../../x"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, strings.Join(got, "\n"))
		}
	}
	// A volume at / takes all links away.
	in = testInput(t, src, `{"os":"linux","config":{"Volumes":{"/volume":{}},"Env":["PATH=/x"]}}`)
	for _, line := range listing(t, must(must(BootImage(in))(t).Layers())(t)[1]) {
		if strings.Contains(line, " = ") {
			t.Errorf("link in a volume: %s", line)
		}
	}
}

// A configuration of 8 MiB can name the same directory a million times.
func TestHostilePath(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	src := testTree(t, "/bin 777 -> usr/bin")
	usrBin := testTree(t, "/x 644 = x").Root
	for i := range 10_000 {
		usrBin.Entries[fmt.Sprint(i)] = usrBin.Entries["x"]
	}
	src.Root.Entries["usr"] = &tree.Inode{Mode: modeDir | 0o755, Entries: map[string]*tree.Inode{"bin": usrBin}}
	bounded.Case(t)
	must(newSkeleton(src, &v1.Config{Env: []string{"PATH=" + strings.Repeat("/bin:/usr/bin:", 1<<16)}}))(t)
}

// The bytes that are shipped are bounded, whatever the source claims to hold.
func TestShippedBytes(t *testing.T) {
	src := testTree(t, "/etc/passwd 644 = x", "/var/lib/rpm/a 644 = x", "/var/lib/rpm/b 644 = x", "/var/lib/rpm/c 644 = x")
	src.Lookup("/etc/passwd").Size = 1 << 40 // a hole
	for _, n := range []string{"a", "b", "c"} {
		src.Lookup("/var/lib/rpm/" + n).Size = maxShippedFile
	}
	s := must(newSkeleton(src, &v1.Config{}))(t)
	if _, ok := s.files["/etc/passwd"]; ok {
		t.Error("a file of 1 TiB is shipped")
	}
	if s.shipped > maxShipped {
		t.Errorf("%d bytes are shipped, at most %d may be", s.shipped, maxShipped)
	}
}

// toLayout writes img as an OCI layout.
func toLayout(t testing.TB, img v1.Image) string {
	t.Helper()
	ref := "oci:" + filepath.Join(t.TempDir(), "layout") + ":v1"
	d := must(transport.OpenDestination(context.Background(), must(transport.Parse(ref, ""))(t), transport.Options{}))(t)
	defer d.Close()
	must(d.Commit(context.Background(), []transport.PlatformImage{{Platform: v1.Platform{OS: "linux", Architecture: "amd64"}, Boot: img}}))(t)
	return ref
}

func openImage(t testing.TB, ref string) transport.Image {
	t.Helper()
	s := must(transport.Open(context.Background(), must(transport.Parse(ref, ""))(t), transport.Options{}))(t)
	t.Cleanup(func() { s.Close() })
	return s.Images()[0]
}

func TestReadContents(t *testing.T) {
	in := testInput(t, testTree(t, testFiles...), config)
	img := must(BootImage(in))(t)
	ref := toLayout(t, img)
	dir := t.TempDir()
	for _, args := range [][]string{
		{"copy", ref, "docker-archive:" + dir + "/a.tar:x:v1"},
		{"copy", "--dest-compress-format", "zstd", "--dest-compress", ref, "dir:" + dir + "/zstd"},
		{"copy", "dir:" + dir + "/zstd", "oci:" + dir + "/zstd-layout:v1"},
	} {
		if out, err := exec.Command("skopeo", append([]string{"--insecure-policy"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("skopeo %v: %v\n%s", args, err, out)
		}
	}
	for _, ref := range []string{ref, "docker-archive:" + dir + "/a.tar", "oci:" + dir + "/zstd-layout:v1"} {
		c, err := ReadContents(context.Background(), openImage(t, ref))
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		if !bytes.Equal(c.Index, in.Index) || !bytes.Equal(c.Locators, in.Locators) || !bytes.Equal(c.Meta, in.Meta) {
			t.Errorf("%s: contents differ", ref)
		}
		x, err := ReadIndex(context.Background(), openImage(t, ref))
		if err != nil || !bytes.Equal(x.Index, in.Index) || !bytes.Equal(x.Locators, in.Locators) || len(x.Meta) > 0 {
			t.Errorf("%s: the index alone: %v", ref, err)
		}
		in.Config.Marked = must(newSkeleton(in.Tree, &in.Source.Config.Config))(t).marked
		if got, want := must(json.Marshal(c.Config))(t), must(json.Marshal(in.Config))(t); !bytes.Equal(got, want) {
			t.Errorf("%s: config %s, want %s", ref, got, want)
		}
	}
	in.Locators = nil
	c := must(ReadContents(context.Background(), openImage(t, toLayout(t, must(BootImage(in))(t)))))(t)
	if c.Locators != nil {
		t.Errorf("locators %q of an image with loose stores", c.Locators)
	}
}

// blobOf is a layer as a transport offers it.
func blobOf(t testing.TB, l *imageLayer) layer.Blob {
	t.Helper()
	return layer.Blob{
		Name: l.digest.String(), DiffID: l.diffID.String(), Size: int64(len(l.compressed)),
		Open: func(context.Context) (io.ReadCloser, error) { return l.Compressed() },
	}
}

func TestReadContentsOfDerived(t *testing.T) {
	index := []byte("index")
	config := fmt.Sprintf(`{"version":1,"indexDigest":"sha256:%x"}`, sha256.Sum256(index))
	own := map[string]file{
		bootimage.ConfigPath: bytesFile(0o644, []byte(config)), bootimage.IndexPath: bytesFile(0o644, index), bootimage.MetaPath: bytesFile(0o644, []byte("meta")),
	}
	unread := layer.Blob{Name: "boot", Open: func(context.Context) (io.ReadCloser, error) { return nil, errors.New("the boot layer was read") }}
	img := transport.Image{Config: bootConfigFile(), Layers: []layer.Blob{
		unread, blobOf(t, must(newLayer(own, fastLevel))(t)), blobOf(t, must(newLayer(map[string]file{"/app": bytesFile(0o755, []byte("app"))}, fastLevel))(t)),
	}}
	c, err := ReadContents(context.Background(), img)
	if err != nil || string(c.Meta) != "meta" {
		t.Errorf("contents below another layer: %+v, %v", c, err)
	}
}

func bootConfigFile() *v1.ConfigFile {
	return &v1.ConfigFile{Config: v1.Config{Volumes: map[string]struct{}{bootimage.WritablePath: {}}}}
}

func TestHostileContents(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	index := []byte("index")
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(index))
	good := func() map[string]file {
		return map[string]file{
			bootimage.ConfigPath: bytesFile(0o644, []byte(`{"version":1,"indexDigest":"`+digest+`"}`)),
			bootimage.IndexPath:  bytesFile(0o644, index),
			bootimage.MetaPath:   bytesFile(0o644, []byte("meta")),
		}
	}
	zeros := func(size int64) file { return file{mode: modeRegular | 0o644, size: size, content: zeroReader{}} }
	for _, c := range []struct {
		name, err string
		files     func(map[string]file)
		blob      func(*layer.Blob)
	}{
		{name: "good"},
		{name: "no index", err: "is missing", files: func(f map[string]file) { delete(f, bootimage.IndexPath) }},
		{name: "version", err: "format version 2, this program knows 1", files: func(f map[string]file) {
			f[bootimage.ConfigPath] = bytesFile(0o644, []byte(`{"version":2,"stores":7}`))
		}},
		{name: "no JSON", err: "invalid character", files: func(f map[string]file) { f[bootimage.ConfigPath] = bytesFile(0o644, []byte("<")) }},
		{name: "other index", err: "its digest is", files: func(f map[string]file) { f[bootimage.IndexPath] = bytesFile(0o644, []byte("x")) }},
		{name: "huge configuration", err: "at most", files: func(f map[string]file) { f[bootimage.ConfigPath] = zeros(2 << 20) }},
		{name: "bomb", err: "when decompressed", files: func(f map[string]file) { f["/zeros"] = zeros(12 << 20) }},
		{name: "bomb in place", err: "when decompressed", files: func(f map[string]file) { f[bootimage.MetaPath] = zeros(12 << 20) }},
		{name: "symlink", err: "is missing", files: func(f map[string]file) {
			f[bootimage.MetaPath] = file{mode: modeSymlink | 0o777, target: "/etc/passwd"}
		}},
		{name: "wrong DiffID", err: "the image's configuration says", blob: func(b *layer.Blob) { b.DiffID = digest }},
		{name: "truncated", err: "EOF", blob: func(b *layer.Blob) {
			all := b.Open
			b.Open = func(ctx context.Context) (io.ReadCloser, error) {
				rc, err := all(ctx)
				return io.NopCloser(io.LimitReader(rc, 100)), err
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bounded.Case(t)
			files := good()
			if c.files != nil {
				c.files(files)
			}
			b := blobOf(t, must(newLayer(files, fastLevel))(t))
			if c.blob != nil {
				c.blob(&b)
			}
			_, err := ReadContents(context.Background(), transport.Image{Config: bootConfigFile(), Layers: []layer.Blob{b}})
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("got %v, want an error with %q", err, c.err)
			}
		})
	}
	if _, err := ReadContents(context.Background(), transport.Image{Config: &v1.ConfigFile{}}); !errors.Is(err, ErrNotConverted) {
		t.Errorf("an ordinary image: %v", err)
	}
}

type zeroReader struct{}

func (zeroReader) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// umoci sees what an engine would unpack.
func TestUmociUnpack(t *testing.T) {
	ref := toLayout(t, must(BootImage(testInput(t, testTree(t, testFiles...), config)))(t))
	dir := filepath.Join(t.TempDir(), "bundle")
	// umoci takes a name for a manifest, not for an index of platforms.
	flat := t.TempDir() + "/flat:v1"
	if out, err := exec.Command("skopeo", "--insecure-policy", "copy", ref, "oci:"+flat).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := exec.Command("umoci", "unpack", "--image", flat, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	root := filepath.Join(dir, "rootfs")
	if mode := must(os.Stat(root + "/.bootfs/boot"))(t).Mode(); mode != os.ModeSetuid|0o755 {
		t.Errorf("boot has mode %v", mode)
	}
	link := must(os.ReadFile(root + bootimage.LinkPath))(t)
	if got := must(os.ReadFile(root + "/usr/bin/python3"))(t); !bytes.Equal(got, link) {
		t.Errorf("python3 is %q, want %q", got, link)
	}
	for name, want := range map[string]string{"/bin": "usr/bin", "/lib64": "usr/lib64"} {
		if got, err := os.Readlink(root + name); err != nil || got != want {
			t.Errorf("%s -> %s, %v, want %s", name, got, err, want)
		}
	}
	if mode := must(os.Stat(root + "/tmp"))(t).Mode(); mode != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("/tmp has mode %v", mode)
	}
}

func FuzzReadContents(f *testing.F) {
	in := testInput(f, testTree(f, testFiles...), config)
	second := must(must(BootImage(in))(f).Layers())(f)[1]
	f.Add(must(io.ReadAll(must(second.Compressed())(f)))(f))
	f.Add(must(io.ReadAll(must(second.Uncompressed())(f)))(f))
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa4, 0, 0, 0, 0x20}) // claims 512 MiB
	f.Fuzz(func(t *testing.T, b []byte) {
		img := transport.Image{Config: bootConfigFile(), Layers: []layer.Blob{{
			Size: int64(len(b)),
			Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
		}}}
		if c, err := ReadContents(context.Background(), img); err == nil && len(c.Index) == 0 && c.Config.IndexDigest == "" {
			t.Error("contents without an index")
		}
	})
}

// FuzzBootConfig makes a boot image's configuration of any that a source image
// may have: boot comes first, and the layers are the boot image's own.
func FuzzBootConfig(f *testing.F) {
	for _, s := range []string{
		config, `{}`, `{"config":null,"history":[null,{"EMPTY_LAYER":false}],"rootfs":{}}`, `{"Config":{"entrypoint":["/a"],"Volumes":null}}`,
		`{"config":{"Entrypoint":["/a"],"entrypoint":["/b"],"VOLUMES":{"/v":{}}}}`, `{"config":{"Volumes":[]}}`, `{"history":{}}`, `null`, `[]`,
	} {
		f.Add([]byte(s))
	}
	layers := []*imageLayer{{diffID: v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}}}
	f.Fuzz(func(t *testing.T, raw []byte) {
		source, err := v1.ParseConfigFile(bytes.NewReader(raw))
		if err != nil {
			return
		}
		b, err := bootConfig(raw, source, layers)
		if err != nil {
			return
		}
		made, err := v1.ParseConfigFile(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		want := append([]string{bootimage.BootPath}, source.Config.Entrypoint...)
		if _, ok := made.Config.Volumes[bootimage.WritablePath]; !ok || !slices.Equal(made.Config.Entrypoint, want) || len(made.RootFS.DiffIDs) != 1 {
			t.Errorf("%s becomes %s", raw, b)
		}
	})
}

func BenchmarkBootImage(b *testing.B) {
	var lines []string
	for i := range 2000 {
		lines = append(lines, fmt.Sprintf("/usr/bin/tool%d 755 = x", i))
	}
	in := testInput(b, testTree(b, lines...), `{"os":"linux"}`)
	for b.Loop() {
		must(BootImage(in))(b)
	}
}

func BenchmarkNewBootLayer(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	boot := make([]byte, 10<<20)
	for i := range boot {
		boot[i] = byte(r.Uint32() >> (r.Uint32() % 8 * 4))
	}
	for b.Loop() {
		must(NewBootLayer(boot))(b)
	}
}

// TestBootLayer reads a stored layer back.
func TestBootLayer(t *testing.T) {
	want := must(NewBootLayer(testBoot(t)))(t)
	got := must(OpenBootLayer(want.Bytes(), want.DiffID()))(t)
	if !bytes.Equal(got.head, want.head) || got.layer.digest != want.layer.digest || got.layer.diffID != want.layer.diffID || !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("got %s of %s, want %s of %s", got.layer.digest, got.layer.diffID, want.layer.digest, want.layer.diffID)
	}
	for n := range 64 {
		if _, err := OpenBootLayer(want.Bytes()[:n], want.DiffID()); err == nil {
			t.Errorf("%d of %d bytes: no error", n, len(want.Bytes()))
		}
	}
	for _, id := range []string{"", "sha256:", want.DiffID()[:70], "sha256:" + strings.Repeat("x", 64)} {
		if _, err := OpenBootLayer(want.Bytes(), id); err == nil {
			t.Errorf("DiffID %q: no error", id)
		}
	}
}
