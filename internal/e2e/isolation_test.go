package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// attempts is what an app may try that runs as root, against whatever runs
// beside it, the kernel and the limits of its container. It prints how each
// ended, and so says the same in a container that has nothing to hide.
const attempts = `
import ctypes, errno, os, platform, shutil, signal, socket, struct, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
def result(r):
    if r >= 0: return "done"
    e = errno.errorcode[ctypes.get_errno()]
    return "refused" if e in ("EPERM", "ENOSYS") else e # engines differ in how they refuse what they do not know
def call(name, *args): print(name + ":", result(getattr(libc, name)(*args)), flush=True)
numbers = {"x86_64": {"perf_event_open": 298, "bpf": 321, "keyctl": 250, "pivot_root": 155, "kexec_load": 246, "delete_module": 176},
           "aarch64": {"perf_event_open": 241, "bpf": 280, "keyctl": 219, "pivot_root": 41, "kexec_load": 104, "delete_module": 106}}
numbers = numbers[platform.machine()] | {"pidfd_open": 434, "open_tree": 428, "fsopen": 430, "mount_setattr": 442, "listmount": 458, "open_tree_attr": 467}
def syscall(name, *args): print(name + ":", result(libc.syscall(numbers[name], *args)), flush=True)

# Other processes: none can be named, and a signal to all reaches nobody.
print("parent", os.getppid(), "processes", [p for p in os.listdir("/proc") if p.isdigit()])
named = [p for p in range(2, 300) if libc.syscall(numbers["pidfd_open"], p, 0) >= 0]
print("process descriptors", named)
if os.fork() == 0:
    for s in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        try: os.kill(-1, s)
        except OSError as e: print(s.name, errno.errorcode[e.errno])
    sys.stdout.flush()
    os._exit(0)
os.wait()
print("still there")
iov = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
print("memory of others", sum(libc.process_vm_readv(p, iov, 1, iov, 1, 0) > 0 for p in range(2, 300)))
for f in ("mem", "environ", "root", "maps", "fd"): print("/proc/2/" + f, os.path.exists("/proc/2/" + f))

# Namespaces, mounts, the kernel.
call("unshare", 0x10000000); call("unshare", 0x20000); call("unshare", 0x40000000)
call("setns", os.open("/proc/self/ns/mnt", os.O_RDONLY), 0)
call("mount", b"proc", b"/mnt", b"proc", 0, None); call("mount", b"fusectl", b"/mnt", b"fusectl", 0, None)
call("umount2", b"/", 2); call("umount2", b"/proc/kcore", 2)
syscall("pivot_root", b"/", b"/mnt"); syscall("open_tree", -100, b"/", 1); syscall("fsopen", b"tmpfs", 0)
syscall("mount_setattr", -100, b"/", 0, None, 0); syscall("open_tree_attr", -100, b"/", 1, None, 0)
syscall("bpf", 0, None, 0); syscall("perf_event_open", None, 0, 0, 0, 0); syscall("keyctl", 0, -3, 0)
syscall("kexec_load", 0, 0, None, 0); syscall("delete_module", b"fuse", 0)
call("swapoff", b"/none"); call("acct", b"/none"); call("sethostname", b"x", 1); call("reboot", 0)
call("klogctl", 3, ctypes.create_string_buffer(10), 10)
print("fusectl", os.listdir("/sys/fs/fuse/connections") if os.path.exists("/sys/fs/fuse/connections") else [])
for f in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/sys/fs/cgroup/cgroup.procs", "/proc/1/oom_score_adj", "/proc/kcore", "/proc/keys"):
    for mode in ("rb", "ab"):
        try: open(f, mode).close(); print(f, mode, "opened")
        except OSError as e: print(f, mode, errno.errorcode[e.errno])

# Capabilities: neither a file's nor a setuid program's come back.
caps = [l for l in open("/proc/self/status") if l.startswith(("Cap", "NoNewPrivs", "Uid", "Groups"))]
print("".join(caps), end="")
shutil.copy("/usr/local/bin/testapp", "/planted")
os.setxattr("/planted", "security.capability", struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0)) # cap_sys_admin+ep
def planted():
    r = subprocess.run(["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "/planted", "status"], capture_output=True, text=True)
    print("planted", r.returncode != 0, [l for l in r.stdout.splitlines() if l.startswith("CapEff")])
planted()
os.removexattr("/planted", "security.capability")
os.chmod("/planted", 0o4755)
planted()
print("rights in the bounding set", [c for c in range(41) if libc.prctl(23, c, 0, 0, 0) == 1])
print("setuid programs", subprocess.run("find / -xdev -path /planted -prune -o -perm /6000 -type f -print | sort", shell=True, capture_output=True, text=True).stdout.split())
print("descriptors", sorted(os.listdir("/proc/self/fd"))[:-1])
`

// corner looks for what boot has for execs, as an app may.
const corner = `
import os, subprocess
print("listed", ".bootfs" in os.listdir("/"), subprocess.run("find / -xdev -maxdepth 1 -name .bootfs; cut -d' ' -f5 /proc/self/mountinfo | grep bootfs", shell=True, capture_output=True, text=True).stdout)
for f in (os.stat, os.listdir, os.chdir, os.rmdir, lambda p: os.rename(p, "/other"), lambda p: os.chmod(p, 0o777), lambda p: os.open(p + "/boot", os.O_RDONLY), lambda p: os.stat(p + "/status")):
    try: print("there:", f("/.bootfs"))
    except OSError as e: print("not there:", e.strerror)
`

// inExec is what a program does that was brought in by docker exec as root: it
// shares boot's PID and mount namespaces and has the capabilities of the
// container.
const inExec = `
import ctypes, errno, glob, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def errors(f, *args):
    try: return f(*args) and "opened"
    except OSError as e: return errno.errorcode[e.errno]
def result(r): return "done" if r >= 0 else errno.errorcode[ctypes.get_errno()]
status = dict(l.split(":\t") for l in open("/proc/self/status").read().splitlines())
print("SYS_ADMIN", int(status["CapEff"], 16) >> 21 & 1, "seccomp", status["Seccomp"])
print("/proc/1/mem", errors(open, "/proc/1/mem", "rb"))
for f in ("root", "cwd", "exe", "fd/0", "fd/5"): print("/proc/1/" + f, errors(os.readlink, "/proc/1/" + f))
print("ptrace", result(libc.ptrace(16, 1, 0, 0)), "seize", result(libc.ptrace(0x4206, 1, 0, 0)))
buffer = ctypes.create_string_buffer(8)
iov = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
print("memory", result(libc.process_vm_readv(1, iov, 1, iov, 1, 0)))
fd = libc.syscall(434, 1, 0)
print("its descriptors", [result(libc.syscall(438, fd, n, 0)) for n in (0, 5, 10)])
os.kill(1, 9)
print("killed, and still there")

# Boot's corner: nothing can be put there, and nobody is more than he is by it.
print("corner", sorted(os.listdir("/.bootfs")), oct(os.stat("/.bootfs/boot").st_mode & 0o7777))
for f in ("boot", "status", "new"): print("write", f, errors(open, "/.bootfs/" + f, "ab"))
for f in ("boot", "status"): print("remove", f, errors(os.unlink, "/.bootfs/" + f))
print("remove", errors(os.rmdir, "/.bootfs"), "rename", errors(os.rename, "/.bootfs", "/other"))
print("flags", [l.split()[5] for l in open("/proc/self/mountinfo") if l.split()[4].startswith("/.bootfs")], ".bootfs" in os.listdir("/"))
sys.stdout.flush()
if os.fork() == 0:
    os.setuid(1000)
    print("another user", errors(lambda: int(next(l for l in os.popen("/.bootfs/boot cat /proc/self/status") if l.startswith("Uid")).split()[2]) == 0), flush=True)
    print("told", errors(lambda: '"version":1' in os.popen("/.bootfs/boot status --json").read()), flush=True)
    os._exit(0)
os.wait()

# The root that the engine made lies below this one: what was mounted for boot
# is in it no more.
namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
libc.umount2(b"/", 2)
print("below", result(libc.setns(namespace, 0)), os.path.exists("/.bootfs/boot"))
for d in ("rootfs.castr", "rw", "secrets", "lower", "root", "tmp"): print(d, errors(os.listdir, "/.bootfs/" + d) if not os.path.isdir("/.bootfs/" + d) else os.listdir("/.bootfs/" + d))
print("login", os.path.exists("/run/secrets/bootfs-login") and os.path.getsize("/run/secrets/bootfs-login"))
print("mounts of boot", [l for l in open("/proc/self/mountinfo") if "bootfs-login" in l or " /.bootfs/" in l.split(" - ")[0] and " /.bootfs/boot " not in l])
`

const inExecSays = `SYS_ADMIN 1 seccomp 2
/proc/1/mem EACCES
/proc/1/root EACCES
/proc/1/cwd EACCES
/proc/1/exe EACCES
/proc/1/fd/0 EACCES
/proc/1/fd/5 EACCES
ptrace EPERM seize EPERM
memory EPERM
its descriptors ['EPERM', 'EPERM', 'EPERM']
killed, and still there
corner ['boot', 'status'] 0o4755
write boot ETXTBSY
write status ENXIO
write new EROFS
remove boot EROFS
remove status EROFS
remove EBUSY rename EBUSY
flags ['ro,nosuid,nodev,relatime', 'ro,nosuid,nodev,relatime'] False
another user False
told opened
below done True
rootfs.castr []
rw []
secrets []
lower []
root []
tmp []
login 0
mounts of boot []
`

// TestWhatAnExecHas: a program that docker exec brings in has what the engine
// gives it, and boot, its credentials, its cache and its volume are out of its
// reach all the same.
func TestWhatAnExecHas(t *testing.T) {
	dir := t.TempDir()
	login := filepath.Join(dir, "login")
	if err := os.WriteFile(login, []byte(`{"auths":{"hidden.example":{"auth":"aGlkZGVuOmhpZGRlbg=="}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	id := start(t, "--user", "root", "--volume", filepath.Join(dir, "cache")+":/.bootfs/rootfs.castr", "--volume", login+":/run/secrets/bootfs-login",
		w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	docker(t, "exec", id, "python3", "-c", inExec).want(t, inExecSays)
}

// TestAnotherUserPlantsNothing: what an exec or a health check runs cannot be
// replaced by an app that is not root, on any directory of PATH.
func TestAnotherUserPlantsNothing(t *testing.T) {
	const plant = `
		for d in $(echo $PATH | tr : ' ') /lib /usr/lib /usr/lib/python3 /etc; do
			touch $d/planted 2>/dev/null && echo "made $d/planted"
			for f in $d/*; do [ -w "$f" ] && [ ! -L "$f" ] && echo "may write $f"; done
		done
		echo tried`
	run(t, "--user", "1000", w.image, "sh", "-c", plant).want(t, "tried\n")
}

// TestFilledRootHasNoPrivilege: in a root that is filled in place, boot's own
// files give nobody more rights than he has, and an exec has what it has in
// the source image.
func TestFilledRootHasNoPrivilege(t *testing.T) {
	r := runFilled(t, "--user", "nobody", "--env", "BOOTFS_SECRET=hidden", w.image, "sh", "-c",
		`find /.bootfs -perm /6000; stat -c '%a %u' /.bootfs/boot; /.bootfs/boot id -un; env | grep hidden; cat /proc/[0-9]*/environ | grep -c hidden`)
	if r.stdout != "755 0\nnobody\n0\n" {
		t.Errorf("exit %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
	const caps = `grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; ls /proc | grep -c '^[0-9]*$'`
	said := map[string]string{}
	for image, flags := range map[string][]string{w.source: nil, w.image: {"--env", "BOOTFS_MODE=fill"}} {
		r := docker(t, append(append([]string{"run", "--detach", "--network", "host", "--user", "root"}, flags...), image, "sleep", "600")...)
		if r.code != 0 {
			t.Fatal(r.stderr)
		}
		id := strings.TrimSpace(r.stdout)
		removeAtEnd(t, id)
		eventually(t, "the program runs", func() bool { return docker(t, "exec", id, "sleep", "0").code == 0 })
		said[image] = docker(t, "exec", id, "sh", "-c", caps).stdout
	}
	if said[w.source] != said[w.image] {
		t.Errorf("an exec in the source image: %s\nin the filled one: %s", said[w.source], said[w.image])
	}
}
