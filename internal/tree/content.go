package tree

import (
	"fmt"
	"io"
	"sort"
)

// ReadAt reads the bytes of a regular file, holes as zeros. It keeps the
// contract of [io.ReaderAt], so that io.NewSectionReader(n, 0, n.Size) reads
// the whole file.
func (n *Inode) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read file of %d bytes: negative offset %d", n.Size, off)
	}
	if off >= n.Size {
		return 0, io.EOF
	}
	want := len(p)
	if int64(want) > n.Size-off {
		p = p[:n.Size-off]
	}
	c := &n.Content
	// The first extent that ends behind off.
	i := sort.Search(len(c.Extents), func(i int) bool {
		return c.Extents[i].Logical+c.Extents[i].Length > off
	})
	done := 0
	for done < len(p) {
		at := off + int64(done)
		q := p[done:]
		if i == len(c.Extents) || at < c.Extents[i].Logical {
			if i < len(c.Extents) {
				q = q[:min(int64(len(q)), c.Extents[i].Logical-at)]
			}
			clear(q)
			done += len(q)
			continue
		}
		e := c.Extents[i]
		into := at - e.Logical
		q = q[:min(int64(len(q)), e.Length-into)]
		m, err := c.Source.ReadAt(q, e.Physical+into)
		done += m
		if m < len(q) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return done, fmt.Errorf("read file of %d bytes at %d (%d in the layer): %w", n.Size, at, e.Physical+into, err)
		}
		i++
	}
	if done < want {
		return done, io.EOF
	}
	return done, nil
}
