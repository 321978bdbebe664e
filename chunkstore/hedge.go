package chunkstore

import (
	"context"
	"slices"
	"sync"
	"time"
)

// A request on which nothing comes mostly sits on a connection that has died,
// or at a server that is busy with something else, and a second one would be
// answered at once. So a Fetcher sends a second one when the first is slower than
// nearly all before it, to the next store if there is one. What comes first
// counts.

const (
	// DefaultHedgeAfter is what FetcherOptions.HedgeAfter means when it is 0.
	DefaultHedgeAfter = 300 * time.Millisecond

	paceSamples = 64
	// fewSamples is how many answers it takes to know what is slow; until then
	// hedgeUnknown times the least wait is.
	fewSamples   = 8
	hedgeUnknown = 4

	// At most so many chunks, and one of so many that were asked for, are asked
	// for a second time: a store that is slow because it has too much to do
	// shall not get twice as much.
	hedgesFree = 32
	hedgeShare = 20
	// hedgesShared is hedgesFree where others fetch the same image at the same
	// time: their line is slow because all of them are on it, and with a chunk
	// that is fetched for all each of them has its own few to ask for twice.
	hedgesShared = 2

	// outrunLimit is how often in a row a second request to another store may win
	// before the slow store counts as one in trouble.
	outrunLimit = 2
)

type freshKey struct{}

// fresh returns the context of a request that shall not wait for the connections
// that stand.
func fresh(ctx context.Context) context.Context { return context.WithValue(ctx, freshKey{}, true) }

// IsFresh reports whether a request was sent because another one to the same
// store gets no answer. A store then makes a new connection, if it can, as the
// ones that it has may be dead.
func IsFresh(ctx context.Context) bool { return ctx.Value(freshKey{}) != nil }

// pace is how quick a store has been.
type pace struct {
	mu     sync.Mutex // guards what follows
	recent [paceSamples]time.Duration
	n      int // samples so far
}

// add notes the longest that a request made its receiver wait.
func (p *pace) add(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recent[p.n%paceSamples] = d
	p.n++
}

// slow returns how long a request may bring nothing before it is slower than 19
// of 20, with some room, and never less than least.
func (p *pace) slow(least time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n < fewSamples {
		return hedgeUnknown * least
	}
	sorted := p.recent
	known := sorted[:min(p.n, paceSamples)]
	slices.Sort(known)
	return max(2*known[len(known)*19/20], least)
}

// hedges counts what was asked for and what a second time.
type hedges struct {
	mu            sync.Mutex // guards the two
	asked, hedged int        // chunks
}

func (h *hedges) ask(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked += n
}

// allow reports whether n chunks may be asked for a second time, free of them
// whatever was asked for.
func (h *hedges) allow(n, free int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.hedged+n > free+h.asked/hedgeShare {
		return false
	}
	h.hedged += n
	return true
}

// attempt is one asking of a store for some chunks.
type attempt struct {
	source *source
	began  time.Time
	apart  bool // each chunk is asked for by itself
	cancel context.CancelFunc
	done   chan struct{} // closed when the store has answered

	// What follows belongs to who has the sink's turn.
	last    time.Time     // when the store last delivered, or was asked
	longest time.Duration // that it let its receiver wait
	brought int           // chunks
	lost    bool          // nobody takes any more what comes
}

// waited ends a wait for the store.
func (a *attempt) waited(now time.Time) {
	a.longest = max(a.longest, now.Sub(a.last))
	a.last = now
}

// begin asks s for wants.
func (f *Fetcher) begin(ctx context.Context, s *source, wants []*want, k *sink) *attempt {
	now := time.Now()
	a := &attempt{source: s, began: now, apart: k.apart, last: now, done: make(chan struct{})}
	ctx, a.cancel = context.WithCancel(ctx)
	f.hedges.ask(len(wants))
	go func() {
		defer close(a.done)
		f.ask(ctx, a, wants, k)
	}()
	return a
}

// askInTime asks the first of order for wants, and for what is late a second
// time, there or at the next. It returns when all has come or no more will.
func (f *Fetcher) askInTime(ctx context.Context, order []*source, wants []*want, k *sink) {
	first := f.begin(ctx, order[0], wants, k)
	defer first.cancel()
	second := f.hedge(ctx, first, order[1:], wants, k)
	if second == nil {
		k.enter()
		defer k.leave()
		if first.brought > 0 {
			first.source.pace.add(first.longest)
		}
		return
	}
	defer second.cancel()
	firstDone, secondDone := first.done, second.done
	for complete := false; !complete && (firstDone != nil || secondDone != nil); {
		select {
		case <-firstDone:
			firstDone = nil
		case <-secondDone:
			secondDone = nil
		case <-k.landed:
		}
		k.enter()
		complete = k.abort != nil || len(undone(wants)) == 0
		k.leave()
	}
	k.enter()
	defer k.leave()
	first.lost, second.lost = true, true
	now := time.Now()
	if first.brought == 0 {
		first.waited(now) // it is no quicker than that
		if second.brought > 0 && second.source != first.source && ctx.Err() == nil {
			first.source.wasOutrun(now.Sub(first.began))
		}
	}
	first.source.pace.add(first.longest)
	if second.brought > 0 {
		second.source.pace.add(second.longest)
	}
}

// hedge waits for first, and when it is slow sends a second request for what it
// has not brought. It returns nil if there was no need, or too many such requests.
func (f *Fetcher) hedge(ctx context.Context, first *attempt, others []*source, wants []*want, k *sink) *attempt {
	slow := first.source.pace.slow(f.hedgeAfter)
	timer := time.NewTimer(slow)
	defer timer.Stop()
	var open []*want
	for {
		select {
		case <-first.done:
			return nil
		case <-timer.C:
		}
		silent := time.Duration(0) // while its receiver is busy, the store has nothing to say
		if f.hedgeAfter > 0 && k.tryEnter() {
			silent = time.Since(first.last)
			open = undone(wants)
			k.leave()
		}
		if silent >= slow {
			break
		}
		timer.Reset(slow - silent)
	}
	free := hedgesFree
	if f.neighbours.met() {
		free = hedgesShared
	}
	if len(open) == 0 || ctx.Err() != nil || k.once || !f.hedges.allow(len(open), free) {
		<-first.done
		return nil
	}
	to := first.source
	if len(others) > 0 && !others[0].isInTrouble() {
		to = others[0]
	} else {
		ctx = fresh(ctx)
	}
	to.hedged.Add(int64(len(open)))
	return f.begin(ctx, to, open, k)
}
