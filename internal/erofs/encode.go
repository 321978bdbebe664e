package erofs

import (
	"crypto/sha256"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
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
	le.PutUint16(meta[sbRootNID:], uint16(l.nodes[0].nid))
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

// encodeInode writes inode i with what stands behind it and in its blocks. The
// field for the inode's own number stays zero: readers take the nid, and a
// number in each would cost 3 of 19 bytes per inode once compressed.
func (l *Layout) encodeInode(meta []byte, i int, start []uint32) {
	n := &l.nodes[i]
	size := l.size(n)
	b := meta[int64(n.nid)*inodeSlot:]
	le.PutUint16(b[inFormat:], n.layout<<1|formatExtended)
	le.PutUint16(b[inMode:], uint16(n.inode.Mode))
	le.PutUint64(b[inSize:], uint64(size))
	le.PutUint32(b[inUID:], n.inode.UID)
	le.PutUint32(b[inGID:], n.inode.GID)
	le.PutUint64(b[inMtime:], uint64(n.inode.MtimeSec))
	le.PutUint32(b[inMtimeNs:], n.inode.MtimeNsec)
	le.PutUint32(b[inNlink:], n.links)

	tail := b[inodeSize:]
	if xattrs := xattrSize(n.inode); xattrs > 0 {
		le.PutUint16(b[inXattrs:], uint16((xattrs-xattrHeaderSize)/xattrAlign+1))
		encodeXattrs(tail, n.inode)
		tail = tail[xattrs:]
	}
	union := b[inUnion : inUnion+inUnionLen]
	switch n.inode.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		le.PutUint32(union, uint32(n.inode.Rdev))
	case unix.S_IFREG:
		switch {
		case n.layout == layoutChunks:
			le.PutUint32(union, uint32(chunkShift(size)))
			encodeChunks(tail, n.inode, start[i])
		case size > 0:
			le.PutUint32(union, start[i])
		}
	case unix.S_IFLNK:
		if n.layout == layoutPlain {
			le.PutUint32(union, n.block)
			tail = meta[int64(n.block)*BlockSize:]
		}
		copy(tail, n.inode.Target)
	case unix.S_IFDIR:
		if n.layout == layoutPlain || size >= BlockSize {
			le.PutUint32(union, n.block)
		}
		l.encodeDir(meta, n, tail)
	}
}

func encodeXattrs(b []byte, n *tree.Inode) {
	le.PutUint32(b, 1<<32-1) // the name filter: not in use
	b = b[xattrHeaderSize:]
	for _, x := range n.Xattrs {
		index, suffix, _ := splitXattr(x.Name)
		b[0], b[1] = uint8(len(suffix)), index
		le.PutUint16(b[2:], uint16(len(x.Value)))
		copy(b[xattrEntrySize:], suffix)
		copy(b[xattrEntrySize+len(suffix):], x.Value)
		b = b[alignUp(int64(xattrEntrySize+len(suffix)+len(x.Value)), xattrAlign):]
	}
}

// encodeChunks writes the table of sparse file n, whose blocks begin at block.
func encodeChunks(table []byte, n *tree.Inode, block uint32) {
	chunk := chunkSize(n.Size)
	for k := range chunks(n.Size) {
		le.PutUint32(table[k*chunkEntrySize:], holeBlock)
	}
	for _, s := range Segments(n) {
		for off := s.Offset; off < s.Offset+s.Size; off += chunk {
			le.PutUint32(table[off/chunk*chunkEntrySize:], block)
			block += uint32(alignUp(min(chunk, n.Size-off), BlockSize) / BlockSize)
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

// encodeDir writes the entries of directory n: whole blocks to its blocks, and
// the last part to tail if it is inline.
func (l *Layout) encodeDir(meta []byte, n *node, tail []byte) {
	rest := l.entries(n)
	for block := int64(n.block); len(rest) > 0; block++ {
		count, used := 0, 0
		for count < len(rest) && used+direntSize+len(rest[count].name) <= BlockSize {
			used += direntSize + len(rest[count].name)
			count++
		}
		b := tail
		if n.layout == layoutPlain || count < len(rest) {
			b = meta[block*BlockSize:]
		}
		nameOff := count * direntSize
		for j, e := range rest[:count] {
			to := &l.nodes[e.node]
			de := b[j*direntSize:]
			le.PutUint64(de[deNID:], uint64(to.nid))
			le.PutUint16(de[deNameOff:], uint16(nameOff))
			de[deType] = direntType(to.inode.Mode)
			copy(b[nameOff:], e.name)
			nameOff += len(e.name)
		}
		rest = rest[count:]
	}
}
