package convcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

func diffID(n int) string { return "sha256:" + index.SHA256.Sum(fmt.Append(nil, n)).String() }

// unitOf makes a unit of files; seed decides about its chunks.
func unitOf(seed uint64, files ...File) Unit {
	rng := rand.New(rand.NewPCG(seed, 0))
	u := Unit{Files: files}
	var size int
	for _, f := range files {
		size += int(f.Blocks) * erofs.BlockSize
	}
	for size > 0 {
		c := Chunk{Size: min(size, 1+rng.IntN(chunker.V1.Max)), Stored: rng.IntN(1 << 20), Zero: rng.IntN(10) == 0}
		for k := range c.ID {
			c.ID[k] = byte(rng.Uint32())
		}
		size -= c.Size
		u.Chunks = append(u.Chunks, c)
	}
	return u
}

// randomRecord makes a record of layer 0 that has files of two others.
func randomRecord(seed uint64) *Record {
	rng := rand.New(rand.NewPCG(seed, 1))
	r := &Record{Entries: fmt.Append(nil, "entries", seed), Layers: []string{diffID(0), diffID(1), diffID(2)}}
	for range rng.IntN(30) {
		var files []File
		for range 1 + rng.IntN(5) {
			files = append(files, File{int32(rng.IntN(3)), rng.Int32N(maxEntry), 1 + rng.Uint32N(200)})
		}
		r.Units = append(r.Units, unitOf(rng.Uint64(), files...))
	}
	return r
}

func seal(t testing.TB, diffID string, r *Record) []byte {
	t.Helper()
	b, err := r.Seal(diffID)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func same(a, b *Record) bool {
	return bytes.Equal(a.Entries, b.Entries) && slices.Equal(a.Layers, b.Layers) && len(a.Units) == len(b.Units) &&
		(len(a.Units) == 0 || reflect.DeepEqual(a.Units, b.Units))
}

func TestRecord(t *testing.T) {
	for seed := range uint64(50) {
		want := randomRecord(seed)
		sealed := seal(t, diffID(0), want)
		got, err := Open(diffID(0), sealed)
		if err != nil {
			t.Fatal(err)
		}
		if !same(got, want) {
			t.Fatalf("seed %d: got %+v, want %+v", seed, got, want)
		}
		if !bytes.Equal(seal(t, diffID(0), got), sealed) {
			t.Errorf("seed %d: sealed once more it is another", seed)
		}
	}
}

// TestGolden freezes the format: other bytes need another Version.
func TestGolden(t *testing.T) {
	plain, err := randomRecord(7).encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := index.SHA256.Sum(plain).String(), "def2e95d0146406d69d996fe458350b0ee900f058192ea52b56133412d5ae444"; got != want {
		t.Errorf("plain bytes have SHA-256 %s, want %s", got, want)
	}
	line, _, _ := bytes.Cut(seal(t, diffID(0), randomRecord(7)), []byte("\n"))
	if got, want := string(line), "bootfs layer record 1 v1 "+diffID(0); got != want {
		t.Errorf("header %q, want %q", got, want)
	}
}

// TestDamagedRecord damages every byte of a record.
func TestDamagedRecord(t *testing.T) {
	sealed := seal(t, diffID(0), randomRecord(3))
	for at := range sealed {
		b := bytes.Clone(sealed)
		b[at] ^= 1 << (at % 8)
		if _, err := Open(diffID(0), b); err == nil {
			t.Fatalf("a flipped bit in byte %d of %d is not noticed", at, len(sealed))
		}
		if _, err := Open(diffID(0), sealed[:at]); err == nil {
			t.Fatalf("cut to %d of %d bytes, it is accepted", at, len(sealed))
		}
	}
	for name, b := range map[string][]byte{
		"of another layer":   seal(t, diffID(1), &Record{Layers: []string{diffID(1)}}),
		"of another version": bytes.Replace(sealed, []byte("record 1 v1"), []byte("record 2 v1"), 1),
		"of another profile": bytes.Replace(sealed, []byte("record 1 v1"), []byte("record 1 v2"), 1),
		"of nothing":         nil,
		"of text":            []byte("<html>" + strings.Repeat("x", 500)),
	} {
		if _, err := Open(diffID(0), b); err == nil || !strings.Contains(err.Error(), "it begins with") {
			t.Errorf("a record %s: %v", name, err)
		}
	}
}

// resealed makes a record of plain bytes that nobody would write.
func resealed(t testing.TB, plain io.Reader) []byte {
	t.Helper()
	b := bytes.NewBufferString(header(diffID(0)))
	z, err := zstd.NewWriter(b, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(z, plain); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	sum := index.SHA256.Sum(b.Bytes())
	return append(b.Bytes(), sum[:]...)
}

func TestHostileRecords(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	change := func(do func(r *Record)) []byte {
		r := &Record{Layers: []string{diffID(0), diffID(1)}, Units: []Unit{unitOf(1, File{0, 5, 2}, File{1, 3, 1})}}
		do(r)
		b, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if _, err := Open(diffID(0), resealed(t, bytes.NewReader(change(func(*Record) {})))); err != nil {
		t.Fatal(err)
	}
	for name, plain := range map[string][]byte{
		"empty":               nil,
		"no layers":           {0, 0, 0},
		"2^60 layers":         {0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10},
		"of another layer":    change(func(r *Record) { slices.Reverse(r.Layers) }),
		"more bytes":          append(change(func(*Record) {}), 0),
		"unit without files":  change(func(r *Record) { r.Units[0].Files = nil }),
		"unit without chunks": change(func(r *Record) { r.Units[0].Chunks = nil }),
		"file of layer 2":     change(func(r *Record) { r.Units[0].Files[0].Layer = 2 }),
		"file of entry -1":    change(func(r *Record) { r.Units[0].Files[0].Entry = -1 }),
		"file without blocks": change(func(r *Record) { r.Units[0].Files[0].Blocks = 0 }),
		"a file more":         change(func(r *Record) { r.Units[0].Files = append(r.Units[0].Files, File{0, 9, 1}) }),
		"chunk of 0 bytes":    change(func(r *Record) { r.Units[0].Chunks = append(r.Units[0].Chunks, Chunk{}) }),
		"chunk too large": change(func(r *Record) {
			r.Units[0].Files[0].Blocks = 100
			r.Units[0].Chunks = []Chunk{{Size: 101 * erofs.BlockSize}}
		}),
		"entries beyond the record": {0xff, 0xff, 0xff, 0x0f, 1},
	} {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			if r, err := Open(diffID(0), resealed(t, bytes.NewReader(plain))); err == nil {
				t.Errorf("accepted: %+v", r)
			}
		})
	}
	for n, want := range map[int64]string{maxPlain + 1: "it holds more than", maxPlain: "malformed"} {
		bounded.Case(t)
		zeros, err := os.Open("/dev/zero")
		if err != nil {
			t.Fatal(err)
		}
		defer zeros.Close()
		if _, err := Open(diffID(0), resealed(t, io.LimitReader(zeros, n))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d bytes of zeros: got %v, want %q", n, err, want)
		}
	}
}

// TestSealLimit: no record is made that Open would refuse.
func TestSealLimit(t *testing.T) {
	if _, err := (&Record{Entries: make([]byte, maxPlain), Layers: []string{diffID(0)}}).Seal(diffID(0)); err == nil {
		t.Error("it is sealed")
	}
}

func FuzzRecord(f *testing.F) {
	for seed := range uint64(5) {
		b, err := randomRecord(seed).encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		r, err := decode(diffID(0), plain)
		if err != nil {
			return
		}
		b, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(diffID(0), b)
		if err != nil || !same(r, again) {
			t.Errorf("encoded and decoded: %v, %+v; want %+v", err, again, r)
		}
		NewImage([]string{diffID(1), diffID(0)}, map[string]*Record{diffID(0): r}).Find(1, 0)
	})
}

func TestImage(t *testing.T) {
	base := unitOf(1, File{0, 1, 1}, File{0, 2, 3})
	mixed := unitOf(2, File{0, 3, 1}, File{1, 4, 20}) // in the record of layer 1: the first file is of layer 1
	foreign := unitOf(3, File{0, 5, 1}, File{1, 6, 1})
	records := map[string]*Record{
		diffID(0): {Entries: []byte("zero"), Layers: []string{diffID(0), diffID(9)}, Units: []Unit{base, foreign}},
		diffID(1): {Entries: []byte("one"), Layers: []string{diffID(1), diffID(0)}, Units: []Unit{mixed}},
	}
	// Layer 0 comes twice, and one layer is not known.
	i := NewImage([]string{diffID(0), "", diffID(1), diffID(0), diffID(5)}, records)
	for name, tt := range map[string]struct {
		files []File
		want  []Chunk
	}{
		"of one layer":      {[]File{{0, 1, 1}, {0, 2, 3}}, base.Chunks},
		"of its like":       {[]File{{3, 1, 1}, {0, 2, 3}}, base.Chunks},
		"of two layers":     {[]File{{2, 3, 1}, {0, 4, 20}}, mixed.Chunks},
		"another order":     {[]File{{0, 2, 3}, {0, 1, 1}}, nil},
		"fewer files":       {[]File{{0, 1, 1}}, nil},
		"another size":      {[]File{{0, 1, 1}, {0, 2, 4}}, nil},
		"no files":          {nil, nil},
		"an unknown layer":  {[]File{{1, 1, 1}, {0, 2, 3}}, nil},
		"a layer elsewhere": {[]File{{0, 5, 1}, {4, 6, 1}}, nil},
	} {
		if got := i.Chunks(tt.files); !slices.Equal(got, tt.want) {
			t.Errorf("a unit of %s: %v, want %v", name, got, tt.want)
		}
	}
	for _, tt := range []struct {
		layer, entry int32
		chunks       []Chunk
		offset       int64
	}{{0, 1, base.Chunks, 0}, {3, 2, base.Chunks, erofs.BlockSize}, {0, 4, mixed.Chunks, erofs.BlockSize},
		{0, 5, foreign.Chunks, 0}, {1, 1, nil, 0}, {2, 77, nil, 0}} {
		if chunks, offset := i.Find(tt.layer, tt.entry); !slices.Equal(chunks, tt.chunks) || offset != tt.offset {
			t.Errorf("file %d of layer %d is at %d of %v", tt.entry, tt.layer, offset, chunks)
		}
	}

	fresh := unitOf(4, File{0, 7, 1}, File{4, 8, 1})
	got := i.Records(map[string][]byte{diffID(5): []byte("five")}, []Unit{
		{Files: []File{{3, 1, 1}, {0, 2, 3}}, Chunks: base.Chunks}, fresh, unitOf(5, File{1, 1, 1}), {},
	})
	fresh0 := Unit{Files: []File{{0, 7, 1}, {1, 8, 1}}, Chunks: fresh.Chunks}
	want := map[string]*Record{
		diffID(0): {
			Entries: []byte("zero"), Layers: []string{diffID(0), diffID(5), diffID(9)},
			Units: []Unit{base, fresh0, {Files: []File{{0, 5, 1}, {2, 6, 1}}, Chunks: foreign.Chunks}},
		},
		diffID(1): {Entries: []byte("one"), Layers: []string{diffID(1), diffID(0)}, Units: []Unit{mixed}},
		diffID(5): {Entries: []byte("five"), Layers: []string{diffID(5), diffID(0)}, Units: []Unit{{Files: []File{{1, 7, 1}, {0, 8, 1}}, Chunks: fresh.Chunks}}},
	}
	if len(got) != len(want) {
		t.Errorf("%d records, want %d", len(got), len(want))
	}
	for id, w := range want {
		if !same(got[id], w) {
			t.Errorf("record of %s: %+v, want %+v", id, got[id], w)
		}
	}
}

// TestOldUnits holds that a record does not grow with every image of its layer.
func TestOldUnits(t *testing.T) {
	r := &Record{Layers: []string{diffID(0)}}
	for gen := range int32(20) {
		var units []Unit
		for n := range int32(400) {
			units = append(units, unitOf(uint64(gen), File{0, gen*1000 + n, 1}))
		}
		r = NewImage([]string{diffID(0)}, map[string]*Record{diffID(0): r}).Records(nil, units)[diffID(0)]
		if want := min(800, 400*(int(gen)+1)); len(r.Units) != want {
			t.Fatalf("image %d: the record has %d units, want %d", gen, len(r.Units), want)
		}
		if !reflect.DeepEqual(r.Units[:400], units) {
			t.Errorf("image %d: its own units do not come first", gen)
		}
	}
}

// failing is a place that is not reachable.
type failing struct{}

func (failing) String() string                               { return "failing" }
func (failing) Get(context.Context, string) ([]byte, error)  { return nil, errors.New("no route") }
func (failing) Put(context.Context, map[string][]byte) error { return errors.New("no route") }

func TestCache(t *testing.T) {
	var log bytes.Buffer
	old, dir := Dir(t.TempDir()), Dir(filepath.Join(t.TempDir(), "new", "dir"))
	c := &Cache{From: []Place{failing{}, old, dir}, To: []Place{failing{}, dir}, Log: slog.New(slog.NewTextHandler(&log, nil))}
	records := map[string]*Record{diffID(0): randomRecord(1), diffID(1): {Entries: []byte("x"), Layers: []string{diffID(1)}}}
	for id, r := range records {
		c.Keep(id, r)
	}
	c.Keep("", records[diffID(0)])
	shared := &Record{Entries: records[diffID(0)].Entries, Layers: []string{diffID(0), diffID(8)}, Units: []Unit{unitOf(9, File{1, 2, 3}, File{0, 1, 1})}}
	c.Keep(diffID(0), shared) // of another platform
	records[diffID(0)] = shared
	c.Save(t.Context())
	if !strings.Contains(log.String(), "level=WARN msg=\"cache failing was not written: no route\"") {
		t.Errorf("log: %s", &log)
	}
	name, err := Name(diffID(1))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(old), name), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	log.Reset()
	got := c.Load(t.Context(), []string{diffID(1), diffID(0), "", diffID(1), diffID(7), "sha256:../../etc/passwd"})
	if n := len(randomRecord(1).Units); len(got[diffID(0)].Units) != n+1 {
		t.Errorf("a layer of two platforms has %d units, want %d", len(got[diffID(0)].Units), n+1)
	}
	if len(got) != 2 || !same(got[diffID(0)], records[diffID(0)]) || !same(got[diffID(1)], records[diffID(1)]) {
		t.Errorf("loaded %+v", got)
	}
	if !strings.Contains(log.String(), "is not used: it begins with") || !strings.Contains(log.String(), "no route") || strings.Contains(log.String(), "WARN") {
		t.Errorf("log: %s", &log)
	}
}

// TestLoadLimit loads records that are too large together.
func TestLoadLimit(t *testing.T) {
	var log bytes.Buffer
	dir := Dir(t.TempDir())
	c := &Cache{From: []Place{dir}, To: []Place{dir}, Log: slog.New(slog.NewTextHandler(&log, nil)), limit: 3000}
	var ids []string
	for n := range 4 {
		ids = append(ids, diffID(n))
		c.Keep(ids[n], &Record{Entries: make([]byte, 1000), Layers: ids[n:]})
	}
	c.Save(t.Context())
	if got := c.Load(t.Context(), ids); len(got) != 3 {
		t.Errorf("%d records, want 3", len(got))
	}
	if n := strings.Count(log.String(), "bytes of memory"); n != 1 {
		t.Errorf("%d records were too much, want 1: %s", n, &log)
	}
}

// TestDirSweep leaves files in the making, old and young.
func TestDirSweep(t *testing.T) {
	dir := Dir(t.TempDir())
	old, young := filepath.Join(string(dir), temporary+"1"), filepath.Join(string(dir), temporary+"2")
	for _, f := range []string{old, young} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	then := time.Now().Add(-2 * staleAfter)
	if err := os.Chtimes(old, then, then); err != nil {
		t.Fatal(err)
	}
	if err := dir.Put(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an old one: %v, want that it is gone", err)
	}
	if _, err := os.Stat(young); err != nil {
		t.Errorf("a young one: %v", err)
	}
}

func TestDir(t *testing.T) {
	dir := Dir(t.TempDir())
	records := map[string][]byte{"a": []byte("one"), "b": []byte("two")}
	if err := dir.Put(t.Context(), records); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(string(dir), name) }
	inode := func(name string) uint64 {
		info, err := os.Stat(path(name))
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Ino
	}
	before := inode("a")
	records["b"] = []byte("three")
	if err := dir.Put(t.Context(), records); err != nil {
		t.Fatal(err)
	}
	if inode("a") != before {
		t.Error("a record that is the same was written anew")
	}
	for name, want := range records {
		if got, err := dir.Get(t.Context(), name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if list, _ := os.ReadDir(string(dir)); len(list) != 2 {
		t.Errorf("%d files, want 2", len(list))
	}
	if _, err := dir.Get(t.Context(), "c"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a record that is not there: %v", err)
	}

	if err := os.Symlink(path("a"), path("link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path("dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("large"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path("large"), MaxSealed+1); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "fifo", "dir", "large"} {
		if _, err := dir.Get(t.Context(), name); err == nil {
			t.Errorf("%s is read", name)
		}
	}
	// What is in the way is replaced, but for a directory.
	for _, name := range []string{"link", "fifo", "large"} {
		if err := dir.Put(t.Context(), map[string][]byte{name: []byte("new")}); err != nil {
			t.Error(err)
		}
		if got, err := dir.Get(t.Context(), name); err != nil || string(got) != "new" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if got, err := dir.Get(t.Context(), "a"); err != nil || string(got) != "one" {
		t.Errorf("what the link led to is now %q, %v", got, err)
	}
	if err := dir.Put(t.Context(), map[string][]byte{"dir": nil}); err == nil {
		t.Error("a directory was replaced")
	}
	if list, _ := filepath.Glob(path(".tmp-*")); len(list) != 0 {
		t.Errorf("left behind: %v", list)
	}
}
