package registrystore

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestExpiry(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for query, want := range map[string]time.Time{
		"X-Amz-Date=20260304T050607Z&X-Amz-Expires=1200": at.Add(20 * time.Minute),
		"X-Goog-Date=20260304T050607Z&X-Goog-Expires=60": at.Add(time.Minute),
		fmt.Sprintf("Expires=%d&Signature=x", at.Unix()): at,
		"se=2026-03-04T05%3A06%3A07Z&sig=x":              at,
		"X-Amz-Date=20260304T050607Z":                    {},
		"X-Amz-Expires=1200":                             {},
		"X-Amz-Date=20260304T050607Z&X-Amz-Expires=-1":   {},
		"Expires=soon":           {},
		"Expires=99999999999999": {},
		"se=tomorrow":            {},
		"":                       {},
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := expiry(q); ok == want.IsZero() || !got.Equal(want) {
			t.Errorf("%s: got %s, %v, want %s", query, got, ok, want)
		}
	}
}

// TestSignedURLs reads from a registry that redirects to signed URLs of another
// host: one redirect serves for the next reads of the blob too, as long as the
// URL is good, and the other host sees no credentials.
func TestSignedURLs(t *testing.T) {
	t.Parallel()
	soon := func(d time.Duration) string {
		return fmt.Sprintf("Expires=%d&Signature=s3cret", time.Now().Add(d).Unix())
	}
	for _, tt := range []struct {
		name  string
		query func() string
		uses  int // how often a URL works; then the other host says 403
		reads int
		asked int // of the registry: the redirects
		away  int // requests of the other host
	}{
		{"says nothing of its end", func() string { return "Signature=s3cret" }, 1000, 20, 1, 20},
		{"good for long", func() string { return soon(time.Hour) }, 1000, 20, 1, 20},
		{"dies soon", func() string { return soon(5 * time.Second) }, 1000, 5, 5, 5},
		{"dead before it says so", func() string { return soon(time.Hour) }, 4, 12, 3, 14},
		{"good for one request", func() string { return soon(time.Hour) }, 1, 10, 10, 13},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := newImage(t, 20)
			f := newFront(t)
			push(t, f.host, "app", im.packs)
			var issued, used, away atomic.Int32
			other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				away.Add(1)
				if r.Header.Get("Authorization") != "" {
					t.Errorf("the other host got %q", r.Header.Get("Authorization"))
				}
				if r.URL.Query().Get("n") != fmt.Sprint(issued.Load()) || int(used.Add(1)) > tt.uses {
					w.WriteHeader(http.StatusForbidden)
					return
				}
				f.inner.ServeHTTP(w, r)
			}))
			defer other.Close()
			f.set(func(w http.ResponseWriter, r *http.Request) {
				if _, password, _ := r.BasicAuth(); password != "pl4nted" {
					w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				used.Store(0)
				w.Header().Set("Location", fmt.Sprintf("%s%s?n=%d&%s", other.URL, r.URL.Path, issued.Add(1), tt.query()))
				w.WriteHeader(http.StatusTemporaryRedirect)
			})
			s := im.storeAt(t, "registry://"+f.host+"/app", RemoteOptions{Keychain: &keychain{f.host, "joe", "pl4nted"}})
			id := im.ids(t, 5, 6)[0]
			for range tt.reads {
				frame, err := s.Get(t.Context(), id, nil)
				if err == nil {
					err = im.verify(id, frame)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if got := int(issued.Load()); got != tt.asked {
				t.Errorf("%d redirects for %d reads, want %d", got, tt.reads, tt.asked)
			}
			if got := int(away.Load()); got != tt.away {
				t.Errorf("the other host got %d requests, want %d", got, tt.away)
			}
		})
	}
}

// TestSignedURLFails: what goes wrong at a remembered URL is asked of the
// registry again.
func TestSignedURLFails(t *testing.T) {
	t.Parallel()
	im := newImage(t, 20)
	f := newFront(t)
	push(t, f.host, "app", im.packs)
	var fail atomic.Pointer[http.HandlerFunc]
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h := fail.Load(); h != nil {
			(*h)(w, r)
			return
		}
		f.inner.ServeHTTP(w, r)
	}))
	defer other.Close()
	id := im.ids(t, 5, 6)[0]
	for name, h := range map[string]http.HandlerFunc{
		"404":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) },
		"403":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) },
		"503":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) },
		"reset":    func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"web page": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", "text/html") },
	} {
		t.Run(name, func(t *testing.T) {
			fail.Store(nil)
			f.set(func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
			})
			s := im.storeAt(t, "registry://"+f.host+"/app", RemoteOptions{})
			if _, err := s.Get(t.Context(), id, nil); err != nil {
				t.Fatal(err)
			}
			// From now on the registry gives the blob itself.
			fail.Store(&h)
			f.set(nil)
			_, err := s.Get(t.Context(), id, nil)
			if name == "web page" { // an answer like success: the next read does without the URL
				checkFault(t, name, err, "got a web page, want a blob", true)
				_, err = s.Get(t.Context(), id, nil)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSignedBounds: no more URLs than there is room for, each for minutes only.
func TestSignedBounds(t *testing.T) {
	var s signedURLs
	for i := range 3 * maxSigned {
		u, err := url.Parse(fmt.Sprintf("https://h/%d?Expires=%d", i, time.Now().Add(100*time.Hour).Unix()))
		if err != nil {
			t.Fatal(err)
		}
		s.put(fmt.Sprint(i), u)
		if len(s.urls) > maxSigned {
			t.Fatalf("%d URLs are remembered, want %d at most", len(s.urls), maxSigned)
		}
	}
	got, ok := s.get(fmt.Sprint(3*maxSigned - 1))
	if !ok || !strings.HasPrefix(got, "https://h/") {
		t.Errorf("got %q, %v", got, ok)
	}
	for _, u := range s.urls {
		if left := time.Until(u.ends); left > signedFor {
			t.Errorf("%s is used for %s", u.url, left)
		}
	}
}

// TestWholeBlobs: a registry that ignores ranges gives each pack once for a
// batch, after it has shown that.
func TestWholeBlobs(t *testing.T) {
	t.Parallel()
	im := newImage(t, 300)
	f := newFront(t)
	push(t, f.host, "app", im.packs)
	f.set(func(w http.ResponseWriter, r *http.Request) {
		r = r.Clone(r.Context())
		r.Header.Del("Range")
		f.inner.ServeHTTP(w, r)
	})
	s := im.storeAt(t, "registry://"+f.host+"/app", RemoteOptions{})
	all := im.ids(t, 0, im.index.Len())
	// Far apart from one another: a request each where ranges work.
	ids := all[:0:0]
	for i := 0; i < len(all); i += 40 {
		ids = append(ids, all[i])
	}
	var asked [2]int
	for round := range 2 {
		before := len(f.requests())
		if err := s.GetBatch(t.Context(), ids, func(i int, frame []byte) error { return im.verify(ids[i], frame) }); err != nil {
			t.Fatal(err)
		}
		asked[round] = len(f.requests()) - before
	}
	if asked[0] <= len(im.packs) || asked[1] > len(im.packs) {
		t.Errorf("got %d requests, then %d, for %d packs", asked[0], asked[1], len(im.packs))
	}
	f.set(nil)
	for range 2 { // the first finds out
		f.set(nil)
		if err := s.GetBatch(t.Context(), ids, func(int, []byte) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(f.requests()); n != asked[0] {
		t.Errorf("got %d requests where ranges work again, want %d", n, asked[0])
	}
}
