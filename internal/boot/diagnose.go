package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// whyNoMount adds to a mount error the docker run flags that are missing.
func whyNoMount(err error) error {
	if flags := missingFlags(err); flags != "" {
		return fmt.Errorf("%w: add %s to docker run", err, flags)
	}
	return err
}

func missingFlags(err error) string {
	if !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENXIO) {
		return ""
	}
	var flags []string
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		flags = append(flags, "--device /dev/fuse")
	} else {
		f.Close()
	}
	for _, c := range missing(capability.CAP_SYS_ADMIN, capability.CAP_CHOWN, capability.CAP_DAC_OVERRIDE) {
		flags = append(flags, capAdd(c))
	}
	if profile, err := os.ReadFile("/proc/self/attr/current"); err == nil && confines(string(profile)) {
		flags = append(flags, "--security-opt apparmor=unconfined")
	}
	return strings.Join(flags, " ")
}

// whichCapability adds to a refusal the docker run flag that gives need, if
// that is missing.
func whichCapability(err error, need capability.Cap) error {
	if errors.Is(err, fs.ErrPermission) && len(missing(need)) > 0 {
		return fmt.Errorf("%w: add %s to docker run", err, capAdd(need))
	}
	return err
}

func capAdd(c capability.Cap) string { return "--cap-add " + strings.ToUpper(c.String()) }

// missing returns those of need that are not effective.
func missing(need ...capability.Cap) []capability.Cap {
	c, err := capability.NewPid2(0)
	if err != nil || c.Load() != nil {
		return nil
	}
	return slices.DeleteFunc(need, func(n capability.Cap) bool { return c.Get(capability.EFFECTIVE, n) })
}

// confines reports whether the AppArmor label of a process ("docker-default
// (enforce)") restricts it.
func confines(label string) bool {
	return strings.HasSuffix(strings.TrimSpace(label), "(enforce)")
}
