package layer

import (
	"cmp"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// Merge lays the layers over one another, the lowest first, and returns the
// tree that a container of the image sees. A layer can be merged once: its
// inodes become the tree's.
//
// As in the engine's overlay, each layer first becomes a directory tree of its
// own, and that tree is then laid over the merged ones below. So a whiteout
// hides what is below whatever its place in the tar, and never a neighbour of
// its own layer; and a directory that a layer implies takes the place of a
// symlink below it.
//
// Where the engine's overlay2 fails (a whiteout behind the file of its name, a
// hard link to a file of a layer below) or contradicts the OCI specification
// (a whiteout and then a directory of its name, which lets the hidden children
// show; implied directories, which lose the attributes they have below), the
// specification and umoci are followed.
func Merge(layers []*Layer) (*tree.Tree, error) {
	t := &tree.Tree{Root: newDir()}
	for number, l := range layers {
		if l.merged {
			return nil, fmt.Errorf("layer %s: merged before", l.name)
		}
		l.merged = true
		d := diff{lower: t.Root, root: newDir(), notes: map[*tree.Inode]*note{}, left: l.limits.Entries}
		d.notes[d.root] = &note{implied: true}
		for i, piece := range l.entries {
			for j := range piece {
				if n := piece[j].node; n != nil {
					n.Content.Layer, n.Content.Entry = int32(number), int32(i*entriesPiece+j)
				}
				if err := d.apply(&piece[j]); err != nil {
					return nil, fmt.Errorf("layer %s: %.300q: %w", l.name, piece[j].path(), err)
				}
			}
			l.entries[i] = nil
		}
		l.entries = nil
		d.overlay()
	}
	countLinks(t.Root)
	return t, nil
}

// newDir returns a directory as one that no layer describes is: engines make
// it 0755 and root's. They leave the time of the unpacking, which is 0 here,
// so that a conversion can be repeated.
func newDir() *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*tree.Inode{}}
}

// diff is one layer on its way to becoming a tree.
type diff struct {
	lower *tree.Inode // root of the layers below, merged
	root  *tree.Inode
	notes map[*tree.Inode]*note // of directories of root
	aufs  map[string]*tree.Inode
	left  int // inodes that the layer may still have

	// The directory of the latest entry: neighbours share it.
	dirPath string
	dir     *tree.Inode
}

// note is what a directory of a layer says about the layers below.
type note struct {
	implied bool     // the layer has no entry for it: attributes below stay
	opaque  bool     // nothing below shows
	hidden  []string // names that do not show from below
}

func (d *diff) note(dir *tree.Inode) *note {
	n := d.notes[dir]
	if n == nil {
		n = &note{}
		d.notes[dir] = n
	}
	return n
}

var (
	errNotDir = errors.New("a file in its path is not a directory")
	errDepth  = fmt.Errorf("more than %d directories deep: refused", maxDepth)
	errCount  = errors.New("the layer implies more directories than a layer may have entries: refused")
)

const maxDepth = 5000 // directories above one another

// apply puts one entry into the layer's tree.
func (d *diff) apply(e *entry) error {
	if e.kind == aufsInode {
		if d.aufs == nil {
			d.aufs = map[string]*tree.Inode{}
		}
		d.aufs[e.link] = e.node
		return nil
	}
	dir, err := d.parent(e.dir)
	if err != nil {
		return err
	}
	switch e.kind {
	case opaque:
		d.note(dir).opaque = true
		return nil
	case whiteout:
		d.note(dir).hidden = append(d.note(dir).hidden, e.base)
		return nil
	case hardLink:
		n, err := d.linkTarget(e.link)
		if err != nil {
			return fmt.Errorf("hard link to %.300q: %w", e.link, err)
		}
		// The attributes in a link's header are those of the inode in any tar
		// that was packed from files; where they differ, the inode's count.
		d.put(dir, e.base, n)
		return nil
	}
	if d.left--; d.left < 0 {
		return errCount
	}
	if e.node.IsDir() {
		old := dir
		if e.base != "" {
			old = dir.Entries[e.base]
		}
		if old != nil && old.IsDir() { // a second entry for it, or the first after its children
			setAttributes(old, e.node)
			d.note(old).implied = false
			return nil
		}
		e.node.Entries = map[string]*tree.Inode{}
	}
	d.put(dir, e.base, e.node)
	return nil
}

// put makes name in dir an entry for n, in place of any that this layer had.
func (d *diff) put(dir *tree.Inode, name string, n *tree.Inode) {
	if old := dir.Entries[name]; old != nil {
		d.dir = nil // it may have led through old
	}
	dir.Entries[name] = n
}

func setAttributes(n, from *tree.Inode) {
	n.Mode, n.UID, n.GID = from.Mode, from.UID, from.GID
	n.MtimeSec, n.MtimeNsec = from.MtimeSec, from.MtimeNsec
	n.Xattrs = from.Xattrs
}

// parent returns the directory at path in the layer's tree. It follows the
// layer's own symlinks, in the root, and makes the directories that the layer
// implies.
func (d *diff) parent(path string) (*tree.Inode, error) {
	if d.dir != nil && d.dirPath == path {
		return d.dir, nil
	}
	type place struct {
		dir   *tree.Inode
		depth int // directories above it
	}
	end, err := tree.Follow(place{d.root, 0}, path, func(at place, name string, _ bool) (next place, link string, err error) {
		n := at.dir.Entries[name]
		switch {
		case n == nil:
			if len(name) > maxName { // of a symlink's target
				return place{}, "", fmt.Errorf("a name of %d bytes, Linux has %d at most", len(name), maxName)
			}
			if d.left--; d.left < 0 {
				return place{}, "", errCount
			}
			n = newDir()
			at.dir.Entries[name] = n
			d.note(n).implied = true
		case n.IsSymlink():
			return place{}, n.Target, nil
		case !n.IsDir():
			return place{}, "", errNotDir
		}
		if at.depth+1 >= maxDepth {
			return place{}, "", errDepth
		}
		return place{n, at.depth + 1}, "", nil
	})
	if err != nil {
		return nil, err
	}
	d.dirPath, d.dir = path, end.dir
	return d.dir, nil
}

// linkTarget returns the inode that a hard link to path means: in this layer,
// or else in those below, where engines that unpack each layer by itself find
// nothing, and those that unpack into one root find it. Whiteouts of this
// layer do not count here, so that a link and a whiteout move a file whatever
// their order in the tar.
func (d *diff) linkTarget(path string) (*tree.Inode, error) {
	if n := d.aufs[path]; n != nil {
		return n, nil
	}
	// A place in both trees; either side may be nil, not both.
	type place struct{ upper, lower *tree.Inode }
	end, err := tree.Follow(place{d.root, d.lower}, path, func(at place, name string, last bool) (next place, link string, err error) {
		if at.upper != nil {
			next.upper = at.upper.Entries[name]
		}
		if at.lower != nil && (next.upper == nil || next.upper.IsDir()) {
			next.lower = at.lower.Entries[name]
		}
		n := cmp.Or(next.upper, next.lower)
		switch {
		case n == nil:
			return next, "", errors.New("there is no such file in this layer or below it")
		case n.IsDir():
			if next.lower != nil && !next.lower.IsDir() {
				next.lower = nil
			}
		case last: // not followed: a symlink can have several names
		case n.IsSymlink():
			return next, n.Target, nil
		default:
			return next, "", errNotDir
		}
		return next, "", nil
	})
	if err != nil {
		return nil, err
	}
	n := cmp.Or(end.upper, end.lower)
	if n.IsDir() {
		return nil, errors.New("a directory cannot have a second name")
	}
	return n, nil
}

// overlay lays the layer's tree over the ones below, into d.lower.
func (d *diff) overlay() {
	type pair struct{ lower, upper *tree.Inode }
	todo := []pair{{d.lower, d.root}}
	for len(todo) > 0 {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		n := d.notes[p.upper]
		if n == nil {
			n = &note{}
		}
		if !n.implied {
			setAttributes(p.lower, p.upper)
		}
		if n.opaque {
			p.lower.Entries = p.upper.Entries
			continue
		}
		for _, name := range n.hidden {
			delete(p.lower.Entries, name)
		}
		if len(p.lower.Entries) == 0 {
			p.lower.Entries = p.upper.Entries
			continue
		}
		for name, upper := range p.upper.Entries {
			if lower := p.lower.Entries[name]; lower != nil && lower.IsDir() && upper.IsDir() {
				todo = append(todo, pair{lower, upper})
			} else {
				p.lower.Entries[name] = upper
			}
		}
	}
}

// countLinks sets the link counts, now that it is known which names are left.
func countLinks(root *tree.Inode) {
	root.Nlink = 2
	dirs := []*tree.Inode{root}
	for len(dirs) > 0 {
		dir := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		for _, n := range dir.Entries {
			if n.IsDir() {
				dir.Nlink = min(dir.Nlink, math.MaxUint32-1) + 1
				n.Nlink = 2
				dirs = append(dirs, n)
			} else {
				n.Nlink++
			}
		}
	}
}
