package erofs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
)

var le = binary.LittleEndian

// victim is a small tree with one file of each kind, for damage.
func victim() *tree.Inode {
	return dir(entries{
		"dir":    dir(entries{"deep": dir(entries{"file": file("x")}), "other": dir(nil)}),
		"big":    numbered(300),
		"file":   file("content", tree.Xattr{Name: "user.a", Value: []byte("value")}, tree.Xattr{Name: "user.b", Value: []byte("value")}),
		"link":   link("target"),
		"long":   link(strings.Repeat("t", 4095)),
		"node":   {Mode: unix.S_IFCHR | 0o600, Rdev: unix.Mkdev(1, 3)},
		"sparse": sparseFile(4<<20, 1<<20),
	})
}

// walk uses everything that a mount uses on all that can be reached, and
// returns the first error.
func walk(r *erofs.Reader) error {
	inodes := 0
	var visit func(nid uint64) error
	visit = func(nid uint64) error {
		if inodes++; inodes > 10000 {
			return errors.New("walk: too many inodes")
		}
		n, err := r.Inode(nid)
		if err != nil {
			return err
		}
		if err := r.Xattrs(n, func(string, []byte) bool { return true }); err != nil {
			return err
		}
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			_, err = r.Readlink(n)
		case unix.S_IFREG:
			for off := int64(0); off < n.Size; {
				_, length, err := r.Span(n, off)
				if err != nil {
					return err
				}
				off += length
			}
		case unix.S_IFDIR:
			var inner error
			err = r.ReadDir(n, 0, func(name []byte, nid uint64, _ uint8, _ uint64) bool {
				var found uint64
				if found, inner = r.Lookup(n, string(name)); inner == nil && found != nid {
					inner = errors.New("walk: lookup and readdir differ")
				}
				if s := string(name); inner == nil && s != "." && s != ".." {
					inner = visit(nid)
				}
				return inner == nil
			})
			err = errors.Join(err, inner)
		}
		return err
	}
	return visit(r.RootNID())
}

// at returns the bytes of a file's inode and all behind it.
func at(t *testing.T, meta []byte, path string) []byte {
	r, err := erofs.NewReader(meta)
	if err != nil {
		t.Fatal(err)
	}
	return meta[inode(t, r, path).NID*32:]
}

// entryOf returns the directory entry of name in the inline part behind dir.
func entryOf(t *testing.T, dir []byte, name string) []byte {
	b := dir[64:]
	count := int(le.Uint16(b[8:])) / 12
	for i := range count {
		off := le.Uint16(b[i*12+8:])
		if bytes.HasPrefix(b[off:], []byte(name)) {
			return b[i*12:]
		}
	}
	t.Fatalf("no entry %q", name)
	return nil
}

// TestHostile damages one field at a time. Each damage must be told by the
// call that meets it, or by Verify where verify is set.
func TestHostile(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	const super = 1024
	sound := metadata(t, victim())
	if r, err := erofs.NewReader(sound); err != nil || walk(r) != nil || r.Verify() != nil {
		t.Fatal("the victim is not sound before it is damaged")
	}
	for _, test := range []struct {
		name   string
		verify bool // Verify must tell, others may
		want   string
		damage func(t *testing.T, m []byte) []byte
	}{
		{"empty", false, "metadata of 0 bytes", func(t *testing.T, m []byte) []byte { return nil }},
		{"short", false, "metadata of 4095 bytes", func(t *testing.T, m []byte) []byte { return m[:4095] }},
		{"cut behind the first block", false, "", func(t *testing.T, m []byte) []byte { return m[:4096] }},
		{"cut in the last block", false, "outside the metadata", func(t *testing.T, m []byte) []byte { return m[:len(m)-2] }},
		{"magic", false, "magic", func(t *testing.T, m []byte) []byte { m[super]++; return m }},
		{"block size", false, "blocks of 2^13", func(t *testing.T, m []byte) []byte { m[super+12] = 13; return m }},
		{"directory blocks", false, "blocks of 2^12", func(t *testing.T, m []byte) []byte { m[super+90] = 1; return m }},
		{"feature", false, "incompatible features 0x6", func(t *testing.T, m []byte) []byte { m[super+80] |= 2; return m }},
		{"metadata elsewhere", false, "metadata from block 1", func(t *testing.T, m []byte) []byte { m[super+40] = 1; return m }},
		{"root in the superblock", false, "inode 35: not a place", func(t *testing.T, m []byte) []byte { le.PutUint16(m[super+14:], 35); return m }},
		{"root across blocks", false, "inode 127: not a place", func(t *testing.T, m []byte) []byte { le.PutUint16(m[super+14:], 127); return m }},
		{"root outside", false, "inode 65535: not a place", func(t *testing.T, m []byte) []byte { le.PutUint16(m[super+14:], 65535); return m }},
		{"root is a file", false, "want a directory", func(t *testing.T, m []byte) []byte {
			root := at(t, m, "/")
			root[0] = 1
			le.PutUint16(root[4:], unix.S_IFREG)
			return m
		}},
		{"image shorter than its files", false, "outside the image", func(t *testing.T, m []byte) []byte {
			le.PutUint32(m[super+36:], 1)
			return m
		}},

		{"compact inode", false, "in format", func(t *testing.T, m []byte) []byte { at(t, m, "file")[0] &^= 1; return m }},
		{"compressed", false, "in format", func(t *testing.T, m []byte) []byte { at(t, m, "file")[0] = 3<<1 | 1; return m }},
		{"inline file", false, "in format", func(t *testing.T, m []byte) []byte { at(t, m, "file")[0] = 2<<1 | 1; return m }},
		{"chunked directory", false, "in format", func(t *testing.T, m []byte) []byte { at(t, m, "dir")[0] = 4<<1 | 1; return m }},
		{"chunked device", false, "in format", func(t *testing.T, m []byte) []byte { at(t, m, "node")[0] = 4<<1 | 1; return m }},
		{"unknown format bit", false, "in format", func(t *testing.T, m []byte) []byte { at(t, m, "file")[1] = 0x80; return m }},
		{"no type", false, "type 1", func(t *testing.T, m []byte) []byte { le.PutUint16(at(t, m, "file")[4:], 0o644); return m }},
		{"type of the entry differs", false, "type 1, but inode", func(t *testing.T, m []byte) []byte {
			le.PutUint16(at(t, m, "file")[4:], unix.S_IFIFO)
			return m
		}},
		{"size 2^63", false, "size -", func(t *testing.T, m []byte) []byte { le.PutUint64(at(t, m, "file")[8:], 1<<63); return m }},
		{"size 2^62", false, "at most", func(t *testing.T, m []byte) []byte { le.PutUint64(at(t, m, "file")[8:], 1<<62); return m }},
		{"file over the image's end", false, "outside the image", func(t *testing.T, m []byte) []byte {
			le.PutUint64(at(t, m, "file")[8:], 1<<40)
			return m
		}},
		{"file behind the image", false, "outside the image", func(t *testing.T, m []byte) []byte {
			le.PutUint32(at(t, m, "file")[16:], 1<<32-1)
			return m
		}},
		{"nanoseconds", false, "nanoseconds", func(t *testing.T, m []byte) []byte { le.PutUint32(at(t, m, "file")[40:], 1e9); return m }},

		{"empty target", false, "symlink of 0 bytes", func(t *testing.T, m []byte) []byte { le.PutUint64(at(t, m, "link")[8:], 0); return m }},
		{"target of a block", false, "symlink of 4096 bytes", func(t *testing.T, m []byte) []byte {
			le.PutUint64(at(t, m, "long")[8:], 4096)
			return m
		}},
		{"target outside", false, "outside the metadata", func(t *testing.T, m []byte) []byte {
			le.PutUint32(at(t, m, "long")[16:], 1<<32-1)
			return m
		}},
		{"NUL in target", true, "holds a NUL", func(t *testing.T, m []byte) []byte { at(t, m, "link")[64+2] = 0; return m }},

		{"directory of 2^40 bytes", false, "directory of", func(t *testing.T, m []byte) []byte {
			le.PutUint64(at(t, m, "dir")[8:], 1<<40)
			return m
		}},
		{"directory outside", false, "outside the metadata", func(t *testing.T, m []byte) []byte {
			le.PutUint32(at(t, m, "big")[16:], 1<<31)
			return m
		}},
		{"directory in the superblock", false, "directory part 0", func(t *testing.T, m []byte) []byte {
			le.PutUint32(at(t, m, "big")[16:], 0)
			return m
		}},
		{"directory of 5 bytes", false, "holds no entry", func(t *testing.T, m []byte) []byte { le.PutUint64(at(t, m, "dir")[8:], 5); return m }},
		{"empty directory", true, "without . and ..", func(t *testing.T, m []byte) []byte {
			le.PutUint64(at(t, m, "dir/other")[8:], 0)
			return m
		}},
		{"first name odd", false, "first name", func(t *testing.T, m []byte) []byte { at(t, m, "dir")[64+8]++; return m }},
		{"first name at 0", false, "first name", func(t *testing.T, m []byte) []byte { le.PutUint16(at(t, m, "dir")[64+8:], 0); return m }},
		{"first name outside", false, "first name", func(t *testing.T, m []byte) []byte {
			le.PutUint16(at(t, m, "dir")[64+8:], 65532)
			return m
		}},
		{"name among the entries", false, "no sound name", func(t *testing.T, m []byte) []byte {
			le.PutUint16(at(t, m, "dir")[64+12+8:], 3)
			return m
		}},
		{"name outside", false, "no sound name", func(t *testing.T, m []byte) []byte {
			le.PutUint16(at(t, m, "dir")[64+3*12+8:], 65535)
			return m
		}},
		{"empty name", false, "no sound name", func(t *testing.T, m []byte) []byte {
			d := at(t, m, "dir")[64:]
			le.PutUint16(d[2*12+8:], le.Uint16(d[12+8:]))
			return m
		}},
		{"slash in a name", false, "no sound name", func(t *testing.T, m []byte) []byte {
			d := at(t, m, "dir")[64:]
			d[le.Uint16(d[2*12+8:])+1] = '/'
			return m
		}},
		{"NUL in a name", false, "no sound name", func(t *testing.T, m []byte) []byte {
			d := at(t, m, "dir")[64:]
			d[le.Uint16(d[2*12+8:])+1] = 0
			return m
		}},
		{"names out of order", true, "behind", func(t *testing.T, m []byte) []byte {
			d := at(t, m, "dir")[64:]
			d[le.Uint16(d[2*12+8:])] = 'z'
			return m
		}},
		{"entry outside", false, "is not a place", func(t *testing.T, m []byte) []byte {
			le.PutUint64(entryOf(t, at(t, m, "dir"), "deep"), 1<<63)
			return m
		}},
		{"entry that wraps", false, "is not a place", func(t *testing.T, m []byte) []byte {
			le.PutUint64(entryOf(t, at(t, m, "dir"), "deep"), 1<<59+40)
			return m
		}},
		{"unknown entry type", false, "type 200", func(t *testing.T, m []byte) []byte {
			entryOf(t, at(t, m, "dir"), "deep")[10] = 200
			return m
		}},
		{"cycle to itself", false, "points back", func(t *testing.T, m []byte) []byte {
			e := entryOf(t, at(t, m, "dir"), "deep")
			le.PutUint64(e, le.Uint64(at(t, m, "dir")[64:]))
			return m
		}},
		{"cycle to the root", false, "points back", func(t *testing.T, m []byte) []byte {
			le.PutUint64(entryOf(t, at(t, m, "dir"), "deep"), 36)
			return m
		}},
		{"directory with two names", true, "second name", func(t *testing.T, m []byte) []byte {
			d := at(t, m, "dir")
			copy(entryOf(t, d, "other")[:8], entryOf(t, d, "deep")[:8])
			return m
		}},
		{"wrong parent", true, `entry ".."`, func(t *testing.T, m []byte) []byte {
			d := at(t, m, "dir/deep")[64:]
			copy(d[12:12+8], d)
			return m
		}},

		{"shared xattr", false, "shared", func(t *testing.T, m []byte) []byte { at(t, m, "file")[64+4] = 1; return m }},
		{"xattrs outside", false, "", func(t *testing.T, m []byte) []byte {
			le.PutUint16(at(t, m, "file")[2:], 1<<16-1)
			return m
		}},
		{"xattr over the end", false, "in a rest of", func(t *testing.T, m []byte) []byte {
			le.PutUint16(at(t, m, "file")[64+12+2:], 60000)
			return m
		}},
		{"xattr prefix", false, "prefix 9", func(t *testing.T, m []byte) []byte { at(t, m, "file")[64+12+1] = 9; return m }},
		{"xattr without a name", false, "prefix 1", func(t *testing.T, m []byte) []byte { at(t, m, "file")[64+12] = 0; return m }},

		{"chunk entries of 8 bytes", false, "chunk format", func(t *testing.T, m []byte) []byte {
			at(t, m, "sparse")[16] |= 0x20
			return m
		}},
		{"chunk outside the image", false, "outside the image", func(t *testing.T, m []byte) []byte {
			le.PutUint32(at(t, m, "sparse")[64:], 1<<32-2)
			return m
		}},
		{"chunk table outside", false, "outside", func(t *testing.T, m []byte) []byte {
			le.PutUint64(at(t, m, "sparse")[8:], 1<<50)
			at(t, m, "sparse")[16] = 0
			return m
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			bounded.Case(t)
			m := test.damage(t, slices.Clone(sound))
			if len(m) >= 4096 {
				erofs.Seal(m)
			}
			r, err := erofs.NewReader(m)
			if err == nil {
				err = walk(r)
				verr := r.Verify()
				if verr == nil {
					t.Error("Verify: got no error")
				}
				if test.verify {
					err = verr
				}
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want %q", err, test.want)
			}
		})
	}
	t.Run("checksum", func(t *testing.T) {
		bounded.Case(t)
		m := slices.Clone(sound)
		m[super+64] = 'x'
		if _, err := erofs.NewReader(m); err == nil || !strings.Contains(err.Error(), "checksum") {
			t.Errorf("got error %v, want one of the checksum", err)
		}
	})
}

// TestOverlap gives Verify symlinks that all claim one block, so that little
// metadata pretends to much.
func TestOverlap(t *testing.T) {
	links := entries{"long": link(strings.Repeat("t", 4095))}
	for i := range 26 {
		links[string(rune('A'+i))] = link("t")
	}
	sound := metadata(t, dir(links))
	m := slices.Clone(sound)
	long := at(t, sound, "long")
	for name := range links {
		copy(m[len(m)-len(at(t, sound, name)):], long[:64])
	}
	erofs.Seal(m)
	r, err := erofs.NewReader(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := walk(r); err != nil {
		t.Errorf("walk: %v", err)
	}
	if err := r.Verify(); err == nil || !strings.Contains(err.Error(), "claim more") {
		t.Errorf("got error %v, want one of inodes that claim more than there is", err)
	}
}

// FuzzReader damages metadata at will. Nothing may panic, run on, or answer
// with bytes outside the image.
func FuzzReader(f *testing.F) {
	for _, root := range []*tree.Inode{
		dir(nil),
		dir(entries{"a": file("a"), "l": link("a"), "d": dir(entries{"e": dir(entries{"f": file("")})})}),
		dir(entries{"x": file("x", tree.Xattr{Name: "user.x", Value: []byte("v")}), "s": sparseFile(4<<20, 0, 3<<20)}),
		numbered(200),
		victim(),
	} {
		f.Add(metadata(f, root))
	}
	f.Fuzz(func(t *testing.T, meta []byte) {
		erofs.NewReader(meta)
		if len(meta) < 4096 {
			return
		}
		// Past the superblock, which the checksum guards from mere chance.
		meta = slices.Clone(meta)
		le.PutUint32(meta[1024:], 0xE0F5E1E2)
		erofs.Seal(meta)
		r, err := erofs.NewReader(meta)
		if err != nil {
			return
		}
		verified := r.Verify() == nil
		if err := walk(r); verified && err != nil {
			t.Errorf("walk: %v, but Verify found no fault", err)
		}
		end := r.Blocks() * erofs.BlockSize
		for nid := range uint64(len(meta))/32 + 2 {
			n, err := r.Inode(nid)
			if err != nil {
				continue
			}
			r.Xattr(n, "security.capability")
			r.Lookup(n, "file")
			r.ReadDir(n, nid, func([]byte, uint64, uint8, uint64) bool { return true })
			if target, err := r.Readlink(n); err == nil && (len(target) == 0 || int64(len(target)) != n.Size) {
				t.Errorf("inode %d: target of %d bytes, want %d", nid, len(target), n.Size)
			}
			for _, off := range []int64{0, 1, 4095, 1 << 20, n.Size / 2, n.Size - 1} {
				image, length, err := r.Span(n, off)
				if err == nil && (length <= 0 || length > n.Size-off || image < -1 || image >= 0 && image > end-length) {
					t.Errorf("inode %d at %d: span of %d bytes at %d in an image of %d", nid, off, length, image, end)
				}
			}
		}
	})
}
