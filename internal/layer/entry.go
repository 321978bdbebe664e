package layer

import (
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// kind is what an entry does to the tree.
type kind uint8

const (
	skipped   kind = iota // nothing
	file                  // puts node at its place
	hardLink              // puts there what lies at link
	whiteout              // hides base in the layers below
	opaque                // hides everything that dir holds in the layers below
	aufsInode             // is node, which hard links to link take
)

// entry is one entry of a layer. Paths are clean, without a slash at either
// end; the root is "".
type entry struct {
	dir, base string
	link      string
	node      *tree.Inode
	kind      kind
}

func (e *entry) path() string { return path.Join(e.dir, e.base) }

// How layers say what they hide. AUFS, where the words come from, keeps files
// of its own below the third prefix; old images carry them.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
	aufsPrefix     = ".wh..wh."
	aufsLinks      = ".wh..wh.plnk/"
)

// Linux's limits. An engine fails to unpack what exceeds them.
const (
	maxName  = 255      // bytes of one name
	maxPath  = 4095     // bytes of a path or a symlink's target
	maxXattr = 64 << 10 // bytes of an attribute's value
)

// entry makes an entry of a header and reads the data that belongs to it.
func (l *lister) entry(h *header) (entry, error) {
	name, err := cleanPath(h.name)
	if err != nil {
		return entry{}, err
	}
	dir, base := "", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir, base = name[:i], name[i+1:]
	}
	if name == "" && h.typ != typeDir {
		return entry{}, errors.New("the root is not a directory here")
	}
	switch {
	case base == opaqueName:
		return l.keep(entry{dir: dir, kind: opaque})
	case strings.HasPrefix(name, aufsPrefix):
		if h.typ != typeRegular || !strings.HasPrefix(name, aufsLinks) {
			return entry{}, nil
		}
		node, err := l.node(h)
		if err != nil {
			return entry{}, err
		}
		return l.keep(entry{link: name, node: node, kind: aufsInode})
	case strings.HasPrefix(base, whiteoutPrefix):
		hidden := base[len(whiteoutPrefix):]
		if hidden == "" || hidden == "." || hidden == ".." {
			// Engines fail, or remove the directory itself or the one above it.
			return entry{}, errors.New("this whiteout names no file: refused")
		}
		return l.keep(entry{dir: dir, base: hidden, kind: whiteout})
	case h.typ == typeLink:
		link, err := cleanPath(h.link)
		if err != nil {
			return entry{}, fmt.Errorf("hard link to %.300q: %w", h.link, err)
		}
		return l.keep(entry{dir: dir, base: base, link: link, kind: hardLink})
	case h.typ == typeChar && h.devMajor == 0 && h.devMinor == 0:
		// Overlayfs's own whiteout. On the engine's overlay2 this device would
		// hide the file below; it never becomes a device of the root.
		return l.keep(entry{dir: dir, base: base, kind: whiteout})
	}
	node, err := l.node(h)
	if err != nil {
		return entry{}, err
	}
	return l.keep(entry{dir: dir, base: base, node: node, kind: file})
}

// keep makes the strings of e their own, so that no longer ones are held, and
// counts them. Neighbours in the tar mostly share the directory.
func (l *lister) keep(e entry) (entry, error) {
	n := len(e.base) + len(e.link)
	if e.dir != l.dir {
		l.dir = strings.Clone(e.dir)
		n += len(e.dir)
	}
	e.dir = l.dir
	e.base = strings.Clone(e.base)
	return e, l.charge(n)
}

// cleanPath returns a path of the tar relative to the root, as engines do it:
// lexically. They accept an absolute one, which lies in the root all the same,
// and refuse one that leads out.
func cleanPath(name string) (string, error) {
	name = path.Clean(name) // "" becomes "."
	if name == ".." || strings.HasPrefix(name, "../") {
		return "", errors.New("leads out of the root: refused")
	}
	name = strings.TrimPrefix(name, "/")
	if name == "." {
		return "", nil
	}
	if strings.Contains(name, "\x00") {
		return "", errors.New("a path with a NUL byte: refused")
	}
	if len(name) > maxPath {
		return "", fmt.Errorf("a path of %d bytes, Linux has %d at most", len(name), maxPath)
	}
	for rest, c := name, ""; rest != ""; {
		c, rest, _ = strings.Cut(rest, "/")
		if len(c) > maxName {
			return "", fmt.Errorf("a name of %d bytes, Linux has %d at most", len(c), maxName)
		}
	}
	return name, nil
}

// node makes an inode of a header and reads the file's data.
func (l *lister) node(h *header) (*tree.Inode, error) {
	// The last id is "leave it as it is" to chown.
	if h.uid < 0 || h.uid >= math.MaxUint32 || h.gid < 0 || h.gid >= math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d: ids go from 0 to %d", h.uid, h.gid, uint32(math.MaxUint32-1))
	}
	n := l.newInode()
	*n = tree.Inode{
		Mode:      uint32(h.mode & 0o7777),
		UID:       uint32(h.uid),
		GID:       uint32(h.gid),
		MtimeSec:  h.mtimeSec,
		MtimeNsec: h.mtimeNsec,
	}
	switch h.typ {
	case typeRegular, typeCont, typeGNUSparse:
		n.Mode |= unix.S_IFREG
		n.Size = h.size
		content, err := l.content(h)
		if err != nil {
			return nil, err
		}
		n.Content = content
	case typeDir:
		n.Mode |= unix.S_IFDIR
	case typeFifo:
		n.Mode |= unix.S_IFIFO
	case typeSymlink:
		n.Mode = unix.S_IFLNK | 0o777 // a symlink has no other mode on Linux
		if h.link == "" || len(h.link) > maxPath {
			return nil, fmt.Errorf("symlink to a path of %d bytes: Linux has 1 to %d", len(h.link), maxPath)
		}
		n.Target = h.link
	case typeChar, typeBlock:
		n.Mode |= unix.S_IFCHR
		if h.typ == typeBlock {
			n.Mode ^= unix.S_IFCHR ^ unix.S_IFBLK
		}
		if h.devMajor < 0 || h.devMajor >= 1<<12 || h.devMinor < 0 || h.devMinor >= 1<<20 {
			return nil, fmt.Errorf("device %d:%d: Linux has 12 bits for the first number and 20 for the second", h.devMajor, h.devMinor)
		}
		n.Rdev = unix.Mkdev(uint32(h.devMajor), uint32(h.devMinor))
	default:
		return nil, fmt.Errorf("tar entry of unknown type %q", h.typ)
	}
	if err := l.xattrs(n, h.xattrs); err != nil {
		return nil, err
	}
	return n, l.charge(len(n.Target))
}

// xattrs gives n those attributes that an engine's unpacking would leave on
// it. Engines take the SCHILY.xattr records alone (ACLs and capabilities are
// among them; SCHILY.acl and LIBARCHIVE.xattr are ignored), and pass over what
// Linux refuses for this kind of file or this name.
func (l *lister) xattrs(n *tree.Inode, list []tree.Xattr) error {
	for _, x := range list {
		class, name, _ := strings.Cut(x.Name, ".")
		keep := false
		switch class {
		case "user":
			keep = n.IsRegular() || n.IsDir()
		case "trusted":
			// To the overlay that is mounted over the root these are orders.
			keep = !strings.HasPrefix(name, "overlay.")
		case "security":
			keep = true
		case "system":
			keep = name == "posix_acl_access" && !n.IsSymlink() || name == "posix_acl_default" && n.IsDir()
		}
		if !keep || name == "" {
			continue
		}
		if len(x.Name) > maxName || len(x.Value) > maxXattr {
			return fmt.Errorf("extended attribute %.300q of %d bytes: Linux has %d for the name and %d for the value",
				x.Name, len(x.Value), maxName, maxXattr)
		}
		if err := l.charge(len(x.Name) + len(x.Value)); err != nil {
			return err
		}
		n.Xattrs = append(n.Xattrs, x)
	}
	slices.SortFunc(n.Xattrs, func(a, b tree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}
