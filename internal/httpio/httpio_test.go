package httpio

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for h, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"7.5":                           0,
		"99999999999999999999":          0,
		"Fri, 02 Jan 2026 03:04:35 GMT": 30 * time.Second,
		"Fri, 02 Jan 2026 03:03:35 GMT": 0,
		"soon":                          0,
	} {
		if got := RetryAfter(h, now); got != want {
			t.Errorf("%q: got %s, want %s", h, got, want)
		}
	}
}

func TestIsLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1": true, "127.1.2.3:5000": true, "[::1]:5000": true, "::1": true, "localhost": true, "r.localhost:1": true,
		"10.0.0.1": false, "localhost.example.com": false, "example.com:80": false, "0.0.0.0": false, "": false,
	} {
		if got := IsLoopback(host); got != want {
			t.Errorf("%q: got %v, want %v", host, got, want)
		}
	}
}

func TestWithoutUser(t *testing.T) {
	for address, want := range map[string]string{
		"https://joe:s3cret@h/p":      "https://h/p",
		"s3+https://joe:s3cret@h@i/p": "s3+https://i/p",
		"joe:s3cret@h/p":              "h/p",
		"joe:s3cret@://":              "://",
		"joe:s3cret@h://p":            "h://p",
		"https://h/p":                 "https://h/p",
		"/srv":                        "/srv",
		"":                            "",
	} {
		if got := WithoutUser(address); got != want {
			t.Errorf("%q: got %q, want %q", address, got, want)
		}
	}
}

func TestOrigin(t *testing.T) {
	for a, b := range map[string]string{
		"http://h/a":      "http://H:80/b",
		"https://h":       "https://h:443",
		"https://u:p@h/x": "https://h/",
	} {
		if !sameOrigin(t, a, b) {
			t.Errorf("%s and %s: got two origins", a, b)
		}
	}
	for a, b := range map[string]string{
		"http://h":     "https://h",
		"https://h":    "https://h:444",
		"https://h.io": "https://a.h.io",
		"https://a.h":  "https://h",
	} {
		if sameOrigin(t, a, b) {
			t.Errorf("%s and %s: got one origin", a, b)
		}
	}
}

func sameOrigin(t *testing.T, a, b string) bool {
	u, err := url.Parse(a)
	if err != nil {
		t.Fatal(err)
	}
	v, err := url.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return OriginOf(u) == OriginOf(v)
}

func TestCheckRedirect(t *testing.T) {
	request := func(url string) *http.Request {
		r, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	secure, plain := request("https://h/"), request("http://h/")
	for _, tt := range []struct {
		to, from *http.Request
		hops     int
		want     error
	}{
		{secure, plain, 1, nil},
		{plain, plain, maxRedirects, nil},
		{plain, plain, maxRedirects + 1, ErrRedirects},
		{plain, secure, 1, ErrDowngrade},
		{secure, secure, 1, nil},
	} {
		via := slices.Repeat([]*http.Request{tt.from}, tt.hops)
		if got := CheckRedirect(tt.to, via); got != tt.want {
			t.Errorf("%s to %s after %d: got %v, want %v", tt.from.URL, tt.to.URL, tt.hops, got, tt.want)
		}
	}
}

// body gives n bytes at a time, after a pause; and like a response it ends with
// its request.
type body struct {
	ctx   context.Context
	n     int
	pause time.Duration
}

func (b body) Read(p []byte) (int, error) {
	select {
	case <-time.After(b.pause):
		return copy(p, bytes.Repeat([]byte("x"), b.n)), nil
	case <-b.ctx.Done():
		return 0, context.Cause(b.ctx)
	}
}

func TestWatch(t *testing.T) {
	const limit = 500 * time.Millisecond
	for _, tt := range []struct {
		name  string
		n     int // bytes a read
		pause time.Duration
		reads int
		want  error
	}{
		{"nothing comes", 0, time.Hour, 1, ErrStalled},
		{"a drip", 1, limit / 50, 1000, ErrStalled},
		{"slow but steady", MinProgress, limit / 10, 20, nil},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			w := NewWatch(limit, cancel)
			b := body{ctx, tt.n, tt.pause}
			var err error
			for i := 0; i < tt.reads && err == nil; i++ {
				_, err = w.Read(b, make([]byte, MinProgress))
			}
			w.Stop()
			if err != tt.want {
				t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
			}
		})
	}
	// A reader who takes his time.
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		w := NewWatch(limit, cancel)
		w.Stop()
		for range 2 {
			time.Sleep(2 * limit)
			if _, err := w.Read(bytes.NewReader([]byte("x")), make([]byte, 1)); err != nil && err != io.EOF {
				t.Error(err)
			}
		}
		if ctx.Err() != nil {
			t.Error(context.Cause(ctx))
		}
		w.Restart()
		<-ctx.Done()
		if err := context.Cause(ctx); err != ErrStalled {
			t.Errorf("got %v, want %v", err, ErrStalled)
		}
	})
}
