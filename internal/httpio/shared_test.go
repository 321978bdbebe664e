package httpio

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// TestShared: of many requests whose login was refused one asks for another.
func TestShared(t *testing.T) {
	one, two := "one", "two"
	s := NewShared(&one)
	asked := 0
	ask := func(context.Context) (*string, error) { asked++; return &two, nil }
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got, err := s.Renew(t.Context(), &one, ask); got != &two || err != nil {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	wg.Wait()
	if asked != 1 || s.Load() != &two {
		t.Errorf("asked %d times, %v is held", asked, *s.Load())
	}
	failed := errors.New("no")
	if _, err := s.Renew(t.Context(), &two, func(context.Context) (*string, error) { return nil, failed }); err != failed || s.Load() != &two {
		t.Errorf("a failure: got %v, %v is held", err, *s.Load())
	}
}

// TestSharedLeaves: who waits for an answer that does not come can leave.
func TestSharedLeaves(t *testing.T) {
	s := NewShared[string](nil)
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan struct{})
	late := "late"
	ask := func(context.Context) (*string, error) { cancel(); <-answer; return &late, nil }
	for range 2 { // who asks, and who waits for him
		if _, err := s.Renew(ctx, nil, ask); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	close(answer)
	if got, err := s.Renew(t.Context(), nil, ask); err != nil || got != &late {
		t.Errorf("afterwards: got %v, %v", got, err)
	}
}
