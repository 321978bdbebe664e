package tree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func newDir(entries map[string]*Inode) *Inode {
	return &Inode{Mode: unix.S_IFDIR | 0o755, Entries: entries}
}

func newLink(target string) *Inode { return &Inode{Mode: unix.S_IFLNK | 0o777, Target: target} }

func example() *Tree {
	file := &Inode{Mode: unix.S_IFREG | 0o644}
	return &Tree{Root: newDir(map[string]*Inode{
		"a": newDir(map[string]*Inode{"f": file, "g": file, "up": newLink(".."), "abs": newLink("/a/f")}),
		// Bytewise, "a.b" stands before "a/f".
		"a.b":   newDir(nil),
		"l":     newLink("a"),
		"chain": newLink("l/abs"),
		"loop":  newLink("loop"),
		"pit":   newLink("nowhere/x"),
		"out":   newLink("../../a"),
		"\xff":  file,
	})}
}

func TestWalk(t *testing.T) {
	var got []string
	if err := example().Walk(func(p string, n *Inode) error {
		if n == nil {
			t.Errorf("%s: no inode", p)
		}
		got = append(got, p)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := []string{"/", "/a", "/a/abs", "/a/f", "/a/g", "/a/up", "/a.b", "/chain", "/l", "/loop", "/out", "/pit", "/\xff"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	stop := errors.New("stop")
	count := 0
	if err := example().Walk(func(string, *Inode) error {
		if count++; count == 3 {
			return stop
		}
		return nil
	}); err != stop || count != 3 {
		t.Errorf("got %v after %d calls, want %v after 3", err, count, stop)
	}
}

func TestWalkDeep(t *testing.T) {
	root := newDir(nil)
	for range 5000 {
		root = newDir(map[string]*Inode{"d": root})
	}
	deepest := 0
	if err := (&Tree{Root: root}).Walk(func(p string, _ *Inode) error {
		deepest = max(deepest, strings.Count(p, "/d"))
		return nil
	}); err != nil || deepest != 5000 {
		t.Errorf("got to depth %d (%v), want 5000", deepest, err)
	}
}

func TestLookupAndResolve(t *testing.T) {
	tr := example()
	tests := []struct {
		path     string
		lookup   bool
		resolved string // "" = nothing
	}{
		{"/", true, "/"},
		{"", true, "/"},
		{"/..", true, "/"},
		{"/a/f", true, "/a/f"},
		{"a/./f", true, "/a/f"},
		{"//a//f", true, "/a/f"},
		{"/a/../a/f", true, "/a/f"},
		{"/a/", true, "/a"},
		{"/a/f/x", false, ""},
		{"/a/f/..", false, ""},
		{"/l", true, "/a"},
		{"/l/f", false, "/a/f"},
		{"/l/up/a/up", false, "/"},
		{"/chain", true, "/a/f"},
		{"/loop", true, ""},
		{"/loop/x", false, ""},
		{"/pit", true, ""},
		{"/out/g", false, "/a/g"},
		{"/nothing", false, ""},
		{"/\xff", true, "/\xff"},
	}
	for _, tt := range tests {
		if got := tr.Lookup(tt.path) != nil; got != tt.lookup {
			t.Errorf("Lookup(%q): found %v, want %v", tt.path, got, tt.lookup)
		}
		got, n := tr.Resolve(tt.path)
		if got != tt.resolved || (n != nil) != (tt.resolved != "") {
			t.Errorf("Resolve(%q) = %q, %v, want %q", tt.path, got, n != nil, tt.resolved)
		}
		if n != nil && n != tr.Lookup(got) {
			t.Errorf("Resolve(%q) is not what lies at %q", tt.path, got)
		}
	}
}

// TestReadAt reads every range of a file with holes at its start, middle and
// end, and compares it with the bytes written out.
func TestReadAt(t *testing.T) {
	source := []byte("..abcdefgh....XYZ")
	n := &Inode{Mode: unix.S_IFREG, Size: 24, Content: Content{Source: bytes.NewReader(source), Extents: []Extent{
		{Logical: 3, Physical: 2, Length: 4}, {Logical: 7, Physical: 14, Length: 3}, {Logical: 15, Physical: 6, Length: 4}}}}
	whole := []byte("\x00\x00\x00abcdXYZ\x00\x00\x00\x00\x00efgh\x00\x00\x00\x00\x00")
	for off := range len(whole) + 2 {
		for length := range len(whole) + 3 {
			p := bytes.Repeat([]byte{'?'}, length)
			got, err := n.ReadAt(p, int64(off))
			want := whole[min(off, len(whole)):min(off+length, len(whole))]
			if !bytes.Equal(p[:got], want) {
				t.Fatalf("%d bytes at %d: %q, want %q", length, off, p[:got], want)
			}
			if (err == nil) != (got == length && off < len(whole)) || err != nil && err != io.EOF {
				t.Fatalf("%d bytes at %d: read %d, error %v", length, off, got, err)
			}
		}
	}
	if b, err := io.ReadAll(io.NewSectionReader(n, 0, n.Size)); err != nil || !bytes.Equal(b, whole) {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestReadAtFaults(t *testing.T) {
	short := &Inode{Size: 10, Content: Content{Source: strings.NewReader("abc"), Extents: []Extent{{Length: 10}}}}
	if n, err := short.ReadAt(make([]byte, 10), 0); n != 3 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a source that ends early: %d, %v", n, err)
	}
	if _, err := short.ReadAt(nil, -1); err == nil {
		t.Error("a negative offset is read")
	}
	sparse := &Inode{Size: 1<<63 - 1}
	if n, err := sparse.ReadAt(make([]byte, 10), sparse.Size-5); n != 5 || err != io.EOF {
		t.Errorf("the end of 8 EiB: %d, %v", n, err)
	}
}

func BenchmarkWalk(b *testing.B) {
	root := newDir(map[string]*Inode{})
	for i := range 300 {
		d := newDir(map[string]*Inode{})
		for j := range 100 {
			d.Entries[fmt.Sprint(j)] = &Inode{Mode: unix.S_IFREG}
		}
		root.Entries[fmt.Sprint(i)] = d
	}
	tr := &Tree{Root: root}
	for b.Loop() {
		if err := tr.Walk(func(string, *Inode) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
