package converted

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Verification is what stores have of an index's chunks.
type Verification struct {
	Chunks      int              `json:"chunks"` // distinct ones of the index
	Good        int              `json:"good"`   // of Chunks, those that a store has undamaged
	PlainBytes  int64            `json:"plainBytes"`
	StoredBytes int64            `json:"storedBytes"` // that were fetched
	Stores      []VerifiedStore  `json:"stores"`
	Faults      []VerifiedDamage `json:"faults"`
}

// VerifiedStore is what one store had of the chunks that those before it had
// not.
type VerifiedStore struct {
	Store       string `json:"store"`
	Chunks      int    `json:"chunks"`      // good
	StoredBytes int64  `json:"storedBytes"` // of Chunks
	Missing     int    `json:"missing"`
	Corrupt     int    `json:"corrupt"`
	Error       string `json:"error,omitempty"` // why it was given up
}

// VerifiedDamage is a chunk that is damaged in a store or in none.
type VerifiedDamage struct {
	Chunk  string `json:"chunk"`
	Offset int64  `json:"offset"` // in the root image, bytes, where the chunk comes first
	Size   int    `json:"size"`   // plain bytes
	Reason string `json:"reason"` // "missing" or "corrupt"
	Where  string `json:"where,omitempty"`
}

// Distinct returns the chunks of x, each once, in the order in which they lie
// in the packs that l locates, or in that of x if l is nil.
func Distinct(x *index.Index, l *registrystore.Locators) ([]index.Chunk, error) {
	type placed struct {
		c  index.Chunk
		at registrystore.Location
	}
	seen := make(map[index.ID]bool, x.Len())
	var list []placed
	for i := range x.Len() {
		c, err := x.At(i)
		if err != nil {
			return nil, err
		}
		if seen[c.ID] {
			continue
		}
		seen[c.ID] = true
		p := placed{c: c}
		if l != nil {
			if p.at, err = l.At(i); err != nil {
				return nil, err
			}
		}
		list = append(list, p)
	}
	slices.SortStableFunc(list, func(a, b placed) int {
		return cmp.Or(cmp.Compare(a.at.Pack, b.at.Pack), cmp.Compare(a.at.Offset, b.at.Offset))
	})
	out := make([]index.Chunk, len(list))
	for i, p := range list {
		out[i] = p.c
	}
	return out, nil
}

// Verify fetches the chunks cs, which are named by d, from the first store and
// what that has not from the next, and so on. What is missing or damaged is in
// the result; an error is that it cannot be known, as a store does not answer.
func Verify(ctx context.Context, d index.Digest, cs []index.Chunk, stores []chunkstore.Store, progress func(int64)) (*Verification, error) {
	v := &Verification{Chunks: len(cs), Faults: []VerifiedDamage{}}
	corrupt := make(map[index.ID]bool)
	var down error
	open := cs
	for _, s := range stores {
		if len(open) == 0 {
			break
		}
		r, err := verifyStore(ctx, d, open, s, progress)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		have := VerifiedStore{Store: s.String(), Chunks: len(open) - len(r.missing) - len(r.corrupt) - len(r.unknown),
			StoredBytes: r.stored, Missing: len(r.missing), Corrupt: len(r.corrupt)}
		if err != nil {
			have.Error, down = err.Error(), errors.Join(down, err)
		}
		v.Stores = append(v.Stores, have)
		v.Good += have.Chunks
		v.StoredBytes += r.stored
		v.PlainBytes += r.plain
		open = append(r.missing, r.unknown...)
		for _, damaged := range r.corrupt {
			corrupt[damaged.chunk.ID] = true
			v.Faults = append(v.Faults, fault(damaged.chunk, "corrupt", damaged.where))
			open = append(open, damaged.chunk)
		}
	}
	for _, c := range open {
		if !corrupt[c.ID] {
			if down != nil {
				return nil, fmt.Errorf("%d chunks cannot be verified: %w", len(open), down)
			}
			v.Faults = append(v.Faults, fault(c, "missing", ""))
		}
	}
	slices.SortStableFunc(v.Faults, func(a, b VerifiedDamage) int { return cmp.Compare(a.Offset, b.Offset) })
	return v, nil
}

func fault(c index.Chunk, reason, where string) VerifiedDamage {
	return VerifiedDamage{Chunk: c.ID.String(), Offset: c.Offset, Size: c.Size, Reason: reason, Where: where}
}

// verified is what verifyStore found, good chunks apart.
type verified struct {
	missing, unknown []index.Chunk
	corrupt          []damaged
	stored, plain    int64 // bytes of the good ones
}

type damaged struct {
	chunk index.Chunk
	where string
}

// verifyStore fetches cs from s. It gives up, and returns why, when s does not
// say whether it has a chunk.
func verifyStore(ctx context.Context, d index.Digest, cs []index.Chunk, s chunkstore.Store, progress func(int64)) (*verified, error) {
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: d, Stores: []chunkstore.Store{s}})
	defer f.Close()
	r := &verified{}
	var mu sync.Mutex // guards r
	var g errgroup.Group
	g.SetLimit(batchesAtOnce)
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	for batch := range slices.Chunk(cs, batchChunks) {
		g.Go(func() error {
			batchCtx, cancel := context.WithTimeout(ctx, batchTimeout)
			defer cancel()
			done := make([]bool, len(batch))
			var plainBytes int64
			err := f.FetchBatch(batchCtx, batch, func(i int, plain []byte) error {
				done[i] = true
				plainBytes += int64(len(plain))
				progress(int64(len(plain)))
				return nil
			})
			failed := chunkstore.Failed(err)
			mu.Lock()
			defer mu.Unlock()
			r.plain += plainBytes
			var unanswered error
			err = cmp.Or(err, ctx.Err())
			for i, c := range batch {
				var bad *chunkstore.CorruptError
				switch why := failed[c.ID]; {
				case done[i]:
				case errors.As(why, &bad):
					r.corrupt = append(r.corrupt, damaged{c, bad.Where + ", got " + bad.Got})
					progress(int64(c.Size))
				case errors.Is(why, chunkstore.ErrNotFound):
					r.missing = append(r.missing, c)
					progress(int64(c.Size))
				default:
					r.unknown = append(r.unknown, c)
					unanswered = cmp.Or(why, err)
				}
			}
			if unanswered != nil {
				giveUp()
			}
			return unanswered
		})
	}
	err := g.Wait()
	r.stored = f.Stats().Stores[0].Stored
	return r, err
}
