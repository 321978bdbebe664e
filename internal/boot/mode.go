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

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// A mode is a way to make the container's root.
type mode int

const (
	modeAuto mode = iota // modeFuse where the container may, else modeFill
	modeFuse             // it is mounted, and its chunks are fetched as they are read
	modeFill             // it is written over the boot image's files, all of it
)

func (m mode) String() string {
	switch m {
	case modeFuse:
		return "fuse"
	case modeFill:
		return "fill"
	}
	return "auto"
}

// choose returns the mode of this start, and why it is not modeFuse where
// modeAuto could not have that. Nothing is changed to find out.
func choose(s *settings, c *bootimage.Config) (m mode, why string, err error) {
	lacks := fuseLacks(s)
	if s.mode != modeFill && len(lacks) == 0 {
		return modeFuse, "", nil
	}
	noFill := fillRefusal(s, c)
	switch {
	case s.mode == modeFuse:
		return 0, "", fmt.Errorf("the root cannot be mounted: add %s to %s", strings.Join(lacks, " "), engineRun())
	case s.mode == modeFill && noFill != nil:
		return 0, "", noFill
	case s.mode == modeFill:
		return modeFill, "", nil
	case noFill != nil:
		return 0, "", fmt.Errorf("%w, or add %s to mount it", noFill, strings.Join(lacks, " "))
	}
	return modeFill, fmt.Sprintf("add %s to %s to mount it and start at once", strings.Join(lacks, " "), engineRun()), nil
}

// fuseLacks returns the flags of docker run without which a root cannot be
// mounted.
func fuseLacks(s *settings) []string {
	var flags []string
	switch f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); {
	case err == nil:
		f.Close()
	case errors.Is(err, unix.EACCES):
		// In a user namespace, root is an ordinary user to the host's node.
		flags = append(flags, "--device /dev/fuse (the host's, after chmod 666 /dev/fuse there)")
	default:
		flags = append(flags, "--device /dev/fuse")
	}
	need := []capability.Cap{capability.CAP_SYS_ADMIN, capability.CAP_SYS_CHROOT, capability.CAP_CHOWN, capability.CAP_DAC_OVERRIDE}
	if !s.keepSysAdmin {
		need = append(need, capability.CAP_SETPCAP)
	}
	return append(flags, capAdds(missing(need...))...)
}

// fillRefusal is the reason why a root cannot be filled in place.
func fillRefusal(s *settings, c *bootimage.Config) error {
	var root unix.Statfs_t
	if err := unix.Statfs("/", &root); err != nil {
		return fmt.Errorf("/: %w", err)
	}
	if root.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("the root cannot be filled in place, as it is read-only: leave --read-only out of %s", engineRun())
	}
	need := []capability.Cap{capability.CAP_CHOWN, capability.CAP_DAC_OVERRIDE, capability.CAP_FOWNER, capability.CAP_FSETID}
	if slices.Contains(c.XattrClasses, "security") {
		need = append(need, capability.CAP_SETFCAP)
	}
	if !s.keepSysAdmin && len(missing(capability.CAP_SYS_ADMIN)) == 0 {
		need = append(need, capability.CAP_SETPCAP)
	}
	if lacks := capAdds(missing(need...)); len(lacks) > 0 {
		return fmt.Errorf("the root cannot be filled in place: add %s to %s", strings.Join(lacks, " "), engineRun())
	}
	return nil
}

// refusedError says that the container may not mount, which its capabilities
// and devices did not show: a security module or the kernel refuses.
type refusedError struct{ err error }

func (e *refusedError) Error() string { return e.err.Error() }
func (e *refusedError) Unwrap() error { return e.err }

// whyNoMount adds to a mount error the docker run flag that is missing, and
// makes a refusal a refusedError.
func whyNoMount(err error) error {
	for _, refusal := range []error{fs.ErrPermission, fs.ErrNotExist, unix.ENODEV, unix.ENXIO} {
		if !errors.Is(err, refusal) {
			continue
		}
		if profile, failed := os.ReadFile("/proc/self/attr/current"); failed == nil && confines(string(profile)) {
			err = fmt.Errorf("%w: add --security-opt apparmor=unconfined to %s", err, engineRun())
		}
		return &refusedError{err}
	}
	return err
}

// whichCapability adds to a refusal the docker run flag that gives need, if
// that is missing.
func whichCapability(err error, need capability.Cap) error {
	if flags := capAdds(missing(need)); len(flags) > 0 && errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: add %s to %s", err, flags[0], engineRun())
	}
	return err
}

func capAdds(caps []capability.Cap) []string {
	var flags []string
	for _, c := range caps {
		flags = append(flags, "--cap-add "+strings.ToUpper(c.String()))
	}
	return flags
}

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
