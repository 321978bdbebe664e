package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// tenant is an ordinary user of a host, with ranges of IDs for user namespaces.
const (
	tenant    = "tenant"
	tenantID  = 20000
	firstID   = 200000 // of his ranges
	rangeSize = 65536
)

// A host is a view of this machine that has what engines expect, and what not
// every machine has: an ordinary user with ranges of IDs, /dev/fuse for
// everybody, and shared memory of its own, in which engines keep locks.
type host struct {
	etc string // directory of the files that differ in /etc
}

// newHost prepares a host whose files are kept below dir.
func newHost(dir string) (*host, error) {
	h := &host{etc: filepath.Join(dir, "etc")}
	if err := os.MkdirAll(h.etc, 0o755); err != nil {
		return nil, err
	}
	user := fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh\n", tenant, tenantID, tenantID, filepath.Join(dir, "home"))
	group := fmt.Sprintf("%s:x:%d:\n", tenant, tenantID)
	ids := fmt.Sprintf("%s:%d:%d\n", tenant, firstID, rangeSize)
	for name, more := range map[string]string{"passwd": user, "group": group, "subuid": ids, "subgid": ids} {
		text, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		if name == "subuid" || name == "subgid" {
			text = nil
		}
		if err := os.WriteFile(filepath.Join(h.etc, name), append(text, more...), 0o644); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// makeHost is run in a mount namespace of its own, with the directory of
// files for /etc and a command.
const makeHost = `
mount --make-rprivate /
mount -t overlay -o lowerdir="$1":/etc etc /etc
mount -t tmpfs -o mode=1777 shm /dev/shm
mknod -m 666 /dev/shm/fuse c 10 229
mount --bind /dev/shm/fuse /dev/fuse
shift
exec "$@"`

// command returns a command that runs on the host.
func (h *host) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("sh", append([]string{"-ec", makeHost, "sh", h.etc, name}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	return cmd
}

// closed is the first process of a PID namespace. It reaps what is left to it,
// and takes everything along when it ends.
const closed = `
mount -t proc proc /proc
trap 'exit 0' TERM
touch "$1"
shift
"$@" &
wait`

// closedCommand returns a command that runs on the host, in a PID namespace
// that ends with it: no process that was started there stays. The file ready
// appears when the namespace can be used.
func (h *host) closedCommand(ready, name string, args ...string) *exec.Cmd {
	cmd := h.command("sh", append([]string{"-ec", closed, "sh", ready, name}, args...)...)
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWPID
	return cmd
}
