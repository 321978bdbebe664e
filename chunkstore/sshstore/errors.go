package sshstore

import (
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/pkg/sftp"

	"github.com/container-bootfs/bootfs/chunkstore"
)

func (s *Store) fail(did string, err error) error {
	return &chunkstore.Error{Store: s.String(), Did: did, Err: err, Retry: heals(err)}
}

// heals reports whether the same may succeed a little later, with nothing
// changed by anybody: not with a key that is refused, for one.
func heals(err error) bool {
	var p permanentError
	var status *sftp.StatusError
	switch {
	case errors.As(err, &p), errors.Is(err, fs.ErrPermission):
		return false
	case errors.As(err, &status):
		return status.FxCode() != sftp.ErrSSHFxOpUnsupported
	}
	return true
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
