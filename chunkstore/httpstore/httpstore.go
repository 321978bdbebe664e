// Package httpstore reads and writes chunks on a web server, in the layout of
// casync and desync: chunk abcd… of the store BASE is BASE/abcd/abcd….cacnk. Any
// server of static files will do for reading; writing takes one that accepts
// PUT, such as nginx with its dav module.
//
//	s, err := httpstore.New("https://chunks.example.com/rootfs.castr", httpstore.Options{})
//
// A response that stalls, breaks off or is not a chunk becomes a *chunkstore.Error,
// which says whether another attempt can help. Credentials go to the server of the
// address and to nobody else, wherever it redirects to. What the bytes are
// worth is the caller's to verify.
package httpstore

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

const (
	// parallelRequests bounds the requests of one Store that run at once: at
	// 20 ms each they bring 1600 chunks a second.
	parallelRequests = 32
	// batchRequests bounds those of one batch, so that a read that somebody
	// waits for gets its turn beside a prefetch.
	batchRequests = 24

	// putPatience is how many stall times a write may take without a sign: the
	// kernel takes the last of a chunk long before the server has it, and a
	// careful server waits for its disk.
	putPatience = 3
)

// Options says how a server is reached. The zero value fits one that asks for
// no credentials.
type Options struct {
	// Login finds the credentials for the server. It is asked before the first
	// request, and again when what it gave is refused. nil is none; a user in
	// the address stands before it.
	Login func(context.Context) (Login, error)
	// Transport makes the connections; nil is one made for this Store.
	Transport http.RoundTripper
	// Stall is how long a response may make no progress; 0 is 10 s.
	Stall time.Duration
}

// Login is what a server is shown: a token, or else a user and a password. The
// zero value is nothing.
type Login struct {
	User, Password string // of basic authentication
	Token          string // of bearer authentication
}

// header is the value of the Authorization header, "" for none.
func (l Login) header() string {
	var r http.Request
	switch {
	case l.Token != "":
		return "Bearer " + l.Token
	case l.User != "" || l.Password != "":
		r.Header = make(http.Header)
		r.SetBasicAuth(l.User, l.Password)
	}
	return r.Header.Get("Authorization")
}

// Store is a chunk store on a web server. It is a chunkstore.Writer and a
// chunkstore.Batcher.
type Store struct {
	base      string // without credentials, without a slash at its end
	origin    string
	ask       func(context.Context) (Login, error) // nil: the login never changes
	transport http.RoundTripper
	hangUp    func() // closes connections that nobody uses
	stall     time.Duration
	slots     httpio.Slots

	login  *httpio.Shared[string] // Authorization header; nil until it was asked for
	noHead atomic.Bool            // the server refuses HEAD and takes GET
}

// New returns the store at address, "https://host/path" or "http://host/path".
// It does not connect yet.
func New(address string, o Options) (*Store, error) {
	u, err := url.Parse(address)
	// What url says of a malformed address may repeat a password.
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" ||
		strings.Contains(u.EscapedPath(), "@") {
		return nil, fmt.Errorf("store %q: want https://HOST/PATH or http://HOST/PATH, with %%XX for special characters", httpio.WithoutUser(address))
	}
	s := &Store{
		base:      u.Scheme + "://" + u.Host + strings.TrimRight(u.EscapedPath(), "/"),
		origin:    httpio.OriginOf(u),
		ask:       o.Login,
		transport: o.Transport,
		hangUp:    func() {},
		stall:     o.Stall,
		slots:     make(httpio.Slots, parallelRequests),
	}
	var login *string
	if u.User != nil {
		password, _ := u.User.Password()
		h := Login{User: u.User.Username(), Password: password}.header()
		s.ask, login = nil, &h
	} else if s.ask == nil {
		login = new(string)
	}
	s.login = httpio.NewShared(login)
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

// String returns the address, without credentials.
func (s *Store) String() string { return s.base }

func (s *Store) shardURL(id index.ID) string {
	shard, _ := chunkstore.Place(id)
	return s.base + "/" + shard + "/"
}

func (s *Store) chunkURL(id index.ID) string {
	_, file := chunkstore.Place(id)
	return s.shardURL(id) + file
}

// Get appends the stored form of chunk id to dst.
func (s *Store) Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error) {
	q, err := s.begin(ctx, "read", id, s.stall)
	if err != nil {
		return dst, err
	}
	defer q.end()
	resp, err := q.send(http.MethodGet, s.chunkURL(id), nil)
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

// Has asks for chunk id without its bytes: with HEAD, or for the first byte
// where the server refuses HEAD.
func (s *Store) Has(ctx context.Context, id index.ID) (bool, error) {
	q, err := s.begin(ctx, "look for", id, s.stall)
	if err != nil {
		return false, err
	}
	defer q.end()
	ok, err := q.has()
	if err != nil {
		return false, q.fail(err)
	}
	return ok, nil
}

func (q *request) has() (bool, error) {
	url := q.store.chunkURL(q.id)
	unknown := false // as a method, whatever it is asked of
	if !q.store.noHead.Load() {
		resp, err := q.send(http.MethodHead, url, nil)
		if err != nil {
			return false, err
		}
		q.watch.Leave(resp)
		switch resp.StatusCode {
		case http.StatusMethodNotAllowed, http.StatusNotImplemented:
			unknown = true
		case http.StatusForbidden, http.StatusBadRequest: // URLs may be signed for GET alone
		default:
			return q.there(resp)
		}
	}
	resp, err := q.send(http.MethodGet, url, nil, "Range", "bytes=0-0")
	if err != nil {
		return false, err
	}
	defer q.watch.Leave(resp)
	ok, err := q.there(resp)
	if unknown && err == nil {
		q.store.noHead.Store(true)
	}
	return ok, err
}

// there reads from an answer whether the chunk exists.
func (q *request) there(resp *http.Response) (bool, error) {
	switch resp.StatusCode {
	case http.StatusOK:
		n := resp.ContentLength
		return n != 0 && n <= chunkstore.MaxStored, checkType(resp)
	case http.StatusPartialContent:
		return true, checkType(resp)
	case http.StatusNotFound, http.StatusGone, http.StatusRequestedRangeNotSatisfiable: // the last is an empty file
		return false, nil
	}
	return false, q.statusError(resp)
}

// Put stores frame as chunk id with PUT, over whatever stands there. Whether a
// reader may see half of it meanwhile, and whether it is on disk when Put
// returns, is the server's to promise: nginx replaces the file in one step and
// leaves its way to the disk to the kernel.
func (s *Store) Put(ctx context.Context, id index.ID, frame []byte) error {
	q, err := s.begin(ctx, "write", id, putPatience*s.stall)
	if err != nil {
		return err
	}
	defer q.end()
	if len(frame) < 1 || len(frame) > chunkstore.MaxStored {
		return q.fail(&httpio.Error{Err: fmt.Errorf("got %d bytes to write, want 1 to %d", len(frame), chunkstore.MaxStored)})
	}
	if err := q.put(frame); err != nil {
		return q.fail(err)
	}
	return nil
}

func (q *request) put(frame []byte) error {
	for madeShard := false; ; madeShard = true {
		resp, err := q.send(http.MethodPut, q.store.chunkURL(q.id), frame)
		if err != nil {
			return err
		}
		q.watch.Leave(resp)
		switch resp.StatusCode {
		case http.StatusOK:
			// A login page of the network, or of an application that answers
			// whatever it is asked.
			return checkType(resp)
		case http.StatusCreated, http.StatusNoContent:
			return nil
		case http.StatusConflict, http.StatusNotFound, http.StatusInternalServerError:
			// WebDAV wants the directory first, and says so with the first of
			// these; some servers say it with the others, nginx with the last.
			if !madeShard && q.makeShard() {
				continue
			}
		}
		return q.statusError(resp)
	}
}

// makeShard makes the directory of the chunk and reports whether it is there.
func (q *request) makeShard() bool {
	resp, err := q.send("MKCOL", q.store.shardURL(q.id), nil)
	if err != nil {
		return false
	}
	q.watch.Leave(resp)
	return resp.StatusCode == http.StatusCreated || resp.StatusCode == http.StatusMethodNotAllowed // another was quicker
}

// checkType refuses what is no chunk by its headers.
func checkType(resp *http.Response) error {
	return httpio.CheckType(resp, "a chunk", chunkstore.Suffix+" files")
}

// read appends the body of a response to dst.
func (q *request) read(resp *http.Response, dst []byte) ([]byte, error) {
	if resp.StatusCode != http.StatusOK {
		return nil, q.statusError(resp)
	}
	if err := checkType(resp); err != nil {
		return nil, err
	}
	return q.watch.ReadBody(resp, dst, chunkstore.MaxStored)
}
