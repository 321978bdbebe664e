package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// viaRecord returns the layer that l's record makes, its files read from l. Its
// own record is the same.
func viaRecord(t testing.TB, l *Layer) *Layer {
	t.Helper()
	record := l.Record()
	// The files of l are looked up before Merge makes them the tree's.
	files := map[int]*tree.Inode{}
	for i := range l.count {
		if n := l.File(i); n != nil {
			files[i] = &tree.Inode{Mode: n.Mode, Size: n.Size, Content: n.Content}
		}
	}
	again, err := FromRecord(l.name, record, l.limits, func(i int, n *tree.Inode) io.ReaderAt {
		if files[i] == nil || files[i].Size != n.Size {
			t.Fatalf("entry %d is a file of %d bytes in the record only", i, n.Size)
		}
		return files[i]
	})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Record(), record) {
		t.Fatal("the record of the layer that a record makes is another one")
	}
	return again
}

// nowhere reads no file.
func nowhere(int, *tree.Inode) io.ReaderAt { return bytes.NewReader(nil) }

// strangeTar has an entry of each kind that someTar has not.
func strangeTar(t testing.TB) []byte {
	return pack(t, []item{
		dir("d", 0o1777).with(xattr("user.a", "1")).with(xattr("trusted.b", strings.Repeat("v", 5000))),
		reg("d/.wh..wh..opq", ""), reg("d/.wh.gone", ""), reg(".wh.away", ""),
		reg("d/old", "x").with(func(h *tar.Header) { h.ModTime, h.Uid, h.Gid = time.Unix(-5, 7), 1<<31, 70000 }),
		{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: testTime}},
		{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "sda", Mode: 0o660, Devmajor: 259, Devminor: 70000, ModTime: testTime}},
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600, ModTime: testTime}},
		reg(".wh..wh.plnk/1.2", "linked"), hard("plnk", ".wh..wh.plnk/1.2"), sym("latin\xe9", "../d"),
	})
}

func TestRecord(t *testing.T) {
	tr := mustMerge(t, someTar(t), strangeTar(t)) // compares with the way over records
	for path, want := range map[string][2]int32{"/small": {0, 2}, "/hard": {0, 2}, "/lastlog": {0, 6}, "/d/old": {1, 4}, "/plnk": {1, 8}} {
		n := tr.Lookup(path)
		if got := [2]int32{n.Content.Layer, n.Content.Entry}; got != want {
			t.Errorf("%s is entry %v, want %v", path, got, want)
		}
	}
}

// TestRecordOfMany holds that entries beyond the first piece keep their numbers.
func TestRecordOfMany(t *testing.T) {
	var items []item
	for i := range 3 * entriesPiece {
		items = append(items, reg(fmt.Sprintf("d/%d", i), fmt.Sprint(i)))
	}
	tr := mustMerge(t, pack(t, items))
	for _, i := range []int{0, entriesPiece - 1, entriesPiece, 3*entriesPiece - 1} {
		if n := tr.Lookup(fmt.Sprintf("/d/%d", i)); n.Content.Entry != int32(i) {
			t.Errorf("file %d is entry %d", i, n.Content.Entry)
		}
	}
}

// raw makes a record of one entry.
func raw(parts ...any) []byte {
	b := []byte{1}
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b = appendString(b, p)
		case kind:
			b = append(b, byte(p))
		case int:
			b = binary.AppendUvarint(b, uint64(p))
		}
	}
	return b
}

func TestHostileRecords(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	here := kind(sameDir)
	attrs := func(mode int) []any { return []any{mode, 0, 0, 0, 0} }
	one := func(base string, mode int, rest ...any) []byte {
		return raw(slices.Concat([]any{file | here, base}, attrs(mode), rest)...)
	}
	good := one("f", 0o100644, 5, 1, 0, 5, 0)
	if _, err := FromRecord("L", good, Limits{}, nowhere); err != nil {
		t.Fatal(err)
	}
	tests := map[string][]byte{
		"empty":                        nil,
		"truncated":                    good[:len(good)-1],
		"more than its entries":        append(slices.Clone(good), 0),
		"2^60 entries":                 binary.AppendUvarint(nil, 1<<60),
		"a million entries in 3 bytes": binary.AppendUvarint(nil, 1_000_000),
		"kind 0":                       raw(skipped|here, "f"),
		"kind 6":                       raw(kind(6)|here, "f"),
		"dir leads out":                raw(file, 0, "../x", "f"),
		"dir not clean":                raw(file, 0, "a//b", "f"),
		"dir shares what is not there": raw(file, 1, "a", "f"),
		"name with a slash":            one("a/b", 0o100644, 0, 0, 0),
		"name ..":                      one("..", 0o100644, 0, 0, 0),
		"name of a whiteout":           one(".wh.x", 0o100644, 0, 0, 0),
		"name with NUL":                one("a\x00", 0o100644, 0, 0, 0),
		"no name":                      one("", 0o100644, 0, 0, 0),
		"name of 256 bytes":            one(strings.Repeat("n", 256), 0o100644, 0, 0, 0),
		"name of 2^40 bytes":           raw(file|here, 1<<40),
		"hard link that leads out":     raw(hardLink|here, "h", "../x"),
		"aufs inode elsewhere":         raw(slices.Concat([]any{aufsInode | here, "etc/passwd"}, attrs(0o100644), []any{0, 0, 0})...),
		"no type":                      one("f", 0o644, 0),
		"mode of 17 bits":              one("f", 1<<16|0o100644, 0, 0, 0),
		"symlink to nothing":           one("s", 0o120777, "", 0),
		"symlink with a mode":          one("s", 0o120644, "x", 0),
		"device 4096:0":                one("n", 0o020644, 1<<44, 0),
		"nanoseconds":                  raw(file|here, "f", 0o100644, 0, 0, 0, 1_000_000_000, 0, 0, 0),
		"owner -1":                     raw(file|here, "f", 0o100644, 1<<32-1, 0, 0, 0, 0, 0, 0),
		"extent behind the end":        one("f", 0o100644, 5, 1, 0, 6, 0),
		"extent far behind the end":    one("f", 0o100644, 5, 1, 1<<62, 1<<62, 0),
		"empty extent":                 one("f", 0o100644, 5, 1, 0, 0, 0),
		"extents without bytes":        one("f", 0o100644, 5, 1<<40, 0, 5, 0),
		"xattr of no class":            one("f", 0o100644, 0, 0, 1, "x.y", "v"),
		"xattr for the overlay":        one("f", 0o100644, 0, 0, 1, "trusted.overlay.redirect", "v"),
		"xattr twice":                  one("f", 0o100644, 0, 0, 2, "user.a", "v", "user.a", "v"),
	}
	for name, record := range tests {
		t.Run(name, func(t *testing.T) {
			bounded.Case(t)
			if l, err := FromRecord("L", record, Limits{}, nowhere); err == nil {
				t.Errorf("accepted: %+v", l.entries)
			} else if !strings.HasPrefix(err.Error(), "record of layer L: entry ") {
				t.Errorf("got %v", err)
			}
		})
	}
	for name, limits := range map[string]Limits{"entries": {Entries: 4}, "metadata": {Metadata: 20}} {
		l, err := Read(t.Context(), blob("L", someTar(t)), Options{TempDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if _, err := FromRecord("L", l.Record(), limits, nowhere); err == nil {
			t.Errorf("a limit of %s is not kept", name)
		}
	}
}

// BenchmarkRecord shows what a record costs and saves: a layer of 50,000 small
// files.
func BenchmarkRecord(b *testing.B) {
	l, err := Read(b.Context(), manyEntries(50_000, 20), Options{TempDir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	record := l.Record()
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			record = l.Record()
		}
		b.ReportMetric(float64(len(record))/float64(l.count), "B/entry")
	})
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			got, err := FromRecord("L", record, Limits{}, nowhere)
			if err != nil {
				b.Fatal(err)
			}
			runtime.KeepAlive(got)
		}
	})
}
