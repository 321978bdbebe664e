package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// How a blob goes up.
const (
	// pieceSize is what is sent at once, in bytes: it is all that a broken
	// connection costs where the registry remembers the pieces before it.
	pieceSize = 16 << 20
	// sendStall is how long a registry may take nothing of what is sent, and
	// answerStall how long it may think about what it got: it hashes there.
	sendStall   = 30 * time.Second
	answerStall = 2 * time.Minute
	// firstPause follows the first failure in a row; each later one is four
	// times as long. A registry that wants to be left alone for longer than
	// maxPause ends the upload.
	firstPause = 200 * time.Millisecond
	maxPause   = 2 * time.Minute
	// maxAnswer bounds what is read of an answer, in bytes.
	maxAnswer = maxManifest
)

// uploader writes blobs and manifests to one repository. It goes on where a
// connection broke, and needs nothing but what the registry says of the upload.
// It is safe for concurrent use.
type uploader struct {
	repo     name.Repository
	keychain authn.Keychain
	base     http.RoundTripper
	progress func(int64) // negative where bytes have to be sent again

	piece               int64
	sending, answering  time.Duration
	pause               time.Duration
	whole, headsRefused atomic.Bool // what the registry turned out not to know

	mu      sync.Mutex // guards what follows
	session *session   // nil before the first request
	scopes  []string
	known   map[v1.Hash]bool // blobs that are there: they are named again by manifests
}

// session is a login.
type session struct {
	http.RoundTripper
	scopes []string
}

func newUploader(p *repository, progress func(int64)) *uploader {
	return &uploader{
		repo: p.ref.Context(), keychain: p.keychain, base: transport.NewUserAgent(rewind{p.transport}, "bootfs-convert"), progress: progress,
		piece: pieceSize, sending: sendStall, answering: answerStall, pause: firstPause,
		scopes: []string{p.ref.Context().Scope(transport.PushScope)}, known: make(map[v1.Hash]bool),
	}
}

// rewind gives each try of a request its body from the beginning: a login in
// the middle sends a request twice.
type rewind struct{ inner http.RoundTripper }

func (t rewind) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.GetBody != nil {
		body, err := r.GetBody()
		if err != nil {
			return nil, err
		}
		if r.Body != nil {
			r.Body.Close()
		}
		again := *r
		again.Body = body
		r = &again
	}
	return t.inner.RoundTrip(r)
}

// login returns a session with all scopes that are known by now, which is not
// old.
func (u *uploader) login(ctx context.Context, old *session) (*session, error) {
	type result struct {
		s   *session
		err error
	}
	done := make(chan result, 1) // a credential helper does not know of ctx
	go func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		s := u.session
		if s != nil && s != old && slices.Equal(s.scopes, u.scopes) {
			done <- result{s, nil}
			return
		}
		auth, err := authn.Resolve(ctx, u.keychain, u.repo)
		if err != nil {
			done <- result{nil, fmt.Errorf("credentials for %s: %w", u.repo.RegistryStr(), err)}
			return
		}
		s = &session{scopes: slices.Clone(u.scopes)}
		if s.RoundTripper, err = transport.NewWithContext(ctx, u.repo.Registry, auth, u.base, s.scopes); err == nil {
			u.session = s
		}
		done <- result{s, err}
	}()
	select {
	case r := <-done:
		return r.s, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// allow says whether logins are to ask for reading another repository too.
func (u *uploader) allow(repository string, allowed bool) {
	scope := u.repo.Registry.Repo(repository).Scope(transport.PullScope)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.scopes = slices.DeleteFunc(u.scopes, func(s string) bool { return s == scope })
	if allowed {
		u.scopes = append(u.scopes, scope)
	}
}

// failure is a request that went wrong in a way that may pass.
type failure struct {
	err   error
	after time.Duration // how long the registry wants to be left alone; 0 if it does not say
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// judge tells what may pass from what will not. The text of an error has no
// query: it may be the signature of a URL.
func judge(ctx context.Context, err error) error {
	var (
		status *transport.Error
		broken *url.Error
		known  *failure
	)
	switch {
	case err == nil || errors.As(err, &known):
		return err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &status):
		if passes(status.StatusCode) {
			return &failure{err: err}
		}
		return err
	case isPermanent(err):
	default:
		err = &failure{err: err}
	}
	if errors.As(err, &broken) {
		short := fmt.Errorf("%s: %w", httpio.HostOf(broken.URL), broken.Err)
		if errors.As(err, &known) {
			return &failure{err: short}
		}
		return short
	}
	return err
}

// isPermanent knows what stays as it is until somebody does something about it.
func isPermanent(err error) bool {
	var (
		certificate *tls.CertificateVerificationError
		own         *unreadable
	)
	return errors.As(err, &certificate) || errors.As(err, &own) || errors.Is(err, errPlainHTTP) ||
		errors.Is(err, httpio.ErrDowngrade) || errors.Is(err, httpio.ErrRedirects)
}

// patience counts failures in a row.
type patience struct {
	u        *uploader
	failures int
}

// wait waits before the next try, or returns why there is none.
func (p *patience) wait(ctx context.Context, err error) error {
	var f *failure
	if !errors.As(err, &f) {
		return err
	}
	if p.failures++; p.failures > maxFailures {
		return f.err
	}
	if f.after > maxPause {
		return fmt.Errorf("%w; it wants to be asked again in %s", f.err, f.after.Round(time.Second))
	}
	pause := time.Duration(float64(p.u.pause<<(2*(p.failures-1))) * (0.5 + rand.Float64()))
	select {
	case <-time.After(max(pause, f.after)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// answer is what came back, whole.
type answer struct {
	*http.Response
	text string // the beginning of its body
}

// err is the answer's as an error.
func (a *answer) err() error {
	a.Body = io.NopCloser(strings.NewReader(a.text))
	err := transport.CheckError(a.Response)
	if f := judge(context.Background(), err); f != err {
		return &failure{err, httpio.RetryAfter(a.Header.Get("Retry-After"), time.Now())}
	}
	return err
}

// location is where an upload goes on. A registry that begins with https keeps
// to it.
func (a *answer) location() (*url.URL, error) {
	to, err := a.Response.Location()
	if err != nil {
		return nil, fmt.Errorf("%s gave no place to upload to: %w", a.Request.URL.Host, err)
	}
	if to.Scheme != "https" && a.Request.URL.Scheme == "https" {
		return nil, fmt.Errorf("%s sent the upload to %s: %w", a.Request.URL.Host, to.Host, httpio.ErrDowngrade)
	}
	to.User = nil
	return to, nil
}

// content is the body of a request.
type content struct {
	size int64
	open func() (io.ReadCloser, error)
	// whole says that what open returns ends here: it may find at its end that
	// its bytes were not those that it should have.
	whole bool
	sent  atomic.Int64 // bytes handed out so far
}

// do sends one request and reads its answer. A refused login is renewed once.
func (u *uploader) do(ctx context.Context, method string, to *url.URL, header http.Header, c *content) (*answer, error) {
	var s *session
	for renewed := false; ; renewed = true {
		var err error
		if s, err = u.login(ctx, s); err != nil {
			return nil, judge(ctx, err)
		}
		a, err := u.send(ctx, s, method, to, header, c)
		if err != nil {
			return nil, err
		}
		if refused := a.StatusCode == http.StatusUnauthorized || a.StatusCode == http.StatusForbidden; !refused || renewed || a.Request.URL.Host != u.repo.RegistryStr() {
			return a, nil
		}
	}
}

func (u *uploader) send(ctx context.Context, s *session, method string, to *url.URL, header http.Header, c *content) (*answer, error) {
	watched, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(u.answering, func() { cancel(httpio.ErrStalled) })
	defer watch.Stop()
	req, err := http.NewRequestWithContext(watched, method, to.String(), nil)
	if err != nil {
		return nil, err
	}
	if header != nil {
		req.Header = header.Clone()
	}
	if c != nil {
		req.ContentLength, req.Body = c.size, http.NoBody
		if c.size > 0 {
			req.Body = io.NopCloser(strings.NewReader(""))
		}
		req.GetBody = func() (io.ReadCloser, error) {
			u.progress(-c.sent.Swap(0))
			if c.size == 0 {
				return http.NoBody, nil
			}
			rc, err := c.open()
			if err != nil {
				return nil, &unreadable{err}
			}
			watch.Reset(u.sending)
			return &sentBody{rc: rc, left: c.size, whole: c.whole, took: func(n int, done bool) {
				c.sent.Add(int64(n))
				u.progress(int64(n))
				if done {
					watch.Reset(u.answering)
				} else {
					watch.Reset(u.sending)
				}
			}}, nil
		}
	}
	client := http.Client{Transport: s, CheckRedirect: httpio.CheckRedirect}
	resp, err := client.Do(req)
	var text []byte
	if err == nil {
		watch.Reset(u.answering)
		text, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		resp.Body.Close()
	}
	if err != nil {
		var own *unreadable
		switch {
		case context.Cause(watched) == httpio.ErrStalled && ctx.Err() == nil:
			return nil, &failure{err: fmt.Errorf("%s: %w", to.Host, httpio.ErrStalled)}
		case errors.As(err, &own):
			return nil, own
		}
		return nil, judge(ctx, err)
	}
	return &answer{resp, string(text)}, nil
}

// unreadable is a blob that cannot be read: no fault of the registry.
type unreadable struct{ err error }

func (e *unreadable) Error() string { return e.err.Error() }
func (e *unreadable) Unwrap() error { return e.err }

// sentBody is a blob, or a piece of one, on its way.
type sentBody struct {
	rc    io.ReadCloser
	left  int64
	whole bool // as in content
	took  func(n int, done bool)
}

func (b *sentBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.rc.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	if b.left == 0 && b.whole && err == nil {
		_, err = io.ReadFull(b.rc, make([]byte, 1))
	}
	switch {
	case b.left == 0 && (err == nil || err == io.EOF || !b.whole):
		err = io.EOF
	case err == io.EOF:
		n, err = 0, &unreadable{io.ErrUnexpectedEOF}
	case err != nil:
		// The last bytes do not go where they are known to be wrong.
		n, err = 0, &unreadable{err}
	}
	b.took(n, b.left == 0)
	return n, err
}

func (b *sentBody) Close() error { return b.rc.Close() }

// at returns the URL of something in the repository.
func (u *uploader) at(path string) *url.URL {
	return &url.URL{Scheme: u.repo.Scheme(), Host: u.repo.RegistryStr(), Path: "/v2/" + u.repo.RepositoryStr() + "/" + path}
}

// has reports whether the repository has "blobs/DIGEST" or
// "manifests/REFERENCE".
func (u *uploader) has(ctx context.Context, path string) (bool, error) {
	to := u.at(path)
	header := http.Header{}
	if strings.HasPrefix(path, "manifests/") {
		header["Accept"] = manifestTypes
	}
	p := patience{u: u}
	for {
		var a *answer
		var err error
		head := !u.headsRefused.Load()
		if head {
			a, err = u.do(ctx, http.MethodHead, to, header, nil)
		} else {
			ranged := header.Clone()
			ranged.Set("Range", "bytes=0-0")
			a, err = u.do(ctx, http.MethodGet, to, ranged, nil)
		}
		if err == nil {
			switch a.StatusCode {
			case http.StatusOK, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable:
				return true, nil
			case http.StatusNotFound:
				return false, nil
			}
			if err = a.err(); !errors.As(err, new(*failure)) {
				if head { // there are registries and proxies that refuse HEAD
					u.headsRefused.Store(true)
					continue
				}
				return false, err
			}
		}
		if err := p.wait(ctx, err); err != nil {
			return false, err
		}
	}
}

// upload is a blob on its way.
type upload struct {
	*uploader
	blob

	to    *url.URL // where it goes on; nil: to be begun
	off   int64    // bytes that the registry has
	piece int64    // the size of the next one
	// unsure says that a request failed: the registry knows how far it came.
	unsure bool
	// clean says that nothing failed since the upload began, so that what is
	// refused is not known there at all.
	clean bool
	asked bool // off is what the registry said, and no piece has come since
	begun int  // how often: a registry may forget an upload
}

// put stores b unless it is there. reused says that nothing was sent.
func (u *uploader) put(ctx context.Context, b blob) (reused bool, err error) {
	u.mu.Lock()
	known := u.known[b.digest]
	u.mu.Unlock()
	if known {
		return true, nil
	}
	if reused, err = u.store(ctx, b); err == nil {
		u.mu.Lock()
		u.known[b.digest] = true
		u.mu.Unlock()
	}
	return reused, err
}

func (u *uploader) store(ctx context.Context, b blob) (reused bool, err error) {
	if ok, err := u.has(ctx, "blobs/"+b.digest.String()); err != nil || ok {
		return ok, err
	}
	up := &upload{uploader: u, blob: b}
	p := patience{u: u}
	for {
		before := up.off
		done, err := up.step(ctx)
		switch {
		case done:
			return up.begun == 0, err
		case err != nil:
			up.unsure, up.clean = true, false
			if err := p.wait(ctx, err); err != nil {
				return false, fmt.Errorf("after %d of %d bytes: %w", up.off, b.size, err)
			}
		case up.off > before:
			p.failures = 0
		}
	}
}

// maxBegun bounds how often an upload begins.
const maxBegun = 8

// step does the next request. done says that the blob is there; if begun is 0,
// it has been mounted.
func (u *upload) step(ctx context.Context) (done bool, err error) {
	switch {
	case u.to == nil:
		return u.begin(ctx)
	case u.unsure:
		return u.ask(ctx)
	case u.off < u.size && !u.isWhole():
		return false, u.sendPiece(ctx)
	}
	return u.finish(ctx)
}

// isWhole reports whether the blob goes up with the request that ends the
// upload.
func (u *upload) isWhole() bool {
	return u.off == 0 && (u.size <= u.uploader.piece || u.whole.Load())
}

// restart begins anew, in the whole if the registry does not take pieces.
func (u *upload) restart(whole bool) {
	if whole {
		u.whole.Store(true)
	}
	u.progress(-u.off)
	u.to, u.off = nil, 0
}

// begin asks for a place to upload to, or for the blob of another repository.
func (u *upload) begin(ctx context.Context) (done bool, err error) {
	to := u.at("blobs/uploads/")
	from := u.from
	u.from = "" // whatever comes of it: once is enough
	if from != "" {
		u.allow(from, true)
		to.RawQuery = url.Values{"mount": {u.digest.String()}, "from": {from}}.Encode()
	}
	a, err := u.do(ctx, http.MethodPost, to, nil, &content{})
	switch {
	case err == nil && from != "" && a.StatusCode == http.StatusCreated:
		return true, checkStored(a, u.digest)
	case err == nil && a.StatusCode == http.StatusAccepted:
	case from != "" && ctx.Err() == nil:
		// The repository may be somebody else's, and the login refused for it.
		u.allow(from, false)
		return false, nil
	case err == nil:
		return false, a.err()
	default:
		return false, err
	}
	if u.begun++; u.begun > maxBegun {
		return false, fmt.Errorf("the registry forgot %d uploads of the blob", maxBegun)
	}
	u.piece = u.uploader.piece
	if least, err := strconv.ParseInt(a.Header.Get("OCI-Chunk-Min-Length"), 10, 64); err == nil {
		u.piece = max(u.piece, least)
	}
	u.off, u.unsure, u.clean, u.asked = 0, false, true, false
	u.to, err = a.location()
	return false, err
}

// ask finds out how much the registry has.
func (u *upload) ask(ctx context.Context) (done bool, err error) {
	if u.off == u.size || u.isWhole() {
		// The answer to the last request may be what was lost.
		if ok, err := u.has(ctx, "blobs/"+u.digest.String()); err != nil || ok {
			return ok, err
		}
	}
	if u.isWhole() {
		u.restart(false)
		return false, nil
	}
	a, err := u.do(ctx, http.MethodGet, u.to, nil, nil)
	if err != nil {
		return false, err
	}
	if a.StatusCode/100 != 2 {
		if unrelated(a.StatusCode) {
			return false, a.err()
		}
		u.restart(false) // the registry does not know the upload any more
		return false, nil
	}
	have, ok := received(a.Header.Get("Range"))
	if !ok || have == 0 || have > u.size {
		u.restart(false)
		return false, nil
	}
	u.progress(have - u.off)
	u.off, u.unsure, u.asked = have, false, true
	return false, u.follow(a)
}

// follow takes the next place from an answer; without one it stays.
func (u *upload) follow(a *answer) error {
	if a.Header.Get("Location") == "" {
		return nil
	}
	to, err := a.location()
	if err == nil {
		u.to = to
	}
	return err
}

// received reads the Range header of an upload: "0-LAST". An upload of no byte
// says 0-0, as one of a single byte does: both count for none, and begin anew.
func received(h string) (int64, bool) {
	first, last, ok := strings.Cut(strings.TrimPrefix(h, "bytes="), "-")
	n, err := strconv.ParseUint(last, 10, 62)
	if !ok || first != "0" || err != nil {
		return 0, false
	}
	if n > 0 {
		n++
	}
	return int64(n), true
}

func (u *upload) sendPiece(ctx context.Context) error {
	n := min(u.piece, u.size-u.off)
	c := &content{size: n, open: func() (io.ReadCloser, error) { return u.open(ctx, u.off) }}
	a, err := u.do(ctx, http.MethodPatch, u.to, http.Header{
		"Content-Type":  {"application/octet-stream"},
		"Content-Range": {fmt.Sprintf("%d-%d", u.off, u.off+n-1)},
	}, c)
	if err != nil {
		u.progress(-c.sent.Load())
		return err
	}
	switch {
	case a.StatusCode == http.StatusAccepted || a.StatusCode == http.StatusNoContent || a.StatusCode == http.StatusCreated:
		have := u.off + n
		if r := a.Header.Get("Range"); r != "" {
			if told, ok := received(r); ok && told < have {
				u.progress(told - have)
				have = told
			}
		}
		if have <= u.off {
			return &failure{err: fmt.Errorf("the registry took none of %d bytes at %d", n, u.off)}
		}
		u.off, u.asked = have, false
		return u.follow(a)
	}
	u.progress(-c.sent.Load())
	if unrelated(a.StatusCode) {
		return a.err()
	}
	switch {
	case u.clean:
		u.restart(true)
	case u.asked: // it cannot go on from where it says it is
		u.restart(false)
	default:
		u.unsure = true
	}
	return nil
}

// passes tells a status that may be another one a little later.
func passes(status int) bool {
	switch status {
	case http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusTooEarly:
		return true
	}
	return status/100 == 5 && status != http.StatusNotImplemented
}

// unrelated tells a status that says nothing on the upload itself.
func unrelated(status int) bool {
	return passes(status) || status == http.StatusUnauthorized || status == http.StatusForbidden
}

// finish ends the upload, with the whole blob if nothing of it is there yet.
func (u *upload) finish(ctx context.Context) (done bool, err error) {
	to := *u.to
	q := to.Query()
	q.Set("digest", u.digest.String())
	to.RawQuery = q.Encode()
	c := &content{size: u.size - u.off, whole: true, open: func() (io.ReadCloser, error) { return u.open(ctx, u.off) }}
	a, err := u.do(ctx, http.MethodPut, &to, http.Header{"Content-Type": {"application/octet-stream"}}, c)
	if err != nil {
		u.progress(-c.sent.Load())
		return false, err
	}
	if a.StatusCode/100 == 2 {
		return true, checkStored(a, u.digest)
	}
	u.progress(-c.sent.Load())
	err = a.err()
	switch {
	case unrelated(a.StatusCode):
		return false, err
	case u.off > 0:
		// Pieces that were put together in another way, or a failure that has
		// cost some: once more, in one.
		u.restart(u.clean)
		return false, nil
	case !u.clean || u.begun == 1:
		u.restart(true)
		return false, nil
	}
	return false, err
}

// checkStored compares what the registry says it has stored.
func checkStored(a *answer, want v1.Hash) error {
	if got := a.Header.Get("Docker-Content-Digest"); got != "" && got != want.String() {
		return fmt.Errorf("%s stored it as %.100q, want %s", a.Request.URL.Host, got, want)
	}
	return nil
}

// get reads a small document; its error wraps fs.ErrNotExist where there is
// none.
func (u *uploader) get(ctx context.Context, to *url.URL, accept []string) (*answer, error) {
	p := patience{u: u}
	for {
		a, err := u.do(ctx, http.MethodGet, to, http.Header{"Accept": accept}, nil)
		if err == nil {
			switch {
			case a.StatusCode == http.StatusOK:
				return a, nil
			case a.StatusCode == http.StatusNotFound:
				return nil, fs.ErrNotExist
			}
			err = a.err()
		}
		if err := p.wait(ctx, err); err != nil {
			return nil, err
		}
	}
}

// manifest reads the manifest that a tag or digest stands for, unverified.
func (u *uploader) manifest(ctx context.Context, reference string) ([]byte, error) {
	a, err := u.get(ctx, u.at("manifests/"+reference), manifestTypes)
	if err != nil {
		return nil, err
	}
	return []byte(a.text), nil
}

// putManifest stores a manifest under a tag or its digest. tracked reports
// that the registry has entered it as a referrer of its subject.
func (u *uploader) putManifest(ctx context.Context, reference string, d v1.Descriptor, raw []byte) (tracked bool, err error) {
	p := patience{u: u}
	for {
		c := &content{size: int64(len(raw)), open: func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(string(raw))), nil
		}}
		a, err := u.do(ctx, http.MethodPut, u.at("manifests/"+reference), http.Header{"Content-Type": {string(d.MediaType)}}, c)
		if err == nil && a.StatusCode/100 == 2 {
			return a.Header.Get("OCI-Subject") != "", checkStored(a, d.Digest)
		}
		u.progress(-c.sent.Load())
		if err == nil {
			err = a.err()
		}
		if err := p.wait(ctx, err); err != nil {
			return false, err
		}
	}
}

// tracksReferrers reports whether the registry lists referrers by itself.
func (u *uploader) tracksReferrers(ctx context.Context, subject v1.Hash) bool {
	a, err := u.get(ctx, u.at("referrers/"+subject.String()), []string{string(types.OCIImageIndex)})
	return err == nil && strings.HasPrefix(a.Header.Get("Content-Type"), string(types.OCIImageIndex))
}
