package e2e

import (
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// sickDisk is a file system that shows a directory, and fails on demand.
type sickDisk struct {
	fuse.RawFileSystem

	mu    sync.Mutex // guards what follows
	errno fuse.Status
	what  operations
}

// operations are kinds of what is asked of a file system.
type operations int

const (
	toOpen operations = 1 << iota
	toRead
	toWrite
	toLookUp
)

// mountSickDisk mounts a sickDisk over dir at a new directory, until the test ends.
func mountSickDisk(t *testing.T, dir string) (d *sickDisk, at string) {
	t.Helper()
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	d = &sickDisk{RawFileSystem: fs.NewNodeFS(root, &fs.Options{})}
	at = t.TempDir()
	server, err := fuse.NewServer(d, at, &fuse.MountOptions{FsName: "sick", DirectMount: true})
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve()
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	if err := server.WaitMount(); err != nil {
		t.Fatal(err)
	}
	return d, at
}

// fail makes those operations fail with errno; 0 heals.
func (d *sickDisk) fail(errno unix.Errno, what operations) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.errno, d.what = fuse.Status(errno), what
}

func (d *sickDisk) status(op operations) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.what&op != 0 {
		return d.errno
	}
	return fuse.OK
}

func (d *sickDisk) Lookup(cancel <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if s := d.status(toLookUp); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Lookup(cancel, header, name, out)
}

func (d *sickDisk) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if s := d.status(toOpen); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Open(cancel, in, out)
}

func (d *sickDisk) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if s := d.status(toOpen); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.OpenDir(cancel, in, out)
}

func (d *sickDisk) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if s := d.status(toOpen | toWrite); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Create(cancel, in, name, out)
}

func (d *sickDisk) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if s := d.status(toRead); s != fuse.OK {
		return nil, s
	}
	return d.RawFileSystem.Read(cancel, in, buf)
}

func (d *sickDisk) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if s := d.status(toWrite); s != fuse.OK {
		return 0, s
	}
	return d.RawFileSystem.Write(cancel, in, data)
}

func (d *sickDisk) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	if s := d.status(toWrite); s != fuse.OK {
		return 0, s
	}
	return d.RawFileSystem.Writev(cancel, in, data)
}

func (d *sickDisk) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if s := d.status(toWrite); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Mkdir(cancel, in, name, out)
}

func (d *sickDisk) Rename(cancel <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if s := d.status(toWrite); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Rename(cancel, in, from, to)
}

func (d *sickDisk) Unlink(cancel <-chan struct{}, header *fuse.InHeader, name string) fuse.Status {
	if s := d.status(toWrite); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Unlink(cancel, header, name)
}

func (d *sickDisk) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if s := d.status(toWrite); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.SetAttr(cancel, in, out)
}

func (d *sickDisk) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if s := d.status(toWrite); s != fuse.OK {
		return s
	}
	return d.RawFileSystem.Fsync(cancel, in)
}
