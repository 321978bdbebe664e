// Command fsprobe does to the file system it runs on what programs do, system
// call by system call, and prints what came of it, a line each: two file
// systems that behave alike give the same lines. Each group of calls works in
// /work and on /lower, a link to files of the image that are the group's own,
// and is a process of its own.
//
//	fsprobe GROUP...    prints "== GROUP", its lines, and its exit status unless that is 0
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

var groups = map[string]func(){
	"copyup":    copyUp,
	"writers":   twoWriters,
	"rename":    renameFiles,
	"renamedir": renameDirectory,
	"whiteouts": whiteouts,
	"links":     links,
	"sparse":    sparse,
	"copying":   copying,
	"direct":    direct,
	"mmap":      mapped,
	"locks":     locks,
	"watches":   watches,
	"dirs":      directories,
	"times":     times,
	"ancient":   beforeEpoch,
	"xattrs":    xattrs,
	"acls":      acls,
	"users":     users,
	"special":   special,
	"names":     names,
	"exec":      execution,
	"range":     copyRange,
	"metadata":  metadataFirst,
	"many":      manyFiles,
	"identity":  identity,
	"replaced":  replaced,
	"statfs":    statFS,
	"refused":   refused,
	"kernel":    kernelFiles,
}

func main() {
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "child":
		child(args[1])
	case len(args) == 2 && args[0] == "group":
		unix.Umask(0o022)
		check(os.RemoveAll("/work"))
		check(os.Mkdir("/work", 0o755))
		check(os.Chdir("/work"))
		check(os.RemoveAll("/lower"))
		check(os.Symlink("/trees/"+args[1], "/lower"))
		groups[args[1]]()
	default:
		for _, name := range args {
			if groups[name] == nil {
				fmt.Fprintf(os.Stderr, "fsprobe: no group %q\n", name)
				os.Exit(2)
			}
			fmt.Println("==", name)
			cmd := exec.Command("/proc/self/exe", "group", name)
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
			if err := cmd.Run(); err != nil {
				fmt.Println(err)
			}
		}
	}
}

// say prints a line: what was done, and what came of it.
func say(what string, values ...any) {
	fmt.Print(what, ":")
	for _, v := range values {
		switch v := v.(type) {
		case nil:
			fmt.Print(" ok")
		case error:
			fmt.Print(" ", errorName(v))
		case []byte:
			fmt.Printf(" %q", v)
		case string:
			fmt.Printf(" %q", v)
		default:
			fmt.Print(" ", v)
		}
	}
	fmt.Println()
}

// errorName is the errno's name: paths and wording are not compared.
func errorName(err error) string {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

// check ends the program where a step fails that is no question.
func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "fsprobe:", err)
		os.Exit(1)
	}
}

func got[T any](v T, err error) T {
	check(err)
	return v
}

func write(path, text string) { check(os.WriteFile(path, []byte(text), 0o644)) }

// sum is size and SHA-256 of a file, or the error.
func sum(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return errorName(err)
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return errorName(err)
	}
	return fmt.Sprintf("%d %x", n, h.Sum(nil)[:8])
}

// look is what stat says that does not differ from one container to the next.
func look(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return errorName(err)
	}
	s := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
	case unix.S_IFCHR, unix.S_IFBLK:
		s += fmt.Sprintf(" %d links, device %d", st.Nlink, st.Rdev)
	default:
		s += fmt.Sprintf(" %d links, %d bytes", st.Nlink, st.Size)
	}
	return s
}

func open(path string, flags int) int { return got(unix.Open(path, flags|unix.O_CLOEXEC, 0o644)) }

// list is the names in a directory, as they are read, without their order.
func list(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return errorName(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, fmt.Sprintf("%q %v", e.Name(), e.Type()))
	}
	return strings.Join(all, ", ")
}

// inChild runs one of the steps of child in another process and returns what it
// printed.
func inChild(step string, attr *syscall.SysProcAttr, files ...*os.File) string {
	cmd := exec.Command("/proc/self/exe", "child", step)
	cmd.SysProcAttr, cmd.ExtraFiles = attr, files
	out, err := cmd.CombinedOutput()
	text := string(bytes.TrimSpace(out))
	if err != nil {
		text += " (" + err.Error() + ")"
	}
	return text
}

// child is what the groups do in another process.
func child(step string) {
	switch what, arg, _ := strings.Cut(step, " "); what {
	case "append":
		f := got(os.OpenFile(arg, os.O_WRONLY|os.O_APPEND, 0))
		for range 2000 {
			got(f.WriteString("a line from one of two writers\n"))
		}
	case "lock":
		say(step, tryLocks(arg))
	case "remove":
		say(step, os.Remove(arg))
	case "read":
		b, err := os.ReadFile(arg)
		say(step, len(b), err)
	case "write":
		say(step, os.WriteFile(arg, []byte("x"), 0o644))
	case "create":
		check(os.WriteFile(arg, nil, 0o666))
		say(step, look(arg))
	case "chmod":
		say(step, os.Chmod(arg, 0o777))
	case "descriptor":
		b := make([]byte, 16)
		n, err := unix.Pread(3, b, 0)
		say(step, b[:max(n, 0)], err)
	case "status":
		fmt.Printf("uid %d euid %d gid %d egid %d\n", os.Getuid(), os.Geteuid(), os.Getgid(), os.Getegid())
	case "remap":
		memory := got(unix.Mmap(3, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED))
		copy(memory[100:], "from the child")
		check(unix.Msync(memory, unix.MS_SYNC))
	default:
		fmt.Fprintf(os.Stderr, "fsprobe: no step %q\n", step)
		os.Exit(2)
	}
}

func as(uid, gid uint32, groups ...uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
}
