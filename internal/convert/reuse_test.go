package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/registrystore"
)

// lineage packs the versions of an image one on top of the other, without the
// bytes of files: a chunk is a number, and its stored form so many zeros.
type lineage struct {
	t     *testing.T
	below float64
	sizes map[index.ID]int // stored
}

func (l *lineage) chunk(n int, start bool) wantedChunk {
	var key [8]byte
	binary.LittleEndian.PutUint64(key[:], uint64(n))
	id := index.ID(sha256.Sum256(key[:]))
	l.sizes[id] = 8<<10 + int(binary.LittleEndian.Uint32(id[4:]))%(40<<10) // 28 KiB on average
	return wantedChunk{Chunk: index.Chunk{ID: id, Size: 64 << 10}, start: start}
}

// next makes the packs of an image on top of b, which may be nil.
func (l *lineage) next(b *baseImage, chunks []wantedChunk) (img *baseImage, report PlatformReport) {
	l.t.Helper()
	r := reuse{at: map[index.ID]registrystore.Location{}}
	if b != nil {
		r = planReuse(b, chunks, l.below)
	}
	w := registrystore.NewPackWriter(l.t.Context(), l.t.TempDir(), func(context.Context, registrystore.Pack) error { return nil })
	s := &packs{w: w, base: b}
	for _, start := range []bool{true, false} {
		for _, c := range chunks {
			if _, ok := r.at[c.ID]; ok || c.start != start {
				continue
			}
			at, err := s.add(c.ID, make([]byte, l.sizes[c.ID]), start)
			if err != nil {
				l.t.Fatal(err)
			}
			at.Pack += len(r.kept)
			r.at[c.ID] = at
		}
	}
	added, err := w.Close()
	if err != nil {
		l.t.Fatal(err)
	}
	var list []registrystore.Pack
	for _, k := range r.kept {
		list = append(list, registrystore.Pack{PackDescriptor: k.PackDescriptor})
	}
	for i, d := range added {
		list = append(list, registrystore.Pack{PackDescriptor: d})
		report.NewChunkBytes += s.written[i].added
		report.StartPackBytes += s.written[i].start
		report.RewrittenBytes += s.written[i].again
	}
	list, to := startFirst(list)
	img = &baseImage{chunks: map[index.ID]registrystore.Location{}, gone: make([]bool, len(list))}
	for _, p := range list {
		img.packs = append(img.packs, p.PackDescriptor)
	}
	for _, c := range chunks {
		at := r.at[c.ID]
		at.Pack = to[at.Pack]
		img.chunks[c.ID] = at
		report.stored(at.Length, c.start)
	}
	report.count(list)
	return img, report
}

// TestLineage packs thirty versions on top of one another, as a service that
// is rebuilt with every commit. What is written beside the new chunks, how many
// packs an image has and what of them it does not use stay bounded; and a
// version on top of itself is itself.
func TestLineage(t *testing.T) {
	const (
		versions = 30
		size     = 6000 // chunks; 168 MB as they are stored
		starts   = 200  // of them, in the start set
	)
	for _, tt := range []struct {
		name    string
		changed int     // chunks in each version
		start   float64 // part of them that is in the start set
		extra   float64 // most that is written beside the new chunks, times these
	}{
		{"a hundredth", size / 100, 0, 0.8},
		{"a hundredth, some of the start set", size / 100, 0.2, 3},
		{"a few chunks", 5, 0.2, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &lineage{t: t, below: DefaultRewriteBelow, sizes: map[index.ID]int{}}
			r := rand.New(rand.NewPCG(1, 2))
			numbers := make([]int, size)
			for i := range numbers {
				numbers[i] = i
			}
			var b *baseImage
			var added, extra int64
			var packs int
			for v := range versions + 1 {
				chunks := make([]wantedChunk, size)
				for i, n := range numbers {
					chunks[i] = l.chunk(n, i < starts)
				}
				img, p := l.next(b, chunks)
				if b == nil {
					packs = p.Packs
				} else {
					added += p.NewChunkBytes
					extra += p.StartPackBytes + p.RewrittenBytes
					t.Logf("version %d: %d packs; %d kB of new chunks, %d for the start set, %d rewritten; %d of %d not used",
						v, p.Packs, p.NewChunkBytes/1000, p.StartPackBytes/1000, p.RewrittenBytes/1000, p.UnusedBytes/1000, (p.StoredBytes+p.UnusedBytes)/1000)
				}
				if most := packs + maxSmall + maxSmallStart; p.Packs > most {
					t.Errorf("version %d: %d packs, want at most %d", v, p.Packs, most)
				}
				if p.UnusedBytes > p.StoredBytes {
					t.Errorf("version %d: %d bytes of packs are not used, %d are", v, p.UnusedBytes, p.StoredBytes)
				}
				again, w := l.next(img, chunks)
				if w.NewChunkBytes+w.StartPackBytes+w.RewrittenBytes != 0 || !slices.Equal(again.packs, img.packs) || !maps.Equal(again.chunks, img.chunks) {
					t.Fatalf("version %d: on top of itself it is another one", v)
				}
				b = img
				for range tt.changed {
					i := starts + r.IntN(size-starts)
					if r.Float64() < tt.start {
						i = r.IntN(starts)
					}
					numbers[i] = (v+1)*size + i
				}
			}
			t.Logf("%.2f times the new chunks written beside them", float64(extra)/float64(added))
			if float64(extra) > tt.extra*float64(added) {
				t.Errorf("%d bytes written beside %d of new chunks", extra, added)
			}
		})
	}
}

// TestPlanReuseWhole wants an unchanged image to keep its packs in their order.
func TestPlanReuseWhole(t *testing.T) {
	l := &lineage{t: t, below: DefaultRewriteBelow, sizes: map[index.ID]int{}}
	var chunks []wantedChunk
	for i := range 900 {
		chunks = append(chunks, l.chunk(i, i%9 == 0))
	}
	b, _ := l.next(nil, chunks)
	if r := planReuse(b, chunks, DefaultRewriteBelow); !r.whole(b) {
		t.Errorf("kept %+v of %+v", r.kept, b.packs)
	}
	if r := planReuse(b, chunks[:800], DefaultRewriteBelow); !r.whole(b) || len(r.at) != 800 {
		t.Errorf("without a ninth: kept %+v of %+v", r.kept, b.packs)
	}
	b.gone[len(b.packs)-1] = true
	if r := planReuse(b, chunks, DefaultRewriteBelow); r.whole(b) || len(r.kept) != len(b.packs)-1 {
		t.Errorf("with a pack gone: kept %+v of %+v", r.kept, b.packs)
	}
}

// TestPlanReusePart gives up the packs that are used least, until what is left
// is used as asked.
func TestPlanReusePart(t *testing.T) {
	const size = 1000 // bytes of a pack, which has ten chunks
	for _, tt := range []struct {
		name  string
		used  []int // chunks of each pack
		below float64
		want  string // what is kept, by number
	}{
		{"all are used", []int{10, 10, 10}, 1, "[0 1 2]"},
		{"one is not", []int{10, 0, 10}, 0.5, "[0 2]"},
		{"half of them all", []int{2, 10, 3}, 0.5, "[0 1 2]"},
		{"less than half", []int{2, 8, 3}, 0.5, "[1 2]"},
		{"much less", []int{2, 4, 3}, 0.5, "[]"},
		{"the first of two alike", []int{9, 3, 3, 3}, 0.5, "[0 2 3]"},
		{"a tenth of one", []int{10, 10, 1}, 0.5, "[0 1 2]"},
		{"less than what one needs", []int{10, 10, 1}, 0.6, "[0 1]"},
		{"more is asked", []int{9, 10, 8}, 1, "[1]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := &baseImage{chunks: map[index.ID]registrystore.Location{}, gone: make([]bool, len(tt.used))}
			var chunks []wantedChunk
			for p, n := range tt.used {
				b.packs = append(b.packs, registrystore.PackDescriptor{Digest: fmt.Sprint(p), Size: size})
				for i := range 10 {
					id := index.ID{byte(p), byte(i)}
					b.chunks[id] = registrystore.Location{Pack: p, Offset: int64(i) * size / 10, Length: size / 10}
					if i < n {
						chunks = append(chunks, wantedChunk{Chunk: index.Chunk{ID: id, Size: 300}})
					}
				}
			}
			r := planReuse(b, chunks, tt.below)
			kept, used := []int{}, 0
			for _, k := range r.kept {
				kept = append(kept, k.number)
				used += tt.used[k.number]
			}
			if fmt.Sprint(kept) != tt.want || len(r.at) != used {
				t.Errorf("kept packs %v with %d chunks, want %s with all of theirs", kept, len(r.at), tt.want)
			}
		})
	}
}

// TestBaseRead refuses locators that no honest converter writes.
func TestBaseRead(t *testing.T) {
	pack := registrystore.PackDescriptor{Digest: "sha256:" + strings.Repeat("ab", 32), Size: 1000}
	for _, tt := range []struct {
		name   string
		chunks []byte // each a name
		at     []registrystore.Location
		want   string
	}{
		{"honest", []byte("aab"), []registrystore.Location{{Length: 400}, {Length: 400}, {Offset: 400, Length: 600}}, ""},
		{"two places", []byte("aab"), []registrystore.Location{{Length: 400}, {Offset: 1, Length: 400}, {Offset: 400, Length: 600}}, "at two places"},
		{"one over the other", []byte("abc"), []registrystore.Location{{Length: 400}, {Length: 400}, {Length: 400}}, "more into pack"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var file bytes.Buffer
			w := index.NewWriter(&file, chunker.V1, index.SHA256)
			for _, c := range tt.chunks {
				if err := w.Append(index.ID{c}, 64<<10); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			x, err := index.Open(file.Bytes())
			if err != nil {
				t.Fatal(err)
			}
			l, err := registrystore.EncodeLocators(x, []registrystore.PackDescriptor{pack}, tt.at)
			if err != nil {
				t.Fatal(err)
			}
			var b baseImage
			err = b.read(&assembly.Contents{Index: file.Bytes(), Locators: l})
			if tt.want == "" && (err != nil || len(b.chunks) != 2) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v with %d chunks, want an error with %q", err, len(b.chunks), tt.want)
			}
		})
	}
}
