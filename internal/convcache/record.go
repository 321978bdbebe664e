package convcache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
)

// Version is that of the format of records, and of what the layer package and
// the layout of the root image make of a layer: another version's records are
// of no use.
const Version = 1

// Profile names the cutting and layout that the chunks follow.
const Profile = "v1"

// Limits on a record, in bytes. A layer of a million files needs half of the
// larger.
const (
	MaxSealed = 48 << 20
	maxPlain  = 96 << 20
)

// Record is what is known of one layer.
type Record struct {
	Entries []byte // layer.Layer.Record
	// Layers are the DiffIDs that the files of Units are of, the record's own
	// first.
	Layers []string
	Units  []Unit
}

// Unit is a run of the root image that begins and ends a chunk: whole regular
// files, each padded to whole blocks.
type Unit struct {
	Files  []File // in the order of the image, at least one
	Chunks []Chunk
}

// File is a regular file of a layer, in its place in a unit.
type File struct {
	Layer  int32  // position in Record.Layers, or among those of an image
	Entry  int32  // number of the entry in the layer
	Blocks uint32 // that it takes in the root image, > 0
}

// Chunk is a chunk of a unit.
type Chunk struct {
	ID     index.ID
	Size   int  // plain bytes
	Stored int  // bytes of the stored form, as it was written; 0 if it is not known
	Zero   bool // all its bytes are zero
}

// memory is about what r takes, in bytes.
func (r *Record) memory() int {
	const unit, file, chunk = 48, 12, 56
	n := len(r.Entries)
	for _, u := range r.Units {
		n += unit + file*len(u.Files) + chunk*len(u.Chunks)
	}
	return n
}

// Name is the name of a layer's record in a [Place].
func Name(diffID string) (string, error) {
	sum, err := parseDigest(diffID)
	if err != nil {
		return "", err
	}
	return "layer-" + hex.EncodeToString(sum), nil
}

func parseDigest(s string) ([]byte, error) {
	digits, ok := strings.CutPrefix(s, "sha256:")
	sum, err := hex.DecodeString(digits)
	if !ok || err != nil || len(sum) != sha256.Size || digits != strings.ToLower(digits) {
		return nil, fmt.Errorf("digest %.100q, want sha256: and 64 hex digits", s)
	}
	return sum, nil
}

// header is the first line of a record.
func header(diffID string) string {
	return fmt.Sprintf("bootfs layer record %d %s %s\n", Version, Profile, diffID)
}

// Seal returns r, which is about the layer with this DiffID, as a place keeps
// it:
//
//	line      "bootfs layer record 1 v1 sha256:…"
//	zstd      what encode gives
//	SHA-256   of all before, 32 bytes
func (r *Record) Seal(diffID string) ([]byte, error) {
	b, err := r.encode()
	if err != nil {
		return nil, err
	}
	if len(b) > maxPlain {
		return nil, fmt.Errorf("its record has %d bytes, at most %d are kept", len(b), maxPlain)
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	if err != nil {
		return nil, err
	}
	out := z.EncodeAll(b, []byte(header(diffID)))
	sum := sha256.Sum256(out)
	if out = append(out, sum[:]...); len(out) > MaxSealed {
		return nil, fmt.Errorf("its record has %d bytes, at most %d are kept", len(out), MaxSealed)
	}
	return out, nil
}

// window is that of the compressor, in bytes.
const window = 4 << 20

// Open reads a sealed record of the layer with this DiffID.
func Open(diffID string, sealed []byte) (*Record, error) {
	rest, ok := bytes.CutPrefix(sealed, []byte(header(diffID)))
	switch {
	case !ok:
		line, _, _ := bytes.Cut(sealed[:min(len(sealed), 200)], []byte("\n"))
		return nil, fmt.Errorf("it begins with %.120q, want %q", line, strings.TrimSpace(header(diffID)))
	case len(sealed) > MaxSealed:
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", len(sealed), MaxSealed)
	case len(rest) < sha256.Size:
		return nil, io.ErrUnexpectedEOF
	}
	body := sealed[:len(sealed)-sha256.Size]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], sealed[len(body):]) {
		return nil, errors.New("damaged: its content does not match its digest")
	}
	frames := bytes.NewReader(rest[:len(rest)-sha256.Size])
	z, err := zstd.NewReader(frames, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(2*window))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	// Nothing is allocated for what is only claimed; and to count before is
	// cheaper than a buffer that grows.
	n, err := io.Copy(io.Discard, io.LimitReader(z, maxPlain+1))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	if n > maxPlain {
		return nil, fmt.Errorf("it holds more than %d bytes", maxPlain)
	}
	plain := make([]byte, n)
	_, _ = frames.Seek(0, io.SeekStart) // it has a start
	if err = z.Reset(frames); err == nil {
		_, err = io.ReadFull(z, plain)
	}
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return decode(diffID, plain)
}

// decode reads the plain bytes of a record.
func decode(diffID string, plain []byte) (*Record, error) {
	d := decoder{rest: plain}
	r := &Record{Entries: bytes.Clone(d.bytes(d.uint(maxPlain)))} // plain is not kept for it
	d.units(r)
	if d.err == nil && (len(d.rest) > 0 || r.Layers[0] != diffID) {
		d.fail()
	}
	if d.err != nil {
		return nil, d.err
	}
	return r, nil
}

// encode returns the plain bytes of a record: numbers as varints, digests in 32
// bytes.
//
//	length of Entries, Entries
//	count of Layers, each; count of Units, each:
//	  count of files, for each: layer, entry (from the one before, signed), blocks
//	  count of chunks, for each: size × 2 + zero, stored size, ID
func (r *Record) encode() ([]byte, error) {
	b := binary.AppendUvarint(nil, uint64(len(r.Entries)))
	b = append(b, r.Entries...)
	b = binary.AppendUvarint(b, uint64(len(r.Layers)))
	for _, l := range r.Layers {
		sum, err := parseDigest(l)
		if err != nil {
			return nil, err
		}
		b = append(b, sum...)
	}
	b = binary.AppendUvarint(b, uint64(len(r.Units)))
	for _, u := range r.Units {
		b = binary.AppendUvarint(b, uint64(len(u.Files)))
		last := int32(0)
		for _, f := range u.Files {
			b = binary.AppendUvarint(b, uint64(f.Layer))
			b = binary.AppendVarint(b, int64(f.Entry-last))
			b = binary.AppendUvarint(b, uint64(f.Blocks))
			last = f.Entry
		}
		b = binary.AppendUvarint(b, uint64(len(u.Chunks)))
		for _, c := range u.Chunks {
			size := uint64(c.Size) << 1
			if c.Zero {
				size |= 1
			}
			b = binary.AppendUvarint(b, size)
			b = binary.AppendUvarint(b, uint64(c.Stored))
			b = append(b, c.ID[:]...)
		}
	}
	return b, nil
}

// decoder reads the plain bytes of a record. Its first error stays, and what it
// returns from then on means nothing. Nothing is allocated that the rest is too
// short for.
type decoder struct {
	rest []byte
	err  error
}

var errUnits = errors.New("malformed")

func (d *decoder) fail() {
	d.err, d.rest = errUnits, nil
}

func (d *decoder) uint(most uint64) int {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 || v > most {
		d.fail()
		return 0
	}
	d.rest = d.rest[n:]
	return int(v)
}

// count reads how many things follow that take size bytes at least.
func (d *decoder) count(size int) int { return d.uint(uint64(len(d.rest) / size)) }

func (d *decoder) bytes(n int) []byte {
	if n > len(d.rest) {
		d.fail()
		return nil
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

const (
	idSize = len(index.ID{})

	// What the parts of a unit take at least, in bytes.
	minFile  = 3
	minChunk = 2 + idSize

	maxEntry  = 1 << 30 // numbers of entries are below: no layer has as many
	maxStored = 1 << 30 // bytes of a chunk
)

func (d *decoder) units(r *Record) {
	for range d.count(sha256.Size) {
		r.Layers = append(r.Layers, "sha256:"+hex.EncodeToString(d.bytes(sha256.Size)))
	}
	if d.err == nil && len(r.Layers) == 0 {
		d.fail()
	}
	units := d.count(1 + minFile + 1 + minChunk)
	if d.err == nil {
		r.Units = make([]Unit, 0, units)
	}
	for range units {
		if u := d.unit(len(r.Layers)); d.err == nil {
			r.Units = append(r.Units, u)
		}
	}
}

func (d *decoder) unit(layers int) (u Unit) {
	files := d.count(minFile)
	if d.err != nil || files == 0 {
		d.fail()
		return u
	}
	u.Files = make([]File, files)
	var size int64
	entry := int64(0)
	for i := range u.Files {
		f := &u.Files[i]
		f.Layer = int32(d.uint(uint64(layers - 1)))
		step, n := binary.Varint(d.rest)
		if n <= 0 || step < -entry || step >= maxEntry-entry {
			d.fail()
			return u
		}
		d.rest = d.rest[n:]
		entry += step
		f.Entry = int32(entry)
		f.Blocks = uint32(d.uint(erofs.MaxImageBlocks))
		if size += int64(f.Blocks) * erofs.BlockSize; f.Blocks == 0 || size > erofs.MaxImageBlocks*erofs.BlockSize {
			d.fail()
			return u
		}
	}
	chunks := d.count(minChunk)
	if d.err != nil {
		return u
	}
	u.Chunks = make([]Chunk, chunks)
	for i := range u.Chunks {
		c := &u.Chunks[i]
		n := d.uint(uint64(2*chunker.V1.Max + 1))
		c.Size, c.Zero = n>>1, n&1 != 0
		c.Stored = d.uint(maxStored)
		copy(c.ID[:], d.bytes(idSize))
		if size -= int64(c.Size); c.Size == 0 {
			d.fail()
			return u
		}
	}
	if size != 0 {
		d.fail()
	}
	return u
}
