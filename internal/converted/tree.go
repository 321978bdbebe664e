package converted

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Tree reads the metadata of a root image into a tree whose files are read
// from image, at the offsets of the root image.
func Tree(r *erofs.Reader, image io.ReaderAt) (*tree.Tree, error) {
	b := treeBuilder{reader: r, image: image, seen: make(map[uint64]*tree.Inode)}
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
	seen   map[uint64]*tree.Inode // by nid: hard links share an inode
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
			if at >= 0 {
				n.Content.Extents = append(n.Content.Extents, tree.Extent{Logical: off, Physical: at, Length: length})
			}
			off += length
		}
	}
	err = b.reader.Xattrs(e, func(name string, value []byte) bool {
		n.Xattrs = append(n.Xattrs, tree.Xattr{Name: name, Value: bytes.Clone(value)})
		return true
	})
	slices.SortFunc(n.Xattrs, func(a, b tree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return n, err
}
