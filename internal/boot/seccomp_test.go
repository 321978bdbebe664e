package boot

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
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

// engineAllows returns the system calls that Docker's default profile allows a
// container with the capabilities, whatever their arguments.
func engineAllows(t *testing.T, caps ...string) map[string]bool {
	t.Helper()
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

// systemCalls returns the numbers of all system calls of an architecture that
// golang.org/x/sys knows.
func systemCalls(t *testing.T, arch string) map[string]uint32 {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "golang.org/x/sys").Output()
	if err != nil {
		t.Fatal(err)
	}
	text := readText(t, filepath.Join(strings.TrimSpace(string(dir)), "unix", "zsysnum_linux_"+arch+".go"))
	calls := make(map[string]uint32)
	for _, m := range regexp.MustCompile(`(?m)^\tSYS_(\w+) += (\d+)$`).FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseUint(m[2], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		calls[strings.ToLower(m[1])] = uint32(n)
	}
	if len(calls) < 300 || calls["listns"] == 0 {
		t.Fatalf("%s: %d system calls, want those of Linux 6.18 among them", arch, len(calls))
	}
	return calls
}

func readText(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestFilterIsTheEnginesDifference compares the filter with what Docker's
// default profile allows a container because of CAP_SYS_ADMIN, for every system
// call that there is.
func TestFilterIsTheEnginesDifference(t *testing.T) {
	calls := systemCalls(t, runtime.GOARCH)
	arch := machine()[0].arch
	for _, kept := range [][]string{nil, {"CAP_BPF"}, {"CAP_PERFMON"}, {"CAP_SYSLOG"}} {
		with := engineAllows(t, append([]string{"CAP_SYS_ADMIN"}, kept...)...)
		without := engineAllows(t, kept...)
		program := assemble(machine(), func(c capability.Cap) bool { return slices.Contains(kept, "CAP_"+upper(c.String())) })
		for name, number := range calls {
			refused := verdict(t, program, arch, number, 0) != unix.SECCOMP_RET_ALLOW
			// clone without namespaces stays allowed: it is conditional there.
			want := with[name] && !without[name] && name != "clone"
			if refused != want {
				t.Errorf("keeping %v: %s refused: %v, want %v", kept, name, refused, want)
			}
		}
	}
}

// TestTablesOfAllMachines finds every call that engines allow because of
// CAP_SYS_ADMIN in the tables of every architecture, as their sources have them.
func TestTablesOfAllMachines(t *testing.T) {
	with, without := engineAllows(t, "CAP_SYS_ADMIN"), engineAllows(t)
	common := readText(t, "seccomp.go")
	for arch, table := range map[string]string{
		"amd64": common, "arm64": common, "riscv64": common,
		"ppc64le": common + readText(t, "seccomp_ppc64le.go"), "s390x": common + readText(t, "seccomp_s390x.go"),
		"386": readText(t, "seccomp_i386_amd64.go"), "arm": readText(t, "seccomp_arm_arm64.go"),
	} {
		calls := systemCalls(t, arch)
		for name, number := range calls {
			if !with[name] || without[name] || name == "clone" {
				continue
			}
			written := regexp.MustCompile(`unix\.SYS_` + strings.ToUpper(name) + `\b`)
			if arch == "386" || arch == "arm" {
				written = regexp.MustCompile(fmt.Sprintf(`\{%d, .*// %s\n`, number, name))
			}
			if !written.MatchString(table) {
				t.Errorf("%s: %s, number %d, is missing", arch, name, number)
			}
		}
		if _, number, _ := strings.Cut(table, "clone: "); (arch == "386" || arch == "arm") && !strings.HasPrefix(strings.TrimSpace(number), fmt.Sprint(calls["clone"])) {
			t.Errorf("%s: clone is %d", arch, calls["clone"])
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
