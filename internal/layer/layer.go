// Package layer turns the layers of a source image into one tree.
//
// [Read] takes one layer as a registry, an archive or an engine keeps it
// (gzip, zstd or plain), checks its content against the image's
// configuration, keeps the bytes of its files in an unlinked temporary file
// and lists its entries. [Merge] lays the layers over one another as Docker's
// engine does: whiteouts, opaque directories, links. The resulting tree is
// that of the running container, and its files stay readable until the layers
// are closed.
//
// A layer is hostile input: names, sizes, maps and links are checked before
// they are used, what they make us keep is counted against [Limits], and
// nothing is ever written under a name that a layer chose.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// Blob is one layer of the source as the transport found it.
type Blob struct {
	Name   string // for messages: the digest
	DiffID string // "sha256:…" of the plain tar, checked; "" = unknown
	// Digest and MediaType are those of the blob in the source's manifest; ""
	// where there is none.
	Digest, MediaType string
	Size              int64 // of the blob as stored, bytes; -1 = unknown
	Open              func(ctx context.Context) (io.ReadCloser, error)

	// Plain is the blob when it already is a plain tar in a local file: read
	// in place, not spooled. nil otherwise. It must stay readable and
	// unchanged until the Layer is closed.
	Plain io.ReaderAt
}

// Options say how a layer is read. The zero value is usable.
type Options struct {
	TempDir  string             // of the spool; "" = os.TempDir()
	Progress func(stored int64) // called with the count of further stored bytes read, from another goroutine; nil = nobody asks
	Limits   Limits
}

// Limits bound what one layer may make us keep or do. A zero field means the
// default, which is above what engines are seen to run.
type Limits struct {
	Entries  int   // files of all types, implied directories included; default 4,000,000
	Metadata int64 // names, link targets, extended attributes and extents, in bytes; default 512 MiB
	Bytes    int64 // of the plain tar; default 1 TiB
}

func (l Limits) withDefaults() Limits {
	if l.Entries == 0 {
		l.Entries = 4_000_000
	}
	if l.Metadata == 0 {
		l.Metadata = 512 << 20
	}
	if l.Bytes == 0 {
		l.Bytes = 1 << 40
	}
	return l
}

// Layer is what one layer holds: its entries in the order of the tar, and the
// bytes of its files.
type Layer struct {
	name    string
	entries [][]entry // in pieces of entriesPiece, which Merge gives up one by one
	count   int       // of all entries
	limits  Limits
	spool   *os.File // nil when the files lie in Blob.Plain
	merged  bool
}

// entriesPiece is how many entries are allocated together. One slice for all
// would need its memory more than twice whenever it grows.
const entriesPiece = 1024

func (l *Layer) add(e entry) {
	if l.count%entriesPiece == 0 {
		l.entries = append(l.entries, make([]entry, 0, min(entriesPiece, 16+l.count)))
	}
	last := &l.entries[len(l.entries)-1]
	*last = append(*last, e)
	l.count++
}

// Close gives up the bytes of the layer's files, and with them those of the
// tree that it was merged into.
func (l *Layer) Close() error {
	if l.spool == nil {
		return nil
	}
	return l.spool.Close()
}

// Read reads a layer to its end. When it fails, nothing is left behind.
func Read(ctx context.Context, b Blob, o Options) (*Layer, error) {
	l, err := read(ctx, b, o)
	if err != nil {
		if l != nil {
			_ = l.Close() // err tells more
		}
		return nil, fmt.Errorf("layer %s: %w", b.Name, err)
	}
	return l, nil
}

// read returns the layer also with an error, for Close.
func read(ctx context.Context, b Blob, o Options) (*Layer, error) {
	l := &Layer{name: b.Name, limits: o.Limits.withDefaults()}
	plain, err := openPlain(ctx, b, l.limits.Bytes, o.Progress)
	if err != nil {
		return l, err
	}
	defer plain.Close()
	lister := lister{layer: l, tar: scanner{r: plain}}
	if b.Plain != nil {
		lister.source = b.Plain
	} else {
		sp, err := newSpool(o.TempDir)
		if err != nil {
			return l, err
		}
		l.spool = sp.f
		lister.source, lister.spool = sp.f, sp
	}
	if err := lister.list(); err != nil {
		return l, err
	}
	// What follows the end of the archive belongs to the DiffID as well.
	_, err = io.Copy(io.Discard, lister.tar.r)
	return l, err
}

// lister makes the entries of a layer from the headers of its tar.
type lister struct {
	layer  *Layer
	tar    scanner
	source io.ReaderAt // of the extents: the spool's file or Blob.Plain
	spool  *spool      // nil when the files are read in place

	metadata int64        // bytes counted against Limits.Metadata
	dir      string       // of the latest entry: neighbours share the string
	window   []byte       // for files that are searched for zeros
	inodes   []tree.Inode // the next ones
}

// inodesPiece is how many inodes are allocated together: one piece fills what
// the allocator has for it, and the collector has one thing to look at.
const inodesPiece = 56

func (l *lister) newInode() *tree.Inode {
	if len(l.inodes) == 0 {
		l.inodes = make([]tree.Inode, inodesPiece)
	}
	n := &l.inodes[0]
	l.inodes = l.inodes[1:]
	return n
}

func (l *lister) list() error {
	for {
		h, err := l.tar.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("tar header before byte %d: %w", l.tar.off, noEOF(err))
		}
		if h.typ == typeGlobal {
			continue
		}
		if l.layer.count >= l.layer.limits.Entries {
			return fmt.Errorf("has more than %d entries: refused", l.layer.limits.Entries)
		}
		e, err := l.entry(h)
		if err != nil {
			return fmt.Errorf("%.300q: %w", h.name, noEOF(err))
		}
		if e.kind != skipped {
			l.layer.add(e)
		}
	}
	if l.spool != nil {
		return l.spool.flush()
	}
	return nil
}

// charge counts n bytes of metadata that are going to be kept.
func (l *lister) charge(n int) error {
	if l.metadata += int64(n); l.metadata > l.layer.limits.Metadata {
		return fmt.Errorf("its layer's names, attributes and sparse maps take more than %d bytes: refused", l.layer.limits.Metadata)
	}
	return nil
}

// noEOF makes of the end of the data in the midst of something an error that
// no caller takes for success.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// zeroWindow is the piece, in bytes, by which large files are searched for
// zeros, and zeroBlock the granularity of the holes that are made of them.
// Engines write a sparse file out in full when they pack a layer; a lastlog of
// 1 TiB must not become 1 TiB of spool.
const (
	zeroWindow = 64 << 10
	zeroBlock  = 4 << 10
	zeroSearch = 1 << 20 // files from this size on are searched
)

// content reads the bytes of the file h, which come next in the tar, and says
// where they stay. The extents depend on the bytes and on h alone, never on
// how the bytes arrived: they decide about the layout of the root image.
func (l *lister) content(h *header) (tree.Content, error) {
	segments := h.sparse
	if !h.isSparse {
		segments = []segment{{0, h.size}}
	}
	var extents []tree.Extent
	add := func(logical int64, p []byte, n int64) error {
		e := tree.Extent{Logical: logical, Physical: l.tar.off - n, Length: n}
		if l.spool != nil {
			e.Physical = l.spool.off
			if err := l.spool.write(p); err != nil {
				return err
			}
		}
		if i := len(extents) - 1; i >= 0 {
			last := &extents[i]
			if last.Logical+last.Length == e.Logical && last.Physical+last.Length == e.Physical {
				last.Length += n
				return nil
			}
		}
		extents = append(extents, e)
		return l.charge(24)
	}
	for _, s := range segments {
		for end := s.off + s.length; s.off < end; {
			if h.size < zeroSearch {
				p, err := l.tar.peek(end - s.off)
				if err != nil {
					return tree.Content{}, err
				}
				l.tar.advance(len(p))
				if err := add(s.off, p, int64(len(p))); err != nil {
					return tree.Content{}, err
				}
				s.off += int64(len(p))
				continue
			}
			if l.window == nil {
				l.window = make([]byte, zeroWindow)
			}
			p, err := l.tar.full(l.window[:min(end-s.off, zeroWindow-s.off%zeroWindow)])
			if err != nil {
				return tree.Content{}, err
			}
			from, to := trimZeros(p)
			if from < to {
				// add takes the bytes to end where the tar stands.
				l.tar.off -= int64(len(p) - to)
				err := add(s.off+int64(from), p[from:to], int64(to-from))
				l.tar.off += int64(len(p) - to)
				if err != nil {
					return tree.Content{}, err
				}
			}
			s.off += int64(len(p))
		}
	}
	if len(extents) == 0 {
		return tree.Content{}, nil
	}
	return tree.Content{Source: l.source, Extents: extents}, nil
}

var zeros [zeroBlock]byte

// trimZeros returns the part of p without the whole blocks of zeros at its
// ends; 0, 0 if p is all zeros.
func trimZeros(p []byte) (from, to int) {
	for to = len(p); to > 0; {
		n := (to-1)%zeroBlock + 1
		if string(p[to-n:to]) != string(zeros[:n]) {
			break
		}
		to -= n
	}
	for from < to {
		n := min(zeroBlock, to-from)
		if string(p[from:from+n]) != string(zeros[:n]) {
			break
		}
		from += n
	}
	return from, to
}
