package httpio_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// faulty starts a server with one blob, and a proxy before it.
func faulty(t *testing.T) *faultproxy.Proxy {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "blob", time.Time{}, strings.NewReader(strings.Repeat("x", 100_000)))
	}))
	t.Cleanup(server.Close)
	proxy, err := faultproxy.New(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	return proxy
}

// request sends a request as a store does, reads all of its answer, and returns
// what it is judged to be.
func request(ctx context.Context, transport http.RoundTripper, method, url string, stall time.Duration) *httpio.Error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := httpio.NewWatch(stall, cancel)
	defer w.Stop()
	judge := func(err error) *httpio.Error { return httpio.Judge(ctx, w, err, "plain://…") }
	req, err := http.NewRequestWithContext(ctx, method, url, http.NoBody)
	if err != nil {
		return judge(err)
	}
	client := http.Client{Transport: transport, CheckRedirect: httpio.CheckRedirect}
	resp, err := client.Do(req)
	if err != nil {
		return judge(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return judge(httpio.Refusal(resp, resp.Request.URL.Host != req.URL.Host))
	}
	for buf := make([]byte, 10_000); ; {
		if _, err := w.Read(resp.Body, buf); err == io.EOF {
			return nil
		} else if err != nil {
			return judge(err)
		}
	}
}

// check wants e to contain want, in one line without secrets; "" is success.
func check(t *testing.T, e *httpio.Error, want string, temporary bool) {
	t.Helper()
	if e == nil || want == "" {
		if e != nil || want != "" {
			t.Errorf("got %v, want %q", e, want)
		}
		return
	}
	if msg := e.Error(); !strings.Contains(msg, want) || strings.Contains(msg, "\n") || strings.Contains(msg, "s3cret") {
		t.Errorf("got %q, want one line with %q", msg, want)
	}
	if e.Temporary != temporary {
		t.Errorf("%v: temporary is %v, want %v", e, e.Temporary, temporary)
	}
}

// TestFaults sets each fault for all requests, then heals it.
func TestFaults(t *testing.T) {
	t.Parallel()
	const quick = 700 * time.Millisecond
	proxy := faulty(t)
	transport := httpio.NewTransport(4)
	t.Cleanup(transport.CloseIdleConnections)
	url := "http://" + proxy.Addr() + "/blobs/x"
	for _, tt := range []struct {
		name      string
		fault     faultproxy.Fault
		want      string // part of the error; empty: no error
		temporary bool
		status    int
		after     bool // the server says when to come back
	}{
		{"reset mid-body", faultproxy.Reset(1000), "connection reset", true, 0, false},
		{"reset before the body", faultproxy.Reset(0), "connection reset", true, 0, false},
		{"short body", faultproxy.Short(1000), "unexpected EOF", true, 0, false},
		{"blackhole", faultproxy.Blackhole(time.Minute), "stalled: no answer in 700ms", true, 0, false},
		{"late answer", faultproxy.Blackhole(200 * time.Millisecond), "", false, 0, false},
		{"drip", faultproxy.Slow(0, 50), "stalled: less than 16384 bytes in 700ms, ", true, 0, false},
		{"latency and a slow line", faultproxy.Slow(20*time.Millisecond, 8<<20), "", false, 0, false},
		{"429 seconds", faultproxy.Status(429, "7"), "429 Too Many Requests, to be asked again in 7s", true, 429, true},
		{"503 date", faultproxy.Status(503, time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)), "503 Service Unavailable, to be asked again in ", true, 503, true},
		{"500", faultproxy.Status(500, ""), "500 Internal Server Error", true, 500, false},
		{"502", faultproxy.Status(502, ""), "502 Bad Gateway", true, 502, false},
		{"504", faultproxy.Status(504, ""), "504 Gateway Timeout", true, 504, false},
		{"520", faultproxy.Status(520, ""), "520", true, 520, false},
		{"501", faultproxy.Status(501, ""), "501 Not Implemented", false, 501, false},
		{"507", faultproxy.Status(507, ""), "507 Insufficient Storage", false, 507, false},
		{"404", faultproxy.Status(404, ""), "404 Not Found", false, 404, false},
		{"401", faultproxy.Status(401, ""), "401 Unauthorized", false, 401, false},
		{"403", faultproxy.Status(403, ""), "403 Forbidden", false, 403, false},
		{"418", faultproxy.Status(418, ""), "418 I'm a teapot", false, 418, false},
		{"redirect", faultproxy.Redirect(307, proxy.Other(), false), "", false, 0, false},
		{"redirect to an expired URL", faultproxy.Redirect(307, proxy.Other(), true), "403 Forbidden from http://" + proxy.Other(), true, 403, false},
		{"redirect to nobody", faultproxy.Redirect(307, "127.0.0.1:1", false), "http://127.0.0.1:1: dial tcp 127.0.0.1:1: connect: connection refused", true, 0, false},
		{"redirect without place", faultproxy.Status(307, ""), "307 Temporary Redirect", false, 307, false},
		{"redirect loop", faultproxy.RedirectLoop(), "more than 10 redirects", false, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stall := 20 * time.Second
			if strings.HasPrefix(tt.want, "stalled") {
				stall = quick
			}
			proxy.Set(tt.fault)
			e := request(t.Context(), transport, http.MethodGet, url, stall)
			check(t, e, tt.want, tt.temporary)
			if e != nil && (e.Status != tt.status || e.After > 0 != tt.after) {
				t.Errorf("got status %d, to be asked again in %s", e.Status, e.After)
			}
			proxy.Set(nil)
			check(t, request(t.Context(), transport, http.MethodGet, url, stall), "", false)
		})
	}
	t.Run("refused", func(t *testing.T) {
		if err := proxy.Refuse(true); err != nil {
			t.Fatal(err)
		}
		check(t, request(t.Context(), transport, http.MethodGet, url, time.Minute), "connection refused", true)
		if err := proxy.Refuse(false); err != nil {
			t.Fatal(err)
		}
		check(t, request(t.Context(), transport, http.MethodGet, url, time.Minute), "", false)
	})
	t.Run("no such host", func(t *testing.T) {
		check(t, request(t.Context(), transport, http.MethodGet, "http://nobody.invalid/x?s3cret", time.Minute), "http://nobody.invalid: ", true)
	})
	t.Run("cancelled", func(t *testing.T) {
		proxy.Set(faultproxy.Blackhole(time.Minute))
		defer proxy.Set(nil)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		e := request(ctx, transport, http.MethodGet, url, time.Minute)
		check(t, e, "context deadline exceeded", false)
		if !errors.Is(e, context.DeadlineExceeded) {
			t.Errorf("got %v", e)
		}
	})
}

// TestTLSFaults: what of TLS a person must put right is not temporary.
func TestTLSFaults(t *testing.T) {
	t.Parallel()
	start := func(h http.HandlerFunc) *httptest.Server {
		s := httptest.NewUnstartedServer(h)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		t.Cleanup(s.Close)
		return s
	}
	plain := start(func(http.ResponseWriter, *http.Request) {})
	plain.Start()
	secure := start(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, plain.URL, http.StatusFound) })
	secure.StartTLS()
	transport := httpio.NewTransport(1)
	t.Cleanup(transport.CloseIdleConnections)
	for _, tt := range []struct {
		name      string
		transport http.RoundTripper
		method    string
		url       string
		want      string
	}{
		{"unknown authority", transport, "GET", secure.URL + "/?s3cret", secure.URL + ": tls: failed to verify certificate: x509: certificate signed by unknown authority"},
		{"plain HTTP", transport, "GET", "https" + strings.TrimPrefix(plain.URL, "http") + "/?s3cret", ": the server speaks plain HTTP: name the store plain://…"},
		{"from https to http", secure.Client().Transport, "GET", secure.URL, "refused to go on from https to http"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check(t, request(t.Context(), tt.transport, tt.method, tt.url, time.Minute), tt.want, false)
		})
	}
	t.Run("a write that becomes a read", func(t *testing.T) {
		s := start(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, plain.URL+"/there?s3cret", http.StatusFound)
		})
		s.Start()
		check(t, request(t.Context(), transport, "PUT", s.URL, time.Minute), "the server sends writes elsewhere: name the store as it is called there: "+plain.URL+"/there", false)
	})
}

// unsent refuses requests before they are sent.
type unsent struct{ err error }

func (u unsent) RoundTrip(*http.Request) (*http.Response, error) { return nil, u.err }

func TestUnsent(t *testing.T) {
	e := request(t.Context(), unsent{&httpio.Error{Err: errors.New("no certificate in ca.crt")}}, http.MethodGet, "https://h/?s3cret", time.Minute)
	check(t, e, "https://h: no certificate in ca.crt", false)
	e = request(t.Context(), unsent{errors.New("no route")}, http.MethodGet, "https://h/?s3cret", time.Minute)
	check(t, e, "https://h: no route", true)
}

// TestJudgeAnothersError: a request that was ended because another one failed
// has not failed in the same way.
func TestJudgeAnothersError(t *testing.T) {
	other := &httpio.Error{Status: 503, Err: errors.New("other"), Temporary: true}
	e := httpio.Judge(t.Context(), nil, fmt.Errorf("wrapped: %w", other), "")
	if e.Status != 0 || !errors.Is(e, other) {
		t.Errorf("got %+v", e)
	}
	if e := httpio.Judge(t.Context(), nil, other, ""); e != other {
		t.Errorf("got %+v, want what it was", e)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(other)
	if e := httpio.Judge(ctx, nil, &httpio.Error{Err: errors.New("own"), Temporary: true}, ""); e.Temporary || e.Status != 0 || e.Err != other {
		t.Errorf("got %+v, want the reason of the end", e)
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                          "",
		" two\r\n\tlines ":          "two lines",
		"\x1b[31mred\x1b[0m\u202e.": "[31mred [0…",
		"no\xffutf8":                "no?utf8",
		"größer als zehn":           "größer a…",
		"123456789ä":                "123456789…",
	} {
		if got := httpio.OneLine(in, 10); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}
