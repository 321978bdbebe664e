package erofs

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// Verify reads every inode that can be reached from the root, with all that
// belongs to it, and checks what no single call can: that each directory has
// one name, and that inodes do not share bytes to pretend to more than the
// metadata holds. It costs a walk of the tree and a bit per 32 bytes of
// metadata, and is for tools that walk a tree they did not write.
func (r *Reader) Verify() error {
	v := verifier{
		r:    r,
		seen: make([]uint64, uint64(len(r.meta))/inodeSlot/64+1),
		left: int64(len(r.meta)),
	}
	v.visit(r.root)
	dirs := []dirLink{{r.root, r.root}}
	for len(dirs) > 0 {
		d := dirs[len(dirs)-1]
		subdirs, err := v.dir(d, dirs[:len(dirs)-1])
		if err != nil {
			return err
		}
		dirs = subdirs
	}
	return nil
}

// dirLink is a directory and the one that holds it.
type dirLink struct{ nid, parent uint64 }

type verifier struct {
	r    *Reader
	seen []uint64 // bit nid: visited
	left int64    // bytes of metadata that no visited inode has claimed
}

// visit notes nid and reports whether it is new.
func (v *verifier) visit(nid uint64) bool {
	word, bit := &v.seen[nid/64], uint64(1)<<(nid%64)
	fresh := *word&bit == 0
	*word |= bit
	return fresh
}

// claim takes the bytes of n and size more from what is left.
func (v *verifier) claim(n Inode, size int64) error {
	if v.left -= inodeSize + n.xattrSize + size; v.left < 0 {
		return corrupt(n.NID, "inodes up to here claim more than the metadata's %d bytes", len(v.r.meta))
	}
	return v.r.Xattrs(n, func(string, []byte) bool { return true })
}

// dir verifies directory d and what it holds, and appends its subdirectories
// to dirs.
func (v *verifier) dir(d dirLink, dirs []dirLink) ([]dirLink, error) {
	n, err := v.r.Inode(d.nid)
	if err != nil {
		return nil, err
	}
	if err := v.claim(n, n.Size); err != nil {
		return nil, err
	}
	var bad error
	var last []byte
	dots := 0
	err = v.r.ReadDir(n, 0, func(name []byte, nid uint64, typ uint8, _ uint64) bool {
		switch {
		case bytes.Compare(name, last) <= 0:
			bad = corrupt(n.NID, "entry %q behind %q", name, last)
		case string(name) == "." || string(name) == "..":
			dots++
			if want := [...]uint64{d.nid, d.parent}[len(name)-1]; nid != want {
				bad = corrupt(n.NID, "entry %q: inode %d, want %d", name, nid, want)
			}
		case v.visit(nid):
			if typ == unix.DT_DIR {
				dirs = append(dirs, dirLink{nid, n.NID})
			} else {
				bad = v.file(nid)
			}
		case typ == unix.DT_DIR:
			bad = corrupt(n.NID, "entry %q: a second name of directory %d", name, nid)
		}
		last = name
		return bad == nil
	})
	if err == nil && bad == nil && dots != 2 {
		bad = corrupt(n.NID, "directory without . and ..")
	}
	if bad != nil {
		err = bad
	}
	return dirs, err
}

// file verifies what is not a directory.
func (v *verifier) file(nid uint64) error {
	n, err := v.r.Inode(nid)
	if err != nil {
		return err
	}
	switch {
	case n.Mode&unix.S_IFMT == unix.S_IFLNK:
		if err := v.claim(n, n.Size); err != nil {
			return err
		}
		target, err := v.r.Readlink(n)
		if err == nil && bytes.IndexByte(target, 0) >= 0 {
			err = corrupt(nid, "symlink target %q holds a NUL", target)
		}
		return err
	case n.layout == layoutChunks:
		chunk := int64(BlockSize) << (n.union & chunkBitsMask)
		if err := v.claim(n, (n.Size+chunk-1)/chunk*chunkEntrySize); err != nil {
			return err
		}
	default:
		if err := v.claim(n, 0); err != nil {
			return err
		}
	}
	if n.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	for off := int64(0); off < n.Size; {
		_, length, err := v.r.Span(n, off)
		if err != nil {
			return err
		}
		off += length
	}
	return nil
}
