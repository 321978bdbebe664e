package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Docker is a Docker engine.
type Docker struct {
	Socket string // path of a private engine's API socket
	dir    string
	daemon *daemon // nil where the engine was running before
	cli    string
}

// FindDocker returns the engine that docker speaks to on this machine by
// default, or an error if none answers.
func FindDocker(ctx context.Context) (*Docker, error) {
	cli, err := dockerCLI()
	if err != nil {
		return nil, err
	}
	d := &Docker{cli: cli}
	_, err = d.Output(ctx, "version")
	return d, err
}

// maxSocket is the longest path that a Unix socket can have, in bytes.
const maxSocket = 107

// StartDocker starts a dockerd that keeps everything below dir and waits until
// it answers. It has no bridge and touches no firewall: containers run with
// --network host, none, or container:ID (see [Pod]).
func StartDocker(ctx context.Context, dir string) (*Docker, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	return startDocker(ctx, dir, exec.Command)
}

// StartRemappedDocker starts a dockerd as StartDocker does, with user
// namespaces (--userns-remap): root of a container is an ordinary user of the
// host. The user of the containers must be able to reach dir. Such an engine
// gives no container the host's network.
func StartRemappedDocker(ctx context.Context, dir string) (*Docker, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	host, err := newHost(dir)
	if err != nil {
		return nil, err
	}
	return startDocker(ctx, dir, host.command, "--userns-remap", tenant)
}

// StartCutOffDocker starts a dockerd as StartDocker does, on a machine without a
// network: in a network namespace of its own, where not even the loopback is up.
func StartCutOffDocker(ctx context.Context, dir string) (*Docker, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	return startDocker(ctx, dir, CutOff)
}

// CutOff is a command in such a network namespace.
func CutOff(name string, args ...string) *exec.Cmd {
	return exec.Command("unshare", append([]string{"--net", "--", name}, args...)...)
}

// startDocker starts dockerd through command, with more options.
func startDocker(ctx context.Context, dir string, command func(string, ...string) *exec.Cmd, options ...string) (*Docker, error) {
	var err error
	d := &Docker{Socket: filepath.Join(dir, "docker.sock"), dir: dir}
	execRoot := filepath.Join(dir, "run")
	if long := filepath.Join(execRoot, "containerd/containerd-debug.sock"); len(long) > maxSocket {
		return nil, fmt.Errorf("start dockerd: %s is %d bytes long, a socket's path has at most %d: use a shorter directory", long, len(long), maxSocket)
	}
	if d.cli, err = dockerCLI(); err != nil {
		return nil, err
	}
	// Where a system containerd runs, dockerd uses it. A namespace of its own
	// keeps the containers apart from those of the system's Docker.
	ns := "bootfs-" + strconv.Itoa(os.Getpid())
	cmd := command("dockerd", append(options,
		"--data-root", filepath.Join(dir, "data"),
		"--exec-root", execRoot,
		"--pidfile", filepath.Join(dir, "dockerd.pid"),
		"--config-file", filepath.Join(dir, "daemon.json"), // empty: the system's is not read
		"--host", "unix://"+d.Socket,
		"--containerd-namespace", ns, "--containerd-plugins-namespace", ns+"-plugins",
		"--storage-driver", "overlay2",
		"--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false",
		"--shutdown-timeout", "5")...)
	if err := os.WriteFile(filepath.Join(dir, "daemon.json"), []byte("{}\n"), 0o644); err != nil {
		return nil, err
	}
	if d.daemon, err = startDaemon("dockerd", filepath.Join(dir, "dockerd.log"), cmd, syscall.SIGTERM); err != nil {
		return nil, err
	}
	if err := d.daemon.ready(ctx, func(ctx context.Context) error {
		_, err := d.Output(ctx, "version")
		return err
	}); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// dockerCLI finds the client of the packaged engine: another one that stands
// earlier on PATH may speak only to newer engines.
func dockerCLI() (string, error) {
	const packaged = "/usr/bin/docker"
	if _, err := os.Stat(packaged); err == nil {
		return packaged, nil
	}
	return exec.LookPath("docker")
}

// Command returns a call of the docker client that speaks to this engine.
func (d *Docker) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.cli, args...)
	cmd.Env = append(os.Environ(), d.Env()...)
	return cmd
}

// Env is what a process needs to reach this engine as its default one. Clients
// of a private engine read their configuration below its directory, so no
// login of the caller's is used or changed.
func (d *Docker) Env() []string {
	if d.daemon == nil {
		return nil
	}
	return []string{"DOCKER_HOST=unix://" + d.Socket, "DOCKER_CONFIG=" + filepath.Join(d.dir, "config"), "DOCKER_CONTEXT="}
}

// Output runs the docker client and returns what it wrote to stdout; an error
// carries stdout and stderr.
func (d *Docker) Output(ctx context.Context, args ...string) (string, error) {
	out, err := output(d.Command(ctx, args...))
	return string(out), err
}

// Log returns the last lines of a private engine's log, for a failed test to
// show.
func (d *Docker) Log() string {
	if d.daemon == nil {
		return ""
	}
	return d.daemon.tail()
}

// Close kills a private engine's containers, stops it and the processes that
// it started, and unmounts what it mounted. Its directory may be removed after.
// An engine that was running before is left alone.
func (d *Docker) Close() error {
	if d.daemon == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var errs []error
	// dockerd would give each container the shutdown timeout.
	if ids, err := d.Output(ctx, "ps", "--quiet", "--no-trunc"); err == nil && ids != "" {
		if _, err := d.Output(ctx, append([]string{"kill"}, strings.Fields(ids)...)...); err != nil {
			errs = append(errs, err)
		}
	}
	errs = append(errs, d.daemon.stop())
	errs = append(errs, d.stopContainerd())

	points, err := mountsBelow(d.dir)
	errs = append(errs, err)
	for _, p := range points {
		// The engine itself leaves the handle of the host's network namespace.
		if !strings.HasPrefix(p, filepath.Join(d.dir, "run/netns")+"/") {
			errs = append(errs, fmt.Errorf("dockerd left %s mounted\n%s", p, d.daemon.tail()))
		}
		if err := syscall.Unmount(p, syscall.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// stopContainerd ends the engine's own containerd, which outlives a dockerd
// that was killed.
func (d *Docker) stopContainerd() error {
	b, err := os.ReadFile(filepath.Join(d.dir, "run/containerd/containerd.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // dockerd removed it once containerd had ended
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("containerd.pid: %w", err)
	}
	// The number may belong to another process by now.
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(args), filepath.Join(d.dir, "run/containerd/")) {
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("containerd %d outlived dockerd; kill it: %w", pid, err)
	}
	return fmt.Errorf("containerd %d outlived dockerd and was killed", pid)
}
