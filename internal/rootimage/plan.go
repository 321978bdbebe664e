// Package rootimage plans a tree's root image: the bytes that are cut into
// chunks and that boot serves.
//
// Give [New] a tree and read the image unit by unit:
//
//	metadata | groups of small files | large files
//
// A [Unit] begins and ends a chunk, so that its chunks are the same in every
// image that has it, whatever stands beside it. A large file is a unit of its
// own. Small files share units, because a chunk for each would be too many;
// where a unit ends depends on the names of the files near that place only,
// so that an insertion changes the units around it and no others. The image is
// never held whole, and the same tree always gives the same bytes: this is the
// layout of profile v1.
package rootimage

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"sort"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Profile v1, in bytes. Changing any changes the units of every image.
const (
	smallFile   = 32 << 10  // a file below shares its unit
	groupTarget = 16 << 10  // mean size of a unit of small files, as far as names decide
	groupMax    = 256 << 10 // no unit of small files is larger
)

// Plan is the layout of one root image. It refers to the tree's contents, which
// must stay readable, and is safe for concurrent use.
type Plan struct {
	layout *erofs.Layout
	meta   []byte
	files  []placed // in the order of the image
	units  []Unit   // without the metadata, in the order of the image
	size   int64
}

// placed is a regular file in its place.
type placed struct {
	inode int    // its number in the layout
	block uint32 // its first
}

// Unit is a run of the root image that begins and ends a chunk.
type Unit struct {
	Offset, Size int64 // bytes; both are multiples of erofs.BlockSize
}

// New lays out the root image of t. What EROFS cannot hold is refused with its
// path.
func New(t *tree.Tree) (*Plan, error) {
	layout, err := erofs.NewLayout(t)
	if err != nil {
		return nil, err
	}
	p := &Plan{layout: layout}
	b := builder{plan: p, next: layout.MetaSize() / erofs.BlockSize, start: make([]uint32, layout.Inodes())}
	var group Unit
	for i, inode := range layout.Files() {
		if inode.Size >= smallFile {
			continue
		}
		size := erofs.Blocks(inode) * erofs.BlockSize
		if group.Size+size > groupMax {
			p.units = append(p.units, group)
			group = Unit{}
		}
		offset, err := b.add(i, inode)
		if err != nil {
			return nil, err
		}
		if group.Size == 0 {
			group.Offset = offset
		}
		group.Size += size
		if endsGroup(layout.Name(i), size) {
			p.units = append(p.units, group)
			group = Unit{}
		}
	}
	if group.Size > 0 {
		p.units = append(p.units, group)
	}
	for i, inode := range layout.Files() {
		if inode.Size < smallFile {
			continue
		}
		offset, err := b.add(i, inode)
		if err != nil {
			return nil, err
		}
		p.units = append(p.units, Unit{offset, erofs.Blocks(inode) * erofs.BlockSize})
	}
	p.size = b.next * erofs.BlockSize
	p.meta = layout.Encode(b.start, uint32(b.next))
	return p, nil
}

// builder gives files their places.
type builder struct {
	plan  *Plan
	next  int64    // the first free block
	start []uint32 // first block of each inode that has one
}

func (b *builder) add(i int, inode *tree.Inode) (offset int64, err error) {
	blocks := erofs.Blocks(inode)
	if b.next+blocks > erofs.MaxImageBlocks {
		return 0, fmt.Errorf("%q: with its %d bytes the root image exceeds %d bytes", b.plan.layout.Path(i), blocks*erofs.BlockSize, int64(erofs.MaxImageBlocks)*erofs.BlockSize)
	}
	b.start[i] = uint32(b.next)
	b.plan.files = append(b.plan.files, placed{i, uint32(b.next)})
	offset = b.next * erofs.BlockSize
	b.next += blocks
	return offset, nil
}

// endsGroup decides whether a small file of size bytes, padded, is the last of
// its unit: the larger, the likelier, so that units of groupTarget bytes come
// out whatever the sizes. It looks at the name alone, because a name stays
// when a file's content changes.
func endsGroup(name string, size int64) bool {
	sum := sha256.Sum256([]byte(name))
	return int64(binary.LittleEndian.Uint32(sum[:])%groupTarget) < size
}

// Meta returns the first unit, the metadata. The caller must not change it.
func (p *Plan) Meta() []byte { return p.meta }

// Size returns the length of the root image in bytes.
func (p *Plan) Size() int64 { return p.size }

// XattrClasses lists the classes of xattrs that occur, sorted: "security",
// "system", "trusted", "user".
func (p *Plan) XattrClasses() []string { return p.layout.XattrClasses() }

// Units yields the units in the order of the image, which they cover.
func (p *Plan) Units() iter.Seq[Unit] {
	return func(yield func(Unit) bool) {
		if !yield(Unit{0, int64(len(p.meta))}) {
			return
		}
		for _, u := range p.units {
			if !yield(u) {
				return
			}
		}
	}
}

// Files yields the regular files of u, one of Units, in the order of the image.
// Each takes erofs.Blocks there. The metadata have none.
func (p *Plan) Files(u Unit) iter.Seq[*tree.Inode] {
	return func(yield func(*tree.Inode) bool) {
		end := u.Offset + u.Size
		for i := p.first(u); i < len(p.files) && int64(p.files[i].block)*erofs.BlockSize < end; i++ {
			if !yield(p.layout.Inode(p.files[i].inode)) {
				return
			}
		}
	}
}

// first is the position in p.files of the first file of u or behind it.
func (p *Plan) first(u Unit) int {
	return sort.Search(len(p.files), func(i int) bool { return int64(p.files[i].block)*erofs.BlockSize >= u.Offset })
}

// Open returns the bytes of u, one of Units.
func (p *Plan) Open(u Unit) io.Reader {
	r := &reader{plan: p, next: p.first(u), left: u.Size}
	if u.Offset == 0 {
		r.rest, r.left = p.meta[:u.Size], 0
	}
	return r
}

// WriteTo writes the whole root image.
func (p *Plan) WriteTo(w io.Writer) (int64, error) {
	var written int64
	buf := make([]byte, 1<<20)
	for u := range p.Units() {
		n, err := io.CopyBuffer(struct{ io.Writer }{w}, p.Open(u), buf)
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}
