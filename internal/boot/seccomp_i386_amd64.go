package boot

import (
	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// i386 is the table of 32-bit programs on amd64.
var i386 = abi{
	arch:  unix.AUDIT_ARCH_I386,
	clone: 120,
	rules: []rule{
		{357, uint32(unix.EPERM), capability.CAP_BPF},     // bpf
		{435, uint32(unix.ENOSYS), none},                  // clone3
		{338, uint32(unix.EPERM), none},                   // fanotify_init
		{431, uint32(unix.EPERM), none},                   // fsconfig
		{432, uint32(unix.EPERM), none},                   // fsmount
		{430, uint32(unix.EPERM), none},                   // fsopen
		{433, uint32(unix.EPERM), none},                   // fspick
		{253, uint32(unix.EPERM), none},                   // lookup_dcookie
		{459, uint32(unix.EPERM), none},                   // lsm_get_self_attr
		{461, uint32(unix.EPERM), none},                   // lsm_list_modules
		{460, uint32(unix.EPERM), none},                   // lsm_set_self_attr
		{21, uint32(unix.EPERM), none},                    // mount
		{442, uint32(unix.EPERM), none},                   // mount_setattr
		{429, uint32(unix.EPERM), none},                   // move_mount
		{428, uint32(unix.EPERM), none},                   // open_tree
		{336, uint32(unix.EPERM), capability.CAP_PERFMON}, // perf_event_open
		{131, uint32(unix.EPERM), none},                   // quotactl
		{443, uint32(unix.EPERM), none},                   // quotactl_fd
		{121, uint32(unix.EPERM), none},                   // setdomainname
		{74, uint32(unix.EPERM), none},                    // sethostname
		{346, uint32(unix.EPERM), none},                   // setns
		{103, uint32(unix.EPERM), capability.CAP_SYSLOG},  // syslog
		{22, uint32(unix.EPERM), none},                    // umount
		{52, uint32(unix.EPERM), none},                    // umount2
		{310, uint32(unix.EPERM), none},                   // unshare
	},
}
