package chunkstore

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/index"
)

// Error says what could not be done with a store, on one line.
type Error struct {
	Store  string // Store.String
	Did    string // "read chunk …", "list the chunks"
	Status int    // HTTP status that the failure stands for, 0 if none
	Err    error
	// Retry says that the same call may succeed a little later, with nothing
	// changed by anybody.
	Retry bool
	// After is how long the server asked to be left alone, 0 if it did not say.
	After time.Duration
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s: %v", e.Store, e.Did, e.Err) }

func (e *Error) Unwrap() error { return e.Err }

// Temporary returns Retry.
func (e *Error) Temporary() bool { return e.Retry }

// RetryAfter returns After.
func (e *Error) RetryAfter() time.Duration { return e.After }

// failure is why a store did not deliver a chunk, for a message that names the
// chunk.
type failure struct {
	store string
	err   error
}

func (f *failure) Error() string {
	var e *Error
	var corrupt *CorruptError
	switch {
	case errors.As(f.err, &corrupt):
		return f.store + ": " + corrupt.reason(f.store)
	case errors.As(f.err, &e):
		return f.store + ": " + e.Err.Error()
	}
	return f.store + ": " + f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// fetchError says why a chunk could not be had, store by store.
type fetchError struct {
	id       index.ID
	failures []error // nil where a store was not asked
}

func (e *fetchError) Error() string {
	var msgs []string
	for _, err := range e.failures {
		if err != nil {
			msgs = append(msgs, err.Error())
		}
	}
	if len(msgs) == 0 {
		msgs = []string{"no store to ask"}
	}
	return fmt.Sprintf("chunk %s: %s", e.id, strings.Join(msgs, "; "))
}

func (e *fetchError) Unwrap() []error {
	if len(e.failures) == 0 {
		return []error{ErrNotFound}
	}
	return slices.DeleteFunc(slices.Clone(e.failures), func(err error) bool { return err == nil })
}

// batchError is the errors of several chunks, on one line.
type batchError []error

func (e batchError) Error() string {
	return fmt.Sprintf("%v (and %d more chunks)", e[0], len(e)-1)
}

func (e batchError) Unwrap() []error { return e }

// Failed returns the chunks that an error of Fetch or FetchBatch is about, and
// why each could not be had.
func Failed(err error) map[index.ID]error {
	failed := make(map[index.ID]error)
	var all batchError
	if !errors.As(err, &all) {
		all = batchError{err}
	}
	for _, err := range all {
		var one *fetchError
		if errors.As(err, &one) {
			failed[one.id] = one
		}
	}
	return failed
}

func joinFailed(failed []error) error {
	switch len(failed) {
	case 0:
		return nil
	case 1:
		return failed[0]
	}
	return batchError(failed)
}
