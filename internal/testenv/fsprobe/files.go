package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"

	"golang.org/x/sys/unix"
)

// copyUp changes files of the image in the ways that make the writable layer
// copy them.
func copyUp() {
	say("as the image has it", sum("/lower/dense"), look("/lower/dense"))
	reader := open("/lower/dense", unix.O_RDONLY)
	f := got(os.OpenFile("/lower/dense", os.O_WRONLY|os.O_APPEND, 0))
	n, err := f.WriteString("tail")
	say("append to 100 MiB", n, err)
	say("appended", sum("/lower/dense"), look("/lower/dense"))
	b := make([]byte, 16)
	n, err = unix.Pread(reader, b, 50<<20)
	say("who had it open before reads", b[:n], err)
	say("its end", got(unix.Seek(reader, 0, io.SeekEnd)))

	for _, c := range []struct {
		what string
		do   func(path string) error
	}{
		{"truncate to 0", func(p string) error { return os.Truncate(p, 0) }},
		{"truncate to less", func(p string) error { return os.Truncate(p, 5000) }},
		{"truncate to more", func(p string) error { return os.Truncate(p, 50000) }},
		{"open with O_TRUNC", func(p string) error { return os.WriteFile(p, []byte("new"), 0) }},
		{"write in the middle", func(p string) error {
			f := got(os.OpenFile(p, os.O_RDWR, 0))
			defer f.Close()
			_, err := f.WriteAt([]byte("middle"), 6000)
			return err
		}},
		{"chmod", func(p string) error { return os.Chmod(p, 0o600) }},
		{"chown", func(p string) error { return os.Chown(p, 7, 8) }},
		{"chmod and write", func(p string) error {
			check(os.Chmod(p, 0o640))
			f := got(os.OpenFile(p, os.O_RDWR, 0))
			defer f.Close()
			_, err := f.WriteAt([]byte("first"), 0)
			return err
		}},
		{"setxattr", func(p string) error { return unix.Setxattr(p, "user.new", []byte("1"), 0) }},
		{"open for writing and nothing more", func(p string) error { return got(os.OpenFile(p, os.O_RDWR, 0)).Close() }},
	} {
		p := "/lower/copy/" + c.what
		say(c.what, c.do(p), sum(p), look(p))
	}
	say("a setuid file that is written to", os.WriteFile("/lower/setuid", []byte("x"), 0o644), look("/lower/setuid"))
}

// twoWriters lets two processes append to one file of the image at once.
func twoWriters() {
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if out := inChild("append /lower/log", nil); out != "" {
				say("a writer", out)
			}
		})
	}
	both.Wait()
	b := got(os.ReadFile("/lower/log"))
	head, rest, _ := bytes.Cut(b, []byte("\n"))
	say("the log", head, bytes.Count(rest, []byte("a line from one of two writers\n")), look("/lower/log"))
}

func renameFiles() {
	write("a", "a")
	write("b", "b")
	say("over another", os.Rename("a", "b"), sum("b"))
	say("image over own", os.Rename("/lower/rename/1", "b"), sum("b"))
	say("own over image", os.Rename("b", "/lower/rename/2"), sum("/lower/rename/2"))
	say("image over image", os.Rename("/lower/rename/3", "/lower/rename/4"), sum("/lower/rename/4"), list("/lower/rename"))
	say("file over directory", os.Rename("/lower/rename/4", "/lower/rename/dir"))
	check(os.Mkdir("d", 0o755))
	say("directory over file", os.Rename("d", "/lower/rename/4"))
	say("directory over one that is not empty", os.Rename("d", "/lower/rename/dir"))
	say("directory over an empty one", os.Rename("d", "/lower/rename/empty"), list("/lower/rename"))
	at2 := func(what, from, to string, flags uint) {
		say(what, unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags))
	}
	write("c", "c")
	at2("NOREPLACE where there is one", "c", "/lower/rename/5", unix.RENAME_NOREPLACE)
	at2("NOREPLACE where there is none", "c", "c2", unix.RENAME_NOREPLACE)
	at2("EXCHANGE of own and image", "c2", "/lower/rename/5", unix.RENAME_EXCHANGE)
	say("exchanged", sum("c2"), sum("/lower/rename/5"))
	at2("EXCHANGE with none", "c2", "none", unix.RENAME_EXCHANGE)
	at2("WHITEOUT", "c2", "c3", unix.RENAME_WHITEOUT)
	say("after it", look("c2"), look("c3"))
	at2("both flags", "c3", "c4", unix.RENAME_EXCHANGE|unix.RENAME_NOREPLACE)

	// As dpkg replaces a file: a link to the old one, the new one over it.
	check(os.Link("/lower/rename/6", "/lower/rename/6.dpkg-tmp"))
	write("/lower/rename/6.dpkg-new", "new")
	check(os.Rename("/lower/rename/6.dpkg-new", "/lower/rename/6"))
	say("as dpkg", sum("/lower/rename/6"), sum("/lower/rename/6.dpkg-tmp"), os.Remove("/lower/rename/6.dpkg-tmp"), list("/lower/rename"))
	say("with the name that it has", os.Rename("c3", "c3"))
	check(os.Link("c3", "c5"))
	say("over another name of itself", os.Rename("c3", "c5"), look("c3"), look("c5"))
	say("into itself", os.Rename("/lower/rename", "/lower/rename/dir/x"))
	check(os.MkdirAll("own/sub", 0o755))
	write("own/sub/file", "x")
	say("an own directory", os.Rename("own", "own2"), sum("own2/sub/file"))
}

// renameDirectory renames a directory of the image, and then as mv does.
func renameDirectory() {
	say("rename(2)", os.Rename("/lower/dir", "/lower/dir2"))
}

func whiteouts() {
	const dir = "/lower/white"
	say("a file goes", os.Remove(dir+"/file"), look(dir+"/file"), list(dir))
	write(dir+"/file", "again")
	say("and comes back", sum(dir+"/file"), list(dir))
	say("and goes", os.Remove(dir+"/file"), list(dir))
	say("a directory that is not empty", unix.Rmdir(dir+"/sub"))
	say("a tree goes", os.RemoveAll(dir+"/sub"), list(dir))
	check(os.Mkdir(dir+"/sub", 0o700))
	say("and comes back empty", list(dir+"/sub"), look(dir+"/sub"))
	write(dir+"/sub/inside", "new")
	say("with a file of an old name", list(dir+"/sub"), sum(dir+"/sub/inside"))
	say("a file where a directory was", os.RemoveAll(dir+"/sub"), os.WriteFile(dir+"/sub", []byte("x"), 0o644), look(dir+"/sub"))
	say("a directory where a link was", os.Remove(dir+"/link"), os.Mkdir(dir+"/link", 0o755), list(dir))
	fd := open(dir+"/open", unix.O_RDONLY)
	say("an open file goes", os.Remove(dir+"/open"))
	b := make([]byte, 8)
	n, err := unix.Pread(fd, b, 0)
	var st unix.Stat_t
	check(unix.Fstat(fd, &st))
	say("and can be read", b[:n], err, st.Nlink)
	check(os.Chdir(dir + "/cwd"))
	say("the working directory goes", os.Remove(dir+"/cwd"))
	_, err = unix.Open("x", unix.O_CREAT|unix.O_WRONLY, 0o644)
	say("a file in it", err)
	say("the parent of a directory that has gone", list(dir))
	say("a large tree goes", os.RemoveAll("/lower/many"), look("/lower/many"))
	check(os.Mkdir("/lower/many", 0o755))
	say("and is empty when it comes back", list("/lower/many"))
	node := func(what, path string) {
		say(what, unix.Mknod(path, unix.S_IFCHR|0o600, 0), look(path))
	}
	node("a device 0:0, which looks like a whiteout", dir+"/char")
	say("is listed", list(dir))
}

func links() {
	for _, name := range []string{"a", "b", "sub/c"} {
		say("image", look("/lower/hard/"+name))
	}
	say("link to an image's file", os.Link("/lower/hard/a", "/work/d"), look("/work/d"), look("/lower/hard/a"))
	say("write to one name", appendTo("/work/d", "more"), sum("/work/d"), sum("/lower/hard/a"))
	say("remove one name", os.Remove("/lower/hard/a"), look("/work/d"))
	say("link to a directory", os.Link("/lower/hard", "x"))
	say("link to a link", os.Link("/lower/symlink", "l"), look("l"))
	say("over a file", os.Link("/work/d", "/lower/hard/b"))
	fd := open("/work", unix.O_TMPFILE|unix.O_RDWR)
	got(unix.Write(fd, []byte("nameless")))
	say("O_TMPFILE", fstat(fd))
	say("its name", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, "named", unix.AT_SYMLINK_FOLLOW), sum("named"), look("named"))
	fd = open("/lower/hard/sub", unix.O_TMPFILE|unix.O_RDWR|unix.O_EXCL)
	say("one that gets none", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, "named2", unix.AT_SYMLINK_FOLLOW))
	fd = open("/lower/text", unix.O_RDONLY)
	say("a name by descriptor", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, "text", unix.AT_SYMLINK_FOLLOW), look("text"))
	say("without a path", unix.Linkat(fd, "", unix.AT_FDCWD, "text2", unix.AT_EMPTY_PATH))
	check(os.Remove("text"))
	say("gone again", look("/lower/text"))
	for i := range 100 {
		check(os.Link("named", fmt.Sprint("link", i)))
	}
	say("100 links", look("named"))
	write("nlink", "x")
	check(os.Mkdir("parent", 0o755))
	check(os.Mkdir("parent/child", 0o755))
}

func fstat(fd int) string {
	var st unix.Stat_t
	check(unix.Fstat(fd, &st))
	return fmt.Sprintf("%o %d links, %d bytes", st.Mode, st.Nlink, st.Size)
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

func sparse() {
	const tera = 1 << 40
	f := got(os.Create("lastlog"))
	check(f.Truncate(tera))
	got(f.WriteAt([]byte("here"), tera/2))
	fd := int(f.Fd())
	seek := func(what string, off int64, whence int) {
		at, err := unix.Seek(fd, off, whence)
		say(what, at, err)
	}
	blocks := func(what string) {
		var st unix.Stat_t
		check(unix.Fstat(fd, &st))
		say(what, st.Size, st.Blocks*512 <= 64<<10)
	}
	blocks("1 TiB with one block")
	seek("first data", 0, unix.SEEK_DATA)
	seek("first hole", 0, unix.SEEK_HOLE)
	seek("hole after the data", tera/2, unix.SEEK_HOLE)
	seek("data after it", tera/2+8192, unix.SEEK_DATA)
	seek("beyond the end", tera, unix.SEEK_HOLE)
	say("punch it out", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, tera/2, 4096))
	seek("no data any more", 0, unix.SEEK_DATA)
	say("allocate", unix.Fallocate(fd, 0, 0, 1<<20), unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, tera, 1<<20))
	say("zero", unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 4096, 4096))
	say("collapse", unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096))
	say("insert", unix.Fallocate(fd, unix.FALLOC_FL_INSERT_RANGE, 0, 4096))
	check(f.Truncate(0))

	// One of the image's, with a hole in its middle. Engines write such files
	// out in full, so where the holes are is not compared.
	say("of the image", sum("/lower/holes"))
	say("appended to", appendTo("/lower/holes", "tail"), sum("/lower/holes"))
	hole := open("/lower/holes", unix.O_RDWR)
	say("punch one of the image", unix.Fallocate(hole, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096), sum("/lower/holes"))
}

// copying moves bytes inside the kernel, from files of the image.
func copying() {
	in := open("/lower/text", unix.O_RDONLY)
	size := int(got(unix.Seek(in, 0, io.SeekEnd)))
	from := int64(7)
	out := open("sent", unix.O_CREAT|unix.O_RDWR)
	n, err := unix.Sendfile(out, in, &from, size)
	say("sendfile", n, err, sum("sent"))
	var pipe [2]int
	check(unix.Pipe(pipe[:]))
	from = 9
	moved, err := unix.Splice(in, &from, pipe[1], nil, 4096, 0)
	say("splice from a file", moved, err)
	out = open("spliced", unix.O_CREAT|unix.O_RDWR)
	moved, err = unix.Splice(pipe[0], nil, out, nil, 4096, 0)
	say("splice into a file", moved, err, sum("spliced"))
	pair := got(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0))
	from = 0
	n, err = unix.Sendfile(pair[0], in, &from, 5000)
	b := make([]byte, 5000)
	m := got(unix.Read(pair[1], b))
	say("sendfile to a socket", n, err, m > 0 && bytes.Equal(b[:m], got(os.ReadFile("/lower/text"))[:m]))
	say("readahead and advice", unix.Fadvise(in, 0, 0, unix.FADV_SEQUENTIAL), unix.Fadvise(in, 0, 0, unix.FADV_WILLNEED), unix.Fadvise(in, 0, 0, unix.FADV_DONTNEED))
	vectors := [][]byte{make([]byte, 3), make([]byte, 5)}
	n, err = unix.Preadv(in, vectors, 10)
	say("preadv", n, err, vectors[0], vectors[1])
	n, err = unix.Pread(in, b, int64(size)-3)
	say("the end", n, err)
	n, err = unix.Pread(in, b, int64(size)+3)
	say("behind the end", n, err)
	for _, sync := range []struct {
		what string
		do   func(int) error
	}{{"fsync", unix.Fsync}, {"fdatasync", unix.Fdatasync}, {"syncfs", unix.Syncfs}} {
		say(sync.what, sync.do(out), sync.do(in))
	}
	say("fsync of a directory", unix.Fsync(open("/lower", unix.O_RDONLY)))
}

// copyRange copies a file of the image, and one of its own, inside the kernel.
func copyRange() {
	in := open("/lower/text", unix.O_RDONLY)
	from := int64(100)
	n, err := unix.CopyFileRange(in, &from, open("copied", unix.O_CREAT|unix.O_RDWR), nil, 1<<20, 0)
	say("a file of the image", n, err, sum("copied"))
	say("clone", unix.IoctlFileClone(open("copied", unix.O_RDWR), in))
	out, err := exec.Command("/bin/cp", "/lower/text", "cp").CombinedOutput()
	say("cp", string(out), err, sum("cp"))
	from = 0
	n, err = unix.CopyFileRange(open("cp", unix.O_RDONLY), &from, open("copied2", unix.O_CREAT|unix.O_RDWR), nil, 1<<20, 0)
	say("one of its own", n, err, sum("copied2"))
}

// metadataFirst changes the mode of a file of the image, and later opens it for
// writing without a write.
func metadataFirst() {
	check(os.Chmod("/lower/text", 0o640))
	check(got(os.OpenFile("/lower/text", os.O_RDWR, 0)).Close())
	say("the time of its contents is kept", got(os.Stat("/lower/text")).ModTime().Year())
}

// aligned is memory as O_DIRECT wants it.
func aligned(n int) []byte {
	return got(unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON))
}

func direct() {
	b := aligned(8192)
	in, err := unix.Open("/lower/text", unix.O_RDONLY|unix.O_DIRECT, 0)
	say("open one of the image", err)
	n, err := unix.Pread(in, b, 4096)
	plain := make([]byte, 8192)
	got(unix.Pread(open("/lower/text", unix.O_RDONLY), plain, 4096))
	say("read it", n, err, bytes.Equal(b, plain))
	out, err := unix.Open("direct", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
	say("open one of its own", err)
	n, err = unix.Pwrite(out, b, 0)
	say("write it", n, err, sum("direct"))
	up, err := unix.Open("/lower/rename/8", unix.O_RDWR|unix.O_DIRECT, 0)
	say("open one of the image for writing", err)
	n, err = unix.Pwrite(up, b, 4096)
	say("write it", n, err, sum("/lower/rename/8"))
	n, err = unix.Pread(up, b, 0)
	say("read it", n, err)
}

func mapped() {
	in := open("/lower/text", unix.O_RDONLY)
	shared := got(unix.Mmap(in, 0, 8192, unix.PROT_READ, unix.MAP_SHARED))
	private := got(unix.Mmap(in, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE))
	say("the image's text", bytes.Equal(shared, private), shared[:20])
	copy(private, "private")
	say("a private change", private[:20], shared[:20])
	_, err := unix.Mmap(in, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	say("shared and writable without the right", err)
	code, err := unix.Mmap(in, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	say("executable", len(code), err)

	out := open("/lower/text", unix.O_RDWR)
	writable := got(unix.Mmap(out, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED))
	copy(writable, "shared")
	say("a shared change", unix.Msync(writable, unix.MS_SYNC), sum("/lower/text"))
	say("who mapped it before", shared[:20])
	file := os.NewFile(uintptr(out), "text")
	say("another process", inChild("remap", nil, file), writable[100:114])
	f := got(os.Create("grown"))
	check(f.Truncate(8192))
	memory := got(unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED))
	copy(memory[5000:], "beyond")
	got(f.WriteAt([]byte("by write"), 10))
	say("written and mapped", memory[10:18], sum("grown"))
	say("unmap", unix.Munmap(memory), unix.Madvise(shared, unix.MADV_DONTNEED), shared[:10])
	say("lock", unix.Mlock(shared[:4096]), unix.Munlock(shared[:4096]))
}

func manyFiles() {
	check(os.Mkdir("many", 0o755))
	const count = 10000
	for i := range count {
		fd := open(fmt.Sprintf("many/%05d", i), unix.O_CREAT|unix.O_WRONLY)
		if i%100 == 0 {
			got(unix.Write(fd, []byte("content")))
		}
		check(unix.Close(fd))
	}
	entries := got(os.ReadDir("many"))
	say("files", len(entries), entries[0].Name(), entries[count-1].Name())
	out, err := exec.Command("/bin/sh", "-c", "ls many | wc -l; find /work/many -type f -size +0 | wc -l; du -s many >/dev/null && echo measured").CombinedOutput()
	say("as programs see it", string(out), err)
	say("removed", os.RemoveAll("many"), look("many"))
}

func statFS() {
	var root, work, lower unix.Statfs_t
	check(unix.Statfs("/", &root))
	check(unix.Statfs("/work", &work))
	check(unix.Statfs("/lower", &lower))
	say("an overlay", root.Type == unix.OVERLAYFS_SUPER_MAGIC, root.Bsize, root.Frsize, root.Namelen)
	say("one file system", root.Blocks == work.Blocks && root.Blocks == lower.Blocks, root.Fsid == lower.Fsid)
	say("the size and inodes of a disk", root.Blocks*uint64(root.Bsize) > 1<<30, root.Files > 1000, root.Bavail > 0)
	before := root.Bfree
	f := got(os.Create("space"))
	say("64 MiB", unix.Fallocate(int(f.Fd()), 0, 0, 64<<20))
	check(unix.Statfs("/", &root))
	say("are taken from it", before > root.Bfree)
}
