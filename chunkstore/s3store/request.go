package s3store

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// maxMoves is how often one call follows a bucket to another region.
const maxMoves = 3

// request is what one call asks of the server: mostly one request.
type request struct {
	store *Store
	did   string
	ctx   context.Context
	watch *httpio.Watch // cancels ctx
	end   func()
}

// begin waits for a turn, which the request's end ends.
func (s *Store) begin(ctx context.Context, did string, limit time.Duration) (*request, error) {
	q := &request{store: s, did: did}
	var err error
	if q.ctx, q.watch, q.end, err = s.slots.Acquire(ctx, limit); err != nil {
		return nil, q.fail(err)
	}
	return q, nil
}

// ask is one request to the bucket.
type ask struct {
	method string
	key    string   // "" for the bucket itself
	query  string   // escaped and sorted
	body   []byte   // nil for none
	header []string // names and values; with GET it is a range
}

// answeredBy reports whether status is success.
func (a ask) answeredBy(status int) bool {
	if a.method == http.MethodGet {
		return status == http.StatusOK || status == http.StatusPartialContent && a.header != nil
	}
	return status/100 == 2
}

// used is what a request was made with.
type used struct {
	place *place
	keys  *Credentials
}

// try sends one request and returns the response up to its body, whatever it
// is.
func (q *request) try(a ask) (*http.Response, used, error) {
	q.watch.Begin()
	defer q.watch.Stop()
	s := q.store
	if chunkstore.IsFresh(q.ctx) {
		s.hangUp()
	}
	keys, err := s.keys.current(q.ctx)
	u := used{s.place.Load(), keys}
	if err != nil {
		return nil, u, err
	}
	at := s.address.url(u.place, a.key, a.query)
	req, err := http.NewRequestWithContext(q.ctx, a.method, "", nil)
	if err != nil {
		return nil, u, err
	}
	req.URL, req.Host = at, at.Host
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", "bootfs")
	for i := 0; i < len(a.header); i += 2 {
		req.Header.Set(a.header[i], a.header[i+1])
	}
	payload := emptyPayload
	if a.body != nil {
		httpio.SetBody(req, a.body, q.watch)
		// TLS sees to it that what was sent arrives, and hashing it costs.
		payload = unsignedPayload
		if s.address.scheme == "http" {
			payload = hexSum(a.body)
		}
	}
	sign(req, *keys, u.place.region, payload, time.Now())
	resp, err := s.transport.RoundTrip(req) // follows no redirects
	if err != nil {
		return nil, u, &url.Error{Op: a.method, URL: s.address.scheme + "://" + at.Host, Err: err}
	}
	return resp, u, nil
}

// send sends a request and returns the response of one that succeeded. It
// follows the bucket to where the server says it is, and asks for other
// credentials where the server refuses those it got.
func (q *request) send(a ask) (*http.Response, error) {
	renewed := false
	for moves := 0; ; {
		resp, u, err := q.try(a)
		if err != nil {
			return nil, err
		}
		if a.answeredBy(resp.StatusCode) {
			return resp, nil
		}
		f := q.readFault(resp)
		if moves < maxMoves && q.store.follow(u, resp.StatusCode, f) {
			moves++
			continue
		}
		if maybe, certainly := refusesKeys(resp.StatusCode, f); maybe && !renewed {
			renewed = true
			patience := time.Duration(0)
			if !certainly {
				patience = askAgain
			}
			q.watch.Restart()
			other, err := q.store.keys.renew(q.ctx, u.keys, patience)
			q.watch.Stop()
			if err != nil {
				return nil, err
			}
			if *other != *u.keys {
				continue
			}
		}
		return nil, q.refusal(a, resp, u, f)
	}
}

// readFault reads what a response other than success says, and leaves it.
func (q *request) readFault(resp *http.Response) fault {
	defer resp.Body.Close()
	f := readFault(watched{q.watch, resp.Body})
	if region := resp.Header.Get("X-Amz-Bucket-Region"); f.region == "" && regionName().MatchString(region) {
		f.region = region
	}
	return f
}

// follow takes over where the server says that the bucket is, and reports
// whether there is a new place to try. The host stays, or is the same endpoint
// of AWS in another region: the credentials go nowhere else.
func (s *Store) follow(u used, status int, f fault) bool {
	if s.place.Load() != u.place {
		return true // another request has learned it already
	}
	aws, isAWS := parseAWS(u.place.host)
	if there, ok := parseAWS(f.endpoint); f.region == "" && ok && there.domain == aws.domain {
		f.region = there.region
	}
	if f.region == "" || f.region == u.place.region {
		return false
	}
	next := &place{host: u.place.host, region: f.region}
	switch {
	case isAWS && (status/100 == 3 || status == http.StatusBadRequest):
		host, err := aws.at(f.region)
		if err != nil {
			return false
		}
		next.host = host
	case status/100 != 3 && (f.code == "AuthorizationHeaderMalformed" || f.code == "InvalidRegion" || f.code == ""):
		// The same host, which only wants another name in the signature.
	default:
		return false
	}
	s.place.CompareAndSwap(u.place, next)
	return true
}

// fail makes a *chunkstore.Error of err.
func (q *request) fail(err error) error {
	if context.Cause(q.ctx) == httpio.ErrStalled {
		q.store.hangUp() // other connections to the same place are likely as dead
	}
	e := httpio.Judge(q.ctx, q.watch, err, "s3+http://…")
	return &chunkstore.Error{Store: q.store.String(), Did: q.did, Status: e.Status, Err: e.Err, Retry: e.Temporary, After: e.After}
}

func isNotFound(err error) bool { return errors.Is(err, chunkstore.ErrNotFound) }

// keys are the credentials of a store: found when they are first needed, and
// again when they are about to expire or are refused.
type keys struct {
	sources Sources
	held    *httpio.Shared[Credentials] // nil until they were looked for
	asked   time.Time                   // when they were last looked for; only while held is renewed
}

const (
	// renewBefore is how long before their end credentials are replaced.
	renewBefore = 5 * time.Minute
	// askAgain is how long a search that brought nothing better is left at that.
	askAgain = 10 * time.Second
)

// current returns the credentials to sign with.
func (k *keys) current(ctx context.Context) (*Credentials, error) {
	c := k.held.Load()
	if c == nil {
		return k.renew(ctx, nil, 0)
	}
	if c.Expires.IsZero() || time.Until(c.Expires) > renewBefore {
		return c, nil
	}
	other, err := k.renew(ctx, c, askAgain)
	if err != nil && ctx.Err() == nil && time.Now().Before(c.Expires) {
		return c, nil // they are good for now
	}
	return other, err
}

// renew replaces the credentials old by new ones. It returns old where the last
// search is younger than patience.
func (k *keys) renew(ctx context.Context, old *Credentials, patience time.Duration) (*Credentials, error) {
	return k.held.Renew(ctx, old, func(ctx context.Context) (*Credentials, error) {
		if old != nil && time.Since(k.asked) < patience {
			return old, nil
		}
		k.asked = time.Now()
		c, err := k.sources.find(ctx)
		if err != nil {
			var service *serviceError
			return nil, &httpio.Error{
				Err:       fmt.Errorf("find credentials: %w", err),
				Temporary: errors.As(err, &service) && service.temporary,
			}
		}
		return &c, nil
	})
}
