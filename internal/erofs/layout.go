package erofs

import (
	"errors"
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// Layout is the place of every inode of a tree in the front region. The
// inodes of one directory's entries stand together, in the order of their
// names, behind the directory's own; then come those of each subdirectory. A
// directory thus always points forward to its subdirectories.
type Layout struct {
	nodes    []node   // in order of place, the root first
	dirents  []dirent // of all directories, one directory after the other
	metaSize int64
	classes  uint8 // bit i: xattrClasses[i] occurs
	sparse   bool  // a chunk table occurs
}

// node is one inode in its place.
type node struct {
	inode       *tree.Inode
	entry       int32  // in Layout.dirents: the first that leads here; of the root, its "."
	parent      int32  // node of that entry's directory; the root is its own
	links       uint32 // entries that lead here; 2 + subdirectories for a directory
	first, last int32  // of a directory: its entries are dirents[first:last]
	nid         uint32
	block       uint32 // first block of a directory or symlink that is not all inline
	layout      uint16
}

// dirent is one entry of a directory.
type dirent struct {
	name string
	node int32
}

// xattrClasses are the first components of the names that can be stored.
var xattrClasses = [...]string{"security", "system", "trusted", "user"}

// NewLayout places every inode of t. An inode that EROFS cannot hold is refused
// with its path. Link counts are those of the entries, whatever Nlink says; but
// one that says 1, and is no directory, is taken at its word.
func NewLayout(t *tree.Tree) (*Layout, error) {
	l := new(Layout)
	if err := l.collect(t.Root); err != nil {
		return nil, err
	}
	if err := l.place(); err != nil {
		return nil, err
	}
	return l, nil
}

// collect lists the inodes in order of place and checks each.
func (l *Layout) collect(root *tree.Inode) error {
	if root == nil || root.Mode&unix.S_IFMT != unix.S_IFDIR {
		return errors.New("root image: the tree's root is not a directory")
	}
	seen := l.allocate(root)
	l.nodes = append(l.nodes, node{inode: root, links: 2})
	if err := l.check(0); err != nil {
		return err
	}
	for dirs := []int32{0}; len(dirs) > 0; {
		d := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		entries := l.nodes[d].inode.Entries
		start := len(l.dirents)
		l.dirents = append(l.dirents, dirent{".", d}, dirent{"..", l.nodes[d].parent})
		for name := range entries {
			if err := checkName(name); err != nil {
				return fmt.Errorf("%q: %w", l.Path(int(d)), err)
			}
			l.dirents = append(l.dirents, dirent{name: name})
		}
		dir := l.dirents[start:]
		slices.SortFunc(dir, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
		l.nodes[d].first, l.nodes[d].last = int32(start), int32(len(l.dirents))

		pending := len(dirs)
		for k := range dir {
			name := dir[k].name
			if name == "." || name == ".." {
				continue
			}
			inode := entries[name]
			if inode == nil {
				return fmt.Errorf("%q: entry %q has no inode", l.Path(int(d)), name)
			}
			isDir := inode.Mode&unix.S_IFMT == unix.S_IFDIR
			shared := isDir || inode.Nlink != 1
			var i int32
			if shared {
				i = seen[inode]
			}
			if i > 0 || inode == root {
				if isDir {
					return fmt.Errorf("%q: entry %q is a second link to directory %q", l.Path(int(d)), name, l.Path(int(i)))
				}
				l.nodes[i].links++
				dir[k].node = i
				continue
			}
			i = int32(len(l.nodes))
			if shared {
				seen[inode] = i
			}
			dir[k].node = i
			n := node{inode: inode, entry: int32(start + k), parent: d, links: 1}
			if isDir {
				n.links = 2
				l.nodes[d].links++
				dirs = append(dirs, i)
			}
			l.nodes = append(l.nodes, n)
			if err := l.check(int(i)); err != nil {
				return err
			}
		}
		slices.Reverse(dirs[pending:]) // the first in the order of names is the next
	}
	return nil
}

// allocate makes room for all nodes and entries below root, which would take
// twice as much if it grew, and returns the table of the inodes that more than
// one entry may lead to: most have one only, and need no place in it. Its
// directories stand there already, as 0.
func (l *Layout) allocate(root *tree.Inode) map[*tree.Inode]int32 {
	seen := map[*tree.Inode]int32{root: 0}
	nodes, dirents := 1, 0
	for dirs := []*tree.Inode{root}; len(dirs) > 0; {
		d := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		nodes += len(d.Entries)
		dirents += len(d.Entries) + 2
		for _, n := range d.Entries {
			if n == nil || n.Mode&unix.S_IFMT != unix.S_IFDIR {
				continue
			}
			if _, known := seen[n]; !known { // a second entry is refused later
				seen[n] = 0
				dirs = append(dirs, n)
			}
		}
	}
	l.nodes, l.dirents = make([]node, 0, nodes), make([]dirent, 0, dirents)
	return seen
}

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("entry %q: not a name", name)
	case len(name) > maxNameLen:
		return fmt.Errorf("entry %q: name of %d bytes, at most %d", name, len(name), maxNameLen)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("entry %q: name holds a slash or a NUL", name)
	}
	return nil
}

// check refuses what the format cannot hold, and notes what occurs.
func (l *Layout) check(i int) error {
	n := l.nodes[i].inode
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%q: "+format, append([]any{l.Path(i)}, args...)...)
	}
	if n.Mode > 1<<16-1 || direntType(n.Mode) == 0 {
		return refuse("mode %#o: not that of a file", n.Mode)
	}
	if n.MtimeNsec > 999999999 {
		return refuse("mtime has %d nanoseconds, at most 999999999", n.MtimeNsec)
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if n.Target == "" || len(n.Target) > maxTargetLen {
			return refuse("symlink target of %d bytes, want 1 to %d", len(n.Target), maxTargetLen)
		}
		if strings.Contains(n.Target, "\x00") {
			return refuse("symlink target %q holds a NUL", n.Target)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if n.Rdev > 1<<32-1 {
			return refuse("device %d:%d: major is at most 4095, minor 1048575", unix.Major(n.Rdev), unix.Minor(n.Rdev))
		}
	case unix.S_IFREG:
		if n.Size < 0 || n.Size > MaxFileSize {
			return refuse("size %d bytes, at most %d", n.Size, int64(MaxFileSize))
		}
		var end int64
		for k, e := range n.Content.Extents {
			if e.Logical < end || e.Length <= 0 || e.Length > n.Size-e.Logical || e.Physical < 0 {
				return refuse("extent %d: %d bytes from %d are not in order within the size %d", k, e.Length, e.Logical, n.Size)
			}
			end = e.Logical + e.Length
		}
		if n.Content.Source == nil && len(n.Content.Extents) > 0 {
			return refuse("%d extents without a source", len(n.Content.Extents))
		}
		l.sparse = l.sparse || sparse(n)
	}
	for k, x := range n.Xattrs {
		_, suffix, ok := splitXattr(x.Name)
		switch {
		case !ok:
			return refuse("xattr %q: want user., trusted., security. or a POSIX ACL", x.Name)
		case len(x.Name) > maxNameLen || strings.Contains(suffix, "\x00"):
			return refuse("xattr %q: not a name of at most %d bytes", x.Name, maxNameLen)
		case len(x.Value) > maxValueLen:
			return refuse("xattr %q: value of %d bytes, at most %d", x.Name, len(x.Value), maxValueLen)
		case k > 0 && n.Xattrs[k-1].Name >= x.Name:
			return refuse("xattr %q: out of order or twice", x.Name)
		}
		class, _, _ := strings.Cut(x.Name, ".")
		l.classes |= 1 << slices.Index(xattrClasses[:], class)
	}
	if size := xattrSize(n); size > xattrHeaderSize+(1<<16-2)*xattrAlign {
		return refuse("xattrs of %d bytes, at most %d", size, xattrHeaderSize+(1<<16-2)*xattrAlign)
	}
	return nil
}

// xattrSize is the length of n's xattrs behind the inode, in bytes.
func xattrSize(n *tree.Inode) int64 {
	if len(n.Xattrs) == 0 {
		return 0
	}
	size := int64(xattrHeaderSize)
	for _, x := range n.Xattrs {
		_, suffix, _ := splitXattr(x.Name)
		size += alignUp(int64(xattrEntrySize+len(suffix)+len(x.Value)), xattrAlign)
	}
	return size
}

// entries returns the entries of directory n.
func (l *Layout) entries(n *node) []dirent { return l.dirents[n.first:n.last] }

// size is the size of n in bytes, as its inode has it.
func (l *Layout) size(n *node) int64 {
	switch n.inode.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return n.inode.Size
	case unix.S_IFLNK:
		return int64(len(n.inode.Target))
	case unix.S_IFDIR:
		return dirSize(l.entries(n))
	}
	return 0
}

// dirSize is the size of a directory with these entries: they and their names
// are packed block by block, and only the last is cut where it ends.
func dirSize(dir []dirent) int64 {
	var blocks, used int64
	for _, e := range dir {
		need := int64(direntSize + len(e.name))
		if used+need > BlockSize {
			blocks, used = blocks+1, 0
		}
		used += need
	}
	return blocks*BlockSize + used
}

// place gives each inode its offset, then the blocks of directories and
// symlinks theirs.
func (l *Layout) place() error {
	pos := int64(superOffset + superSize)
	var blocks int64 // of directories and symlinks
	for i := range l.nodes {
		n := &l.nodes[i]
		head := inodeSize + xattrSize(n.inode)
		size := l.size(n)
		var tail, table int64 // bytes behind the head; a tail shares the inode's block
		switch n.inode.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			if sparse(n.inode) {
				n.layout = layoutChunks
				table = chunks(size) * chunkEntrySize
			}
		case unix.S_IFDIR, unix.S_IFLNK:
			n.block = uint32(blocks)
			blocks += size / BlockSize
			tail = size % BlockSize
			switch {
			case tail == 0:
			case head+tail <= BlockSize:
				n.layout = layoutInline
			default:
				tail = 0
				blocks++
			}
		}
		// What stands within one block: the inode, and with a tail all of it.
		whole := int64(inodeSize)
		if tail > 0 {
			whole = head + tail
		}
		pos = alignUp(pos, inodeSlot)
		if pos%BlockSize+whole > BlockSize {
			pos = alignUp(pos, BlockSize)
		}
		n.nid = uint32(pos / inodeSlot)
		pos += head + tail + table
		if pos+blocks*BlockSize > MaxMetaSize {
			return fmt.Errorf("%q: metadata of the root image exceeds %d bytes", l.Path(i), MaxMetaSize)
		}
	}
	first := alignUp(pos, BlockSize) / BlockSize
	for i := range l.nodes {
		l.nodes[i].block += uint32(first)
	}
	l.metaSize = (first + blocks) * BlockSize
	return nil
}

// MetaSize is the length of the front region in bytes, a multiple of BlockSize.
func (l *Layout) MetaSize() int64 { return l.metaSize }

// Inodes is the number of inodes.
func (l *Layout) Inodes() int { return len(l.nodes) }

// Files yields every regular file that takes blocks in the root image, with its
// number among the inodes, in order of place.
func (l *Layout) Files() iter.Seq2[int, *tree.Inode] {
	return func(yield func(int, *tree.Inode) bool) {
		for i := range l.nodes {
			n := l.nodes[i].inode
			if n.Mode&unix.S_IFMT == unix.S_IFREG && Blocks(n) > 0 && !yield(i, n) {
				return
			}
		}
	}
}

// Inode returns inode number i.
func (l *Layout) Inode(i int) *tree.Inode { return l.nodes[i].inode }

// Name returns the last component of inode i's path, "" for the root's.
func (l *Layout) Name(i int) string {
	if i == 0 {
		return ""
	}
	return l.dirents[l.nodes[i].entry].name
}

// Path returns the first path that leads to inode i, from "/".
func (l *Layout) Path(i int) string {
	var names []string
	for ; i != 0; i = int(l.nodes[i].parent) {
		names = append(names, l.Name(i))
	}
	slices.Reverse(names)
	return path.Join("/", strings.Join(names, "/"))
}

// XattrClasses lists the classes of xattrs that occur, sorted: "security",
// "system", "trusted", "user".
func (l *Layout) XattrClasses() []string {
	var classes []string
	for i, c := range xattrClasses {
		if l.classes&(1<<i) != 0 {
			classes = append(classes, c)
		}
	}
	return classes
}
