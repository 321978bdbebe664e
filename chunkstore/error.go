package chunkstore

import (
	"errors"
	"fmt"
	"time"
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
