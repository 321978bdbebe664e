package chunkstore

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// Claimer is implemented by caches that several processes fill, so that what all
// of them want is fetched by one. A claim is a hint: what it says may be wrong,
// out of date or a lie, and then a chunk is fetched twice.
type Claimer interface {
	// Claim tells the others that this process is fetching chunk id, until it calls
	// release or ends. It never waits. ok is false while another has claimed the
	// chunk, or another call in this process. Where nothing can be told to others,
	// every claim is good.
	Claim(id index.ID) (release func(), ok bool)
}

const (
	// A claim takes microseconds. If each one takes longer than slowClaim, which it
	// does where somebody has set locks by the ten thousand, no more are made once
	// slowClaims have taken so long together.
	slowClaim  = time.Millisecond
	slowClaims = 2 * time.Second

	// How often those who wait look into the cache: soon at first, then at longest
	// intervals, and longer ones for many chunks, as each look costs some system
	// calls. Every claimEvery-th time they look whether the others have given up.
	leastPoll  = time.Millisecond
	longPoll   = 20 * time.Millisecond
	pollChunk  = 250 * time.Microsecond
	claimEvery = 4
)

// neighbours are the other processes that fill a Fetcher's cache.
type neighbours struct {
	Claimer
	wait  wait
	there atomic.Bool // a claim of theirs was seen

	mu    sync.Mutex    // guards what follows
	slow  time.Duration // that the last claims took, all of them slow
	until time.Time     // no claim before
}

func newNeighbours(c Claimer) *neighbours {
	n := &neighbours{Claimer: c}
	n.wait.fetches = make(map[*ownFetch]struct{})
	n.wait.rounds[0].most = firstPatience
	n.wait.rounds[1].most = secondPatience
	return n
}

// claim claims w for a round. The second one is among those who have lost their
// patience with the first: there a chunk has another name, and its first one is
// claimed as well if that can be, for those who have not.
func (n *neighbours) claim(round int, w *want) bool {
	first, second := w.chunk.ID, w.chunk.ID
	for i := range second {
		second[i] = ^second[i] // a name that no other chunk has
	}
	if round == 0 {
		release, ok := n.timed(first)
		w.release = release
		return ok
	}
	release, ok := n.timed(second)
	if !ok {
		return false
	}
	w.release = release
	if also, ok := n.timed(first); ok {
		w.release = func() { also(); release() }
	}
	return true
}

func (n *neighbours) timed(id index.ID) (release func(), ok bool) {
	start := time.Now()
	release, ok = n.Claim(id)
	n.took(time.Since(start))
	if !ok {
		n.there.Store(true)
	}
	return release, ok
}

// met reports whether others were seen to fetch what this process wants. There may
// be no neighbours at all.
func (n *neighbours) met() bool { return n != nil && n.there.Load() }

// waiting returns how the process waits for its neighbours; nil: it has none.
func (n *neighbours) waiting() *wait {
	if n == nil {
		return nil
	}
	return &n.wait
}

func (n *neighbours) took(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if d < slowClaim {
		n.slow = 0
		return
	}
	if n.slow += d; n.slow > slowClaims {
		n.slow, n.until = 0, time.Now().Add(patienceBack)
	}
}

// usable reports whether claims can be made now.
func (n *neighbours) usable() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.until.IsZero() || time.Now().After(n.until)
}

// giveUp ends the claim on w, if there is one.
func (w *want) giveUp() {
	if w.release != nil {
		w.release()
		w.release = nil
	}
}

// bring delivers wants to k as fetch does, but leaves to other processes what
// these are fetching already, and takes it from the cache. First it fetches what
// it could claim: so nobody waits for one who waits for him.
func (f *Fetcher) bring(ctx context.Context, wants []*want, k *sink) (abort, err error) {
	if f.neighbours == nil {
		return f.fetch(ctx, wants, k)
	}
	defer func() {
		for _, w := range wants {
			w.giveUp()
		}
	}()
	var failed []error
	fetch := func(ws []*want) error {
		abort, err := f.fetch(ctx, ws, k)
		var many batchError
		switch {
		case errors.As(err, &many):
			failed = append(failed, many...)
		case err != nil:
			failed = append(failed, err)
		}
		for _, w := range ws {
			w.giveUp()
		}
		return abort
	}
	// Where nothing comes into the cache there is nothing to wait for, and nothing
	// that others could wait for.
	for round := 0; round < len(f.neighbours.wait.rounds) && f.cache.takes() && f.neighbours.usable() && ctx.Err() == nil; round++ {
		if abort := f.share(ctx, round, wants, k, fetch); abort != nil {
			return abort, nil
		}
	}
	if _, abort := f.look(ctx, undone(wants), k); abort != nil {
		return abort, nil
	}
	if open := undone(wants); len(open) > 0 {
		if abort := fetch(open); abort != nil {
			return abort, nil
		}
	}
	return nil, joinFailed(failed)
}

// share fetches what can be claimed of wants, and waits for the rest until
// patience is over.
func (f *Fetcher) share(ctx context.Context, round int, wants []*want, k *sink, fetch func([]*want) error) (abort error) {
	wait := &f.neighbours.wait
	if round == 0 && wait.over(round) {
		return nil // with those who have lost it, too, there is the second round
	}
	end := time.Now().Add(time.Hour)
	if d, ok := ctx.Deadline(); ok {
		end = time.Now().Add(time.Until(d) / 4) // the stores need the rest
	}
	pause := leastPoll
	for pass := 0; ; pass++ {
		open := undone(wants)
		arrived := false
		if pass > 0 {
			if arrived, abort = f.look(ctx, open, k); abort != nil {
				return abort
			}
			open = undone(open)
		}
		if pass%claimEvery == 0 {
			var mine []*want
			for _, w := range open {
				if !f.neighbours.usable() {
					break
				}
				if f.neighbours.claim(round, w) {
					w.bad = w.bad && pass == 0
					mine = append(mine, w)
				}
			}
			// Another may have fetched it before the claim.
			var found bool
			if found, abort = f.look(ctx, mine, k); abort != nil {
				return abort
			}
			for _, w := range mine {
				if w.done {
					w.giveUp()
				}
			}
			arrived = arrived || found || pass > 0 && len(mine) > 0 // they were given up
			if mine = undone(mine); len(mine) > 0 {
				if abort = fetch(mine); abort != nil {
					return abort
				}
			}
			open = undone(open)
		}
		if arrived {
			wait.arrived()
			pause = leastPoll
		}
		if len(open) == 0 || ctx.Err() != nil || wait.over(round) || !f.neighbours.usable() || time.Now().After(end) {
			return nil
		}
		d := pause + time.Duration(len(open))*pollChunk
		sleep(ctx, d)
		if wait.waited(round, d) {
			f.askForOne(open)
		}
		pause = min(2*pause, longPoll)
	}
}

// look delivers those of wants that are in the cache by now, and reports whether
// others have brought any.
func (f *Fetcher) look(ctx context.Context, wants []*want, k *sink) (found bool, abort error) {
	for _, w := range wants {
		if w.bad {
			continue // who has claimed it heals it
		}
		plain, err := f.cache.get(ctx, f.digest, w.chunk, k.base)
		if err != nil {
			w.bad = !errors.Is(err, ErrNotFound)
			continue
		}
		if !f.neighbours.wait.isOurs(w.chunk.ID) {
			f.cache.shared.Add(1)
			found = true
		}
		if len(k.base) == 0 {
			k.base = plain[:0]
		}
		w.done = true
		if k.abort = k.emit(w, plain); k.abort != nil {
			return found, k.abort
		}
	}
	return found, nil
}
