package faultproxy

import (
	"io"
	"net"
	"testing"
	"time"
)

// echo is a server that says back what it hears.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	return l.Addr().String()
}

// say sends s and returns how much of it comes back within d.
func say(t *testing.T, addr, s string, d time.Duration) (got int, err error) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if _, err := io.WriteString(c, s); err != nil {
		return 0, err
	}
	c.SetReadDeadline(time.Now().Add(d))
	b := make([]byte, len(s))
	return io.ReadFull(c, b)
}

func TestTCP(t *testing.T) {
	p, err := NewTCP(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	whole := func(when string) {
		t.Helper()
		if n, err := say(t, p.Addr(), "0123456789", 2*time.Minute); n != 10 || err != nil {
			t.Errorf("%s: got %d bytes, %v", when, n, err)
		}
	}
	whole("at first")

	for _, reset := range []bool{false, true} {
		p.Break(1, 4, reset)
		if n, err := say(t, p.Addr(), "0123456789", 2*time.Minute); n > 4 || err == nil {
			t.Errorf("broken: got %d bytes, %v, want at most 4", n, err)
		}
		whole("after the one that broke")
	}
	p.Hold(true)
	if n, err := say(t, p.Addr(), "0123456789", 100*time.Millisecond); n != 0 || err == nil {
		t.Errorf("held: got %d bytes, %v", n, err)
	}
	time.AfterFunc(100*time.Millisecond, func() { p.Hold(false) })
	whole("held for a moment")

	p.Slow(20)
	if n, err := say(t, p.Addr(), "0123456789", 200*time.Millisecond); n > 5 || err == nil {
		t.Errorf("slow: got %d bytes, %v", n, err)
	}
	p.Slow(0)
	if err := p.Refuse(true); err != nil {
		t.Fatal(err)
	}
	if n, err := say(t, p.Addr(), "0123456789", time.Second); err == nil {
		t.Errorf("refused: got %d bytes", n)
	}
	if err := p.Refuse(false); err != nil {
		t.Fatal(err)
	}
	whole("at last")
}
