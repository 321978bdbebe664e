package httpio

import (
	"context"
	"sync/atomic"
)

// Shared is what all requests of a store show to a server: a login, say. When
// it is refused, all running requests come to renew it, and one does for all.
type Shared[T any] struct {
	held   atomic.Pointer[T]
	asking chan struct{} // a lock around renewals, which a waiter can leave
}

// NewShared returns a Shared that holds first, which may be nil.
func NewShared[T any](first *T) *Shared[T] {
	s := &Shared[T]{asking: make(chan struct{}, 1)}
	s.held.Store(first)
	return s
}

// Load returns what is held.
func (s *Shared[T]) Load() *T { return s.held.Load() }

// Renew replaces old by what ask returns, unless another request has done so
// already, and returns what is held then. An ask that does not know of ctx, as
// a credential helper, is left to finish alone when ctx ends.
func (s *Shared[T]) Renew(ctx context.Context, old *T, ask func(context.Context) (*T, error)) (*T, error) {
	select {
	case s.asking <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if now := s.held.Load(); now != old {
		<-s.asking
		return now, nil
	}
	type result struct {
		v   *T
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-s.asking }()
		v, err := ask(ctx)
		if err == nil {
			s.held.Store(v)
		}
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
