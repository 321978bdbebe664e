package registrystore

import (
	"context"
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
	"github.com/container-bootfs/bootfs/internal/hosts"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// maxSkip bounds what is read and thrown away where a registry answers
// with the whole blob, in bytes.
const maxSkip = MaxPack

// maxWords bounds what a message repeats of a server's words, in bytes.
const maxWords = 300

// RemoteOptions says how a registry is reached. The zero value fits a public
// one.
type RemoteOptions struct {
	// Hosts knows how servers are reached; nil knows what everybody knows.
	Hosts *hosts.Hosts
	// Insecure allows plain HTTP to hosts other than the loopback ones, or a
	// certificate that cannot be verified, as "registry+http://" does.
	Insecure bool
	// Keychain finds credentials; nil has none. It is asked when the registry
	// asks, and again when what it gave is refused.
	Keychain authn.Keychain
	// Advice is what to do where a registry lets nobody in, for messages.
	Advice string
	// Transport makes the connections; nil is that of Hosts.
	Transport http.RoundTripper
	// Stall is how long a response may make no progress; 0 is 10 s.
	Stall time.Duration
}

// remoteBlobs reads blobs of one repository from one server.
type remoteBlobs struct {
	endpoint hosts.Endpoint
	repo     name.Repository // under the name that credentials have
	address  string          // for messages
	keychain authn.Keychain
	advice   string
	base     http.RoundTripper
	hangUp   func() // closes connections that nobody uses
	stall    time.Duration

	session *httpio.Shared[session]
	signed  signedURLs
	absent  absences    // of a mirror
	whole   atomic.Bool // the server ignores ranges
}

// NewRemote reads blobs of the repository at address: "registry://host/repo",
// or "registry+http://host/repo" where the registry speaks plain HTTP on
// another host than the loopback. It asks the registry itself, whatever
// mirrors there are, and does not connect yet.
func NewRemote(address string, o RemoteOptions) (Blobs, error) {
	host, repo, err := o.parse(address)
	if err != nil {
		return nil, fmt.Errorf("store %q: %w", httpio.WithoutUser(address), err)
	}
	e, err := o.Hosts.Origin(host)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", address, err)
	}
	return newRemoteBlobs(address, e, repo, o)
}

// NewRemotes is NewRemote for each server that is to be asked, in order: the
// mirrors of the registry, and at last the registry itself.
func NewRemotes(address string, o RemoteOptions) ([]Blobs, error) {
	host, repo, err := o.parse(address)
	if err != nil {
		return nil, fmt.Errorf("store %q: %w", httpio.WithoutUser(address), err)
	}
	endpoints, err := o.Hosts.Registry(host)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", address, err)
	}
	var out []Blobs
	for _, e := range endpoints {
		called := address
		if e.Namespace != "" {
			called = fmt.Sprintf("%s://%s%s/%s as a mirror of %s", e.Scheme, e.Host, e.Path, repo, e.Namespace)
		}
		b, err := newRemoteBlobs(called, e, repo, o)
		if err != nil {
			return nil, fmt.Errorf("store %s: %w", called, err)
		}
		out = append(out, b)
	}
	return out, nil
}

// parse reads an address. It completes o.
func (o *RemoteOptions) parse(address string) (host, repo string, err error) {
	rest, ok := strings.CutPrefix(address, "registry://")
	if !ok {
		if rest, ok = strings.CutPrefix(address, "registry+http://"); !ok {
			return "", "", errNoRepository
		}
		o.Insecure = true
	}
	r, err := parseRepository(rest)
	if err != nil {
		return "", "", err
	}
	if o.Hosts == nil {
		o.Hosts = hosts.Everybody()
	}
	if o.Insecure {
		o.Hosts = o.Hosts.With(r.RegistryStr())
	}
	return r.RegistryStr(), r.RepositoryStr(), nil
}

func newRemoteBlobs(address string, e hosts.Endpoint, repo string, o RemoteOptions) (*remoteBlobs, error) {
	var opts []name.Option
	if e.Plain {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(hosts.Login(e.Host), opts...)
	if err != nil {
		return nil, err
	}
	r := &remoteBlobs{
		endpoint: e,
		repo:     reg.Repo(repo),
		address:  address,
		keychain: o.Keychain,
		advice:   o.Advice,
		base:     o.Transport,
		hangUp:   func() {},
		stall:    o.Stall,
		session:  httpio.NewShared(&session{scheme: e.Scheme}),
	}
	if r.keychain == nil {
		r.keychain = authn.NewMultiKeychain() // of none
	}
	if r.base == nil {
		r.base = e.Transport
	}
	if t, ok := r.base.(interface{ CloseIdleConnections() }); ok {
		r.hangUp = t.CloseIdleConnections
	}
	if r.stall == 0 {
		r.stall = httpio.Stall
	}
	if !e.Plain {
		r.base = secure{r.base}
	}
	r.base = transport.NewUserAgent(r.base, "bootfs")
	return r, nil
}

var errNoRepository = errors.New("want registry://host/repository")

// parseRepository reads "host/repo". Any name is a host here, also one that
// docker would take for a namespace.
func parseRepository(s string) (name.Repository, error) {
	host, repo, _ := strings.Cut(s, "/")
	if host == "" || repo == "" || strings.Contains(s, "@") || path.Clean("/"+repo) != "/"+repo {
		return name.Repository{}, errNoRepository
	}
	reg, err := name.NewRegistry(host, name.StrictValidation)
	if err == nil {
		_, err = name.NewRepository("example.com/" + repo)
	}
	if err != nil { // it repeats the name as it is
		return name.Repository{}, errors.New(httpio.OneLine(err.Error(), maxWords))
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

// ReadsWhole reports whether the server has answered with a whole blob where a
// range was asked for.
func (r *remoteBlobs) ReadsWhole() bool { return r.whole.Load() }

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
	if r.absent.has(digest) {
		return nil, q.fail(errAbsent())
	}
	if chunkstore.IsFresh(ctx) {
		r.hangUp()
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
	if q.away(resp) {
		q.remote.signed.put(q.digest, resp.Request.URL)
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

// send gets a response: from where the registry has sent us to for this blob a
// moment ago, else from the registry, after a new login where it wants one.
func (q *request) send() (*http.Response, error) {
	r := q.remote
	if u, ok := r.signed.get(q.digest); ok {
		resp, err := q.get(u, "")
		if err == nil && (resp.StatusCode == http.StatusPartialContent || resp.StatusCode == http.StatusOK) {
			r.signed.worked()
			return resp, nil
		}
		r.signed.failed(q.digest)
		if q.ctx.Err() != nil {
			return resp, err
		}
		if err == nil {
			resp.Body.Close()
		}
	}
	for retried := false; ; retried = true {
		s := r.session.Load()
		u := url.URL{Scheme: s.scheme, Host: r.endpoint.Host, Path: r.endpoint.Path + "/" + r.repo.RepositoryStr() + "/blobs/" + q.digest}
		if r.endpoint.Namespace != "" {
			u.RawQuery = "ns=" + url.QueryEscape(r.endpoint.Namespace)
		}
		resp, err := q.get(u.String(), s.login)
		if err != nil {
			return nil, err
		}
		if !retried && r.wantsLogin(s, resp) {
			resp.Body.Close()
			if err := r.renew(q.ctx, s, resp); err != nil {
				return nil, err
			}
			continue
		}
		return resp, nil
	}
}

// get sends one request for the range, following redirects. The login goes to
// the endpoint only.
func (q *request) get(address, login string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(q.ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", q.off, q.off+q.n-1))
	req.Header.Set("Accept-Encoding", "identity")
	client := http.Client{
		Transport:     httpio.Authorized{Inner: q.remote.base, Origin: httpio.OriginOf(req.URL), Login: login},
		CheckRedirect: httpio.CheckRedirect,
	}
	return client.Do(req)
}

// away reports whether resp came from where the registry redirected to.
func (q *request) away(resp *http.Response) bool {
	return resp.Request.URL.Host != q.remote.endpoint.Host
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
		q.remote.whole.Store(false)
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
		if q.off > 0 || resp.ContentLength > q.n {
			q.remote.whole.Store(true)
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
	away := q.away(resp)
	e := httpio.Refusal(resp, away)
	switch resp.StatusCode {
	case http.StatusNotFound:
		if q.remote.endpoint.Namespace != "" {
			q.remote.absent.add(q.digest)
			return e.Hint("%w: the mirror does not have this blob", chunkstore.ErrNotFound)
		}
		return e.Hint("%w: the registry does not have this blob; it may have been deleted with the tag of its image, or docker push has left it behind: bootfs-convert copy and skopeo copy --all take it along", chunkstore.ErrNotFound)
	case http.StatusRequestedRangeNotSatisfiable:
		return e.Hint("the blob ends before byte %d", q.off+q.n)
	case http.StatusUnauthorized, http.StatusForbidden:
		if !away {
			hint := "the registry wants other credentials"
			if q.remote.advice != "" {
				hint += ": " + q.remote.advice
			}
			return e.Hint("%s", hint)
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

// fail makes a *chunkstore.Error of err.
func (q *request) fail(err error) error {
	q.remote.signed.forget(q.digest)
	e := &httpio.Error{Err: err} // of what was asked for, before there was a request
	if q.ctx != nil {
		if context.Cause(q.ctx) == httpio.ErrStalled {
			q.remote.hangUp() // other connections to the same place are likely as dead
		}
		var login *transport.Error
		var broken *url.Error
		// Where https and http were tried, and http is not what the server
		// speaks, the reason stands beside its 400.
		if errors.As(err, &login) && !(login.StatusCode == http.StatusBadRequest && errors.As(err, &broken)) {
			err = &httpio.Error{
				Status:    login.StatusCode,
				Temporary: login.Temporary(),
				Err:       fmt.Errorf("login at %s: %s", q.remote.endpoint.Host, httpio.OneLine(login.Error(), maxWords)),
			}
		}
		e = httpio.Judge(q.ctx, q.watch, err, "registry+http://…")
	}
	failed := Failed(q.remote.address, q.digest, e.Err)
	failed.Status, failed.Retry, failed.After = e.Status, e.Temporary, e.After
	return failed
}
