package boot

import (
	"encoding/binary"
	"runtime"
	"slices"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// verdict runs the filter on one system call, as the kernel would.
func verdict(t *testing.T, program []unix.SockFilter, arch, number uint32, arg0 uint64) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.NativeEndian.PutUint32(data[dataNumber:], number)
	binary.NativeEndian.PutUint32(data[dataArch:], arch)
	binary.NativeEndian.PutUint64(data[dataArgs:], arg0)
	var a uint32
	for pc := 0; pc < len(program); pc++ {
		in := program[pc]
		jump := func(taken bool) {
			if taken {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		}
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = binary.NativeEndian.Uint32(data[in.K:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= in.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == in.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump(a&in.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		default:
			t.Fatalf("instruction %d: unknown code %#x", pc, in.Code)
		}
	}
	t.Fatal("the filter ends without a verdict")
	return 0
}

// TestFilterIsTheEnginesDifference compares the filter with what Docker's
// default profile allows a container because of CAP_SYS_ADMIN.
func TestFilterIsTheEnginesDifference(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Fatalf("system call names are known here for amd64, not for %s", runtime.GOARCH)
	}
	allowed := func(caps ...string) map[string]bool {
		spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}}
		profile, err := seccomp.GetDefaultProfile(spec)
		if err != nil {
			t.Fatal(err)
		}
		names := make(map[string]bool)
		for _, call := range profile.Syscalls {
			if call.Action == specs.ActAllow && len(call.Args) == 0 {
				for _, name := range call.Names {
					names[name] = true
				}
			}
		}
		return names
	}
	for _, kept := range [][]string{nil, {"CAP_BPF"}, {"CAP_PERFMON"}, {"CAP_SYSLOG"}} {
		with := allowed(append([]string{"CAP_SYS_ADMIN"}, kept...)...)
		without := allowed(kept...)
		program := assemble(machine(), func(c capability.Cap) bool { return slices.Contains(kept, "CAP_"+upper(c.String())) })
		for name, number := range amd64Calls {
			refused := verdict(t, program, unix.AUDIT_ARCH_X86_64, number, 0) != unix.SECCOMP_RET_ALLOW
			// clone without namespaces stays allowed: it is conditional there.
			want := with[name] && !without[name] && name != "clone"
			if refused != want {
				t.Errorf("keeping %v: %s refused: %v, want %v", kept, name, refused, want)
			}
		}
		for name := range with {
			if _, known := amd64Calls[name]; !without[name] && !known && name != "umount" {
				t.Errorf("the profile's %s is not in the test's table", name)
			}
		}
	}
}

func upper(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'a' <= c && c <= 'z' {
			b[i] = c - 'a' + 'A'
		}
	}
	return string(b)
}

// amd64Calls holds what the profile makes depend on CAP_SYS_ADMIN, and some
// that it does not.
var amd64Calls = map[string]uint32{
	"bpf": 321, "clone": 56, "clone3": 435, "fanotify_init": 300, "fsconfig": 431, "fsmount": 432, "fsopen": 430,
	"fspick": 433, "lookup_dcookie": 212, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460, "lsm_list_modules": 461,
	"mount": 165, "mount_setattr": 442, "move_mount": 429, "open_tree": 428, "perf_event_open": 298, "quotactl": 179,
	"quotactl_fd": 443, "setdomainname": 171, "sethostname": 170, "setns": 308, "syslog": 103, "umount2": 166, "unshare": 272,
	"read": 0, "execve": 59, "openat": 257, "fork": 57, "ptrace": 101, "chroot": 161,
}

func TestFilterOfClone(t *testing.T) {
	program := assemble(machine(), func(capability.Cap) bool { return false })
	const x32 = 0x40000000
	for _, c := range []struct {
		name         string
		arch, number uint32
		arg          uint64
		want         uint32
	}{
		{"thread", unix.AUDIT_ARCH_X86_64, 56, unix.CLONE_VM | unix.CLONE_THREAD, unix.SECCOMP_RET_ALLOW},
		{"user namespace", unix.AUDIT_ARCH_X86_64, 56, unix.CLONE_NEWUSER, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"mount namespace among others", unix.AUDIT_ARCH_X86_64, 56, unix.CLONE_VFORK | unix.CLONE_NEWNS, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"clone3 makes callers fall back", unix.AUDIT_ARCH_X86_64, 435, 0, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{"mount by x32", unix.AUDIT_ARCH_X86_64, 165 | x32, 0, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"mount by i386", unix.AUDIT_ARCH_I386, 21, 0, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"user namespace by i386", unix.AUDIT_ARCH_I386, 120, unix.CLONE_NEWUSER, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{"read by i386", unix.AUDIT_ARCH_I386, 3, 0, unix.SECCOMP_RET_ALLOW},
		{"another machine", unix.AUDIT_ARCH_AARCH64, 0, 0, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := verdict(t, program, c.arch, c.number, c.arg); got != c.want {
				t.Errorf("got %#x, want %#x", got, c.want)
			}
		})
	}
}
