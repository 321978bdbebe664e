// Package erofs writes and reads the metadata of a root image: an
// uncompressed EROFS whose superblock, inodes, directories, xattrs and
// symlinks form one front region, with the blocks of regular files behind it.
//
// To write one, give a tree to [NewLayout], place the data of [Layout.Files]
// behind [Layout.MetaSize], and let [Layout.Encode] make the front region. The
// same tree gives the same bytes, and any kernel with EROFS mounts them.
//
// To serve one, open the front region with [NewReader]. It is stateless: a
// node id is the inode's place, a lookup is a binary search in the bytes, and
// nothing is parsed before it is asked for. The bytes may be hostile: the
// Reader answers with an error, never with a panic, a loop or bytes from
// outside, and directories cannot form a cycle.
package erofs

import (
	"fmt"
	"hash/crc32"
	"strings"

	"golang.org/x/sys/unix"
)

// BlockSize is the unit of addresses in a root image, in bytes.
const BlockSize = 4096

// Limits of what is written.
const (
	MaxImageBlocks = 1<<32 - 1 // block addresses are 32 bits wide, and all ones means a hole
	MaxFileSize    = 1 << 50   // bytes; bounds a sparse file's chunk table to 4 MiB
	MaxMetaSize    = 1 << 30   // bytes; about ten million inodes
	maxNameLen     = 255
	maxTargetLen   = 4095  // of a symlink, as PATH_MAX has it
	maxValueLen    = 65535 // of an xattr: a 16-bit field
	minHole        = 1 << 20
)

// The superblock: 128 bytes at superOffset. The rest of its block is zero up
// to the first inode.
const (
	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2

	sbMagic    = superOffset + 0
	sbChecksum = superOffset + 4
	sbCompat   = superOffset + 8
	sbBlkBits  = superOffset + 12
	sbRootNID  = superOffset + 14
	sbInodes   = superOffset + 16
	sbBlocks   = superOffset + 36
	sbMetaBlk  = superOffset + 40
	sbUUID     = superOffset + 48
	sbIncompat = superOffset + 80
	sbDirBits  = superOffset + 90

	blkBits = 12

	compatChecksum  = 1
	compatMtime     = 2
	incompatChunked = 4 // chunk-based files occur
)

// An inode: 64 bytes at nid × inodeSlot, with its xattrs and then its inline
// tail or chunk table directly behind.
const (
	inodeSlot = 32
	inodeSize = 64

	inFormat   = 0 // layout << 1 | 1 for the 64-byte form
	inXattrs   = 2 // 0, or 1 + 4-byte units behind the xattr header
	inMode     = 4
	inSize     = 8
	inUnion    = 16 // first block, device number or chunk format
	inUID      = 24
	inGID      = 28
	inMtime    = 32
	inMtimeNs  = 40
	inNlink    = 44
	inUnionLen = 4

	formatExtended = 1

	layoutPlain  = 0 // all in blocks
	layoutInline = 2 // whole blocks, then the tail behind the inode
	layoutChunks = 4 // a table of block addresses behind the inode

	chunkEntrySize = 4
	chunkBitsMask  = 31 // of the chunk format: log2 of blocks per chunk
	holeBlock      = 1<<32 - 1
)

// Xattrs: a header, then entries padded to xattrAlign.
const (
	xattrHeaderSize = 12
	xattrShared     = 4 // offset of the count of shared xattrs in the header
	xattrEntrySize  = 4 // name length u8, prefix u8, value length u16
	xattrAlign      = 4
)

// A directory is a row of blocks, each with its entries first and the names
// behind them.
const (
	direntSize    = 12
	deNID         = 0
	deNameOff     = 8
	deType        = 10
	direntsPerBlk = BlockSize / direntSize
)

// xattrPrefixes are the parts of xattr names that stand as a number in an
// entry. A whole prefix is a name of its own.
var xattrPrefixes = [...]struct {
	index  uint8
	prefix string
	whole  bool
}{
	{1, "user.", false},
	{2, "system.posix_acl_access", true},
	{3, "system.posix_acl_default", true},
	{4, "trusted.", false},
	{6, "security.", false},
}

// splitXattr returns the number and the rest of an xattr's name.
func splitXattr(name string) (index uint8, suffix string, ok bool) {
	for _, p := range &xattrPrefixes {
		rest, found := strings.CutPrefix(name, p.prefix)
		if found && p.whole == (rest == "") {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// xattrPrefix is the inverse of splitXattr.
func xattrPrefix(index uint8) (prefix string, whole, ok bool) {
	for _, p := range &xattrPrefixes {
		if p.index == index {
			return p.prefix, p.whole, true
		}
	}
	return "", false, false
}

// direntTypes maps a directory entry's type to the d_type of readdir(3), which
// is the S_IFMT bits of a mode shifted by 12.
var direntTypes = [...]uint8{
	1: unix.DT_REG,
	2: unix.DT_DIR,
	3: unix.DT_CHR,
	4: unix.DT_BLK,
	5: unix.DT_FIFO,
	6: unix.DT_SOCK,
	7: unix.DT_LNK,
}

// direntType is the inverse of direntTypes; 0 for a mode without a file type.
func direntType(mode uint32) uint8 {
	for i, t := range direntTypes {
		if t != 0 && uint32(t) == mode&unix.S_IFMT>>12 {
			return uint8(i)
		}
	}
	return 0
}

// typeName names the type of mode for messages.
func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "regular file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "device"
	case unix.S_IFIFO:
		return "FIFO"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("mode %#o without a file type", mode)
}

// superChecksum is the checksum of a superblock's block. The field itself
// counts as zero.
func superChecksum(block []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	var zero [4]byte
	sum := crc32.Update(0, table, block[superOffset:sbChecksum])
	sum = crc32.Update(sum, table, zero[:])
	return ^crc32.Update(sum, table, block[sbCompat:BlockSize])
}

// alignUp rounds n up to a multiple of unit, a power of two.
func alignUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }
