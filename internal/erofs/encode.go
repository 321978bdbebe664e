package erofs

import (
	"crypto/sha256"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

var le = binary.LittleEndian

// Encode returns the front region of a root image of blocks blocks. For each
// of Files, start holds the first of its blocks at the file's number.
func (l *Layout) Encode(start []uint32, blocks uint32) []byte {
	meta := make([]byte, l.metaSize)
	for i := range l.nodes {
		l.encodeInode(meta, i, start)
	}

	sb := meta[superOffset:]
	le.PutUint32(meta[sbMagic:], superMagic)
	le.PutUint32(meta[sbCompat:], compatChecksum|compatMtime)
	meta[sbBlkBits] = blkBits
	le.PutUint16(meta[sbRootNID:], uint16(l.nid(0)))
	le.PutUint64(meta[sbInodes:], uint64(len(l.nodes)))
	le.PutUint32(meta[sbBlocks:], blocks)
	if l.sparse {
		le.PutUint32(meta[sbIncompat:], incompatChunked)
	}
	// The UUID is a name for these bytes, so it is made of them: a random one
	// would make every conversion differ. Version 8 marks such a UUID.
	sum := sha256.Sum256(sb)
	uuid := meta[sbUUID : sbUUID+16]
	copy(uuid, sum[:])
	uuid[6] = uuid[6]&0x0f | 0x80
	uuid[8] = uuid[8]&0x3f | 0x80
	le.PutUint32(meta[sbChecksum:], superChecksum(meta))
	return meta
}

func (l *Layout) nid(i int) uint64 { return uint64(l.nodes[i].offset) / inodeSlot }

// encodeInode writes inode i with what stands behind it and in its blocks.
func (l *Layout) encodeInode(meta []byte, i int, start []uint32) {
	n := &l.nodes[i]
	b := meta[n.offset:]
	le.PutUint16(b[inFormat:], n.layout<<1|formatExtended)
	le.PutUint16(b[inMode:], uint16(n.inode.Mode))
	le.PutUint64(b[inSize:], uint64(n.size))
	le.PutUint32(b[inUID:], n.inode.UID)
	le.PutUint32(b[inGID:], n.inode.GID)
	le.PutUint64(b[inMtime:], uint64(n.inode.MtimeSec))
	le.PutUint32(b[inMtimeNs:], n.inode.MtimeNsec)
	le.PutUint32(b[inNlink:], n.links)

	tail := b[inodeSize:]
	if size := xattrSize(n.inode); size > 0 {
		le.PutUint16(b[inXattrs:], uint16((size-xattrHeaderSize)/xattrAlign+1))
		n.encodeXattrs(tail)
		tail = tail[size:]
	}
	union := b[inUnion : inUnion+inUnionLen]
	switch n.inode.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		le.PutUint32(union, uint32(n.inode.Rdev))
	case unix.S_IFREG:
		switch {
		case n.layout == layoutChunks:
			le.PutUint32(union, uint32(chunkShift(n.size)))
			n.encodeChunks(tail, start[i])
		case n.size > 0:
			le.PutUint32(union, start[i])
		}
	case unix.S_IFLNK:
		if n.layout == layoutPlain {
			le.PutUint32(union, uint32(n.block))
			tail = meta[n.block*BlockSize:]
		}
		copy(tail, n.inode.Target)
	case unix.S_IFDIR:
		if n.layout == layoutPlain || n.size >= BlockSize {
			le.PutUint32(union, uint32(n.block))
		}
		l.encodeDir(meta, i, tail)
	}
}

func (n *node) encodeXattrs(b []byte) {
	le.PutUint32(b, 1<<32-1) // the name filter: not in use
	b = b[xattrHeaderSize:]
	for _, x := range n.inode.Xattrs {
		index, suffix, _ := splitXattr(x.Name)
		b[0], b[1] = uint8(len(suffix)), index
		le.PutUint16(b[2:], uint16(len(x.Value)))
		copy(b[xattrEntrySize:], suffix)
		copy(b[xattrEntrySize+len(suffix):], x.Value)
		b = b[alignUp(int64(xattrEntrySize+len(suffix)+len(x.Value)), xattrAlign):]
	}
}

// encodeChunks writes the table of a sparse file whose blocks begin at block.
func (n *node) encodeChunks(table []byte, block uint32) {
	chunk := chunkSize(n.size)
	for k := range chunks(n.size) {
		le.PutUint32(table[k*chunkEntrySize:], holeBlock)
	}
	for _, s := range Segments(n.inode) {
		for off := s.Offset; off < s.Offset+s.Size; off += chunk {
			le.PutUint32(table[off/chunk*chunkEntrySize:], block)
			block += uint32(alignUp(min(chunk, n.size-off), BlockSize) / BlockSize)
		}
	}
}

// chunkShift is log2 of the blocks per chunk of a sparse file of size bytes.
func chunkShift(size int64) int {
	shift := 0
	for BlockSize<<shift < chunkSize(size) {
		shift++
	}
	return shift
}

// encodeDir writes the entries of directory i: whole blocks to its blocks, and
// the last part to tail if it is inline.
func (l *Layout) encodeDir(meta []byte, i int, tail []byte) {
	n := &l.nodes[i]
	rest := n.dir
	for k := int64(0); len(rest) > 0; k++ {
		count, used := 0, 0
		for count < len(rest) && used+direntSize+len(rest[count].name) <= BlockSize {
			used += direntSize + len(rest[count].name)
			count++
		}
		b := tail
		if n.layout == layoutPlain || (k+1)*BlockSize <= n.size {
			b = meta[(n.block+k)*BlockSize:]
		}
		nameOff := count * direntSize
		for j, e := range rest[:count] {
			de := b[j*direntSize:]
			le.PutUint64(de[deNID:], l.nid(int(e.node)))
			le.PutUint16(de[deNameOff:], uint16(nameOff))
			de[deType] = direntType(l.nodes[e.node].inode.Mode)
			copy(b[nameOff:], e.name)
			nameOff += len(e.name)
		}
		rest = rest[count:]
	}
}
