package sshstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// casync's remote protocol: both sides begin with hello, the client asks with
// requests, the server answers each chunk with chunk or missing, in an order of
// its own. A frame is its length in bytes, header included, and its kind, both
// 64 bits, little endian like all numbers, and then what the kind wants.
const (
	kindHello   kind = 0x3c71d0948ca5fbee // features, 64 bits
	kindRequest kind = 0x8ab427e0f89d9210 // flags, 64 bits; chunk ids
	kindChunk   kind = 0x5213dd180a84bc8c // flags, 64 bits; chunk id; data
	kindMissing kind = 0xd010f9fac82b7b6c // chunk id
	kindGoodbye kind = 0xad205dbf1a3686c3
	kindAbort   kind = 0xe7d9136b7efea352 // errno, 64 bits; text, zero-terminated
)

const (
	featureReadableStore = 0x1  // I have chunks
	featurePullChunks    = 0x40 // I want chunks

	requestUrgent   = 1 // answered before others
	chunkCompressed = 1

	headerLen = 16
	maxFrame  = 16 << 20 // bytes, casync's own limit
	maxReason = 4 << 10  // bytes
)

// kind is the kind of a frame.
type kind uint64

// layout is what a frame of a kind is made of: a 64-bit number, a chunk id, and
// between min and max bytes of data.
type layout struct {
	name       string
	number, id bool
	min, max   int
}

var layouts = map[kind]layout{
	kindHello:   {name: "hello", number: true},
	kindRequest: {name: "request", number: true, min: 32, max: maxFrame},
	kindChunk:   {name: "chunk", number: true, id: true, min: 1, max: chunkstore.MaxStored},
	kindMissing: {name: "missing", id: true},
	kindGoodbye: {name: "goodbye"},
	kindAbort:   {name: "abort", number: true, min: 1, max: maxReason},
}

func (l layout) fixed() int {
	n := headerLen
	if l.number {
		n += 8
	}
	if l.id {
		n += len(index.ID{})
	}
	return n
}

func (k kind) String() string {
	if l, ok := layouts[k]; ok {
		return l.name
	}
	return fmt.Sprintf("%#x", uint64(k))
}

// message is a frame without its data.
type message struct {
	kind   kind
	number uint64 // features, flags or errno
	id     index.ID
	data   int // bytes that follow
}

// errProtocol is wrapped when the other side does not speak the protocol.
var errProtocol = errors.New("not casync's protocol")

// readMessage reads a frame up to its data. The length of the data is within
// what the kind may have, whatever the frame says. io.EOF means that there is
// no frame any more; within one it is io.ErrUnexpectedEOF.
func readMessage(r io.Reader) (message, error) {
	var b [headerLen + 8 + len(index.ID{})]byte
	if _, err := io.ReadFull(r, b[:headerLen]); err != nil {
		return message{}, err
	}
	size := binary.LittleEndian.Uint64(b[:])
	m := message{kind: kind(binary.LittleEndian.Uint64(b[8:]))}
	l, ok := layouts[m.kind]
	if !ok {
		return message{}, fmt.Errorf("%w: got a frame that begins with %q", errProtocol, b[:headerLen])
	}
	fixed := l.fixed()
	least, most := uint64(fixed+l.min), uint64(min(fixed+l.max, maxFrame))
	if size < least || size > most {
		return message{}, fmt.Errorf("%w: got a %s frame of %d bytes, want %d to %d", errProtocol, m.kind, size, least, most)
	}
	m.data = int(size) - fixed
	rest := b[headerLen:fixed]
	if _, err := io.ReadFull(r, rest); err != nil {
		return message{}, noEOF(err)
	}
	if l.number {
		m.number = binary.LittleEndian.Uint64(rest)
		rest = rest[8:]
	}
	if l.id {
		copy(m.id[:], rest)
	}
	return m, nil
}

// append appends the frame up to its data.
func (m message) append(b []byte) []byte {
	l := layouts[m.kind]
	b = binary.LittleEndian.AppendUint64(b, uint64(l.fixed()+m.data))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.kind))
	if l.number {
		b = binary.LittleEndian.AppendUint64(b, m.number)
	}
	if l.id {
		b = append(b, m.id[:]...)
	}
	return b
}

// readReason reads the data of an abort.
func readReason(r io.Reader, m message) error {
	text := make([]byte, m.data)
	if _, err := io.ReadFull(r, text); err != nil {
		return noEOF(err)
	}
	return fmt.Errorf("casync on the server gave up: %s (error %d)", printable(text), m.number)
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// printable returns what the server wrote as one line.
func printable(text []byte) string {
	s := strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == 0xfffd {
			return ' '
		}
		return r
	}, string(text))
	return strings.Join(strings.Fields(s), " ")
}
