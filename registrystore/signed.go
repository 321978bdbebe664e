package registrystore

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

const (
	// maxSigned bounds the URLs that one remoteBlobs remembers.
	maxSigned = 256
	// signedFor is how long a URL is used at most, whatever it says of itself.
	signedFor = 3 * time.Minute
	// signedMargin is how long before its end a URL is no longer used: a request
	// takes its time, and clocks differ.
	signedMargin = 15 * time.Second
	// maxSignedFailures is how many URLs in a row may turn out to be good for one
	// request only before none is used again.
	maxSignedFailures = 3
)

// signedURLs remembers where the registry redirected to for a blob, so that the
// next read of it is one request and not two.
type signedURLs struct {
	mu       sync.Mutex // guards what follows
	urls     map[string]signedURL
	failures int // in a row
}

type signedURL struct {
	url  string
	ends time.Time
}

// get returns the URL of a blob that is still good.
func (s *signedURLs) get(digest string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u, ok := s.urls[digest]
	if ok && time.Now().After(u.ends) {
		delete(s.urls, digest)
		ok = false
	}
	return u.url, ok
}

func (s *signedURLs) put(digest string, u *url.URL) {
	now := time.Now()
	ends := now.Add(signedFor)
	if told, ok := expiry(u.Query()); ok && told.Add(-signedMargin).Before(ends) {
		ends = told.Add(-signedMargin)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known, ok := s.urls[digest]; ok && known.url == u.String() || s.failures >= maxSignedFailures || !now.Before(ends) {
		return
	}
	if s.urls == nil {
		s.urls = make(map[string]signedURL)
	}
	if len(s.urls) >= maxSigned {
		maps.DeleteFunc(s.urls, func(_ string, u signedURL) bool { return now.After(u.ends) })
	}
	if len(s.urls) >= maxSigned {
		clear(s.urls)
	}
	s.urls[digest] = signedURL{u.String(), ends}
}

// forget makes the next read of a blob ask the registry again.
func (s *signedURLs) forget(digest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.urls, digest)
}

// failed forgets the URL of a blob, which was not good for another request.
func (s *signedURLs) failed(digest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.urls, digest)
	s.failures++
}

// worked notes that a URL was good for another request.
func (s *signedURLs) worked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures = 0
}

// expiry reads from the query of a signed URL when it dies, in the forms of S3
// and Google's storage, of CloudFront and older S3, and of Azure.
func expiry(q url.Values) (time.Time, bool) {
	for _, vendor := range []string{"X-Amz-", "X-Goog-"} {
		from, err := time.Parse("20060102T150405Z", q.Get(vendor+"Date"))
		if seconds, ok := parseSeconds(q.Get(vendor + "Expires")); ok && err == nil {
			return from.Add(time.Duration(seconds) * time.Second), true
		}
	}
	if seconds, ok := parseSeconds(q.Get("Expires")); ok {
		return time.Unix(seconds, 0), true
	}
	if t, err := time.Parse(time.RFC3339, q.Get("se")); err == nil {
		return t, true
	}
	return time.Time{}, false
}

// parseSeconds reads a number that a time can hold.
func parseSeconds(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 33)
	return int64(n), err == nil
}

const (
	absentFor = 10 * time.Second
	maxAbsent = 1000
)

// absences remembers for a moment which blobs a mirror does not have: that is
// one answer for all the chunks of a pack, which the next place is asked for.
type absences struct {
	mu    sync.Mutex // guards until
	until map[string]time.Time
}

func (a *absences) has(digest string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Now().Before(a.until[digest])
}

func (a *absences) add(digest string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.until == nil || len(a.until) >= maxAbsent {
		a.until = make(map[string]time.Time)
	}
	a.until[digest] = time.Now().Add(absentFor)
}

func errAbsent() error {
	return &httpio.Error{Status: http.StatusNotFound, Err: fmt.Errorf("%w: the mirror did not have this blob a moment ago", chunkstore.ErrNotFound)}
}
