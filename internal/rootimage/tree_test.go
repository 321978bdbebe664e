package rootimage

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

type entries = map[string]*tree.Inode

func dir(e entries) *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFDIR | 0o755, Entries: e}
}

func file(content []byte) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o644, Size: int64(len(content))}
	if len(content) > 0 {
		n.Content = tree.Content{
			Source:  bytes.NewReader(content),
			Extents: []tree.Extent{{Length: n.Size}},
		}
	}
	return n
}

func link(target string) *tree.Inode {
	return &tree.Inode{Mode: unix.S_IFLNK | 0o777, Target: target}
}

// sparseFile has 300 bytes of content at each offset and is a hole elsewhere.
func sparseFile(size int64, offsets ...int64) *tree.Inode {
	n := &tree.Inode{Mode: unix.S_IFREG | 0o600, Size: size}
	n.Content.Source = bytes.NewReader(noise(1, 300))
	for _, off := range offsets {
		n.Content.Extents = append(n.Content.Extents, tree.Extent{Logical: off, Length: 300})
	}
	return n
}

// noise is size bytes that depend on seed alone.
func noise(seed uint64, size int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, size)
	rand.NewChaCha8(key).Read(b)
	return b
}

// acl is the value of a POSIX ACL xattr: user::rwx, user:UID:rwx, group::r-x,
// mask::rwx, other::r-x.
func acl(uid uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, 1<<32 - 1}, {2, 7, uid}, {4, 5, 1<<32 - 1}, {0x10, 7, 1<<32 - 1}, {0x20, 5, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// capability is the value of security.capability that setcap
// cap_net_raw+ep writes.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

const gib = 1 << 30

// everything is a tree with all that the format can hold, at its edges.
func everything() *tree.Tree {
	root := dir(entries{})
	add := func(name string, n *tree.Inode) *tree.Inode {
		root.Entries[name] = n
		return n
	}
	root.Mode = unix.S_IFDIR | 0o1777
	root.MtimeSec = 1700000000

	// Sizes around a block, around the boundary of small files and of holes.
	sizes := dir(entries{})
	for _, unit := range []int{1, 4096, 8192, smallFile, groupMax, 1 << 20} {
		for d := -1; d <= 1; d++ {
			size := unit + d
			n := file(noise(uint64(size), size))
			n.MtimeSec, n.MtimeNsec = int64(size), uint32(size)
			sizes.Entries[fmt.Sprint(size)] = n
		}
	}
	add("sizes", sizes)
	sparse := dir(entries{
		"5g":        sparseFile(5*gib, 0, 5*gib/64*7, 5*gib/64*63, 5*gib-300),
		"1t":        sparseFile(1024*gib, 1024*gib/64*5),
		"all":       sparseFile(3 * gib),
		"small":     sparseFile(100<<10, 0),
		"min-hole":  sparseFile(2<<20, 0, 300+1<<20),
		"less":      sparseFile(2<<20, 0, 299+1<<20),
		"tail-hole": sparseFile(1<<20+777, 0),
	})
	add("sparse", sparse)

	// Entries that fill a directory block to the byte, and one more or less.
	packed := dir(entries{})
	for _, count := range []int{1, 200, 201, 202, 203, 204, 205, 406, 407, 408, 409} {
		d := dir(entries{})
		for i := range count {
			d.Entries[fmt.Sprintf("name%04d", i)] = file(nil)
		}
		packed.Entries[fmt.Sprint(count)] = d
	}
	add("packed", packed)
	many := dir(entries{})
	for i := range 100000 {
		n := file(nil)
		n.UID = uint32(i)
		many.Entries[fmt.Sprintf("entry-%d", i)] = n
	}
	add("100000", many)
	fiveThousand := dir(entries{})
	for i := range 5000 {
		fiveThousand.Entries[fmt.Sprintf("link-%d", i)] = link(fmt.Sprintf("../100000/entry-%d", i))
	}
	add("5000", fiveThousand)

	names := dir(entries{})
	for _, name := range []string{
		"!before", "-before", ".", "..", "...", "..a", ".a", "/", "a b", "a\nb", "\x01", "\xff\xfe", "é", "日本",
		strings.Repeat("n", 255), strings.Repeat("\xfe", 255), strings.Repeat("é", 127),
	} {
		if name != "." && name != ".." && name != "/" {
			names.Entries[name] = file([]byte(name))
		}
	}
	long := dir(entries{})
	for i := range 100 {
		long.Entries[fmt.Sprintf("%0255d", i)] = file(nil)
	}
	names.Entries["long"] = long
	add("names", names)

	// Symlinks around the longest that stands behind its inode, and the longest.
	links := dir(entries{})
	for _, size := range []int{1, 59, 60, 255, 4030, 4031, 4032, 4033, 4034, 4095} {
		links.Entries[fmt.Sprint(size)] = link(strings.Repeat("t", size))
	}
	add("links", links)

	shared := file([]byte("one inode, three names"))
	node := &tree.Inode{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)}
	target := link("target")
	add("hard", dir(entries{
		"a": shared, "b": shared, "dir": dir(entries{"c": shared, "l": target}), "l": target,
		"null": node, "null2": node,
	}))

	add("nodes", dir(entries{
		"fifo": {Mode: unix.S_IFIFO | 0o620},
		"sock": {Mode: unix.S_IFSOCK | 0o755},
		"blk":  {Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(259, 70000)},
		"max":  {Mode: unix.S_IFCHR | 0o600, Rdev: unix.Mkdev(4095, 1048575)},
	}))

	modes := dir(entries{})
	for _, mode := range []uint32{0, 0o7777, 0o4755, 0o2755, 0o1777, 0o400} {
		n := file([]byte("x"))
		n.Mode = unix.S_IFREG | mode
		n.UID, n.GID = mode, 1<<32-2
		modes.Entries[fmt.Sprintf("%o", mode)] = n
	}
	add("modes", modes)

	times := dir(entries{})
	for _, sec := range []int64{-1 << 40, -2208988800, -1, 0, 1, 1<<31 - 1, 1 << 31, 1 << 33, 1 << 40} {
		for _, nsec := range []uint32{0, 1, 999999999} {
			n := dir(nil)
			n.MtimeSec, n.MtimeNsec = sec, nsec
			times.Entries[fmt.Sprintf("%d.%d", sec, nsec)] = n
		}
	}
	add("times", times)

	xattrs := dir(entries{})
	with := func(name string, n *tree.Inode, x ...tree.Xattr) {
		n.Xattrs = x
		xattrs.Entries[name] = n
	}
	with("cap", file([]byte("#!")), tree.Xattr{Name: "security.capability", Value: capability})
	with("acl", dir(nil),
		tree.Xattr{Name: "system.posix_acl_access", Value: acl(1000)},
		tree.Xattr{Name: "system.posix_acl_default", Value: acl(1001)})
	with("empty", file(nil), tree.Xattr{Name: "user.empty"})
	with("60k", file([]byte("x")), tree.Xattr{Name: "user.60k", Value: noise(60, 60<<10)})
	with("max", file([]byte("x")), tree.Xattr{Name: "user." + strings.Repeat("n", 250), Value: noise(61, 65535)})
	with("60k-dir", dir(entries{"in": file(nil)}), tree.Xattr{Name: "trusted.60k", Value: noise(62, 60<<10)})
	with("link", link("target"), tree.Xattr{Name: "trusted.x", Value: []byte("of a link")})
	with("60k-link", link("target"), tree.Xattr{Name: "trusted.x", Value: noise(63, 60<<10)})
	with("sparse", sparseFile(64<<20, 0, 64<<20-300), tree.Xattr{Name: "user.odd", Value: []byte("xyz")})
	many100 := make([]tree.Xattr, 100)
	for i := range many100 {
		many100[i] = tree.Xattr{Name: fmt.Sprintf("user.%03d", i), Value: noise(uint64(i), i)}
	}
	with("100", file([]byte("x")), many100...)
	for size := 3900; size < 4100; size += 7 { // inode, xattrs and tail around a block
		with(fmt.Sprintf("edge-%d", size), dir(entries{"e": file(nil)}), tree.Xattr{Name: "user.x", Value: noise(9, size)})
		with(fmt.Sprintf("edge-link-%d", size), link("e"), tree.Xattr{Name: "trusted.x", Value: noise(9, size)})
	}
	add("xattrs", xattrs)

	deep := dir(nil)
	for range 300 {
		deep = dir(entries{"d": deep})
	}
	add("deep", deep)
	return &tree.Tree{Root: root}
}

// record is what is compared of a file, whoever shows it.
type record struct {
	Mode, UID, GID uint32
	Rdev           uint64
	Size           int64 // 0 of a directory
	Nlink          uint64
	Sec            int64
	Nsec           uint32
	Target, Xattrs string
	Sum            [32]byte
	SameAs         string // the first path of the same inode
}

// sum hashes the content: all of it up to 8 MiB, else 64 windows.
func sum(readAt func(p []byte, off int64) (int, error), size int64) [32]byte {
	h := sha256.New()
	buf := make([]byte, min(64<<10, size))
	step := int64(len(buf))
	if size > 8<<20 {
		step = size / 64
	}
	for off := int64(0); off < size; off += step {
		b := buf[:min(int64(len(buf)), size-off)]
		if n, err := readAt(b, off); n < len(b) {
			fmt.Fprintf(h, "at %d: %v", off, err)
		}
		h.Write(b)
	}
	return [32]byte(h.Sum(nil))
}

// xattrString is a printable, comparable form of xattrs, sorted by name.
func xattrString(x []tree.Xattr) string {
	var b strings.Builder
	for _, a := range x {
		if len(a.Value) > 64 {
			fmt.Fprintf(&b, "%s=%d:%x ", a.Name, len(a.Value), sha256.Sum256(a.Value))
		} else {
			fmt.Fprintf(&b, "%s=%x ", a.Name, a.Value)
		}
	}
	return b.String()
}
