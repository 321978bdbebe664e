package sshstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

const (
	// dialPatience bounds connecting and logging in.
	dialPatience = 15 * time.Second
	// helloPatience bounds the first answer of a program on the server.
	helloPatience = 10 * time.Second
	// stuckAfter is how long a program on the server may answer nothing before a
	// caller that gives up takes it down.
	stuckAfter = 4 * time.Second
	// idleAfter is how long a connection stands that nobody uses: a server shall
	// not hold one for each container that runs somewhere.
	idleAfter = time.Minute
)

// conn is a connection and what runs on it.
type conn struct {
	store   *Store
	client  *ssh.Client
	net     *countingConn
	hostKey string // a line of a known_hosts file

	using atomic.Int64 // operations under way
	used  atomic.Int64 // when the last one ended, Unix nanoseconds

	ctx context.Context // ends with the connection; its cause says why
	end context.CancelCauseFunc

	mu     sync.Mutex // guards the two
	casync *future[*session]
	sftp   *future[*files]
}

// countingConn notes when something arrived.
type countingConn struct {
	net.Conn
	last atomic.Int64 // Unix nanoseconds
}

func (c *countingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.last.Store(time.Now().UnixNano())
	}
	return n, err
}

func (c *countingConn) silent() time.Duration { return time.Since(time.Unix(0, c.last.Load())) }

// dial connects and logs in.
func dial(s *Store) (*conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, dialPatience)
	defer cancel()
	dialer := net.Dialer{KeepAlive: 15 * time.Second}
	raw, err := dialer.DialContext(ctx, "tcp", s.address.host)
	if err != nil {
		if s.ctx.Err() != nil {
			return nil, errClosed
		}
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() }) // the handshake knows no context
	c := &conn{store: s, net: &countingConn{Conn: raw}}
	c.net.last.Store(time.Now().UnixNano())
	client, hostKey, err := s.auth.handshake(c.net, s.address)
	if !stop() && err == nil {
		client.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		switch {
		case s.ctx.Err() != nil:
			return nil, errClosed
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%s did not let us in within %v: %w", s.address.host, dialPatience, err)
		}
		return nil, err
	}
	c.client, c.hostKey = client, hostKey
	c.used.Store(time.Now().UnixNano())
	c.ctx, c.end = context.WithCancelCause(s.ctx)
	context.AfterFunc(c.ctx, func() { raw.Close() })
	go func() {
		err := client.Wait()
		if err == nil {
			err = io.EOF
		}
		c.end(err)
	}()
	go c.watch()
	return c, nil
}

func (c *conn) ended() bool { return c.ctx.Err() != nil }

// why says why the connection ended.
func (c *conn) why() error {
	err := context.Cause(c.ctx)
	if errors.Is(err, context.Canceled) {
		return errClosed
	}
	return err
}

// lost reports whether an operation failed with err because the connection is
// of no use any more.
func (c *conn) lost(err error) bool {
	if errors.Is(err, chunkstore.ErrNotFound) {
		return false
	}
	return isLost(err) || c.ended()
}

// watch ends the connection when the server is silent or nobody needs it.
func (c *conn) watch() {
	t := time.NewTicker(c.store.stall / 4)
	defer t.Stop()
	var asked atomic.Bool
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-t.C:
		}
		silent := c.net.silent()
		switch {
		case c.using.Load() == 0 && time.Since(time.Unix(0, c.used.Load())) > idleAfter:
			c.end(errors.New("it was idle"))
		case silent >= c.store.stall:
			c.end(fmt.Errorf("%s was silent for %v", c.store.address.host, silent.Round(time.Second)))
		case silent >= c.store.stall/2 && !asked.Swap(true):
			go func() {
				// Any answer is one, "unknown request" too.
				c.client.SendRequest("keepalive@openssh.com", true, nil)
				asked.Store(false)
			}()
		}
	}
}

// fetch reads a chunk by casync's protocol, or by SFTP where that is not spoken.
func (c *conn) fetch(ctx context.Context, id index.ID, urgent bool) (*frame, error) {
	if c.store.address.sftpOnly {
		return c.read(ctx, id)
	}
	f, err := c.request(ctx, id, urgent)
	var no noCasyncError
	if !errors.As(err, &no) {
		return f, err
	}
	f, err = c.read(ctx, id)
	return f, no.beside(err)
}

// has asks without reading where the server has SFTP.
func (c *conn) has(ctx context.Context, id index.ID) (bool, error) {
	ok, err := c.stat(ctx, id)
	var no noSFTPError
	if c.store.address.sftpOnly || !errors.As(err, &no) {
		return ok, err
	}
	f, err := c.fetch(ctx, id, true)
	if err != nil {
		return false, err
	}
	f.release()
	return true, nil
}
