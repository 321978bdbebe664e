package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// realRegistry starts Debian's docker-registry and returns its address.
func realRegistry(t *testing.T) string {
	t.Helper()
	r, err := testenv.StartRegistry(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r.Address
}

// memoryRegistry serves a registry that knows the referrers API, and counts the
// bytes that it gets.
func memoryRegistry(t *testing.T) (address string, received *atomic.Int64) {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true))
	received = &atomic.Int64{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		received.Add(max(0, r.ContentLength))
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), received
}

// bootfs runs the command and returns what it wrote to stdout.
func bootfs(t *testing.T, args ...string) string {
	t.Helper()
	cmd := command(t, t.TempDir(), append([]string{"-q"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

func reference(t *testing.T, s string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func digestAt(t *testing.T, ref string) v1.Hash {
	t.Helper()
	d, err := remote.Get(reference(t, ref))
	if err != nil {
		t.Fatal(err)
	}
	return d.Digest
}

// artifact is an image as cosign and ORAS make them: one blob, and perhaps a
// subject.
func artifact(t *testing.T, content string, subject *v1.Descriptor) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.oci.empty.v1+json")
	img, err := mutate.AppendLayers(img, static.NewLayer([]byte(content), "application/vnd.dev.cosign.simplesigning.v1+json"))
	if err != nil {
		t.Fatal(err)
	}
	if subject != nil {
		img = mutate.Subject(img, *subject).(v1.Image)
	}
	return img
}

// sign attaches to a manifest a signature under cosign's tag, a referrer, and
// a referrer of that one; it returns their digests.
func sign(t *testing.T, repo string, m v1.Descriptor) []string {
	t.Helper()
	push := func(tag string, img v1.Image) v1.Descriptor {
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		ref := repo + "@" + d.String()
		if tag != "" {
			ref = repo + ":" + tag
		}
		if err := remote.Write(reference(t, ref), img); err != nil {
			t.Fatal(err)
		}
		size, err := img.Size()
		if err != nil {
			t.Fatal(err)
		}
		return v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: d, Size: size}
	}
	bare := v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size}
	a := push("sha256-"+m.Digest.Hex+".sig", artifact(t, "signature of "+m.Digest.Hex, nil))
	b := push("", artifact(t, "SBOM of "+m.Digest.Hex, &bare))
	c := push("", artifact(t, "signature of "+b.Digest.Hex, &b))
	return []string{a.Digest.String(), b.Digest.String(), c.Digest.String()}
}

// wantSigned looks for what sign made, as tools would.
func wantSigned(t *testing.T, repo string, m v1.Descriptor, made []string) {
	t.Helper()
	if got := digestAt(t, repo+":sha256-"+m.Digest.Hex+".sig").String(); got != made[0] {
		t.Errorf("%s: signature %s, want %s", repo, got, made[0])
	}
	for i, subject := range []string{m.Digest.String(), made[1]} {
		list, err := remote.Referrers(reference(t, repo+"@"+subject).(name.Digest))
		if err != nil {
			t.Fatal(err)
		}
		index, err := list.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		if len(index.Manifests) != 1 || index.Manifests[0].Digest.String() != made[i+1] {
			t.Errorf("%s: referrers of %s: %+v, want %s", repo, subject, index.Manifests, made[i+1])
			continue
		}
		img, err := remote.Image(reference(t, repo+"@"+made[i+1]))
		if err != nil {
			t.Fatal(err)
		}
		layers, err := img.Layers()
		if err != nil || len(layers) != 1 {
			t.Fatalf("%d layers, %v", len(layers), err)
		}
		rc, err := layers[0].Compressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		if err != nil || len(b) < 64 {
			t.Errorf("%s: %q, %v", made[i+1], b, err)
		}
	}
}

// TestCopy takes an image through registries of two kinds, a layout and an
// archive: digests, packs and signatures stay, and what is there is not sent.
func TestCopy(t *testing.T) {
	src := layoutOf(t, layerOf(t, 12<<20, 4))
	first, _ := memoryRegistry(t)
	last, received := memoryRegistry(t)
	app := first + "/team/app"
	bootfs(t, "--boot", "/bin/true", src, app+":1")
	index, err := remote.Index(reference(t, app+":1"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	digest := digestAt(t, app+":1")
	size, err := index.Size()
	if err != nil {
		t.Fatal(err)
	}
	subjects := []v1.Descriptor{{MediaType: types.OCIImageIndex, Digest: digest, Size: size}}
	for _, m := range list.Manifests {
		subjects = append(subjects, v1.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size})
	}
	signs := make([][]string, len(subjects))
	for i, s := range subjects {
		signs[i] = sign(t, app, s)
	}

	real := realRegistry(t)
	layout, archive := "oci:"+filepath.Join(t.TempDir(), "x")+":1", "oci-archive:"+filepath.Join(t.TempDir(), "x.tar")+":1"
	way := []string{app + ":1", real + "/a/b:1", layout, real + "/c:1", archive, last + "/d/e:1"}
	for i := range len(way) - 1 {
		var r copied
		if err := json.Unmarshal([]byte(bootfs(t, "copy", "--json", way[i], way[i+1])), &r); err != nil {
			t.Fatal(err)
		}
		if r.Digest != digest.String() || r.Rewritten || len(r.Signatures) != 3*len(subjects) {
			t.Errorf("%s: %+v", way[i+1], r)
		}
		rootOf(t, way[i+1])
	}
	for _, repo := range []string{real + "/a/b", real + "/c", last + "/d/e"} {
		if got := digestAt(t, repo+":1"); got != digest {
			t.Errorf("%s: %s, want %s", repo, got, digest)
		}
		for i, s := range subjects {
			wantSigned(t, repo, s, signs[i])
		}
	}
	before := received.Load()
	var r copied
	if err := json.Unmarshal([]byte(bootfs(t, "copy", "--json", way[4], last+"/d/e:2")), &r); err != nil {
		t.Fatal(err)
	}
	if r.SentBytes != 0 || received.Load()-before > 64<<10 {
		t.Errorf("what was there was sent again: %+v, %d bytes", r, received.Load()-before)
	}
	// Within a registry blobs are not sent, nor read.
	if err := json.Unmarshal([]byte(bootfs(t, "copy", "--json", real+"/a/b:1", real+"/mounted:1")), &r); err != nil {
		t.Fatal(err)
	}
	if r.SentBytes != 0 || r.ReusedBytes < 10<<20 {
		t.Errorf("within a registry: %+v", r)
	}
	if !slices.ContainsFunc(r.Hints, func(h string) bool { return strings.Contains(h, "BLOB_STORE=registry://"+real+"/mounted") }) {
		t.Errorf("hints %q", r.Hints)
	}
}

// TestCopyRewritten gives an image the address of its new place: the same as
// if it had been converted there.
func TestCopyRewritten(t *testing.T) {
	src := layoutOf(t, layerOf(t, 2<<20, 5))
	first, second := realRegistry(t), realRegistry(t)
	bootfs(t, "--boot", "/bin/true", src, first+"/app:1")
	bootfs(t, "--boot", "/bin/true", "--base", "none", src, second+"/app:direct")
	out := bootfs(t, "copy", "--rewrite-store", first+"/app:1", second+"/app:1")
	if !strings.Contains(out, "sign it again") || strings.Contains(out, "BLOB_STORE") {
		t.Errorf("copy says %q", out)
	}
	if got, want := digestAt(t, second+"/app:1"), digestAt(t, second+"/app:direct"); got != want {
		t.Errorf("rewritten %s, converted %s", got, want)
	}
	if out := bootfs(t, "inspect", second+"/app:1"); !strings.Contains(out, "registry://"+second+"/app") || strings.Contains(out, first) {
		t.Errorf("inspect: %s", out)
	}
	bootfs(t, "copy", "--rewrite-store=registry://mirror.example.com/app", first+"/app:1", "oci:"+filepath.Join(t.TempDir(), "x"))
	for args, want := range map[string]string{
		"--rewrite-store " + first + "/app:1 oci:" + t.TempDir() + "/x":           "give the address",
		"--rewrite-store=ftp://x " + first + "/app:1 " + first + "/app:2":         "want a directory",
		first + "/app:1 docker-archive:" + t.TempDir() + "/x":                     "copy works between",
		"--platform linux/amd64 " + first + "/app:1 " + first + "/app:2":          "all its platforms",
		src + " " + first + "/app:2":                                              "skopeo copy --all",
		"--rewrite-store=" + t.TempDir() + " " + first + "/app:0 " + first + "/x": "has no image",
	} {
		cmd := command(t, t.TempDir(), append([]string{"-q", "copy"}, strings.Fields(args)...)...)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("copy %s: %v, %s, want an error with %q", args, err, out, want)
		}
	}
}

// TestCopyPacksElsewhere copies an image whose packs lie in a repository of
// their own, and one whose chunks are single files.
func TestCopyPacksElsewhere(t *testing.T) {
	src := layoutOf(t, layerOf(t, 12<<20, 6))
	first, second := realRegistry(t), realRegistry(t)
	bootfs(t, "--boot", "/bin/true", "--store", "registry://"+first+"/packs", src, first+"/app:1")
	layout := "oci:" + filepath.Join(t.TempDir(), "x")
	bootfs(t, "copy", first+"/app:1", layout)
	out := bootfs(t, "copy", layout, second+"/app:1")
	if !strings.Contains(out, "BLOB_STORE=registry://"+second+"/app") {
		t.Errorf("copy says %q", out)
	}
	if got, want := digestAt(t, second+"/app:1"), digestAt(t, first+"/app:1"); got != want {
		t.Errorf("digest %s, want %s", got, want)
	}
	tags := func(repo string) (out []string) {
		r, err := name.NewRepository(repo)
		if err != nil {
			t.Fatal(err)
		}
		all, err := remote.List(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			if strings.HasPrefix(s, "packs-") {
				out = append(out, s+" "+digestAt(t, repo+":"+s).String())
			}
		}
		return out
	}
	if got, want := tags(second+"/app"), tags(first+"/packs"); fmt.Sprint(got) != fmt.Sprint(want) || len(got) != 1 {
		t.Errorf("tags of packs %q, want %q", got, want)
	}
	cmd := command(t, t.TempDir(), "-q", "verify", "--store", "registry://"+second+"/app", second+"/app:1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}

	store := t.TempDir()
	bootfs(t, "--boot", "/bin/true", "--store", store, src, first+"/loose:1")
	if out := bootfs(t, "copy", first+"/loose:1", second+"/loose:1"); !strings.Contains(out, "chunks stay where they are, in "+store) {
		t.Errorf("copy of an image with single chunks says %q", out)
	}
}

// TestCopyInterrupted kills copies: the destination is what it was, or whole.
func TestCopyInterrupted(t *testing.T) {
	older, newer := layoutOf(t, layerOf(t, 2<<20, 7)), layoutOf(t, layerOf(t, 20<<20, 8))
	first, second := realRegistry(t), realRegistry(t)
	bootfs(t, "--boot", "/bin/true", newer, first+"/app:1")
	bootfs(t, "--boot", "/bin/true", older, second+"/app:1")
	was, will := digestAt(t, second+"/app:1"), digestAt(t, first+"/app:1")
	tmp := t.TempDir()
	for i := range 6 {
		cmd := command(t, tmp, "-q", "copy", first+"/app:1", second+"/app:1")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * 40 * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		if got := digestAt(t, second+"/app:1"); got != was && got != will {
			t.Fatalf("after a kill: %s", got)
		}
		rootOf(t, second+"/app:1")
	}
	bootfs(t, "copy", first+"/app:1", second+"/app:1")
	if got := digestAt(t, second+"/app:1"); got != will {
		t.Errorf("digest %s, want %s", got, will)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
}

// TestCopyExitCodes tells faults of the source from those of the destination.
func TestCopyExitCodes(t *testing.T) {
	dir := t.TempDir()
	bootfs(t, "--boot", "/bin/true", layoutOf(t, layerOf(t, 1<<20, 9)), "oci:"+dir+":x")
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs {
		if info, err := os.Stat(b); err == nil && info.Size() > 500<<10 {
			if err := os.Truncate(b, info.Size()-1); err != nil { // the pack, or the boot binary
				t.Fatal(err)
			}
		}
	}
	registry, _ := memoryRegistry(t)
	for dst, want := range map[string]int{
		registry + "/app:1":                      exitSource,
		"oci:" + filepath.Join(t.TempDir(), "x"): exitSource,
		"127.0.0.1:1/app:1":                      exitDestination,
		"oci:/proc/self/fd":                      exitDestination,
		"docker-daemon:app":                      exitUsage,
	} {
		cmd := command(t, t.TempDir(), "-q", "copy", "oci:"+dir+":x", dst)
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != want {
			t.Errorf("copy to %s: exit code %d, want %d: %s", dst, cmd.ProcessState.ExitCode(), want, out)
		}
	}
}
