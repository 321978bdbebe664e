package boot

import (
	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// arm is the table of 32-bit programs on arm64.
var arm = abi{
	arch:  unix.AUDIT_ARCH_ARM,
	clone: 120,
	rules: []rule{
		{386, uint32(unix.EPERM), capability.CAP_BPF},     // bpf
		{435, uint32(unix.ENOSYS), none},                  // clone3
		{367, uint32(unix.EPERM), none},                   // fanotify_init
		{431, uint32(unix.EPERM), none},                   // fsconfig
		{432, uint32(unix.EPERM), none},                   // fsmount
		{430, uint32(unix.EPERM), none},                   // fsopen
		{433, uint32(unix.EPERM), none},                   // fspick
		{249, uint32(unix.EPERM), none},                   // lookup_dcookie
		{459, uint32(unix.EPERM), none},                   // lsm_get_self_attr
		{461, uint32(unix.EPERM), none},                   // lsm_list_modules
		{460, uint32(unix.EPERM), none},                   // lsm_set_self_attr
		{21, uint32(unix.EPERM), none},                    // mount
		{442, uint32(unix.EPERM), none},                   // mount_setattr
		{429, uint32(unix.EPERM), none},                   // move_mount
		{428, uint32(unix.EPERM), none},                   // open_tree
		{364, uint32(unix.EPERM), capability.CAP_PERFMON}, // perf_event_open
		{131, uint32(unix.EPERM), none},                   // quotactl
		{443, uint32(unix.EPERM), none},                   // quotactl_fd
		{121, uint32(unix.EPERM), none},                   // setdomainname
		{74, uint32(unix.EPERM), none},                    // sethostname
		{375, uint32(unix.EPERM), none},                   // setns
		{103, uint32(unix.EPERM), capability.CAP_SYSLOG},  // syslog
		{52, uint32(unix.EPERM), none},                    // umount2
		{337, uint32(unix.EPERM), none},                   // unshare
	},
}
