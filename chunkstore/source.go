package chunkstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
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
	quiet bool // that it fails is said by who holds

	count                     counter
	failures, corrupt, hedged atomic.Int64

	faults throttle
	pace   pace

	// mu guards what follows. It only orders requests: a store in trouble is
	// asked after the others, and never left out. Without that, each read would
	// first wait for the store that does not answer. When probeAt has come and
	// others still serve, a request that no read waits for looks whether it has
	// recovered.
	mu      sync.Mutex
	trouble time.Time // of the last failure; zero since a delivery
	probeAt time.Time
	probing bool
	probes  int // in vain, since the trouble began
	outruns int // in a row
	last    error
	lastAt  time.Time
}

const (
	// firstProbe and lastProbe are the pauses before a store in trouble is
	// probed, which grow. Each is drawn anew between a half and the whole, as
	// many containers lose a store in the same moment.
	firstProbe = 10 * time.Second
	lastProbe  = 40 * time.Second
	// probePatience bounds a probe.
	probePatience = 10 * time.Second

	shortPatience = 5 * time.Second
	longPatience  = 30 * time.Second
)

// order returns the stores in the order in which to ask them now. c is a chunk
// that is wanted.
func (f *Fetcher) order(c index.Chunk) []*source {
	if len(f.stores) < 2 {
		return f.stores
	}
	var good, troubled []*source
	for _, s := range f.stores {
		if s.isInTrouble() {
			troubled = append(troubled, s)
		} else {
			good = append(good, s)
		}
	}
	if len(good) > 0 {
		for _, s := range troubled {
			if s.startProbe() {
				go f.probe(s, c)
			}
		}
	}
	return append(good, troubled...)
}

func (s *source) isInTrouble() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.trouble.IsZero()
}

// startProbe reports whether the caller is to probe the store.
func (s *source) startProbe() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trouble.IsZero() || s.probing || time.Now().Before(s.probeAt) {
		return false
	}
	s.probing = true
	return true
}

// probe asks a store in trouble for chunk c. That it does not have it is an
// answer as good as any; a damaged one is not.
func (f *Fetcher) probe(s *source, c index.Chunk) {
	ctx, cancel := context.WithTimeout(f.ctx, probePatience)
	defer cancel()
	frame, err := s.Get(ctx, c.ID, nil)
	if err == nil {
		_, err = Decode(nil, frame, f.digest, c)
	}
	if err == nil || errors.Is(err, ErrNotFound) {
		s.recovered()
	} else {
		s.shun()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.probing = false
}

// shun puts the store behind the others until a probe.
func (s *source) shun() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trouble.IsZero() {
		s.probes = 0
	} else if s.probing {
		s.probes++
	}
	pause := min(firstProbe<<min(s.probes, 10), lastProbe)
	s.trouble = time.Now()
	s.probeAt = s.trouble.Add(pause/2 + rand.N(pause/2))
}

// recovered ends the store's trouble.
func (s *source) recovered() {
	s.mu.Lock()
	was := !s.trouble.IsZero()
	s.trouble, s.outruns = time.Time{}, 0
	s.mu.Unlock()
	if was {
		s.log.Info("store answers again", "store", s.String())
	}
}

// wasOutrun notes that a second request, to another store, has brought what this
// one did not begin to bring in time d.
func (s *source) wasOutrun(d time.Duration) {
	s.mu.Lock()
	s.outruns++
	limit := s.outruns >= outrunLimit
	s.mu.Unlock()
	if limit {
		s.log.Info("store is slow, others are asked before it", "store", s.String(), "waited", d)
		s.shun()
	}
}

// lacked notes why the store did not deliver a chunk.
func (s *source) lacked(f *failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last, s.lastAt = f, time.Now()
}

// condition returns what lacked was told last, and when, and since when the store
// is in trouble.
func (s *source) condition() (at, trouble time.Time, last error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lastAt, s.trouble, s.last
}

// failed notes that the store could not be asked.
func (s *source) failed(err error) {
	s.failures.Add(1)
	s.shun()
	if n, ok := s.faults.allow(time.Now()); ok {
		if e := (*Error)(nil); !errors.As(err, &e) { // which names the store
			err = fmt.Errorf("%s: %w", s, err)
		}
		s.log.Log(context.Background(), s.level(slog.LevelWarn), "store fails", "error", err, "failures", n)
	}
}

// level is that of a message that would have level l if nobody held.
func (s *source) level(l slog.Level) slog.Level {
	if s.quiet {
		return slog.LevelInfo
	}
	return l
}

// delivered notes a good chunk.
func (s *source) delivered(stored, plain int) {
	s.count.add(stored, plain)
	s.recovered()
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
	s.log.Log(context.Background(), s.level(slog.LevelError), "store returns a corrupt chunk", "store", s.String(), "chunk", id.String(), "error", err)
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

// silenceError is that a store was given up as nothing arrived, after it had
// failed in a way that says more: an attempt has the less time the later it is, and
// the last one may have too little for a login.
type silenceError struct {
	error
	before error
}

func (e *silenceError) Error() string { return e.error.Error() + "; before that: " + e.before.Error() }

func (e *silenceError) Unwrap() error { return e.error }

// silence is the failure of a request on which nothing arrived, and before it of
// the same chunk here; nil: none.
func (s *source) silence(err, before error) error {
	var f *failure
	if !errors.As(before, &f) {
		return &failure{s.String(), err}
	}
	why := f.err
	var silent *silenceError
	var e *Error
	switch {
	case errors.As(why, &silent):
		why = silent.before
	case errors.Is(why, context.DeadlineExceeded):
		return &failure{s.String(), err}
	case errors.As(why, &e): // which names store and chunk
		why = e.Err
	}
	return &failure{s.String(), &silenceError{err, why}}
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
