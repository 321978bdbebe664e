package reads

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/tree"
)

func TestParse(t *testing.T) {
	const text = Header + "\r\n# of two workloads\n\n0+4096 /bin/sh\nall /etc/a b \n8192+1 \"/a\\nb\"\n" + Header + "\n0+4096 /bin/sh\n"
	want := []Range{{"/bin/sh", 0, 4096}, {Path: "/etc/a b "}, {"/a\nb", 8192, 1}, {"/bin/sh", 0, 4096}}
	got, err := Parse(strings.NewReader(text))
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct{ name, text, says string }{
		{"empty", "", "it is empty"},
		{"of another kind", "{}", `begins with "{}"`},
		{"of a later version", "bootfs start set 2\n", "begins with"},
		{"a blank line first", "\n" + Header, "begins with"},
		{"no path", Header + "\nall", "line 2: got"},
		{"no range", Header + "\n4096 /a", "want OFFSET+SIZE"},
		{"no bytes", Header + "\n0+0 /a", "want OFFSET+SIZE"},
		{"a negative offset", Header + "\n-1+1 /a", "want OFFSET+SIZE"},
		{"a sign", Header + "\n++1 /a", "want OFFSET+SIZE"},
		{"an offset of no file", Header + "\n9223372036854775807+1 /a", "want OFFSET+SIZE"},
		{"a path that is not absolute", Header + "\nall a", "from / on"},
		{"a path to elsewhere", Header + "\nall /a/../b", "from / on"},
		{"the root", Header + "\nall /", "from / on"},
		{"a zero byte", Header + "\nall \"/a\\x00\"", "from / on"},
		{"half a quote", Header + "\nall \"/a", "quotes"},
		{"a long path", Header + "\nall /" + strings.Repeat("a", maxPath), "bytes, want at most"},
		{"many ranges", Header + "\n" + strings.Repeat("all /a\n", MaxRanges+1), "more than 200000 ranges"},
		{"a long file", Header + "\n" + strings.Repeat("#", MaxFile), "more than 16777216 bytes"},
	} {
		if _, err := Parse(strings.NewReader(tt.text)); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want %q in it", tt.name, err, tt.says)
		}
	}
}

// FuzzParse reads files: what is understood is written as the same again.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", Header, Header + "\n", Header + "\n0+4096 /bin/sh\nall /etc/passwd\n", Header + "\n1+1 \"/a\\n\\xff\"\n# a\r\n",
		Header + "\nall /\u2028", Header + "\n18446744073709551615+1 /a", Header + "\nall /..", "bootfs start set 10",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		ranges, err := Parse(bytes.NewReader(text))
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := Write(&b, ranges); err != nil {
			t.Fatal(err)
		}
		again, err := Parse(bytes.NewReader(b.Bytes()))
		// Quotes may need more room than what they stand for.
		if b.Len() <= MaxFile && (err != nil || !slices.Equal(again, ranges)) {
			t.Fatalf("%q: got %v, %v, want %v", b.Bytes(), again, err, ranges)
		}
	})
}

// TestRecorder reads parts of an image whose files lie as they do in real ones.
func TestRecorder(t *testing.T) {
	const block = erofs.BlockSize
	file := func(size int64) *tree.Inode {
		n := &tree.Inode{Mode: unix.S_IFREG | 0o644, Size: size}
		if size > 0 {
			n.Content = tree.Content{Source: strings.NewReader(strings.Repeat("x", int(size))), Extents: []tree.Extent{{Length: size}}}
		}
		return n
	}
	linked := file(5 * block)
	root := &tree.Inode{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*tree.Inode{
		"a":     file(10),
		"b\n":   file(2*block + 1),
		"empty": file(0),
		"dir": {Mode: unix.S_IFDIR | 0o755, Entries: map[string]*tree.Inode{
			"c": linked, "d": linked, "e": file(3 * block), "to a": {Mode: unix.S_IFLNK | 0o777, Target: "/a"},
		}},
	}}
	layout, err := erofs.NewLayout(&tree.Tree{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	next := layout.MetaSize() / block
	at := make(map[string]int64) // offset in the image
	start := make([]uint32, layout.Inodes())
	for i, n := range layout.Files() {
		start[i], at[layout.Path(i)] = uint32(next), next*block
		next += erofs.Blocks(n)
	}
	meta, err := erofs.NewReader(layout.Encode(start, uint32(next)))
	if err != nil {
		t.Fatal(err)
	}
	place := func(p string) int64 {
		off, ok := at[p]
		if !ok {
			t.Fatalf("no file %q in %v", p, at)
		}
		return off
	}

	r := NewRecorder(next * block)
	r.Note(place("/dir/e")+block+5, 1)       // a byte is a block
	r.Note(place("/b\n"), 2*block+1)         // up to the end
	r.Note(place("/dir/c")+block, block)     // a file with two names
	r.Note(place("/dir/c")+2*block, 2*block) // behind it
	r.Note(place("/dir/e"), 2*block)         // half of it was read already
	r.Note(place("/a"), 10)                  //
	r.Note(place("/a"), 10)                  // again
	r.Note(0, block)                         // metadata
	r.Note(-block, block)                    // nowhere
	r.Note(next*block, 100*block)            // nowhere
	r.Note(place("/dir/e")+block, -5)        // nothing
	r.Stop()
	r.Note(place("/dir/e")+2*block, block) // too late
	got, err := r.Ranges(meta)
	if err != nil {
		t.Fatal(err)
	}
	want := []Range{
		{"/dir/e", block, block},
		{"/b\n", 0, 2*block + 1},
		{"/dir/c", block, 3 * block},
		{"/dir/e", 0, block},
		{"/a", 0, 10},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}

	// All of it, from the first to the last byte.
	r = NewRecorder(next * block)
	for off := int64(0); off < next*block; off += block {
		r.Note(off, block)
	}
	if got, err = r.Ranges(meta); err != nil {
		t.Fatal(err)
	}
	sizes := map[string]int64{}
	for _, g := range got {
		if g.Offset != 0 {
			t.Errorf("%v is not all of the file", g)
		}
		sizes[g.Path] += g.Size
	}
	if want := map[string]int64{"/a": 10, "/b\n": 2*block + 1, "/dir/c": 5 * block, "/dir/e": 3 * block}; !reflect.DeepEqual(sizes, want) {
		t.Errorf("got %v, want %v", sizes, want)
	}
}

// The example of the documentation is one that is read.
func TestDocumentedExample(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "formats.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n"+Header+"\n")
	text, _, end := strings.Cut(text, "```")
	if !ok || !end {
		t.Fatalf("docs/formats.md has no example that begins with %q", Header)
	}
	ranges, err := Parse(strings.NewReader(Header + "\n" + text))
	if err != nil || len(ranges) < 3 {
		t.Errorf("got %v, %v", ranges, err)
	}
}
