package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

// Exit codes. exitHelp lists them for --help.
const (
	exitOK          = 0
	exitDifferent   = 1
	exitUsage       = 2
	exitSource      = 3
	exitDestination = 4
	exitSpace       = 5
	exitChunk       = 6
	exitFailed      = 7
	exitInterrupted = 130
)

const exitHelp = `Exit codes:
  0    done
  1    check: the converted root differs from its source;
       verify, cache check: chunks are missing or damaged
  2    the command line cannot be followed
  3    the image, index or file that is to be read cannot be
  4    the destination or the store cannot be written; it is what it was
  5    too little temporary space; see --tmp-dir
  6    a chunk is missing or damaged
  7    anything else
  130  interrupted
`

// usageError is a command line that cannot be followed.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, a ...any) error { return usageError{fmt.Errorf(format, a...)} }

// errDifferent ends a check that has listed what differs.
var errDifferent = errors.New("the converted root differs from its source")

// errDamaged ends a verify that has listed what is missing or damaged.
var errDamaged = errors.New("chunks are missing or damaged")

// errMissing ends a preload that has listed which chunks it could not get.
var errMissing = errors.New("chunks are missing")

// explain is the one place that turns an error into an exit code and a line
// for a person, which is empty when everything has been said.
func explain(ctx context.Context, err error) (code int, line string) {
	line = strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "\n", "; ")), " ")
	if ctx.Err() != nil {
		return exitInterrupted, "interrupted"
	}
	var (
		part    *convert.Error
		corrupt *chunkstore.CorruptError
		usage   usageError
	)
	switch {
	case errors.Is(err, errDifferent), errors.Is(err, errDamaged):
		return exitDifferent, ""
	case errors.As(err, &usage):
		return exitUsage, line
	case errors.Is(err, scratch.ErrNoSpace):
		return exitSpace, line + " (name another directory with --tmp-dir)"
	case errors.As(err, &part) && part.Part == convert.Usage:
		return exitUsage, line
	case errors.As(err, &part) && part.Part == convert.Source:
		return exitSource, line
	case errors.As(err, &part) && part.Part == convert.Destination:
		return exitDestination, line
	case errors.As(err, &corrupt), errors.Is(err, chunkstore.ErrNotFound), errors.Is(err, errMissing):
		return exitChunk, line
	}
	return exitFailed, line
}
