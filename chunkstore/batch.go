package chunkstore

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/container-bootfs/bootfs/index"
)

// GetEach is the GetBatch of a store that reads chunks one by one, up to n at a
// time. What is under way when one fails is still delivered.
func GetEach(ctx context.Context, s Store, n int, ids []index.ID, yield func(i int, frame []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	type result struct {
		i     int
		frame *[]byte
		err   error
	}
	var (
		next    atomic.Int64
		failed  atomic.Bool
		workers sync.WaitGroup
		results = make(chan result)
	)
	for range min(len(ids), n) {
		workers.Go(func() {
			for !failed.Load() {
				i := int(next.Add(1)) - 1
				if i >= len(ids) {
					return
				}
				r := result{i: i, frame: buffers.Get().(*[]byte)}
				*r.frame, r.err = s.Get(ctx, ids[i], (*r.frame)[:0])
				if r.err != nil {
					failed.Store(true)
				}
				results <- r
			}
		})
	}
	go func() {
		workers.Wait()
		cancel()
		close(results)
	}()
	var first, abort error
	for r := range results {
		switch {
		case abort != nil:
		case r.err != nil:
			if first == nil {
				first = r.err
			}
		default:
			if abort = yield(r.i, *r.frame); abort != nil {
				failed.Store(true)
				cancel()
			}
		}
		buffers.Put(r.frame)
	}
	if abort != nil {
		return abort
	}
	return first
}
