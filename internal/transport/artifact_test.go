package transport

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

var testKind = ArtifactKind{Type: "application/vnd.test.v1", MediaType: "application/vnd.test.file.v1", MaxFile: 1 << 20}

func testArtifact(t testing.TB, ref string) *Artifact {
	t.Helper()
	a := must(NewArtifact(ref, testKind, Options{}))(t)
	t.Cleanup(func() { a.Close() })
	return a
}

// pushes counts the uploads that a registry is asked for.
type pushes struct {
	mu   sync.Mutex
	list []string // guarded by mu
}

func (u *pushes) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost || r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			u.mu.Lock()
			u.list = append(u.list, r.Method+" "+r.URL.Path)
			u.mu.Unlock()
		}
		h.ServeHTTP(w, r)
	})
}

func (u *pushes) take() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := len(u.list)
	u.list = nil
	return n
}

func TestArtifact(t *testing.T) {
	var seen pushes
	own := startRegistry(t, seen.wrap)
	distribution := must(testenv.StartRegistry(t.Context(), t.TempDir(), ""))(t)
	t.Cleanup(func() { distribution.Close() })
	// It refuses HEAD, and loses every fifth connection.
	var requests atomic.Int32
	bad := startRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodHead:
				http.Error(w, "no", http.StatusMethodNotAllowed)
			case r.Method != http.MethodGet && requests.Add(1)%5 == 0:
				panic(http.ErrAbortHandler)
			default:
				h.ServeHTTP(w, r)
			}
		})
	})
	for name, host := range map[string]string{"go-containerregistry": own, "docker-registry": distribution.Address, "a bad one": bad} {
		t.Run(name, func(t *testing.T) {
			ref := host + "/test/app:cache"
			a := testArtifact(t, ref)
			if _, err := a.Get(t.Context(), "x"); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("an artifact that is not there: %v", err)
			}
			files := map[string][]byte{"x": []byte("one"), "y": bytes.Repeat([]byte("two"), 100_000), "empty": {}}
			if err := a.Put(t.Context(), files); err != nil {
				t.Fatal(err)
			}
			check := func(want map[string][]byte, gone string) {
				t.Helper()
				for _, a := range []*Artifact{a, testArtifact(t, ref)} {
					for name, b := range want {
						if got, err := a.Get(t.Context(), name); err != nil || !bytes.Equal(got, b) {
							t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(b))
						}
					}
					if _, err := a.Get(t.Context(), gone); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("%s: %v, want that it is not there", gone, err)
					}
				}
			}
			check(files, "z")
			seen.take()
			delete(files, "empty")
			files["z"] = []byte("three")
			if err := a.Put(t.Context(), files); err != nil {
				t.Fatal(err)
			}
			if n := seen.take(); host == own && n != 2 {
				t.Errorf("%d pushes for one new file and the manifest", n)
			}
			check(files, "empty")
		})
	}
}

func TestHostileArtifact(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	host := startRegistry(t, nil)
	put := func(tag string, k ArtifactKind, files map[string][]byte) string {
		ref := host + "/test/app:" + tag
		a := must(NewArtifact(ref, k, Options{}))(t)
		defer a.Close()
		if err := a.Put(t.Context(), files); err != nil {
			t.Fatal(err)
		}
		return ref
	}
	other, large := testKind, testKind
	other.Type = "application/vnd.other"
	large.MaxFile = 1 << 30
	files := map[string][]byte{"x": make([]byte, testKind.MaxFile+1)}
	image := host + "/test/app:image"
	commit(t, "docker://"+image, Options{}, nil, map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)})
	for name, tt := range map[string]struct{ ref, want string }{
		"another type":   {put("other", other, files), `type "application/vnd.other"`},
		"too large":      {put("large", large, files), fmt.Sprintf("it has %d bytes", testKind.MaxFile+1)},
		"an image":       {image, "type"},
		"no such server": {"127.0.0.1:1/test/app:x", "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			a := testArtifact(t, tt.ref)
			for range 2 {
				if _, err := a.Get(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want an error with %q", err, tt.want)
				}
			}
		})
	}
	lying := startRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				http.ServeContent(w, r, "", time.Time{}, strings.NewReader("two"))
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	a := testArtifact(t, lying+"/test/app:cache")
	if err := a.Put(t.Context(), map[string][]byte{"x": []byte("one")}); err != nil {
		t.Fatal(err)
	}
	if got, err := a.Get(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "its digest is") {
		t.Errorf("a file that is another one: %q, %v", got, err)
	}
}
