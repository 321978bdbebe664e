package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// breakout is what an app tries that runs as root with the capabilities of
// Docker's default set. It prints what it got.
const breakout = `
import ctypes, errno, glob, os, resource, socket, stat, sys

def got(what, value): print(what + ":", value, flush=True)

def foreign(root): return os.path.lexists(root + "/.bootfs") or os.path.exists(root + "/run/secrets/bootfs-login")

# Descriptors and environment.
got("descriptors", sorted({f for p in glob.glob("/proc/[0-9]*/fd") for f in os.listdir(p) if os.path.lexists(p + "/" + f)}))
hidden = [f for f in glob.glob("/proc/[0-9]*/environ") if b"hidden" in open(f, "rb").read()]
got("environments with secrets", hidden)

# Roots: by /proc, and by climbing out of a chroot.
got("roots", [p for p in glob.glob("/proc/[0-9]*/root") + glob.glob("/proc/[0-9]*/cwd") if foreign(p)])
if os.fork() == 0:
    outside = [os.open(d, os.O_RDONLY) for d in ("/", "/proc", "/dev", "/dev/shm", "/data")]
    os.mkdir("/jail"); os.chroot("/jail")
    for fd in outside:
        os.fchdir(fd)
        for _ in range(30): os.chdir("..")
        if foreign("."): got("escaped by", fd)
    sys.exit()
os.wait()

# The disk that holds the cache and the writable layer.
disk = os.stat("/data").st_dev
os.mknod("/disk", stat.S_IFBLK | 0o600, disk)
try: got("disk", os.open("/disk", os.O_RDONLY))
except PermissionError: got("disk", "refused")

# Namespaces and mounts.
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    r = getattr(libc, name)(*args)
    got(name, r if r >= 0 else errno.errorcode[ctypes.get_errno()])
open_tree = 428 # the same on all architectures
call("umount2", b"/", 2)
call("mount", b"none", b"/mnt", b"tmpfs", 0, None)
call("mount", b"/", b"/mnt", None, 4096, None)
call("setns", os.open("/proc/self/ns/mnt", os.O_RDONLY), 0)
call("unshare", 0x20000)
call("unshare", 0x10000000)
call("syscall", open_tree, -100, b"/", 1)
call("prctl", 23, 21, 0, 0, 0) # is SYS_ADMIN in the bounding set

# The server: it cannot be named, and its meeting point says nothing, not even
# how it is doing.
got("parent", os.getppid())
got("processes", [p for p in os.listdir("/proc") if p.isdigit() and p != str(os.getpid())])
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
names = [l.split()[-1][1:] for l in open("/proc/net/unix") if "@bootfs/" in l]
said, flood = set(), []
for i in range(1000):
    s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect("\0" + names[i % len(names)]); flood.append(s)
    try: s.send(b"s")
    except OSError: pass # it has said its word and gone
def heard(s):
    try: return s.recv(9)
    except ConnectionResetError: return b""
for s in flood: said.add((heard(s), heard(s)))
got("meeting point", said)
`

const brokenOut = `descriptors: ['0', '1', '2']
environments with secrets: []
roots: []
disk: refused
umount2: EPERM
mount: EPERM
mount: EPERM
setns: EPERM
unshare: EPERM
unshare: EPERM
syscall: EPERM
prctl: 0
parent: 0
processes: []
meeting point: {(b'\x01', b'')}
`

func TestAppCannotBreakOut(t *testing.T) {
	dir := t.TempDir()
	login := filepath.Join(dir, "login")
	if err := os.WriteFile(login, []byte(`{"auths":{"hidden.example":{"auth":"aGlkZGVuOmhpZGRlbg=="}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"--user", "root", "--volume", dir + ":/data", "--volume", dir + "/cache:/.bootfs/rootfs.castr",
		"--volume", login + ":/run/secrets/bootfs-login", "--env", "BOOTFS_SECRET=hidden", "--env", "DROPBEAR_PASSWORD=hidden",
		"--env", "BOOTFS_PREFETCH=none",
	}
	// Without the engine's filter, boot's own has to do.
	for _, more := range [][]string{nil, {"--security-opt", "seccomp=unconfined"}} {
		t.Run(fmt.Sprint(more), func(t *testing.T) {
			run(t, append(append(args, more...), w.image, "python3", "-c", breakout)...).want(t, brokenOut)
		})
	}
}

// TestStopDuringTheStart stops a container whose first program waits for its
// bytes.
func TestStopDuringTheStart(t *testing.T) {
	release := w.proxy.hold(t)
	id := start(t, "--env", "BOOTFS_PREFETCH=none", w.image, "python3", "-c", "pass")
	const grace = 1
	began := time.Now()
	if r := docker(t, "stop", "--time", strconv.Itoa(grace), id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	if took := time.Since(began); took > grace*time.Second+endsWithin {
		t.Errorf("docker stop took %v of its grace of %d s", took, grace)
	}
	release()
}

// TestMemory reads much in containers whose images set the Go runtime for a
// program with a large heap.
func TestMemory(t *testing.T) {
	const limit = 64 << 10 // KiB; the decoded chunks that boot keeps are a quarter of it
	id := start(t, "--env", "GOGC=off", "--env", "GOMEMLIMIT=8GiB", "--env", "BOOTFS_PREFETCH=none",
		"--tmpfs", "/.bootfs/rootfs.castr", w.image, "sleep", "600")
	read := docker(t, "exec", id, "sh", "-c", `find /usr -xdev -type f -size +1M -exec cat {} + | wc -c`)
	if n, err := strconv.Atoi(strings.TrimSpace(read.stdout)); err != nil || n < 64<<20 {
		t.Fatalf("%+v; want 64 MiB or more", read)
	}
	pid := strings.TrimSpace(docker(t, "inspect", "--format", "{{.State.Pid}}", id).stdout)
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	var used int
	if _, err := fmt.Sscan(rest, &used); err != nil {
		t.Fatalf("%v\n%s", err, status)
	}
	t.Logf("boot holds %d KiB after %s bytes were read", used, strings.TrimSpace(read.stdout))
	if used > limit {
		t.Errorf("boot holds %d KiB of memory, want at most %d", used, limit)
	}
}
