package converted

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Tree reads meta, the metadata of a root image, into a tree whose files are
// read from image, at the offsets of the root image.
func Tree(meta []byte, image io.ReaderAt) (*tree.Tree, error) {
	r, err := erofs.NewReader(meta)
	if err != nil {
		return nil, err
	}
	b := treeBuilder{reader: r, image: image, left: int64(len(meta)), seen: make(map[uint64]*tree.Inode)}
	root, err := b.inode(r.RootNID())
	if err != nil {
		return nil, err
	}
	// A list instead of recursion: the image decides how deep it goes.
	type dir struct {
		nid  uint64
		node *tree.Inode
	}
	for list := []dir{{r.RootNID(), root}}; len(list) > 0; {
		d := list[len(list)-1]
		list = list[:len(list)-1]
		n, err := r.Inode(d.nid)
		if err != nil {
			return nil, err
		}
		var failed error
		err = r.ReadDir(n, 0, func(name []byte, nid uint64, _ uint8, _ uint64) bool {
			if s := string(name); s == "." || s == ".." {
				return true
			}
			known := b.seen[nid] != nil
			child, err := b.inode(nid)
			if err == nil {
				err = b.take(direntSize + len(name))
			}
			if err == nil && (len(name) == 0 || bytes.ContainsAny(name, "/\x00")) {
				err = fmt.Errorf("inode %d has the name %q", nid, name)
			}
			if err == nil && known && child.IsDir() {
				err = fmt.Errorf("directory %d has a second name %q", nid, name)
			}
			if err != nil {
				failed = err
				return false
			}
			d.node.Entries[string(name)] = child
			if child.IsDir() {
				list = append(list, dir{nid, child})
			}
			return true
		})
		if err == nil {
			err = failed
		}
		if err != nil {
			return nil, fmt.Errorf("metadata: %w", err)
		}
	}
	return &tree.Tree{Root: root}, nil
}

type treeBuilder struct {
	reader *erofs.Reader
	image  io.ReaderAt
	left   int64                  // bytes of metadata that nothing has been read from yet
	seen   map[uint64]*tree.Inode // by nid: hard links share an inode
}

// What the parts of a tree take in the metadata at least, in bytes.
const (
	direntSize = 12
	xattrSize  = 4
	spanSize   = 4
)

// take accounts for n bytes of metadata. In an image of ours no two things
// share bytes; a hostile one could name one directory's entries, or one file's
// extents, a million times, and would be a tree larger than any memory.
func (b *treeBuilder) take(n int) error {
	if b.left -= int64(n); b.left < 0 {
		return errors.New("parts of the metadata are used more than once")
	}
	return nil
}

func (b *treeBuilder) inode(nid uint64) (*tree.Inode, error) {
	if n := b.seen[nid]; n != nil {
		return n, nil
	}
	e, err := b.reader.Inode(nid)
	if err != nil {
		return nil, err
	}
	n := &tree.Inode{
		Mode: e.Mode, UID: e.UID, GID: e.GID,
		MtimeSec: e.MtimeSec, MtimeNsec: e.MtimeNsec, Nlink: e.Nlink,
	}
	b.seen[nid] = n
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.Entries = make(map[string]*tree.Inode)
	case unix.S_IFLNK:
		target, err := b.reader.Readlink(e)
		if err != nil {
			return nil, err
		}
		n.Target = string(target)
		if err := b.take(len(target)); err != nil {
			return nil, err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = e.Rdev
	case unix.S_IFREG:
		n.Size = e.Size
		n.Content.Source = b.image
		for off := int64(0); off < e.Size; {
			at, length, err := b.reader.Span(e, off)
			if err != nil {
				return nil, err
			}
			if err := b.take(spanSize); err != nil {
				return nil, err
			}
			if at >= 0 {
				n.Content.Extents = append(n.Content.Extents, tree.Extent{Logical: off, Physical: at, Length: length})
			}
			off += length
		}
	}
	var failed error
	err = b.reader.Xattrs(e, func(name string, value []byte) bool {
		n.Xattrs = append(n.Xattrs, tree.Xattr{Name: name, Value: bytes.Clone(value)})
		failed = b.take(xattrSize + len(value))
		return failed == nil
	})
	if err == nil {
		err = failed
	}
	slices.SortFunc(n.Xattrs, func(a, b tree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return n, err
}
