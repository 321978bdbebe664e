package chunkstore

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// A process waits for what others fetch, and must not wait for ever: they may be
// stopped, or hold their claims to do harm. But when the store stands still, or
// the machine, all of them bring nothing, and if each process then fetched for
// itself, the store would be asked for everything as often as there are processes.
// So a wait is in vain only while the store brings this process something. What
// it is fetching anyway tells; who fetches nothing asks for one chunk more.

const (
	// Others are waited for as long as something comes of it, and this long in vain
	// in all. Their chunks are claimed a second time, for those who wait for them as
	// well, and those claims waited for once more.
	firstPatience  = 4 * time.Second
	secondPatience = 2 * time.Second
	// patienceBack is after how long others are given a second chance.
	patienceBack = 10 * time.Minute
	// expectedPause is between two chunks from others, or from a store, that are at
	// work. It is not waited in vain.
	expectedPause = 250 * time.Millisecond

	// probeAfter is how long a process that fetches nothing waits for others, who
	// bring nothing, before it asks for a chunk itself. stuckAfter is the same for
	// one whose own fetches bring nothing: these may be the only ones that do not.
	probeAfter = 1500 * time.Millisecond
	stuckAfter = 8 * time.Second
	// probeTime bounds such a fetch.
	probeTime = time.Minute
	// slowPauses is after how many long pauses of the store, each ended by something
	// for this process and nothing from others, it no longer excuses them: it is slow.
	slowPauses = 3
)

// patience is how long a process waits for others in vain, all its waiting
// together.
type patience struct {
	most     time.Duration
	spent    time.Duration // in vain
	unproven time.Duration // in vain if the store answers
	last     time.Time     // when there was some of either
}

// wait is what a process knows of its waiting for others. The methods of a nil wait
// that fetches call do nothing.
type wait struct {
	mu     sync.Mutex // guards what follows
	rounds [2]patience
	last   time.Time     // when some was counted
	idle   time.Duration // waited since others brought something

	fetches map[*ownFetch]struct{} // under way
	came    time.Time              // when one of them last brought something
	pauses  int                    // long ones that ended since others brought something

	probing  bool
	probed   index.ID      // the chunk that was last asked for to see if the store answers
	probedAt time.Duration // idle when that ended
}

// ownFetch is a fetch of this process.
type ownFetch struct {
	last time.Time // when it brought something, or began
}

// begin notes a fetch.
func (v *wait) begin() *ownFetch {
	if v == nil {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	o := &ownFetch{last: time.Now()}
	v.fetches[o] = struct{}{}
	return o
}

func (v *wait) end(o *ownFetch) {
	if v == nil {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.fetches, o)
}

// progress notes that a store has brought o something.
func (v *wait) progress(o *ownFetch) {
	if v == nil {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	stood := now.Sub(o.last) > probeAfter
	if stood && v.last.After(o.last) {
		v.pauses++
	}
	o.last, v.came = now, now
	for i := range v.rounds {
		p := &v.rounds[i]
		if stood && v.pauses < slowPauses {
			// Others could bring nothing either. Not all is excused, as they may do harm
			// and the store be slow at the same time.
			p.unproven /= 4
		}
		p.spent, p.unproven = p.spent+p.unproven, 0
	}
}

// arrived notes that others have brought something.
func (v *wait) arrived() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.idle, v.probedAt, v.pauses = 0, 0, 0
}

// still reports whether the store stands still, for all that is known here: what
// it was last asked for has not come, nor anything else since. v.mu is held.
func (v *wait) still(now time.Time) bool {
	if v.pauses >= slowPauses {
		return false
	}
	for o := range v.fetches {
		if !o.last.Before(v.came) && now.Sub(o.last) > expectedPause {
			return true
		}
	}
	return false
}

// waited counts d, for which a call has slept. What it slept longer, as the
// machine was busy, others may have done, too. If probe is true, the caller is to
// ask a store for a chunk.
func (v *wait) waited(round int, d time.Duration) (probe bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	if now.Sub(v.last) > patienceBack {
		v.idle, v.probedAt = 0, 0
	}
	d = min(d, now.Sub(v.last)) // other calls have counted the rest
	v.last = now
	v.idle += d
	after := stuckAfter
	if !v.still(now) {
		after = probeAfter
		if v.idle > expectedPause {
			p := &v.rounds[round]
			p.unproven, p.last = p.unproven+d, now
		}
	}
	probe = !v.probing && v.idle-v.probedAt >= after && now.Sub(v.came) >= probeAfter
	v.probing = v.probing || probe
	return probe
}

// over reports whether nothing more is waited for in a round.
func (v *wait) over(round int) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	p := &v.rounds[round]
	if time.Since(p.last) > patienceBack {
		p.spent, p.unproven = 0, 0
	}
	return p.spent+p.unproven >= p.most
}

// isOurs reports whether this process has asked for chunk id to see if the store
// answers. That it is in the cache is not the others' doing.
func (v *wait) isOurs(id index.ID) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.probed == id
}

// askForOne fetches one of wants, as far as the cache, whoever has claimed it. There
// who waits for it finds it.
func (f *Fetcher) askForOne(wants []*want) {
	v := &f.neighbours.wait
	c := wants[rand.N(len(wants))].chunk // each process another one
	v.mu.Lock()
	v.probed = c.ID
	v.mu.Unlock()
	go func() {
		ctx, cancel := context.WithTimeout(f.ctx, probeTime)
		defer cancel()
		k := newSink(nil, func(*want, []byte) error { return nil }, readPatience)
		k.once = true
		f.fetch(ctx, []*want{f.newWant(c, 0)}, k)
		v.mu.Lock()
		defer v.mu.Unlock()
		v.probing, v.probedAt = false, v.idle
	}()
}
