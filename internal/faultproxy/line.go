package faultproxy

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Speed is what a network line gives.
type Speed struct {
	Bandwidth int64         // bytes a second in each direction, of all connections together; 0 is no limit
	RoundTrip time.Duration // from one end to the other and back
}

// Line is the network line of a node: a TCP proxy whose connections share a
// bandwidth, and through which each byte takes half a round trip.
//
// Of a real line it has all that a program can tell without looking at packets.
// Connections that send at the same time get equal parts of the bandwidth. A new
// one costs a round trip before its first byte arrives. A client that stops
// reading stops the server, once a few MiB are under way. What it has not is
// headers of packets, which would cost 5 % of the bandwidth, and TCP's slow
// start: a connection has its part of the bandwidth from the first byte on.
type Line struct {
	listener net.Listener
	down, up direction
	opened   atomic.Int64
	speed    atomic.Pointer[Speed]
	wg       sync.WaitGroup

	mu    sync.Mutex        // guards conns
	conns map[net.Conn]bool // both ends of each; nil once the line is closed
}

// NewLine starts a Line to the server at upstream, "host:port", which has no
// limits until [Line.Set] gives it some.
func NewLine(upstream string) (*Line, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := newLine()
	p.listener = l
	p.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return // closed
			}
			p.wg.Go(func() {
				began := time.Now()
				out, err := net.Dial("tcp", upstream)
				if err != nil {
					in.Close()
					return
				}
				p.join(in, out, began)
			})
		}
	})
	return p, nil
}

func newLine() *Line {
	p := &Line{conns: make(map[net.Conn]bool)}
	p.Set(Speed{})
	return p
}

// Addr returns the host:port of the line's near end.
func (p *Line) Addr() string { return p.listener.Addr().String() }

// Set changes the speed, also for the connections that there are.
func (p *Line) Set(s Speed) { p.speed.Store(&s) }

// Traffic returns the bytes that left each end since the line was made: down
// from the server, up from the clients; and the connections that were made.
func (p *Line) Traffic() (down, up, connections int64) {
	return p.down.bytes.Load(), p.up.bytes.Load(), p.opened.Load()
}

// Close ends all connections.
func (p *Line) Close() {
	p.listener.Close()
	p.mu.Lock()
	for c := range p.conns {
		c.Close()
	}
	p.conns = nil
	p.mu.Unlock()
	p.wg.Wait()
}

// keep notes the ends of a connection, and reports whether the line still stands.
func (p *Line) keep(ends ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range ends {
		if p.conns == nil {
			c.Close()
			continue
		}
		p.conns[c] = true
	}
	return p.conns != nil
}

// join carries what a client that connected at began and the server say.
func (p *Line) join(in, out net.Conn, began time.Time) {
	if !p.keep(in, out) {
		return
	}
	p.opened.Add(1)
	var both sync.WaitGroup
	both.Go(func() {
		// The client's connect() returned at once; over a real line it takes a round
		// trip.
		time.Sleep(time.Until(began.Add(p.speed.Load().RoundTrip)))
		p.up.pass(out, in, &p.speed)
	})
	both.Go(func() { p.down.pass(in, out, &p.speed) })
	both.Wait()
	in.Close()
	out.Close()
	p.mu.Lock()
	delete(p.conns, in)
	delete(p.conns, out)
	p.mu.Unlock()
}

const (
	// parcel is the most that one connection sends before another one's turn
	// comes: 1.3 ms of 100 Mbit/s.
	parcel = 16 << 10
	// underWay is how many parcels of a connection can be on the line or wait for
	// their reader: 4 MiB.
	underWay = 256
	// ahead is how long before its bytes have left a connection may read the next,
	// and catchUp by how much a timer may be late after that. Otherwise such times
	// would be lost to the line.
	ahead   = 2 * time.Millisecond
	catchUp = 100 * time.Millisecond
)

// direction is one of a line's two directions.
type direction struct {
	bytes atomic.Int64

	mu   sync.Mutex // guards free
	free time.Time  // when all that was accepted so far will have left
}

// leave takes n bytes onto the line that came at now, and returns when the last of
// them leaves the near end.
//
// A connection asks for one parcel at a time and waits until that has left, so
// those that want the line at the same time take turns.
func (d *direction) leave(n int, now time.Time, bandwidth int64) time.Time {
	d.bytes.Add(int64(n))
	if bandwidth == 0 {
		return now
	}
	takes := time.Duration(int64(n) * int64(time.Second) / bandwidth)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.free.Before(now) {
		d.free = now
	}
	d.free = d.free.Add(takes)
	return d.free
}

// arrival is what comes out at the far end.
type arrival struct {
	at   time.Time
	data []byte // nil: the sender has closed its side
}

// pass carries what from sends to the other end, until either side ends the
// connection.
func (d *direction) pass(to, from net.Conn, speed *atomic.Pointer[Speed]) {
	line := make(chan arrival, underWay)
	var far sync.WaitGroup
	defer far.Wait()
	defer close(line)
	far.Go(func() {
		broken := false
		for a := range line {
			if broken {
				continue
			}
			time.Sleep(time.Until(a.at))
			if a.data == nil {
				if half, ok := to.(interface{ CloseWrite() error }); ok {
					half.CloseWrite()
				} else {
					to.Close()
				}
			} else if _, err := to.Write(a.data); err != nil {
				// Nobody reads any more: the sender is told to stop.
				broken = true
				from.Close()
			}
		}
	})
	var late time.Duration // by which this loop is behind
	for {
		buf := make([]byte, parcel)
		asked := time.Now()
		n, err := from.Read(buf)
		s, now := speed.Load(), time.Now()
		// What comes at once came while this loop should have read it.
		late = max(0, late-now.Sub(asked))
		if n > 0 {
			left := d.leave(n, now.Add(-late), s.Bandwidth)
			line <- arrival{left.Add(s.RoundTrip / 2), buf[:n]}
			next := left.Add(-ahead)
			time.Sleep(time.Until(next))
			late = min(max(0, time.Since(next)), catchUp)
		}
		if err != nil {
			line <- arrival{at: time.Now().Add(s.RoundTrip / 2)}
			return
		}
	}
}
