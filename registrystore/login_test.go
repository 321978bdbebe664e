package registrystore

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/chunkstore"
)

// TestOneLoginForAll: when many requests are refused at once, one of them gets a
// token for all.
func TestOneLoginForAll(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	proxy.RequireToken("joe", "s3cret", 100000, http.StatusUnauthorized)
	s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{Keychain: &keychain{proxy.Addr(), "joe", "s3cret"}})
	var wg sync.WaitGroup
	for _, id := range im.ids(t, 0, im.index.Len()) {
		wg.Go(func() {
			if _, err := s.Get(t.Context(), id, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := proxy.TokensIssued(); n != 1 {
		t.Errorf("got %d tokens, want 1", n)
	}
	pings := 0
	for _, r := range proxy.Log() {
		if r.Path == "/v2/" {
			pings++
		}
	}
	if pings != 0 {
		t.Errorf("%d requests only to hear what a 401 had said", pings)
	}
}

// TestLoginForms: what registries ask for, and what they get.
func TestLoginForms(t *testing.T) {
	t.Parallel()
	im := newImage(t, 20)
	f := newFront(t)
	push(t, f.host, "app", im.packs)
	id := im.ids(t, 2, 3)[0]
	for _, tt := range []struct {
		name, challenge string
		known           authn.Authenticator
		want            string // Authorization header
		problem         string
	}{
		{name: "basic", challenge: `Basic realm="r"`, known: &authn.Basic{Username: "joe", Password: "s3cret"}, want: "Basic am9lOnMzY3JldA=="},
		{name: "registry token", challenge: `Bearer realm="http://` + f.host + `/token"`, known: &authn.Bearer{Token: "t0ken"}, want: "Bearer t0ken"},
		{name: "several", challenge: `Negotiate, Basic realm="r"`, known: &authn.Basic{Username: "joe", Password: "s3cret"}, want: "Basic am9lOnMzY3JldA=="},
		{name: "nobody", challenge: `Basic realm="r"`, known: authn.Anonymous, problem: "401 Unauthorized: the registry wants other credentials"},
		{name: "realm that is none", challenge: `Bearer realm="file:///etc/passwd"`, known: authn.Anonymous, problem: "invalid realm"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := im.storeAt(t, "registry://"+f.host+"/app", RemoteOptions{Keychain: fixed{tt.known}})
			f.set(func(w http.ResponseWriter, r *http.Request) {
				if tt.want == "" || r.Header.Get("Authorization") != tt.want {
					w.Header().Set("WWW-Authenticate", tt.challenge)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				f.inner.ServeHTTP(w, r)
			})
			_, err := s.Get(t.Context(), id, nil)
			if tt.problem == "" && err != nil || tt.problem != "" && (err == nil || !strings.Contains(err.Error(), tt.problem) || strings.Contains(err.Error(), "s3cret")) {
				t.Errorf("got %v, want %q", err, tt.problem)
			}
		})
	}
}

// TestTokenServer: what the token server does wrong is the registry's error.
func TestTokenServer(t *testing.T) {
	t.Parallel()
	im := newImage(t, 20)
	f := newFront(t)
	push(t, f.host, "app", im.packs)
	id := im.ids(t, 2, 3)[0]
	for _, tt := range []struct {
		name      string
		h         http.HandlerFunc
		want      string
		temporary bool
	}{
		{"401", answerWith(401, `{"errors":[{"code":"UNAUTHORIZED","message":"no\nsuch user"}]}`), "login at " + f.host + ": ", false},
		{"403", answerWith(403, ""), "login at " + f.host + ": ", false},
		{"429", answerWith(429, ""), "login at " + f.host + ": ", true},
		{"500", answerWith(500, ""), "login at " + f.host + ": ", true},
		{"web page", answerWith(200, "<html>\nPlease accept the terms</html>"), "login at " + f.host + ": invalid character", true},
		{"no token", answerWith(200, "{}"), "no token in bearer response", true},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			for range 1000 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, "", true},
		{"reset", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF", true},
		{"silent", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "stalled: no answer", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f.set(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/token" {
					tt.h(w, r)
					return
				}
				w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+f.host+`/token",service="s"`)
				w.WriteHeader(http.StatusUnauthorized)
			})
			s := im.storeAt(t, "registry://"+f.host+"/app", RemoteOptions{Keychain: fixed{&authn.Basic{Username: "joe", Password: "s3cret"}}, Stall: quick})
			_, err := s.Get(t.Context(), id, nil)
			var e *chunkstore.Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.want) || e.Temporary() != tt.temporary ||
				strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q, temporary %v", err, tt.want, tt.temporary)
			}
			f.set(nil)
			if _, err := s.Get(t.Context(), id, nil); err != nil {
				t.Errorf("after the fault: %v", err)
			}
		})
	}
}

func answerWith(code int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		io.WriteString(w, body)
	}
}

// fixed is a Keychain with one login for all.
type fixed struct{ authn.Authenticator }

func (f fixed) Resolve(authn.Resource) (authn.Authenticator, error) { return f.Authenticator, nil }
