package registrystore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// maxSkip bounds what is read and thrown away where a registry answers
// with the whole blob, in bytes.
const maxSkip = MaxPack

// RemoteOptions says how a registry is reached. The zero value fits a public
// one.
type RemoteOptions struct {
	// Insecure allows plain HTTP to hosts other than the loopback ones, as
	// "registry+http://" does.
	Insecure bool
	// Keychain finds credentials; nil is those that docker and podman use. It
	// is asked when the registry asks, and again when what it gave is refused.
	Keychain authn.Keychain
	// Transport makes the connections; nil is one made for this Blobs.
	Transport http.RoundTripper
	// Stall is how long a response may make no progress; 0 is 10 s.
	Stall time.Duration
}

// remoteBlobs reads blobs of one repository.
type remoteBlobs struct {
	repo     name.Repository
	address  string
	keychain authn.Keychain
	base     http.RoundTripper
	hangUp   func() // closes connections that nobody uses
	stall    time.Duration

	session atomic.Pointer[session]
	login   chan struct{} // a lock around renewals, which a waiter can leave
}

// session is how the registry wants to be spoken to: by which scheme, and
// with which credentials. Until the registry asks for some there are none.
type session struct {
	scheme    string
	transport http.RoundTripper
}

// NewRemote reads blobs of the repository at address: "registry://host/repo",
// or "registry+http://host/repo" where the registry speaks plain HTTP on
// another host than the loopback. It does not connect yet.
func NewRemote(address string, o RemoteOptions) (Blobs, error) {
	rest, ok := strings.CutPrefix(address, "registry://")
	if !ok {
		if rest, ok = strings.CutPrefix(address, "registry+http://"); !ok {
			return nil, fmt.Errorf("store %q: want registry://host/repository", httpio.WithoutUser(address))
		}
		o.Insecure = true
	}
	repo, err := parseRepository(rest, o.Insecure)
	if err != nil {
		return nil, fmt.Errorf("store %q: %w", httpio.WithoutUser(address), err)
	}
	r := &remoteBlobs{
		repo:     repo,
		address:  address,
		keychain: o.Keychain,
		base:     o.Transport,
		hangUp:   func() {},
		stall:    o.Stall,
		login:    make(chan struct{}, 1),
	}
	if r.keychain == nil {
		r.keychain = authn.DefaultKeychain
	}
	if r.base == nil {
		r.base = httpio.NewTransport(parallelRequests)
	}
	if t, ok := r.base.(interface{ CloseIdleConnections() }); ok {
		r.hangUp = t.CloseIdleConnections
	}
	if r.stall == 0 {
		r.stall = httpio.Stall
	}
	scheme := "http"
	if !o.Insecure && !httpio.IsLoopback(repo.RegistryStr()) {
		scheme = "https"
		r.base = secure{r.base}
	}
	r.base = transport.NewUserAgent(r.base, "bootfs")
	r.session.Store(&session{scheme: scheme, transport: r.base})
	return r, nil
}

// parseRepository reads "host/repo". Any name is a host here, also one that
// docker would take for a namespace.
func parseRepository(s string, insecure bool) (name.Repository, error) {
	host, repo, _ := strings.Cut(s, "/")
	if host == "" || repo == "" || strings.Contains(s, "@") || path.Clean("/"+repo) != "/"+repo {
		return name.Repository{}, errors.New("want registry://host/repository")
	}
	opts := []name.Option{name.StrictValidation}
	if insecure {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(host, opts...)
	if err != nil {
		return name.Repository{}, err
	}
	if _, err := name.NewRepository("example.com/" + repo); err != nil {
		return name.Repository{}, err
	}
	return reg.Repo(repo), nil
}

// secure keeps a connection that began with https from going on without.
// go-containerregistry would fall back to http at private addresses, and a
// token server could be named so; here the user has to say it.
type secure struct{ inner http.RoundTripper }

func (s secure) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" {
		return nil, httpio.ErrDowngrade
	}
	return s.inner.RoundTrip(req)
}

func (r *remoteBlobs) String() string { return r.address }

func (r *remoteBlobs) Range(ctx context.Context, digest string, off, n int64) (io.ReadCloser, error) {
	q := &request{remote: r, digest: digest, off: off, n: n}
	if err := checkRange(digest, off, n); err != nil {
		return nil, q.fail(err)
	}
	if err := ctx.Err(); err != nil {
		return nil, q.fail(err)
	}
	if n == 0 {
		return http.NoBody, nil
	}
	q.ctx, q.cancel = context.WithCancelCause(ctx)
	q.watch = httpio.NewWatch(r.stall, q.cancel)
	if err := q.open(); err != nil {
		err = q.fail(err)
		q.Close()
		return nil, err
	}
	return q, nil
}

// request is one request for a range, and the reader of its response.
type request struct {
	remote *remoteBlobs
	digest string
	off, n int64

	ctx    context.Context
	cancel context.CancelCauseFunc
	watch  *httpio.Watch // cancels ctx when the response stalls

	body io.ReadCloser
	left int64 // bytes of the range that are still to come
	err  error // sticky: what Read returned
}

// open sends the request and checks the response up to its first byte.
func (q *request) open() error {
	resp, err := q.send()
	if err != nil {
		return err
	}
	skip, err := q.check(resp)
	if err != nil {
		resp.Body.Close()
		return err
	}
	q.watch.Stop()
	q.body, q.left = resp.Body, q.n
	for buf := make([]byte, min(skip, 64<<10)); skip > 0; {
		n, err := q.watch.Read(q.body, buf[:min(skip, int64(len(buf)))])
		skip -= int64(n)
		if err == io.EOF && skip > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("whole blob instead of bytes %d-%d: %w", q.off, q.off+q.n-1, err)
		}
	}
	return nil
}

// send gets a response, after a new login where the registry wants one.
func (q *request) send() (*http.Response, error) {
	for retried := false; ; retried = true {
		s := q.remote.session.Load()
		u := url.URL{Scheme: s.scheme, Host: q.remote.repo.RegistryStr(), Path: "/v2/" + q.remote.repo.RepositoryStr() + "/blobs/" + q.digest}
		req, err := http.NewRequestWithContext(q.ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", q.off, q.off+q.n-1))
		req.Header.Set("Accept-Encoding", "identity")
		client := http.Client{Transport: s.transport, CheckRedirect: httpio.CheckRedirect}
		resp, err := client.Do(req)
		if !retried && wantsLogin(s, resp, err, u.Host) {
			if resp != nil {
				resp.Body.Close()
			}
			if err := q.remote.renew(q.ctx, s); err != nil {
				return nil, err
			}
			continue
		}
		return resp, err
	}
}

// wantsLogin tells an answer that a new session may change: one that asks for
// credentials or refuses those it got, which some registries do with 403, and
// the 400 of a TLS server that was spoken to in plain HTTP.
func wantsLogin(s *session, resp *http.Response, err error, host string) bool {
	if err != nil {
		var refused *transport.Error
		return errors.As(err, &refused) && (refused.StatusCode == http.StatusUnauthorized || refused.StatusCode == http.StatusForbidden)
	}
	if resp.Request.URL.Host != host {
		return false
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return true
	case http.StatusBadRequest:
		return s.scheme == "http"
	}
	return false
}

// renew replaces session old by a new one, unless another request has done so
// already: when a token expires, all running requests come here.
func (r *remoteBlobs) renew(ctx context.Context, old *session) error {
	select {
	case r.login <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if r.session.Load() != old {
		<-r.login
		return nil
	}
	// A credential helper does not know of ctx: it is left to finish alone.
	done := make(chan error, 1)
	go func() {
		defer func() { <-r.login }()
		s, err := r.handshake(ctx)
		if err == nil {
			r.session.Store(s)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *remoteBlobs) handshake(ctx context.Context) (*session, error) {
	auth, err := authn.Resolve(ctx, r.keychain, r.repo)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", r.repo.RegistryStr(), err)
	}
	t, err := transport.NewWithContext(ctx, r.repo.Registry, auth, r.base, []string{r.repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	// The handshake has found the scheme, and t sets it.
	return &session{scheme: "https", transport: t}, nil
}

// check verifies that resp brings the range and returns how many bytes stand
// before it.
func (q *request) check(resp *http.Response) (skip int64, err error) {
	hiccup := func(format string, args ...any) error {
		return &httpio.Error{Status: resp.StatusCode, Temporary: true, Err: fmt.Errorf(format, args...)}
	}
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return 0, hiccup("got content encoded as %q, want it as it is", e)
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		got := resp.Header.Get("Content-Range")
		first, last, err := parseContentRange(got)
		if err != nil {
			return 0, hiccup("%w", err)
		}
		if first != q.off || last != q.off+q.n-1 {
			return 0, hiccup("got range %q, want bytes %d-%d", got, q.off, q.off+q.n-1)
		}
		if resp.ContentLength >= 0 && resp.ContentLength != q.n {
			return 0, hiccup("got %d bytes for a range of %d", resp.ContentLength, q.n)
		}
		return 0, nil
	case http.StatusOK:
		// Some registries do not know ranges; a login page of the network
		// looks the same but for its type.
		if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == "text/html" {
			return 0, hiccup("got a web page, want a blob")
		}
		if resp.ContentLength >= 0 && resp.ContentLength < q.off+q.n {
			return 0, hiccup("got a blob of %d bytes, want bytes %d-%d of it", resp.ContentLength, q.off, q.off+q.n-1)
		}
		if q.off > maxSkip {
			return 0, &httpio.Error{Status: http.StatusOK, Err: fmt.Errorf("the registry ignores ranges, and byte %d is too far into the blob to read up to it", q.off)}
		}
		return q.off, nil
	}
	return 0, q.statusError(resp)
}

// statusError tells what a status other than success means.
func (q *request) statusError(resp *http.Response) error {
	away := resp.Request.URL.Host != q.remote.repo.RegistryStr()
	e := httpio.Refusal(resp, away)
	switch resp.StatusCode {
	case http.StatusNotFound:
		return e.Hint("%w: the registry does not have this blob; it may have been deleted with the tag of its image", chunkstore.ErrNotFound)
	case http.StatusRequestedRangeNotSatisfiable:
		return e.Hint("the blob ends before byte %d", q.off+q.n)
	case http.StatusUnauthorized, http.StatusForbidden:
		if !away {
			return e.Hint("the registry wants other credentials")
		}
	}
	return e
}

// parseContentRange reads "bytes FIRST-LAST/SIZE", where SIZE may be "*".
func parseContentRange(h string) (first, last int64, err error) {
	bad := fmt.Errorf("content range %.100q, want bytes FIRST-LAST/SIZE", h)
	unit, rest, _ := strings.Cut(h, " ")
	span, size, ok := strings.Cut(rest, "/")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return 0, 0, bad
	}
	f, l, _ := strings.Cut(span, "-")
	first, okF := parseDecimal(f)
	last, okL := parseDecimal(l)
	if !okF || !okL || last < first {
		return 0, 0, bad
	}
	if size != "*" {
		if total, ok := parseDecimal(size); !ok || total <= last {
			return 0, 0, bad
		}
	}
	return first, last, nil
}

// parseDecimal reads digits only, without the signs that strconv allows.
func parseDecimal(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil
}

// Read gives the bytes of the range, and io.EOF only behind the last one.
func (q *request) Read(p []byte) (int, error) {
	if q.err != nil {
		return 0, q.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := q.watch.Read(q.body, p[:min(int64(len(p)), q.left)])
	q.left -= int64(n)
	switch {
	case q.left == 0:
		q.err = io.EOF
	case err == io.EOF:
		q.err = q.fail(fmt.Errorf("short response: got %d of %d bytes: %w", q.n-q.left, q.n, io.ErrUnexpectedEOF))
	case err != nil:
		q.err = q.fail(fmt.Errorf("after %d of %d bytes: %w", q.n-q.left, q.n, err))
	}
	if n > 0 {
		return n, nil
	}
	return 0, q.err
}

func (q *request) Close() error {
	if q.watch != nil {
		q.watch.Stop()
	}
	var err error
	if q.body != nil {
		err = q.body.Close()
	}
	if q.cancel != nil {
		q.cancel(context.Canceled)
	}
	return err
}

// fail makes an *Error of err.
func (q *request) fail(err error) error {
	e := &httpio.Error{Err: err} // of what was asked for, before there was a request
	if q.ctx != nil {
		if context.Cause(q.ctx) == httpio.ErrStalled {
			q.remote.hangUp() // other connections to the same place are likely as dead
		}
		var login *transport.Error
		var certificate *tls.CertificateVerificationError // says more, where both are
		if errors.As(err, &login) && !errors.As(err, &certificate) {
			err = &httpio.Error{
				Status:    login.StatusCode,
				Temporary: login.Temporary(),
				Err:       fmt.Errorf("login at %s: %s", q.remote.repo.RegistryStr(), oneLine(login.Error())),
			}
		}
		e = httpio.Judge(q.ctx, q.watch, err, "registry+http://…")
	}
	return &Error{Place: q.remote.address, Digest: q.digest, Status: e.Status, Err: e.Err, temporary: e.Temporary, after: e.After}
}

// oneLine makes a server's words fit for a message.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}
