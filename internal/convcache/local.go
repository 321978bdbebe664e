package convcache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Dir is a directory of records, a file for each. Several images and several
// conversions at once may share it. A record's time is that of its latest use,
// so that old ones can be told.
type Dir string

func (d Dir) String() string { return string(d) }

// Get reads a record.
func (d Dir) Get(_ context.Context, name string) ([]byte, error) {
	path := filepath.Join(string(d), name)
	// The directory may be shared: neither a FIFO nor a symbolic link in the
	// place of a record is followed.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case info.Size() > MaxSealed:
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", info.Size(), MaxSealed)
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, err
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // a directory that is only read keeps its times
	return b, nil
}

// Put writes the records that are not there as they are. A reader sees a record
// whole or not at all; one that a power cut damages is written anew.
func (d Dir) Put(ctx context.Context, records map[string][]byte) error {
	if err := os.MkdirAll(string(d), 0o777); err != nil {
		return err
	}
	d.sweep()
	for name, b := range records {
		if old, err := d.Get(ctx, name); err == nil && string(old) == string(b) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.write(name, b); err != nil {
			return err
		}
	}
	return nil
}

// A file in the making is called temporary and some digits. One that is older
// than staleAfter is of a conversion that was killed.
const (
	temporary  = ".tmp-"
	staleAfter = time.Hour
)

// sweep removes what killed conversions left.
func (d Dir) sweep() {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return // writing will say why
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), temporary) {
			continue
		}
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > staleAfter {
			_ = os.Remove(filepath.Join(string(d), e.Name()))
		}
	}
}

func (d Dir) write(name string, b []byte) error {
	f, err := os.CreateTemp(string(d), temporary+"*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if errClose := f.Close(); err == nil {
		err = errClose
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(string(d), name))
	}
	if err != nil {
		_ = os.Remove(f.Name()) // err tells more
	}
	return err
}
