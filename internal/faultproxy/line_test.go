package faultproxy

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// slow and fast are what a node has: 100 Mbit/s and 1 Gbit/s.
var (
	slow = Speed{Bandwidth: 12.5e6, RoundTrip: 20 * time.Millisecond}
	fast = Speed{Bandwidth: 125e6, RoundTrip: 2 * time.Millisecond}
)

// sender answers each request, a number of bytes in 8, with so many bytes.
func sender(c net.Conn) {
	defer c.Close()
	var ask [8]byte
	for {
		if _, err := io.ReadFull(c, ask[:]); err != nil {
			return
		}
		for left := int64(binary.LittleEndian.Uint64(ask[:])); left > 0; {
			n, err := c.Write(make([]byte, min(left, 64<<10)))
			if err != nil {
				return
			}
			left -= int64(n)
		}
	}
}

func fetch(c net.Conn, n int64) error {
	if _, err := c.Write(binary.LittleEndian.AppendUint64(nil, uint64(n))); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, c, n)
	return err
}

// dial connects to a sender through the line, without a network, so that time
// can be the test's own.
func (p *Line) dial() net.Conn {
	client, near := net.Pipe()
	far, server := net.Pipe()
	go sender(server)
	p.wg.Go(func() { p.join(near, far, time.Now()) })
	return client
}

func near(got, want time.Duration) bool { return (got - want).Abs() <= want/1000 }

// TestLineSpeed compares with what the numbers say, on a clock that moves only
// when everybody waits.
func TestLineSpeed(t *testing.T) {
	for _, s := range []Speed{slow, fast} {
		synctest.Test(t, func(t *testing.T) {
			p := newLine()
			p.Set(s)
			began := time.Now()
			c := p.dial()
			for i, want := range []time.Duration{
				2*s.RoundTrip + time.Second, // the connection is one round trip, the request another
				s.RoundTrip + time.Second,
			} {
				if err := fetch(c, s.Bandwidth); err != nil {
					t.Fatal(err)
				}
				if got := time.Since(began); !near(got, want) {
					t.Errorf("%+v: fetch %d of a second's bytes took %v, want %v", s, i, got, want)
				}
				began = time.Now()
			}
			if err := fetch(c, 1); err != nil {
				t.Fatal(err)
			}
			if got := time.Since(began); !near(got, s.RoundTrip) {
				t.Errorf("%+v: one byte took %v", s, got)
			}
			c.Close()
			p.wg.Wait()
			if down, up, n := p.Traffic(); down != 2*s.Bandwidth+1 || up != 24 || n != 1 {
				t.Errorf("got %d bytes down, %d up, %d connections", down, up, n)
			}
		})
	}
}

// TestLineIsShared has many connections fetch the same amount at once: together
// they take the bandwidth, and none gets much more of it than the others.
func TestLineIsShared(t *testing.T) {
	const clients = 50
	synctest.Test(t, func(t *testing.T) {
		p := newLine()
		p.Set(slow)
		var took [clients]time.Duration
		var all sync.WaitGroup
		began := time.Now()
		for i := range clients {
			all.Go(func() {
				c := p.dial()
				defer c.Close()
				if err := fetch(c, slow.Bandwidth/clients); err != nil {
					t.Error(err)
				}
				took[i] = time.Since(began)
			})
		}
		all.Wait()
		got, want := time.Since(began), 2*slow.RoundTrip+time.Second
		p.wg.Wait()
		if !near(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		for i, got := range took {
			if got < want*8/10 {
				t.Errorf("connection %d was served in %v, all in %v", i, got, want)
			}
		}
	})
}

// TestLineHoldsUp has a client that reads nothing: the server must not be able
// to send all, or what nobody wants would take the line from others.
func TestLineHoldsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newLine()
		p.Set(fast)
		c := p.dial()
		if _, err := c.Write(binary.LittleEndian.AppendUint64(nil, 1<<40)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if down, _, _ := p.Traffic(); down > (underWay+2)*parcel {
			t.Errorf("%d bytes left the server", down)
		}
		other := p.dial()
		began := time.Now()
		if err := fetch(other, fast.Bandwidth); err != nil {
			t.Fatal(err)
		}
		if got := time.Since(began); !near(got, 2*fast.RoundTrip+time.Second) {
			t.Errorf("beside it, a second's bytes took %v", got)
		}
		other.Close()
		c.Close() // tells the server to stop
		p.wg.Wait()
	})
}

// TestLine goes through real sockets.
func TestLine(t *testing.T) {
	p, err := NewLine(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, s := range []Speed{{}, fast} {
		p.Set(s)
		c, err := net.Dial("tcp", p.Addr())
		if err != nil {
			t.Fatal(err)
		}
		sent := bytes.Repeat([]byte("0123456789"), 100000)
		go func() {
			c.Write(sent)
			c.(*net.TCPConn).CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%+v: got %d bytes of %d, %v", s, len(got), len(sent), err)
		}
		c.Close()
	}
}

// BenchmarkLine measures what comes through: megabytes a second, of 12.5 and
// 125, and the time of one byte there and back.
func BenchmarkLine(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go sender(c)
		}
	}()
	for _, s := range []Speed{slow, fast} {
		for _, clients := range []int{1, 8, 50} {
			b.Run(fmt.Sprintf("%dMbit/connections=%d", s.Bandwidth*8/1e6, clients), func(b *testing.B) {
				p, err := NewLine(l.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				defer p.Close()
				p.Set(s)
				conns := make([]net.Conn, clients)
				for i := range conns {
					if conns[i], err = net.Dial("tcp", p.Addr()); err != nil {
						b.Fatal(err)
					}
					defer conns[i].Close()
					if err := fetch(conns[i], 1); err != nil {
						b.Fatal(err)
					}
				}
				var trip time.Duration
				for b.Loop() {
					var all sync.WaitGroup
					for _, c := range conns {
						all.Go(func() {
							if err := fetch(c, s.Bandwidth/int64(clients)); err != nil {
								b.Error(err)
							}
						})
					}
					all.Wait()
					b.StopTimer()
					began := time.Now()
					if err := fetch(conns[0], 1); err != nil {
						b.Fatal(err)
					}
					trip += time.Since(began)
					b.StartTimer()
				}
				b.SetBytes(s.Bandwidth)
				b.ReportMetric(float64(trip.Microseconds())/1000/float64(b.N), "trip-ms")
			})
		}
	}
}
