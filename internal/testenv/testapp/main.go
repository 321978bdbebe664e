// Command testapp is the program inside the small test images. It needs no
// file but itself.
//
//	testapp env             arguments, environment, ids, working directory, as JSON
//	testapp status          the lines of /proc/self/status
//	testapp cat FILE...     the contents of files
//	testapp dump            all that the program may read of processes, secrets and bootfs
//	testapp exit N          exits N
//	testapp sleep           waits; prints "ready", and "stopped" and exits 0 on SIGTERM
//	testapp churn DIR PAUSE reads files of DIR, which have the SHA-256 of their content as names, in random order with a pause between
//	                        them and not from the page cache; fails on the first that is wrong, prints how many there were on SIGTERM
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testapp:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		fmt.Println("ok")
		return nil
	}
	switch command, args := args[0], args[1:]; command {
	case "env":
		return printEnv()
	case "status":
		return cat("/proc/self/status")
	case "cat":
		return cat(args...)
	case "dump":
		return dump("/proc", "/run", "/.bootfs", "/dev/shm", "/tmp")
	case "exit":
		if len(args) != 1 {
			return fmt.Errorf("exit: got %d arguments, want the status", len(args))
		}
		code, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		os.Exit(code)
	case "sleep":
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		fmt.Println("ready")
		<-stop
		fmt.Println("stopped")
	case "churn":
		if len(args) != 2 {
			return fmt.Errorf("churn: got %d arguments, want a directory and a pause", len(args))
		}
		pause, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		return churn(args[0], pause)
	default:
		return fmt.Errorf("unknown command %q", command)
	}
	return nil
}

func printEnv() error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	groups, err := os.Getgroups()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"args": os.Args, "env": os.Environ(), "dir": dir, "pid": os.Getpid(),
		"uid": os.Getuid(), "euid": os.Geteuid(), "gid": os.Getgid(), "groups": groups,
	})
}

// dump prints the files below dirs, but for what the kernel says of itself.
// Files that cannot be read are passed over.
func dump(dirs ...string) error {
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			process := strings.HasPrefix(path, "/proc/") && strings.Trim(strings.Split(path, "/")[2], "0123456789") == ""
			if d.IsDir() && strings.HasPrefix(path, "/proc/") && (!process || d.Name() == "map_files") {
				return fs.SkipDir
			}
			if !d.Type().IsRegular() || dir == "/proc" && !slices.Contains(perProcess, d.Name()) {
				return nil
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			fmt.Printf("%s: %s\n", path, b)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// perProcess are the files of a process that tell what it was given.
var perProcess = []string{"environ", "cmdline", "mountinfo", "comm", "maps"}

func churn(dir string, pause time.Duration) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	for n := 0; ; n++ {
		select {
		case <-stop:
			fmt.Println(n)
			return nil
		case <-time.After(pause):
		}
		f, err := os.Open(filepath.Join(dir, files[rand.IntN(len(files))].Name()))
		if err != nil {
			return err
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		if err == nil {
			err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		f.Close()
		if err != nil {
			return err
		}
		if sum := fmt.Sprintf("%x", h.Sum(nil)); sum != filepath.Base(f.Name()) {
			return fmt.Errorf("%s: wrong bytes, their SHA-256 is %s", f.Name(), sum)
		}
	}
}

func cat(paths ...string) error {
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
