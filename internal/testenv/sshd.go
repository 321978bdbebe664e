package testenv

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

// SSHD is a real SSH server: Debian's, with Debian's casync on its PATH. It and
// what runs on it see the machine's files, but an /etc and a /srv of their own.
type SSHD struct {
	Address string // "127.0.0.1:PORT"
	Key     string // file of a private key that is let in
	HostKey string // the server's own: its line of a known_hosts file
	Srv     string // directory that the server sees as /srv

	dir      string
	password string
	daemon   *daemon
}

// SSHDOptions of StartSSHD. The zero value is a server that lets root in with
// Key, to SFTP and commands.
type SSHDOptions struct {
	// Config is the sshd_config, but for the address. It names the host key
	// /etc/ssh/keys/host_ed25519 and the keys that are let in
	// /etc/ssh/keys/authorized_keys.
	Config string
	// Password of root; "" is none.
	Password string
	// Setup is what a shell does as root, with the server's /etc and /srv,
	// before the server starts for the first time: adds users, for one.
	Setup string
}

const sshdConfig = `HostKey /etc/ssh/keys/host_ed25519
AuthorizedKeysFile /etc/ssh/keys/authorized_keys
PermitRootLogin yes
PasswordAuthentication yes
UsePAM no
UseDNS no
PidFile none
Subsystem sftp internal-sftp
`

// StartSSHD starts a server at a free port of the loopback, with what is its
// own below dir.
func StartSSHD(ctx context.Context, dir string, o SSHDOptions) (*SSHD, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	if o.Config == "" {
		o.Config = sshdConfig
	}
	address, err := freeport.Address() // kept for its later starts
	if err != nil {
		return nil, err
	}
	s := &SSHD{Address: address, Key: filepath.Join(dir, "key"), Srv: filepath.Join(dir, "srv"), dir: dir, password: o.Password}
	for _, d := range []string{s.Srv, s.etc(), filepath.Join(dir, "work"), s.keys()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	public, err := newSSHKey(s.Key)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(s.keys(), "authorized_keys"), ssh.MarshalAuthorizedKey(public), 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "sshd_config"), []byte(o.Config), 0o644); err != nil {
		return nil, err
	}
	if err := s.NewHostKey(); err != nil {
		return nil, err
	}
	if err := s.start(ctx, o.Setup); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *SSHD) etc() string { return filepath.Join(s.dir, "etc") }

func (s *SSHD) keys() string { return filepath.Join(s.etc(), "ssh/keys") }

// NewHostKey gives the server another host key, from its next start on.
func (s *SSHD) NewHostKey() error {
	public, err := newSSHKey(filepath.Join(s.keys(), "host_ed25519"))
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(s.Address)
	if err != nil {
		return err
	}
	s.HostKey = fmt.Sprintf("[%s]:%s %s", host, port, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))))
	return nil
}

// newSSHKey writes a new private key to path and returns its public half.
func newSSHKey(path string) (ssh.PublicKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, err
	}
	return ssh.NewPublicKey(key.Public())
}

// Start starts the server again after Close, at the same address.
func (s *SSHD) Start(ctx context.Context) error { return s.start(ctx, "") }

func (s *SSHD) start(ctx context.Context, setup string) error {
	// Root's home is elsewhere, where no profile of the machine's is read.
	script := `set -e
mount -t overlay -o "lowerdir=/etc,upperdir=$dir/etc,workdir=$dir/work" overlay /etc
mount --bind "$dir/srv" /srv
mkdir -p /run/sshd
if [ -n "$password" ]; then printf 'root:%s\n' "$password" | chpasswd -c SHA512; fi
unset password
` + setup + `
exec /usr/sbin/sshd -D -e -f "$dir/sshd_config" -o ListenAddress="$address" -o SetEnv=HOME=/srv
`
	cmd := exec.Command("unshare", "--mount", "sh", "-c", script)
	cmd.Env = append(os.Environ(), "dir="+s.dir, "address="+s.Address, "password="+s.password)
	var err error
	if s.daemon, err = startDaemon("sshd", filepath.Join(s.dir, "sshd.log"), cmd, syscall.SIGKILL); err != nil {
		return err
	}
	if err := s.daemon.ready(ctx, s.greets); err != nil {
		return errors.Join(err, s.Close())
	}
	return nil
}

// greets looks whether the server answers.
func (s *SSHD) greets(context.Context) error {
	c, err := net.DialTimeout("tcp", s.Address, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	_, err = io.ReadFull(c, make([]byte, len("SSH-2.0-")))
	return err
}

// Log returns the last lines of the server's log.
func (s *SSHD) Log() string { return s.daemon.tail() }

// Close stops the server and ends its connections. Its files stay.
func (s *SSHD) Close() error {
	// A connection is served by a process of its own, which would go on.
	connections := descendants(s.daemon.cmd.Process.Pid)
	err := s.daemon.stop()
	for _, pid := range connections {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	return err
}

// Processes returns the ids of the server's processes, those of its connections
// and of what they run among them.
func (s *SSHD) Processes() []int { return s.daemon.processes() }

// Kill ends all of them with SIGKILL, as the kernel does when memory is short.
func (s *SSHD) Kill() { s.daemon.kill() }

// Serving returns the ids of the processes that read files for clients: casync,
// or sshd for a client of SFTP.
func (s *SSHD) Serving() []int {
	var serving []int
	for _, pid := range descendants(s.daemon.cmd.Process.Pid) {
		if len(descendants(pid)) == 0 {
			serving = append(serving, pid)
		}
	}
	return serving
}
