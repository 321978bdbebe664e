package treecmp

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// build makes the same root in a directory and as a tree.
func build(t *testing.T) (string, *tree.Tree) {
	t.Helper()
	root := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ts := []unix.Timespec{{Sec: 100, Nsec: 5}, {Sec: 1600000000, Nsec: 123456789}}
	settle := func(name string) {
		check(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(root, name), ts, unix.AT_SYMLINK_NOFOLLOW))
	}
	node := func(mode uint32) *tree.Inode {
		return &tree.Inode{Mode: mode, Nlink: 1, MtimeSec: 1600000000, MtimeNsec: 123456789}
	}
	data := bytes.Repeat([]byte("data"), 30000)
	check(os.WriteFile(filepath.Join(root, "file"), data, 0o644))
	check(os.Link(filepath.Join(root, "file"), filepath.Join(root, "link")))
	check(unix.Setxattr(filepath.Join(root, "file"), "user.x", []byte("v"), 0))
	file := node(unix.S_IFREG | 0o644)
	file.Size, file.Nlink = int64(len(data)), 2
	file.Xattrs = []tree.Xattr{{Name: "user.x", Value: []byte("v")}}
	file.Content = tree.Content{Source: bytes.NewReader(data), Extents: []tree.Extent{{Length: file.Size}}}

	check(os.WriteFile(filepath.Join(root, "sparse"), []byte("head"), 0o600))
	check(unix.Chmod(filepath.Join(root, "sparse"), 0o4711))
	check(os.Truncate(filepath.Join(root, "sparse"), 1<<40+5))
	sparse := node(unix.S_IFREG | 0o4711)
	sparse.Size = 1<<40 + 5
	sparse.Content = tree.Content{Source: strings.NewReader("head"), Extents: []tree.Extent{{Length: 4}}}

	check(os.Symlink("to/nowhere", filepath.Join(root, "sym")))
	check(os.Lchown(filepath.Join(root, "sym"), 7, 8))
	sym := node(unix.S_IFLNK | 0o777)
	sym.Target, sym.UID, sym.GID = "to/nowhere", 7, 8

	check(unix.Mknod(filepath.Join(root, "dev"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
	dev := node(unix.S_IFBLK | 0o600)
	dev.Rdev = unix.Mkdev(259, 70000)
	check(unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
	check(os.MkdirAll(filepath.Join(root, "d\xff/e"), 0o755))
	e := node(unix.S_IFDIR | 0o755)
	e.Nlink = 2
	d := node(unix.S_IFDIR | 0o755)
	d.Nlink, d.Entries = 3, map[string]*tree.Inode{"e": e}
	top := node(unix.S_IFDIR | 0o755)
	top.Nlink = 3
	top.Entries = map[string]*tree.Inode{"file": file, "link": file, "sparse": sparse, "sym": sym, "dev": dev, "fifo": node(unix.S_IFIFO | 0o600), "d\xff": d}
	for _, name := range []string{"file", "sparse", "sym", "dev", "fifo", "d\xff/e", "d\xff", ""} {
		settle(name)
	}
	return root, &tree.Tree{Root: top}
}

func TestDirIsTree(t *testing.T) {
	root, tr := build(t)
	dir, err := Dir(root)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := Tree(tr)
	if err != nil {
		t.Fatal(err)
	}
	if d := Diff(dir, mem); len(d) != 0 {
		t.Errorf("the same root differs:\n%s", strings.Join(d, "\n"))
	}
	if len(mem) != 9 {
		t.Errorf("%d paths, want 9", len(mem))
	}
}

// Each thing that can differ is told, and nothing besides.
func TestDiff(t *testing.T) {
	tests := []struct {
		name   string
		change func(*tree.Tree)
		want   []string
	}{
		{"mode", func(t *tree.Tree) { t.Lookup("/sparse").Mode ^= unix.S_ISUID }, []string{"/sparse: mode 0711, want 4711"}},
		{"type", func(t *tree.Tree) { t.Lookup("/fifo").Mode = unix.S_IFSOCK }, []string{"/fifo: is a socket, want a FIFO"}},
		{"owner", func(t *tree.Tree) { t.Lookup("/sym").GID = 9 }, []string{"/sym: owner 7:9, want 7:8"}},
		{"mtime", func(t *tree.Tree) { t.Root.MtimeNsec-- }, []string{"/: mtime 1600000000.123456788, want 1600000000.123456789"}},
		{"target", func(t *tree.Tree) { t.Lookup("/sym").Target = "a\nb" }, []string{`/sym: target "a\nb", want to/nowhere`}},
		{"device", func(t *tree.Tree) { t.Lookup("/dev").Rdev = unix.Mkdev(1, 2) }, []string{"/dev: device 1:2, want 259:70000"}},
		{"size", func(t *tree.Tree) { t.Lookup("/sparse").Size-- }, []string{"/sparse: size 1099511627780, want 1099511627781"}},
		{"missing", func(t *tree.Tree) { delete(t.Root.Entries, "sym") }, []string{"/sym: missing, want a symlink"}},
		{"too many", func(t *tree.Tree) { t.Root.Entries["\x01"] = &tree.Inode{Mode: unix.S_IFLNK} }, []string{`"/\x01": there is a symlink, want nothing`}},
		{"xattr", func(t *tree.Tree) { t.Lookup("/file").Xattrs[0].Name = "user.y" }, []string{
			`/file: xattr user.x missing, want "v"`, `/file: xattr user.y is "v", want none`,
			`/link: xattr user.x missing, want "v"`, `/link: xattr user.y is "v", want none`}},
		{"xattr's value", func(t *tree.Tree) {
			t.Lookup("/sparse").Xattrs = []tree.Xattr{{Name: "trusted.overlay.origin"}, {Name: "user.z"}}
		},
			[]string{`/sparse: xattr user.z is "", want none`}},
		{"links", func(t *tree.Tree) {
			one := *t.Lookup("/file")
			one.Nlink = 1
			t.Root.Entries["file"], t.Root.Entries["link"] = &one, t.Lookup("/file")
		}, []string{"/file: link count 1, want 2", "/link: first link /link, want /file"}},
		{"a directory that is not counted", func(t *tree.Tree) { t.Root.Nlink = 1 }, nil},
		{"a directory's count", func(t *tree.Tree) { t.Root.Nlink = 2 }, []string{"/: link count 2, want 3"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, a := build(t)
			_, b := build(t)
			want, err := Tree(b)
			if err != nil {
				t.Fatal(err)
			}
			tt.change(a)
			got, err := Tree(a)
			if err != nil {
				t.Fatal(err)
			}
			if d := Diff(got, want); !slices.Equal(d, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(d, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
	// One byte, at the edges of blocks and extents.
	for _, at := range []int{0, 4095, 4096, 119999} {
		root, tr := build(t)
		f, err := os.OpenFile(filepath.Join(root, "file"), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{0}, int64(at)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		got, err := Dir(root)
		if err != nil {
			t.Fatal(err)
		}
		want, err := Tree(tr)
		if err != nil {
			t.Fatal(err)
		}
		if got["/file"].Content == want["/file"].Content {
			t.Errorf("a changed byte at %d is not seen", at)
		}
	}
}

// A sum depends on the bytes alone, not on how zeros are stored.
func TestContentSum(t *testing.T) {
	data := make([]byte, 20000)
	copy(data[5000:], "five")
	copy(data[16383:], "xy")
	want, err := contentSum(bytes.NewReader(data), 20000, []run{{0, 20000}})
	if err != nil {
		t.Fatal(err)
	}
	for _, runs := range [][]run{{{5000, 5004}, {16383, 16385}}, {{4096, 8192}, {8192, 20000}}, {{4500, 6000}, {6000, 6001}, {16000, 17000}}} {
		if got, err := contentSum(bytes.NewReader(data), 20000, runs); err != nil || got != want {
			t.Errorf("runs %v: another sum (%v)", runs, err)
		}
	}
	if got, _ := contentSum(bytes.NewReader(data), 19999, []run{{0, 19999}}); got == want {
		t.Error("a shorter file has the same sum")
	}
	if _, err := contentSum(bytes.NewReader(data[:100]), 20000, []run{{0, 20000}}); err == nil {
		t.Error("a file that ends early has a sum")
	}
}

// However a directory is named, its manifest is the same.
func TestDirNames(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, ".hidden"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	want, err := Dir(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(root)
	for _, name := range []string{".", "./", root + "/", "../" + filepath.Base(root)} {
		got, err := Dir(name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := Diff(got, want); diff != nil {
			t.Errorf("%q: %q", name, diff)
		}
	}
}
