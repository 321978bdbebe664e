package boot

import (
	"fmt"
	"unsafe"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// Engines allow a container with CAP_SYS_ADMIN more system calls than one
// without. The app lost the capability and the filter here takes those calls
// back. It stacks upon the engine's, so together they are the engine's profile
// for a container without the capability.

// A rule refuses a system call with an errno.
type rule struct {
	call  uint32
	errno uint32
	// unless is a capability that allows the call by itself.
	unless capability.Cap
}

// none stands for no capability in rule.unless.
const none = capability.Cap(-1)

// An abi is one way to enter the kernel: an AUDIT_ARCH value with its system
// call numbers.
type abi struct {
	arch  uint32
	rules []rule
	clone uint32 // refused when it makes namespaces
	// cloneFlags is the argument of clone that holds its flags.
	cloneFlags uint32
	// ignore is a bit of the number that selects a variant with the same
	// numbers (x32).
	ignore uint32
}

const cloneNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Offsets in struct seccomp_data.
const (
	dataNumber = 0
	dataArch   = 4
	dataArgs   = 16 // eight bytes each
)

// assemble compiles the filter. has reports the capabilities that the app
// keeps.
func assemble(abis []abi, has func(capability.Cap) bool) []unix.SockFilter {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	ret := func(value uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
	}
	// skipUnless executes the next n instructions only when A equals value.
	skipUnless := func(value uint32, n uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: n, K: value}
	}
	const errno = unix.SECCOMP_RET_ERRNO

	var program []unix.SockFilter
	for _, a := range abis {
		body := []unix.SockFilter{load(dataNumber)}
		if a.ignore != 0 {
			body = append(body, unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: ^a.ignore})
		}
		for _, r := range a.rules {
			if r.unless != none && has(r.unless) {
				continue
			}
			body = append(body, skipUnless(r.call, 1), ret(errno|r.errno))
		}
		body = append(body,
			skipUnless(a.clone, 3),
			load(dataArgs+8*a.cloneFlags+lowWord),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, Jf: 1, K: cloneNamespaces},
			ret(errno|uint32(unix.EPERM)),
			ret(unix.SECCOMP_RET_ALLOW),
		)
		program = append(program, load(dataArch), skipUnless(a.arch, uint8(len(body))))
		program = append(program, body...)
	}
	// No program of this machine enters any other way.
	return append(program, ret(errno|uint32(unix.ENOSYS)))
}

// installFilter puts the filter on the calling thread and what it becomes. It
// needs CAP_SYS_ADMIN.
func installFilter() error {
	caps, err := capability.NewPid2(0)
	if err == nil {
		err = caps.Load()
	}
	if err != nil {
		return fmt.Errorf("read the capabilities: %w", err)
	}
	program := assemble(machine(), func(c capability.Cap) bool { return caps.Get(capability.BOUNDING, c) })
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog))); errno != 0 {
		return fmt.Errorf("install the seccomp filter: %w", errno)
	}
	return nil
}

// native is the table of the architecture that boot is built for; extra are its
// calls that not every architecture has.
func native(arch uint32, extra ...rule) abi {
	const perm, nosys = uint32(unix.EPERM), uint32(unix.ENOSYS)
	return abi{
		arch:  arch,
		clone: unix.SYS_CLONE,
		rules: append([]rule{
			{unix.SYS_BPF, perm, capability.CAP_BPF},
			{unix.SYS_CLONE3, nosys, none},
			{unix.SYS_FANOTIFY_INIT, perm, none},
			{unix.SYS_FSCONFIG, perm, none},
			{unix.SYS_FSMOUNT, perm, none},
			{unix.SYS_FSOPEN, perm, none},
			{unix.SYS_FSPICK, perm, none},
			{unix.SYS_LOOKUP_DCOOKIE, perm, none},
			{unix.SYS_LSM_GET_SELF_ATTR, perm, none},
			{unix.SYS_LSM_LIST_MODULES, perm, none},
			{unix.SYS_LSM_SET_SELF_ATTR, perm, none},
			{unix.SYS_MOUNT, perm, none},
			{unix.SYS_MOUNT_SETATTR, perm, none},
			{unix.SYS_MOVE_MOUNT, perm, none},
			{unix.SYS_OPEN_TREE, perm, none},
			{unix.SYS_PERF_EVENT_OPEN, perm, capability.CAP_PERFMON},
			{unix.SYS_QUOTACTL, perm, none},
			{unix.SYS_QUOTACTL_FD, perm, none},
			{unix.SYS_SETDOMAINNAME, perm, none},
			{unix.SYS_SETHOSTNAME, perm, none},
			{unix.SYS_SETNS, perm, none},
			{unix.SYS_SYSLOG, perm, capability.CAP_SYSLOG},
			{unix.SYS_UMOUNT2, perm, none},
			{unix.SYS_UNSHARE, perm, none},
		}, extra...),
	}
}
