package httpio

import (
	"context"
	"time"
)

// Slots bounds the requests to one server that run at once; it is made with
// the number of them.
type Slots chan struct{}

// Acquire waits for the turn of a request. The context that it returns ends
// with ctx, and with [ErrStalled] when watch sees less than [MinProgress] bytes
// in limit. Release, which must be called, ends the turn and the context. After
// an error, that of ctx, only the context is valid, and is ctx.
func (s Slots) Acquire(ctx context.Context, limit time.Duration) (turn context.Context, watch *Watch, release func(), err error) {
	if ctx.Err() != nil {
		return ctx, nil, nil, context.Cause(ctx)
	}
	select {
	case s <- struct{}{}:
	case <-ctx.Done():
		return ctx, nil, nil, context.Cause(ctx)
	}
	turn, cancel := context.WithCancelCause(ctx)
	watch = NewWatch(limit, cancel)
	return turn, watch, func() {
		watch.Stop()
		cancel(nil)
		<-s
	}, nil
}
