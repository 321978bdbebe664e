package answer

import (
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// TestEach: clients that send nothing keep those behind them waiting for a bounded time,
// and no more of them are answered at a time than may be.
func TestEach(t *testing.T) {
	const most, silent = 4, 4
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	var now, highest atomic.Int32
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Each(l, most, time.Second, func(c net.Conn) {
			if n := now.Add(1); n > highest.Load() {
				highest.Store(n)
			}
			defer now.Add(-1)
			if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
				_, _ = io.WriteString(c, "answer")
			}
		})
	}()
	var clients []net.Conn
	for range silent + 1 {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	last := clients[silent]
	if _, err := io.WriteString(last, "?"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(last); err != nil || string(got) != "answer" {
		t.Errorf("got %q, %v, want an answer", got, err)
	}
	for _, c := range clients[:silent] {
		if got, err := io.ReadAll(c); err != nil || len(got) > 0 {
			t.Errorf("a client that sends nothing: got %q, %v, want the end", got, err)
		}
	}
	if n := highest.Load(); n > most {
		t.Errorf("%d were answered at a time, want at most %d", n, most)
	}
	l.Close()
	<-ended
}
