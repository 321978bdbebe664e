package registrystore

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// The file of locators, little endian, no padding:
//
//	header     32 B                magic, version, numbers of the rows below, zeros
//	packs      48 B × packs        digest, size u64, flags u32, zero u32
//	chunks     12 B × chunks       pack u32, offset u32, length u32: by position in the index
//	names       4 B × names        positions u32, sorted by chunk id; each distinct id once
//
// It is used where it is mapped: opening costs the same for any image.
const (
	locatorsMagic   = "bootfsPK"
	locatorsVersion = 1

	headerSize   = 32
	packSize     = 48
	locationSize = 12
	nameSize     = 4

	flagStart = 1
)

// Locators say where the chunks of one index lie. They are safe for
// concurrent use.
type Locators struct {
	index  *index.Index
	packs  []byte
	chunks []byte
	names  []byte
}

// OpenLocators returns the locators of index x in b, which it keeps and which
// must not change. It looks at the header only; every later use is checked.
func OpenLocators(b []byte, x *index.Index) (*Locators, error) {
	if len(b) < headerSize {
		return nil, fmt.Errorf("locators: got %d bytes, want at least %d", len(b), headerSize)
	}
	if magic := string(b[:8]); magic != locatorsMagic {
		return nil, fmt.Errorf("locators: starts with %q, want %q", magic, locatorsMagic)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != locatorsVersion {
		return nil, fmt.Errorf("locators: format version %d, this program reads version %d", v, locatorsVersion)
	}
	packs := int64(binary.LittleEndian.Uint32(b[12:]))
	chunks := int64(binary.LittleEndian.Uint32(b[16:]))
	names := int64(binary.LittleEndian.Uint32(b[20:]))
	if binary.LittleEndian.Uint64(b[24:]) != 0 {
		return nil, errors.New("locators: unknown flags in the header")
	}
	// Three products of 32-bit numbers: no overflow.
	if want := headerSize + packs*packSize + chunks*locationSize + names*nameSize; int64(len(b)) != want {
		return nil, fmt.Errorf("locators: got %d bytes, want %d for %d packs, %d chunks and %d names", len(b), want, packs, chunks, names)
	}
	if chunks != int64(x.Len()) {
		return nil, fmt.Errorf("locators: for an index of %d chunks, got one of %d", chunks, x.Len())
	}
	if names > chunks {
		return nil, fmt.Errorf("locators: %d names of %d chunks", names, chunks)
	}
	l := &Locators{index: x}
	l.packs, b = b[headerSize:headerSize+packs*packSize], b[headerSize+packs*packSize:]
	l.chunks, l.names = b[:chunks*locationSize], b[chunks*locationSize:]
	return l, nil
}

// Packs returns the number of packs.
func (l *Locators) Packs() int { return len(l.packs) / packSize }

// Pack returns pack i.
func (l *Locators) Pack(i int) (PackDescriptor, error) {
	size, start, err := l.pack(i)
	if err != nil {
		return PackDescriptor{}, err
	}
	return PackDescriptor{Digest: "sha256:" + hex.EncodeToString(l.packs[i*packSize:][:32]), Size: size, Start: start}, nil
}

// pack returns pack i without its digest, which would have to be written out for
// each chunk.
func (l *Locators) pack(i int) (size int64, start bool, err error) {
	if i < 0 || i >= l.Packs() {
		return 0, false, fmt.Errorf("locators: pack %d of %d", i, l.Packs())
	}
	row := l.packs[i*packSize:][:packSize]
	stated := binary.LittleEndian.Uint64(row[32:])
	flags := binary.LittleEndian.Uint32(row[40:])
	if stated == 0 || stated > math.MaxUint32 {
		return 0, false, fmt.Errorf("locators: pack %d: size %d, want 1 to %d", i, stated, uint32(math.MaxUint32))
	}
	if flags&^flagStart != 0 {
		return 0, false, fmt.Errorf("locators: pack %d: unknown flags %#x", i, flags)
	}
	return int64(stated), flags&flagStart != 0, nil
}

// At returns the location of the chunk at position pos of the index.
func (l *Locators) At(pos int) (Location, error) {
	if pos < 0 || pos >= l.index.Len() {
		return Location{}, fmt.Errorf("locators: chunk %d of %d", pos, l.index.Len())
	}
	row := l.chunks[pos*locationSize:][:locationSize]
	at := Location{
		Pack:   int(binary.LittleEndian.Uint32(row)),
		Offset: int64(binary.LittleEndian.Uint32(row[4:])),
		Length: int(binary.LittleEndian.Uint32(row[8:])),
	}
	if at.Length == 0 {
		if at != (Location{}) {
			return Location{}, fmt.Errorf("locators: chunk %d: no bytes in pack %d at %d", pos, at.Pack, at.Offset)
		}
		return at, nil
	}
	if at.Length > chunkstore.MaxStored {
		return Location{}, fmt.Errorf("locators: chunk %d: stored form of %d bytes, want at most %d", pos, at.Length, chunkstore.MaxStored)
	}
	size, _, err := l.pack(at.Pack)
	if err != nil {
		return Location{}, fmt.Errorf("locators: chunk %d: %w", pos, err)
	}
	if at.Offset+int64(at.Length) > size {
		return Location{}, fmt.Errorf("locators: chunk %d: bytes %d to %d of pack %d, which has %d",
			pos, at.Offset, at.Offset+int64(at.Length), at.Pack, size)
	}
	return at, nil
}

// Lookup returns a position in the index of chunk id. The error wraps
// chunkstore.ErrNotFound when the index does not have it.
func (l *Locators) Lookup(id index.ID) (pos int, err error) {
	n := len(l.names) / nameSize
	lo, hi := 0, n
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		c, pos, err := l.name(mid)
		if err != nil {
			return 0, err
		}
		switch bytes.Compare(c.ID[:], id[:]) {
		case 0:
			return pos, nil
		case -1:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return 0, fmt.Errorf("locators: chunk %s: %w", id, chunkstore.ErrNotFound)
}

// name returns the i-th chunk by name.
func (l *Locators) name(i int) (index.Chunk, int, error) {
	pos := binary.LittleEndian.Uint32(l.names[i*nameSize:])
	if int64(pos) >= int64(l.index.Len()) {
		return index.Chunk{}, 0, fmt.Errorf("locators: name %d: chunk %d of %d", i, pos, l.index.Len())
	}
	c, err := l.index.At(int(pos))
	if err != nil {
		return index.Chunk{}, 0, fmt.Errorf("locators: name %d: %w", i, err)
	}
	return c, int(pos), nil
}

// StartSet yields the positions of the chunks in the packs of the start set,
// in the order of the index. It looks at every chunk once and passes over
// damaged rows, which fail when they are read.
func (l *Locators) StartSet() iter.Seq[int] {
	return func(yield func(int) bool) {
		for pos := range l.index.Len() {
			at, err := l.At(pos)
			if err != nil || at.Length == 0 {
				continue
			}
			if _, start, err := l.pack(at.Pack); err == nil && start && !yield(pos) {
				return
			}
		}
	}
}

// PackOrder yields the positions of the chunks in packs, pack after pack and
// each from front to back. It looks at every chunk once and passes over damaged
// rows, which fail when they are read.
func (l *Locators) PackOrder() iter.Seq[int] {
	return func(yield func(int) bool) {
		var order []uint32
		for pos := range l.index.Len() {
			if at, err := l.At(pos); err == nil && at.Length > 0 {
				order = append(order, uint32(pos))
			}
		}
		place := func(pos uint32) (pack, offset uint32) {
			row := l.chunks[int(pos)*locationSize:]
			return binary.LittleEndian.Uint32(row), binary.LittleEndian.Uint32(row[4:])
		}
		slices.SortFunc(order, func(a, b uint32) int {
			packA, offA := place(a)
			packB, offB := place(b)
			return cmp.Or(cmp.Compare(packA, packB), cmp.Compare(offA, offB), cmp.Compare(a, b))
		})
		for _, pos := range order {
			if !yield(int(pos)) {
				return
			}
		}
	}
}

// Verify checks every row: for tools and tests.
func (l *Locators) Verify() error {
	for i := range l.Packs() {
		if _, err := l.Pack(i); err != nil {
			return err
		}
	}
	for pos := range l.index.Len() {
		if _, err := l.At(pos); err != nil {
			return err
		}
	}
	var last index.Chunk
	for i := range len(l.names) / nameSize {
		c, _, err := l.name(i)
		if err != nil {
			return err
		}
		if i > 0 && bytes.Compare(last.ID[:], c.ID[:]) >= 0 {
			return fmt.Errorf("locators: name %d: %s after %s", i, c.ID, last.ID)
		}
		last = c
	}
	for pos := range l.index.Len() {
		c, err := l.index.At(pos)
		if err != nil {
			return fmt.Errorf("locators: %w", err)
		}
		if _, err := l.Lookup(c.ID); err != nil {
			return err
		}
	}
	return nil
}

// EncodeLocators returns the locators of index x: chunk i of x lies at at[i],
// in packs[at[i].Pack].
func EncodeLocators(x *index.Index, packs []PackDescriptor, at []Location) ([]byte, error) {
	if len(at) != x.Len() {
		return nil, fmt.Errorf("locators: %d locations for an index of %d chunks", len(at), x.Len())
	}
	if len(packs) > math.MaxUint32 || len(at) > math.MaxUint32 {
		return nil, fmt.Errorf("locators: %d packs and %d chunks are more than the format holds", len(packs), len(at))
	}
	type name struct {
		id  index.ID
		pos uint32
	}
	names := make([]name, len(at))
	for i := range names {
		c, err := x.At(i)
		if err != nil {
			return nil, fmt.Errorf("locators: %w", err)
		}
		names[i] = name{c.ID, uint32(i)}
	}
	// The first position stands for all of one name.
	slices.SortFunc(names, func(a, b name) int {
		return cmp.Or(bytes.Compare(a.id[:], b.id[:]), cmp.Compare(a.pos, b.pos))
	})
	names = slices.CompactFunc(names, func(a, b name) bool { return a.id == b.id })

	le := binary.LittleEndian
	b := make([]byte, 0, headerSize+len(packs)*packSize+len(at)*locationSize+len(names)*nameSize)
	b = append(b, locatorsMagic...)
	b = le.AppendUint32(b, locatorsVersion)
	b = le.AppendUint32(b, uint32(len(packs)))
	b = le.AppendUint32(b, uint32(len(at)))
	b = le.AppendUint32(b, uint32(len(names)))
	b = le.AppendUint64(b, 0)
	for i, p := range packs {
		sum, err := hex.DecodeString(strings.TrimPrefix(p.Digest, "sha256:"))
		if err != nil || checkDigest(p.Digest) != nil {
			return nil, fmt.Errorf("locators: pack %d: digest %q", i, p.Digest)
		}
		var flags uint32
		if p.Start {
			flags = flagStart
		}
		b = append(b, sum...)
		b = le.AppendUint64(b, uint64(p.Size))
		b = le.AppendUint32(b, flags)
		b = le.AppendUint32(b, 0)
	}
	for i, a := range at {
		if a.Pack < 0 || a.Pack > math.MaxUint32 || a.Offset < 0 || a.Offset > math.MaxUint32 || a.Length < 0 || a.Length > chunkstore.MaxStored {
			return nil, fmt.Errorf("locators: chunk %d: pack %d, offset %d, length %d", i, a.Pack, a.Offset, a.Length)
		}
		b = le.AppendUint32(b, uint32(a.Pack))
		b = le.AppendUint32(b, uint32(a.Offset))
		b = le.AppendUint32(b, uint32(a.Length))
	}
	for _, n := range names {
		b = le.AppendUint32(b, n.pos)
	}
	// What the reader would refuse must not be written.
	l, err := OpenLocators(b, x)
	if err != nil {
		return nil, err
	}
	return b, l.Verify()
}
