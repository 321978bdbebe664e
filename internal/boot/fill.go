package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore/s3store"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/fill"
)

// isFilled reports whether the root that boot stands in is filled, by config's
// index. The boot of a container that was restarted then has nothing to do, and
// may have lost the right to do it: its setuid bit is gone.
func isFilled(config *bootimage.Config) bool {
	b, err := os.ReadFile(bootimage.FilledPath)
	return err == nil && strings.TrimSpace(string(b)) == config.IndexDigest
}

// leadFilled fills the root and becomes the caller's program. It returns
// only if it cannot, or if a signal ends the container meanwhile.
func leadFilled(c *caller, content *content, report *reporter, unserve func(), signals <-chan os.Signal, out *console) (int, error) {
	content.memory.collect()
	content.openFetcher(false)
	report.opened(content)
	content.warnOfHiddenChanges()
	// An image that was filled by another index and converted again.
	if err := os.Remove(bootimage.FilledPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("fill the root: %w", err)
	}
	if err := os.Mkdir(bootimage.FillDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return 0, fmt.Errorf("fill the root: %w", err)
	}
	time.AfterFunc(cutOffAfter, content.warnIfCutOff)
	status, err := untilStopped(signals, out.log, func(ctx context.Context) error {
		if err := content.initVolumes(ctx, out); err != nil {
			return err
		}
		return content.fillRoot(ctx, report, out)
	})
	if err != nil || status != 0 {
		return status, err
	}
	unserve()
	// Its followers see that this boot is gone, and the note: then the program is
	// what the container's first process runs.
	return 0, becomeProgram(c, content.config, out)
}

// untilStopped does what may take long before the program runs. It returns the
// exit status when a signal ends the container meanwhile.
func untilStopped(signals <-chan os.Signal, log *logger, do func(context.Context) error) (status int, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	for {
		select {
		case err := <-done:
			return 0, err
		case s := <-signals:
			if s := s.(unix.Signal); endsFill(s) {
				// What is written remains: a restart goes on from there.
				cancel()
				select {
				case <-done:
				case <-time.After(stopWait):
				}
				log.Info("the container was stopped before its program was started", "signal", unix.SignalName(s))
				return 128 + int(s), nil
			}
		}
	}
}

// endsFill reports whether a signal ends the container while its program does
// not run yet: those that people and engines stop programs with. PID 1 takes no
// others either before it has asked for them.
func endsFill(s unix.Signal) bool {
	switch s {
	case unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP:
		return true
	}
	return false
}

// fillRoot writes the root image over the files of the boot image and notes that
// this is done.
func (c *content) fillRoot(ctx context.Context, report *reporter, out *console) error {
	c.removeMarks()
	meter := newMeter(out, "filling the root")
	defer meter.stop()
	accounts, err := engineAccounts()
	if err != nil {
		return fmt.Errorf("fill the root: %w", err)
	}
	filled, err := fill.Root(ctx, "/", fill.Options{
		Meta:     c.meta,
		Index:    c.index,
		Fetcher:  c.fetcher,
		Order:    c.packOrder(),
		State:    bootimage.FillDir,
		Last:     isLink(),
		Patience: c.patience(),
		Progress: meter.set,
		Log:      c.faults,
	})
	if err != nil {
		return err
	}
	c.close()
	c.started()
	for _, line := range filled.Left {
		c.log.Warn("not in the root: " + line)
	}
	detachOwn(c.log)
	for p, text := range accounts {
		if info, err := os.Lstat(p); err != nil || !info.Mode().IsRegular() || info.Size() >= int64(len(text)) {
			continue
		}
		if err := os.WriteFile(p, text, 0); err != nil {
			return fmt.Errorf("bring the engine's users into the root: %w", err)
		}
	}
	if err := report.keepStatus(); err != nil {
		c.log.Info("the status is not kept: " + err.Error())
	}
	if err := noteFilled(c.config.IndexDigest); err != nil {
		return fmt.Errorf("fill the root: %w", err)
	}
	c.log.Info("the root is filled in place", "files", filled.Files, "bytes", filled.Bytes, "resumed", filled.Resumed)
	return nil
}

// isLink returns what reports whether a link to boot stands at a path below the
// root. It must stand until everything that the program in its place needs is
// there: whoever runs it waits for that.
func isLink() func(path string) bool {
	link, err := os.ReadFile(bootimage.LinkPath)
	if err != nil {
		return nil // an image without links
	}
	return func(path string) bool { return isLinkAt(unix.AT_FDCWD, "/"+path, link) }
}

// detachOwn unmounts what is bootfs's own, where the container may. The program
// sees it otherwise.
func detachOwn(log *logger) {
	if len(missing(capability.CAP_SYS_ADMIN)) > 0 {
		return
	}
	mounts, err := readMounts()
	if err != nil {
		log.Info("the program sees what is mounted for bootfs: " + err.Error())
		return
	}
	for _, dir := range mounts.own {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			log.Info(fmt.Sprintf("the program sees %s: unmount: %v", dir, err))
		}
	}
}

// noteFilled makes this root one that is filled: boot has no more rights than
// who runs it, and has nothing else to do.
func noteFilled(indexDigest string) error {
	// The note before the bit, as without either the container could not start.
	tmp := filepath.Join(bootimage.FillDir, "filled")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(indexDigest + "\n")
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, bootimage.FilledPath); err != nil {
		return err
	}
	return endFill()
}

// endFill takes away what only a root that is not filled needs: boot's setuid
// bit, then the state of the fill.
func endFill() error {
	for _, path := range []string{bootimage.LinkPath, bootimage.BootPath} {
		if err := os.Chmod(path, 0o755); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return os.RemoveAll(bootimage.FillDir)
}

// isBegun reports whether a fill has left its state, which goes when all else
// is done.
func isBegun() bool {
	_, err := os.Lstat(bootimage.FillDir)
	return err == nil
}

// warnOfHiddenChanges tells that an earlier start mounted the root and has kept
// its changes in the volume, where this one does not look.
func (c *content) warnOfHiddenChanges() {
	changed, err := filepath.Glob(filepath.Join(upperDir(c.config.IndexDigest), "upper", "*"))
	if err == nil && len(changed) > 0 {
		c.log.Warn("what this container wrote while its root was mounted stays aside in the volume at " + bootimage.WritablePath)
	}
}

// becomeProgram replaces boot by the caller's program, in a root that is filled.
// It returns only on failure.
func becomeProgram(c *caller, config *bootimage.Config, out *console) error {
	if isBegun() && unix.Geteuid() == 0 {
		// A boot was killed behind its note.
		if err := endFill(); err != nil {
			return fmt.Errorf("end the fill of the root: %w", err)
		}
	}
	settings, err := readSettings(c.env)
	if err != nil {
		return err
	}
	go func(signals <-chan os.Signal) {
		for s := range signals {
			if s := s.(unix.Signal); endsFill(s) {
				os.Exit(128 + int(s))
			}
		}
	}(catchSignals())
	// Capabilities and the filter belong to the thread.
	runtime.LockOSThread()
	if !settings.keepSysAdmin && len(missing(capability.CAP_SYS_ADMIN)) == 0 {
		if err := giveUpSysAdmin(); err != nil {
			return err
		}
	}
	if err := enterDirectory(c.cwd); err != nil {
		return err
	}
	if err := becomeUser(c.uid, c.gid, c.groups); err != nil {
		return err
	}
	out.flush()
	return execProgram(c.program, c.argv, c.withoutOwnEnv(ownS3Variables(settings, config)).env)
}

// ownS3Variables reports whether the variables with credentials for S3 are
// boot's own, as openStores does, without opening anything.
func ownS3Variables(s *settings, config *bootimage.Config) bool {
	if !slices.ContainsFunc(slices.Concat(s.stores, config.Stores), s3store.Is) {
		return false
	}
	places, err := secretPlaces()
	if err != nil {
		return true
	}
	root, err := hold("/")
	return err != nil || len(secrets{root, places}.find(s3Credentials)) == 0
}
