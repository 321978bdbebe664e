package boot

import "golang.org/x/sys/unix"

// lowWord is the offset of the low half of an argument in seccomp_data.
const lowWord = 0

// machine lists the ways to enter the kernel.
func machine() []abi {
	return []abi{native(unix.AUDIT_ARCH_PPC64LE, rule{unix.SYS_UMOUNT, uint32(unix.EPERM), none})}
}
