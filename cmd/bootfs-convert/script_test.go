package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"bootfs-convert": main})
}

// TestScript runs testdata/script. Beside testscript's own commands there are:
//
//	mkimage DIR ARCH[,ARCH] LAYERDIR...  an OCI layout with tag "src", a layer from each directory
//	mkdata FILE SIZE [SEED]              a file of bytes that compress to about half
//	registry                             starts a registry and sets $REGISTRY
//	flip GLOB OFFSET                     inverts a byte of the largest file that matches
//	fs …                                 chmod MODE FILE, chown UID:GID FILE, xattr NAME VALUE FILE, link OLD NEW, mknod NAME
//	waitfor FILE                         waits until FILE is there
func TestScript(t *testing.T) {
	for _, tool := range []string{"casync", "fsck.erofs", "skopeo", "mount", "umount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatal(err)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			// A real program for the machine stands in for the boot binary.
			e.Setenv("BOOT", "/bin/true")
			e.Setenv("ARCH", runtime.GOARCH)
			e.Setenv("TMPDIR", e.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"mkimage": mkimage, "mkdata": mkdata, "registry": startRegistry, "flip": flip, "fs": fsCommand, "waitfor": waitFor,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

func mkimage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: mkimage DIR ARCH[,ARCH] LAYERDIR...")
	}
	p, err := layout.Write(ts.MkAbs(args[0]), empty.Index)
	ts.Check(err)
	x := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	archs := strings.Split(args[1], ",")
	var img v1.Image
	for _, arch := range archs {
		img = mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		cf, err := img.ConfigFile()
		ts.Check(err)
		cf = cf.DeepCopy()
		cf.OS, cf.Architecture = "linux", arch
		cf.Config.Cmd = []string{"/bin/app"}
		img, err = mutate.ConfigFile(img, cf)
		ts.Check(err)
		for _, dir := range args[2:] {
			img, err = mutate.AppendLayers(img, static.NewLayer(tarDir(ts, ts.MkAbs(dir)), types.OCIUncompressedLayer))
			ts.Check(err)
		}
		x = mutate.AppendManifests(x, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	tag := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "src"})
	if len(archs) == 1 {
		ts.Check(p.AppendImage(img, tag))
	} else {
		ts.Check(p.AppendIndex(x, tag))
	}
}

// tarDir makes a layer of a directory, owned by root and with a fixed time.
func tarDir(ts *testscript.TestScript, dir string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	links := map[uint64]string{}
	ts.Check(filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		target, _ := os.Readlink(p)
		h, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		h.Name, _ = filepath.Rel(dir, p)
		h.ModTime, h.Format = time.Unix(1_700_000_000, 123_456_789), tar.FormatPAX
		h.Uname, h.Gname, h.Uid, h.Gid = "", "", int(st.Uid), int(st.Gid)
		h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
		if info.IsDir() {
			h.Name += "/"
		}
		if first, ok := links[st.Ino]; ok && st.Nlink > 1 && !info.IsDir() {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			links[st.Ino] = h.Name
		}
		names := make([]byte, 4096)
		n, err := unix.Llistxattr(p, names)
		if err != nil {
			return err
		}
		for _, name := range strings.Split(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
			value := make([]byte, 4096)
			if n, err := unix.Lgetxattr(p, name, value); err == nil && name != "" {
				if h.PAXRecords == nil {
					h.PAXRecords = map[string]string{}
				}
				h.PAXRecords["SCHILY.xattr."+name] = string(value[:n])
			}
		}
		if err := w.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
			return err
		}
		content, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	}))
	ts.Check(w.Close())
	return b.Bytes()
}

func mkdata(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: mkdata FILE SIZE [SEED]")
	}
	size, err := strconv.Atoi(args[1])
	ts.Check(err)
	seed := 1
	if len(args) > 2 {
		seed, err = strconv.Atoi(args[2])
		ts.Check(err)
	}
	ts.Check(os.MkdirAll(filepath.Dir(ts.MkAbs(args[0])), 0o755))
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), sample(uint64(seed), size), 0o755))
}

// sample returns n bytes that compress to about half, the same for a seed.
func sample(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint64()) & 0x2f
	}
	return b
}

func startRegistry(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(os.MkdirAll(ts.MkAbs("registry-blobs"), 0o755))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	s := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(ts.MkAbs("registry-blobs"))))}
	go s.Serve(l)
	ts.Defer(func() { s.Close() })
	ts.Setenv("REGISTRY", l.Addr().String())
}

func flip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip GLOB OFFSET")
	}
	files, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	var name string
	var largest int64 = -1
	for _, f := range files {
		info, err := os.Stat(f)
		ts.Check(err)
		if info.Size() > largest {
			name, largest = f, info.Size()
		}
	}
	off, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	ts.Check(err)
	_, err = f.WriteAt([]byte{^b[0]}, off)
	ts.Check(err)
}

func fsCommand(ts *testscript.TestScript, neg bool, args []string) {
	usage := func(n int) {
		if neg || len(args) != n {
			ts.Fatalf("usage: see TestScript")
		}
	}
	if len(args) == 0 {
		usage(1)
	}
	switch args[0] {
	case "chmod":
		usage(3)
		mode, err := strconv.ParseUint(args[1], 8, 32)
		ts.Check(err)
		ts.Check(unix.Chmod(ts.MkAbs(args[2]), uint32(mode)))
	case "chown":
		usage(3)
		var uid, gid int
		_, err := fmt.Sscanf(args[1], "%d:%d", &uid, &gid)
		ts.Check(err)
		ts.Check(os.Lchown(ts.MkAbs(args[2]), uid, gid))
	case "xattr":
		usage(4)
		ts.Check(unix.Lsetxattr(ts.MkAbs(args[3]), args[1], []byte(args[2]), 0))
	case "link":
		usage(3)
		ts.Check(os.Link(ts.MkAbs(args[1]), ts.MkAbs(args[2])))
	case "mknod":
		usage(2)
		ts.Check(unix.Mknod(ts.MkAbs(args[1]), unix.S_IFCHR|0o640, int(unix.Mkdev(1, 3))))
	default:
		ts.Fatalf("fs %s: see TestScript", args[0])
	}
}

func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(ts.MkAbs(args[0])); (err == nil) != neg {
			return
		}
	}
	ts.Fatalf("%s: waited 2 min", args[0])
}
