package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// A record says what a layer lists, without the bytes of its files: one entry
// after the other, numbers as varints, strings behind their length. It begins
// with the count of the entries.
//
//	entry  kind, plus sameDir if dir is that of the entry before
//	       dir: bytes shared with the dir before, the rest   unless sameDir
//	       base                                               file, hardLink, whiteout
//	       link                                               hardLink, aufsInode
//	       inode                                              file, aufsInode
//	inode  mode, uid, gid, seconds (signed), nanoseconds
//	       size, count of extents, for each: the hole before it, length   regular
//	       target                                                         symlink
//	       rdev                                                           device
//	       count of xattrs, for each: name, value
const sameDir = 8

// Record returns the record of l, which must not have been merged.
func (l *Layer) Record() []byte {
	b := binary.AppendUvarint(nil, uint64(l.count))
	dir := ""
	for _, piece := range l.entries {
		for i := range piece {
			b = appendEntry(b, &piece[i], dir)
			dir = piece[i].dir
		}
	}
	return b
}

// File returns the regular file of entry number i, nil if it is none. The
// layer must not have been merged.
func (l *Layer) File(i int) *tree.Inode {
	if i < 0 || i >= l.count || l.merged {
		return nil
	}
	n := l.entries[i/entriesPiece][i%entriesPiece].node
	if n == nil || !n.IsRegular() {
		return nil
	}
	return n
}

// FromRecord makes of a record the layer that it is of. source returns what
// reads the bytes of a regular file at their offsets in the file; it is asked
// once for each that has bytes. Limits hold as for [Read], and a record that
// Read would not have led to is refused.
func FromRecord(name string, record []byte, limits Limits, source func(entry int, n *tree.Inode) io.ReaderAt) (*Layer, error) {
	l := &Layer{name: name, limits: limits.withDefaults()}
	d := decoder{lister: lister{layer: l}, rest: record}
	count := d.uint(uint64(l.limits.Entries))
	if count > uint64(len(d.rest)) {
		d.fail(io.ErrUnexpectedEOF)
	}
	for i := uint64(0); i < count && d.err == nil; i++ {
		e := d.entry()
		if d.err != nil {
			break
		}
		if n := e.node; n != nil && len(n.Content.Extents) > 0 {
			n.Content.Source = source(int(i), n)
		}
		l.add(e)
	}
	if d.err == nil && len(d.rest) > 0 {
		d.fail(fmt.Errorf("%d bytes behind the last entry", len(d.rest)))
	}
	if d.err != nil {
		return nil, fmt.Errorf("record of layer %s: entry %d: %w", name, l.count, d.err)
	}
	return l, nil
}

func appendString[T string | []byte](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendEntry(b []byte, e *entry, dir string) []byte {
	if e.dir == dir {
		b = append(b, byte(e.kind)|sameDir)
	} else {
		b = append(b, byte(e.kind))
		shared := 0
		for shared < min(len(dir), len(e.dir)) && dir[shared] == e.dir[shared] {
			shared++
		}
		b = binary.AppendUvarint(b, uint64(shared))
		b = appendString(b, e.dir[shared:])
	}
	switch e.kind {
	case file, hardLink, whiteout:
		b = appendString(b, e.base)
	}
	switch e.kind {
	case hardLink, aufsInode:
		b = appendString(b, e.link)
	}
	if e.node != nil {
		b = appendInode(b, e.node)
	}
	return b
}

func appendInode(b []byte, n *tree.Inode) []byte {
	b = binary.AppendUvarint(b, uint64(n.Mode))
	b = binary.AppendUvarint(b, uint64(n.UID))
	b = binary.AppendUvarint(b, uint64(n.GID))
	b = binary.AppendVarint(b, n.MtimeSec)
	b = binary.AppendUvarint(b, uint64(n.MtimeNsec))
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		b = binary.AppendUvarint(b, uint64(n.Size))
		b = binary.AppendUvarint(b, uint64(len(n.Content.Extents)))
		end := int64(0)
		for _, e := range n.Content.Extents {
			b = binary.AppendUvarint(b, uint64(e.Logical-end))
			b = binary.AppendUvarint(b, uint64(e.Length))
			end = e.Logical + e.Length
		}
	case unix.S_IFLNK:
		b = appendString(b, n.Target)
	case unix.S_IFCHR, unix.S_IFBLK:
		b = binary.AppendUvarint(b, n.Rdev)
	}
	b = binary.AppendUvarint(b, uint64(len(n.Xattrs)))
	for _, x := range n.Xattrs {
		b = appendString(b, x.Name)
		b = appendString(b, x.Value)
	}
	return b
}

// decoder reads a record. Its first error stays, and what it returns from then
// on means nothing. Nothing is allocated that the rest of the record is too
// short for.
type decoder struct {
	lister
	rest []byte
	last string // dir of the latest entry
	err  error
}

var errRecord = errors.New("no tar lists such an entry")

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = err
	}
	d.rest = nil
}

// check fails unless ok.
func (d *decoder) check(ok bool) {
	if !ok {
		d.fail(errRecord)
	}
}

func (d *decoder) uint(most uint64) uint64 {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 || v > most {
		d.fail(errRecord)
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.rest)
	if n <= 0 {
		d.fail(errRecord)
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

// bytes returns a string of the record, which it is a part of.
func (d *decoder) bytes(most int) []byte {
	n := int(d.uint(uint64(most)))
	if n > len(d.rest) {
		d.fail(io.ErrUnexpectedEOF)
		return nil
	}
	s := d.rest[:n]
	d.rest = d.rest[n:]
	return s
}

func (d *decoder) count(n int) {
	if err := d.charge(n); err != nil {
		d.fail(err)
	}
}

func (d *decoder) entry() entry {
	if len(d.rest) == 0 {
		d.fail(io.ErrUnexpectedEOF)
		return entry{}
	}
	e := entry{kind: kind(d.rest[0] &^ sameDir), dir: d.last}
	same := d.rest[0]&sameDir != 0
	d.rest = d.rest[1:]
	if !same {
		shared := d.uint(uint64(len(d.last)))
		e.dir = d.last[:shared] + string(d.bytes(maxPath))
		clean, err := cleanPath(e.dir)
		d.check(err == nil && clean == e.dir)
		d.count(len(e.dir))
		d.last = e.dir
	}
	switch e.kind {
	case file, hardLink, whiteout:
		e.base = string(d.bytes(maxName))
		d.check(e.base == "" && e.dir == "" && e.kind == file || isName(e.base, e.kind))
		clean, err := cleanPath(e.path())
		d.check(err == nil && clean == e.path())
		d.count(len(e.base))
	case opaque, aufsInode:
	default:
		d.fail(errRecord)
	}
	switch e.kind {
	case hardLink, aufsInode:
		e.link = string(d.bytes(maxPath))
		clean, err := cleanPath(e.link)
		d.check(err == nil && clean == e.link)
		d.count(len(e.link))
	}
	switch e.kind {
	case file, aufsInode:
		e.node = d.inode()
		switch {
		case d.err != nil:
		case e.kind == aufsInode:
			d.check(e.node.IsRegular() && strings.HasPrefix(e.link, aufsLinks))
		case e.path() == "":
			d.check(e.node.IsDir())
		}
	}
	return e
}

// isName reports whether a tar can have an entry of that name and kind in some
// directory.
func isName(s string, k kind) bool {
	return s != "" && s != "." && s != ".." && !strings.Contains(s, "/") && (k == whiteout || !strings.HasPrefix(s, whiteoutPrefix))
}

func (d *decoder) inode() *tree.Inode {
	n := d.newInode()
	*n = tree.Inode{
		Mode:      uint32(d.uint(unix.S_IFMT | 0o7777)),
		UID:       uint32(d.uint(math.MaxUint32 - 1)),
		GID:       uint32(d.uint(math.MaxUint32 - 1)),
		MtimeSec:  d.int(),
		MtimeNsec: uint32(d.uint(999_999_999)),
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Size = int64(d.uint(math.MaxInt64))
		d.extents(n)
	case unix.S_IFLNK:
		n.Target = string(d.bytes(maxPath))
		d.check(n.Mode == unix.S_IFLNK|0o777 && n.Target != "" && !strings.Contains(n.Target, "\x00"))
		d.count(len(n.Target))
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = d.uint(math.MaxUint64)
		major, minor := unix.Major(n.Rdev), unix.Minor(n.Rdev)
		d.check(major < 1<<12 && minor < 1<<20 && n.Rdev == unix.Mkdev(major, minor))
	case unix.S_IFDIR, unix.S_IFIFO:
	default:
		d.fail(errRecord)
	}
	var list []tree.Xattr
	for range d.uint(uint64(len(d.rest))) {
		name := string(d.bytes(maxName))
		value := slices.Clone(d.bytes(maxXattr))
		if d.err != nil {
			return n
		}
		d.check(len(list) == 0 || list[len(list)-1].Name < name)
		list = append(list, tree.Xattr{Name: name, Value: value})
	}
	if err := d.xattrs(n, list); err != nil {
		d.fail(err)
	}
	d.check(len(n.Xattrs) == len(list))
	return n
}

func (d *decoder) extents(n *tree.Inode) {
	count := d.uint(uint64(len(d.rest)) / 2)
	d.count(24 * int(count))
	if d.err != nil {
		return
	}
	at := int64(0)
	for range count {
		at += int64(d.uint(uint64(n.Size - at)))
		length := int64(d.uint(uint64(n.Size - at)))
		if d.check(length > 0); d.err != nil {
			return
		}
		n.Content.Extents = append(n.Content.Extents, tree.Extent{Logical: at, Physical: at, Length: length})
		at += length
	}
}
