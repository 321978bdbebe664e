package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

// Podman is podman with images and containers of its own.
type Podman struct {
	dir      string
	rootless bool
	holder   *daemon // first process of the PID namespace that podman runs in
}

// StartPodman prepares a podman that keeps everything below dir. A rootless
// one runs as an ordinary user, who must be able to reach dir. Containers have
// the host's network.
func StartPodman(ctx context.Context, dir string, rootless bool) (*Podman, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	p := &Podman{dir: dir, rootless: rootless}
	if err := p.configure(); err != nil {
		return nil, err
	}
	host, err := newHost(dir)
	if err != nil {
		return nil, err
	}
	ready := filepath.Join(dir, "ready")
	cmd := host.closedCommand(ready, "sleep", "infinity")
	if p.holder, err = startDaemon("the host of podman", filepath.Join(dir, "host.log"), cmd, syscall.SIGKILL); err != nil {
		return nil, err
	}
	if err := p.holder.ready(ctx, func(context.Context) error {
		_, err := os.Stat(ready)
		return err
	}); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// podmanConfig is containers.conf. Where cgroups are of both versions, crun
// refuses to work; limits are such that no privilege is needed to set them.
const podmanConfig = `[containers]
netns = "host"
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:1024", "nproc=2048:2048"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
`

func (p *Podman) configure() error {
	owner := 0
	if p.rootless {
		owner = tenantID
	}
	for _, d := range []string{"home", "run"} {
		d = filepath.Join(p.dir, d)
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
		if err := os.Chown(d, owner, owner); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(p.dir, "containers.conf"), []byte(podmanConfig), 0o644)
}

// Command returns a call of podman.
func (p *Podman) Command(ctx context.Context, args ...string) *exec.Cmd {
	all := []string{"--target", strconv.Itoa(p.holder.cmd.Process.Pid), "--mount", "--pid"}
	podman := []string{"podman", "--storage-driver", "overlay"}
	if p.rootless {
		id := strconv.Itoa(tenantID)
		all = append(all, "--setuid", id, "--setgid", id)
	} else {
		podman = append(podman, "--root", filepath.Join(p.dir, "home/storage"), "--runroot", filepath.Join(p.dir, "run"), "--tmpdir", filepath.Join(p.dir, "run/tmp"))
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(append(all, podman...), args...)...)
	cmd.Dir = "/"
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"),
		"HOME=" + filepath.Join(p.dir, "home"),
		"XDG_RUNTIME_DIR=" + filepath.Join(p.dir, "run"),
		"CONTAINERS_CONF=" + filepath.Join(p.dir, "containers.conf"),
	}
	return cmd
}

// Output runs podman and returns what it wrote to stdout; an error carries
// stdout and stderr.
func (p *Podman) Output(ctx context.Context, args ...string) (string, error) {
	out, err := output(p.Command(ctx, args...))
	return string(out), err
}

// Close ends all that podman has started. Mounts and processes go with their
// namespaces; its directory may be removed after.
func (p *Podman) Close() error {
	if err := p.holder.stop(); err != nil {
		return fmt.Errorf("podman: %w", err)
	}
	return nil
}
