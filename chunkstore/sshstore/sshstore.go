// Package sshstore reads and writes chunks on a server that is reached over
// SSH.
//
// [New] takes an address. "ssh://user@host[:port]/path" asks the casync of the
// server for chunks, by casync's own protocol, and reads files by SFTP where
// there is none; "sftp://user@host[:port]/path" always uses SFTP. A path that
// begins with "/~/" is relative to the user's home directory. The directory is
// a loose store in casync's layout; Put writes to it by SFTP.
//
// All requests of a [Store] share one connection and do not wait for one
// another. It is made when it is needed, watched while it is used, given up
// when it is idle, and made anew when it was lost or a request gets no answer. A server whose host key is
// neither pinned nor known is refused. No credential stands in an error or in
// [Store.String].
package sshstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

const (
	// window is how many requests of one batch are under way: enough to hide a
	// round trip of 20 ms behind small chunks.
	window = 64
	// budget bounds the stored chunks in memory that nobody has taken yet, in
	// bytes.
	budget = 64 << 20
	// keepBuffer is the largest buffer that is kept for the next chunk, in bytes.
	keepBuffer = 1 << 20
)

// Options say who asks and which server to trust.
type Options struct {
	// User is the name on the server where the address has none.
	User string
	// Keys are files with private keys. New reads them.
	Keys []string
	// PassphraseFile holds the passphrase of those Keys that are encrypted, with
	// or without a newline behind it.
	PassphraseFile string
	// Agent is the socket of an ssh-agent, which is asked at each connection.
	Agent string
	// Password is tried when the server accepts no key.
	Password string

	// HostKeys are the pinned host keys: lines of a known_hosts file, or a key
	// alone ("ssh-ed25519 AAAA…"), which then is good for any host.
	HostKeys []string
	// KnownHosts are files in the format of ssh's known_hosts. New reads them.
	// For a host that has a key there, HostKeys do not count.
	KnownHosts []string
	// Accept is what messages call the file that a host's key is to be added to;
	// "" is "known_hosts".
	Accept string
	// Advice says where credentials can be put, for messages; may be "".
	Advice string

	// Stall is how long the server may be silent, keepalive included, until the
	// connection is given up; 0 is 20 s.
	Stall time.Duration
}

// Store is a loose store on a server. It is safe for concurrent use.
type Store struct {
	address address
	auth    *auth
	stall   time.Duration

	budget  *semaphore.Weighted
	buffers sync.Pool // of *[]byte
	ctx     context.Context
	close   context.CancelFunc

	mu    sync.Mutex     // guards the two
	conn  *future[*conn] // the last one that was asked for; nil: none
	spare *future[*conn] // one that is asked for while that may hang; nil: none
}

// New returns the store at address. It reads what o names, and does not
// connect yet.
func New(address string, o Options) (*Store, error) {
	a, err := parseAddress(address, o.User)
	if err != nil {
		return nil, err
	}
	s := &Store{address: a, stall: o.Stall, budget: semaphore.NewWeighted(budget)}
	if s.stall == 0 {
		s.stall = 20 * time.Second
	}
	if s.auth, err = newAuth(o); err != nil {
		return nil, fmt.Errorf("store %s: %w", a, err)
	}
	s.buffers.New = func() any { return new([]byte) }
	s.ctx, s.close = context.WithCancel(context.Background())
	return s, nil
}

// Close ends the connection. What is under way fails.
func (s *Store) Close() error {
	s.close()
	s.mu.Lock()
	f := s.conn
	s.mu.Unlock()
	if f != nil {
		if <-f.done; f.err == nil {
			f.value.end(errClosed)
		}
	}
	return nil
}

// String returns the store's address.
func (s *Store) String() string { return s.address.String() }

// Get appends the stored form of chunk id to dst.
func (s *Store) Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error) {
	f, err := s.fetch(ctx, id, true)
	if err != nil {
		return dst, err
	}
	defer f.release()
	return append(dst, f.b...), nil
}

// GetBatch reads many chunks at a time. A chunk that is not there does not stop
// the others.
func (s *Store) GetBatch(ctx context.Context, ids []index.ID, yield func(i int, frame []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		i   int
		f   *frame
		err error
	}
	var (
		results = make(chan result)
		next    atomic.Int64
		workers sync.WaitGroup
	)
	for range min(len(ids), window) {
		workers.Go(func() {
			for {
				i := int(next.Add(1) - 1)
				if i >= len(ids) || ctx.Err() != nil {
					return
				}
				f, err := s.fetch(ctx, ids[i], false)
				results <- result{i, f, err}
			}
		})
	}
	go func() { workers.Wait(); close(results) }()
	var missing, failed error
	for r := range results {
		switch {
		case errors.Is(r.err, chunkstore.ErrNotFound):
			missing = r.err
		case r.err != nil:
			if failed == nil {
				failed = r.err
			}
		default:
			if failed == nil {
				failed = yield(r.i, r.f.b)
			}
			r.f.release()
		}
		if failed != nil {
			cancel()
		}
	}
	if failed == nil {
		failed = missing
	}
	if failed == nil && ctx.Err() != nil {
		failed = s.fail("read chunks", ctx.Err())
	}
	return failed
}

// Has reports whether chunk id is there.
func (s *Store) Has(ctx context.Context, id index.ID) (bool, error) {
	has, err := do(ctx, s, func(c *conn) (bool, error) { return c.has(ctx, id) })
	if err != nil && !errors.Is(err, chunkstore.ErrNotFound) {
		return false, s.fail("look for chunk "+id.String(), err)
	}
	return has && err == nil, nil
}

// Put stores frame as chunk id, by SFTP.
func (s *Store) Put(ctx context.Context, id index.ID, frame []byte) error {
	if len(frame) < 1 || len(frame) > chunkstore.MaxStored {
		return s.fail("write chunk "+id.String(), permanent(fmt.Errorf("got %d bytes, want 1 to %d", len(frame), chunkstore.MaxStored)))
	}
	// A Put that ctx ended goes on for a moment; its caller may use frame again.
	frame = append([]byte(nil), frame...)
	_, err := do(ctx, s, func(c *conn) (struct{}, error) { return struct{}{}, c.put(ctx, id, frame) })
	if err != nil {
		return s.fail("write chunk "+id.String(), err)
	}
	return nil
}

// List yields every chunk, by SFTP. Files that are none are passed over.
func (s *Store) List(ctx context.Context) iter.Seq2[chunkstore.Entry, error] {
	return func(yield func(chunkstore.Entry, error) bool) {
		stopped := false
		_, err := do(ctx, s, func(c *conn) (struct{}, error) {
			return struct{}{}, c.list(ctx, func(e chunkstore.Entry) bool {
				stopped = stopped || !yield(e, nil)
				return !stopped
			})
		})
		if err != nil && !stopped {
			yield(chunkstore.Entry{}, s.fail("list", err))
		}
	}
}

// Remove removes chunk id, by SFTP.
func (s *Store) Remove(ctx context.Context, id index.ID) error {
	_, err := do(ctx, s, func(c *conn) (struct{}, error) { return struct{}{}, c.remove(ctx, id) })
	if err != nil {
		return s.fail("remove chunk "+id.String(), err)
	}
	return nil
}

// Touch makes chunk id as young as one that is written now, by SFTP.
func (s *Store) Touch(ctx context.Context, id index.ID) error {
	_, err := do(ctx, s, func(c *conn) (struct{}, error) { return struct{}{}, c.touch(ctx, id) })
	if err != nil {
		return s.fail("touch chunk "+id.String(), err)
	}
	return nil
}

// Expire removes chunk id if it was last modified before then, by SFTP.
func (s *Store) Expire(ctx context.Context, id index.ID, then time.Time) (bool, error) {
	removed, err := do(ctx, s, func(c *conn) (bool, error) { return c.expire(ctx, id, then) })
	if err != nil {
		return removed, s.fail("remove chunk "+id.String(), err)
	}
	return removed, nil
}

// Sweep removes what killed writers have left, by SFTP.
func (s *Store) Sweep(ctx context.Context, then time.Time, dry bool) (files int, bytes int64, err error) {
	_, err = do(ctx, s, func(c *conn) (struct{}, error) {
		return struct{}{}, c.sweep(ctx, then, dry, func(n int64) { files, bytes = files+1, bytes+n })
	})
	if err != nil {
		err = s.fail("sweep", err)
	}
	return files, bytes, err
}

// HostKey connects, if need be, and returns the line by which the server's host
// key can be pinned. As for every other call, the key must be a trusted one.
func (s *Store) HostKey(ctx context.Context) (string, error) {
	line, err := do(ctx, s, func(c *conn) (string, error) { return c.hostKey, nil })
	if err != nil {
		return "", s.fail("connect", err)
	}
	return line, nil
}

// fetch returns the stored form of chunk id, to be released. What is urgent is
// answered before what is not, where the server can.
func (s *Store) fetch(ctx context.Context, id index.ID, urgent bool) (*frame, error) {
	f, err := do(ctx, s, func(c *conn) (*frame, error) { return c.fetch(ctx, id, urgent) })
	if err != nil {
		return nil, s.fail("read chunk "+id.String(), err)
	}
	return f, nil
}

// do runs op on the connection. When a connection that stood there before turns
// out to be lost, as after a restart of the server, op is run once more on a
// new one.
func do[T any](ctx context.Context, s *Store, op func(*conn) (T, error)) (T, error) {
	for {
		var none T
		if ctx.Err() != nil {
			return none, context.Cause(ctx)
		}
		c, fresh, err := s.connect(ctx)
		if err != nil {
			return none, err
		}
		c.using.Add(1)
		v, err := op(c)
		c.used.Store(time.Now().UnixNano())
		c.using.Add(-1)
		if err == nil || !c.lost(err) {
			return v, err
		}
		c.end(err)
		err = fmt.Errorf("%w: %w", errLost, c.why())
		if fresh || ctx.Err() != nil {
			return v, err
		}
	}
}

// connect returns the connection. fresh says that it did not stand before.
func (s *Store) connect(ctx context.Context) (c *conn, fresh bool, err error) {
	if chunkstore.IsFresh(ctx) {
		c, err := s.connectAnew(ctx)
		return c, true, err
	}
	s.mu.Lock()
	f := s.conn
	if f == nil || f.finished() && (f.err != nil || f.value.ended()) {
		f = begin(func() (*conn, error) { return dial(s) })
		s.conn = f
	}
	s.mu.Unlock()
	fresh = !f.finished()
	c, err = f.wait(ctx)
	return c, fresh, err
}

// connectAnew returns a new connection, which then serves all. The former ends
// when what it is used for has ended, or when it is found dead.
func (s *Store) connectAnew(ctx context.Context) (*conn, error) {
	s.mu.Lock()
	f := s.spare
	if f == nil || f.finished() {
		f = begin(func() (*conn, error) { return dial(s) })
		s.spare = f
	}
	s.mu.Unlock()
	c, err := f.wait(ctx)
	if err == nil {
		s.mu.Lock()
		s.conn = f
		s.mu.Unlock()
	}
	return c, err
}

// frame is the stored form of a chunk, and its part of the budget.
type frame struct {
	b    []byte
	refs atomic.Int32 // who will release it
	s    *Store
	buf  *[]byte
}

// newFrame returns a frame of n bytes for one owner. Memory is taken only when
// the budget has it.
func (s *Store) newFrame(ctx context.Context, n int) (*frame, error) {
	if n < 1 || n > chunkstore.MaxStored {
		return nil, permanent(fmt.Errorf("got %d bytes, want 1 to %d", n, chunkstore.MaxStored))
	}
	if err := s.budget.Acquire(ctx, int64(n)); err != nil {
		return nil, context.Cause(ctx)
	}
	f := &frame{s: s, buf: s.buffers.Get().(*[]byte)}
	if cap(*f.buf) < n {
		*f.buf = make([]byte, n)
	}
	f.b = (*f.buf)[:n]
	f.refs.Store(1)
	return f, nil
}

func (f *frame) release() {
	if f.refs.Add(-1) != 0 {
		return
	}
	f.s.budget.Release(int64(len(f.b)))
	if cap(*f.buf) <= keepBuffer {
		f.s.buffers.Put(f.buf)
	}
}

// future is the result of something that goes on whether or not somebody waits.
type future[T any] struct {
	done  chan struct{} // closed when value and err stand
	value T
	err   error
}

func begin[T any](f func() (T, error)) *future[T] {
	u := &future[T]{done: make(chan struct{})}
	go func() {
		defer close(u.done)
		u.value, u.err = f()
	}()
	return u
}

func (u *future[T]) finished() bool {
	select {
	case <-u.done:
		return true
	default:
		return false
	}
}

func (u *future[T]) wait(ctx context.Context) (T, error) {
	select {
	case <-u.done:
		return u.value, u.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}
