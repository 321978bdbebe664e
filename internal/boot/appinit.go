package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// isAppInit reports whether this process is the one that becomes the app: it
// says so itself, and is PID 1 of the namespace that boot made for it with the
// two descriptors that boot gave it.
func isAppInit() bool {
	return os.Args[0] == appInitName && os.Getpid() == 1 && isPipe(orderFD) && isPipe(reportFD)
}

func isPipe(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// reportToBoot sends the error of appInit and returns the exit status.
func reportToBoot(err error) int {
	r := appReport{Status: exitBoot, Message: err.Error()}
	if errors.Is(err, errSaid) {
		r.Message = ""
	}
	if e := (*noChunksError)(nil); errors.As(err, &e) {
		r.Message, r.Unread = e.msg, true
	}
	if e := (*exitError)(nil); errors.As(err, &e) {
		r.Status = e.status
	}
	pipe := os.NewFile(reportFD, "report")
	_ = json.NewEncoder(pipe).Encode(r) // boot reads an empty report as a start, and then sees the exit status
	return r.Status
}

// appInit turns the process into the app, inside the namespaces that boot made.
// It returns only on failure.
//
// What it does here is done by one thread: capabilities, the root and the
// filter belong to threads.
func appInit() error {
	runtime.LockOSThread()
	unix.CloseOnExec(reportFD)
	order, err := readOrder()
	if err != nil {
		return err
	}
	if err := enterRoot(); err != nil {
		return err
	}
	if err := ownProc(order.Masks); err != nil {
		return err
	}
	raiseScore(order.Score)
	if !order.KeepSysAdmin {
		if err := giveUpSysAdmin(); err != nil {
			return err
		}
	}
	app := &caller{
		uid: order.UID, gid: order.GID, groups: order.Groups,
		cwd: order.Cwd, program: order.Program, argv: order.Argv, env: order.Env,
	}
	return app.become()
}

func readOrder() (*appOrder, error) {
	pipe := os.NewFile(orderFD, "order")
	defer pipe.Close()
	b, err := io.ReadAll(pipe)
	if err != nil {
		return nil, fmt.Errorf("read boot's order: %w", err)
	}
	var o appOrder
	if err := json.Unmarshal(b, &o); err != nil {
		return nil, fmt.Errorf("read boot's order: %w", err)
	}
	return &o, nil
}

// ownProc replaces the engine's /proc by that of this PID namespace and replays
// the engine's masks on it.
func ownProc(masks []mask) error {
	// Files that lie over others are taken along: below the new /proc there is
	// no way back to them.
	covers := make([]int, len(masks))
	for i, m := range masks {
		if m.Bind {
			continue
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, m.Path, unix.OPEN_TREE_CLOEXEC|unix.OPEN_TREE_CLONE)
		if err != nil {
			return fmt.Errorf("take the mask of %s along: %w", m.Path, err)
		}
		defer unix.Close(fd)
		covers[i] = fd
	}
	if err := unix.Unmount("/proc", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the engine's /proc: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for i, m := range masks {
		var err error
		if m.Bind {
			err = bindOnItself(m.Path, m.Flags)
		} else {
			err = unix.MoveMount(covers[i], "", unix.AT_FDCWD, m.Path, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
		if err != nil {
			return fmt.Errorf("mask %s: %w", m.Path, err)
		}
	}
	return nil
}

func bindOnItself(path string, flags uintptr) error {
	if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
}

// giveUpSysAdmin takes from the calling thread, and from what it becomes, the
// capability and the system calls that engines allow because of it.
func giveUpSysAdmin() error {
	// The filter first: without the capability it could only be had with
	// no_new_privs, which would break setuid programs.
	if err := installFilter(); err != nil {
		return err
	}
	return dropSysAdmin()
}

// dropSysAdmin takes CAP_SYS_ADMIN out of every set of the calling thread, the
// bounding set included: no exec, not even of a setuid program, gets it back.
func dropSysAdmin() error {
	const sysAdmin = capability.CAP_SYS_ADMIN
	c, err := capability.NewPid2(0)
	if err == nil {
		err = c.Load()
	}
	if err == nil {
		c.Unset(capability.CAPS|capability.BOUNDS|capability.AMBS, sysAdmin)
		err = c.Apply(capability.CAPS | capability.BOUNDS | capability.AMBS)
	}
	if err != nil {
		return fmt.Errorf("drop CAP_SYS_ADMIN: %w", err)
	}
	if still, err := capability.GetBound(sysAdmin); err != nil || still {
		return fmt.Errorf("drop CAP_SYS_ADMIN from the bounding set: the container lacks CAP_SETPCAP: add --cap-add SETPCAP to %s, or keep the capability with -e BOOTFS_KEEP_SYS_ADMIN=1", engineRun())
	}
	return nil
}

// become makes the process the caller's program, with all that the caller is.
// It returns only on failure.
func (c *caller) become() error {
	if err := enterDirectory(c.cwd); err != nil {
		return err
	}
	if err := becomeUser(c.uid, c.gid, c.groups); err != nil {
		return err
	}
	return execProgram(c.program, c.argv, c.env)
}

// becomeUser gives the process the IDs for good. Leaving root clears the
// permitted and effective capabilities, as the engine does for a user.
//
// They are mostly the real IDs, and so may be taken by a container without
// CAP_SETUID and CAP_SETGID.
func becomeUser(uid, gid int, groups []int) error {
	present, err := syscall.Getgroups()
	if err != nil {
		return fmt.Errorf("read the supplementary groups: %w", err)
	}
	if !slices.Equal(present, groups) {
		if err := syscall.Setgroups(groups); err != nil {
			return whichCapability(fmt.Errorf("set the supplementary groups: %w", err), capability.CAP_SETGID)
		}
	}
	if err := syscall.Setresgid(gid, gid, gid); err != nil {
		return fmt.Errorf("become group %d: %w", gid, err)
	}
	if err := syscall.Setresuid(uid, uid, uid); err != nil {
		return fmt.Errorf("become user %d: %w", uid, err)
	}
	return nil
}

// enterDirectory makes dir the working directory, and makes it if it is
// missing. As engines do, it is called before the process becomes the user, who
// may start in a directory that is closed to him.
func enterDirectory(dir string) error {
	err := os.Chdir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(dir, 0o755); err == nil {
			err = os.Chdir(dir)
		}
	}
	if errors.Is(err, fs.ErrPermission) {
		// In a root that was filled before, boot may be the user from the start;
		// the engine has entered the directory then.
		if here, failed := unix.Getwd(); failed == nil && here == dir {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("enter the working directory: %w", err)
	}
	return nil
}

// execProgram replaces the process by the program, looked up on the PATH of
// env. It returns only on failure, and then with the status and the words that
// engines have for the same failure.
func execProgram(program string, argv, env []string) error {
	os.Clearenv()
	for _, v := range env {
		if name, value, ok := strings.Cut(v, "="); ok {
			os.Setenv(name, value)
		}
	}
	file, err := exec.LookPath(program)
	switch {
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist):
		return &exitError{status: exitNotFound, err: err}
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EISDIR):
		return &exitError{status: exitNotExecutable, err: err}
	case err != nil:
		return withReason(err)
	}
	err = syscall.Exec(file, argv, env)
	if errors.Is(err, unix.EIO) {
		return withReason(fmt.Errorf("run %s: %w", program, err))
	}
	// By now the program would have the container's stderr to itself.
	fmt.Fprintf(os.Stderr, "exec %s: %v\n", file, err)
	return &exitError{status: exitNoProgram, err: errSaid}
}

// noChunksError says that the program could not be read.
type noChunksError struct {
	msg string
	why error // nil if unknown
}

func (e *noChunksError) Error() string {
	if e.why == nil {
		return e.msg + ": its chunks could not be had"
	}
	return fmt.Sprintf("%s: its chunks could not be had: %v", e.msg, e.why)
}

func withReason(err error) error {
	if errors.Is(err, unix.EIO) {
		return &noChunksError{msg: err.Error()}
	}
	return err
}
