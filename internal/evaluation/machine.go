package main

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine says what this machine is.
func machine(ctx context.Context) (Machine, error) {
	m := Machine{Cores: runtime.NumCPU(), Versions: map[string]string{"Go": strings.TrimPrefix(runtime.Version(), "go")}}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return m, err
	}
	m.Kernel, _, _ = strings.Cut(unix.ByteSliceToString(uts.Release[:]), "-") // what follows is the builder's
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, err
	}
	m.Memory = int64(info.Totalram) * int64(info.Unit)
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(cpu)); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	packages := []string{"docker.io", "containerd", "stargz-snapshotter", "casync", "squashfuse", "squashfs-tools", "fuse-overlayfs", "erofs-utils", "zstd"}
	out, err := exec.CommandContext(ctx, "dpkg-query", append([]string{"--show", "--showformat", "${Package} ${Version}\n"}, packages...)...).Output()
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(out)) {
		if name, version, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			m.Versions[name] = version
		}
	}
	return m, nil
}

// ownMounts gives this process a mount namespace, in which everything that it
// mounts goes away with it.
func ownMounts() error {
	// The namespace is a thread's; those that the runtime makes later inherit it
	// from the one that calls, and there are others already.
	if os.Getenv(inOwnMounts) != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return err
	}
	return unix.Exec(unshare, append([]string{"unshare", "--mount", "--propagation", "private", "--", self}, os.Args[1:]...), append(os.Environ(), inOwnMounts+"=1"))
}

// inOwnMounts in the environment says that this process has mounts of its own.
const inOwnMounts = "BOOTFS_EVALUATION_OWN_MOUNTS"
