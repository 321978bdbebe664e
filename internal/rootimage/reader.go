package rootimage

import (
	"fmt"
	"io"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// reader streams the bytes of one unit: file by file, each segment padded with
// zeros to a whole block.
type reader struct {
	plan *Plan
	rest []byte // of the metadata, if that is the unit
	left int64  // bytes of the unit's files to come

	next  int // in plan.files, behind the current file
	inode *tree.Inode
	segs  []erofs.Segment // of the current file, from the current segment on
	done  int64           // bytes of the current segment that were read, with padding
}

func (r *reader) Read(p []byte) (int, error) {
	if len(r.rest) > 0 {
		n := copy(p, r.rest)
		r.rest = r.rest[n:]
		return n, nil
	}
	n := 0
	for n < len(p) && r.left > 0 {
		if len(r.segs) == 0 {
			r.inode = r.plan.layout.Inode(r.plan.files[r.next].inode)
			r.segs = erofs.Segments(r.inode)
			r.next++
		}
		s := r.segs[0]
		padded := (s.Size + erofs.BlockSize - 1) &^ (erofs.BlockSize - 1)
		part := p[n:min(int64(len(p)), int64(n)+padded-r.done)]
		data := part[:max(0, min(int64(len(part)), s.Size-r.done))]
		clear(part[len(data):])
		if len(data) > 0 {
			if _, err := r.inode.ReadAt(data, s.Offset+r.done); err != nil {
				return n, fmt.Errorf("%q: %w", r.plan.layout.Path(r.plan.files[r.next-1].inode), err)
			}
		}
		n += len(part)
		r.left -= int64(len(part))
		if r.done += int64(len(part)); r.done == padded {
			r.segs, r.done = r.segs[1:], 0
		}
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}
