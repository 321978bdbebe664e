package httpstore

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// request is what one call asks of the server: mostly one request.
type request struct {
	store *Store
	did   string
	id    index.ID
	ctx   context.Context
	watch *httpio.Watch // cancels ctx
	end   func()

	loggedIn bool // the last request carried credentials
}

// begin waits for a turn, which the request's end ends.
func (s *Store) begin(ctx context.Context, did string, id index.ID, limit time.Duration) (*request, error) {
	q := &request{store: s, did: did + " chunk " + id.String(), id: id}
	if chunkstore.IsFresh(ctx) {
		s.hangUp()
	}
	var err error
	if q.ctx, q.watch, q.end, err = s.slots.Acquire(ctx, limit); err != nil {
		return nil, q.fail(err)
	}
	return q, nil
}

// send sends a request and returns the response up to its body, after asking
// for other credentials where the server refuses those it got.
func (q *request) send(method, address string, body []byte, header ...string) (*http.Response, error) {
	for retried := false; ; retried = true {
		q.watch.Begin()
		login, err := q.store.currentLogin(q.ctx)
		if err != nil {
			return nil, err
		}
		q.loggedIn = *login != ""
		req, err := http.NewRequestWithContext(q.ctx, method, address, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Accept-Encoding", "identity")
		req.Header.Set("User-Agent", "bootfs")
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		if body != nil {
			req.Header.Set("Content-Type", "application/octet-stream")
			httpio.SetBody(req, body, q.watch)
		}
		client := http.Client{Transport: httpio.Authorized{Inner: q.store.transport, Origin: q.store.origin, Login: *login}, CheckRedirect: httpio.CheckRedirect}
		resp, err := client.Do(req)
		q.watch.Stop()
		if err != nil {
			return nil, err
		}
		refused := resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden
		if !refused || retried || q.store.ask == nil || q.away(resp) {
			return resp, nil
		}
		q.watch.Restart()
		other, err := q.store.renewLogin(q.ctx, login)
		q.watch.Stop()
		if err == nil && *other == *login {
			return resp, nil
		}
		q.watch.Leave(resp)
		if err != nil {
			return nil, err
		}
	}
}

// currentLogin returns the Authorization header to be used.
func (s *Store) currentLogin(ctx context.Context) (*string, error) {
	if l := s.login.Load(); l != nil {
		return l, nil
	}
	return s.renewLogin(ctx, nil)
}

// renewLogin replaces the login old, as when a password has changed.
func (s *Store) renewLogin(ctx context.Context, old *string) (*string, error) {
	return s.login.Renew(ctx, old, func(ctx context.Context) (*string, error) {
		l, err := s.ask(ctx)
		if err != nil {
			return nil, fmt.Errorf("credentials for %s: %w", s.origin, err)
		}
		h := l.header()
		return &h, nil
	})
}

// away reports whether a response came from where the server redirected to.
func (q *request) away(resp *http.Response) bool {
	return httpio.OriginOf(resp.Request.URL) != q.store.origin
}

// statusError tells what a status other than success means, and what to do.
func (q *request) statusError(resp *http.Response) error {
	away := q.away(resp)
	e := httpio.Refusal(resp, away)
	writes := resp.Request.Method == http.MethodPut
	switch code := resp.StatusCode; {
	case code == http.StatusNotFound && writes, code == http.StatusConflict:
		return e.Hint("the server has no place for the chunk: make the directory %s there, and let PUT make those below it", q.store.base)
	case code == http.StatusNotFound, code == http.StatusGone:
		return e.Hint("%w", chunkstore.ErrNotFound)
	case (code == http.StatusUnauthorized || code == http.StatusForbidden) && away:
		return e.Hint("credentials go to %s only; name the store as it is called there if it wants them", q.store.origin)
	case code == http.StatusUnauthorized && q.loggedIn:
		return e.Hint("the server refuses the credentials")
	case code == http.StatusUnauthorized:
		return e.Hint("the server wants credentials")
	case code == http.StatusForbidden && writes:
		return e.Hint("the server does not let us write: allow PUT there, and see that the credentials are those of a writer")
	case code == http.StatusForbidden:
		return e.Hint("the server does not let us read: see to its file permissions, or to the credentials")
	case (code == http.StatusMethodNotAllowed || code == http.StatusNotImplemented) && writes:
		return e.Hint("the server takes no PUT: turn on WebDAV at %s, or write the chunks into the directory that it serves", q.store.base)
	case code == http.StatusRequestEntityTooLarge:
		return e.Hint("the server must allow requests of %d MiB", chunkstore.MaxStored>>20)
	case code == http.StatusInsufficientStorage:
		return e.Hint("%w", chunkstore.ErrFull)
	case code == http.StatusBadRequest && resp.Request.URL.Scheme == "http":
		return e.Hint("if the server speaks HTTPS, name the store https://…")
	}
	return e
}

// fail makes a *chunkstore.Error of err.
func (q *request) fail(err error) error {
	if context.Cause(q.ctx) == httpio.ErrStalled {
		q.store.hangUp() // other connections to the same place are likely as dead
	}
	e := httpio.Judge(q.ctx, q.watch, err, "http://…")
	return &chunkstore.Error{Store: q.store.base, Did: q.did, Status: e.Status, Err: e.Err, Retry: e.Temporary, After: e.After}
}
