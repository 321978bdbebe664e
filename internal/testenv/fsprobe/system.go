package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tryLocks asks for each kind of lock on a file and says which are refused.
func tryLocks(path string) string {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return errorName(err)
	}
	defer f.Close()
	return fmt.Sprint("flock ", lockName(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)),
		", POSIX ", lockName(posixLock(f, unix.F_SETLK, 0, 10)), ", its other half ", lockName(posixLock(f, unix.F_SETLK, 100, 10)),
		", OFD ", lockName(posixLock(f, unix.F_OFD_SETLK, 200, 10)))
}

func lockName(err error) string {
	if err == nil {
		return "granted"
	}
	return errorName(err)
}

func posixLock(f *os.File, command int, start, length int64) error {
	return unix.FcntlFlock(f.Fd(), command, &unix.Flock_t{Type: unix.F_WRLCK, Start: start, Len: length})
}

func locks() {
	write("own", "x")
	for _, p := range []string{"/work/own", "/lower/rename/9", "/lower/dir/locked"} {
		f := got(os.OpenFile(p, os.O_RDWR, 0))
		say(p, unix.Flock(int(f.Fd()), unix.LOCK_EX), posixLock(f, unix.F_SETLK, 0, 10), posixLock(f, unix.F_OFD_SETLK, 200, 10))
		say("another process", inChild("lock "+p, nil))
		check(f.Close())
		say("when they are given up", inChild("lock "+p, nil))
	}
	reader := got(os.Open("/lower/text"))
	say("shared on one of the image", unix.Flock(int(reader.Fd()), unix.LOCK_SH))
	say("exclusive by a reader", unix.Flock(int(got(os.Open("/lower/text")).Fd()), unix.LOCK_EX|unix.LOCK_NB))
	read := unix.Flock_t{Type: unix.F_RDLCK, Start: 1, Len: 1}
	say("a record for reading", unix.FcntlFlock(reader.Fd(), unix.F_SETLK, &read))
	lease := func(what, p string, flags, kind int) {
		fd := open(p, flags)
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, kind)
		say(what, err)
		check(unix.Close(fd))
	}
	lease("lease to read an own file", "/work/own", unix.O_RDONLY, unix.F_RDLCK)
	lease("lease to write an own file", "/work/own", unix.O_RDWR, unix.F_WRLCK)
}

func watches() {
	fd := got(unix.InotifyInit1(unix.IN_NONBLOCK))
	const all = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB
	_, err := unix.InotifyAddWatch(fd, "/work", all)
	say("a directory", err)
	_, err = unix.InotifyAddWatch(fd, "/lower/rename", all)
	say("one of the image", err)
	events := func(what string) {
		b := make([]byte, 64<<10)
		n, err := unix.Read(fd, b)
		if err != nil {
			say(what, err)
			return
		}
		var list []string
		for b := b[:n]; len(b) > 0; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&b[0]))
			name := string(bytes.TrimRight(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+int(e.Len)], "\x00"))
			list = append(list, fmt.Sprintf("%s %#x", name, e.Mask))
			b = b[unix.SizeofInotifyEvent+int(e.Len):]
		}
		say(what, strings.Join(list, ", "))
	}
	write("watched", "x")
	check(os.Rename("watched", "watched2"))
	check(os.Remove("watched2"))
	events("create, write, rename, remove")
	write("/lower/rename/new", "x")
	events("in a directory of the image")
	check(appendTo("/lower/rename/1", "x"))
	events("a file of the image is copied")
	check(os.Remove("/lower/rename/2"))
	events("one goes")
	_, err = unix.FanotifyInit(unix.FAN_CLASS_NOTIF, unix.O_RDONLY)
	say("fanotify", err)
}

// directories reads one that holds 5,000 files of the image and 15,000 of its
// own, with all that a reader may do.
func directories() {
	const dir = "/lower/many"
	for i := range 15000 {
		check(unix.Close(open(fmt.Sprintf("%s/own-%05d", dir, i), unix.O_CREAT|unix.O_WRONLY)))
	}
	fd := open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	all := readDirectory(fd, nil)
	names := map[string]bool{}
	var unknown int
	for _, e := range all {
		names[e.name] = true
		if e.kind != unix.DT_REG && e.name != "." && e.name != ".." {
			unknown++
		}
	}
	say("entries", len(all), len(names), unknown)
	// Each place that the directory gave leads back to what followed it.
	wrong := 0
	for i := 0; i < len(all)-1; i += 997 {
		got(unix.Seek(fd, all[i].next, io.SeekStart))
		if b := readSome(fd); len(b) == 0 || b[0].name != all[i+1].name {
			wrong++
		}
	}
	say("places that lead elsewhere", wrong)
	got(unix.Seek(fd, 0, io.SeekStart))
	// What is removed or made meanwhile must neither hide nor repeat the others.
	seen := map[string]int{}
	step := 0
	rest := readDirectory(fd, func(e dirent) {
		seen[e.name]++
		if strings.HasPrefix(e.name, "own-") {
			check(os.Remove(dir + "/" + e.name))
		}
		if step++; step%100 == 0 {
			check(os.WriteFile(fmt.Sprintf("%s/later-%d", dir, step), nil, 0o644))
		}
	})
	repeated, missed := 0, 0
	for name := range names {
		switch seen[name] {
		case 0:
			missed++
		case 1:
		default:
			repeated++
		}
	}
	say("while it changes", len(rest) >= len(all), missed, repeated)
	entries := got(os.ReadDir(dir))
	own := slices.IndexFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "own-") })
	say("afterwards", own, look(dir))
	kinds := map[string]uint8{}
	for _, e := range readDirectory(open("/lower/kinds", unix.O_RDONLY), nil) {
		kinds[e.name] = e.kind
	}
	say("types", fmt.Sprint(kinds))
	f := open("/lower/text", unix.O_RDONLY)
	_, err := unix.ReadDirent(f, make([]byte, 100))
	say("a file read as a directory", err)
	_, err = unix.Read(open("/lower", unix.O_RDONLY), make([]byte, 100))
	say("a directory read as a file", err)
	_, err = unix.ReadDirent(open("/lower", unix.O_RDONLY), make([]byte, 10))
	say("too little space", err)
}

type dirent struct {
	name string
	next int64
	kind uint8
}

func readSome(fd int) []dirent {
	b := make([]byte, 8192)
	n := got(unix.ReadDirent(fd, b))
	var out []dirent
	for b := b[:n]; len(b) > 0; {
		length := binary.NativeEndian.Uint16(b[16:])
		name, _, _ := bytes.Cut(b[19:length], []byte{0})
		out = append(out, dirent{string(name), int64(binary.NativeEndian.Uint64(b[8:])), b[18]})
		b = b[length:]
	}
	return out
}

func readDirectory(fd int, each func(dirent)) []dirent {
	var all []dirent
	for {
		some := readSome(fd)
		if len(some) == 0 {
			return all
		}
		for _, e := range some {
			if each != nil {
				each(e)
			}
		}
		all = append(all, some...)
	}
}

func times() {
	stamp := func(path string) string {
		var st unix.Stat_t
		check(unix.Lstat(path, &st))
		return fmt.Sprintf("mtime %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	say("of the image", stamp("/lower/text"), stamp("/lower/symlink"), stamp("/lower/dir"), stamp("/lower/old"))
	say("chmod keeps it", os.Chmod("/lower/text", 0o640), stamp("/lower/text"))
	say("opening for writing keeps it", got(os.OpenFile("/lower/private", os.O_RDWR, 0)).Close(), stamp("/lower/private"))
	set := func(path string, at ...unix.Timespec) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, at, unix.AT_SYMLINK_NOFOLLOW)
	}
	say("nanoseconds", set("/lower/old", unix.Timespec{Sec: 1, Nsec: 2}, unix.Timespec{Sec: 3, Nsec: 123456789}), stamp("/lower/old"))
	say("of a link", set("/lower/symlink", unix.Timespec{Sec: 5}, unix.Timespec{Sec: 6, Nsec: 7}), stamp("/lower/symlink"))
	say("of a directory", set("/lower/dir", unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Sec: 8, Nsec: 9}), stamp("/lower/dir"))
	say("before 1970", set("/lower/old", unix.Timespec{Sec: -5}, unix.Timespec{Sec: -86400}), stamp("/lower/old"))
	say("after 2106", set("/lower/old", unix.Timespec{Sec: 1 << 33}, unix.Timespec{Sec: 1 << 33}), stamp("/lower/old"))
	before := time.Now().Add(-time.Second)
	write("new", "x")
	say("of a new file", got(os.Stat("new")).ModTime().After(before))
	check(set("new", unix.Timespec{Sec: 10}, unix.Timespec{Sec: 20}))
	got(os.ReadFile("new"))
	var st unix.Stat_t
	check(unix.Stat("new", &st))
	say("relatime after a read", st.Atim.Sec > 20)
	fd, err := unix.Open("new", unix.O_RDONLY|unix.O_NOATIME, 0)
	say("O_NOATIME", fd > 0, err)
	check(os.Mkdir("dir", 0o755))
	check(set("dir", unix.Timespec{Sec: 1}, unix.Timespec{Sec: 1}))
	write("dir/x", "")
	say("a new entry dates its directory", got(os.Stat("dir")).ModTime().After(before))
	var sx unix.Statx_t
	check(unix.Statx(unix.AT_FDCWD, "new", 0, unix.STATX_ALL, &sx))
	say("statx", sx.Mask&unix.STATX_BASIC_STATS == unix.STATX_BASIC_STATS, sx.Size)
}

// beforeEpoch looks at a file that the image dates before 1970.
func beforeEpoch() {
	say("it is of", got(os.Stat("/lower/ancient")).ModTime().UTC().Year())
}

func xattrs() {
	get := func(path, name string) string {
		b := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, b)
		if err != nil {
			return errorName(err)
		}
		return fmt.Sprintf("%x", b[:n])
	}
	names := func(path string) string {
		b := make([]byte, 4096)
		n, err := unix.Llistxattr(path, b)
		if err != nil {
			return errorName(err)
		}
		all := strings.Split(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00")
		slices.Sort(all)
		return strings.Join(all, " ")
	}
	for _, p := range []string{"/lower/xattrs/user", "/lower/xattrs/capability", "/lower/xattrs/dir", "/lower/text", "/lower/symlink"} {
		say(p, names(p))
	}
	const p = "/lower/xattrs/user"
	say("get", get(p, "user.note"), get(p, "user.none"), get(p, "security.capability"), get("/lower/xattrs/capability", "security.capability"))
	say("trusted", get(p, "trusted.overlay.origin"), unix.Setxattr(p, "trusted.x", []byte("1"), 0))
	say("set", unix.Setxattr(p, "user.more", []byte("1"), 0), names(p))
	say("replace", unix.Setxattr(p, "user.note", []byte("2"), unix.XATTR_REPLACE), get(p, "user.note"))
	say("create where there is one", unix.Setxattr(p, "user.note", []byte("2"), unix.XATTR_CREATE))
	say("replace where there is none", unix.Setxattr(p, "user.none", []byte("2"), unix.XATTR_REPLACE))
	say("remove", unix.Removexattr(p, "user.note"), names(p), sum(p))
	say("remove once more", unix.Removexattr(p, "user.note"))
	say("empty", unix.Setxattr(p, "user.empty", nil, 0), get(p, "user.empty"))
	say("too long a name", unix.Setxattr(p, "user."+strings.Repeat("n", 300), nil, 0))
	say("of a link", unix.Lsetxattr("/lower/symlink", "user.x", []byte("1"), 0))
	say("of a directory", unix.Setxattr("/lower/xattrs/dir", "user.x", []byte("1"), 0), names("/lower/xattrs/dir"))
	say("of a FIFO", unix.Setxattr("/lower/kinds/fifo", "user.x", []byte("1"), 0))
	n, err := unix.Getxattr("/lower/xattrs/user", "user.more", make([]byte, 0))
	say("its size", n, err)
	_, err = unix.Getxattr("/lower/xattrs/capability", "security.capability", make([]byte, 3))
	say("too little space", err)
	const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	write("program", "x")
	say("a capability", unix.Setxattr("program", "security.capability", []byte(capability), 0), names("program"))
	say("and a write takes it", appendTo("program", "y"), names("program"))
	say("a write to one of the image", appendTo("/lower/xattrs/capability", "y"), names("/lower/xattrs/capability"))
	say("another security class", unix.Setxattr("program", "security.other", []byte("1"), 0))
}

// acl is a POSIX ACL that lets one more user read and write, as the xattr has it.
func acl(user uint32) []byte {
	const none = 1<<32 - 1
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 6, none}, {2, 6, user}, {4, 4, none}, {0x10, 6, none}, {0x20, 0, none}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

func acls() {
	const access, byDefault = "system.posix_acl_access", "system.posix_acl_default"
	say("an ACL of the image", look("/lower/xattrs/acl"))
	for _, uid := range []uint32{33, 34} {
		say("honoured", uid, inChild("read /lower/xattrs/acl", as(uid, uid)), inChild("write /lower/xattrs/acl", as(uid, uid)))
	}
	for _, p := range []string{"/lower/xattrs/acl", "/lower/xattrs/user", "/work/own"} {
		if p == "/work/own" {
			write(p, "x")
		}
		say(p, unix.Setxattr(p, access, acl(35), 0), look(p))
		for _, uid := range []uint32{33, 35} {
			say("set", uid, inChild("read "+p, as(uid, uid)), inChild("write "+p, as(uid, uid)))
		}
	}
	check(os.Mkdir("dir", 0o755))
	say("default", unix.Setxattr("dir", byDefault, acl(35), 0))
	write("dir/file", "x")
	check(os.Mkdir("dir/sub", 0o777))
	b := make([]byte, 100)
	n, err := unix.Getxattr("dir/file", access, b)
	say("inherited", n, err, look("dir/file"), look("dir/sub"))
	n, err = unix.Getxattr("dir/sub", byDefault, b)
	say("and handed on", n, err, bytes.Equal(b[:max(n, 0)], acl(35)))
	say("default of one of the image", unix.Setxattr("/lower/xattrs/dir", byDefault, acl(36), 0))
	write("/lower/xattrs/dir/file", "x")
	say("inherited there", inChild("write /lower/xattrs/dir/file", as(36, 36)), inChild("write /lower/xattrs/dir/file", as(37, 37)))
	say("removed", unix.Removexattr("/lower/xattrs/acl", access), inChild("read /lower/xattrs/acl", as(33, 33)))
	say("nonsense", unix.Setxattr("own", access, []byte("nonsense"), 0))
	say("chmod changes the mask", os.Chmod("own", 0o600), inChild("read /work/own", as(35, 35)))
}

func users() {
	const uid = 1000
	user := as(uid, uid)
	for _, step := range []string{
		"read /lower/private", "write /lower/private", "write /lower/text", "remove /lower/text", "chmod /lower/text",
		"read /lower/private-dir/inside", "create /lower/dir/x", "create /lower/sticky/own", "remove /lower/sticky/theirs",
		"create /lower/setgid/made", "write /lower/theirs", "chmod /lower/theirs", "create /tmp/x", "remove /work",
	} {
		say("user", inChild(step, user))
	}
	say("group", inChild("write /lower/group", as(uid, uid, 50)), inChild("write /lower/group", user))
	say("setgid of the image", inChild("create /lower/setgid/by-root", nil))
	check(os.Mkdir("/lower/setgid/sub", 0o755))
	say("handed on", look("/lower/setgid/sub"))
	cmd := exec.Command("/lower/setuid", "child", "status")
	cmd.SysProcAttr = user
	out, err := cmd.CombinedOutput()
	say("a setuid program of the image", string(out), err)
	check(unix.Chown("/lower/setuid", 0, 0))
	say("chown takes the bit", look("/lower/setuid"))
	check(os.Chmod("/lower/setuid", 0o6755))
	check(os.Chown("/lower/setuid", 7, 8))
	check(os.Chmod("/lower/setuid", 0o6755))
	cmd = exec.Command("/lower/setuid", "child", "status")
	cmd.SysProcAttr = user
	out, err = cmd.CombinedOutput()
	say("one of its own", string(out), err)
	say("access", unix.Access("/lower/private", unix.R_OK), unix.Access("/lower/text", unix.X_OK), unix.Access("/lower/fsprobe", unix.X_OK))
}

func special() {
	say("device of the image", look("/lower/kinds/null"), os.WriteFile("/lower/kinds/null", []byte("gone"), 0))
	say("a new one", unix.Mknod("zero", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))), look("zero"))
	b := make([]byte, 4)
	n, err := unix.Read(open("zero", unix.O_RDONLY), b)
	say("read it", n, err, b)
	check(unix.Mknod("disk", unix.S_IFBLK|0o600, int(unix.Mkdev(254, 0))))
	_, err = unix.Open("disk", unix.O_RDONLY, 0)
	say("a disk", look("disk"), err)
	for _, p := range []string{"/lower/kinds/fifo", "/work/fifo"} {
		if path.Dir(p) == "/work" {
			check(unix.Mkfifo(p, 0o600))
		}
		done := make(chan string)
		go func() { done <- string(got(os.ReadFile(p))) }()
		write(p, "through the pipe")
		say(p, <-done, look(p))
	}
	for _, p := range []string{"/work/socket", "/lower/dir/socket"} {
		l, err := net.Listen("unix", p)
		say(p, err, look(p))
		go func() {
			c := got(l.Accept())
			got(c.Write([]byte("hello")))
			check(c.Close())
		}()
		c := got(net.Dial("unix", p))
		say("says", string(got(io.ReadAll(c))))
		_, err = net.Listen("unix", p)
		say("twice", err)
	}
	pair := got(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0))
	check(unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(open("/lower/text", unix.O_RDONLY)), nil, 0))
	oob := make([]byte, 64)
	_, n, _, _, err = unix.Recvmsg(pair[1], make([]byte, 1), oob, 0)
	messages := got(unix.ParseSocketControlMessage(oob[:n]))
	fds := got(unix.ParseUnixRights(&messages[0]))
	say("a descriptor sent", err, inChild("descriptor", nil, os.NewFile(uintptr(fds[0]), "sent")))
	say("a descriptor inherited", inChild("descriptor", nil, got(os.Open("/lower/text"))))
	b = make([]byte, 16)
	n, err = unix.Pread(got(unix.Open("/proc/self/fd/"+fmt.Sprint(open("/lower/text", unix.O_RDONLY)), unix.O_RDONLY, 0)), b, 0)
	say("opened by /proc", b[:n], err)
	cmd := exec.Command("/lower/fsprobe", "child", "status")
	check(os.MkdirAll("/lower/jail/lower", 0o755))
	check(os.Link("/lower/fsprobe", "/lower/jail/fsprobe"))
	cmd.Path = "/fsprobe"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: "/lower/jail"}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	say("chroot", string(out), err)
}

func names() {
	for _, n := range []int{254, 255, 256} {
		p := "/work/" + strings.Repeat("n", n)
		say(fmt.Sprint(n, " bytes"), os.WriteFile(p, nil, 0o644), errorOf(os.Lstat("/lower/"+strings.Repeat("n", n))))
	}
	for _, name := range []string{"\xff\xfe", "a\nb", " ", "-rf", "...", `\`, "é", "e\u0301", "\x01\x7f"} {
		write(name, name)
		say("made", []byte(name), sum(name))
	}
	say("listed", list("/work") != "", len(got(os.ReadDir("/work"))))
	say("of the image", list("/lower/names"))
	for _, e := range got(os.ReadDir("/lower/names")) {
		say("read", sum("/lower/names/"+e.Name()))
	}
	_, err := os.ReadFile("/lower/loop")
	say("a loop", err)
	last := "end"
	write("end", "found")
	for i := range 41 {
		name := fmt.Sprint("chain", i)
		check(os.Symlink(last, name))
		last = name
	}
	say("40 links", sum("chain39"))
	say("41 links", sum("chain40"))
	say("empty", errorOf(os.Lstat("")), unix.Mkdir("", 0o755), os.Symlink("", "empty"))
	say("slashes", errorOf(os.Lstat("/lower/text/")), errorOf(os.Lstat("/lower//text")), unix.Mkdir("slash/", 0o755), errorOf(unix.Open("slash2/", unix.O_CREAT|unix.O_WRONLY, 0o644)))
	say("a file as a directory", errorOf(os.Lstat("/lower/text/x")))
	long := strings.Repeat("./", 2045) + "end"
	say("4093 bytes", errorOf(os.Lstat(long)))
	say("4097 bytes", errorOf(os.Lstat("././"+long)))
	deep := strings.Repeat("d", 200)
	depth := 0
	for ; depth < 30; depth++ {
		if err := os.Mkdir(deep, 0o755); err != nil {
			say("mkdir", err)
			break
		}
		check(unix.Chdir(deep))
	}
	write("bottom", "deep")
	_, err = os.Getwd()
	say("a tree deeper than a path", depth, sum("bottom"), err)
	check(unix.Chdir("/work"))
	say("removed", os.RemoveAll(deep), errorOf(os.Lstat(deep)))
	target := strings.Repeat("t", 4095)
	say("a long target", os.Symlink(target, "long"), len(got(os.Readlink("long"))), os.Symlink(target+"t", "longer"))
	say("of the image", got(os.Readlink("/lower/symlink")), got(os.Readlink("/lower/long")) == target[:1000])
	deepest := "/lower/deep"
	for {
		entries := got(os.ReadDir(deepest))
		if len(entries) != 1 || !entries[0].IsDir() {
			break
		}
		deepest += "/" + entries[0].Name()
	}
	say("a deep path of the image", len(deepest), sum(deepest+"/bottom"))
}

func errorOf[T any](_ T, err error) error { return err }

func execution() {
	run := func(what string, cmd *exec.Cmd) {
		out, err := cmd.CombinedOutput()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			say(what, string(out), exit.ExitCode())
			return
		}
		say(what, string(out), err)
	}
	run("a program of the image", exec.Command("/lower/fsprobe", "child", "status"))
	run("by a link", exec.Command("/lower/probe-link", "child", "status"))
	run("a script", exec.Command("/lower/script", "one", "two"))
	run("a script whose interpreter is a script", exec.Command("/lower/chain", "one"))
	run("a script without its interpreter", exec.Command("/lower/orphan"))
	run("one that is not executable", exec.Command("/lower/text"))
	run("a directory", exec.Command("/lower"))
	run("an empty one", exec.Command("/lower/empty"))
	run("a 32-bit program", exec.Command("/lower/testapp32", "exit", "7"))
	b := got(os.ReadFile("/lower/fsprobe"))
	check(os.WriteFile("copy", b, 0o755))
	run("a copy", exec.Command("/work/copy", "child", "status"))
	memory := got(unix.MemfdCreate("program", 0))
	got(unix.Write(memory, b))
	run("memfd", exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), memory), "child", "status"))
	pid, err := execveat(open("/lower/fsprobe", unix.O_PATH))
	say("execveat of a descriptor", pid > 0, err)

	// A program that runs cannot be written, one that is open for writing not be run.
	running := exec.Command("/bin/sleep", "60")
	check(running.Start())
	f, err := os.OpenFile("/bin/busybox", os.O_WRONLY, 0)
	say("write to a running program of the image", err)
	if err == nil {
		f.Close()
	}
	check(running.Process.Kill())
	_ = running.Wait()
	copied := exec.Command("/work/copy-busybox", "60")
	check(os.WriteFile("copy-busybox", got(os.ReadFile("/bin/busybox")), 0o755))
	copied.Args[0] = "sleep"
	check(copied.Start())
	say("write to a running program of its own", errorOf(os.OpenFile("copy-busybox", os.O_WRONLY, 0)))
	say("remove it, and put another in its place", os.Remove("copy-busybox"), os.WriteFile("copy-busybox", []byte("x"), 0o755))
	check(copied.Process.Kill())
	_ = copied.Wait()
	writer := got(os.OpenFile("copy", os.O_RDWR, 0))
	run("run what is being written", exec.Command("/work/copy", "child", "status"))
	check(writer.Close())
	run("a setuid program of the image", exec.Command("/lower/setuid", "child", "status"))
	check(os.Chmod("copy", 0o644))
	run("one whose bit has gone", exec.Command("/work/copy", "child", "status"))
}

// execveat runs what fd stands for and returns its process ID.
func execveat(fd int) (int, error) {
	// A fork in Go is an exec of itself: the descriptor's path in /proc is how
	// fexecve does it where there is no execveat.
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", 3), "child", "status")
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "program")}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return cmd.Process.Pid, cmd.Wait()
}

// identity is what tells files apart: programs take two names for one file by
// device and inode, and look whether a file is still the same.
func identity() {
	id := func(path string) [2]uint64 {
		var st unix.Stat_t
		check(unix.Lstat(path, &st))
		return [2]uint64{uint64(st.Dev), st.Ino}
	}
	say("two names of one file", id("/lower/hard/a") == id("/lower/hard/b"))
	say("two files with the same content", id("/lower/rename/1") == id("/lower/rename/2"))
	before := id("/lower/dir")
	write("/lower/dir/new", "x")
	say("a directory stays itself when it changes", id("/lower/dir") == before)
	write("/work/own", "x")
	before = id("/work/own")
	check(appendTo("/work/own", "y"))
	check(os.Rename("/work/own", "/work/own2"))
	say("a file stays itself when it changes and moves", id("/work/own2") == before)
	f := open("/lower/text", unix.O_RDONLY)
	var st unix.Stat_t
	check(unix.Fstat(f, &st))
	say("open and by name", [2]uint64{uint64(st.Dev), st.Ino} == id("/lower/text"))
	listed := map[string]uint64{}
	d := open("/lower/hard", unix.O_RDONLY)
	b := make([]byte, 4096)
	for b := b[:got(unix.ReadDirent(d, b))]; len(b) > 0; b = b[binary.NativeEndian.Uint16(b[16:]):] {
		name, _, _ := bytes.Cut(b[19:], []byte{0})
		listed[string(name)] = binary.NativeEndian.Uint64(b)
	}
	say("as the directory lists it", listed["a"] == id("/lower/hard/a")[1])
}

// replaced is what becomes of a file of the image when it is first written to.
func replaced() {
	var dir, file, after unix.Stat_t
	check(unix.Lstat("/lower/dir", &dir))
	check(unix.Lstat("/lower/text", &file))
	check(appendTo("/lower/text", "x"))
	check(unix.Lstat("/lower/text", &after))
	say("on the device of its directory", file.Dev == dir.Dev, after.Dev == dir.Dev)
	say("the same inode", after.Ino == file.Ino)
}

// refused is what the root file system has nothing to do with and a container
// without more rights may not do.
func refused() {
	say("mount", unix.Mount("none", "/mnt", "tmpfs", 0, ""), unix.Mount("/lower", "/work", "", unix.MS_BIND, ""), unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	say("swap", errorOf(0, swapOn()))
	say("quota and io_uring", errorOf(raw(unix.SYS_QUOTACTL)), errorOf(raw(unix.SYS_IO_URING_SETUP, 8)))
	fd := open("/lower", unix.O_RDONLY)
	say("opened by handle", errorOf(unix.OpenByHandleAt(fd, unix.NewFileHandle(1, make([]byte, 8)), unix.O_RDONLY)))
	write("flags", "x")
	f := open("flags", unix.O_RDWR)
	say("immutable", unix.IoctlSetPointerInt(f, unix.FS_IOC_SETFLAGS, 0x10))
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	say("core pattern", len(pattern) > 0, err, os.WriteFile("/proc/sys/kernel/core_pattern", pattern, 0))
}

func swapOn() error {
	check(os.WriteFile("/work/swap", make([]byte, 1<<16), 0o600))
	_, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(got(unix.BytePtrFromString("/work/swap")))), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func raw(number uintptr, args ...uintptr) (uintptr, error) {
	a := append(args, 0, 0, 0)
	r, _, errno := unix.Syscall(number, a[0], a[1], a[2])
	if errno != 0 {
		return r, errno
	}
	return r, nil
}
