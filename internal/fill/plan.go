package fill

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
)

// plan is the image turned round: the metadata say of each file where its bytes
// lie, and the plan of each chunk whose they are. Its tables are a few words
// for each file; all else is read from the metadata when it is needed.
type plan struct {
	r *erofs.Reader
	x *index.Index

	top      uint64     // the directory that is written
	dirTable []dirEntry // parents before their children; the first is top
	regular  []name     // regular files that have bytes
	extents  []extent   // of regular, in the order of the image; they do not overlap
	others   []name     // what has no bytes: symlinks, devices, empty files and the like
	links    []link     // further names of what stands in regular and others
	same     []uint32   // by position: the next one with the same chunk, in a ring
	inodes   int64
	identity [sha256.Size]byte // of metadata and index
}

// name is one entry of a directory.
type name struct {
	dir uint32 // in plan.dirTable
	pos uint32 // cookie of the entry there, and lastBit
}

// lastBit marks what is put in place at the end. A cookie has 28 bits at most,
// as a directory has no more bytes than the metadata.
const lastBit = 1 << 31

func (n name) last() bool { return n.pos&lastBit != 0 }

type dirEntry struct {
	nid     uint32
	entry   name // in its parent; the root has none
	skipped bool // it is mounted over, or below such a one
}

// extent is a run of a file's bytes in the root image. Its length is Span's.
type extent struct {
	block uint32 // where it begins
	file  uint32 // in plan.regular
	off   int64  // in the file
}

// link is a further name of an inode.
type link struct {
	name, first name
	regular     uint32 // number in plan.regular, or noFile
}

const noFile = 1<<32 - 1

func newPlan(o *Options) (*plan, error) {
	r, err := erofs.NewReader(o.Meta)
	if err != nil {
		return nil, err
	}
	if err := r.Verify(); err != nil {
		return nil, err
	}
	if err := o.Index.Verify(); err != nil {
		return nil, err
	}
	if got, want := o.Index.Size(), r.Blocks()*erofs.BlockSize; got != want {
		return nil, fmt.Errorf("the index has %d bytes, the metadata say %d", got, want)
	}
	top, err := under(r, o.Under)
	if err != nil {
		return nil, err
	}
	p := &plan{r: r, x: o.Index, top: top}
	if err := p.walk(o.Last); err != nil {
		return nil, err
	}
	if err := p.sortExtents(); err != nil {
		return nil, err
	}
	p.findSame()
	p.identify(o.Meta)
	return p, nil
}

// under returns the nid of the directory at path.
func under(r *erofs.Reader, path string) (uint64, error) {
	at := r.RootNID()
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		n, err := r.Inode(at)
		if err == nil {
			at, err = r.Lookup(n, name)
		}
		if err != nil {
			return 0, fmt.Errorf("%s in the image: %w", path, err)
		}
	}
	return at, nil
}

// walk lists all that the metadata name.
func (p *plan) walk(last func(string) bool) error {
	type first struct {
		name
		regular uint32
	}
	firsts := make(map[uint64]first) // of inodes with several names, by nid
	p.dirTable = append(p.dirTable, dirEntry{nid: uint32(p.top)})
	paths := map[uint32]string{0: ""} // of directories that are still to be read
	p.inodes = 1
	for d := uint32(0); int(d) < len(p.dirTable); d++ {
		dir, err := p.r.Inode(uint64(p.dirTable[d].nid))
		if err != nil {
			return err
		}
		path := paths[d]
		delete(paths, d)
		var bad error
		pos := uint64(0)
		err = p.r.ReadDir(dir, 0, func(b []byte, nid uint64, typ uint8, next uint64) bool {
			at := name{dir: d, pos: uint32(pos)}
			pos = next
			if string(b) == "." || string(b) == ".." {
				return true
			}
			if typ == unix.DT_DIR {
				if last != nil {
					paths[uint32(len(p.dirTable))] = path + string(b) + "/"
				}
				p.dirTable = append(p.dirTable, dirEntry{nid: uint32(nid), entry: at})
				p.inodes++
				return true
			}
			if last != nil && last(path+string(b)) {
				at.pos |= lastBit
			}
			var n erofs.Inode
			if n, bad = p.r.Inode(nid); bad != nil {
				return false
			}
			if f, ok := firsts[nid]; ok {
				p.links = append(p.links, link{at, f.name, f.regular})
				return true
			}
			p.inodes++
			number := uint32(noFile)
			if typ == unix.DT_REG && n.Size > 0 {
				number = uint32(len(p.regular))
				p.regular = append(p.regular, at)
				bad = p.addExtents(n, number)
			} else {
				p.others = append(p.others, at)
			}
			if n.Nlink > 1 {
				firsts[nid] = first{at, number}
			}
			return bad == nil
		})
		if err = cmp.Or(bad, err); err != nil {
			return err
		}
	}
	return nil
}

func (p *plan) addExtents(n erofs.Inode, number uint32) error {
	for off := int64(0); off < n.Size; {
		at, length, err := p.r.Span(n, off)
		if err != nil {
			return err
		}
		if at >= 0 {
			if at%erofs.BlockSize != 0 {
				return fmt.Errorf("erofs: inode %d: bytes at %d of the image, want the start of a block", n.NID, at)
			}
			p.extents = append(p.extents, extent{uint32(at / erofs.BlockSize), number, off})
		}
		off += length
	}
	return nil
}

// byBlock sorts without a type parameter, which would make the boot binary some
// 15 kB larger.
type byBlock []extent

func (e byBlock) Len() int           { return len(e) }
func (e byBlock) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e byBlock) Less(i, j int) bool { return e[i].block < e[j].block }

// sortExtents brings the extents into the order of the image, and refuses files
// that share bytes: an image that claims each of its bytes a thousand times
// would fill any disk.
func (p *plan) sortExtents() error {
	sort.Sort(byBlock(p.extents))
	end := int64(0)
	for i, e := range p.extents {
		from, length, err := p.span(e)
		if err != nil {
			return err
		}
		if from < end {
			return fmt.Errorf("%s and %s share bytes of the image", p.path(p.regular[p.extents[i-1].file]), p.path(p.regular[e.file]))
		}
		end = from + length
	}
	return nil
}

// span returns where e lies in the image.
func (p *plan) span(e extent) (from, length int64, err error) {
	n, err := p.inode(p.regular[e.file])
	if err != nil {
		return 0, 0, err
	}
	return p.r.Span(n, e.off)
}

// findSame links the positions of each chunk into a ring.
func (p *plan) findSame() {
	order := make([]uint32, p.x.Len())
	p.same = make([]uint32, p.x.Len())
	for i := range order {
		order[i], p.same[i] = uint32(i), uint32(i)
	}
	key := func(i uint32) (index.ID, int) {
		c, _ := p.x.At(int(i)) // Verify has seen it
		return c.ID, c.Size
	}
	slices.SortFunc(order, func(a, b uint32) int {
		x, m := key(a)
		y, n := key(b)
		return cmp.Or(bytes.Compare(x[:], y[:]), cmp.Compare(m, n), cmp.Compare(a, b))
	})
	for i := 1; i < len(order); i++ {
		a, b := order[i-1], order[i]
		x, m := key(a)
		if y, n := key(b); x == y && m == n {
			p.same[a], p.same[b] = b, p.same[a]
		}
	}
}

// identify names the image: a journal is of one image.
func (p *plan) identify(meta []byte) {
	h := sha256.New()
	h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(meta))))
	h.Write(meta)
	h.Write(binary.LittleEndian.AppendUint64(nil, p.top))
	var row []byte
	for i := range p.x.Len() {
		c, _ := p.x.At(i)
		row = append(binary.LittleEndian.AppendUint64(row[:0], uint64(c.Size)), c.ID[:]...)
		h.Write(row)
	}
	h.Sum(p.identity[:0])
}

// entry returns the name and the nid of at.
func (p *plan) entry(at name) (string, uint64, error) {
	dir, err := p.r.Inode(uint64(p.dirTable[at.dir].nid))
	if err != nil {
		return "", 0, err
	}
	var s string
	var id uint64
	err = p.r.ReadDir(dir, uint64(at.pos&^lastBit), func(b []byte, nid uint64, _ uint8, _ uint64) bool {
		s, id = string(b), nid
		return false
	})
	if err == nil && s == "" {
		err = errors.New("an entry is gone from its directory")
	}
	return s, id, err
}

// inode returns what stands at at.
func (p *plan) inode(at name) (erofs.Inode, error) {
	_, nid, err := p.entry(at)
	if err != nil {
		return erofs.Inode{}, err
	}
	return p.r.Inode(nid)
}

// path returns the path of at for messages, from the root on.
func (p *plan) path(at name) string {
	var parts []string
	for {
		s, _, err := p.entry(at)
		if err != nil {
			s = "?"
		}
		parts = append(parts, s)
		if at.dir == 0 {
			break
		}
		at = p.dirTable[at.dir].entry
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}

// dirPath is path of a directory.
func (p *plan) dirPath(d uint32) string {
	if d == 0 {
		return "/"
	}
	return p.path(p.dirTable[d].entry)
}

// A piece is what one chunk contributes to one file.
type piece struct {
	file uint32 // in plan.regular
	n    erofs.Inode
	off  int64 // in the file
	at   int   // in the chunk
	size int
}

// pieces calls fn for each file that has a part in c.
func (p *plan) pieces(c index.Chunk, fn func(piece) error) error {
	end := c.Offset + int64(c.Size)
	// The first extent that may reach into the chunk.
	i := sort.Search(len(p.extents), func(i int) bool { return int64(p.extents[i].block)*erofs.BlockSize > c.Offset }) - 1
	for i = max(i, 0); i < len(p.extents) && int64(p.extents[i].block)*erofs.BlockSize < end; i++ {
		e := p.extents[i]
		n, err := p.inode(p.regular[e.file])
		if err != nil {
			return err
		}
		from, length, err := p.r.Span(n, e.off)
		if err != nil {
			return err
		}
		a, b := max(from, c.Offset), min(from+length, end)
		if a >= b {
			continue
		}
		if err := fn(piece{e.file, n, e.off + a - from, int(a - c.Offset), int(b - a)}); err != nil {
			return err
		}
	}
	return nil
}

// wanted is the number of bytes that file still needs, as done says.
func (p *plan) wanted(n erofs.Inode, done func(pos int) bool) (left, all int64, err error) {
	for off := int64(0); off < n.Size; {
		at, length, err := p.r.Span(n, off)
		if err != nil {
			return 0, 0, err
		}
		off += length
		if at < 0 {
			continue
		}
		all += length
		for i := p.x.Find(at); i < p.x.Len(); i++ {
			c, err := p.x.At(i)
			if err != nil {
				return 0, 0, err
			}
			if c.Offset >= at+length {
				break
			}
			if !done(i) {
				left += min(at+length, c.Offset+int64(c.Size)) - max(at, c.Offset)
			}
		}
	}
	return left, all, nil
}
