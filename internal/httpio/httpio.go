// Package httpio is what a store needs to live with HTTP servers: connections
// that notice when they die, a watch on responses that stall, redirects that
// stay safe, and one judgement of what a failure means.
package httpio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// Stall is how long a response may make no progress unless a store is told
	// otherwise. It is well below the deadline of a read, so that a new
	// connection gets its chance.
	Stall = 10 * time.Second
	// MinProgress is what a response must bring within that time to count as
	// alive, in bytes.
	MinProgress = 16 << 10
	// KeepAlive is how often a silent connection is probed.
	KeepAlive = 15 * time.Second

	maxRedirects = 10
)

var (
	// ErrStalled is the cause with which a Watch cancels.
	ErrStalled = errors.New("stalled")
	// ErrRedirects, ErrDowngrade and ErrRedirectedWrite are what CheckRedirect
	// refuses.
	ErrRedirects       = fmt.Errorf("more than %d redirects", maxRedirects)
	ErrDowngrade       = errors.New("refused to go on from https to http")
	ErrRedirectedWrite = errors.New("the server sends writes elsewhere")
)

// NewTransport makes connections and keeps up to idle of them to each host.
func NewTransport(idle int) *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: KeepAlive}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
		// A registry may take its time after an upload; reads have a Watch.
		ResponseHeaderTimeout: 2 * time.Minute,
		MaxIdleConnsPerHost:   idle,
		IdleConnTimeout:       30 * time.Second,
		DisableCompression:    true,
		ForceAttemptHTTP2:     true,
		// A connection that many requests share is given up when it dies; the
		// requests on it would not notice.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 5 * time.Second},
	}
}

// CheckRedirect is an http.Client's: it bounds redirects, never goes on from
// https to http, and refuses one that makes a read of a write, as its answer
// would look like success.
func CheckRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return ErrRedirects
	}
	if req.URL.Scheme != "https" && via[len(via)-1].URL.Scheme == "https" {
		return ErrDowngrade
	}
	if m := via[0].Method; m != http.MethodGet && m != http.MethodHead && req.Method != m {
		to := url.URL{Scheme: req.URL.Scheme, Host: req.URL.Host, Path: req.URL.Path}
		return fmt.Errorf("%w: name the store as it is called there: %s", ErrRedirectedWrite, to.String())
	}
	return nil
}

// OriginOf returns scheme, host and port of u in the one form that can be
// compared.
func OriginOf(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Scheme + "://" + strings.ToLower(u.Hostname()) + ":" + port
}

// Authorized shows a login to its origin only. A client follows redirects
// through it, so this holds for every request of a chain.
type Authorized struct {
	Inner  http.RoundTripper
	Origin string // OriginOf
	Login  string // Authorization header, "" for none
}

// RoundTrip implements http.RoundTripper.
func (a Authorized) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Del("Authorization") // what a redirect brings in its URL
	if a.Login != "" && OriginOf(req.URL) == a.Origin {
		req.Header.Set("Authorization", a.Login)
	}
	return a.Inner.RoundTrip(req)
}

// RetryAfter reads a Retry-After header: seconds or a date. 0 is none.
func RetryAfter(h string, now time.Time) time.Duration {
	d := time.Duration(0)
	if s, err := strconv.ParseUint(h, 10, 31); err == nil {
		d = time.Duration(s) * time.Second
	} else if t, err := http.ParseTime(h); err == nil {
		d = t.Sub(now)
	}
	return max(d, 0)
}

// HostOf returns what may be said of a URL in a message: scheme and host.
func HostOf(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "a malformed URL"
	}
	if u.Host == "" { // of a redirect
		return "the same host"
	}
	return u.Scheme + "://" + u.Host
}

// WithoutUser drops what may be a password from an address that is refused,
// well-formed or not: all up to the last "@", but the scheme. What stands before
// "://" and is no scheme may be a user with a password, too.
func WithoutUser(address string) string {
	scheme, _, ok := strings.Cut(address, "://")
	if !ok || strings.ContainsFunc(scheme, notOfScheme) {
		return address[strings.LastIndexByte(address, '@')+1:]
	}
	scheme += "://"
	return scheme + address[max(len(scheme), strings.LastIndexByte(address, '@')+1):]
}

func notOfScheme(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("+.-", r))
}

// IsLoopback tells from the name whether host, with or without a port, is
// this machine.
func IsLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if ip := net.ParseIP(strings.Trim(host, "[]")); ip != nil {
		return ip.IsLoopback()
	}
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// Watch cancels a request that makes no progress. Only the time inside its
// methods and between Restart and Stop counts: who reads may take his time
// between two reads.
type Watch struct {
	timer  *time.Timer
	limit  time.Duration
	budget time.Duration // what is left of limit
	gained int64         // bytes since the budget was full

	answered bool  // a body is being read
	got      int64 // bytes of it
}

// NewWatch starts a watch: unless it is stopped, cancel is called with
// ErrStalled after limit.
func NewWatch(limit time.Duration, cancel context.CancelCauseFunc) *Watch {
	return &Watch{
		timer:  time.AfterFunc(limit, func() { cancel(ErrStalled) }),
		limit:  limit,
		budget: limit,
	}
}

// Begin starts the watch anew, on another request.
func (w *Watch) Begin() {
	w.answered, w.got = false, 0
	w.Restart()
}

// Restart gives the request the whole limit again, from now on.
func (w *Watch) Restart() { w.timer.Reset(w.limit) }

// Stop pauses the watch until Read or Restart.
func (w *Watch) Stop() { w.timer.Stop() }

// Read reads from the body of a response. MinProgress bytes within the limit
// are enough.
func (w *Watch) Read(body io.Reader, p []byte) (int, error) {
	start := time.Now()
	w.timer.Reset(w.budget)
	n, err := body.Read(p)
	w.timer.Stop()
	w.answered = true
	w.got += int64(n)
	if w.gained += int64(n); w.gained >= MinProgress {
		w.budget, w.gained = w.limit, 0
	} else {
		w.budget = max(w.budget-time.Since(start), 1)
	}
	return n, err
}

// stalled says how the request stalled.
func (w *Watch) stalled() error {
	if !w.answered {
		return fmt.Errorf("%w: no answer in %s", ErrStalled, w.limit)
	}
	return fmt.Errorf("%w: less than %d bytes in %s, %d bytes came before", ErrStalled, MinProgress, w.limit, w.got)
}
