package boot

import "golang.org/x/sys/unix"

// lowWord is the offset of the low half of an argument in seccomp_data.
const lowWord = 0

// machine lists the ways to enter the kernel.
func machine() []abi {
	x86 := native(unix.AUDIT_ARCH_X86_64)
	x86.ignore = 0x40000000 // x32
	return []abi{x86, i386}
}
