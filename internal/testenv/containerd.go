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

// Containerd is a containerd without Docker, used through ctr.
type Containerd struct {
	dir    string
	daemon *daemon
}

// StartContainerd starts a containerd that keeps everything below dir and waits
// until it answers.
func StartContainerd(ctx context.Context, dir string) (*Containerd, error) {
	return startContainerd(ctx, dir, "", func(string) []string { return nil })
}

// StartContainerdWith starts a containerd as StartContainerd does, with one more
// snapshotter: the server that command returns, which listens at socket. No word
// of it has a blank.
func StartContainerdWith(ctx context.Context, dir, snapshotter string, command func(socket string) []string) (*Containerd, error) {
	return startContainerd(ctx, dir, snapshotter, command)
}

// beside runs a command with a server, its first argument, beside it.
const beside = `$1 & shift; exec "$@"`

func startContainerd(ctx context.Context, dir, snapshotter string, command func(socket string) []string) (*Containerd, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	c := &Containerd{dir: dir}
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), c.socket())
	words := []string{"containerd", "--config", config}
	if snapshotter != "" {
		socket := filepath.Join(dir, snapshotter+".sock")
		text += fmt.Sprintf("[proxy_plugins.%s]\ntype = \"snapshot\"\naddress = %q\n", snapshotter, socket)
		words = append([]string{"sh", "-ec", beside, "sh", strings.Join(command(socket), " ")}, words...)
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	host, err := newHost(dir)
	if err != nil {
		return nil, err
	}
	cmd := host.closedCommand(filepath.Join(dir, "ready"), words[0], words[1:]...)
	if c.daemon, err = startDaemon("containerd", filepath.Join(dir, "containerd.log"), cmd, syscall.SIGKILL); err != nil {
		return nil, err
	}
	if err := c.daemon.ready(ctx, func(ctx context.Context) error {
		_, err := c.Output(ctx, "version")
		return err
	}); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Containerd) socket() string { return filepath.Join(c.dir, "containerd.sock") }

// Command returns a call of ctr.
func (c *Containerd) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ctr", append([]string{"--address", c.socket()}, args...)...)
}

// Inside returns a command that runs on containerd's machine, where it sees the
// same processes and mounts. CONTAINERD_ADDRESS tells it where containerd listens.
func (c *Containerd) Inside(ctx context.Context, name string, args ...string) *exec.Cmd {
	target := strconv.Itoa(c.daemon.cmd.Process.Pid)
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", target, "--mount", "--pid", "--", name}, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERD_ADDRESS="+c.socket())
	return cmd
}

// Output runs ctr and returns what it wrote to stdout; an error carries stdout
// and stderr.
func (c *Containerd) Output(ctx context.Context, args ...string) (string, error) {
	out, err := output(c.Command(ctx, args...))
	return string(out), err
}

// Close ends containerd and the containers. Mounts and processes go with their
// namespaces; its directory may be removed after.
func (c *Containerd) Close() error { return c.daemon.stop() }
