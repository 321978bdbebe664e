// Package s3store reads and writes chunks in a bucket of S3, or of a server
// that speaks like it, in the layout of casync and desync: chunk abcd… of the
// store s3+https://HOST/BUCKET/PREFIX is the object PREFIX/abcd/abcd….cacnk.
//
//	s, err := s3store.New("s3+https://s3.eu-central-1.amazonaws.com/chunks/rootfs.castr", s3store.Options{})
//
// Buckets are reached by path, https://HOST/BUCKET, and at AWS by a host of
// their own, https://BUCKET.HOST; ?style=path or ?style=virtual behind the
// address asks for one of the two. The region is that of ?region=, of AWS's host
// name, of the variables, or us-east-1; a server that names another is believed.
//
// Credentials are found as [Sources] says when the first request needs them, are
// renewed before they expire and when the server refuses them, and sign requests
// to the endpoint that the address names: elsewhere they go only where the
// bucket lies in another of AWS's regions. What the bytes are worth is the
// caller's to verify.
package s3store

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

const (
	// parallelRequests bounds the requests of one Store that run at once, and
	// batchRequests those of one batch, so that a read that somebody waits for
	// gets its turn beside a prefetch. AWS serves each prefix 5500 reads a
	// second, and one takes it some 20 ms.
	parallelRequests = 64
	batchRequests    = 48

	// putPatience is how many stall times a write may take without a sign: the
	// kernel takes the last of a chunk long before the server has it on disk.
	putPatience = 3
)

// Options says how a bucket is reached. The zero value does as AWS's own tools.
type Options struct {
	Sources Sources
	// Advice says where credentials can be put, for messages; "" speaks of the
	// variables and the profile.
	Advice string
	// Transport makes the connections; nil is one made for this Store.
	Transport http.RoundTripper
	// Stall is how long a response may make no progress; 0 is 10 s.
	Stall time.Duration
}

// Store is a chunk store in a bucket. It is a chunkstore.Writer, Batcher,
// Lister and Remover.
type Store struct {
	address   *address
	advice    string
	transport http.RoundTripper
	hangUp    func() // closes connections that nobody uses
	stall     time.Duration
	slots     httpio.Slots
	place     atomic.Pointer[place]
	keys      keys
}

// New returns the store at address:
//
//	s3+https://HOST[:PORT]/BUCKET[/PREFIX][?region=REGION&style=path|virtual]
//
// or s3+http://… without TLS. It does not connect yet, and does not look for
// credentials.
func New(addr string, o Options) (*Store, error) {
	a, err := parseAddress(addr)
	if err != nil {
		return nil, err
	}
	aws, isAWS := parseAWS(a.host)
	if a.region == "" && aws.region == "" {
		// Who reads the address elsewhere has other variables.
		if a.region = o.Sources.region(); a.region == defaultRegion {
			a.region = ""
		}
	}
	p := &place{a.host, cmp.Or(a.region, aws.region, defaultRegion)}
	if isAWS && aws.region == "" && p.region != defaultRegion {
		if p.host, err = aws.at(p.region); err != nil {
			return nil, fmt.Errorf("store %q: region %q: %w", a, p.region, err)
		}
	}
	s := &Store{
		address:   a,
		advice:    o.Advice,
		transport: o.Transport,
		hangUp:    func() {},
		stall:     o.Stall,
		slots:     make(httpio.Slots, parallelRequests),
		keys:      keys{sources: o.Sources, held: httpio.NewShared[Credentials](nil)},
	}
	s.place.Store(p)
	if s.advice == "" {
		s.advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
	}
	if s.transport == nil {
		s.transport = httpio.NewTransport(parallelRequests)
	}
	if t, ok := s.transport.(interface{ CloseIdleConnections() }); ok {
		s.hangUp = t.CloseIdleConnections
	}
	if s.stall == 0 {
		s.stall = httpio.Stall
	}
	return s, nil
}

// String returns the address, with the region that the variables named where
// the address has none.
func (s *Store) String() string { return s.address.String() }

// Get appends the stored form of chunk id to dst.
func (s *Store) Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error) {
	q, err := s.begin(ctx, "read chunk "+id.String(), s.stall)
	if err != nil {
		return dst, err
	}
	defer q.end()
	resp, err := q.send(ask{method: http.MethodGet, key: s.address.key(id)})
	if err != nil {
		return dst, q.fail(err)
	}
	defer q.watch.Leave(resp)
	out, err := q.read(resp, dst)
	if err != nil {
		return dst, q.fail(err)
	}
	return out, nil
}

// GetBatch gets several chunks at a time. What is under way when one fails is
// still delivered.
func (s *Store) GetBatch(ctx context.Context, ids []index.ID, yield func(i int, frame []byte) error) error {
	return chunkstore.GetEach(ctx, s, batchRequests, ids, yield)
}

// Has asks for chunk id with HEAD. Only where that is refused, which comes
// without a word, it asks for the first byte to learn why.
func (s *Store) Has(ctx context.Context, id index.ID) (bool, error) {
	q, err := s.begin(ctx, "look for chunk "+id.String(), s.stall)
	if err != nil {
		return false, err
	}
	defer q.end()
	ok, err := q.has(s.address.key(id))
	if err != nil {
		return false, q.fail(err)
	}
	return ok, nil
}

func (q *request) has(key string) (bool, error) {
	resp, _, err := q.try(ask{method: http.MethodHead, key: key})
	if err != nil {
		return false, err
	}
	q.watch.Leave(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.ContentLength != 0 && resp.ContentLength <= chunkstore.MaxStored, checkType(resp)
	case http.StatusNotFound:
		return false, nil
	}
	resp, err = q.send(ask{method: http.MethodGet, key: key, header: []string{"Range", "bytes=0-0"}})
	if e, ok := err.(*httpio.Error); ok && e.Status == http.StatusRequestedRangeNotSatisfiable || isNotFound(err) {
		return false, nil // the first is an empty object
	}
	if err != nil {
		return false, err
	}
	defer q.watch.Leave(resp)
	return true, checkType(resp)
}

// Put stores frame as chunk id, over whatever stands there. S3 promises that
// readers see all of it or none, and that it stays once Put has returned.
func (s *Store) Put(ctx context.Context, id index.ID, frame []byte) error {
	q, err := s.begin(ctx, "write chunk "+id.String(), putPatience*s.stall)
	if err != nil {
		return err
	}
	defer q.end()
	if len(frame) < 1 || len(frame) > chunkstore.MaxStored {
		return q.fail(&httpio.Error{Err: fmt.Errorf("got %d bytes to write, want 1 to %d", len(frame), chunkstore.MaxStored)})
	}
	resp, err := q.send(ask{method: http.MethodPut, key: s.address.key(id), body: frame, header: []string{"Content-Type", "application/zstd"}})
	if err != nil {
		return q.fail(err)
	}
	defer q.watch.Leave(resp)
	if err := checkType(resp); err != nil {
		return q.fail(err)
	}
	return nil
}

// Remove removes chunk id. In a bucket that keeps versions it stays as an old
// one.
func (s *Store) Remove(ctx context.Context, id index.ID) error {
	q, err := s.begin(ctx, "remove chunk "+id.String(), s.stall)
	if err != nil {
		return err
	}
	defer q.end()
	resp, err := q.send(ask{method: http.MethodDelete, key: s.address.key(id)})
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return q.fail(err)
	}
	q.watch.Leave(resp)
	return nil
}

// checkType refuses what is not S3's answer by its headers.
func checkType(resp *http.Response) error {
	return httpio.CheckType(resp, "S3's answer", chunkstore.Suffix+" objects", "aws-chunked")
}

// read appends the body of a response to dst.
func (q *request) read(resp *http.Response, dst []byte) ([]byte, error) {
	if err := checkType(resp); err != nil {
		return nil, err
	}
	return q.watch.ReadBody(resp, dst, chunkstore.MaxStored)
}
