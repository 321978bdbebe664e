package convert

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/convcache"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// stack makes random layers one upon the other.
type stack struct {
	rng  *rand.Rand
	live map[string]bool // regular files of the layers so far
	tars [][]byte
}

func newStack(seed uint64) *stack {
	return &stack{rng: rand.New(rand.NewPCG(seed, 9)), live: map[string]bool{}}
}

// push adds a layer of n entries: files of all sizes that are treated
// differently, links within it and to layers below, whiteouts, opaque
// directories.
func (s *stack) push(t testing.TB, n int) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[string]bool{}
	own := map[string]bool{}
	hidden := map[string]bool{}
	for range n {
		dir := fmt.Sprintf("d%d/", s.rng.IntN(4))
		if s.rng.IntN(2) == 0 {
			dir += fmt.Sprintf("e%d/", s.rng.IntN(3))
		}
		name := dir + fmt.Sprintf("f%d", s.rng.IntN(3*n))
		if seen[name] {
			continue
		}
		seen[name] = true
		switch k := s.rng.IntN(12); {
		case k == 0:
			write(tar.Header{Typeflag: tar.TypeReg, Name: strings.Replace(name, "/f", "/.wh.f", 1)}, nil)
			hidden[name] = true
		case k == 1 && s.rng.IntN(4) == 0:
			write(tar.Header{Typeflag: tar.TypeReg, Name: dir + ".wh..wh..opq"}, nil)
			for p := range s.live {
				if strings.HasPrefix(p, dir) {
					hidden[p] = true
				}
			}
		case k == 2:
			write(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: "nowhere"}, nil)
			hidden[name] = true
		case k == 3 && len(own) > 0:
			to := slices.Sorted(maps.Keys(own))
			write(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to[s.rng.IntN(len(to))]}, nil)
			own[name] = true
		case k == 4 && len(s.live) > 0:
			to := slices.Sorted(maps.Keys(s.live))
			if p := to[s.rng.IntN(len(to))]; !seen[p] && !hidden[p] {
				write(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: p}, nil)
				own[name] = true
			}
		case k == 5:
			data := make([]byte, 3<<20)
			copy(data[s.rng.IntN(2<<20):], sample(s.rng.Uint64(), 5000))
			write(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data)
			own[name] = true
		default:
			sizes := []int{0, 1, 500, 4096, 9000, 32<<10 - 1, 32 << 10, 70_000, 300_000}
			write(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Uid: s.rng.IntN(3)}, sample(s.rng.Uint64(), sizes[s.rng.IntN(len(sizes))]))
			own[name] = true
		}
	}
	// What the start set and the boot image need of a source is in the lowest.
	if len(s.tars) == 0 {
		write(tar.Header{Typeflag: tar.TypeReg, Name: "bin/app", Mode: 0o755}, append([]byte("#!/bin/sh -e\n"), sample(7, 200_000)...))
		write(tar.Header{Typeflag: tar.TypeReg, Name: "bin/sh", Mode: 0o755}, sample(8, 100_000))
		write(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/:/bin/sh\n"))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(s.live, func(p string, _ bool) bool { return hidden[p] })
	maps.Copy(s.live, own)
	s.tars = append(s.tars, b.Bytes())
}

// imageOf makes an image of plain tars.
func imageOf(t testing.TB, tars ...[]byte) v1.Image {
	t.Helper()
	img := sourceImage(t, "amd64")
	for _, b := range tars {
		l, err := mutate.AppendLayers(empty.Image, zstdLayer{static.NewLayer(b, types.OCIUncompressedLayer), b})
		if err != nil {
			t.Fatal(err)
		}
		list, err := l.Layers()
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, list...); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// copyDir returns a copy of a layout.
func copyDir(t testing.TB, r transport.Ref) transport.Ref {
	t.Helper()
	to := ociRef(t)
	if err := os.CopyFS(to.Path, os.DirFS(r.Path)); err != nil {
		t.Fatal(err)
	}
	to.Name = r.Name
	return to
}

// TestCacheEqual converts random images with the layers of earlier ones, over
// the earlier image and into a loose store, with a cache and without: every
// byte of the result is the same.
func TestCacheEqual(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			s := newStack(seed)
			for range 3 {
				s.push(t, 25)
			}
			dir := t.TempDir()
			cache := []CachePlace{{Dir: dir}}
			store := filepath.Join(t.TempDir(), "castr")
			first := writeLayout(t, imageOf(t, s.tars...))
			packs := ociRef(t)
			want := convertTo(t, first, packs, nil)
			got := convertTo(t, first, ociRef(t), func(o *Options) { o.CacheTo = cache })
			if got.Digest != want.Digest {
				t.Fatalf("with --cache-to %s, without %s", got.Digest, want.Digest)
			}
			convertTo(t, first, ociRef(t), func(o *Options) { o.Store = store })

			for step := range 4 {
				keep := s.rng.IntN(len(s.tars) + 1)
				next := &stack{rng: s.rng, live: maps.Clone(s.live), tars: slices.Clone(s.tars[:keep])}
				if keep < len(s.tars) {
					next.live = map[string]bool{} // links below would have to be known
				}
				for range 1 + s.rng.IntN(2) {
					next.push(t, 1+s.rng.IntN(20))
				}
				if step == 3 {
					next.tars = slices.Concat(next.tars, next.tars[:1]) // a layer twice
				}
				src := writeLayout(t, imageOf(t, next.tars...))
				with, without := copyDir(t, packs), copyDir(t, packs)
				use := func(o *Options) { o.CacheFrom, o.CacheTo = cache, cache }
				got := convertTo(t, src, with, use)
				want := convertTo(t, src, without, nil)
				if got.Digest != want.Digest || !maps.Equal(blobs(t, with.Path), blobs(t, without.Path)) {
					t.Errorf("image %d: packs: with a cache %s, without %s", step, got.Digest, want.Digest)
				}
				// Where upper layers are gone, or one comes again, files show that no image had.
				if p := got.Platforms[0]; step < 3 && keep == len(s.tars) && p.CachedLayers < keep {
					t.Errorf("image %d: %d layers of the cache, want %d", step, p.CachedLayers, keep)
				}
				got = convertTo(t, src, ociRef(t), func(o *Options) { use(o); o.Store = store })
				g := got.Platforms[0]
				want = convertTo(t, src, ociRef(t), func(o *Options) { o.Store = store })
				w := want.Platforms[0]
				// A record may tell of a chunk as a pack has it, which is compressed thoroughly.
				if got.Digest != want.Digest || g.StoredBytes > w.StoredBytes || g.Distinct != w.Distinct || g.Chunks != w.Chunks || g.ZeroChunks != w.ZeroChunks {
					t.Errorf("image %d: store: with a cache %s, without %s;\n%+v\n%+v", step, got.Digest, want.Digest, g, w)
				}
				if w.NewBytes != 0 {
					t.Errorf("image %d: the conversion with the cache left out %d bytes of chunks", step, w.NewBytes)
				}
				if step == 1 {
					s, packs = next, with
				}
			}
		})
	}
}

// sourceRegistry counts what is read of each blob.
type sourceRegistry struct {
	*countingRegistry
	mu   sync.Mutex
	read map[string]int64 // by digest; guarded by mu
}

func newSourceRegistry(t testing.TB) *sourceRegistry {
	r := &sourceRegistry{countingRegistry: newRegistry(t), read: map[string]int64{}}
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	r.host = strings.TrimPrefix(s.URL, "http://")
	return r
}

func (r *sourceRegistry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") {
		w = &countingWriter{w, r, q.URL.Path[strings.LastIndex(q.URL.Path, "/")+1:]}
	}
	r.countingRegistry.ServeHTTP(w, q)
}

type countingWriter struct {
	http.ResponseWriter
	r      *sourceRegistry
	digest string
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	w.r.read[w.digest] += int64(n)
	return n, err
}

// layersRead says how much was read of each layer of img since the last call.
func (r *sourceRegistry) layersRead(t testing.TB, img v1.Image) (read []int64) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		read = append(read, r.read[d.String()])
	}
	clear(r.read)
	return read
}

// push uploads an image.
func (r *sourceRegistry) push(t testing.TB, name string, img v1.Image) transport.Ref {
	t.Helper()
	ref := r.image(name)
	d, err := transport.OpenDestination(t.Context(), ref, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.Commit(t.Context(), []transport.PlatformImage{{Platform: v1.Platform{OS: "linux", Architecture: "amd64"}, Boot: img}}); err != nil {
		t.Fatal(err)
	}
	return ref
}

// lastLayer are two images that differ in a small layer at the top. It hides
// small files and adds some.
func lastLayer(t testing.TB) (first, second v1.Image, layers []entries) {
	one := wideLayer()
	maps.DeleteFunc(one, func(name string, _ []byte) bool { return name >= "data/file16" && name < "data/small" })
	other := entries{"lib/": nil, "lib/large": sample(5000, 900_000), "lib/small": []byte("small")}
	top := entries{"data/zmall": []byte("one"), "opt/app": sample(5001, 40_000)}
	changed := entries{"data/zmall": []byte("two"), "opt/app": sample(5002, 40_000), "data/.wh.small100": nil, "data/small2001": []byte("new"), "data/.wh.file03": nil}
	return sourceImage(t, "amd64", one, other, top), sourceImage(t, "amd64", one, other, changed), []entries{one, other, changed}
}

// TestCacheFetches wants only the layer that has changed to be read, and the
// same image as without a cache, wherever the cache and the chunks are.
func TestCacheFetches(t *testing.T) {
	first, second, layers := lastLayer(t)
	src := newSourceRegistry(t)
	dst := newRegistry(t)
	from, to := src.push(t, "app:1", first), src.push(t, "app:2", second)
	store := filepath.Join(t.TempDir(), "castr")
	local := t.TempDir()
	for name, tt := range map[string]struct {
		cache CachePlace
		store string
	}{
		"packs, directory":      {CachePlace{Dir: local}, ""},
		"packs, registry":       {CachePlace{Ref: dst.host + "/caches:app"}, ""},
		"packs, beside":         {CachePlace{Inline: true}, ""},
		"loose store, registry": {CachePlace{Ref: dst.host + "/caches:loose"}, store},
	} {
		t.Run(name, func(t *testing.T) {
			tag := strings.ReplaceAll(name, ", ", "-")
			image := dst.image("app:" + strings.ReplaceAll(tag, " ", "-"))
			plain := dst.image("plain:" + strings.ReplaceAll(tag, " ", "-"))
			convertTo(t, from, plain, func(o *Options) { o.Store = tt.store })
			convertTo(t, from, image, func(o *Options) { o.Store, o.CacheTo = tt.store, []CachePlace{tt.cache} })
			src.layersRead(t, second)

			r := convertTo(t, to, image, func(o *Options) {
				o.Store, o.CacheFrom, o.CacheTo = tt.store, []CachePlace{tt.cache}, []CachePlace{tt.cache}
			})
			read := src.layersRead(t, second)
			if read[0] != 0 || read[1] != 0 || read[2] == 0 {
				t.Errorf("read %d bytes of the layers, want some of the last only", read)
			}
			p := r.Platforms[0]
			if p.CachedLayers != 2 || p.CachedBytes != p.SourceBytes-read[2] {
				t.Errorf("%d layers with %d bytes are said to be cached, %d bytes in all", p.CachedLayers, p.CachedBytes, p.SourceBytes)
			}
			if tt.store == "" {
				wantRoot(t, image, layers...)
			}
			want := convertTo(t, to, plain, func(o *Options) { o.Store = tt.store })
			if w := want.Platforms[0]; w.IndexDigest != p.IndexDigest || tt.store != "" && (want.Digest != r.Digest || w.NewBytes != 0) {
				t.Errorf("without a cache:\n%+v\nwith one:\n%+v", w, p)
			}

			// Nothing has changed: nothing is read, and the digest stays.
			src.layersRead(t, second)
			again := convertTo(t, to, image, func(o *Options) { o.Store, o.CacheFrom = tt.store, []CachePlace{tt.cache} })
			if read := src.layersRead(t, second); slices.Max(read) != 0 || again.Digest != r.Digest {
				t.Errorf("the same image again: read %d, %s, want %s", read, again.Digest, r.Digest)
			}
		})
	}
}

// records changes the records in a directory.
func records(t testing.TB, dir string, change func(name string, b []byte) []byte) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil || len(list) == 0 {
		t.Fatalf("%d records: %v", len(list), err)
	}
	for _, e := range list {
		name := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if b = change(e.Name(), b); b == nil {
			err = os.Remove(name)
		} else {
			err = os.WriteFile(name, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// reseal changes what a record says and keeps it valid.
func reseal(t testing.TB, change func(r *convcache.Record)) func(string, []byte) []byte {
	return func(name string, b []byte) []byte {
		id := "sha256:" + strings.TrimPrefix(name, "layer-")
		r, err := convcache.Open(id, b)
		if err != nil {
			t.Fatal(err)
		}
		change(r)
		if b, err = r.Seal(id); err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// TestCacheFaults damages the cache, what it refers to and what it says. The
// image comes out as without it, and the next conversion has a good cache.
func TestCacheFaults(t *testing.T) {
	first, second, _ := lastLayer(t)
	from, to := writeLayout(t, first), writeLayout(t, second)
	packs := ociRef(t)
	dir := t.TempDir()
	convertTo(t, from, packs, func(o *Options) { o.CacheTo = []CachePlace{{Dir: dir}} })
	plain := copyDir(t, packs)
	want := convertTo(t, to, plain, nil)
	n := 0
	tests := map[string]struct {
		change func(cache string, dst *transport.Ref)
		cached int  // layers
		same   bool // the base is the same, so the image is
		log    string
	}{
		"none": {func(string, *transport.Ref) {}, 2, true, ""},
		"cut off": {func(cache string, _ *transport.Ref) {
			records(t, cache, func(_ string, b []byte) []byte { return b[:len(b)/2] })
		}, 0, true, "damaged"},
		"flipped": {func(cache string, _ *transport.Ref) {
			records(t, cache, func(_ string, b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}, 0, true, "damaged"},
		"another version": {func(cache string, _ *transport.Ref) {
			records(t, cache, func(_ string, b []byte) []byte { return bytes.Replace(b, []byte("record 1"), []byte("record 9"), 1) })
		}, 0, true, "it begins with"},
		"some missing": {func(cache string, _ *transport.Ref) {
			records(t, cache, func(_ string, b []byte) []byte {
				if n++; n%3 == 0 {
					return nil
				}
				return b
			})
		}, -1, true, ""},
		"no directory": {func(cache string, _ *transport.Ref) {
			if err := os.RemoveAll(cache); err != nil {
				t.Fatal(err)
			}
		}, 0, true, ""},
		"entries of no tar": {func(cache string, _ *transport.Ref) {
			records(t, cache, reseal(t, func(r *convcache.Record) { r.Entries = []byte{1, 0xff} }))
		}, 0, true, "no tar lists such an entry"},
		"no units": {func(cache string, _ *transport.Ref) {
			records(t, cache, reseal(t, func(r *convcache.Record) { r.Units = nil }))
		}, -1, true, "is read after all"},
		"units of other chunks": {func(cache string, _ *transport.Ref) {
			records(t, cache, reseal(t, func(r *convcache.Record) {
				for _, u := range r.Units {
					for k := range u.Chunks {
						u.Chunks[k].ID[0] ^= 1
					}
				}
			}))
		}, 0, true, "converting again without the cache"},
		"one wrong chunk": {func(cache string, _ *transport.Ref) {
			records(t, cache, reseal(t, func(r *convcache.Record) {
				if len(r.Units) > 0 {
					r.Units[len(r.Units)-1].Chunks[0].ID[0] ^= 1
				}
			}))
		}, 0, true, "converting again without the cache"},
		"entries of another layer": {func(cache string, _ *transport.Ref) {
			records(t, cache, reseal(t, func(r *convcache.Record) {
				l, err := layer.FromRecord("L", r.Entries, layer.Limits{}, func(int, *tree.Inode) io.ReaderAt { return bytes.NewReader(nil) })
				if err != nil {
					t.Fatal(err)
				}
				for i := range 1000 {
					if n := l.File(i); n != nil {
						n.MtimeSec++
					}
				}
				r.Entries, r.Units = l.Record(), nil
			}))
		}, 0, true, "is not of this layer"},
		"base gone": {func(_ string, dst *transport.Ref) { *dst = ociRef(t) }, 0, false, ""},
		"packs gone": {func(_ string, dst *transport.Ref) {
			*dst = copyDir(t, packs)
			removed := 0
			for name := range blobs(t, dst.Path) {
				if info, err := os.Stat(filepath.Join(dst.Path, name)); err == nil && info.Size() > 4<<20 {
					removed++
					if err := os.Remove(filepath.Join(dst.Path, name)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if removed == 0 {
				t.Fatal("no pack was removed")
			}
		}, -1, false, "is read after all"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cache := filepath.Join(t.TempDir(), "cache")
			if err := os.CopyFS(cache, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			dst := copyDir(t, packs)
			tt.change(cache, &dst)
			var log bytes.Buffer
			use := func(o *Options) {
				o.CacheFrom, o.CacheTo = []CachePlace{{Dir: cache}}, []CachePlace{{Dir: cache}}
				o.Log = slog.New(slog.NewTextHandler(&log, nil))
			}
			got := convertTo(t, to, dst, use)
			p := got.Platforms[0]
			if tt.cached >= 0 && p.CachedLayers != tt.cached {
				t.Errorf("%d layers of the cache, want %d:\n%s", p.CachedLayers, tt.cached, &log)
			}
			if p.IndexDigest != want.Platforms[0].IndexDigest || tt.same && got.Digest != want.Digest {
				t.Errorf("image %s with root %s, want %s with %s", got.Digest, p.IndexDigest, want.Digest, want.Platforms[0].IndexDigest)
			}
			if !strings.Contains(log.String(), tt.log) {
				t.Errorf("the log does not say %q:\n%s", tt.log, &log)
			}
			rootOf(t, dst) // all its chunks are there
			log.Reset()
			next := convertTo(t, to, dst, use)
			if next.Digest != got.Digest || next.Platforms[0].CachedLayers != 3 {
				t.Errorf("next time %s with %d layers of the cache, want %s with 3:\n%s", next.Digest, next.Platforms[0].CachedLayers, got.Digest, &log)
			}
		})
	}
}
