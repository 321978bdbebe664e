package chunkstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// Locator is implemented by stores that can say where a chunk lies in them, for
// messages: "pack sha256:… at 1234 in registry://…".
type Locator interface {
	Locate(id index.ID) string
}

// source is one of a Fetcher's stores and how it has been doing.
type source struct {
	Store
	place int // in Fetcher.stores
	log   *slog.Logger

	count             counter
	failures, corrupt atomic.Int64

	faults throttle

	// mu guards the two times. They only order requests: a store in trouble is
	// asked after the others. Without that, each read would first wait for the
	// store that does not answer. When retryAt has come, the one request that
	// moves it on asks the store in its place, to see whether it has recovered;
	// the reads beside it do not wait with it.
	mu      sync.Mutex
	trouble time.Time // of the last failure; zero since a delivery
	retryAt time.Time
	last    error // guarded by mu, too
	lastAt  time.Time
}

const (
	troublePause = 10 * time.Second

	shortPatience = 5 * time.Second
	longPatience  = 30 * time.Second
)

// order returns the stores in the order in which to ask them now.
func (f *Fetcher) order() []*source {
	if len(f.stores) < 2 {
		return f.stores
	}
	var good, troubled []*source
	for _, s := range f.stores {
		if s.inTrouble() {
			troubled = append(troubled, s)
		} else {
			good = append(good, s)
		}
	}
	return append(good, troubled...)
}

func (s *source) inTrouble() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trouble.IsZero() {
		return false
	}
	now := time.Now()
	if now.Before(s.retryAt) {
		return true
	}
	s.retryAt = now.Add(troublePause)
	return false
}

// lacked notes why the store did not deliver a chunk.
func (s *source) lacked(f *failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last, s.lastAt = f, time.Now()
}

// condition returns what lacked was told last, when, and since when the store is in
// trouble.
func (s *source) condition() (last error, at, trouble time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, s.lastAt, s.trouble
}

// failed notes that the store could not be asked.
func (s *source) failed(err error) {
	s.failures.Add(1)
	now := time.Now()
	s.mu.Lock()
	s.trouble, s.retryAt = now, now.Add(troublePause)
	s.mu.Unlock()
	if n, ok := s.faults.allow(now); ok {
		if e := (*Error)(nil); !errors.As(err, &e) { // which names the store
			err = fmt.Errorf("%s: %w", s, err)
		}
		s.log.Warn("store fails", "error", err, "failures", n)
	}
}

// delivered notes a good chunk.
func (s *source) delivered(stored, plain int) {
	s.count.add(stored, plain)
	s.mu.Lock()
	recovered := !s.trouble.IsZero()
	s.trouble = time.Time{}
	s.mu.Unlock()
	if recovered {
		s.log.Info("store answers again", "store", s.String())
	}
}

// corrupted notes a damaged chunk and returns err with its place.
func (s *source) corrupted(id index.ID, err error) error {
	where := s.String()
	if l, ok := s.Store.(Locator); ok {
		where = l.Locate(id)
	}
	var corrupt *CorruptError
	if errors.As(err, &corrupt) {
		corrupt.Where = where
	}
	s.corrupt.Add(1)
	s.log.Error("store returns a corrupt chunk", "store", s.String(), "chunk", id.String(), "error", err)
	f := &failure{s.String(), err}
	s.lacked(f)
	return f
}

// patience is how long the store may deliver nothing before a request is given
// up: a part of what ctx leaves, so that the other stores and a second attempt
// have their turn too.
func (s *source) patience(ctx context.Context, stores int) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return longPatience
	}
	share := time.Until(deadline) / time.Duration(stores+1)
	return min(max(share, shortPatience), longPatience)
}

// watch returns a context that ends, with a cause that says so, when the timer
// has run for d without being stopped.
func watch(ctx context.Context, d time.Duration) (watched context.Context, timer stallTimer, stop func()) {
	watched, cancel := context.WithCancelCause(ctx)
	t := time.AfterFunc(d, func() {
		cancel(fmt.Errorf("nothing arrived within %v: %w", d.Round(time.Second), context.DeadlineExceeded))
	})
	return watched, stallTimer{t, d}, func() { t.Stop(); cancel(nil) }
}

type stallTimer struct {
	t *time.Timer
	d time.Duration
}

func (s stallTimer) stop()  { s.t.Stop() }
func (s stallTimer) start() { s.t.Reset(s.d) }

// throttle lets a message through at most every throttlePause.
type throttle struct {
	mu    sync.Mutex
	last  time.Time
	count int // events since the last message
}

const throttlePause = 10 * time.Second

// allow counts an event and reports whether to write about it, and how many
// there have been since the last message.
func (t *throttle) allow(now time.Time) (n int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count++
	if now.Sub(t.last) < throttlePause {
		return 0, false
	}
	n, t.count, t.last = t.count, 0, now
	return n, true
}
