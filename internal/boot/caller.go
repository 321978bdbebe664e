package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore/s3store"
	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// caller is what the engine resolved before it started boot, and so what the
// app is to run as. Boot is setuid root: the real IDs are the app's.
type caller struct {
	uid, gid int
	groups   []int
	cwd      string
	// program is looked up on PATH when it holds no slash.
	program string
	argv    []string
	env     []string
}

func currentCaller() (*caller, error) {
	groups, err := unix.Getgroups()
	if err != nil {
		return nil, fmt.Errorf("read the supplementary groups: %w", err)
	}
	cwd, err := unix.Getwd()
	if err != nil {
		return nil, fmt.Errorf("read the working directory: %w", err)
	}
	// Not os.Environ: in a setuid process the Go runtime adds to it.
	env, err := readStrings("/proc/self/environ")
	if err != nil {
		return nil, fmt.Errorf("read the environment: %w", err)
	}
	c := &caller{
		uid:    unix.Getuid(),
		gid:    unix.Getgid(),
		groups: groups,
		cwd:    cwd,
		env:    env,
	}
	started := execPath()
	c.program, c.argv, err = requested(started, cwd, os.Args)
	if err != nil {
		return nil, err
	}
	// A script that the user has mounted: a link stands where its interpreter is.
	if c.program != os.Args[0] && isScript(started) {
		c.program = os.Args[0]
	}
	return c, nil
}

// underInit returns the caller with the engine's init before its program, if
// boot was started by one.
func (c *caller) underInit() *caller {
	app := *c
	if os.Getppid() == 1 {
		// An error leaves the app without an init, as a boot that is PID 1 does.
		if first, err := readStrings("/proc/1/cmdline"); err == nil {
			app.withInit(first, os.Args)
		}
	}
	return &app
}

// ownEnv returns the variables that boot itself may heed. Not those of a user's
// process that ran a link to boot in a root that is half filled, as its boot was
// killed: with them it could have files read and sent that are root's.
func (c *caller) ownEnv(halfFilled bool) []string {
	byEngine := os.Getppid() == 0 || c.underInit().program != c.program
	if halfFilled && !byEngine && c.uid != 0 {
		return nil
	}
	return c.env
}

// readStrings reads a file of strings that each end with a zero byte.
func readStrings(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil || len(b) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

// withInit puts the engine's init before the program: with --init, PID 1 of the
// container is "/sbin/docker-init -- " and boot's own arguments. The app's PID
// namespace gets the same init, so that orphans are reaped and signals passed
// there too.
func (c *caller) withInit(first, own []string) {
	n := len(first) - len(own)
	if n <= 0 || !slices.Equal(first[n:], own) {
		return
	}
	c.argv = slices.Concat(first[:n], []string{c.program}, c.argv[1:])
	c.program = first[0]
}

// requested returns the program that was asked for. Started by its own path,
// boot takes it from its arguments; started through a link, the link's path is
// the program (--entrypoint, exec, a health check), relative to cwd if it is.
func requested(execPath, cwd string, args []string) (program string, argv []string, err error) {
	if !isBoot(execPath, cwd) {
		if !strings.Contains(execPath, "/") {
			execPath = "./" + execPath // not on PATH: it was found already
		}
		return execPath, args, nil
	}
	if len(args) < 2 {
		return "", nil, fmt.Errorf("no program to run: the image has no entrypoint and no command; name one behind the image")
	}
	return args[1], args[1:], nil
}

// isBoot reports whether execPath is boot's own, relative to cwd if it is.
func isBoot(execPath, cwd string) bool {
	if !filepath.IsAbs(execPath) {
		execPath = filepath.Join(cwd, execPath)
	}
	return filepath.Clean(execPath) == bootimage.BootPath
}

// isScript reports whether the file that was started is another than the
// program that runs: the kernel has put the script's interpreter in its place,
// and in argument 0.
func isScript(execPath string) bool {
	started, err := os.Stat(execPath)
	if err != nil {
		return false
	}
	running, err := os.Stat("/proc/self/exe")
	return err == nil && !os.SameFile(started, running)
}

// execPath returns the path that execve was given. Argument 0 does not say: the
// caller of execve chooses it freely.
func execPath() string {
	const atExecfn = 31
	vector, err := unix.Auxv()
	if err == nil {
		for _, entry := range vector {
			if entry[0] == atExecfn {
				// The kernel put the string on the initial stack, above
				// everything that Go manages.
				return unix.BytePtrToString(*(**byte)(unsafe.Pointer(&entry[1])))
			}
		}
	}
	return os.Args[0]
}

// withoutOwnEnv returns the caller without the variables that configure boot,
// as they may hold credentials; s3 says that those for S3 are among them.
func (c *caller) withoutOwnEnv(s3 bool) *caller {
	app := *c
	app.env = nil
	for _, v := range c.env {
		name, value, _ := strings.Cut(v, "=")
		// An agent among bootfs's own secrets is not the app's.
		if !ownVariable(name) && !(s3 && slices.Contains(s3store.Variables, name)) && !(name == "SSH_AUTH_SOCK" && ownMount(value)) {
			app.env = append(app.env, v)
		}
	}
	return &app
}

func ownVariable(name string) bool {
	return name == "BLOB_STORE" || name == "DROPBEAR_PASSWORD" || strings.HasPrefix(name, "BOOTFS_")
}
