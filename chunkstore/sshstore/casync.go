package sshstore

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// maxAsked bounds what a session remembers, in chunks.
const maxAsked = 1 << 16

// session is a casync that runs on the server and answers requests.
//
// A casync answers no chunk twice: it takes a second request for one that is
// queued already. A chunk that was asked for before is therefore asked of a new
// session, and the old one is left as soon as it has answered the rest.
type session struct {
	conn   *conn
	ssh    *ssh.Session
	in     io.WriteCloser
	out    *bufio.Reader
	stderr tail
	wake   chan struct{} // there is something to write; of capacity 1

	mu       sync.Mutex // guards all below
	asked    map[index.ID]struct{}
	pending  map[index.ID]*call
	queue    []request
	progress time.Time // of the last answer, or of the first request since
	retired  bool      // takes no more requests
	err      error     // why it ended
}

type request struct {
	id     index.ID
	urgent bool
}

// call is a request that is under way. Its frame has a reference for each of
// those who wait.
type call struct {
	done    chan struct{} // closed when frame or err stands
	waiting int32
	frame   *frame
	err     error
}

// noCasyncError says that the server does not speak casync's protocol.
type noCasyncError struct{ why error }

func (e noCasyncError) Error() string { return fmt.Sprintf("the server has no casync (%v)", e.why) }

func (e noCasyncError) Unwrap() error { return e.why }

// beside adds to the error of SFTP why it was used, if there is none either.
func (e noCasyncError) beside(err error) error {
	var no noSFTPError
	if errors.As(err, &no) {
		return permanent(fmt.Errorf("%w and no SFTP (%w)", e, no.why))
	}
	return err
}

// request reads a chunk by casync's protocol.
func (c *conn) request(ctx context.Context, id index.ID, urgent bool) (*frame, error) {
	for {
		c.mu.Lock()
		if c.casync == nil {
			c.casync = begin(func() (*session, error) { return startSession(c) })
		}
		u := c.casync
		c.mu.Unlock()
		s, err := u.wait(ctx)
		if err != nil {
			var no noCasyncError
			if u.finished() && !errors.As(err, &no) {
				c.forget(u)
			}
			return nil, err
		}
		k, err := s.ask(id, urgent)
		if err != nil {
			c.forget(u)
			return nil, err
		}
		if k != nil {
			return s.await(ctx, k)
		}
		c.forget(u)
		s.retire()
	}
}

// forget makes the next request start a new session instead of u.
func (c *conn) forget(u *future[*session]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.casync == u {
		c.casync = nil
	}
}

// startSession runs casync on the server.
func startSession(c *conn) (*session, error) {
	s := &session{
		conn:    c,
		wake:    make(chan struct{}, 1),
		asked:   make(map[index.ID]struct{}),
		pending: make(map[index.ID]*call),
	}
	var err error
	if s.ssh, err = c.client.NewSession(); err != nil {
		return nil, c.noCasync(err)
	}
	s.ssh.Stderr = &s.stderr
	if s.in, err = s.ssh.StdinPipe(); err == nil {
		var out io.Reader
		if out, err = s.ssh.StdoutPipe(); err == nil {
			s.out = bufio.NewReaderSize(out, 64<<10)
			err = s.ssh.Start("casync pull - - - " + quote(c.store.address.dir))
		}
	}
	if err == nil {
		_, err = s.in.Write(message{kind: kindHello, number: featurePullChunks}.append(nil))
	}
	var hello message
	if err == nil {
		// What hangs on the server stays there: a channel cannot be taken back.
		ctx, cancel := context.WithTimeout(c.ctx, helloPatience)
		defer cancel()
		hello, err = begin(func() (message, error) { return readMessage(s.out) }).wait(ctx)
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("it does not answer within %v", helloPatience)
	case err != nil:
		if !errors.Is(err, errProtocol) {
			err = s.exit(err)
		}
	case hello.kind != kindHello:
		err = fmt.Errorf("%w: got %s, want hello", errProtocol, hello.kind)
	case hello.number&featureReadableStore == 0:
		err = fmt.Errorf("%w: the server offers no chunks (features %#x)", errProtocol, hello.number)
	}
	if err != nil {
		s.ssh.Close()
		return nil, c.noCasync(err)
	}
	go s.write()
	go s.read()
	return s, nil
}

// noCasync tells a server without casync from a lost connection.
func (c *conn) noCasync(err error) error {
	// The end of a connection ends what runs on it first.
	t := time.NewTimer(200 * time.Millisecond)
	defer t.Stop()
	select {
	case <-c.ctx.Done():
		return fmt.Errorf("%w: %w", errLost, c.why())
	case <-t.C:
		return noCasyncError{err}
	}
}

// ask enqueues a request. It returns nil when another session is to be asked.
func (s *session) ask(id index.ID, urgent bool) (*call, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.retired {
		return nil, s.err
	}
	if k := s.pending[id]; k != nil {
		k.waiting++
		return k, nil
	}
	if _, ok := s.asked[id]; ok || len(s.asked) == maxAsked {
		return nil, nil
	}
	if len(s.pending) == 0 {
		s.progress = time.Now()
	}
	k := &call{done: make(chan struct{}), waiting: 1}
	s.asked[id] = struct{}{}
	s.pending[id] = k
	s.queue = append(s.queue, request{id, urgent})
	s.signal()
	return k, nil
}

func (s *session) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// await returns what k brings.
func (s *session) await(ctx context.Context, k *call) (*frame, error) {
	select {
	case <-k.done:
		return k.frame, k.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-k.done:
		if k.frame != nil {
			k.frame.release()
		}
	default:
		k.waiting--
		if time.Since(s.progress) >= stuckAfter {
			s.conn.end(fmt.Errorf("casync on the server answered nothing for %v", time.Since(s.progress).Round(time.Second)))
		}
	}
	return nil, context.Cause(ctx)
}

// retire makes the session end when it has answered what it was asked.
func (s *session) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = true
	s.signal()
}

// write sends what is queued, and goodbye when that was all.
func (s *session) write() {
	for {
		select {
		case <-s.wake:
		case <-s.conn.ctx.Done():
			return
		}
		s.mu.Lock()
		queue := s.queue
		s.queue = nil
		leave := s.err != nil || s.retired && len(s.pending) == 0
		s.mu.Unlock()
		var b []byte
		for _, urgent := range []bool{true, false} {
			b = appendRequest(b, queue, urgent)
		}
		if leave {
			s.in.Write(message{kind: kindGoodbye}.append(b))
			s.in.Close()
			return
		}
		if _, err := s.in.Write(b); err != nil {
			return // the reader finds out why
		}
	}
}

// appendRequest appends one request frame for those of queue that are as urgent
// as said, if there are any.
func appendRequest(b []byte, queue []request, urgent bool) []byte {
	m := message{kind: kindRequest}
	if urgent {
		m.number = requestUrgent
	}
	var ids []byte
	for _, q := range queue {
		if q.urgent == urgent {
			ids = append(ids, q.id[:]...)
		}
	}
	if m.data = len(ids); m.data == 0 {
		return b
	}
	return append(m.append(b), ids...)
}

// read hands out answers until the session ends.
func (s *session) read() {
	err := s.readAll()
	if errors.Is(err, errProtocol) {
		err = permanent(err)
	} else if err = s.exit(err); s.conn.ended() {
		err = fmt.Errorf("%w: %w", errLost, s.conn.why())
	}
	s.ssh.Close()
	s.conn.mu.Lock()
	if u := s.conn.casync; u != nil && u.finished() && u.value == s {
		s.conn.casync = nil // nobody shall find it
	}
	s.conn.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	for id := range s.pending {
		s.answer(id, nil, err)
	}
	s.signal()
}

func (s *session) readAll() error {
	for {
		m, err := readMessage(s.out)
		if err != nil {
			return err
		}
		var f *frame
		switch m.kind {
		case kindChunk:
			if f, err = s.readChunk(m); err != nil {
				return err
			}
		case kindMissing:
			err = chunkstore.ErrNotFound
		case kindGoodbye:
			return io.EOF
		case kindAbort:
			return readReason(s.out, m)
		default:
			return fmt.Errorf("%w: got %s, want chunk or missing", errProtocol, m.kind)
		}
		s.mu.Lock()
		known := s.answer(m.id, f, err)
		if len(s.pending) == 0 && s.retired {
			s.signal()
		}
		s.mu.Unlock()
		if !known {
			return fmt.Errorf("%w: got chunk %s, which was not asked for", errProtocol, m.id)
		}
	}
}

// readChunk reads the data of m.
func (s *session) readChunk(m message) (*frame, error) {
	f, err := s.conn.store.newFrame(s.conn.ctx, m.data)
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(s.out, f.b); err != nil {
		f.release()
		return nil, noEOF(err)
	}
	if m.number&chunkCompressed != 0 {
		return f, nil
	}
	defer f.release()
	raw := chunkstore.AppendRaw(nil, f.b) // a stored chunk is a zstd frame
	stored, err := s.conn.store.newFrame(s.conn.ctx, len(raw))
	if err == nil {
		copy(stored.b, raw)
	}
	return stored, err
}

// answer ends the call for id; s.mu is held. It reports whether there was one.
func (s *session) answer(id index.ID, f *frame, err error) bool {
	k := s.pending[id]
	switch {
	case k == nil || k.waiting == 0:
		if f != nil {
			f.release()
		}
	default:
		if f != nil {
			f.refs.Store(k.waiting)
		}
		k.frame, k.err = f, err
	}
	if k == nil {
		return false
	}
	s.progress = time.Now()
	delete(s.pending, id)
	close(k.done)
	return true
}

// exit says why casync ended, given what reading from it ended with.
func (s *session) exit(err error) error {
	done := begin(func() (struct{}, error) { return struct{}{}, s.ssh.Wait() })
	ctx, cancel := context.WithTimeout(s.conn.ctx, time.Second)
	defer cancel()
	var status *ssh.ExitError
	what := "casync ended"
	if _, werr := done.wait(ctx); errors.As(werr, &status) {
		what += fmt.Sprintf(" with exit status %d", status.ExitStatus())
	}
	if err != io.EOF {
		what += ": " + err.Error()
	}
	if text := s.stderr.String(); text != "" {
		what += ": " + text
	}
	// Not with %w: only a program on the connection has ended, not itself.
	return errors.New(what)
}

// tail keeps the end of what a program wrote.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const keep = 500 // bytes
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > keep {
		t.b = bytes.Clone(t.b[len(t.b)-keep:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return printable(t.b)
}
