package erofs

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotExist is returned by Lookup for a name that the directory lacks. It
// is never wrapped, so that a failing lookup costs no allocation.
var ErrNotExist = errors.New("no such entry")

// Reader reads the front region of a root image. It keeps no state and is safe
// for concurrent use.
type Reader struct {
	meta   []byte
	root   uint64
	inodes uint64
	blocks int64
}

// Inode is an inode as it stands in the front region.
type Inode struct {
	NID       uint64 // names the inode; the kernel's own EROFS shows it as st_ino
	Mode      uint32 // st_mode
	UID, GID  uint32
	Rdev      uint64 // unix.Mkdev of a device, else 0
	Size      int64  // bytes
	Nlink     uint32
	MtimeSec  int64
	MtimeNsec uint32 // 0 … 999999999

	layout    uint8
	union     uint32 // first block or chunk format
	xattrSize int64  // bytes behind the inode
}

// IsDir reports whether n is a directory.
func (n Inode) IsDir() bool { return n.Mode&unix.S_IFMT == unix.S_IFDIR }

// NewReader opens meta, the front region of a root image, and keeps it. It
// looks at the superblock and the root inode only.
func NewReader(meta []byte) (*Reader, error) {
	if len(meta) < BlockSize {
		return nil, fmt.Errorf("erofs: metadata of %d bytes, want at least %d", len(meta), BlockSize)
	}
	if got := le.Uint32(meta[sbMagic:]); got != superMagic {
		return nil, fmt.Errorf("erofs: superblock: magic %#x, want %#x", got, uint32(superMagic))
	}
	if got, want := superChecksum(meta), le.Uint32(meta[sbChecksum:]); got != want {
		return nil, fmt.Errorf("erofs: superblock: checksum %#x, want %#x", got, want)
	}
	if meta[sbBlkBits] != blkBits || meta[sbDirBits] != 0 {
		return nil, fmt.Errorf("erofs: superblock: blocks of 2^%d and directory blocks of 2^(%[1]d+%d) bytes, want 2^%d", meta[sbBlkBits], meta[sbDirBits], blkBits)
	}
	if got := le.Uint32(meta[sbIncompat:]); got&^uint32(incompatChunked) != 0 {
		return nil, fmt.Errorf("erofs: superblock: incompatible features %#x, want at most %#x", got, incompatChunked)
	}
	if got := le.Uint32(meta[sbMetaBlk:]); got != 0 {
		return nil, fmt.Errorf("erofs: superblock: metadata from block %d, want 0", got)
	}
	r := &Reader{
		meta:   meta,
		root:   uint64(le.Uint16(meta[sbRootNID:])),
		inodes: le.Uint64(meta[sbInodes:]),
		blocks: int64(le.Uint32(meta[sbBlocks:])),
	}
	root, err := r.Inode(r.root)
	if err != nil {
		return nil, err
	}
	if !root.IsDir() {
		return nil, fmt.Errorf("erofs: root inode %d: %s, want a directory", r.root, typeName(root.Mode))
	}
	return r, nil
}

// RootNID is the nid of the root directory.
func (r *Reader) RootNID() uint64 { return r.root }

// Inodes is the number of inodes, as the superblock has it.
func (r *Reader) Inodes() uint64 { return r.inodes }

// Blocks is the length of the root image in blocks of BlockSize.
func (r *Reader) Blocks() int64 { return r.blocks }

// bytes returns n bytes of the front region from off.
func (r *Reader) bytes(off, n int64) ([]byte, bool) {
	if off < 0 || n < 0 || off > int64(len(r.meta)) || n > int64(len(r.meta))-off {
		return nil, false
	}
	return r.meta[off : off+n : off+n], true
}

func corrupt(nid uint64, format string, args ...any) error {
	return fmt.Errorf("erofs: inode %d: "+format, append([]any{nid}, args...)...)
}

// inodeBytes returns the 64 bytes of inode nid.
func (r *Reader) inodeBytes(nid uint64) ([]byte, bool) {
	off := nid * inodeSlot
	if nid < (superOffset+superSize)/inodeSlot || nid > uint64(len(r.meta))/inodeSlot || off%BlockSize > BlockSize-inodeSize {
		return nil, false
	}
	return r.bytes(int64(off), inodeSize)
}

// Inode returns inode nid. Everything that stands behind it or in its blocks
// is checked when it is read.
func (r *Reader) Inode(nid uint64) (Inode, error) {
	b, ok := r.inodeBytes(nid)
	if !ok {
		return Inode{}, corrupt(nid, "not a place in metadata of %d bytes", len(r.meta))
	}
	format := le.Uint16(b[inFormat:])
	n := Inode{
		NID:       nid,
		Mode:      uint32(le.Uint16(b[inMode:])),
		UID:       le.Uint32(b[inUID:]),
		GID:       le.Uint32(b[inGID:]),
		Size:      int64(le.Uint64(b[inSize:])),
		Nlink:     le.Uint32(b[inNlink:]),
		MtimeSec:  int64(le.Uint64(b[inMtime:])),
		MtimeNsec: le.Uint32(b[inMtimeNs:]),
		layout:    uint8(format >> 1),
		union:     le.Uint32(b[inUnion:]),
	}
	if count := int64(le.Uint16(b[inXattrs:])); count > 0 {
		n.xattrSize = xattrHeaderSize + (count-1)*xattrAlign
	}
	if n.Size < 0 || n.Size > MaxFileSize {
		return Inode{}, corrupt(nid, "size %d bytes, at most %d", n.Size, int64(MaxFileSize))
	}
	if n.MtimeNsec > 999999999 {
		return Inode{}, corrupt(nid, "mtime has %d nanoseconds", n.MtimeNsec)
	}
	valid := false
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		valid = n.layout == layoutPlain || n.layout == layoutChunks
	case unix.S_IFDIR:
		valid = n.layout == layoutPlain || n.layout == layoutInline
	case unix.S_IFLNK:
		valid = (n.layout == layoutPlain || n.layout == layoutInline) && n.Size > 0 && n.Size <= maxTargetLen
	case unix.S_IFCHR, unix.S_IFBLK:
		valid = n.layout == layoutPlain
		n.Rdev = uint64(n.union)
	case unix.S_IFIFO, unix.S_IFSOCK:
		valid = n.layout == layoutPlain
	}
	if format&formatExtended == 0 || format>>1 > layoutChunks || !valid {
		return Inode{}, corrupt(nid, "%s of %d bytes in format %#x", typeName(n.Mode), n.Size, format)
	}
	return n, nil
}

// tail returns the size bytes behind n and its xattrs.
func (r *Reader) tail(n Inode, size int64) ([]byte, bool) {
	return r.bytes(int64(n.NID)*inodeSlot+inodeSize+n.xattrSize, size)
}

// block returns part k of a directory or symlink: a block, or less at the end.
func (r *Reader) block(n Inode, k int64) ([]byte, error) {
	size := min(BlockSize, n.Size-k*BlockSize)
	var b []byte
	var ok bool
	if n.layout == layoutInline && size < BlockSize {
		b, ok = r.tail(n, size)
	} else {
		b, ok = r.bytes((int64(n.union)+k)*BlockSize, size)
	}
	if !ok {
		return nil, corrupt(n.NID, "part %d of its %d bytes lies outside the metadata", k, n.Size)
	}
	return b, nil
}

// dirBlock is a part of a directory whose first entry was found sound.
type dirBlock struct {
	b     []byte
	count int
}

func (r *Reader) dirBlock(n Inode, k int64) (dirBlock, error) {
	b, err := r.block(n, k)
	if err != nil {
		return dirBlock{}, err
	}
	if len(b) < direntSize {
		return dirBlock{}, corrupt(n.NID, "directory part %d of %d bytes holds no entry", k, len(b))
	}
	first := int(le.Uint16(b[deNameOff:]))
	if first < direntSize || first%direntSize != 0 || first >= len(b) {
		return dirBlock{}, corrupt(n.NID, "directory part %d: first name at %d of %d bytes", k, first, len(b))
	}
	return dirBlock{b, first / direntSize}, nil
}

// name returns the name of entry i, nil if it is not sound.
func (d dirBlock) name(i int) []byte {
	start := int(le.Uint16(d.b[i*direntSize+deNameOff:]))
	if i+1 < d.count {
		end := int(le.Uint16(d.b[(i+1)*direntSize+deNameOff:]))
		if start < d.count*direntSize || end <= start || end-start > maxNameLen || end > len(d.b) {
			return nil
		}
		return d.b[start:end:end]
	}
	if start < d.count*direntSize || start >= len(d.b) {
		return nil
	}
	// The last name ends with the block, or at the first zero.
	name := d.b[start:]
	if end := bytes.IndexByte(name, 0); end >= 0 {
		name = name[:end:end]
	}
	if len(name) == 0 || len(name) > maxNameLen {
		return nil
	}
	return name
}

// target returns where entry i of directory n points and the d_type of what
// stands there. A subdirectory must lie behind its parent, as the writer has
// it: no walk can then run in a circle.
func (r *Reader) target(n Inode, d dirBlock, i int, name []byte) (nid uint64, typ uint8, err error) {
	de := d.b[i*direntSize:]
	nid = le.Uint64(de[deNID:])
	inode, ok := r.inodeBytes(nid)
	if !ok {
		return 0, 0, corrupt(n.NID, "entry %q: inode %d is not a place in the metadata", name, nid)
	}
	typ = uint8(le.Uint16(inode[inMode:]) >> 12)
	if t := de[deType]; int(t) >= len(direntTypes) || direntTypes[t] != typ || typ == 0 {
		return 0, 0, corrupt(n.NID, "entry %q: type %d, but inode %d has d_type %d", name, t, nid, typ)
	}
	if typ == unix.DT_DIR && nid <= n.NID && string(name) != "." && string(name) != ".." {
		return 0, 0, corrupt(n.NID, "entry %q: points back to directory %d", name, nid)
	}
	return nid, typ, nil
}

// dirBlocks checks that n is a directory and returns the number of its parts.
func (r *Reader) dirBlocks(n Inode) (int64, error) {
	if !n.IsDir() {
		return 0, corrupt(n.NID, "%s, want a directory", typeName(n.Mode))
	}
	if n.Size > int64(len(r.meta)) {
		return 0, corrupt(n.NID, "directory of %d bytes in metadata of %d", n.Size, len(r.meta))
	}
	return (n.Size + BlockSize - 1) / BlockSize, nil
}

// Lookup returns the nid of directory dir's entry name, or ErrNotExist. It
// does not allocate.
func (r *Reader) Lookup(dir Inode, name string) (uint64, error) {
	blocks, err := r.dirBlocks(dir)
	if err != nil {
		return 0, err
	}
	// The part to look in is the last that begins at or before the name.
	lo, hi := int64(0), blocks
	var part dirBlock
	for lo < hi {
		mid := int64(uint64(lo+hi) / 2)
		d, err := r.dirBlock(dir, mid)
		if err != nil {
			return 0, err
		}
		first := d.name(0)
		if first == nil {
			return 0, corrupt(dir.NID, "directory part %d: entry 0 has no sound name", mid)
		}
		if string(first) <= name {
			lo, part = mid+1, d
		} else {
			hi = mid
		}
	}
	for i, j := 0, part.count; i < j; {
		mid := (i + j) / 2
		got := part.name(mid)
		switch {
		case got == nil:
			return 0, corrupt(dir.NID, "directory part %d: entry %d has no sound name", lo-1, mid)
		case string(got) == name:
			nid, _, err := r.target(dir, part, mid, got)
			return nid, err
		case string(got) < name:
			i = mid + 1
		default:
			j = mid
		}
	}
	return 0, ErrNotExist
}

// ReadDir calls fn for each entry of dir from cookie pos on, . and .. included,
// in the order of their names; 0 is the first entry, and next the cookie of the
// one behind. typ is the d_type of readdir(3): typ<<12 are the S_IFMT bits.
// name is valid as long as the metadata. ReadDir ends when fn returns false,
// and does not allocate.
func (r *Reader) ReadDir(dir Inode, pos uint64, fn func(name []byte, nid uint64, typ uint8, next uint64) bool) error {
	blocks, err := r.dirBlocks(dir)
	if err != nil {
		return err
	}
	// A cookie is the part of the directory and the entry in it.
	const entryBits = 9
	const _ = uint(1<<entryBits - 1 - direntsPerBlk)
	i := int(pos & (1<<entryBits - 1))
	for k := int64(pos >> entryBits); k < blocks; k++ {
		d, err := r.dirBlock(dir, k)
		if err != nil {
			return err
		}
		for ; i < d.count; i++ {
			name := d.name(i)
			if name == nil || bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0 {
				return corrupt(dir.NID, "directory part %d: entry %d has no sound name", k, i)
			}
			nid, typ, err := r.target(dir, d, i, name)
			if err != nil {
				return err
			}
			if !fn(name, nid, typ, uint64(k)<<entryBits+uint64(i)+1) {
				return nil
			}
		}
		i = 0
	}
	return nil
}

// Readlink returns the target of symlink n. The bytes are the metadata's own.
func (r *Reader) Readlink(n Inode) ([]byte, error) {
	if n.Mode&unix.S_IFMT != unix.S_IFLNK {
		return nil, corrupt(n.NID, "%s, want a symlink", typeName(n.Mode))
	}
	return r.block(n, 0)
}

// eachXattr calls fn for each xattr of n until it returns false.
func (r *Reader) eachXattr(n Inode, fn func(index uint8, suffix, value []byte) bool) error {
	if n.xattrSize == 0 {
		return nil
	}
	b, ok := r.bytes(int64(n.NID)*inodeSlot+inodeSize, n.xattrSize)
	if !ok {
		return corrupt(n.NID, "%d bytes of xattrs lie outside the metadata", n.xattrSize)
	}
	if b[xattrShared] != 0 {
		return corrupt(n.NID, "%d shared xattrs, want none", b[xattrShared])
	}
	for b = b[xattrHeaderSize:]; len(b) > 0; {
		suffixLen, size := int(b[0]), int(le.Uint16(b[2:]))
		end := xattrEntrySize + suffixLen + size
		if end > len(b) {
			return corrupt(n.NID, "xattr of %d bytes in a rest of %d", end, len(b))
		}
		if !fn(b[1], b[xattrEntrySize:xattrEntrySize+suffixLen], b[xattrEntrySize+suffixLen:end:end]) {
			return nil
		}
		b = b[alignUp(int64(end), xattrAlign):]
	}
	return nil
}

// Xattr returns the value of n's xattr name, and whether there is one. The
// value is the metadata's own bytes. It does not allocate.
func (r *Reader) Xattr(n Inode, name string) (value []byte, ok bool, err error) {
	index, suffix, known := splitXattr(name)
	if !known {
		return nil, false, nil
	}
	err = r.eachXattr(n, func(i uint8, s, v []byte) bool {
		if i == index && string(s) == suffix {
			value, ok = v, true
		}
		return !ok
	})
	return value, ok, err
}

// Xattrs calls fn for each xattr of n until it returns false. value is the
// metadata's own bytes.
func (r *Reader) Xattrs(n Inode, fn func(name string, value []byte) bool) error {
	var bad error
	err := r.eachXattr(n, func(index uint8, suffix, value []byte) bool {
		prefix, whole, ok := xattrPrefix(index)
		if !ok || whole != (len(suffix) == 0) {
			bad = corrupt(n.NID, "xattr %q with name prefix %d", suffix, index)
			return false
		}
		return fn(prefix+string(suffix), value)
	})
	if bad != nil {
		return bad
	}
	return err
}

// Span says where the bytes of regular file n from off on lie: length bytes,
// at least one and at most to the file's end, stand at image in the root
// image, or are a hole if image is -1.
func (r *Reader) Span(n Inode, off int64) (image, length int64, err error) {
	if n.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, 0, corrupt(n.NID, "%s, want a regular file", typeName(n.Mode))
	}
	if off < 0 || off >= n.Size {
		return 0, 0, corrupt(n.NID, "offset %d in a file of %d bytes", off, n.Size)
	}
	if n.layout == layoutPlain {
		image, length = int64(n.union)*BlockSize+off, n.Size-off
	} else {
		image, length, err = r.chunkSpan(n, off)
	}
	if err != nil || image < 0 {
		return image, length, err
	}
	if end := r.blocks * BlockSize; image > end || length > end-image {
		return 0, 0, corrupt(n.NID, "%d bytes at %d lie outside the image of %d", length, image, end)
	}
	return image, length, nil
}

// chunkSpan is Span for a sparse file. Chunks that follow one another make one
// span, up to maxJoin of them, so that a call stays cheap in a huge file.
func (r *Reader) chunkSpan(n Inode, off int64) (image, length int64, err error) {
	const maxJoin = 64
	shift := n.union & chunkBitsMask
	if n.union&^uint32(chunkBitsMask) != 0 {
		return 0, 0, corrupt(n.NID, "chunk format %#x, want block addresses", n.union)
	}
	chunk := int64(BlockSize) << shift
	first := off / chunk
	last := min((n.Size-1)/chunk, first+maxJoin-1)
	table, ok := r.tail(n, (last+1)*chunkEntrySize)
	if !ok {
		return 0, 0, corrupt(n.NID, "chunk %d lies outside the metadata", last)
	}
	block := le.Uint32(table[first*chunkEntrySize:])
	next := first + 1
	for want := uint64(block); next <= last; next++ {
		if block != holeBlock {
			want += 1 << shift
		}
		if uint64(le.Uint32(table[next*chunkEntrySize:])) != want {
			break
		}
	}
	length = min((next-first)*chunk-off%chunk, n.Size-off)
	if block == holeBlock {
		return -1, length, nil
	}
	return int64(block)*BlockSize + off%chunk, length, nil
}
