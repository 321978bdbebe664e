package convert

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/reads"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/startset"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// startSet is what a start reads of a root image.
type startSet struct {
	spans []span // sorted, disjoint
	// order are the spans in the order in which they are read; nil where that is
	// not known, and then they are stored in the order of the image.
	order []span
}

// recorded reports whether the set is what a start was seen to read. Its bytes are
// waited for wherever the image starts for the first time.
func (s startSet) recorded() bool { return s.order != nil }

// startBudget bounds the bytes of a start set in a root image of n bytes that
// nobody has recorded. Five percent keep the start of a large image a few requests;
// that much is less than the loader and the C library of a small one, which are one
// request.
func startBudget(n int64) int64 { return max(n/20, 4<<20) }

// startOf says what a start of p reads in the root image of plan: what was
// recorded of earlier ones, or else what the files of t alone tell. missing are
// the files of a record that t does not have; there, the files count beside it.
func startOf(t *tree.Tree, plan *rootimage.Plan, meta *erofs.Reader, recorded []reads.Range, p startset.Program) (out startSet, missing []string, err error) {
	known := make(map[string]bool) // whether t has it
	for _, g := range recorded {
		at, n := t.Resolve(g.Path)
		if n == nil || !n.IsRegular() {
			if has, ok := known[g.Path]; !ok || has {
				known[g.Path], missing = false, append(missing, g.Path)
			}
			continue
		}
		known[at] = true
		to := n.Size
		if g.Size > 0 {
			to = min(to, g.Offset+g.Size)
		}
		if out.order, err = appendSpans(out.order, meta, at, g.Offset, to); err != nil {
			return out, nil, err
		}
	}
	if len(recorded) > 0 && len(missing) == 0 {
		out.spans = sortSpans(slices.Clone(out.order))
		return out, nil, nil
	}
	var files []span
	budget := startBudget(plan.Size())
	for _, f := range startset.Files(t, p) {
		if known[f] {
			continue
		}
		spans, err := appendSpans(nil, meta, f, 0, -1)
		if err != nil {
			return out, nil, err
		}
		// One that does not fit leaves its room to the others.
		for _, s := range spans {
			if s.Size <= budget {
				budget -= s.Size
				files = append(files, s)
			}
		}
	}
	if len(recorded) > 0 {
		out.order = append(out.order, files...)
	}
	out.spans = sortSpans(append(files, out.order...))
	return out, missing, nil
}

// appendSpans appends where the bytes from up to to of the file at p lie in the root
// image that r describes; a to less than 0 is the end of the file.
func appendSpans(out []span, r *erofs.Reader, p string, from, to int64) ([]span, error) {
	n, err := r.Inode(r.RootNID())
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		var nid uint64
		if err == nil {
			nid, err = r.Lookup(n, name)
		}
		if err == nil {
			n, err = r.Inode(nid)
		}
	}
	if to < 0 {
		to = n.Size
	}
	for off := from; err == nil && off < to; {
		var at, length int64
		if at, length, err = r.Span(n, off); err == nil {
			length = min(length, to-off)
			off += length
			if at >= 0 { // not a hole
				out = append(out, span{at, length})
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("start set: %s: %w", p, err)
	}
	return out, nil
}

// units are the units of plan that have a byte of the set, in the order in which
// they are read first.
func (s startSet) units(plan *rootimage.Plan) []unit {
	units := slices.Collect(unitsWith(plan, s.spans))
	rank := make(map[int64]int, len(units)) // by offset
	for r, o := range slices.Backward(s.order) {
		// A span is of one file, and so of one unit.
		i := sort.Search(len(units), func(i int) bool { return units[i].Offset+units[i].Size > o.Offset })
		rank[units[i].Offset] = r
	}
	slices.SortStableFunc(units, func(a, b unit) int { return cmp.Compare(rank[a.Offset], rank[b.Offset]) })
	return units
}

// mark tells the chunks of n which of them are of the set.
func (s startSet) mark(n *named) error {
	x, err := index.Open(n.index)
	if err != nil {
		return err
	}
	order := s.order
	if order == nil {
		order = s.spans
	}
	for r, o := range slices.Backward(order) {
		for pos := x.Find(o.Offset); pos < x.Len(); pos++ {
			c, err := x.At(pos)
			if err != nil {
				return err
			}
			if c.Offset >= o.Offset+o.Size {
				break
			}
			if number := n.first[pos]; number >= 0 {
				n.distinct[number].start = true
				if s.recorded() {
					n.distinct[number].rank = r
				}
			}
		}
	}
	return nil
}

// asRead puts units, and chunks of them, which both are in the order of the image,
// into the order in which they are read first.
func asRead(units []unit, chunks []wantedChunk) ([]unit, []wantedChunk) {
	type group struct {
		unit   unit
		chunks []wantedChunk
		rank   int
	}
	groups := make([]group, len(units))
	for i, u := range units {
		k := 0
		for k < len(chunks) && chunks[k].Offset < u.Offset+u.Size {
			k++
		}
		g := group{unit: u, chunks: chunks[:k]}
		chunks = chunks[k:]
		if k > 0 {
			g.rank = slices.MinFunc(g.chunks, func(a, b wantedChunk) int { return cmp.Compare(a.rank, b.rank) }).rank
		}
		groups[i] = g
	}
	slices.SortStableFunc(groups, func(a, b group) int { return cmp.Compare(a.rank, b.rank) })
	var sorted []wantedChunk
	for i, g := range groups {
		units[i] = g.unit
		sorted = append(sorted, g.chunks...)
	}
	return units, sorted
}

// sortSpans sorts by offset and joins what touches: files may share blocks.
func sortSpans(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.Offset, b.Offset) })
	out := spans[:0]
	for _, s := range spans {
		if k := len(out) - 1; k >= 0 && s.Offset <= out[k].Offset+out[k].Size {
			out[k].Size = max(out[k].Size, s.Offset+s.Size-out[k].Offset)
			continue
		}
		out = append(out, s)
	}
	return out
}
