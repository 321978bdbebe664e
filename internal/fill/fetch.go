package fill

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/index"
)

const (
	// A batch is what is asked for at once, about one request to a pack for a
	// third of its plain bytes: enough that a far registry's round trip does not
	// count, and so little that every worker has some. What is on its way when the
	// process is killed travels again.
	leastBatch, mostBatch = 2 << 20, 8 << 20
	batchesEach           = 4 // batches for each worker, if they are not too small
)

// fetchAll brings all chunks that files still want and writes them.
func (f *filler) fetchAll(ctx context.Context) error {
	ctx, watch := f.watch(ctx)
	defer watch.stop()
	g, running := errgroup.WithContext(ctx)
	g.SetLimit(workers())
	full := min(max((f.progress.total-f.progress.resumed)/int64(workers()*batchesEach), leastBatch), mostBatch)
	var (
		batch []int
		size  int64
	)
	flush := func() {
		b := batch
		batch, size = nil, 0
		g.Go(func() error { return f.fetchBatch(running, watch, b) })
	}
	for pos := range f.order() {
		if running.Err() != nil {
			break
		}
		c, err := f.x.At(pos)
		if err != nil {
			return err
		}
		batch = append(batch, pos)
		if size += int64(c.Size); size >= full {
			flush()
		}
	}
	if len(batch) > 0 && running.Err() == nil {
		flush()
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// order yields a position of each chunk that is to be fetched, in the order in
// which they are.
func (f *filler) order() func(yield func(int) bool) {
	return func(yield func(int) bool) {
		seen := make([]uint64, (f.x.Len()+63)/64)
		// next yields pos if it is wanted, and notes all its likes.
		next := func(pos int) bool {
			if pos < 0 || pos >= f.x.Len() || seen[pos/64]&(1<<(pos%64)) != 0 {
				return true
			}
			want := false
			for at := uint32(pos); ; {
				seen[at/64] |= 1 << (at % 64)
				want = want || !f.journal.has(int(at)) && f.wants(int(at))
				if at = f.same[at]; at == uint32(pos) {
					break
				}
			}
			return !want || yield(pos)
		}
		if f.o.Order != nil {
			for pos := range f.o.Order {
				if !next(pos) {
					return
				}
			}
		}
		for pos := range f.x.Len() {
			if !next(pos) {
				return
			}
		}
	}
}

var errFound = errors.New("found")

// wants reports whether a file of the root's own has a part in chunk pos, as
// far as it is known yet what is mounted.
func (f *filler) wants(pos int) bool {
	c, err := f.x.At(pos)
	if err != nil {
		return false
	}
	made := false
	select {
	case <-f.dirsMade:
		made = true
	default:
	}
	err = f.pieces(c, func(p piece) error {
		if made && f.dirTable[f.home(p.file).dir].skipped {
			return nil
		}
		return errFound
	})
	return err != nil
}

// fetchBatch fetches the chunks at positions and writes them.
func (f *filler) fetchBatch(ctx context.Context, watch *watch, positions []int) error {
	cs := make([]index.Chunk, len(positions))
	for i, pos := range positions {
		c, err := f.x.At(pos)
		if err != nil {
			return err
		}
		cs[i] = c
	}
	arrived := make([]bool, len(positions))
	var failed error // of what was done with a chunk
	err := f.o.Fetcher.FetchBatch(ctx, cs, func(i int, plain []byte) error {
		watch.arrived()
		defer watch.written()
		if arrived[i] {
			return nil
		}
		arrived[i] = true
		failed = f.take(ctx, positions[i], cs[i], plain)
		return failed
	})
	if failed != nil {
		return failed
	}
	if err == nil {
		return nil
	}
	for i, ok := range arrived {
		if !ok {
			return f.missing(positions[i], err)
		}
	}
	return err
}

// take writes one chunk when the directories stand, and notes that. Each chunk
// is noted at once: a note costs less than the least of files, and a batch may
// take as long as somebody has patience for before he kills the container.
func (f *filler) take(ctx context.Context, pos int, c index.Chunk, plain []byte) error {
	select {
	case <-f.dirsMade:
	case <-ctx.Done():
		return ctx.Err()
	}
	if len(plain) != c.Size {
		return fmt.Errorf("chunk %s: got %d bytes, want %d", c.ID, len(plain), c.Size)
	}
	if err := f.put(pos, plain); err != nil {
		return err
	}
	return f.journal.add(uint32(pos), f.same)
}

// missing is err, why the chunk at pos was not to be had, with the name of the
// first file that wants it.
func (f *filler) missing(pos int, err error) error {
	c, failed := f.x.At(pos)
	if failed != nil {
		return err
	}
	path := ""
	_ = f.pieces(c, func(p piece) error {
		path = f.path(f.regular[p.file])
		return errFound
	})
	return fmt.Errorf("%s: %w", path, err)
}

// watch ends a context when no chunk has arrived for long. The time that
// writing takes is not the stores'.
type watch struct {
	patience time.Duration
	cancel   context.CancelCauseFunc

	mu      sync.Mutex // guards what follows
	timer   *time.Timer
	writing int
}

// forEver is longer than any container waits.
const forEver = 1<<63 - 1

func (f *filler) watch(ctx context.Context) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{patience: f.o.Patience, cancel: cancel}
	if w.patience < 0 {
		w.patience = forEver
	}
	w.timer = time.AfterFunc(w.patience, func() {
		cancel(fmt.Errorf("no chunk has arrived for %v: %w", w.patience, context.DeadlineExceeded))
	})
	return ctx, w
}

func (w *watch) arrived() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writing++
	w.timer.Stop()
}

func (w *watch) written() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.writing--; w.writing == 0 {
		w.timer.Reset(w.patience)
	}
}

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// progress counts bytes of files.
type progress struct {
	fn      func(done, total int64)
	done    atomic.Int64
	resumed int64
	total   int64
	flush   chan struct{} // gets one now and then when done grows
}

func (p *progress) init(plan *plan, j *journal, fn func(done, total int64)) {
	p.fn, p.flush = fn, make(chan struct{}, 1)
	for i := range plan.x.Len() {
		c, err := plan.x.At(i)
		if err != nil {
			continue
		}
		_ = plan.pieces(c, func(q piece) error {
			p.total += int64(q.size)
			if j.complete || j.has(i) {
				p.resumed += int64(q.size)
			}
			return nil
		})
	}
	p.done.Store(p.resumed)
	if fn != nil {
		fn(p.resumed, p.total)
	}
}

func (p *progress) add(n int64) {
	done := p.done.Add(n)
	if done/flushBytes != (done-n)/flushBytes {
		select {
		case p.flush <- struct{}{}:
		default:
		}
	}
	if p.fn != nil {
		p.fn(done, p.total)
	}
}
