package e2e

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
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
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// reportOf converts with the command and returns its report, and how many bytes
// of blobs went to the registry.
func reportOf(t testing.TB, args ...string) (r convert.Report, sent int64) {
	t.Helper()
	before := w.proxy.sent.Load()
	cmd := w.command(append([]string{"-q", "--json", "--boot", w.boot}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("bootfs-convert %s: %v", strings.Join(args, " "), err)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	return r, w.proxy.sent.Load() - before
}

// openImage opens the one image that a reference of bootfs-convert names, until the
// test ends.
func openImage(t *testing.T, image string) *converted.Image {
	t.Helper()
	ref, err := transport.Parse(image, "")
	if err != nil {
		t.Fatal(err)
	}
	opened, err := converted.Open(t.Context(), ref, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, opened)
	return opened.Images[0]
}

// stored returns the stored length of each distinct chunk of an image.
func stored(t *testing.T, image string) map[index.ID]int64 {
	t.Helper()
	out := map[index.ID]int64{}
	img := openImage(t, image)
	for pos := range img.Index.Len() {
		c, err := img.Index.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		at, err := img.Locators.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		out[c.ID] = int64(at.Length)
	}
	return out
}

// TestIncrement pushes the next version of an image over the first one, then
// the same again, then the same with the time of every file changed.
func TestIncrement(t *testing.T) {
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	next, err := cache.PythonImageNext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	image := w.proxy.address + "/increment:latest"
	small := int64(64 << 10) // configurations and manifests
	reportOf(t, "oci:"+w.layout, image)
	had := stored(t, image)

	r, sent := reportOf(t, "oci:"+next, image)
	p := r.Platforms[0]
	var added int64
	for id, n := range stored(t, image) {
		if _, ok := had[id]; !ok {
			added += n
		}
	}
	t.Logf("next version: %d kB sent: %d of new chunks, %d for the start set, %d rewritten, the rest boot image; %d of %d packs reused, %d kB of %d not used",
		sent/1000, p.NewChunkBytes/1000, p.StartPackBytes/1000, p.RewrittenBytes/1000, p.BasePacks, p.Packs, p.UnusedBytes/1000, (p.StoredBytes+p.UnusedBytes)/1000)
	if p.BasePacks == 0 || p.NewBytes != p.NewChunkBytes+p.StartPackBytes+p.RewrittenBytes || p.CopiedBytes != 0 {
		t.Errorf("%+v", p)
	}
	if got := sent - p.BootBytes - p.StartPackBytes - p.RewrittenBytes; float64(got) > 1.05*float64(added)+float64(small) {
		t.Errorf("%d bytes sent for new chunks of %d", got, added)
	}
	if added > p.StoredBytes/4 {
		t.Errorf("%d of %d stored bytes are new: this test shows nothing", added, p.StoredBytes)
	}
	if out, err := w.command("check", "-q", "oci:"+next, image).CombinedOutput(); err != nil {
		t.Errorf("check: %v\n%s", err, out)
	}
	if r := run(t, image, "python3", "-c", "import yaml, numpy; print(yaml.safe_load('[1, 2]'))"); r.code != 0 || r.stdout != "[1, 2]\n" {
		t.Errorf("exit %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}

	again, sent := reportOf(t, "oci:"+next, image)
	if a := again.Platforms[0]; again.Digest != r.Digest || a.NewBytes != 0 || sent != 0 {
		t.Errorf("unchanged: %s with %d bytes sent, was %s: %+v", again.Digest, sent, r.Digest, a)
	}

	// In another repository the registry links the packs.
	other, sent := reportOf(t, "--base", image, "oci:"+next, w.proxy.address+"/increment-elsewhere:latest")
	if o := other.Platforms[0]; o.BasePacks != o.Packs || o.NewBytes+o.CopiedBytes != 0 || sent > o.BootBytes+small {
		t.Errorf("in another repository: %d bytes sent: %+v", sent, o)
	}

	touched := touch(t, next)
	r, sent = reportOf(t, "oci:"+touched, image)
	p = r.Platforms[0]
	t.Logf("times changed: %d kB of chunks written of %d kB of metadata, %d kB sent in %.1f s", p.NewBytes/1000, metaBytes(t, image)/1000, sent/1000, r.Seconds)
	if p.NewBytes == 0 || p.NewBytes > metaBytes(t, image) || p.NewBytes != p.NewChunkBytes {
		t.Errorf("times changed: %+v", p)
	}
}

func metaBytes(t *testing.T, image string) int64 {
	t.Helper()
	out, err := w.command("inspect", "--json", image).Output()
	if err != nil {
		t.Fatal(err)
	}
	var i struct{ Platforms []struct{ MetaBytes int64 } }
	if err := json.Unmarshal(out, &i); err != nil {
		t.Fatal(err)
	}
	return i.Platforms[0].MetaBytes
}

// touch returns a layout of the image in dir whose files are all a day younger.
func touch(t *testing.T, dir string) string {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	from, err := layout.ImageIndexFromPath(dir)
	check(err)
	m, err := from.IndexManifest()
	check(err)
	old, err := from.Image(m.Manifests[0].Digest)
	check(err)
	config, err := old.ConfigFile()
	check(err)
	layers, err := old.Layers()
	check(err)
	config = config.DeepCopy()
	config.RootFS.DiffIDs, config.History = nil, nil
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), config)
	check(err)
	for i, l := range layers {
		path := filepath.Join(t.TempDir(), fmt.Sprint(i))
		check(touchLayer(path, l))
		l, err := tarball.LayerFromFile(path, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(1))
		check(err)
		img, err = mutate.AppendLayers(img, l)
		check(err)
	}
	out := t.TempDir()
	p, err := layout.Write(out, empty.Index)
	check(err)
	check(p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": testenv.Tag})))
	return out
}

func touchLayer(path string, l v1.Layer) error {
	in, err := l.Uncompressed()
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r, out := tar.NewReader(in), tar.NewWriter(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return out.Close()
		}
		if err != nil {
			return err
		}
		h.ModTime = h.ModTime.Add(24 * time.Hour)
		delete(h.PAXRecords, "mtime") // it would win
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(out, r); err != nil {
			return err
		}
	}
}

// TestIncrementsAtOnce replaces one tag by two versions at the same time.
func TestIncrementsAtOnce(t *testing.T) {
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	next, err := cache.PythonImageNext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	image := w.proxy.address + "/at-once:latest"
	reportOf(t, "oci:"+w.layout, image)
	var both []*exec.Cmd
	for _, src := range []string{w.layout, next} {
		cmd := w.command("-q", "--boot", w.boot, "oci:"+src, image)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		both = append(both, cmd)
	}
	for _, cmd := range both {
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", cmd, err)
		}
	}
	whole := 0
	for _, src := range []string{w.layout, next} {
		if w.command("check", "-q", "oci:"+src, image).Run() == nil {
			whole++
		}
	}
	if whole != 1 {
		t.Errorf("the tag has %d of the two versions, whole", whole)
	}
}
