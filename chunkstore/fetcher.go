package chunkstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// FetcherOptions say where a Fetcher looks for chunks.
type FetcherOptions struct {
	// Digest names the chunks.
	Digest index.Digest
	// Cache is asked first and takes what the stores delivered; nil for none. A
	// fault of it never fails a read: it is logged and counted, and the stores
	// are asked. A damaged chunk in it is overwritten by a good one. If it is a
	// Claimer, what another process is fetching is waited for, for a bounded time.
	Cache Writer
	// Stores are asked in order. A store that failed a moment ago is asked after
	// the others, and in its place again once it has recovered.
	Stores []Store
	// HedgeAfter is the least time that a request may bring nothing before a second
	// one is sent for the same chunks; 0 is DefaultHedgeAfter, and less sends none.
	HedgeAfter time.Duration
	// Hold, unless nil, makes a chunk that cannot be had be asked for until ctx
	// ends, whatever the stores have answered. It is called with false when a chunk
	// has not come for some seconds, and next with true when all that is waited for
	// comes again.
	Hold func(again bool)
	// Log takes faults, with chunk and place; nil discards them.
	Log *slog.Logger
}

// Fetcher reads chunks through a cache from stores and hands out only bytes
// that it has verified. It is safe for concurrent use and remembers no failure:
// a chunk that could not be had is asked for again by the next call.
type Fetcher struct {
	digest index.Digest
	cache  *cache // nil: none
	// neighbours is nil where no others are known to fill the cache.
	neighbours *neighbours
	stores     []*source
	log        *slog.Logger

	slowest slowest
	waited  atomic.Int64 // nanoseconds

	hedgeAfter time.Duration
	hedges     hedges
	hold       *hold // nil: a chunk that cannot be had is an error

	ctx    context.Context // of what no caller waits for
	cancel context.CancelFunc
}

// NewFetcher returns a Fetcher. Close it to end its cache writes.
func NewFetcher(o FetcherOptions) *Fetcher {
	f := &Fetcher{digest: o.Digest, log: o.Log, hedgeAfter: o.HedgeAfter}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	if f.hedgeAfter == 0 {
		f.hedgeAfter = DefaultHedgeAfter
	}
	if o.Hold != nil {
		f.hold = &hold{say: o.Hold}
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if o.Cache != nil {
		f.cache = newCache(o.Cache, f.log)
		if c, ok := o.Cache.(Claimer); ok {
			f.neighbours = newNeighbours(c)
		}
	}
	for _, s := range o.Stores {
		f.stores = append(f.stores, &source{Store: s, place: len(f.stores), log: f.log, quiet: o.Hold != nil})
	}
	return f
}

// Close waits a moment for the cache writes that are under way and drops the
// rest. Reads go on to work, past the cache's writes.
func (f *Fetcher) Close() error {
	f.cancel()
	if f.cache == nil {
		return nil
	}
	return f.cache.close()
}

// Fetch appends the plain bytes of chunk c to dst. It tries again, with pauses,
// until ctx ends, unless all stores answered and none has good bytes, or none
// may become able to: the error then wraps ErrNotFound, is a *CorruptError, or
// is that of the store.
func (f *Fetcher) Fetch(ctx context.Context, c index.Chunk, dst []byte) ([]byte, error) {
	if err := checkSize(c); err != nil {
		return dst, err
	}
	plain, err := f.cached(ctx, c, dst)
	if err == nil {
		return plain, nil
	}
	w := f.newWant(c, 0)
	w.bad = !errors.Is(err, ErrNotFound)
	out := dst
	_, err = f.bring(ctx, []*want{w}, newSink(
		dst,
		func(_ *want, plain []byte) error { out = plain; return nil },
		readPatience,
	))
	if err != nil {
		return dst, err
	}
	return out, nil
}

// FetchBatch calls yield with the plain bytes of each of cs, i being the place
// in cs: first those in the cache, then the others as they arrive, in any
// order and never two at a time. plain is valid until yield returns. It stops at
// yield's first error and returns it. A chunk that cannot be had does not stop
// the others; the result is then the errors of all such chunks. When the cache
// falls behind with its writes, FetchBatch waits for it.
func (f *Fetcher) FetchBatch(ctx context.Context, cs []index.Chunk, yield func(i int, plain []byte) error) error {
	type name struct {
		id   index.ID
		size int
	}
	var wants []*want
	byName := make(map[name]*want) // a chunk that occurs twice is fetched once
	for i, c := range cs {
		if w := byName[name{c.ID, c.Size}]; w != nil {
			w.places = append(w.places, i)
			continue
		}
		if err := checkSize(c); err != nil {
			return err
		}
		w := f.newWant(c, i)
		byName[name{c.ID, c.Size}] = w
		wants = append(wants, w)
	}
	emit := func(w *want, plain []byte) error {
		for _, i := range w.places {
			if err := yield(i, plain); err != nil {
				return err
			}
		}
		return nil
	}
	if err := f.fetchCached(ctx, wants, emit); err != nil {
		return err
	}
	abort, err := f.bring(ctx, undone(wants), newSink(nil, emit, batchPatience))
	if abort != nil {
		return abort
	}
	return err
}

// Cached reports whether the cache has chunk c, without looking at its bytes.
func (f *Fetcher) Cached(ctx context.Context, c index.Chunk) bool {
	if f.cache == nil {
		return false
	}
	ok, err := f.cache.store.Has(ctx, c.ID)
	return ok && err == nil
}

// cachedReads is how many chunks of the cache are read at a time, for each
// processor: to verify one takes longer than to read it, unless it is still on the
// disk, which must be asked some five times for a chunk.
const cachedReads = 2

// fetchCached gives emit those of wants that are in the cache, several at a time.
func (f *Fetcher) fetchCached(ctx context.Context, wants []*want, emit func(*want, []byte) error) error {
	if f.cache == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		w     *want
		plain *[]byte
		err   error
	}
	work := queue(wants)
	results := make(chan result)
	for range min(len(wants), cachedReads*runtime.GOMAXPROCS(0)) {
		go func() {
			for w := range work {
				r := result{w: w, plain: buffers.Get().(*[]byte), err: ctx.Err()}
				if r.err == nil {
					*r.plain, r.err = f.cached(ctx, w.chunk, (*r.plain)[:0])
				}
				results <- r
			}
		}()
	}
	var abort error
	for range wants {
		r := <-results
		r.w.bad = r.err != nil && !errors.Is(r.err, ErrNotFound)
		if r.err == nil && abort == nil {
			r.w.done = true
			if abort = emit(r.w, *r.plain); abort != nil {
				cancel()
			}
		}
		buffers.Put(r.plain)
	}
	return abort
}

// queue returns wants as a channel that several goroutines empty.
func queue(wants []*want) <-chan *want {
	c := make(chan *want, len(wants))
	for _, w := range wants {
		c <- w
	}
	close(c)
	return c
}

// cached appends the plain bytes of chunk c to dst if the cache has them, as
// cache.get does.
func (f *Fetcher) cached(ctx context.Context, c index.Chunk, dst []byte) ([]byte, error) {
	if f.cache == nil {
		return dst, ErrNotFound
	}
	return f.cache.get(ctx, f.digest, c, dst)
}

// want is a chunk that is to be had from a store.
type want struct {
	chunk    index.Chunk
	places   []int   // where FetchBatch's caller wants it
	done     bool    // it was delivered, or failed for good
	failures []error // the last one of each store, nil where there is none
	corrupt  int     // rounds through the stores in which one had it, but damaged
	bad      bool    // the cache has something else in its place
	release  func()  // ends the claim on it; nil: there is none
}

func (f *Fetcher) newWant(c index.Chunk, place int) *want {
	return &want{chunk: c, places: []int{place}, failures: make([]error, len(f.stores))}
}

// retry reports whether asking again may help, and after which pause the
// stores that failed want to be asked.
func (w *want) retry() (again bool, after time.Duration) {
	damaged := false
	for _, err := range w.failures {
		var (
			corrupt *CorruptError
			told    interface {
				Temporary() bool
				RetryAfter() time.Duration
			}
		)
		switch {
		case err == nil || errors.Is(err, ErrNotFound):
		case errors.As(err, &corrupt):
			damaged = true
		case !errors.As(err, &told):
			again = true
		case told.Temporary():
			again = true
			after = max(after, told.RetryAfter())
		}
	}
	if damaged {
		w.corrupt++
		again = again || w.corrupt < corruptRounds
	}
	return again, after
}

// sink takes the frames that stores deliver, one at a time: who has its turn. Two
// stores may be at it for the same wants, which belong to who has the turn, too.
type sink struct {
	base     []byte // plain bytes are appended to it
	emit     func(w *want, plain []byte) error
	patience time.Duration // how long to wait for room in the cache's queue
	abort    error         // emit's first error
	began    time.Time     // set by fetch
	apart    bool          // each chunk is asked for by itself, in this round
	once     bool          // no chunk is asked for a second time because it is slow

	turn   chan struct{} // holds one while somebody has it
	landed chan struct{} // gets one when a want is done
	held   *holding      // nil unless the Fetcher holds
	own    *ownFetch     // nil unless the Fetcher has neighbours
}

func newSink(base []byte, emit func(*want, []byte) error, patience time.Duration) *sink {
	return &sink{base: base, emit: emit, patience: patience, turn: make(chan struct{}, 1), landed: make(chan struct{}, 1)}
}

func (k *sink) enter() { k.turn <- struct{}{} }
func (k *sink) leave() { <-k.turn }

func (k *sink) tryEnter() bool {
	select {
	case k.turn <- struct{}{}:
		return true
	default:
		return false
	}
}

const (
	firstPause = 50 * time.Millisecond
	longPause  = 5 * time.Second
	// corruptRounds is how often damaged bytes are asked for: a second time, as
	// they may have been damaged on their way.
	corruptRounds = 2
)

// fetch delivers wants to k. abort is k's error; err tells of the chunks that
// could not be had.
func (f *Fetcher) fetch(ctx context.Context, wants []*want, k *sink) (abort, err error) {
	k.began = time.Now()
	if len(wants) == 0 {
		return nil, nil
	}
	k.held = f.hold.begin()
	defer func() { k.held.end(abort == nil && err == nil) }()
	k.own = f.neighbours.waiting().begin()
	defer f.neighbours.waiting().end(k.own)
	var failed []error
	for fruitless := 0; ; fruitless++ { // rounds through the stores since the last chunk
		before := len(wants)
		var after time.Duration
		order := f.order(wants[0].chunk)
		for i := range order {
			open := undone(wants)
			if len(open) == 0 || ctx.Err() != nil {
				break
			}
			if f.askInTime(ctx, order[i:], open, k); k.abort != nil {
				return k.abort, nil
			}
		}
		wants = undone(wants)
		// One chunk in a damaged place may be why the request for all of them fails.
		k.apart = !k.apart && len(wants) == before
		if len(wants) < before {
			fruitless = 0
		}
		again := false
		for _, w := range wants {
			retry, pause := w.retry()
			if !retry && f.hold != nil {
				retry, pause = true, longPause
			}
			if retry && ctx.Err() == nil {
				again, after = true, max(after, pause)
				continue
			}
			w.done = true
			e := &fetchError{id: w.chunk.ID, failures: w.failures}
			if ctx.Err() != nil {
				e.failures = append(e.failures, fmt.Errorf("gave up: %w", context.Cause(ctx)))
			}
			failed = append(failed, e)
		}
		if !again {
			return nil, joinFailed(failed)
		}
		pause := min(firstPause<<min(fruitless, 10), longPause)
		pause = pause/2 + rand.N(pause/2) // many readers of one store shall not come back together
		// A store that wants to be left alone for longer than the reader can wait
		// is asked once more halfway, and halfway again: it may have recovered.
		if d, ok := ctx.Deadline(); ok {
			after = min(after, time.Until(d)/2)
		}
		sleep(ctx, max(pause, after))
	}
}

// slowFetch is from when on a fetch is worth a line for those who look closely.
const slowFetch = time.Second

// delivered notes that s has brought w, which somebody has waited for since began.
func (f *Fetcher) delivered(s *source, w *want, began time.Time) {
	now := time.Now()
	took := now.Sub(began)
	f.waited.Add(int64(took))
	f.slowest.note(took, w.chunk.ID, s, now)
	if took >= slowFetch {
		f.log.Debug("slow fetch", "store", s.String(), "chunk", w.chunk.ID.String(), "took", took.Round(time.Millisecond))
	}
}

func undone(wants []*want) []*want {
	var open []*want
	for _, w := range wants {
		if !w.done {
			open = append(open, w)
		}
	}
	return open
}

// sleep waits for d or for ctx to end.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// ask asks the attempt's store for wants, all at once where it can or each apart,
// and gives k what it delivers. Each want that it does not deliver gets a failure.
func (f *Fetcher) ask(ctx context.Context, a *attempt, wants []*want, k *sink) {
	s := a.source
	watched, timer, stop := watch(ctx, s.patience(ctx, len(f.stores)))
	defer stop()
	// fail notes err, of one request, for each of ws.
	fail := func(err error, ws ...*want) {
		k.enter()
		defer k.leave()
		if a.lost || k.abort != nil {
			return
		}
		notFound := errors.Is(err, ErrNotFound)
		silent := false
		if cause := context.Cause(watched); cause != nil && ctx.Err() == nil && !notFound {
			err, silent = cause, true
		}
		f := &failure{s.String(), err}
		if ctx.Err() == nil {
			s.lacked(f)
		}
		for _, w := range ws {
			before := w.failures[s.place]
			switch {
			case w.done:
			case silent:
				w.failures[s.place] = s.silence(err, before)
			// That the caller gave up says less than why the last attempt failed.
			case ctx.Err() == nil || before == nil:
				w.failures[s.place] = f
			}
		}
		if !notFound && ctx.Err() == nil {
			s.failed(err)
		}
	}
	take := func(w *want, frame []byte) error {
		// The time that the caller and the cache take is not the store's.
		timer.stop()
		defer timer.start()
		k.enter()
		defer k.leave()
		if a.lost {
			return errLost
		}
		a.waited(time.Now())
		defer func() { a.last = time.Now() }()
		return f.take(ctx, a, w, frame, k)
	}

	b, ok := s.Store.(Batcher)
	if ok && len(wants) > 1 && !a.apart {
		rest, err := askBatch(watched, b, wants, take)
		k.enter()
		over := a.lost || k.abort != nil
		k.leave()
		switch {
		case over || len(rest) == 0:
			return
		case err == nil:
			err = errors.New("the store ended a batch without delivering all of it")
			fallthrough
		case !errors.Is(err, ErrNotFound):
			fail(err, rest...)
			return
		}
		// One of them is not there, and the batch ended with it.
		wants = rest
	}
	askEach(watched, s, wants, func(w *want, frame []byte, err error) {
		if err != nil {
			fail(err, w)
		} else if take(w, frame) != nil {
			stop() // the others need not end
		}
	})
}

// errLost ends an attempt that another one has outrun.
var errLost = errors.New("another request was quicker")

// askBatch gives take what b delivers of wants, and returns what it does not.
func askBatch(ctx context.Context, b Batcher, wants []*want, take func(*want, []byte) error) (rest []*want, err error) {
	ids := make([]index.ID, len(wants))
	taken := make([]bool, len(wants))
	for i, w := range wants {
		ids[i] = w.chunk.ID
	}
	err = b.GetBatch(ctx, ids, func(i int, frame []byte) error {
		taken[i] = true
		return take(wants[i], frame)
	})
	for i, w := range wants {
		if !taken[i] {
			rest = append(rest, w)
		}
	}
	return rest, err
}

// askEach asks s for wants one by one, several at a time, and calls done for
// each of them, never two at a time.
func askEach(ctx context.Context, s Store, wants []*want, done func(w *want, frame []byte, err error)) {
	type result struct {
		w     *want
		frame *[]byte
		err   error
	}
	work := queue(wants)
	results := make(chan result)
	for range min(len(wants), parallelGets) {
		go func() {
			for w := range work {
				frame := buffers.Get().(*[]byte)
				got, err := (*frame)[:0], ctx.Err()
				if err == nil {
					got, err = s.Get(ctx, w.chunk.ID, got)
				}
				*frame = got
				results <- result{w, frame, err}
			}
		}()
	}
	for range wants {
		r := <-results
		done(r.w, *r.frame, r.err)
		buffers.Put(r.frame)
	}
}

// parallelGets is how many requests of one call go to a store at a time.
const parallelGets = 8

// buffers keeps buffers for single chunks, stored or plain.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// take verifies the stored form of w that attempt a has brought and hands it on.
// Its error is that of k's receiver; a damaged frame is w's failure. The caller
// has k's turn.
func (f *Fetcher) take(ctx context.Context, a *attempt, w *want, frame []byte, k *sink) error {
	s := a.source
	if k.abort != nil {
		return k.abort
	}
	if w.done {
		return nil // a store that delivers twice, or a second one
	}
	plain, err := Decode(k.base, frame, f.digest, w.chunk)
	if err != nil {
		w.failures[s.place] = s.corrupted(w.chunk.ID, err)
		return nil
	}
	if len(k.base) == 0 {
		k.base = plain[:0]
	}
	w.done = true
	a.brought++
	select {
	case k.landed <- struct{}{}:
	default:
	}
	k.held.progress()
	f.neighbours.waiting().progress(k.own)
	s.delivered(len(frame), len(plain)-len(k.base))
	f.delivered(s, w, k.began)
	if k.abort = k.emit(w, plain); k.abort != nil {
		return k.abort
	}
	if f.cache != nil {
		f.cache.put(ctx, w, frame, k.patience)
	}
	return nil
}
