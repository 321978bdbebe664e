package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/reads"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

const (
	defaultEngine = "docker"
	// profilePause is how often the engine is asked how the container is.
	profilePause = 100 * time.Millisecond
	// removeTimeout bounds how long the engine takes to remove it.
	removeTimeout = 30 * time.Second
	// logLines is how much of a program's output is told when it was not ready.
	logLines = 10
	// maxLogLine bounds a line of it, in bytes.
	maxLogLine = 1 << 20
)

type profileFlags struct {
	*common
	untilPort int
	untilTime time.Duration
	untilLog  string
	timeout   time.Duration
	output    string
	engine    string
	runFlags  []string
}

func newProfile(c *common) *cobra.Command {
	f := &profileFlags{common: c}
	cmd := &cobra.Command{
		Use:   "profile IMAGE [-- ARG...]",
		Short: "Run a converted image and record what its program reads until it is ready",
		Long: `Run the converted image IMAGE in a container of the engine, as docker run does, and
write which parts of its files the program reads until it is ready: until it ends,
or --until-port, --until-log or --until-time. The container is removed then.

The result is text, which names files and not chunks, so that it holds for the
next versions of the image as well. A conversion with --start-set FILE puts their
chunks beside one another, and a start then fetches them with one to three requests
while it makes the root. Files of several uses of an image can be given together,
or joined with cat.

The root must be mounted for that: the container gets --device /dev/fuse, --cap-add
SYS_ADMIN, and what --run-flag adds. Where nothing may be run beside production, set
BOOTFS_RECORD there (exit, port:PORT or a time) and ask the container:
docker exec NAME /.bootfs/boot start-set.`,
		Example: `  bootfs-convert profile app:lazy -o app.start-set --until-port 8080
  bootfs-convert profile python:lazy -o numpy.start-set -- python3 -c 'import numpy'
  bootfs-convert profile db:lazy -o db.start-set --until-log 'ready to accept connections' --run-flag=-ePOSTGRES_PASSWORD=x
  bootfs-convert --start-set app.start-set app:1.1 registry.example.com/app:1.1-lazy`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || cmd.ArgsLenAtDash() == 0 || cmd.ArgsLenAtDash() < 0 && len(args) > 1 || cmd.ArgsLenAtDash() > 1 {
				return usagef("want IMAGE, and behind -- the arguments of its program; see %s --help", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return runProfile(cmd.Context(), f, args[0], args[1:])
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringVarP(&f.output, "output", "o", "", "`FILE` to write (default standard output)")
	fs.IntVar(&f.untilPort, "until-port", 0, "ready is who listens at TCP port `N`, in the container's network")
	fs.StringVar(&f.untilLog, "until-log", "", "ready is who has written a line that matches `REGEXP`")
	fs.DurationVar(&f.untilTime, "until-time", 0, "ready is who has run for `TIME`, as 5s, or has ended before")
	fs.DurationVar(&f.timeout, "timeout", 5*time.Minute, "`TIME` after which a program that is not ready is given up")
	fs.StringArrayVar(&f.runFlags, "run-flag", nil, "`FLAG` for docker create, as --run-flag=-eNAME=VALUE or --run-flag=--network=host; may be repeated")
	fs.StringVar(&f.engine, "engine", defaultEngine, "`PROGRAM` that runs containers, with docker's commands: docker, podman or nerdctl")
	return cmd
}

// record is what boot is told in BOOTFS_RECORD.
func (f *profileFlags) record() string {
	switch {
	case f.untilPort > 0:
		return "port:" + strconv.Itoa(f.untilPort)
	case f.untilTime > 0:
		return f.untilTime.String()
	}
	return "exit"
}

func runProfile(ctx context.Context, f *profileFlags, image string, args []string) error {
	conditions := 0
	for _, asked := range []bool{f.untilPort != 0, f.untilLog != "", f.untilTime != 0} {
		if asked {
			conditions++
		}
	}
	line, err := regexp.Compile(f.untilLog)
	switch {
	case conditions > 1:
		return usagef("--until-port, --until-log and --until-time: want one of them")
	case err != nil:
		return usagef("--until-log: %w", err)
	case f.untilPort < 0 || f.untilPort > 65535:
		return usagef("--until-port %d: want a port", f.untilPort)
	case f.untilTime < 0 || f.timeout <= 0:
		return usagef("--until-time and --timeout: want times above 0")
	case strings.HasPrefix(image, "-"):
		return usagef("image %q: want a name that %s run takes", image, f.engine)
	}
	if f.untilLog == "" {
		line = nil
	}
	if _, err := exec.LookPath(f.engine); err != nil {
		return usagef("--engine: %w", err)
	}
	began := time.Now()
	text, err := f.runAndRecord(ctx, image, args, line)
	if err != nil {
		return err
	}
	ranges, err := reads.Parse(bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("what the container's boot has recorded: %w", err)
	}
	var out bytes.Buffer
	if err := reads.Write(&out, ranges); err != nil {
		return err
	}
	result := profiled{Image: image, Ranges: len(ranges), Seconds: time.Since(began).Seconds()}
	files := make(map[string]bool)
	for _, g := range ranges {
		files[g.Path] = true
		result.Bytes += g.Size
	}
	result.Files = len(files)
	if f.output == "" {
		_, err = f.stdout.Write(out.Bytes())
		return err
	}
	if err := os.WriteFile(f.output, out.Bytes(), 0o644); err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	if f.json {
		return f.writeJSON(result)
	}
	_, err = fmt.Fprintf(f.stdout, "%s: %s of %d files are read until the program is ready\n", f.output, scratch.Bytes(result.Bytes), result.Files)
	return err
}

// profiled is the result of profile.
type profiled struct {
	Image   string  `json:"image"`
	Files   int     `json:"files"`
	Ranges  int     `json:"ranges"`
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"`
}

// runAndRecord runs image until it is ready and returns what boot has recorded.
func (f *profileFlags) runAndRecord(ctx context.Context, image string, args []string, line *regexp.Regexp) ([]byte, error) {
	command := append([]string{"create", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN",
		"--env", "BOOTFS_RECORD=" + f.record(), "--env", "BOOTFS_MODE=fuse"}, f.runFlags...)
	out, err := f.run(ctx, append(append(command, image), args...)...)
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	c := &profileRun{profileFlags: f, id: strings.TrimSpace(string(out))}
	defer c.remove(context.WithoutCancel(ctx)) // also one that cannot be started
	if _, err := f.run(ctx, "start", c.id); err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, f.timeout, errNotReady)
	defer cancel()
	err = c.isConverted(ctx)
	var text []byte
	if err == nil {
		text, err = c.recorded(ctx, line)
	}
	if context.Cause(ctx) == errNotReady {
		err = fmt.Errorf("%s is not ready after %v: see --timeout", image, f.timeout)
	}
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, c.said(context.WithoutCancel(ctx)))
	}
	return text, nil
}

var errNotReady = errors.New("not ready")

// run runs a command of the engine and returns what it wrote.
func (f *profileFlags) run(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, f.engine, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		why := strings.TrimSpace(stderr.String())
		if why == "" {
			why = err.Error()
		}
		return nil, fmt.Errorf("%s %s: %s", f.engine, args[0], why)
	}
	return stdout.Bytes(), nil
}

// profileRun is a container that runs to be recorded.
type profileRun struct {
	*profileFlags
	id string
}

// isConverted refuses an image without boot in it, whose container would run and
// record nothing.
func (c *profileRun) isConverted(ctx context.Context) error {
	out, err := c.run(ctx, "inspect", c.id)
	if err == nil && !bytes.Contains(out, []byte(bootimage.WritablePath)) {
		err = &convert.Error{Part: convert.Source, Err: errors.New("it is not a converted image")}
	}
	return err
}

// recorded waits for the container to be ready and returns what it has read.
func (c *profileRun) recorded(ctx context.Context, line *regexp.Regexp) ([]byte, error) {
	if line != nil {
		if err := c.awaitLine(ctx, line); err != nil {
			return nil, err
		}
		return c.run(ctx, "exec", c.id, bootimage.BootPath, "start-set")
	}
	for {
		// In this order: who has ended has left it behind, if ever.
		ended, status, err := c.ended(ctx)
		if err != nil {
			return nil, err
		}
		if ended || c.untilPort > 0 || c.untilTime > 0 {
			text, err := c.kept(ctx)
			switch {
			case err == nil:
				if ended && status != 0 {
					fmt.Fprintf(c.stderr, "bootfs-convert: the program ended with %d, and what it read until then counts\n", status)
				}
				return text, nil
			case ended && c.untilPort > 0:
				return nil, fmt.Errorf("the program ended with %d before it was ready", status)
			case ended:
				return nil, fmt.Errorf("the program ended with %d, and nothing was recorded: %w", status, err)
			}
		}
		select {
		case <-time.After(profilePause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// kept returns what boot has left behind in the container's own layer.
func (c *profileRun) kept(ctx context.Context) ([]byte, error) {
	out, err := c.run(ctx, "cp", c.id+":"+bootimage.RecordPath, "-")
	if err != nil {
		return nil, err
	}
	t := tar.NewReader(bytes.NewReader(out))
	if _, err := t.Next(); err != nil {
		return nil, fmt.Errorf("%s cp: %w", c.engine, err)
	}
	return io.ReadAll(io.LimitReader(t, reads.MaxFile+1))
}

// ended reports whether the container has, and with which exit status.
func (c *profileRun) ended(ctx context.Context) (bool, int, error) {
	out, err := c.run(ctx, "inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", c.id)
	if err != nil {
		return false, 0, err
	}
	var running bool
	var status int
	if _, err := fmt.Sscan(string(out), &running, &status); err != nil {
		return false, 0, fmt.Errorf("%s inspect: got %.80q, want whether the container runs", c.engine, out)
	}
	return !running, status, nil
}

// awaitLine returns when the program has written a line that matches.
func (c *profileRun) awaitLine(ctx context.Context, line *regexp.Regexp) error {
	ctx, cancel := context.WithCancel(ctx)
	r, w, err := os.Pipe()
	if err != nil {
		cancel()
		return err
	}
	cmd := exec.CommandContext(ctx, c.engine, "logs", "--follow", c.id)
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	defer func() {
		r.Close()
		cancel()
		_ = cmd.Wait() // it was killed, if it had not ended
	}()
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLogLine)
	for lines.Scan() {
		if line.Match(lines.Bytes()) {
			return nil
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s logs: %w", c.engine, err)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the program ended before it wrote a line that matches %q", line)
}

// said is what to add to a failure of the container: the end of its output.
func (c *profileRun) said(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, c.engine, "logs", "--tail", strconv.Itoa(logLines), c.id).CombinedOutput()
	if err != nil || len(bytes.TrimSpace(out)) == 0 {
		return ""
	}
	return "; it wrote: " + strings.TrimSpace(string(out))
}

// remove removes the container and its volumes.
func (c *profileRun) remove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	if _, err := c.run(ctx, "rm", "--force", "--volumes", c.id); err != nil {
		fmt.Fprintln(c.stderr, "bootfs-convert: the container is still there: "+err.Error())
	}
}

// readStartSets reads the files of several uses of an image.
func readStartSets(names []string) ([]reads.Range, error) {
	var all []reads.Range
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return nil, usagef("--start-set: %w", err)
		}
		ranges, err := reads.Parse(f)
		f.Close()
		if err != nil {
			return nil, usagef("--start-set: %s: %w", name, err)
		}
		all = append(all, ranges...)
	}
	return all, nil
}
