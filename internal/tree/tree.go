// Package tree is the model of a root filesystem between its layers and its
// root image: inodes, directory entries and where the bytes of files lie.
package tree

import (
	"io"

	"golang.org/x/sys/unix"
)

// Tree is one merged root filesystem.
type Tree struct {
	Root *Inode // a directory, never nil
}

// Inode is one file of any type. Hard links are several entries that point to
// one Inode.
type Inode struct {
	Mode      uint32 // st_mode: the S_IFMT type and the twelve permission bits
	UID, GID  uint32
	Nlink     uint32 // entries that point here; 2 + subdirectories for a directory
	MtimeSec  int64  // seconds since 1970, negative before
	MtimeNsec uint32 // 0 … 999999999
	Rdev      uint64 // unix.Mkdev of a device, else 0
	Size      int64  // logical length of a regular file in bytes, else 0

	Target  string            // of a symlink
	Xattrs  []Xattr           // sorted by Name, names unique, never trusted.overlay.*
	Content Content           // of a regular file
	Entries map[string]*Inode // of a directory: name → inode, without . and ..
}

// IsDir reports whether n is a directory.
func (n *Inode) IsDir() bool { return n.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsRegular reports whether n is a regular file.
func (n *Inode) IsRegular() bool { return n.Mode&unix.S_IFMT == unix.S_IFREG }

// IsSymlink reports whether n is a symbolic link.
func (n *Inode) IsSymlink() bool { return n.Mode&unix.S_IFMT == unix.S_IFLNK }

// Xattr is one extended attribute, with its full name ("security.capability").
type Xattr struct {
	Name  string
	Value []byte
}

// Content says where the bytes of a regular file lie.
type Content struct {
	Source  io.ReaderAt // of Extents' Physical offsets; nil if there are none
	Extents []Extent    // sorted by Logical, not overlapping, within Inode.Size

	// Layer and Entry name the file's place in the source image: entry number
	// Entry of layer number Layer, the lowest being 0. The bytes of the layer
	// decide about the file's, so a cache can know it by the two. They are 0 in
	// a tree that was not merged of layers.
	Layer, Entry int32
}

// Extent is a run of a file's bytes. What no extent covers is a hole of zeros.
type Extent struct {
	Logical  int64 // offset in the file, bytes
	Physical int64 // offset in Content.Source, bytes
	Length   int64 // bytes, > 0
}
