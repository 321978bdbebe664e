package boot

import "golang.org/x/sys/unix"

// lowWord is the offset of the low half of an argument in seccomp_data.
const lowWord = 4

// machine lists the ways to enter the kernel.
func machine() []abi {
	z := native(unix.AUDIT_ARCH_S390X, rule{unix.SYS_UMOUNT, uint32(unix.EPERM), none})
	z.cloneFlags = 1
	z31 := z
	z31.arch = unix.AUDIT_ARCH_S390
	return []abi{z, z31}
}
