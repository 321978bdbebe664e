package sshstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/pkg/sftp"
)

// Error says what could not be done with a store.
type Error struct {
	Store string // its address
	Did   string // "read chunk …"
	Err   error
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s: %v", e.Store, e.Did, e.Err) }

func (e *Error) Unwrap() error { return e.Err }

// Temporary reports whether the same may succeed a little later, with nothing
// changed by anybody: not with a key that is refused, for one.
func (e *Error) Temporary() bool {
	var p permanentError
	var status *sftp.StatusError
	switch {
	case errors.As(e.Err, &p), errors.Is(e.Err, fs.ErrPermission):
		return false
	case errors.As(e.Err, &status):
		return status.FxCode() != sftp.ErrSSHFxOpUnsupported
	}
	return true
}

// RetryAfter returns 0: an SSH server does not say.
func (e *Error) RetryAfter() time.Duration { return 0 }

func (s *Store) fail(did string, err error) error {
	return &Error{Store: s.String(), Did: did, Err: err}
}

// permanentError is one that does not heal by itself.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

func permanent(err error) error { return permanentError{err} }

var (
	errLost   = errors.New("the connection was lost")
	errClosed = permanent(errors.New("the store was closed"))
)

// isLost tells an operation's error that comes from the end of the connection,
// or of a part of it that a new connection brings back.
func isLost(err error) bool {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	return errors.Is(err, errLost) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, sftp.ErrSSHFxConnectionLost)
}
