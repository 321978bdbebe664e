package convert

import (
	"cmp"
	"slices"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/registrystore"
)

// What keeps an image that grows out of its predecessors readable with few
// requests. Each new version adds a pack of a few chunks; so that these do not
// pile up, they are merged before they are more than maxSmall: all but the
// largest keepSmall are written anew, as one pack. A chunk is so rewritten a
// few times while it moves from smaller to larger packs, not once a version.
const (
	maxSmall  = 8
	keepSmall = 4
	// maxSmallStart and keepSmallStart do the same for the packs of the start
	// set: a start is so many requests.
	maxSmallStart  = 3
	keepSmallStart = 1
	// startUse is the part of a pack of the start set that a start has to need
	// for the pack to stay one: the rest is fetched for nothing, so that a start
	// moves 1.15 times what it reads at most.
	startUse = 0.87
)

// DefaultRewriteBelow is the part of a base's packs, all in all, that must be
// used for them to be referred to, unless the options say otherwise.
const DefaultRewriteBelow = 0.5

// leastUse is the part of it that each single pack must reach: below, what
// there is to rewrite is little beside what it frees.
const leastUse = 0.2

// wantedChunk is a distinct chunk of a new image that is to be stored.
type wantedChunk struct {
	index.Chunk      // where the image has it first
	start       bool // it belongs to the start set
	rank        int  // of those: when it is read first, 0 where that is not known
	cached      bool // a cache knows it: its bytes were not read
	stored      int  // bytes of the stored form, where a cache knows it
}

// reuse says what of a base a new image refers to.
type reuse struct {
	kept []keptPack // those of the start set first, else in the order of the base
	// at has the place of each chunk that need not be stored; Pack counts kept.
	at map[index.ID]registrystore.Location
}

// keptPack is a pack of a base that the new image refers to.
type keptPack struct {
	registrystore.PackDescriptor             // Start as the new image has it
	number                       int         // among the packs of the base
	probe                        index.Chunk // the last of the chunks in it that the image has
}

// packRole is what a pack of a base is to a new image.
type packRole int

const (
	unusedPack packRole = iota
	ordinaryPack
	startPack
)

// planReuse decides which packs of b an image of chunks refers to. below is
// the part of them, all in all, that has to be used. The decision depends on
// its arguments alone, and an image that it leaves without anything to store
// refers to exactly what b refers to.
func planReuse(b *baseImage, chunks []wantedChunk, below float64) reuse {
	role := make([]packRole, len(b.packs))
	used := make([]int64, len(b.packs)) // bytes of what role says
	sum := func(counts func(wantedChunk, int) bool) {
		clear(used)
		for _, c := range chunks {
			if at, ok := b.find(c.ID); ok && counts(c, at.Pack) {
				used[at.Pack] += int64(at.Length)
			}
		}
	}
	isSmall := func(p int) bool { return b.packs[p].Size < registrystore.MinPack }
	fills := func(p int, part float64) bool {
		return used[p] > 0 && float64(used[p]) >= part*float64(b.packs[p].Size)
	}

	sum(func(c wantedChunk, p int) bool { return c.start && b.packs[p].Start })
	var smalls []int
	for p := range b.packs {
		if fills(p, startUse) {
			role[p] = startPack
			if isSmall(p) {
				smalls = append(smalls, p)
			}
		}
	}
	// A chunk of the start set lies in one of its packs, whoever else has it.
	stored := func(c wantedChunk) bool {
		at, ok := b.find(c.ID)
		return ok && (role[at.Pack] == startPack || !c.start && role[at.Pack] == ordinaryPack)
	}
	// merge gives up the smaller ones of smalls where they and what is to be
	// stored beside them are more than most.
	merge := func(smalls []int, most, keep int, more func(wantedChunk) bool) {
		n := len(smalls)
		if slices.ContainsFunc(chunks, more) {
			n++
		}
		if n <= most {
			return
		}
		slices.SortStableFunc(smalls, func(p, q int) int { return cmp.Compare(b.packs[q].Size, b.packs[p].Size) })
		for _, p := range smalls[keep:] {
			role[p] = unusedPack
		}
	}
	merge(smalls, maxSmallStart, keepSmallStart, func(c wantedChunk) bool { return c.start && !stored(c) })

	sum(func(c wantedChunk, p int) bool { return !c.start && role[p] != startPack })
	var worth []int
	for p := range b.packs {
		if role[p] != startPack && fills(p, below*leastUse) {
			worth = append(worth, p)
		}
	}
	smalls = nil
	for _, p := range b.mostUsed(worth, used, below) {
		role[p] = ordinaryPack
		if isSmall(p) {
			smalls = append(smalls, p)
		}
	}
	merge(smalls, maxSmall, keepSmall, func(c wantedChunk) bool { return !c.start && !stored(c) })

	return b.refer(role, chunks, stored)
}

// mostUsed takes from packs those that are used least, until the part below of
// what is left is used: so an image has no more to keep than its bytes divided by
// below, and writes little of what is there again. used counts bytes by pack.
func (b *baseImage) mostUsed(packs []int, used []int64, below float64) []int {
	part := func(p int) float64 { return float64(used[p]) / float64(b.packs[p].Size) }
	slices.SortStableFunc(packs, func(p, q int) int { return cmp.Compare(part(p), part(q)) })
	var uses, size int64
	for _, p := range packs {
		uses, size = uses+used[p], size+b.packs[p].Size
	}
	for ; float64(uses) < below*float64(size); packs = packs[1:] {
		uses, size = uses-used[packs[0]], size-b.packs[packs[0]].Size
	}
	slices.Sort(packs)
	return packs
}

// refer lists the packs that have a role, and places those of chunks that are
// stored in them.
func (b *baseImage) refer(role []packRole, chunks []wantedChunk, stored func(wantedChunk) bool) reuse {
	out := reuse{at: make(map[index.ID]registrystore.Location)}
	place := make([]int, len(b.packs)) // in out.kept
	for _, want := range []packRole{startPack, ordinaryPack} {
		for p, d := range b.packs {
			if role[p] == want {
				place[p] = len(out.kept)
				d.Start = want == startPack
				out.kept = append(out.kept, keptPack{PackDescriptor: d, number: p})
			}
		}
	}
	last := make([]int64, len(out.kept))
	for _, c := range chunks {
		if !stored(c) {
			continue
		}
		at := b.chunks[c.ID]
		at.Pack = place[at.Pack]
		out.at[c.ID] = at
		if end := at.Offset + int64(at.Length); end > last[at.Pack] {
			last[at.Pack], out.kept[at.Pack].probe = end, c.Chunk
		}
	}
	return out
}

// whole reports whether everything of b is kept as it is.
func (r reuse) whole(b *baseImage) bool {
	if len(r.kept) != len(b.packs) {
		return false
	}
	for i, k := range r.kept {
		if k.PackDescriptor != b.packs[i] {
			return false
		}
	}
	return true
}
