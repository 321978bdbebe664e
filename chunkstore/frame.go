package chunkstore

import "encoding/binary"

// Frames that are made by hand: a program that only reads shall not carry an
// encoder.
const (
	frameMagic         = 0xFD2FB528
	frameSingleSegment = 2<<6 | 1<<5 // and a content size of four bytes

	blockLast = 1
	blockRaw  = 0 << 1
	blockRun  = 1 << 1 // one byte, repeated
	maxBlock  = 128 << 10
)

// AppendRaw appends the stored form of plain to dst, uncompressed.
func AppendRaw(dst, plain []byte) []byte {
	return appendBlocks(dst, len(plain), blockRaw, func(dst []byte, n int) []byte {
		dst = append(dst, plain[:n]...)
		plain = plain[n:]
		return dst
	})
}

// AppendZeros appends the stored form of size zeros to dst.
func AppendZeros(dst []byte, size int) []byte {
	return appendBlocks(dst, size, blockRun, func(dst []byte, _ int) []byte { return append(dst, 0) })
}

// appendBlocks appends a frame of size plain bytes, of which content appends
// those of each block.
func appendBlocks(dst []byte, size, kind int, content func(dst []byte, n int) []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, frameMagic)
	dst = append(dst, frameSingleSegment)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(size))
	for {
		n := min(size, maxBlock)
		size -= n
		header := n<<3 | kind
		if size == 0 {
			header |= blockLast
		}
		dst = content(append(dst, byte(header), byte(header>>8), byte(header>>16)), n)
		if size == 0 {
			return dst
		}
	}
}
