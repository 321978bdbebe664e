package registrystore

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// said answers requests in memory: a token server's, and a registry's that
// refuses whoever has no token.
type said struct {
	challenge string
	token     []byte
	hosts     map[string]bool // that were asked with a password
}

func (s *said) RoundTrip(r *http.Request) (*http.Response, error) {
	if _, password, ok := r.BasicAuth(); ok && password == "s3cret" {
		s.hosts[r.URL.Scheme+"://"+r.URL.Host] = true
	}
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Request: r, ProtoMajor: 1, ProtoMinor: 1, ContentLength: -1}
	body := s.token
	if strings.HasPrefix(r.URL.Path, "/v2/") && r.Header.Get("Authorization") == "" {
		resp.StatusCode, body = http.StatusUnauthorized, nil
		resp.Header.Set("WWW-Authenticate", s.challenge)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// FuzzLogin reads from a registry that asks for any login, and whose token
// server answers anything: bytes or an error of one line without the password,
// which goes nowhere without TLS.
func FuzzLogin(f *testing.F) {
	for _, s := range []string{
		`Bearer realm="https://auth.h/token",service="s",scope="repository:r:pull"`, `Basic realm="r"`, `Negotiate, Basic realm="r"`,
		`Bearer realm="http://auth.h/token"`, `Bearer realm="file:///etc/passwd"`, `Bearer`, `Bearer realm="`, `bearer REALM=https://h/t,,=`, ``,
	} {
		f.Add(s, []byte(`{"token":"t","expires_in":60}`))
	}
	for _, s := range []string{`{"access_token":"a","refresh_token":"r"}`, `{"token":"a\nb"}`, `{}`, `null`, `[`, `<html>`} {
		f.Add(`Bearer realm="https://auth.h/token"`, []byte(s))
	}
	const digest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	f.Fuzz(func(t *testing.T, challenge string, token []byte) {
		server := &said{challenge, token, map[string]bool{}}
		b, err := NewRemote("registry://h/r", RemoteOptions{Transport: server, Keychain: fixed{&authn.Basic{Username: "joe", Password: "s3cret"}}})
		if err != nil {
			t.Fatal(err)
		}
		rc, err := b.Range(t.Context(), digest, 0, 1)
		if err == nil {
			rc.Close()
		} else if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %q", err)
		}
		for host := range server.hosts {
			if !strings.HasPrefix(host, "https://") {
				t.Errorf("the password went to %s", host)
			}
		}
	})
}

// FuzzExpiry reads when any URL dies.
func FuzzExpiry(f *testing.F) {
	for _, s := range []string{
		"X-Amz-Date=20260102T030405Z&X-Amz-Expires=900", "X-Goog-Date=20260102T030405Z&X-Goog-Expires=604800", "Expires=1767322245",
		"se=2026-01-02T03%3A04%3A05Z", "se=9999-12-31T23:59:59Z", "X-Amz-Date=20260102T030405Z&X-Amz-Expires=99999999999", "Expires=-1", "", "%",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		u := &url.URL{Scheme: "https", Host: "h", RawQuery: query}
		var s signedURLs
		before := time.Now()
		s.put("d", u)
		kept, ok := s.urls["d"]
		if ok && (kept.ends.Before(before) || kept.ends.After(time.Now().Add(signedFor))) {
			t.Errorf("%q is used until %s", query, kept.ends)
		}
	})
}
