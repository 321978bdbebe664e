package mount

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// zeroImage has as many zeros as are asked for.
type zeroImage struct{}

func (zeroImage) ReadAt(_ context.Context, p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// FuzzRequests asks everything of damaged metadata. Whatever it says, every
// request ends with an answer that fits its buffer.
func FuzzRequests(f *testing.F) {
	sparse := &tree.Inode{Mode: unix.S_IFREG | 0o600, Size: 5 << 20}
	sparse.Content.Source = bytes.NewReader(noise(1, 300))
	sparse.Content.Extents = []tree.Extent{{Logical: 3 << 20, Length: 300}}
	plan, err := rootimage.New(&tree.Tree{Root: counted(dir(entries{
		"dir":    dir(entries{"file": file(0o644, noise(1, 5000))}),
		"link":   {Mode: unix.S_IFLNK | 0o777, Target: "dir/file"},
		"null":   {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
		"xattr":  with(file(0o644, nil), tree.Xattr{Name: "user.a", Value: []byte("b")}, tree.Xattr{Name: "user.c"}),
		"sparse": sparse,
	}))})
	if err != nil {
		f.Fatal(err)
	}
	size := len(plan.Meta())
	f.Add(uint32(1100), []byte{0})
	for nid := range 20 {
		for _, field := range []int{0, 2, 4, 8, 14, 16, 40, 64, 68, 76, 80} { // of inode, xattrs and entries
			f.Add(uint32((36+nid)*32+field), []byte{0xff, 0xff})
		}
	}
	f.Fuzz(func(t *testing.T, at uint32, damage []byte) {
		meta := bytes.Clone(plan.Meta())
		if int(at) >= size || at < 1152 {
			return // the superblock has a checksum
		}
		copy(meta[at:], damage)
		reader, err := erofs.NewReader(meta)
		if err != nil {
			return
		}
		fs := newRootFS(t.Context(), reader, &Options{
			Image:        zeroImage{},
			XattrClasses: []string{"user"},
			ReadTimeout:  DefaultReadTimeout,
			Log:          slog.New(slog.NewTextHandler(io.Discard, nil)),
		})
		fs.interrupts = &interrupts{proc: -1, device: -1}
		cancel := make(chan struct{})
		buf := make([]byte, 8192)
		todo, seen := []uint64{fuse.FUSE_ROOT_ID}, map[uint64]bool{}
		for len(todo) > 0 {
			node := todo[0]
			todo = todo[1:]
			if seen[node] {
				continue
			}
			seen[node] = true
			header := fuse.InHeader{NodeId: node}
			var attr fuse.AttrOut
			if !fs.GetAttr(cancel, &fuse.GetAttrIn{InHeader: header}, &attr).Ok() {
				continue
			}
			if target, status := fs.Readlink(cancel, &header); status.Ok() && len(target) > 4095 {
				t.Errorf("target of %d bytes", len(target))
			}
			if n, status := fs.GetXAttr(cancel, &header, "user.a", buf); status.Ok() && int(n) > len(buf) {
				t.Errorf("xattr of %d bytes", n)
			}
			if n, status := fs.ListXAttr(cancel, &header, buf); status.Ok() && int(n) > len(buf) {
				t.Errorf("xattr list of %d bytes", n)
			}
			for _, off := range []uint64{0, 4000, 1 << 20, 1 << 50, 1 << 63} {
				result, status := fs.Read(cancel, &fuse.ReadIn{InHeader: header, Offset: off}, buf)
				if status.Ok() {
					want := uint64(0)
					if off < attr.Size {
						want = min(attr.Size-off, uint64(len(buf)))
					}
					if attr.Mode&unix.S_IFMT == unix.S_IFREG && uint64(result.Size()) != want {
						t.Errorf("read of %d bytes at %d of %d: got %d", len(buf), off, attr.Size, result.Size())
					}
				}
				fs.Lseek(cancel, &fuse.LseekIn{InHeader: header, Offset: off, Whence: unix.SEEK_DATA}, &fuse.LseekOut{})
			}
			var entry fuse.EntryOut
			if fs.Lookup(cancel, &header, "file", &entry).Ok() {
				todo = append(todo, entry.NodeId)
			}
			for off, last := uint64(0), uint64(0); ; last = off {
				list := fuse.NewDirEntryList(buf, off)
				if !fs.ReadDirPlus(cancel, &fuse.ReadIn{InHeader: header, Offset: off}, list).Ok() {
					break
				}
				_, outs, err := fuse.ParseDirLookupEntries(list.Bytes())
				if err != nil {
					t.Error(err)
				}
				for _, out := range outs {
					if out.NodeId != 0 {
						todo = append(todo, out.NodeId)
					}
				}
				if off = list.Offset; len(outs) == 0 {
					break
				} else if off <= last {
					t.Fatalf("readdir goes from %d to %d", last, off)
				}
			}
			findPath(reader, node)
		}
	})
}
