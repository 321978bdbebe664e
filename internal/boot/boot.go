// Package boot is PID 1 of a converted container: it mounts the root
// filesystem that the boot image describes, moves what the engine mounted into
// it, and runs the program that the engine asked for inside. Where a container
// may not mount, it writes that filesystem into the container's own root and
// becomes the program.
//
// The order of a start is the order of the files' use:
//
//	caller.go      who asked for which program
//	rendezvous.go  is this the boot of the container, or a later exec
//	mode.go        is the root mounted or filled, and what is missing for it
//	content.go     index, locators, metadata, stores: mapped, no network
//	offline.go     what is said in the place of a store that must not be asked
//	volumes.go     volumes that the engine has initialised from the boot image
//	root.go        FUSE, writable layer, the engine's mounts, the switch
//	app.go         the program in its own PID and mount namespaces
//	appinit.go     the last steps inside those namespaces, before its exec
//	serve.go       signals, reaping, prefetch, the exit status
//	fill.go        without FUSE: the root in place, then the program in its stead
//
//	status.go      how the container is doing, for who asks
//	corner.go      where an exec can ask in a mounted root
//	ask.go         the command that asks
//	metrics.go     the same for Prometheus
//	readahead.go   how far the kernel reads ahead, and when
//	record.go      what the program reads until it is ready, if that is to be noted
//
// Boot itself stays in the root that the engine gave it, hidden below the new
// one: its own path lookups (resolver, certificates, credentials) then never
// lead through the mount that it serves, which could wait for itself.
//
// It needs Linux 5.6 (openat2, move_mount).
package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// Exit statuses of boot itself; every other status is the app's.
const (
	exitNoProgram     = 1   // the kernel refused the program: an unknown format, an interpreter that is missing
	exitBoot          = 125 // boot could not start the app
	exitNotExecutable = 126 // the program was found and may not be run
	exitNotFound      = 127 // the program was not found
)

// errSaid is a failure that the user was told of.
var errSaid = errors.New("see above")

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
	switch {
	case asks(statusCommand):
		return tellStatus(os.Args[2:], os.Stdout, os.Stderr)
	case asks(recordCommand):
		return tellRecord(os.Args[2:], os.Stdout, os.Stderr)
	}
	logs, err := readLogSettings(os.Getenv)
	out := newConsole(os.Stderr, logs)
	defer out.flush()
	status := 0
	if err == nil {
		status, err = run(out)
	}
	if err == nil {
		return status
	}
	if !errors.Is(err, errSaid) {
		out.log.Error(err.Error())
	}
	if e := (*exitError)(nil); errors.As(err, &e) {
		return e.status
	}
	return exitBoot
}

func run(out *console) (int, error) {
	c, err := currentCaller()
	if err != nil {
		return 0, err
	}
	if inCorner() {
		// What the engine has brought into the root is there already.
		return 0, c.become()
	}
	config, err := readConfig(bootimage.ConfigPath)
	if err != nil {
		return 0, err
	}
	for began := time.Now(); ; time.Sleep(dialPause) {
		if isFilled(config) {
			return 0, becomeProgram(c, config, out)
		}
		if unix.Geteuid() != 0 {
			return 0, fmt.Errorf("boot is uid %d and needs uid 0 to make the root filesystem; no-new-privileges takes the effect of its setuid bit: leave --security-opt no-new-privileges out of %s, or add --user root", unix.Geteuid(), engineRun())
		}
		err := errClaimed
		if !execed() || isBegun() && time.Since(began) > carryOnAfter {
			var meeting *meeting
			if meeting, err = claim(bootimage.Dir); err == nil {
				if isFilled(config) {
					// The boot that was here became the program after we looked.
					meeting.leave()
					continue
				}
				return lead(c, config, meeting, out)
			}
		}
		if !errors.Is(err, errClaimed) {
			return 0, err
		}
		switch word, err := await(bootimage.Dir); {
		case err == nil:
			return 0, follow(c, word == wordS3)
		case errors.Is(err, errNoBoot) && (isFilled(config) || time.Since(began) < followTimeout):
			// It has not come to its claim yet, or is the program by now.
		default:
			return 0, err
		}
	}
}

// lead makes the root and runs the app in it. It returns the app's exit status,
// unless it becomes the app itself.
func lead(c *caller, config *bootimage.Config, meeting *meeting, out *console) (int, error) {
	// Nobody but root may look at a process that holds credentials.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("make boot undumpable: %w", err)
	}
	signals := catchSignals()
	report := newReporter(config, out)
	meeting.reporter.Store(report)
	settings, err := readSettings(c.ownEnv(isBegun()))
	if err != nil {
		return 0, err
	}
	m, why, err := choose(settings, config)
	if err != nil {
		return 0, err
	}
	// Directories that boot makes are root's, not of the app's group, unless the
	// container lacks SETGID, which nothing else needs.
	if real, effective, saved := unix.Getresgid(); real|effective|saved != 0 {
		if err := syscall.Setresgid(0, 0, 0); err != nil && !errors.Is(err, fs.ErrPermission) {
			return 0, fmt.Errorf("become group 0: %w", err)
		}
	}
	content, err := openContent(config, settings, out)
	if err != nil {
		return 0, err
	}
	report.chose(m, settings.mode != modeAuto, why)
	unserve, err := serveMetrics(settings.metrics, report)
	if err != nil {
		out.log.Warn(err.Error())
	}
	defer unserve()
	if m == modeFuse {
		status, err := leadMounted(c, settings, content, meeting, report, signals, out)
		var refused *refusedError
		if !errors.As(err, &refused) {
			return status, err
		}
		if settings.mode == modeFuse {
			return 0, err
		}
		if noFill := fillRefusal(settings, config); noFill != nil {
			return 0, fmt.Errorf("%w; %w", err, noFill)
		}
		_ = content.fetcher.Close()
		why = "mounting it was refused: " + refused.Error()
		report.chose(modeFill, false, why)
	}
	if why != "" {
		out.log.Warn("the root is filled in place: " + why)
	}
	if content.record != nil {
		out.log.Warn("BOOTFS_RECORD: nothing is noted of a root that is filled in place")
	}
	return leadFilled(c, content, report, unserve, signals, out)
}

// leadMounted mounts the root and runs the app in it. A refusedError means that
// nothing has changed.
func leadMounted(c *caller, settings *settings, content *content, meeting *meeting, report *reporter, signals chan os.Signal, out *console) (int, error) {
	content.openFetcher(true)
	content.makeStartReady()
	report.opened(content)
	cutOff := time.AfterFunc(cutOffAfter, content.warnIfCutOff)
	status, err := untilStopped(signals, out.log, func(ctx context.Context) error { return content.initVolumes(ctx, out) })
	cutOff.Stop()
	if err != nil || status != 0 {
		return status, err
	}
	// From here on the network is used: what the app's exec reads first is on its way
	// while the root is made.
	prefetch := startPrefetch(content, settings, out.log)
	root, err := makeRoot(content, c.cwd, out.log)
	if err != nil {
		prefetch.stop()
		return 0, err
	}
	out.log.Info("the root is mounted, its chunks come as they are read")
	time.AfterFunc(cutOffAfter, content.warnIfCutOff)
	report.prefetches(prefetch)
	content.record.begin()
	app, err := startApp(c.underInit().withoutOwnEnv(content.s3Variables), root.masks, settings.keepSysAdmin, content.memory.appScore(), signals, func() {
		defer unix.Close(root.top)
		if err := openCorner(content.server, root.top, report, content.record); err != nil {
			out.log.Info("the status of this container cannot be asked for: " + err.Error())
		}
	})
	if err != nil {
		if e := (*noChunksError)(nil); errors.As(err, &e) {
			e.why = content.noChunks()
		}
		if errors.Is(err, errSaid) {
			prefetch.stop()
			content.close()
		}
		return 0, err
	}
	content.started()
	go content.endStart()
	time.AfterFunc(programStarts, content.memory.collect)
	report.became(stateRunning)
	word := byte(wordReady)
	if content.s3Variables {
		word = wordS3
	}
	meeting.ready(word)
	status = serve(app, signals)
	content.record.ended()
	prefetch.stop()
	content.close()
	return status, nil
}
