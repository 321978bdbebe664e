package mount

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

const (
	// forever is how long the kernel may keep an answer, in seconds. It is 34
	// years, which no kernel takes for overflow.
	forever = 1 << 30

	maxNameLen = 255

	// attempts is how often the kernel asks for the same page before it gives
	// up: once with the read-ahead around it, once by itself, and once more if
	// it is for a page fault.
	attempts = 3

	// placeNode is the node id of Options.Place. No inode has it: it would lie
	// behind the end of any image.
	placeNode = 1 << 62
)

// rootFS answers the kernel's requests. Its only state is the metadata: a node
// id is an EROFS nid, but for the root, which FUSE numbers 1. So there is
// nothing to remember or to forget, and nothing that one request could lock
// against another.
//
// What it leaves to RawFileSystem's default is answered with ENOSYS, which the
// kernel remembers.
type rootFS struct {
	fuse.RawFileSystem
	ctx          context.Context // ends with the server
	meta         *erofs.Reader
	image        Image
	place        string // "" for none
	xattrClasses []string
	timeout      time.Duration // of one request; less than 0 is none
	interrupts   *interrupts
	log          *failureLog
}

func newRootFS(ctx context.Context, meta *erofs.Reader, o *Options) *rootFS {
	return &rootFS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		ctx:           ctx,
		meta:          meta,
		image:         o.Image,
		place:         o.Place,
		xattrClasses:  o.XattrClasses,
		timeout:       requestTimeout(o.ReadTimeout),
		log:           &failureLog{log: o.Log, meta: meta},
	}
}

// requestTimeout is the part of a read's time that one request has, for the kernel
// asks anew; less than 0 is for ever.
func requestTimeout(read time.Duration) time.Duration {
	if read < 0 {
		return -1
	}
	return read / attempts
}

func (fs *rootFS) String() string { return "bootfs" }

// inode returns the inode that the kernel knows as node.
func (fs *rootFS) inode(node uint64) (erofs.Inode, fuse.Status) {
	switch node {
	case fuse.FUSE_ROOT_ID:
		node = fs.meta.RootNID()
	case placeNode:
		return erofs.Inode{}, fuse.ENOENT
	}
	n, err := fs.meta.Inode(node)
	if err != nil {
		return n, fs.damaged(node, err)
	}
	return n, fuse.OK
}

// damaged answers a request that the metadata cannot: it is not what it
// should be.
func (fs *rootFS) damaged(nid uint64, err error) fuse.Status {
	fs.log.failed(nid, "the image's metadata is damaged", err)
	return fuse.EIO
}

func setAttr(a *fuse.Attr, n *erofs.Inode) {
	*a = fuse.Attr{
		Ino:       n.NID,
		Size:      uint64(n.Size),
		Blocks:    uint64((n.Size + erofs.BlockSize - 1) / erofs.BlockSize * (erofs.BlockSize / 512)),
		Atime:     uint64(n.MtimeSec),
		Mtime:     uint64(n.MtimeSec),
		Ctime:     uint64(n.MtimeSec),
		Atimensec: n.MtimeNsec,
		Mtimensec: n.MtimeNsec,
		Ctimensec: n.MtimeNsec,
		Mode:      n.Mode,
		Nlink:     n.Nlink,
		Owner:     fuse.Owner{Uid: n.UID, Gid: n.GID},
		Rdev:      uint32(n.Rdev),
		Blksize:   erofs.BlockSize,
	}
}

func setEntry(out *fuse.EntryOut, n *erofs.Inode) {
	out.NodeId = n.NID
	out.EntryValid = forever
	out.AttrValid = forever
	setAttr(&out.Attr, n)
}

func (fs *rootFS) Lookup(_ <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if len(name) > maxNameLen {
		return fuse.Status(unix.ENAMETOOLONG)
	}
	dir, status := fs.inode(header.NodeId)
	if !status.Ok() {
		return status
	}
	nid, err := fs.meta.Lookup(dir, name)
	if errors.Is(err, erofs.ErrNotExist) && name == fs.place && header.NodeId == fuse.FUSE_ROOT_ID && name != "" {
		// Its attributes are valid for no time: whoever wants them, to read it or to
		// copy it into a writable layer, is told that it is not there.
		out.NodeId = placeNode
		out.EntryValid = forever
		out.Attr = fuse.Attr{Ino: placeNode, Mode: unix.S_IFDIR | 0o555, Nlink: 2}
		return fuse.OK
	}
	if errors.Is(err, erofs.ErrNotExist) {
		// Node 0 says that there is none, in a way that the kernel may keep.
		out.EntryValid = forever
		return fuse.OK
	}
	if err != nil {
		return fs.damaged(dir.NID, err)
	}
	n, status := fs.inode(nid)
	if status.Ok() {
		setEntry(out, &n)
	}
	return status
}

func (fs *rootFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, status := fs.inode(in.NodeId)
	if status.Ok() {
		out.AttrValid = forever
		setAttr(&out.Attr, &n)
	}
	return status
}

func (fs *rootFS) Readlink(_ <-chan struct{}, header *fuse.InHeader) ([]byte, fuse.Status) {
	n, status := fs.inode(header.NodeId)
	if !status.Ok() {
		return nil, status
	}
	target, err := fs.meta.Readlink(n)
	if err != nil {
		return nil, fs.damaged(n.NID, err)
	}
	return target, fuse.OK
}

// ReadDirPlus lists a directory with the attributes of what is in it. The
// kernel would ask for most of them next, one by one.
func (fs *rootFS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	dir, status := fs.inode(in.NodeId)
	if !status.Ok() {
		return status
	}
	err := fs.meta.ReadDir(dir, in.Offset, func(name []byte, nid uint64, typ uint8, next uint64) bool {
		dots := string(name) == "." || string(name) == ".."
		var n erofs.Inode
		if !dots {
			if n, status = fs.inode(nid); !status.Ok() {
				return false
			}
		}
		entry := out.AddDirLookupEntry(fuse.DirEntry{Name: string(name), Ino: nid, Mode: uint32(typ) << 12, Off: next})
		if entry != nil && !dots {
			setEntry(entry, &n)
		}
		return entry != nil
	})
	if err != nil {
		return fs.damaged(dir.NID, err)
	}
	return status
}

// Files and directories need no handle. Once told so, the kernel opens and
// closes them by itself and keeps the pages of both.

func (fs *rootFS) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (fs *rootFS) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

func (fs *rootFS) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Read never reads short before the end of the file: the kernel would take
// that for the end and make zeros of the rest.
func (fs *rootFS) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, status := fs.inode(in.NodeId)
	if !status.Ok() {
		return nil, status
	}
	if in.Offset >= uint64(n.Size) {
		return fuse.ReadResultData(nil), fuse.OK
	}
	off := int64(in.Offset)
	buf = buf[:min(int64(len(buf)), n.Size-off)]

	ctx, stop := fs.readContext()
	defer stop()
	tid := in.Pid // in is reused when Read has returned
	go func() {
		if fs.interrupted(ctx, cancel, tid) {
			stop()
		}
	}()
	if err := fs.readFile(ctx, n, buf, off); err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, fuse.EINTR // nobody waits for it
		}
		fs.log.failed(n.NID, fmt.Sprintf("read of %d bytes at %d failed", len(buf), off), err)
		return nil, fuse.EIO
	}
	return fuse.ReadResultData(buf), fuse.OK
}

// readContext is the context of one request to read.
func (fs *rootFS) readContext() (context.Context, context.CancelFunc) {
	if fs.timeout < 0 {
		return context.WithCancel(fs.ctx)
	}
	return context.WithTimeout(fs.ctx, fs.timeout)
}

// interrupted waits until ctx ends or the read of thread tid is to be given up,
// and reports which. cancel is closed by a FUSE INTERRUPT and by the end of the
// connection.
func (fs *rootFS) interrupted(ctx context.Context, cancel <-chan struct{}, tid uint32) bool {
	select {
	case <-cancel:
	case <-ctx.Done():
		return false
	}
	for !fs.interrupts.final(tid) {
		select {
		case <-time.After(interruptStep):
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// readFile fills p with the bytes of n from off; they lie within the file.
func (fs *rootFS) readFile(ctx context.Context, n erofs.Inode, p []byte, off int64) error {
	for len(p) > 0 {
		at, length, err := fs.meta.Span(n, off)
		if err != nil {
			return err
		}
		part := p[:min(int64(len(p)), length)]
		if at < 0 {
			clear(part)
		} else if got, err := fs.readImage(ctx, part, at, at+length); err != nil {
			return err
		} else if got != len(part) {
			return fmt.Errorf("image at %d: got %d bytes, want %d", at, got, len(part))
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// readImage fills p with the bytes of the image from off, of a file that goes on
// until end.
func (fs *rootFS) readImage(ctx context.Context, p []byte, off, end int64) (int, error) {
	if r, ok := fs.image.(FileReader); ok {
		return r.ReadFile(ctx, p, off, end)
	}
	return fs.image.ReadAt(ctx, p, off)
}

// Lseek finds holes and data, for programs that copy sparse files.
func (fs *rootFS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	n, status := fs.inode(in.NodeId)
	if !status.Ok() {
		return status
	}
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return fuse.EINVAL
	}
	if in.Offset >= uint64(n.Size) {
		return fuse.Status(unix.ENXIO)
	}
	off := int64(in.Offset)
	for off < n.Size {
		at, length, err := fs.meta.Span(n, off)
		if err != nil {
			return fs.damaged(n.NID, err)
		}
		if (at < 0) == (in.Whence == unix.SEEK_HOLE) {
			break
		}
		off += length
	}
	if off >= n.Size && in.Whence == unix.SEEK_DATA {
		return fuse.Status(unix.ENXIO)
	}
	out.Offset = uint64(off) // every file ends with a hole
	return fuse.OK
}

// xattrClass reports whether xattrs like name occur in the image.
func (fs *rootFS) xattrClass(name string) bool {
	class, _, _ := strings.Cut(name, ".")
	return slices.Contains(fs.xattrClasses, class)
}

func (fs *rootFS) GetXAttr(_ <-chan struct{}, header *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	if len(fs.xattrClasses) == 0 {
		return 0, fuse.ENOSYS
	}
	if !fs.xattrClass(name) {
		return 0, fuse.Status(unix.EOPNOTSUPP)
	}
	n, status := fs.inode(header.NodeId)
	if !status.Ok() {
		return 0, status
	}
	value, ok, err := fs.meta.Xattr(n, name)
	switch {
	case err != nil:
		return 0, fs.damaged(n.NID, err)
	case !ok:
		return 0, fuse.ENODATA
	case len(value) > len(dest):
		return uint32(len(value)), fuse.ERANGE // go-fuse answers a question for the size with it
	}
	return uint32(copy(dest, value)), fuse.OK
}

func (fs *rootFS) ListXAttr(_ <-chan struct{}, header *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	if len(fs.xattrClasses) == 0 {
		return 0, fuse.ENOSYS
	}
	n, status := fs.inode(header.NodeId)
	if !status.Ok() {
		return 0, status
	}
	size := 0
	err := fs.meta.Xattrs(n, func(name string, _ []byte) bool {
		if strings.HasPrefix(name, "trusted.") && header.Uid != 0 {
			return true // as on a disk, others do not see that they are there
		}
		if size+len(name) < len(dest) {
			copy(dest[size:], name)
			dest[size+len(name)] = 0
		}
		size += len(name) + 1
		return true
	})
	if err != nil {
		return 0, fs.damaged(n.NID, err)
	}
	if size > len(dest) {
		return uint32(size), fuse.ERANGE
	}
	return uint32(size), fuse.OK
}

func (fs *rootFS) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{
		Blocks:  uint64(fs.meta.Blocks()),
		Files:   fs.meta.Inodes(),
		Bsize:   erofs.BlockSize,
		Frsize:  erofs.BlockSize,
		NameLen: maxNameLen,
	}
	return fuse.OK
}
