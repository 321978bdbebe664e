package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// countingRegistry is a registry that counts the bytes of blobs sent to it.
type countingRegistry struct {
	host   string
	inner  http.Handler
	sent   atomic.Int64
	mu     sync.Mutex
	absent map[string]bool // blobs that are not found; guarded by mu
}

func newRegistry(t testing.TB) *countingRegistry {
	r := &countingRegistry{inner: registry.New(registry.Logger(log.New(io.Discard, "", 0))), absent: map[string]bool{}}
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	r.host = strings.TrimPrefix(s.URL, "http://")
	return r
}

func (r *countingRegistry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if strings.Contains(q.URL.Path, "/blobs/") {
		r.mu.Lock()
		gone := q.Method != http.MethodPut && r.absent[q.URL.Path[strings.LastIndex(q.URL.Path, "/")+1:]]
		r.mu.Unlock()
		if gone {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		q.Body = &countingBody{q.Body, &r.sent}
	}
	r.inner.ServeHTTP(w, q)
}

func (r *countingRegistry) lose(digest string, lost bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.absent[digest] = lost
}

type countingBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *countingBody) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// image names a tag of the registry.
func (r *countingRegistry) image(name string) transport.Ref {
	return transport.Ref{Transport: transport.Registry, Name: r.host + "/" + name}
}

// plainImage makes a layout of an image whose one layer with files is neither
// compressed nor copied when it is read.
func plainImage(t testing.TB, files entries) transport.Ref {
	t.Helper()
	return writeLayout(t, sourceImage(t, "amd64", entries{}, entries{}, files)) // the third is plain
}

// wideLayer is a program, 60 files of half a megabyte and many small ones: some
// packs' worth.
func wideLayer() entries {
	return maps.Clone(wideFiles())
}

var wideFiles = sync.OnceValue(func() entries {
	out := entries{"bin/": nil, "bin/app": sample(1000, 700_000), "data/": nil}
	for i := range 60 {
		out[fmt.Sprintf("data/file%02d", i)] = sample(uint64(i), 600_000)
	}
	for i := range 400 {
		out[fmt.Sprintf("data/small%03d", i)] = sample(uint64(i), 10+i*97%9000)
	}
	return out
})

// secondVersion is wideLayer with a file replaced, one added, one removed and
// some small ones touched.
func secondVersion() entries {
	out := wideLayer()
	out["data/file07"] = sample(2007, 500_000)
	out["data/more"] = sample(2008, 200_000)
	delete(out, "data/file40")
	out["data/small100"] = []byte("changed")
	return out
}

// rootOf reads an image's root image through its chunks.
func rootOf(t testing.TB, ref transport.Ref) ([]byte, *converted.Image) {
	t.Helper()
	o, err := converted.Open(t.Context(), ref, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	img := o.Images[0]
	f, err := img.Spool(t.Context(), t.TempDir(), func(int64) {})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, img.Index.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		t.Fatal(err)
	}
	return b, img
}

// wantRoot compares an image's root with that of layers.
func wantRoot(t testing.TB, ref transport.Ref, layers ...entries) *converted.Image {
	t.Helper()
	got, img := rootOf(t, ref)
	if _, want := planOf(t, layers); !bytes.Equal(got, want) {
		t.Errorf("%s: the chunks do not give the root image", ref)
	}
	if err := img.Locators.Verify(); err != nil {
		t.Error(err)
	}
	return img
}

// TestIncrement converts a second version over the first one: the bytes that go
// to the registry are those of the new chunks, and the result is the same at
// any parallelism.
func TestIncrement(t *testing.T) {
	one, two := plainImage(t, wideLayer()), plainImage(t, secondVersion())
	canonical := convertTo(t, two, ociRef(t), nil).Platforms[0]
	base := ociRef(t)
	convertTo(t, one, base, nil)
	var files map[string]string
	for _, procs := range []int{1, 8} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		reg := newRegistry(t)
		dst := reg.image("app:latest")
		first := convertTo(t, one, dst, nil)
		p1 := first.Platforms[0]
		if p1.Base != "" || p1.Packs < 3 || p1.NewBytes != p1.StoredBytes || p1.NewBytes != p1.NewChunkBytes+p1.StartPackBytes {
			t.Fatalf("first version: %+v", p1)
		}
		before := reg.sent.Load()
		second := convertTo(t, two, dst, nil)
		sent := reg.sent.Load() - before
		p2 := second.Platforms[0]
		if p2.IndexDigest != canonical.IndexDigest || p2.StoredBytes > canonical.StoredBytes {
			t.Errorf("index %s with %d stored bytes, without a base %s with no more than %d", p2.IndexDigest, p2.StoredBytes, canonical.IndexDigest, canonical.StoredBytes)
		}
		if p2.Base != p1.BootDigest || p2.BasePacks != p1.Packs || p2.StartPackBytes != 0 || p2.RewrittenBytes != 0 || p2.NewBytes != p2.NewChunkBytes {
			t.Errorf("second version: %+v", p2)
		}
		// Two files of 700 kB, metadata and a group.
		if p2.NewBytes < 400_000 || p2.NewBytes > 600_000 {
			t.Errorf("%d bytes are new", p2.NewBytes)
		}
		if other := sent - p2.NewBytes; other < 0 || other > p2.BootBytes+10_000 {
			t.Errorf("%d bytes sent, %d of packs and %d of the boot image", sent, p2.NewBytes, p2.BootBytes)
		}
		img := wantRoot(t, dst, secondVersion())
		if img.Config.Base != p1.BootDigest {
			t.Errorf("base %q recorded, want %s", img.Config.Base, p1.BootDigest)
		}
		same := ociRef(t)
		convertTo(t, two, same, func(o *Options) { o.Base = &base })
		if files == nil {
			files = blobs(t, same.Path)
		}
		if !maps.Equal(blobs(t, same.Path), files) {
			t.Errorf("GOMAXPROCS=%d: another layout", procs)
		}

		// Once more: the same image, and not a byte of it sent.
		before = reg.sent.Load()
		again := convertTo(t, two, dst, nil)
		if p := again.Platforms[0]; again.Digest != second.Digest || p.NewBytes+p.CopiedBytes != 0 || p.BasePacks != p.Packs {
			t.Errorf("unchanged: %s with %+v, want %s", again.Digest, p, second.Digest)
		}
		if n := reg.sent.Load() - before; n != 0 {
			t.Errorf("unchanged: %d bytes sent", n)
		}
		// Without a base, and on top of a base by name.
		if r := convertTo(t, one, dst, func(o *Options) { o.Canonical = true }); r.Digest != first.Digest || r.Platforms[0].NewBytes != 0 {
			t.Errorf("canonical: %s, want %s; %+v", r.Digest, first.Digest, r.Platforms[0])
		}
		if r := convertTo(t, two, reg.image("app:other"), func(o *Options) { o.Base = &dst }); r.Digest != second.Digest {
			t.Errorf("on a base by name: %s, want %s", r.Digest, second.Digest)
		}
	}
}

// TestIncrementThoroughly: what a base lacks is compressed as well as can be, a
// canonical image is not.
func TestIncrementThoroughly(t *testing.T) {
	dst := ociRef(t)
	files := wideLayer()
	convertTo(t, plainImage(t, files), dst, nil)
	_, before := rootOf(t, dst)
	known, err := before.Chunks(false)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	files["data/program"] = program[:2<<20]
	source := plainImage(t, files)
	for _, canonical := range []bool{false, true} {
		convertTo(t, source, dst, func(o *Options) { o.Canonical = canonical })
		root, img := rootOf(t, dst)
		chunks, err := img.Chunks(false)
		if err != nil {
			t.Fatal(err)
		}
		quick, thorough := 0, 0
		for _, c := range chunks {
			got, err := img.StoredBytes(c)
			if err != nil {
				t.Fatal(err)
			}
			plain := root[c.Offset : c.Offset+int64(c.Size)]
			want := chunkstore.Encode(nil, plain)
			if !canonical && !slices.ContainsFunc(known, func(k index.Chunk) bool { return k.ID == c.ID }) {
				quick += len(want)
				want = chunkstore.EncodeThoroughly(nil, plain)
				thorough += len(want)
			}
			if got != int64(len(want)) {
				t.Errorf("canonical %v: the chunk at %d has %d stored bytes, want %d", canonical, c.Offset, got, len(want))
			}
		}
		if !canonical && thorough >= quick {
			t.Errorf("the new chunks have %d bytes, and %d without the effort", thorough, quick)
		}
	}
}

// TestIncrementMtimes changes the time of every file and nothing else: only
// metadata is stored.
func TestIncrementMtimes(t *testing.T) {
	reg := newRegistry(t)
	dst := reg.image("app:latest")
	files := wideLayer()
	first := convertTo(t, plainImage(t, files), dst, nil).Platforms[0]
	mtime = mtime.AddDate(1, 0, 0)
	defer func() { mtime = mtime.AddDate(-1, 0, 0) }()
	p := convertTo(t, plainImage(t, files), dst, nil).Platforms[0]
	plan, _ := planOf(t, []entries{files})
	if p.IndexDigest == first.IndexDigest {
		t.Fatal("the times make no difference")
	}
	if p.NewBytes == 0 || p.NewBytes > int64(len(plan.Meta())) || p.StartPackBytes+p.RewrittenBytes+p.CopiedBytes != 0 {
		t.Errorf("%d bytes written, the metadata has %d: %+v", p.NewBytes, len(plan.Meta()), p)
	}
	wantRoot(t, dst, files)
}

// TestIncrementPlaces takes the base from one place to another: its packs are
// copied, and the digests follow the base alone.
func TestIncrementPlaces(t *testing.T) {
	one, two := plainImage(t, wideLayer()), plainImage(t, secondVersion())
	reg := newRegistry(t)
	archive := transport.Ref{Transport: transport.OCIArchive, Path: filepath.Join(t.TempDir(), "x.tar"), Name: "dst"}
	bases := []transport.Ref{ociRef(t), archive, reg.image("base:1")}
	var index, digest string
	for i, base := range bases {
		convertTo(t, one, base, nil)
		to := []transport.Ref{ociRef(t)}
		if i == 0 { // what an archive takes does not depend on where it comes from
			to = append(to, transport.Ref{Transport: transport.OCIArchive, Path: filepath.Join(t.TempDir(), "y.tar"), Name: "dst"})
		}
		for _, dst := range to {
			r := convertTo(t, two, dst, func(o *Options) { o.Base = &base })
			p := r.Platforms[0]
			if p.CopiedBytes == 0 || p.ReusedBytes != 0 || p.BasePacks < 3 || p.NewBytes != p.NewChunkBytes {
				t.Errorf("%s on %s: %+v", dst, base, p)
			}
			wantRoot(t, dst, secondVersion())
			if base.Transport == transport.Registry {
				continue // its boot image names the registry
			}
			if digest == "" {
				index, digest = p.IndexDigest, r.Digest
			}
			if p.IndexDigest != index || r.Digest != digest {
				t.Errorf("%s on %s: %s, want %s", dst, base, r.Digest, digest)
			}
		}
	}
	// Another repository of the registry. The name that is replaced is no base.
	other := reg.image("other:1")
	p := convertTo(t, two, other, func(o *Options) { o.Base = &bases[2] }).Platforms[0]
	if p.BasePacks < 3 || p.NewBytes != p.NewChunkBytes {
		t.Errorf("in another repository: %+v", p)
	}
	wantRoot(t, other, secondVersion())
	// An archive is written anew; what it was is the base.
	p = convertTo(t, two, archive, nil).Platforms[0]
	if p.BasePacks < 3 || p.CopiedBytes == 0 {
		t.Errorf("over an archive: %+v", p)
	}
	wantRoot(t, archive, secondVersion())
	// The same layout under another tag; without being told, nobody looks there.
	tag := bases[0]
	tag.Name = "two"
	p = convertTo(t, two, tag, func(o *Options) { o.Base = &bases[0] }).Platforms[0]
	if p.BasePacks < 3 || p.CopiedBytes != 0 || p.ReusedBytes == 0 {
		t.Errorf("in the same layout: %+v", p)
	}
	wantRoot(t, tag, secondVersion())
	wantRoot(t, bases[0], wideLayer())
}

// TestIncrementStore keeps the packs in a repository of their own.
func TestIncrementStore(t *testing.T) {
	reg := newRegistry(t)
	store := func(o *Options) { o.Store = "registry://" + reg.host + "/packs" }
	dst := transport.Ref{Transport: transport.DockerArchive, Path: filepath.Join(t.TempDir(), "x.tar"), Name: "x:y"}
	convertTo(t, plainImage(t, wideLayer()), dst, store)
	p := convertTo(t, plainImage(t, secondVersion()), dst, store).Platforms[0]
	if p.BasePacks < 3 || p.CopiedBytes != 0 || p.NewBytes != p.NewChunkBytes || p.NewBytes > 800_000 {
		t.Errorf("%+v", p)
	}
	wantRoot(t, dst, secondVersion())
}

// TestIncrementRewrites gives up a pack of which little is used, and the packs
// of a start set that has changed.
func TestIncrementRewrites(t *testing.T) {
	reg := newRegistry(t)
	dst := reg.image("app:latest")
	convertTo(t, plainImage(t, wideLayer()), dst, nil)
	files := wideLayer()
	for i := range 50 {
		delete(files, fmt.Sprintf("data/file%02d", i))
	}
	files["bin/app"] = sample(1001, 700_000)
	src := plainImage(t, files)
	base := dst
	p := convertTo(t, src, reg.image("app:half"), func(o *Options) { o.Base = &base }).Platforms[0]
	if p.StartPackBytes == 0 || p.RewrittenBytes == 0 || p.UnusedBytes >= p.StoredBytes || p.NewBytes != p.NewChunkBytes+p.StartPackBytes+p.RewrittenBytes {
		t.Errorf("%+v", p)
	}
	wantRoot(t, reg.image("app:half"), files)
	all := convertTo(t, src, reg.image("app:all"), func(o *Options) { o.Base, o.RewriteBelow = &base, 0.01 }).Platforms[0]
	if all.RewrittenBytes >= p.RewrittenBytes || all.BasePacks <= p.BasePacks || all.UnusedBytes <= p.UnusedBytes {
		t.Errorf("with a limit of a hundredth: %+v\nwith a half: %+v", all, p)
	}
	wantRoot(t, reg.image("app:all"), files)
	one := convertTo(t, src, reg.image("app:one"), func(o *Options) { o.Base, o.RewriteBelow = &base, 1 }).Platforms[0]
	if one.UnusedBytes != 0 {
		t.Errorf("with a limit of 1: %+v", one)
	}
}

// TestIncrementLostPack loses packs of the base, which the registry's garbage
// collection may have taken: they are stored again, and a warning says so.
func TestIncrementLostPack(t *testing.T) {
	one, two := plainImage(t, wideLayer()), plainImage(t, secondVersion())
	for _, lost := range []int{0, 1, -1} {
		reg := newRegistry(t)
		dst := reg.image("app:latest")
		convertTo(t, one, dst, nil)
		_, img := rootOf(t, dst)
		var said bytes.Buffer
		n := 0
		for i := range img.Locators.Packs() {
			if p, err := img.Locators.Pack(i); err != nil {
				t.Fatal(err)
			} else if i == lost || lost < 0 {
				reg.lose(p.Digest, true)
				n++
			}
		}
		p := convertTo(t, two, dst, func(o *Options) { o.Log = slog.New(slog.NewTextHandler(&said, nil)) }).Platforms[0]
		if p.BasePacks != img.Locators.Packs()-n || p.NewBytes != p.NewChunkBytes+p.StartPackBytes+p.RewrittenBytes {
			t.Errorf("lost %d: %+v", lost, p)
		}
		if got := strings.Count(said.String(), "a pack of the base is not used"); got != n {
			t.Errorf("lost %d: %d warnings for %d packs", lost, got, n)
		}
		clear(reg.absent)
		wantRoot(t, dst, secondVersion())
	}
}

// liar serves other bytes in the place of a pack.
type liar struct{ registrystore.Blobs }

func (l liar) Range(_ context.Context, _ string, _, n int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(make([]byte, n))), nil
}

// TestBaseLook wants the chunk that is looked at compared with its name, at one
// place after the other.
func TestBaseLook(t *testing.T) {
	dst := ociRef(t)
	convertTo(t, plainImage(t, wideLayer()), dst, nil)
	_, img := rootOf(t, dst)
	blobs := registrystore.NewLayoutBlobs(dst.Path)
	c, err := img.Index.At(0)
	if err != nil {
		t.Fatal(err)
	}
	at, err := img.Locators.At(0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := img.Locators.Pack(at.Pack)
	if err != nil {
		t.Fatal(err)
	}
	k := keptPack{PackDescriptor: d, probe: c}
	for _, tt := range []struct {
		places []place
		want   string
		err    string
	}{
		{[]place{{liar{blobs}, "liar"}, {blobs, "good"}}, "good", ""},
		{[]place{{liar{blobs}, "liar"}}, "", "corrupt"},
		{nil, "", "no place"},
	} {
		p, err := (&baseImage{places: tt.places}).look(t.Context(), k, at)
		if tt.err == "" && (err != nil || p.address != tt.want) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("got %+v, %v, want %q or an error with %q", p, err, tt.want, tt.err)
		}
	}
}

// TestBaseErrors names bases that cannot serve. What is only replaced is no
// error.
func TestBaseErrors(t *testing.T) {
	files := entries{"bin/app": sample(1, 100_000)}
	plain := plainImage(t, files)
	looseImage, arm := ociRef(t), ociRef(t)
	convertTo(t, plain, looseImage, func(o *Options) { o.Store = filepath.Join(t.TempDir(), "castr") })
	convertTo(t, writeLayout(t, sourceImage(t, "arm64", files)), arm, nil)
	for _, tt := range []struct {
		name string
		base transport.Ref
		want string
	}{
		{"not there", transport.Ref{Transport: transport.OCI, Path: "/no/such", Name: "x"}, "/no/such"},
		{"not converted", plainImage(t, files), "not an image that bootfs-convert made"},
		{"loose", looseImage, "loose store"},
		{"for another platform", arm, "linux/amd64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := Options{Source: plain, Destination: ociRef(t), Boot: boot, TempDir: t.TempDir(), Base: &tt.base}
			_, err := Run(t.Context(), o)
			var part *Error
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.As(err, &part) || part.Part != Source {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if _, err := os.Stat(o.Destination.Path); !os.IsNotExist(err) {
				t.Errorf("the destination is there: %v", err)
			}
			if tt.name != "not there" {
				convertTo(t, plain, tt.base, nil)
			}
		})
	}
	t.Run("with a loose store", func(t *testing.T) {
		_, err := Run(t.Context(), Options{Source: plain, Destination: ociRef(t), Boot: boot, TempDir: t.TempDir(), Base: &arm, Store: t.TempDir()})
		var part *Error
		if !errors.As(err, &part) || part.Part != Usage {
			t.Errorf("got %v", err)
		}
	})
	t.Run("one platform of two", func(t *testing.T) {
		dst := ociRef(t)
		base := ociRef(t)
		convertTo(t, plain, base, nil)
		r := convertTo(t, writeLayout(t, sourceImage(t, "amd64", files), sourceImage(t, "arm64", files)), dst, func(o *Options) { o.Base = &base })
		if a, b := r.Platforms[0], r.Platforms[1]; a.Base == "" || b.Base != "" || b.ReusedBytes+b.NewBytes != b.StoredBytes {
			t.Errorf("%+v\n%+v", a, b)
		}
	})
}

// TestConcurrentIncrements converts two versions over the same tag at once:
// both end, and whichever stays is whole.
func TestConcurrentIncrements(t *testing.T) {
	reg := newRegistry(t)
	dst := reg.image("app:latest")
	one, two := plainImage(t, wideLayer()), plainImage(t, secondVersion())
	convertTo(t, one, dst, nil)
	roots := map[string][]byte{}
	for range 3 {
		var wg sync.WaitGroup
		reports := make([]*Report, 2)
		for i, src := range []transport.Ref{one, two} {
			wg.Go(func() {
				r, err := Run(t.Context(), Options{Source: src, Destination: dst, Boot: boot, TempDir: t.TempDir()})
				if err != nil {
					t.Error(err)
				}
				reports[i] = r
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
		root, img := rootOf(t, dst)
		roots[img.Config.IndexDigest] = root
		if d := img.Config.IndexDigest; d != reports[0].Platforms[0].IndexDigest && d != reports[1].Platforms[0].IndexDigest {
			t.Errorf("the tag has neither of the two images")
		}
	}
	if len(roots) == 0 || len(roots) > 2 {
		t.Errorf("roots: %d", len(roots))
	}
}

// TestSourceChanges changes a plain layer, which is read where it lies, between
// the two passes.
func TestSourceChanges(t *testing.T) {
	files := wideLayer()
	src := plainImage(t, files)
	var layer string
	for name := range blobs(t, src.Path) {
		if info, err := os.Stat(filepath.Join(src.Path, name)); err != nil {
			t.Fatal(err)
		} else if info.Size() > 10<<20 {
			layer = filepath.Join(src.Path, name)
		}
	}
	base, dst := ociRef(t), ociRef(t)
	convertTo(t, writeLayout(t, sourceImage(t, "amd64", entries{"bin/app": sample(1, 100_000)})), base, nil)
	_, err := Run(t.Context(), Options{Source: src, Destination: dst, Boot: boot, TempDir: t.TempDir(), Base: &base, Progress: func(e Event) {
		if e.Phase == PhaseNames && e.End {
			f, err := os.OpenFile(layer, os.O_RDWR, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("other bytes"), 9<<20)
				f.Close()
			}
			if err != nil {
				t.Error(err)
			}
		}
	}})
	var part *Error
	if !errors.As(err, &part) || part.Part != Source || !strings.Contains(err.Error(), "changed while it was read") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dst.Path); !os.IsNotExist(err) {
		t.Errorf("the destination is there: %v", err)
	}
}

// BenchmarkNameImage cuts and names a root image of files of many sizes: all
// that an unchanged image costs beside reading its layers.
func BenchmarkNameImage(b *testing.B) {
	files := entries{"bin/": nil, "bin/app": sample(1, 1<<20)}
	for i := range 200 {
		files[fmt.Sprintf("big%03d", i)] = sample(uint64(i), 1<<20)
	}
	for i := range 5000 {
		files[fmt.Sprintf("small%04d", i)] = sample(uint64(i), 500+i*97%20000)
	}
	plan, _ := planOf(b, []entries{files})
	b.SetBytes(plan.Size())
	for b.Loop() {
		if _, err := nameImage(b.Context(), plan, startSet{}, nil, false, func(int64) {}); err != nil {
			b.Fatal(err)
		}
	}
}
