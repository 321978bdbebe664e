package layer

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// sparse finds out whether h is a sparse file of one of GNU's four formats,
// takes the map if it lies in front of the data, and checks it.
func (s *scanner) sparse(h *header, px *pax) error {
	var err error
	switch {
	case h.typ == typeGNUSparse:
		err = s.oldSparse(h)
	case px.major == "1" && px.minor == "0":
		if err = px.sparseHeader(h); err == nil {
			h.sparse, err = s.sparse10()
		}
	case px.major == "0" && (px.minor == "0" || px.minor == "1"),
		px.major == "" && px.minor == "" && px.sparseMap != "":
		if err = px.sparseHeader(h); err == nil {
			h.sparse, err = px.sparse01()
		}
	default:
		return nil
	}
	if err != nil {
		return err
	}
	h.isSparse = true
	switch h.typ {
	case typeRegular, typeCont, typeGNUSparse:
	default:
		return errSparse
	}
	// Inside the file, in order, not overlapping, and all of the data that
	// follows.
	var end int64
	left := s.data
	for _, e := range h.sparse {
		if e.off < end || e.length < 0 || e.length > h.size-e.off || e.length > left {
			return fmt.Errorf("%w: %d bytes at %d of a file of %d bytes, %d bytes stored", errSparse, e.length, e.off, h.size, s.data)
		}
		end = e.off + e.length
		left -= e.length
	}
	if h.size < 0 {
		return errSize
	}
	if left > 0 {
		return fmt.Errorf("%w: %d bytes of the data have no place in the file", errSparse, left)
	}
	return nil
}

// sparseHeader puts the name and size of the sparse file in place of those
// that readers are to see who do not know the format.
func (px *pax) sparseHeader(h *header) error {
	if px.sparseName != "" {
		h.name = px.sparseName
	}
	size := px.sparseSize
	if size == "" {
		size = px.realSize
	}
	if size == "" {
		return nil
	}
	var err error
	if h.size, err = strconv.ParseInt(size, 10, 64); err != nil {
		return errSparse
	}
	return nil
}

// oldSparse reads the map in the header itself and the blocks that follow it.
func (s *scanner) oldSparse(h *header) error {
	if string(s.blk[257:265]) != "ustar  \x00" {
		return errSparse // star has another layout under the same type
	}
	var n number
	h.size = n.parse(s.blk[483:495])
	entries, extended := s.blk[386:482], s.blk[482]
	for total := 0; ; total += blockSize {
		if total > maxSpecial {
			return errSpecial
		}
		for ; len(entries) > 0 && entries[0] != 0; entries = entries[24:] {
			h.sparse = append(h.sparse, segment{n.parse(entries[:12]), n.parse(entries[12:24])})
		}
		if n.err != nil {
			return n.err
		}
		if extended == 0 {
			return nil
		}
		if err := s.block(); err != nil {
			return noEOF(err)
		}
		entries, extended = s.blk[:504], s.blk[504]
	}
}

// sparse01 reads the map of the formats 0.0 and 0.1: "offset,length,…".
func (px *pax) sparse01() ([]segment, error) {
	count, err := strconv.ParseInt(px.sparseCount, 10, 64)
	if err != nil {
		return nil, errSparse
	}
	var numbers []string
	if px.sparseMap != "" {
		numbers = strings.Split(px.sparseMap, ",")
	}
	if len(numbers)%2 != 0 || count != int64(len(numbers)/2) {
		return nil, errSparse
	}
	return segments(numbers)
}

// sparse10 reads the map of format 1.0: at the start of the data, a count and
// then that many pairs, a number a line, padded to a block.
func (s *scanner) sparse10() ([]segment, error) {
	var text bytes.Buffer
	lines := 0 // in text
	fill := func(want int) error {
		for lines < want {
			if text.Len() >= maxSpecial {
				return errSpecial
			}
			if s.data < blockSize {
				return io.ErrUnexpectedEOF
			}
			if err := s.block(); err != nil {
				return err
			}
			s.data -= blockSize
			lines += bytes.Count(s.blk[:], []byte{'\n'})
			text.Write(s.blk[:])
		}
		return nil
	}
	if err := fill(1); err != nil {
		return nil, err
	}
	first, err := text.ReadString('\n')
	if err != nil {
		return nil, errSparse
	}
	count, err := strconv.ParseInt(strings.TrimSuffix(first, "\n"), 10, 64)
	if err != nil || count < 0 || count > maxSpecial {
		return nil, errSparse
	}
	lines--
	if err := fill(int(2 * count)); err != nil {
		return nil, err
	}
	return segments(strings.SplitN(text.String(), "\n", int(2*count)+1)[:2*count])
}

func segments(numbers []string) ([]segment, error) {
	list := make([]segment, 0, len(numbers)/2)
	for ; len(numbers) > 0; numbers = numbers[2:] {
		off, err1 := strconv.ParseInt(numbers[0], 10, 64)
		length, err2 := strconv.ParseInt(numbers[1], 10, 64)
		if err1 != nil || err2 != nil {
			return nil, errSparse
		}
		list = append(list, segment{off, length})
	}
	return list, nil
}
