package e2e

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// sums prints the digest of every file in the image.
const sums = `find / -xdev -type f -not -path '/proc/*' -not -path '/etc/host*' -not -path /etc/resolv.conf -print0 | xargs -0 sha256sum`

// TestFlippedByte damages one chunk in the registry, reads every file of the
// image, and heals the chunk again.
func TestFlippedByte(t *testing.T) {
	source := sumsOf(docker(t, "run", "--rm", "--user", "root", w.source, "sh", "-c", sums).stdout)

	pack := packs(t)
	victim := pack[len(pack)-1]
	heal := flip(t, victim)
	id := start(t, "--user", "root", "--env", "BOOTFS_PREFETCH=none", w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })

	r := docker(t, "exec", id, "sh", "-c", sums)
	failed := strings.Count(r.stderr, "Input/output error")
	t.Logf("%d files read, %d refused", strings.Count(r.stdout, "\n"), failed)
	if failed == 0 {
		t.Error("no read of the damaged chunk failed")
	}
	converted := sumsOf(r.stdout)
	for file, sum := range converted {
		if source[file] != sum {
			t.Errorf("%s: sha256 %s, in the source image %s", file, sum, source[file])
		}
	}
	if got, want := len(converted)+failed, len(source); got != want {
		t.Errorf("%d files read or refused, the source image has %d", got, want)
	}
	eventually(t, "the log names the chunk and pack "+victim.Hex, func() bool {
		log := docker(t, "logs", id).stderr
		return strings.Contains(log, victim.Hex) && chunkName(log) != ""
	})

	heal()
	healed := docker(t, "exec", id, "sh", "-c", sums)
	if healed.code != 0 || !maps.Equal(sumsOf(healed.stdout), source) {
		t.Errorf("after healing: exit %d, %d files, want %d as in the source\n%.2000s", healed.code, strings.Count(healed.stdout, "\n"), len(source), healed.stderr)
	}
}

// coldRead starts a container that is up, and once letGo is called reads files
// that nobody has read before.
func coldRead(t *testing.T) (id string, letGo func()) {
	t.Helper()
	dir := t.TempDir()
	id = start(t, "--env", "BOOTFS_PREFETCH=none", "--volume", dir+":/signal", w.image, "sh", "-c",
		`echo up; until test -e /signal/go; do sleep 0.1; done; cat /usr/lib/python3/dist-packages/numpy/core/*.so | wc -c; echo done; sleep 600`)
	eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "up\n" })
	// The programs of the loop and of the pipe.
	docker(t, "exec", id, "sh", "-c", "test -e /; sleep 0; cat /dev/null | wc -c").want(t, "0\n")
	return id, func() {
		if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadGoesOnWhenTheNetworkIsBack(t *testing.T) {
	id, letGo := coldRead(t)
	release := w.proxy.hold(t)
	letGo()
	time.Sleep(3 * time.Second)
	if out := docker(t, "logs", id).stdout; out != "up\n" {
		t.Fatalf("the read did not wait for the network: %q", out)
	}
	release()
	eventually(t, "the read ends", func() bool { return strings.HasSuffix(docker(t, "logs", id).stdout, "\ndone\n") })
}

// TestStopWhileTheNetworkIsGone stops a container whose program waits for a
// chunk that does not come.
func TestStopWhileTheNetworkIsGone(t *testing.T) {
	id, letGo := coldRead(t)
	w.proxy.hold(t)
	letGo()
	eventually(t, "the reader waits", func() bool { return strings.Contains(docker(t, "top", id).stdout, "cat /usr/lib/python3") })
	const grace = 2
	began := time.Now()
	if r := docker(t, "stop", "--time", strconv.Itoa(grace), id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	if took := time.Since(began); took > grace*time.Second+endsWithin {
		t.Errorf("docker stop took %v of its grace of %d s", took, grace)
	}
	docker(t, "inspect", "--format", "{{.State.ExitCode}}", id).want(t, "137\n")
}

// sumsOf reads the output of sha256sum.
func sumsOf(out string) map[string]string {
	m := make(map[string]string)
	for line := range strings.Lines(out) {
		if sum, file, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  "); ok {
			m[file] = sum
		}
	}
	return m
}

// chunkName finds the first name of a chunk in a log: 64 hex digits that no
// "sha256:" precedes.
func chunkName(log string) string {
	for _, field := range strings.FieldsFunc(log, func(r rune) bool { return r == ' ' || r == '\n' || r == '"' || r == '=' || r == ',' }) {
		if len(field) == 64 && strings.Trim(field, "0123456789abcdef") == "" {
			return field
		}
	}
	return ""
}

// packs returns the digests of the packs of the converted image, in order.
func packs(t *testing.T) []v1.Hash {
	t.Helper()
	return packsOf(t, w.image)
}

func packsOf(t *testing.T, image string) []v1.Hash {
	t.Helper()
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range manifest.Manifests {
		if m.Platform.OS != "unknown" {
			continue
		}
		data, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		dm, err := data.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		var list []v1.Hash
		for _, l := range dm.Layers {
			list = append(list, l.Digest)
		}
		return list
	}
	t.Fatal("the index lists no data manifest")
	return nil
}

// blobFile is where the registry keeps a blob.
func blobFile(t *testing.T, blob v1.Hash) string {
	t.Helper()
	var path string
	err := filepath.WalkDir(w.registry.Dir, func(p string, d fs.DirEntry, err error) error {
		if filepath.Base(filepath.Dir(p)) == blob.Hex && filepath.Base(p) == "data" {
			path = p
		}
		return err
	})
	if err != nil || path == "" {
		t.Fatalf("blob %s in %s: %v", blob, w.registry.Dir, err)
	}
	return path
}

// flip inverts one bit in the middle of a blob on the registry's disk and
// returns what undoes it.
func flip(t *testing.T, blob v1.Hash) (heal func()) {
	t.Helper()
	path := blobFile(t, blob)
	invert := func() {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, info.Size()/2); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, info.Size()/2); err != nil {
			t.Fatal(err)
		}
	}
	invert()
	healed := false
	heal = func() {
		if !healed {
			invert()
			healed = true
		}
	}
	t.Cleanup(heal)
	return heal
}
