package nodecache

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Version is the format of a cache as this package writes it: the layout of the
// chunks, the hidden files, and what their times and locks mean.
const Version = 1

// markerName is the file that names the format, as JSON. A directory without it
// is a casync store, of which version 1 can make use.
const markerName = ".bootfs-cache"

// tempPrefix starts the name of a file that is being written, here as among the
// chunks.
const tempPrefix = ".tmp-"

// maxMarker bounds the marker, in bytes.
const maxMarker = 4 << 10

type marker struct {
	Version int `json:"version"`
}

// VersionError says that a cache is in a format that this package does not know.
type VersionError struct {
	Dir     string
	Version int    // what the marker says; 0 if it cannot be read
	Reason  string // the same in words
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("node cache %s: %s, this version of bootfs knows format %d: the cache is left alone; bootfs-convert cache repair makes room for a new one",
		e.Dir, e.Reason, Version)
}

// checkMarker reports whether the cache has a marker, and a *VersionError if
// that is another than ours.
func (c *Cache) checkMarker() (bool, error) {
	f, err := c.open(markerName, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	unknown := func(format string, a ...any) (bool, error) {
		return false, &VersionError{Dir: c.String(), Reason: fmt.Sprintf(format, a...)}
	}
	if err != nil {
		return unknown("its marker cannot be read (%v)", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxMarker+1))
	if err != nil {
		return unknown("its marker cannot be read (%v)", err)
	}
	if len(raw) > maxMarker {
		return unknown("its marker %s is not understood (it has more than %d bytes)", markerName, maxMarker)
	}
	var m marker
	if err := json.Unmarshal(raw, &m); err != nil {
		return unknown("its marker %s is not understood (%v)", markerName, err)
	}
	if m.Version < 1 {
		return unknown("its marker %s names no format", markerName)
	}
	if m.Version != Version {
		return false, &VersionError{Dir: c.String(), Version: m.Version, Reason: fmt.Sprintf("it is in format %d", m.Version)}
	}
	return true, nil
}

// writeMarker marks the cache as one of our format, unless it is marked.
func (c *Cache) writeMarker() error {
	raw, err := json.Marshal(marker{Version})
	if err != nil {
		return err
	}
	temp := tempPrefix + rand.Text()
	f, err := c.open(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	if err == nil {
		// After a power cut, a marker without content would say that the format is
		// not known.
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	at := int(c.dir.Fd())
	if err == nil {
		// A newer version may have marked the cache as its own meanwhile.
		err = unix.Renameat2(at, temp, at, markerName, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
			err = unix.Renameat(at, temp, at, markerName)
		}
	}
	if err != nil {
		unix.Unlinkat(at, temp, 0)
	}
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
