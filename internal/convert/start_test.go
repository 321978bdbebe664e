package convert

import (
	"bytes"
	"cmp"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/reads"
	"github.com/container-bootfs/bootfs/registrystore"
)

// recordedStart is a start of wideLayer that reads more than its program, in
// another order than that of the image.
var recordedStart = []reads.Range{
	{Path: "/data/file30", Offset: 0, Size: 600_000},
	{Path: "/data/small007", Offset: 0, Size: 100},
	{Path: "/data/file05", Offset: 100_000, Size: 50_000},
	{Path: "/bin/app", Offset: 4096, Size: 1 << 40},
	{Path: "/data/file30", Offset: 8192, Size: 4096},
}

// startPlaces returns the places of the start set of img as the locators have it,
// and of the chunks in which ranges lie, both in the order of their packs.
func startPlaces(t *testing.T, img *converted.Image, ranges []reads.Range) (have, want []registrystore.Location) {
	t.Helper()
	place := func(pos int) registrystore.Location {
		at, err := img.Locators.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	for pos := range img.Locators.StartSet() {
		have = append(have, place(pos))
	}
	meta, err := erofs.NewReader(img.Meta)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range ranges {
		spans, err := appendSpans(nil, meta, g.Path, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		at := spans[0].Offset // one, as the files have no holes
		for pos := img.Index.Find(at + g.Offset); pos < img.Index.Len(); pos++ {
			c, err := img.Index.At(pos)
			if err != nil {
				t.Fatal(err)
			}
			if c.Offset >= at+min(g.Offset+g.Size, spans[0].Size) {
				break
			}
			want = append(want, place(pos))
		}
	}
	byPlace := func(a, b registrystore.Location) int {
		return cmp.Or(cmp.Compare(a.Pack, b.Pack), cmp.Compare(a.Offset, b.Offset))
	}
	for _, list := range []*[]registrystore.Location{&have, &want} {
		slices.SortFunc(*list, byPlace)
		*list = slices.Compact(*list)
	}
	return have, want
}

// TestRecordedStart wants the chunks of a recorded start, and no others, behind one
// another in one pack, as they were read; at any parallelism the same.
func TestRecordedStart(t *testing.T) {
	src := plainImage(t, wideLayer())
	var first map[string]string
	for _, procs := range []int{1, 2, 8} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		dst := ociRef(t)
		p := convertTo(t, src, dst, func(o *Options) { o.StartSet = recordedStart }).Platforms[0]
		files := blobs(t, dst.Path)
		if first == nil {
			first = files
		}
		if !maps.Equal(files, first) {
			t.Errorf("GOMAXPROCS=%d: another layout", procs)
		}
		root, img := rootOf(t, dst)
		if !img.Config.Recorded {
			t.Error("the image does not say that its start was recorded")
		}
		for pos := range img.Locators.StartSet() {
			c, err := img.Index.At(pos)
			if err != nil {
				t.Fatal(err)
			}
			at, err := img.Locators.At(pos)
			if err != nil {
				t.Fatal(err)
			}
			if want := len(chunkstore.EncodeThoroughly(nil, root[c.Offset:c.Offset+int64(c.Size)])); at.Length != want {
				t.Errorf("the chunk at %d has %d stored bytes, want %d", c.Offset, at.Length, want)
			}
		}
		have, want := startPlaces(t, img, recordedStart)
		if !slices.Equal(have, want) || len(have) != p.StartChunks {
			t.Errorf("got %v, want %v; report %d", have, want, p.StartChunks)
		}
		end := int64(0)
		for _, at := range have {
			if at.Pack != 0 || at.Offset != end {
				t.Errorf("a chunk lies at %+v, want it at %d of the first pack", at, end)
			}
			end = at.Offset + int64(at.Length)
		}
		// Files follow one another as they were read first.
		last := int64(-1)
		for _, g := range recordedStart[:4] {
			_, of := startPlaces(t, img, []reads.Range{g})
			if of[0].Offset <= last {
				t.Errorf("%s begins at %d, want it behind %d", g.Path, of[0].Offset, last)
			}
			last = of[len(of)-1].Offset
		}
		wantRoot(t, dst, wideLayer())
	}
}

// TestRecordedStartOnBase records the start of an image that is there: the start set
// gets a pack of its own, once, and the next version what has changed of it.
func TestRecordedStartOnBase(t *testing.T) {
	reg := newRegistry(t)
	dst := reg.image("app:latest")
	convertTo(t, plainImage(t, wideLayer()), dst, nil)
	recorded := func(o *Options) { o.StartSet = recordedStart }
	r := convertTo(t, plainImage(t, wideLayer()), dst, recorded)
	p := r.Platforms[0]
	// The pack with the program stays one of the start set.
	if p.NewChunkBytes != 0 || p.RewrittenBytes != 0 || p.StartPackBytes == 0 || p.StartPackBytes >= p.StartBytes {
		t.Errorf("on top of the image without: %+v", p)
	}
	_, img := rootOf(t, dst)
	cheap(t, img)
	if again := convertTo(t, plainImage(t, wideLayer()), dst, recorded); again.Digest != r.Digest || again.Platforms[0].NewBytes != 0 {
		t.Errorf("the same again is %s, want %s: %+v", again.Digest, r.Digest, again.Platforms[0])
	}
	p = convertTo(t, plainImage(t, secondVersion()), dst, recorded).Platforms[0]
	if p.StartPackBytes > p.StartBytes/2 || p.RewrittenBytes != 0 {
		t.Errorf("the next version: %+v", p)
	}
	_, img = rootOf(t, dst)
	cheap(t, img)
	wantRoot(t, dst, secondVersion())
}

// cheap wants a start of img to take few requests and to move little more than it
// reads.
func cheap(t *testing.T, img *converted.Image) {
	t.Helper()
	have, want := startPlaces(t, img, recordedStart)
	if moved, read := total(have), total(want); moved*100 > read*115 || read == 0 || have[len(have)-1].Pack >= maxSmallStart {
		t.Errorf("a start moves %d bytes in packs up to %d and reads %d of them", moved, have[len(have)-1].Pack, read)
	}
}

func total(list []registrystore.Location) (n int64) {
	for _, at := range list {
		n += int64(at.Length)
	}
	return n
}

// TestRecordedStartOfAnother converts with what was recorded of an image that had
// other files: what the program's files tell counts beside it.
func TestRecordedStartOfAnother(t *testing.T) {
	var said bytes.Buffer
	dst := ociRef(t)
	convertTo(t, plainImage(t, wideLayer()), dst, func(o *Options) {
		o.Log = slog.New(slog.NewTextHandler(&said, nil))
		o.StartSet = []reads.Range{{Path: "/data/file01", Size: 4096}, {Path: "/gone", Size: 1}, {Path: "/data"}, {Path: "/gone"}}
	})
	if !strings.Contains(said.String(), "2 files of the start set are not in the image") {
		t.Errorf("it says %q", &said)
	}
	_, img := rootOf(t, dst)
	have, want := startPlaces(t, img, []reads.Range{{Path: "/data/file01", Size: 4096}, {Path: "/bin/app", Size: 1 << 40}})
	if !slices.Equal(have, want) {
		t.Errorf("got %v, want %v", have, want)
	}
}
