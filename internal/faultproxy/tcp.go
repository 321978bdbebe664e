package faultproxy

import (
	"net"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

// TCP stands between clients and a server of any protocol, and misbehaves with
// whole connections.
type TCP struct {
	upstream, addr string

	mu       sync.Mutex // guards all below
	listener net.Listener
	conns    map[net.Conn]bool // both ends of each
	age      int               // connections of an earlier age pass nothing
	held     chan struct{}     // closed when held bytes may go on; nil: none are held
	breaks   int               // connections that are still to be broken
	after    int64             // bytes from the server that come before that
	reset    bool              // they end with RST
	rate     int               // bytes a second from the server; 0 is no limit
	flips    int               // connections in which a byte is still to be damaged
	behind   int64             // bytes from the server that come before it

	closed chan struct{} // by Close
}

// NewTCP starts a TCP in front of the server at upstream, "host:port".
func NewTCP(upstream string) (*TCP, error) {
	p := &TCP{upstream: upstream, conns: make(map[net.Conn]bool), closed: make(chan struct{})}
	l, err := freeport.Listen()
	if err != nil {
		return nil, err
	}
	p.addr = l.Addr().String()
	p.accept(l)
	return p, nil
}

// accept serves who comes to l.
func (p *TCP) accept(l net.Listener) {
	p.listener = l
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(in)
		}
	}()
}

// Addr returns the proxy's host:port.
func (p *TCP) Addr() string { return p.addr }

// Close ends the proxy and all connections.
func (p *TCP) Close() {
	p.Hold(false)
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.closed)
	p.listener.Close()
	p.cut()
}

// cut ends all connections. p.mu is held.
func (p *TCP) cut() {
	for c := range p.conns {
		c.Close()
	}
}

// Refuse makes the proxy refuse connections, ending those it has, or accept
// them again.
func (p *TCP) Refuse(refuse bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if refuse {
		p.cut()
		return p.listener.Close()
	}
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.accept(l)
	return nil
}

// Hold keeps back what either side sends, or lets it go on: nothing is lost, as
// in a network that TCP outlasts.
func (p *TCP) Hold(hold bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held != nil {
		close(p.held)
		p.held = nil
	}
	if hold {
		p.held = make(chan struct{})
	}
}

// Deaden makes all connections that stand pass nothing any more and never end, as
// when a machine wakes up and the network has forgotten them. New ones are good.
func (p *TCP) Deaden() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.age++
}

// Break ends n connections behind so many more bytes from the server, in order
// or with RST; 0 heals.
func (p *TCP) Break(n int, after int64, reset bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.breaks, p.after, p.reset = n, after, reset
}

// Flip inverts a byte from the server behind so many others, in each of n
// connections.
func (p *TCP) Flip(n int, behind int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flips, p.behind = n, behind
}

// Flips returns how many connections are still to be damaged.
func (p *TCP) Flips() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.flips
}

// Slow lets so many bytes a second come from the server; 0 is no limit.
func (p *TCP) Slow(bytesPerSecond int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rate = bytesPerSecond
}

// serve passes on what one client and the server say.
func (p *TCP) serve(in net.Conn) {
	out, err := net.Dial("tcp", p.upstream)
	if err != nil {
		in.Close()
		return
	}
	p.mu.Lock()
	p.conns[in], p.conns[out] = true, true
	age := p.age
	p.mu.Unlock()
	var both sync.WaitGroup
	end := func() { in.Close(); out.Close() }
	both.Go(func() { defer end(); p.pass(out, in, age, nil) })
	both.Go(func() { defer end(); p.pass(in, out, age, p.fromServer(in)) })
	both.Wait()
	p.mu.Lock()
	delete(p.conns, in)
	delete(p.conns, out)
	p.mu.Unlock()
}

// pass copies from one to the other what allow lets through: so many bytes, at
// so many a second, and whether the connection then ends. nil lets all through.
func (p *TCP) pass(to, from net.Conn, age int, allow func(b []byte) (n, rate int, end bool)) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n == 0 && err != nil {
			return
		}
		p.mu.Lock()
		held, dead := p.held, p.age != age
		p.mu.Unlock()
		if dead {
			if err != nil {
				<-p.closed // nobody is told
				return
			}
			continue
		}
		if held != nil {
			<-held
		}
		rate, end := 0, false
		if allow != nil {
			n, rate, end = allow(buf[:n])
		}
		piece := n
		if rate > 0 {
			piece = 1
		}
		for at := 0; at < n; at += piece {
			if rate > 0 {
				time.Sleep(time.Second / time.Duration(rate))
			}
			if _, err := to.Write(buf[at : at+piece]); err != nil {
				return
			}
		}
		if end {
			return
		}
	}
}

// fromServer is pass's allow for the bytes from the server to client.
func (p *TCP) fromServer(client net.Conn) func(b []byte) (n, rate int, end bool) {
	left := int64(-1) // until the connection breaks; -1: it does not
	passed := int64(0)
	return func(b []byte) (int, int, bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if at := p.behind - passed; p.flips > 0 && at >= 0 && at < int64(len(b)) {
			p.flips--
			b[at] ^= 0xff
		}
		passed += int64(len(b))
		if p.breaks == 0 {
			left = -1
			return len(b), p.rate, false
		}
		if left < 0 {
			left = p.after
		}
		if left > int64(len(b)) {
			left -= int64(len(b))
			return len(b), p.rate, false
		}
		p.breaks--
		if tcp, ok := client.(*net.TCPConn); ok && p.reset {
			tcp.SetLinger(0)
		}
		return int(left), p.rate, true
	}
}
