package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// whyNoMount adds to a mount error the docker run flag that is missing.
func whyNoMount(err error) error {
	if missing := missingFlag(err); missing != "" {
		return fmt.Errorf("%w: add %s to docker run", err, missing)
	}
	return err
}

func missingFlag(err error) string {
	if !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENXIO) {
		return ""
	}
	var flags []string
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		flags = append(flags, "--device /dev/fuse")
	} else {
		f.Close()
	}
	if !hasSysAdmin() {
		flags = append(flags, "--cap-add SYS_ADMIN")
	}
	if profile, err := os.ReadFile("/proc/self/attr/current"); err == nil && confines(string(profile)) {
		flags = append(flags, "--security-opt apparmor=unconfined")
	}
	return strings.Join(flags, " ")
}

func hasSysAdmin() bool {
	c, err := capability.NewPid2(0)
	if err != nil {
		return false
	}
	return c.Load() == nil && c.Get(capability.EFFECTIVE, capability.CAP_SYS_ADMIN)
}

// confines reports whether the AppArmor label of a process ("docker-default
// (enforce)") restricts it.
func confines(label string) bool {
	return strings.HasSuffix(strings.TrimSpace(label), "(enforce)")
}
