// Package faultproxy stands between a client and an HTTP server and
// misbehaves on demand: for tests of what a program does when the network, the
// registry or something between them fails.
//
// A [Proxy] passes requests on until a [Fault] is set with [Proxy.Set]; faults
// apply to reads of blobs and of single chunks only, so that the rest of a test
// goes on. [Proxy.Refuse] and [Proxy.RequireToken] change the proxy as a whole.
package faultproxy

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

// Fault answers a request instead of the server, or with what pass, the way to
// the server, would have answered.
type Fault func(w http.ResponseWriter, r *http.Request, pass http.Handler)

// Request is what the proxy saw of a request.
type Request struct {
	Host          string // that was asked: Addr or Other
	Method        string
	Path          string
	Range         string
	Authorization string
}

// Proxy is an HTTP server at a loopback address that passes requests on to
// another one.
type Proxy struct {
	pass   http.Handler
	addr   string
	server *http.Server
	other  *httptest.Server

	mu       sync.Mutex // guards all below
	listener net.Listener
	fault    Fault
	log      []Request
	conns    map[net.Conn]bool
	tokens   *tokens
}

// New starts a Proxy in front of the server at upstream, "http://host:port".
func New(upstream string) (*Proxy, error) {
	u, err := url.Parse(upstream)
	if err != nil {
		return nil, err
	}
	p := &Proxy{conns: make(map[net.Conn]bool)}
	p.pass = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = r.In.Host // so that the server's redirects come back here
			r.Out.Header.Del("Authorization")
		},
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	p.server = &http.Server{Handler: p, ConnState: p.track}
	l, err := freeport.Listen()
	if err != nil {
		return nil, err
	}
	p.addr = l.Addr().String()
	p.accept(l)
	p.other = httptest.NewServer(http.HandlerFunc(p.serveOther))
	return p, nil
}

// accept serves who comes to l.
func (p *Proxy) accept(l net.Listener) {
	p.listener = l
	go p.server.Serve(l)
}

func (p *Proxy) track(c net.Conn, s http.ConnState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch s {
	case http.StateNew:
		p.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(p.conns, c)
	}
}

// Addr returns the proxy's host:port.
func (p *Proxy) Addr() string { return p.addr }

// Other returns the host:port of a second host, to which Redirect sends
// clients. It has every blob that the server has and asks for no credentials.
func (p *Proxy) Other() string { return p.other.Listener.Addr().String() }

// Close ends the proxy and all connections.
func (p *Proxy) Close() {
	p.server.Close()
	p.other.CloseClientConnections()
	p.other.Close()
}

// Set makes f answer requests for blobs and chunks from now on; nil heals.
func (p *Proxy) Set(f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// Refuse makes the proxy refuse connections, ending those it has, or accept
// them again.
func (p *Proxy) Refuse(refuse bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if refuse {
		for c := range p.conns {
			c.Close()
		}
		return p.listener.Close()
	}
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.accept(l)
	return nil
}

// Log returns the requests since the start or the last ClearLog.
func (p *Proxy) Log() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Request(nil), p.log...)
}

// ClearLog forgets the requests so far.
func (p *Proxy) ClearLog() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = nil
}

func (p *Proxy) note(r *http.Request) (Fault, *tokens) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = append(p.log, Request{r.Host, r.Method, r.URL.Path, r.Header.Get("Range"), r.Header.Get("Authorization")})
	return p.fault, p.tokens
}

// ServeHTTP makes the proxy usable behind another listener, one with TLS.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault, tokens := p.note(r)
	if tokens != nil && !tokens.admit(w, r) {
		return
	}
	if fault != nil && reads(r) {
		fault(w, r, p.pass)
		return
	}
	p.pass.ServeHTTP(w, r)
}

// reads reports whether r reads a blob or a chunk, or asks whether it is there.
func reads(r *http.Request) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) &&
		(strings.Contains(r.URL.Path, "/blobs/") || strings.HasSuffix(r.URL.Path, ".cacnk"))
}

func (p *Proxy) serveOther(w http.ResponseWriter, r *http.Request) {
	p.note(r)
	dies, err := strconv.ParseInt(r.URL.Query().Get("dies"), 10, 64)
	if r.URL.Query().Has("expired") || err == nil && time.Now().UnixMilli() > dies {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	p.pass.ServeHTTP(w, r)
}

// Times applies f to n requests and passes the later ones on.
func Times(n int, f Fault) Fault {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		mu.Lock()
		n--
		hit := n >= 0
		mu.Unlock()
		if hit {
			f(w, r, pass)
		} else {
			pass.ServeHTTP(w, r)
		}
	}
}

// Status answers with an error status, and a Retry-After header unless it is
// empty.
func Status(code int, retryAfter string) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(code)
	}
}

// WebPage answers as the login page of a network does.
func WebPage() Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, "<html><body>Please accept the terms of use.</body></html>")
	}
}

// RefuseHead answers HEAD as a server does that does not know it.
func RefuseHead() Fault {
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		pass.ServeHTTP(w, r)
	}
}

// Outage lets nothing through until d from now.
func Outage(d time.Duration) Fault {
	end := time.Now().Add(d)
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if sleep(r, time.Until(end)) {
			pass.ServeHTTP(w, r)
		}
	}
}

// Blackhole lets nothing through for d from each request on.
func Blackhole(d time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if sleep(r, d) {
			pass.ServeHTTP(w, r)
		}
	}
}

// IgnoreRange answers with 200 and the whole blob.
func IgnoreRange() Fault {
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		r = r.Clone(r.Context())
		r.Header.Del("Range")
		pass.ServeHTTP(w, r)
	}
}

// Redirect sends the client to Other, or to another host of the test, with a
// query as a signed URL has it. Expired URLs are answered with 403.
func Redirect(status int, host string, expired bool) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		to := url.URL{Scheme: "http", Host: host, Path: r.URL.Path, RawQuery: "signature=s3cret"}
		if expired {
			to.RawQuery += "&expired"
		}
		w.Header().Set("Location", to.String())
		w.WriteHeader(status)
	}
}

// Sign sends the client to host, which leads to Other, with a URL that is
// answered with 403 once its lifetime is over. With told, it says when that is, as
// those of CloudFront do.
func Sign(host string, lifetime time.Duration, told bool) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		dies := time.Now().Add(lifetime)
		to := url.URL{Scheme: "http", Host: host, Path: r.URL.Path, RawQuery: fmt.Sprintf("signature=s3cret&dies=%d", dies.UnixMilli())}
		if told {
			to.RawQuery += fmt.Sprintf("&Expires=%d", dies.Unix())
		}
		w.Header().Set("Location", to.String())
		w.WriteHeader(http.StatusTemporaryRedirect)
	}
}

// RedirectLoop sends the client back to where it is.
func RedirectLoop() Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Location", r.URL.Path)
		w.WriteHeader(http.StatusTemporaryRedirect)
	}
}

// WrongRange answers with a range that begins d bytes behind the one that was
// asked for, in truth and in the Content-Range header.
func WrongRange(d int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		var first, last int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err == nil {
			r = r.Clone(r.Context())
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first+d, last))
		}
		pass.ServeHTTP(w, r)
	}
}

// Overlong answers with n bytes more than the range has. Unless stated, the
// length is left to the end of the response.
func Overlong(n int, stated bool) Fault {
	return answer(func(w http.ResponseWriter, _ *http.Request, rec *httptest.ResponseRecorder) {
		body := append(rec.Body.Bytes(), make([]byte, n)...)
		w.Header().Del("Content-Length")
		if stated {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		}
		w.WriteHeader(rec.Code)
		w.Write(body[:len(body)-n])
		w.(http.Flusher).Flush()
		w.Write(body[len(body)-n:])
	})
}

// Flip inverts the byte at place i of each response.
func Flip(i int) Fault {
	return answer(func(w http.ResponseWriter, _ *http.Request, rec *httptest.ResponseRecorder) {
		w.WriteHeader(rec.Code)
		body := rec.Body.Bytes()
		if i < len(body) {
			body[i] ^= 0xff
		}
		w.Write(body)
	})
}

// Change answers with what f makes of the body.
func Change(f func(r *http.Request, body []byte) []byte) Fault {
	return answer(func(w http.ResponseWriter, r *http.Request, rec *httptest.ResponseRecorder) {
		body := f(r, rec.Body.Bytes())
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(rec.Code)
		w.Write(body)
	})
}

// Reset breaks the connection with RST behind n bytes of the body.
func Reset(n int) Fault { return breakOff(n, true) }

// Short ends the connection in order behind n bytes of the body.
func Short(n int) Fault { return breakOff(n, false) }

func breakOff(n int, reset bool) Fault {
	return answer(func(w http.ResponseWriter, _ *http.Request, rec *httptest.ResponseRecorder) {
		body := rec.Body.Bytes()
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(rec.Code)
		w.Write(body[:min(n, len(body))])
		w.(http.Flusher).Flush()
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if tcp, ok := conn.(*net.TCPConn); ok && reset {
			// RST discards what is under way, so the bytes get a moment.
			time.Sleep(20 * time.Millisecond)
			tcp.SetLinger(0)
		}
		conn.Close()
	})
}

// Slow answers after latency and then sends bytesPerSecond; 0 is no limit.
func Slow(latency time.Duration, bytesPerSecond int) Fault {
	return answer(func(w http.ResponseWriter, r *http.Request, rec *httptest.ResponseRecorder) {
		if !sleep(r, latency) {
			return
		}
		w.WriteHeader(rec.Code)
		body := rec.Body.Bytes()
		piece := len(body)
		if bytesPerSecond > 0 {
			piece = max(1, bytesPerSecond/50)
		}
		for len(body) > 0 {
			n := min(piece, len(body))
			if _, err := w.Write(body[:n]); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			body = body[n:]
			if bytesPerSecond > 0 && !sleep(r, time.Duration(n)*time.Second/time.Duration(bytesPerSecond)) {
				return
			}
		}
	})
}

// answer makes a Fault that spoils the server's answer, whose headers are
// those of w.
func answer(f func(http.ResponseWriter, *http.Request, *httptest.ResponseRecorder)) Fault {
	return func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		rec := httptest.NewRecorder()
		pass.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		f(w, r, rec)
	}
}

// sleep waits for d and reports whether the client is still there.
func sleep(r *http.Request, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-r.Context().Done():
		return false
	}
}
