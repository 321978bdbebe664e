package testenv

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

// Nginx is a web server: Debian's nginx.
type Nginx struct {
	Address string // "127.0.0.1:PORT", plain HTTP
	Root    string // the directory that it serves

	dir    string
	daemon *daemon
}

// StartNginx starts nginx with all its files below dir and one site, whose
// configuration is that of samples/http. Who knows the password of one of
// writers, which has user names as keys, may PUT.
func StartNginx(ctx context.Context, dir, site string, writers map[string]string) (*Nginx, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	n := &Nginx{Root: filepath.Join(dir, "chunks"), dir: dir}
	for _, d := range []string{n.Root, n.Root + ".incoming", filepath.Join(dir, "tmp")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	var users strings.Builder
	for user, password := range writers {
		fmt.Fprintf(&users, "%s:{PLAIN}%s\n", user, password)
	}
	if err := os.WriteFile(filepath.Join(dir, "chunk-writers"), []byte(users.String()), 0o600); err != nil {
		return nil, err
	}
	if n.Address, err = freeport.Address(); err != nil {
		return nil, err
	}
	site = strings.NewReplacer("listen 80;", "listen "+n.Address+";", "/srv/chunks", n.Root, "/etc/nginx/", dir+"/").Replace(site)
	// Its workers run as the user who may read dir.
	text := fmt.Sprintf(`daemon off;
user root;
worker_processes 2;
pid %[1]s/pid;
error_log %[1]s/error.log;
events { worker_connections 512; }
http {
	access_log %[1]s/access.log;
	proxy_temp_path %[1]s/tmp/proxy;
	fastcgi_temp_path %[1]s/tmp/fastcgi;
	uwsgi_temp_path %[1]s/tmp/uwsgi;
	scgi_temp_path %[1]s/tmp/scgi;
	%[2]s
}
`, dir, site)
	if err := os.WriteFile(n.config(), []byte(text), 0o600); err != nil {
		return nil, err
	}
	if err := n.Start(ctx); err != nil {
		return nil, err
	}
	return n, nil
}

// Start starts the server again after Close or Kill, at the same address.
func (n *Nginx) Start(ctx context.Context) error {
	cmd := exec.Command("nginx", "-p", n.dir, "-e", filepath.Join(n.dir, "error.log"), "-c", n.config())
	var err error
	if n.daemon, err = startDaemon("nginx", filepath.Join(n.dir, "output.log"), cmd, syscall.SIGTERM); err != nil {
		return err
	}
	if err := n.daemon.ready(ctx, func(context.Context) error {
		c, err := net.Dial("tcp", n.Address)
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		return errors.Join(err, n.Close())
	}
	return nil
}

func (n *Nginx) config() string { return filepath.Join(n.dir, "nginx.conf") }

// Processes returns the ids of the server's processes.
func (n *Nginx) Processes() []int { return n.daemon.processes() }

// Kill ends the server with SIGKILL, as the kernel does when memory is short.
func (n *Nginx) Kill() { n.daemon.kill() }

// Close stops the server. Its files stay.
func (n *Nginx) Close() error { return n.daemon.stop() }
