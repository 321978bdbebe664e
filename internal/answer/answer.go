// Package answer serves whoever connects, within bounds: hostile clients cost a
// goroutine each for some seconds, and never more than so many.
package answer

import (
	"errors"
	"net"
	"time"
)

// acceptPause is what is waited when no connection can be accepted: descriptors
// can run out.
const acceptPause = 100 * time.Millisecond

// Each has answer called for each connection to l, up to most at a time, until l
// is closed. The others wait in the kernel's queue. What is not read or written
// within timeout fails.
func Each(l net.Listener, most int, timeout time.Duration, answer func(net.Conn)) {
	free := make(chan struct{}, most)
	for {
		free <- struct{}{}
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(acceptPause)
			<-free
			continue
		}
		go func() {
			defer func() { <-free }()
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(timeout))
			answer(conn)
		}()
	}
}
