package erofs

import (
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Segment is a part of a regular file that stands in the root image.
type Segment struct {
	Offset, Size int64 // in the file, bytes; Offset is a multiple of BlockSize
}

// Segments returns the parts of regular file n that stand in the root image,
// in order. There they follow one another, each from a new block. Most files
// are one segment; holes of 1 MiB and more are left out.
func Segments(n *tree.Inode) []Segment {
	if n.Size == 0 {
		return nil
	}
	if !sparse(n) {
		return []Segment{{0, n.Size}}
	}
	chunk := chunkSize(n.Size)
	var segs []Segment
	for _, e := range n.Content.Extents {
		start := e.Logical &^ (chunk - 1)
		end := min(alignUp(e.Logical+e.Length, chunk), n.Size)
		if k := len(segs) - 1; k >= 0 && start <= segs[k].Offset+segs[k].Size {
			segs[k].Size = end - segs[k].Offset
		} else {
			segs = append(segs, Segment{start, end - start})
		}
	}
	return segs
}

// Blocks returns how many blocks regular file n takes in the root image.
func Blocks(n *tree.Inode) int64 {
	if !sparse(n) {
		return alignUp(n.Size, BlockSize) / BlockSize
	}
	var blocks int64
	for _, s := range Segments(n) {
		blocks += alignUp(s.Size, BlockSize) / BlockSize
	}
	return blocks
}

// sparse reports whether n has a hole that is worth a chunk table. Smaller
// holes are written as zeros.
func sparse(n *tree.Inode) bool {
	if n.Size < minHole {
		return false
	}
	var end int64
	for _, e := range n.Content.Extents {
		if e.Logical-end >= minHole {
			return true
		}
		end = e.Logical + e.Length
	}
	return n.Size-end >= minHole
}

// chunkSize is the granularity of holes in a sparse file of size bytes. It
// grows with the square root of the size, so that neither the table (4 bytes
// per chunk) nor the zeros around a lone byte (up to one chunk) get large: 64
// KiB up to 4 MiB, 1 MiB at 1 GiB, 32 MiB at 1 TiB.
func chunkSize(size int64) int64 {
	chunk := int64(64 << 10)
	for chunk*chunk/1024 < size {
		chunk *= 2
	}
	return chunk
}

// chunks is the length of the chunk table of a sparse file of size bytes.
func chunks(size int64) int64 {
	chunk := chunkSize(size)
	return (size + chunk - 1) / chunk
}
