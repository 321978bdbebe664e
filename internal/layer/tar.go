package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strconv"
	"strings"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// The headers are parsed here and not by archive/tar because that package
// hides where data and sparse maps lie. It parses for Docker's engine, though,
// so where formats leave room this parser takes its decisions; a fuzz target
// compares the two.

const blockSize = 512

// maxSpecial bounds the data of a header that describes another one (PAX
// records, a long name, a sparse map), in bytes.
const maxSpecial = 1 << 20

// Type flags, as the tar formats have them.
const (
	typeRegularV7 = 0
	typeRegular   = '0'
	typeLink      = '1'
	typeSymlink   = '2'
	typeChar      = '3'
	typeBlock     = '4'
	typeDir       = '5'
	typeFifo      = '6'
	typeCont      = '7' // "contiguous": a regular file for everybody
	typePAX       = 'x'
	typeGlobal    = 'g'
	typeLongName  = 'L'
	typeLongLink  = 'K'
	typeGNUSparse = 'S'
)

// header is one entry of a tar, its extensions merged in.
type header struct {
	typ        byte
	name, link string
	mode       int64
	uid, gid   int64
	size       int64 // of the file, bytes; of a sparse file the logical one
	mtimeSec   int64
	mtimeNsec  uint32
	devMajor   int64
	devMinor   int64
	xattrs     []tree.Xattr
	isSparse   bool
	sparse     []segment // where a sparse file's data lies in it, in the order of the data
}

// segment is a run of a file's bytes.
type segment struct{ off, length int64 }

// input is what a scanner reads, with the methods of a bufio.Reader. It is asked
// to show one byte, or at most as many as it has buffered.
type input interface {
	io.Reader
	Buffered() int
	Peek(n int) ([]byte, error)
	Discard(n int) (int, error)
}

// scanner reads the entries of a tar.
type scanner struct {
	r    input
	off  int64 // bytes of the tar taken so far
	data int64 // bytes of the latest entry's data that are not yet taken
	pad  int64 // bytes between that data and the next header
	blk  [blockSize]byte

	latest header // what next has returned
}

var (
	errChecksum = errors.New("not a tar header: its checksum does not match")
	errNumber   = errors.New("a numeric field holds no number")
	errPAX      = errors.New("malformed PAX records")
	errSize     = errors.New("negative or overflowing size")
	errSparse   = errors.New("malformed sparse map")
	errSpecial  = errors.New("extension or sparse map of more than 1 MiB")
)

// peek returns the next bytes of the data, at least one and at most n. They
// are valid until the next call.
func (s *scanner) peek(n int64) ([]byte, error) {
	if s.data < 1 {
		return nil, io.ErrUnexpectedEOF
	}
	if _, err := s.r.Peek(1); err != nil {
		return nil, err
	}
	return s.r.Peek(int(min(n, s.data, int64(s.r.Buffered()))))
}

// advance takes n bytes that peek showed.
func (s *scanner) advance(n int) {
	_, _ = s.r.Discard(n) // buffered: it cannot fail
	s.off += int64(n)
	s.data -= int64(n)
}

// full takes the next len(buf) bytes of the data. It returns them where they
// lie, valid until the next call, or in buf.
func (s *scanner) full(buf []byte) ([]byte, error) {
	if int64(len(buf)) > s.data {
		return nil, io.ErrUnexpectedEOF
	}
	if s.r.Buffered() >= len(buf) {
		p, err := s.r.Peek(len(buf))
		s.advance(len(p))
		return p, err
	}
	n, err := io.ReadFull(s.r, buf)
	s.off += int64(n)
	s.data -= int64(n)
	return buf, err
}

// block takes the next 512 bytes of the tar. io.EOF means that not one was
// left.
func (s *scanner) block() error {
	n, err := io.ReadFull(s.r, s.blk[:])
	s.off += int64(n)
	return err
}

func (s *scanner) skip(n int64) error {
	for n > 0 {
		k, err := s.r.Discard(int(min(n, 1<<30)))
		s.off += int64(k)
		n -= int64(k)
		if err != nil {
			return err
		}
	}
	return nil
}

// expect tells the scanner how many bytes of data follow the header.
func (s *scanner) expect(h *header) error {
	n := h.size
	switch h.typ {
	case typeLink, typeSymlink, typeChar, typeBlock, typeDir, typeFifo:
		n = 0 // these have none, whatever the field says
	}
	if n < 0 || n > math.MaxInt64-blockSize {
		return errSize
	}
	s.data, s.pad = n, -n&(blockSize-1)
	return nil
}

// next returns the next entry, its data still to be read. It is valid until the
// next call. io.EOF is the end of the archive.
func (s *scanner) next() (*header, error) {
	var px pax
	var longName, longLink string
	for {
		if err := s.skip(s.data); err != nil {
			return nil, noEOF(err)
		}
		s.data = 0
		if err := s.skip(s.pad); err != nil {
			return nil, err // EOF: some writers leave out the last padding
		}
		s.pad = 0
		h, err := s.header()
		if err != nil {
			return nil, err
		}
		if err := s.expect(h); err != nil {
			return nil, err
		}
		switch h.typ {
		case typePAX, typeGlobal:
			b, err := s.special()
			if err != nil {
				return nil, err
			}
			if px, err = parsePAX(b); err != nil {
				return nil, err
			}
			if h.typ == typeGlobal {
				return h, nil // engines ignore global records
			}
		case typeLongName, typeLongLink:
			b, err := s.special()
			if err != nil {
				return nil, err
			}
			if h.typ == typeLongName {
				longName = cString(b)
			} else {
				longLink = cString(b)
			}
		default:
			if err := px.apply(h); err != nil {
				return nil, err
			}
			if longName != "" {
				h.name = longName
			}
			if longLink != "" {
				h.link = longLink
			}
			if h.typ == typeRegularV7 {
				h.typ = typeRegular
				if strings.HasSuffix(h.name, "/") {
					h.typ = typeDir
				}
			}
			if err := s.expect(h); err != nil { // PAX may have changed size
				return nil, err
			}
			if err := s.sparse(h, &px); err != nil {
				return nil, noEOF(err)
			}
			return h, nil
		}
	}
}

// special takes the data of a header that describes the next one.
func (s *scanner) special() ([]byte, error) {
	if s.data > maxSpecial {
		return nil, errSpecial
	}
	// What is declared is allocated only as far as it arrives.
	var b bytes.Buffer
	n, err := io.CopyN(&b, s.r, s.data)
	s.off += n
	s.data -= n
	return b.Bytes(), noEOF(err)
}

// header takes a header block.
func (s *scanner) header() (*header, error) {
	if err := s.block(); err != nil {
		return nil, err
	}
	b := &s.blk
	if *b == [blockSize]byte{} {
		if err := s.block(); err != nil {
			return nil, err
		}
		if *b == [blockSize]byte{} {
			return nil, io.EOF
		}
		return nil, errors.New("a block of zeros and then none: neither the end nor a header")
	}
	if !checksumOK(b) {
		return nil, errChecksum
	}
	var n number
	s.latest = header{
		typ:      b[156],
		name:     cString(b[:100]),
		link:     cString(b[157:257]),
		mode:     n.parse(b[100:108]),
		uid:      n.parse(b[108:116]),
		gid:      n.parse(b[116:124]),
		size:     n.parse(b[124:136]),
		mtimeSec: n.parse(b[136:148]),
	}
	h := &s.latest
	magic := string(b[257:263])
	gnu := magic == "ustar " && string(b[263:265]) == " \x00"
	if magic == "ustar\x00" || gnu {
		h.devMajor = n.parse(b[329:337])
		h.devMinor = n.parse(b[337:345])
		var prefix string
		switch {
		case gnu:
			// GNU has atime and ctime here. Writers of Go before 1.8, and with
			// them old images, put a prefix there all the same.
			var times number
			for _, f := range [][]byte{b[345:357], b[357:369]} {
				if f[0] != 0 {
					times.parse(f)
				}
			}
			if p := cString(b[345:500]); times.err != nil && isASCII(p) {
				prefix = p
			}
		case string(b[508:512]) == "tar\x00": // star
			prefix = cString(b[345:476])
			n.parse(b[476:488])
			n.parse(b[488:500])
		default:
			prefix = cString(b[345:500])
		}
		if prefix != "" {
			h.name = prefix + "/" + h.name
		}
	}
	return h, n.err
}

func checksumOK(b *[blockSize]byte) bool {
	var n number
	want := n.parseOctal(b[148:156])
	if n.err != nil {
		return false
	}
	// The sums of even and odd bytes, four of each at a time, in lanes of 16
	// bits: 512 bytes cannot fill one.
	const even = 0x00ff00ff00ff00ff
	var lanes uint64
	for i := 0; i < blockSize; i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		lanes += w&even + w>>8&even
	}
	unsigned := int64(lanes&0xffff + lanes>>16&0xffff + lanes>>32&0xffff + lanes>>48)
	for _, c := range b[148:156] {
		unsigned += ' ' - int64(c)
	}
	if want == unsigned {
		return true
	}
	// Old Sun tars summed signed bytes.
	signed := unsigned
	for i, c := range b {
		if c >= 0x80 && (i < 148 || i >= 156) {
			signed -= 0x100
		}
	}
	return want == signed
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// number parses numeric fields; its error stays.
type number struct{ err error }

// parse reads octal digits or, when the highest bit is set, a two's
// complement number in base 256.
func (n *number) parse(b []byte) int64 {
	if b[0]&0x80 == 0 {
		return n.parseOctal(b)
	}
	var x int64
	if b[0]&0x40 != 0 {
		x = -1
	}
	for i, c := range b {
		if i == 0 {
			c = byte(int8(c<<1) >> 1) // without the marker
		}
		if x > math.MaxInt64>>8 || x < math.MinInt64>>8 {
			n.err = errNumber
			return 0
		}
		x = x<<8 | int64(c)
	}
	return x
}

func (n *number) parseOctal(b []byte) int64 {
	b = bytes.Trim(b, " \x00")
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	var x int64
	for _, c := range b {
		if c < '0' || c > '7' || x > math.MaxInt64>>3 {
			n.err = errNumber
			return 0
		}
		x = x<<3 | int64(c-'0')
	}
	return x
}

// pax holds the PAX records that matter here. An empty string is an absent
// record, as for archive/tar.
type pax struct {
	path, link, size, uid, gid, mtime string
	atime, ctime                      string // checked, not kept
	xattrs                            []tree.Xattr

	// GNU's sparse formats.
	major, minor           string
	sparseName             string
	sparseSize, realSize   string
	sparseCount, sparseMap string
}

const xattrRecord = "SCHILY.xattr."

func parsePAX(b []byte) (pax, error) {
	var px pax
	var version00 []string // offset, length, offset, …: format 0.0 repeats records
	for len(b) > 0 {
		// "LENGTH KEY=VALUE\n", LENGTH counting all of it.
		digits, rest, ok := bytes.Cut(b, []byte{' '})
		length, err := strconv.ParseInt(string(digits), 10, 64)
		if !ok || err != nil || length < 5 || length > int64(len(b)) || length <= int64(len(digits))+1 {
			return pax{}, errPAX
		}
		record := rest[:length-int64(len(digits))-1]
		b = b[length:]
		key, value, ok := strings.Cut(string(record[:len(record)-1]), "=")
		if !ok || key == "" || record[len(record)-1] != '\n' {
			return pax{}, errPAX
		}
		switch key {
		case "path", "linkpath", "uname", "gname":
			if strings.Contains(value, "\x00") {
				return pax{}, errPAX
			}
		default:
			if strings.Contains(key, "\x00") {
				return pax{}, errPAX
			}
		}
		switch key {
		case "path":
			px.path = value
		case "linkpath":
			px.link = value
		case "size":
			px.size = value
		case "uid":
			px.uid = value
		case "gid":
			px.gid = value
		case "mtime":
			px.mtime = value
		case "atime":
			px.atime = value
		case "ctime":
			px.ctime = value
		case "GNU.sparse.major":
			px.major = value
		case "GNU.sparse.minor":
			px.minor = value
		case "GNU.sparse.name":
			px.sparseName = value
		case "GNU.sparse.size":
			px.sparseSize = value
		case "GNU.sparse.realsize":
			px.realSize = value
		case "GNU.sparse.numblocks":
			px.sparseCount = value
		case "GNU.sparse.map":
			px.sparseMap = value
		case "GNU.sparse.offset", "GNU.sparse.numbytes":
			if isOffset := key == "GNU.sparse.offset"; isOffset != (len(version00)%2 == 0) || strings.Contains(value, ",") {
				return pax{}, errPAX
			}
			version00 = append(version00, value)
		default:
			if name, ok := strings.CutPrefix(key, xattrRecord); ok {
				px.setXattr(name, value)
			}
		}
	}
	if len(version00) > 0 {
		px.sparseMap = strings.Join(version00, ",")
	}
	return px, nil
}

func (px *pax) setXattr(name, value string) {
	for i := range px.xattrs {
		if px.xattrs[i].Name == name {
			px.xattrs[i].Value = []byte(value)
			return
		}
	}
	px.xattrs = append(px.xattrs, tree.Xattr{Name: name, Value: []byte(value)})
}

// apply lets the records replace the fields of h.
func (px *pax) apply(h *header) error {
	for _, f := range []struct {
		record string
		field  *string
	}{{px.path, &h.name}, {px.link, &h.link}} {
		if f.record != "" {
			*f.field = f.record
		}
	}
	for _, f := range []struct {
		record string
		field  *int64
	}{{px.size, &h.size}, {px.uid, &h.uid}, {px.gid, &h.gid}} {
		if f.record == "" {
			continue
		}
		v, err := strconv.ParseInt(f.record, 10, 64)
		if err != nil {
			return errPAX
		}
		*f.field = v
	}
	if px.mtime != "" {
		var ok bool
		if h.mtimeSec, h.mtimeNsec, ok = parseTime(px.mtime); !ok {
			return errPAX
		}
	}
	for _, other := range []string{px.atime, px.ctime} {
		if other == "" {
			continue
		}
		if _, _, ok := parseTime(other); !ok {
			return errPAX
		}
	}
	h.xattrs = px.xattrs
	return nil
}

// parseTime reads decimal seconds with a fraction, cut to nanoseconds.
func parseTime(s string) (sec int64, nsec uint32, ok bool) {
	whole, fraction, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return 0, 0, false
	}
	for i := range len(fraction) {
		if fraction[i] < '0' || fraction[i] > '9' {
			return 0, 0, false
		}
	}
	for i := range 9 {
		nsec *= 10
		if i < len(fraction) {
			nsec += uint32(fraction[i] - '0')
		}
	}
	if whole[0] == '-' && nsec > 0 {
		if sec == math.MinInt64 {
			return 0, 0, false
		}
		sec, nsec = sec-1, 1e9-nsec
	}
	return sec, nsec, true
}
