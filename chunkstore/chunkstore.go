// Package chunkstore defines where chunks are kept and how they are read.
//
// A [Store] holds chunks under their IDs, each in its stored form: one zstd
// frame, the content of a casync .cacnk file. (casync's stores may hold other
// forms, which are read.) Stores move stored bytes and
// promise nothing about them; [Decode] turns them into plain bytes and is the
// only place that trusts, by comparing them with the chunk's name. A
// [Fetcher] puts a cache and stores behind one another and hands out only
// verified bytes.
package chunkstore

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// ErrNotFound is wrapped by a Store's error when the store answers and does
// not have the chunk. It decides that the next store is asked without a retry.
var ErrNotFound = errors.New("chunk not found")

// ErrFull is wrapped by Put's error when a store holds as much as it may.
var ErrFull = errors.New("store is full")

// MaxStored bounds the stored form of a chunk, in bytes. A Store refuses more
// before it allocates.
const MaxStored = 16 << 20

// Store reads chunks. It is safe for concurrent use.
type Store interface {
	// Get appends the stored form of chunk id to dst and returns the extended
	// slice. The bytes are unverified. A failure is never remembered: the same
	// call succeeds once the cause has healed. An error with the methods
	// Temporary() bool and RetryAfter() time.Duration says whether another
	// attempt can help, and after which pause.
	Get(ctx context.Context, id index.ID, dst []byte) ([]byte, error)
	// Has reports whether Get would find the chunk.
	Has(ctx context.Context, id index.ID) (bool, error)
	// String names the store for messages, without credentials.
	String() string
}

// Writer is a Store that takes chunks one at a time.
type Writer interface {
	Store
	// Put stores frame, the stored form of chunk id. Once it returns, the chunk
	// survives a power cut, unless the store is a Flusher; until then a reader
	// sees all of it or none.
	Put(ctx context.Context, id index.ID, frame []byte) error
}

// Flusher is implemented by Writers for caches, in which a chunk can be read, by
// everybody, before its bytes are on disk.
type Flusher interface {
	// Flush returns when the bytes of all chunks are on disk whose Put has
	// returned. A power cut may then take a chunk, but leaves no damaged one. Those
	// that Flush did not come to, as ctx ended, wait for the next call.
	Flush(ctx context.Context) error
}

// Batcher is implemented by stores that read several chunks at less cost than
// one by one.
type Batcher interface {
	// GetBatch calls yield with the stored form of each of ids, in any order;
	// i is the place in ids and frame is valid until yield returns. Calls of
	// yield do not overlap. It stops at the first error, its own or yield's.
	GetBatch(ctx context.Context, ids []index.ID, yield func(i int, frame []byte) error) error
}

// Entry is a chunk as a store holds it.
type Entry struct {
	ID       index.ID
	Size     int64     // stored bytes
	Modified time.Time // when it was last written; some stores know whole seconds only
}

// Lister is implemented by stores that can enumerate what they hold.
type Lister interface {
	// List yields every chunk in the store, in any order. It stops after the
	// first error. What is written or removed meanwhile may be missing or there.
	List(ctx context.Context) iter.Seq2[Entry, error]
}

// Remover is implemented by stores that chunks can be removed from.
type Remover interface {
	// Remove removes chunk id. That it is not there is no error. A reader that
	// is under way gets the whole chunk or ErrNotFound.
	Remove(ctx context.Context, id index.ID) error
}

// Expirer is implemented by stores in which a chunk can be made young again,
// and removed unless it was. So a writer that finds its chunk there, and a
// collector that has found it unused, do not fall between one another: either
// the writer's Touch keeps the chunk, or it is told that there is none.
type Expirer interface {
	// Touch makes chunk id as young as one that is written now. The error wraps
	// ErrNotFound when it is not there, or may be about to go.
	Touch(ctx context.Context, id index.ID) error
	// Expire removes chunk id if it was last modified before then, and reports
	// whether it did. That it is not there is no error.
	Expire(ctx context.Context, id index.ID, then time.Time) (bool, error)
}

// Sweeper is implemented by stores in which a writer that is killed leaves
// files that are no chunks.
type Sweeper interface {
	// Sweep removes such files if they were last modified before then, and
	// returns how many and how many bytes these are. With dry it removes none.
	Sweep(ctx context.Context, then time.Time, dry bool) (files int, bytes int64, err error)
}
