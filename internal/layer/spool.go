package layer

import (
	"bufio"
	"fmt"
	"os"

	"github.com/container-bootfs/bootfs/internal/scratch"
)

// spool holds the bytes of a layer's files behind one another in a file
// without a name, so that a kill at any moment leaves nothing.
type spool struct {
	f   *os.File
	w   *bufio.Writer
	off int64 // bytes written
}

func newSpool(dir string) (*spool, error) {
	f, err := scratch.File(dir)
	if err != nil {
		return nil, fmt.Errorf("temporary file: %w", err)
	}
	return &spool{f: f, w: bufio.NewWriterSize(f, 256<<10)}, nil
}

func (s *spool) write(p []byte) error {
	n, err := s.w.Write(p)
	s.off += int64(n)
	if err != nil {
		return fmt.Errorf("temporary file: %w", err)
	}
	return nil
}

func (s *spool) flush() error {
	if err := s.w.Flush(); err != nil {
		return fmt.Errorf("temporary file: %w", err)
	}
	return nil
}
