// Command testapp is the program inside the small test images. It needs no
// file but itself.
//
//	testapp env             arguments, environment, ids, working directory, as JSON
//	testapp status          the lines of /proc/self/status
//	testapp cat FILE...     the contents of files
//	testapp exit N          exits N
//	testapp sleep           waits; prints "ready", and "stopped" and exits 0 on SIGTERM
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
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
