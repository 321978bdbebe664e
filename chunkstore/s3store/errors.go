package s3store

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// refusesKeys reports whether other credentials might be let in; certainly, that
// it is the credentials which are wrong and not what is done with them.
func refusesKeys(status int, f fault) (maybe, certainly bool) {
	switch f.code {
	case "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch":
		return true, true
	}
	return status == http.StatusUnauthorized || status == http.StatusForbidden, false
}

// temporaryCodes are S3's errors that pass by themselves, whatever their status.
var temporaryCodes = []string{
	"InternalError", "RequestTimeout", "ServerBusy", "ServiceUnavailable", "SlowDown",
	"SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "RequestLimitExceeded", "IncompleteBody",
}

// refusal tells what a response other than success means, and what to do.
func (q *request) refusal(a ask, resp *http.Response, u used, f fault) error {
	s := q.store
	e := httpio.Refusal(resp, false)
	// A conflict is with somebody who writes the same at the same time.
	e.Temporary = e.Temporary || resp.StatusCode == http.StatusConflict || slices.Contains(temporaryCodes, f.code)
	if f.code != "" {
		e.Err = fmt.Errorf("%w: %s", e.Err, f.code)
	}
	switch f.code {
	case "NoSuchKey":
		return e.Hint("%w", chunkstore.ErrNotFound)
	case "NoSuchBucket":
		return e.Hint("there is no bucket %q at %s: make it, or name another", s.address.bucket, u.place.host)
	case "AccessDenied", "AllAccessDisabled", "AccountProblem":
		return e.Hint("%s", q.denied(a, u))
	case "InvalidAccessKeyId":
		return e.Hint("the server does not know the access key: it is another server's, or was deleted")
	case "SignatureDoesNotMatch":
		return e.Hint("the secret key is not that of the access key, or something between here and the server changes requests")
	case "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken":
		return e.Hint("the session token is no longer good: log in again and give the new one")
	case "RequestTimeTooSkewed", "RequestExpired":
		return e.Hint("this machine's clock says %s and the server's %s: set it",
			time.Now().UTC().Format(time.RFC3339), serverTime(resp))
	case "AuthorizationHeaderMalformed", "InvalidRegion":
		return e.Hint("the region %q is not the bucket's: name it behind the address, ?region=%s", u.place.region, cmp.Or(f.region, "REGION"))
	case "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage":
		return e.Hint("%w", chunkstore.ErrFull)
	case "EntityTooLarge":
		return e.Hint("the server must take objects of %d MiB", chunkstore.MaxStored>>20)
	case "InvalidObjectState":
		return e.Hint("the chunk lies in an archive: restore it, and keep the store in a class that answers at once")
	}
	switch code := resp.StatusCode; {
	case code/100 == 3:
		return e.Hint("%s", s.elsewhere(resp, f))
	case code == http.StatusNotFound && f.code == "" && a.key != "" && a.method != http.MethodPut:
		return e.Hint("%w", chunkstore.ErrNotFound)
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return e.Hint("%s", q.denied(a, u))
	case code == http.StatusInsufficientStorage:
		return e.Hint("%w", chunkstore.ErrFull)
	case f.code == "" && code < 500:
		return e.Hint("that is not how an S3 server answers: see whether %s is one", u.place.host)
	}
	// What the server says may repeat what it was sent.
	if f.message != "" && (u.keys.SessionToken == "" || !strings.Contains(f.message, u.keys.SessionToken)) {
		return e.Hint("%s", f.message)
	}
	return e
}

// denied tells which right a request lacks.
func (q *request) denied(a ask, u used) string {
	if u.keys.AccessKey == "" {
		return "no credentials were found, and the bucket is not everybody's: " + q.store.advice
	}
	bucket := "arn:aws:s3:::" + q.store.address.bucket
	objects := bucket + "/" + q.store.address.prefix + "*"
	switch {
	case a.method == http.MethodPut:
		return "these credentials may not write: allow them s3:PutObject on " + objects
	case a.method == http.MethodDelete:
		return "these credentials may not remove: allow them s3:DeleteObject on " + objects
	case a.key == "":
		return "these credentials may not list: allow them s3:ListBucket on " + bucket
	}
	return "these credentials may not read, or the chunk is not there and they may not know it: allow them s3:GetObject on " + objects + " and s3:ListBucket on " + bucket
}

// elsewhere tells how to name a store that the server says is not here.
func (s *Store) elsewhere(resp *http.Response, f fault) string {
	host := f.endpoint
	if host == "" {
		host = httpio.HostOf(resp.Header.Get("Location"))
	}
	if there, ok := parseAWS(strings.TrimPrefix(host, "https://")); ok {
		host = there.String()
	}
	what := "the bucket is elsewhere, and credentials do not go there by themselves: name the store as it is called at " + cmp.Or(strings.TrimSuffix(host, "://"), "its own endpoint")
	if f.region != "" {
		what += ", with ?region=" + f.region
	}
	return what
}

// serverTime is what the server's clock says.
func serverTime(resp *http.Response) string {
	if t, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		return t.UTC().Format(time.RFC3339)
	}
	return "something else"
}
