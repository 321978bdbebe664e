package httpio

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"
)

// Error is why a request failed. A store puts it into an error of its own, which
// says what was asked for.
type Error struct {
	Status int   // HTTP status that the failure stands for, 0 if none
	Err    error // one line, without the query of a signed URL
	// Temporary reports whether the same request may succeed a little later,
	// with nothing changed by anybody.
	Temporary bool
	// After is how long the server asked to be left alone, 0 if it did not say.
	After time.Duration
}

func (e *Error) Error() string { return e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Hint adds to e what it means here, or what to do. It returns e.
func (e *Error) Hint(format string, args ...any) *Error {
	e.Err = fmt.Errorf("%w: "+format, append([]any{e.Err}, args...)...)
	return e
}

// Refusal tells what a status other than success means at any server; away says
// that it is not the server that was asked, but one that it redirected to.
func Refusal(resp *http.Response, away bool) *Error {
	code := resp.StatusCode
	what := fmt.Sprintf("%d %s", code, http.StatusText(code))
	if away {
		what += " from " + HostOf(resp.Request.URL.String())
	}
	e := &Error{Status: code}
	switch {
	case code == http.StatusNotImplemented, code == http.StatusHTTPVersionNotSupported, code == http.StatusInsufficientStorage:
	case code == http.StatusRequestTimeout, code == http.StatusTooEarly, code == http.StatusTooManyRequests, code >= 500:
		e.Temporary = true
		e.After = RetryAfter(resp.Header.Get("Retry-After"), time.Now())
		if e.After > 0 {
			what += fmt.Sprintf(", to be asked again in %s", e.After.Round(time.Second))
		}
	case (code == http.StatusUnauthorized || code == http.StatusForbidden) && away:
		// A signed URL has died; the next request gets a new one.
		e.Temporary = true
	}
	e.Err = errors.New(what)
	return e
}

// Judge tells what it means that a request failed with err. An err that is an
// *Error already is taken over, unless the request was ended. ctx is the
// request's, and w the Watch that cancels it. plain is how to name the store if
// its server speaks plain HTTP.
func Judge(ctx context.Context, w *Watch, err error, plain string) *Error {
	switch {
	case w != nil && context.Cause(ctx) == ErrStalled:
		return &Error{Err: w.stalled(), Temporary: true}
	case ctx.Err() != nil:
		return &Error{Err: context.Cause(ctx)}
	}
	// errors.As would find another request's error too, which may stand in err
	// as the reason why this one failed.
	if own, ok := err.(*Error); ok {
		return own
	}
	e := &Error{Err: err, Temporary: true}
	var certificate *tls.CertificateVerificationError
	var broken *url.Error
	where := ""
	if errors.As(err, &broken) {
		where = HostOf(broken.URL) + ": "
		e.Err = broken.Err
	}
	if refused, ok := e.Err.(*Error); ok { // before it was sent
		e.Temporary = refused.Temporary
	}
	switch {
	case errors.As(e.Err, &certificate):
		e.Temporary = false
	case errors.As(err, &certificate):
		e.Temporary = false
		e.Err = certificate
	case errors.Is(err, http.ErrSchemeMismatch):
		e.Temporary = false
		e.Err = fmt.Errorf("the server speaks plain HTTP: name the store %s, or make it speak HTTPS", plain)
	case errors.Is(err, ErrRedirects), errors.Is(err, ErrDowngrade), errors.Is(err, ErrRedirectedWrite):
		e.Temporary = false
	}
	e.Err = fmt.Errorf("%s%w", where, e.Err)
	return e
}

// OneLine makes a server's words fit for a message: one line of at most that
// many bytes, without what a terminal would obey.
func OneLine(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
