// Package boot is PID 1 of a converted container: it mounts the root
// filesystem that the boot image describes, moves what the engine mounted into
// it, and runs the program that the engine asked for inside.
//
// The order of a start is the order of the files' use:
//
//	caller.go      who asked for which program
//	rendezvous.go  is this the boot of the container, or a later exec
//	content.go     index, locators, metadata, stores: mapped, no network
//	root.go        FUSE, writable layer, the engine's mounts, the switch
//	app.go         the program in its own PID and mount namespaces
//	appinit.go     the last steps inside those namespaces, before its exec
//	serve.go       signals, reaping, prefetch, the exit status
//
// Boot itself stays in the root that the engine gave it, hidden below the new
// one: its own path lookups (resolver, certificates, credentials) then never
// lead through the mount that it serves, which could wait for itself.
//
// It needs Linux 5.6 (openat2, move_mount).
package boot

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// Exit statuses of boot itself; every other status is the app's.
const (
	exitBoot          = 125 // boot could not start the app
	exitNotExecutable = 126 // the program was found and cannot be run
	exitNotFound      = 127 // the program was not found
)

// memoryGoal is what boot's memory grows to before the collector works harder,
// in bytes. Well above half of it is chunks, which the collector need not look
// into. A limit is better here than a lower GOGC: a start, which needs little,
// then collects nothing.
const memoryGoal = 40 << 20

// exitError is a failure with the exit status that it ends the container with.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// Main is the boot binary. It returns the exit status of the process.
func Main() int {
	if isAppInit() {
		return reportToBoot(appInit())
	}
	ownMemorySettings()
	log, flush := newLogger(os.Stderr, os.Getenv("BOOTFS_LOG"))
	defer flush()
	status, err := run(log)
	if err == nil {
		return status
	}
	log.Error(err.Error())
	if e := (*exitError)(nil); errors.As(err, &e) {
		return e.status
	}
	return exitBoot
}

// ownMemorySettings undoes what the Go runtime took from the environment: GOGC
// and GOMEMLIMIT there are the app's, made for its heap and not for boot's.
func ownMemorySettings() {
	debug.SetGCPercent(100)
	debug.SetMemoryLimit(memoryGoal)
}

func run(log *logger) (int, error) {
	c, err := currentCaller()
	if err != nil {
		return 0, err
	}
	if unix.Geteuid() != 0 {
		return 0, fmt.Errorf("boot runs as uid %d and its setuid bit has no effect: start the container as root, or without --security-opt no-new-privileges", unix.Geteuid())
	}
	if execed() {
		return 0, follow(bootimage.Dir, c)
	}
	meeting, err := claim(bootimage.Dir)
	if errors.Is(err, errClaimed) {
		return 0, follow(bootimage.Dir, c)
	}
	if err != nil {
		return 0, err
	}
	return lead(c, meeting, log)
}

// lead makes the root, runs the app in it and returns the app's exit status.
func lead(c *caller, meeting *meeting, log *logger) (int, error) {
	// Nobody but root may look at a process that holds credentials.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("make boot undumpable: %w", err)
	}
	signals := catchSignals()
	settings, err := readSettings(c.env)
	if err != nil {
		return 0, err
	}
	content, err := openContent(settings, log)
	if err != nil {
		return 0, err
	}
	root, err := makeRoot(content, c.cwd, log)
	if err != nil {
		return 0, err
	}
	// From here on the network is used. The app's own exec is its first reader.
	time.AfterFunc(cutOffAfter, content.warnIfCutOff)
	prefetch := startPrefetch(content, settings, log)
	app, err := startApp(c.withoutOwnEnv(content.s3Variables), root.masks, settings.keepSysAdmin)
	if err != nil {
		return 0, err
	}
	meeting.ready(content.s3Variables)
	status := serve(app, signals)
	prefetch.stop()
	content.close()
	return status, nil
}
