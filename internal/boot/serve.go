package boot

import (
	"context"
	"os"
	"os/signal"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// catchSignals takes over every signal that can be, before anything can arrive
// for the app.
//
// Those that the engine lets ignore stay so, for the app as well.
func catchSignals() chan os.Signal {
	ignored := slices.DeleteFunc([]os.Signal{unix.SIGHUP, unix.SIGINT}, func(s os.Signal) bool { return !signal.Ignored(s) })
	c := make(chan os.Signal, 64)
	signal.Notify(c)
	if len(ignored) > 0 {
		signal.Ignore(ignored...)
	}
	return c
}

// forwarded reports whether the app gets the signal. The Go runtime sends
// itself SIGURG, and children and broken pipes are boot's own. SIGPROF and the
// first real-time signal never come here: the runtime keeps them.
func forwarded(s unix.Signal) bool {
	switch s {
	case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE:
		return false
	}
	return true
}

// serve passes signals to the app and reaps what dies in boot's PID namespace,
// until the app itself has. It returns the app's exit status as a shell gives
// it.
func serve(app int, signals <-chan os.Signal) int {
	go func() {
		for s := range signals {
			if s := s.(unix.Signal); forwarded(s) {
				_ = unix.Kill(app, s) // the app may be gone: then so are we
			}
		}
	}()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return exitBoot
		}
		if pid != app {
			continue
		}
		switch {
		case status.Exited():
			return status.ExitStatus()
		case status.Signaled():
			return 128 + int(status.Signal())
		}
	}
}

// stopWait bounds how long the end of the container waits for the prefetch.
const stopWait = time.Second

// prefetching is the fetch of chunks ahead of their use.
type prefetching struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu sync.Mutex // guards what follows
	is prefetchStatus
}

// runs notes what is fetched now, and ended how that ended.
func (p *prefetching) runs(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.is = prefetchStatus{What: what, State: "running"}
}

func (p *prefetching) ended(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.is.State = "done"
	if err != nil {
		p.is.State, p.is.Error = "failed", httpio.OneLine(err.Error(), maxWords)
	}
}

func (p *prefetching) status() prefetchStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.is
}

// startPrefetch fetches the start set, then, where a cache that outlives the
// container takes it, the rest.
func startPrefetch(c *content, s *settings, log *logger) *prefetching {
	ctx, cancel := context.WithCancel(context.Background())
	p := &prefetching{cancel: cancel, done: make(chan struct{}), is: prefetchStatus{What: "none", State: "off"}}
	go func() {
		defer close(p.done)
		if s.prefetch == prefetchNone {
			return
		}
		p.runs("start")
		err := c.prefetchStart(ctx)
		p.ended(err)
		if err != nil {
			if ctx.Err() == nil && c.offline == nil { // where it is said of those that are read
				log.Warn("the chunks of a start could not be fetched ahead: " + err.Error())
			}
			return
		}
		if s.prefetch == prefetchAll || s.prefetch == prefetchAuto && c.sharedCache {
			p.runs("all")
			err := c.prefetchAll(ctx)
			p.ended(err)
			if err != nil && ctx.Err() == nil && c.offline == nil {
				log.Warn("the image could not be fetched ahead: " + err.Error())
			}
		}
	}()
	return p
}

// stop ends the prefetch. It does not wait for a cache or a store whose disk
// hangs.
func (p *prefetching) stop() {
	p.cancel()
	select {
	case <-p.done:
	case <-time.After(stopWait):
	}
}
