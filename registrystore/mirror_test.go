package registrystore

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/hosts"
)

// front is a registry with a view of what it is asked.
type front struct {
	host  string
	inner http.Handler // the registry

	mu  sync.Mutex // guards what follows
	log []*http.Request
	h   http.HandlerFunc // stands before the registry; nil passes on
}

func newFront(t testing.TB) *front {
	t.Helper()
	f := &front{inner: registry.New(registry.Logger(discardLog))}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			f.log = append(f.log, r)
		}
		h := f.h
		f.mu.Unlock()
		if h != nil {
			h(w, r)
		} else {
			f.inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	f.host = s.Listener.Addr().String()
	return f
}

// set replaces the registry's answers, nil by its own, and forgets what it was
// asked.
func (f *front) set(h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.h, f.log = h, nil
}

func (f *front) requests() []*http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*http.Request(nil), f.log...)
}

// fetcherAt reads the image through address and its mirrors.
func (im *image) fetcherAt(t testing.TB, address, mirrors string, o RemoteOptions) *chunkstore.Fetcher {
	t.Helper()
	var err error
	if o.Hosts, err = hosts.New(hosts.Options{Mirrors: mirrors}); err != nil {
		t.Fatal(err)
	}
	all, err := NewRemotes(address, o)
	if err != nil {
		t.Fatal(err)
	}
	var stores []chunkstore.Store
	for _, b := range all {
		stores = append(stores, NewStore(b, im.locators, im.index))
	}
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: stores})
	t.Cleanup(func() { f.Close() })
	return f
}

// chunks returns the chunks at positions lo to hi.
func (im *image) chunks(t testing.TB, lo, hi int) []index.Chunk {
	t.Helper()
	var cs []index.Chunk
	for pos := lo; pos < hi; pos++ {
		c, err := im.index.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		cs = append(cs, c)
	}
	return cs
}

func fetchAll(t testing.TB, f *chunkstore.Fetcher, cs []index.Chunk) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	n := 0
	if err := f.FetchBatch(ctx, cs, func(int, []byte) error { n++; return nil }); err != nil || n != len(cs) {
		t.Errorf("got %d of %d chunks, %v", n, len(cs), err)
	}
}

// TestMirror reads all from a mirror, which is told what it stands for.
func TestMirror(t *testing.T) {
	t.Parallel()
	im := newImage(t, 60)
	mirror := newFront(t)
	push(t, mirror.host, "team/app", im.packs)
	mirror.set(nil)
	// Nobody is at the registry itself.
	f := im.fetcherAt(t, "registry+http://gone.invalid:5000/team/app", "http://"+mirror.host, RemoteOptions{})
	fetchAll(t, f, im.chunks(t, 0, im.index.Len()))
	log := mirror.requests()
	if len(log) != len(im.packs) {
		t.Errorf("got %d requests for %d packs", len(log), len(im.packs))
	}
	for _, r := range log {
		if r.URL.Query().Get("ns") != "gone.invalid:5000" || !strings.HasPrefix(r.URL.Path, "/v2/team/app/blobs/") {
			t.Errorf("got %s", r.URL)
		}
	}
	names := f.Stats().Stores
	if len(names) != 2 || names[0].Name != "http://"+mirror.host+"/v2/team/app as a mirror of gone.invalid:5000" || names[1].Failures != 0 {
		t.Errorf("got %+v", names)
	}
}

// TestMirrorPath: a mirror with a path of its own; a login for it alone.
func TestMirrorPath(t *testing.T) {
	t.Parallel()
	im := newImage(t, 20)
	mirror := newFront(t)
	push(t, mirror.host, "proxy/app", im.packs)
	origin := newFront(t)
	keys := &keychain{origin.host, "joe", "s3cret"}
	mirror.set(nil)
	f := im.fetcherAt(t, "registry://"+origin.host+"/app", origin.host+"=http://"+mirror.host+"/v2/proxy", RemoteOptions{Keychain: keys})
	fetchAll(t, f, im.chunks(t, 0, im.index.Len()))
	if n := len(origin.requests()); n != 0 || len(mirror.requests()) == 0 {
		t.Errorf("the registry got %d requests, the mirror %d", n, len(mirror.requests()))
	}
	// Now the mirror wants a login: it gets none of the registry's.
	mirror.set(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Errorf("the mirror got %q", r.Header.Get("Authorization"))
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	push(t, origin.host, "app", im.packs)
	fetchAll(t, f, im.chunks(t, 0, im.index.Len()))
}

// TestMirrorMissesPack: one 404 for a pack, not one for each of its chunks, and
// the registry gives what is missing.
func TestMirrorMissesPack(t *testing.T) {
	t.Parallel()
	im := newImage(t, 300)
	mirror, origin := newFront(t), newFront(t)
	push(t, mirror.host, "app", im.packs[1:])
	push(t, origin.host, "app", im.packs)
	mirror.set(nil)
	origin.set(nil)
	f := im.fetcherAt(t, "registry://"+origin.host+"/app", "http://"+mirror.host, RemoteOptions{})
	cs := im.chunks(t, 0, im.index.Len())
	fetchAll(t, f, cs)
	for _, c := range cs[:20] {
		if _, err := f.Fetch(t.Context(), c, nil); err != nil {
			t.Error(err)
		}
	}
	misses := 0
	for _, r := range mirror.requests() {
		if strings.Contains(r.URL.Path, im.packs[0].Digest) {
			misses++
		}
	}
	if misses == 0 || misses > batchRequests {
		t.Errorf("the mirror was asked %d times for a pack that it lacks", misses)
	}
	for _, r := range origin.requests() {
		if !strings.Contains(r.URL.Path, im.packs[0].Digest) {
			t.Errorf("the registry was asked for %s", r.URL)
		}
	}
	if st := f.Stats().Stores; st[0].Failures != 0 || st[0].Chunks == 0 || st[1].Chunks == 0 {
		t.Errorf("got %+v", st)
	}
}

// TestDeadMirror: a mirror that does not answer costs one timeout.
func TestDeadMirror(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	mirror := newFront(t)
	mirror.set(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	f := im.fetcherAt(t, "registry://"+proxy.Addr()+"/app", "http://"+mirror.host, RemoteOptions{Stall: quick})
	start := time.Now()
	for _, c := range im.chunks(t, 0, 40) {
		if _, err := f.Fetch(t.Context(), c, nil); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(start); took > 5*quick {
		t.Errorf("40 chunks took %s beside a mirror that does not answer in %s", took, quick)
	}
	if n := len(mirror.requests()); n != 1 {
		t.Errorf("the mirror was asked %d times, want once", n)
	}
}

// TestLyingMirror: what a mirror says is verified, and then asked for elsewhere.
func TestLyingMirror(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	liar, err := faultproxy.New("http://" + proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(liar.Close)
	liar.Set(faultproxy.Flip(100))
	f := im.fetcherAt(t, "registry://"+proxy.Addr()+"/app", "http://"+liar.Addr(), RemoteOptions{})
	for _, c := range im.chunks(t, 0, 10) {
		got, err := f.Fetch(t.Context(), c, nil)
		if err != nil || string(got) != string(im.plain[c.ID]) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
	}
	if f.Stats().Stores[0].Corrupt == 0 {
		t.Error("the mirror's lies were not noticed")
	}
}
