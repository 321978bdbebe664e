package sshstore

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/freeport"
)

// noCasync is a line of sshd's configuration with which commands are not found,
// also by a shell that knows where else to look.
const noCasync = "SetEnv PATH=/nonexistent HOME=/nonexistent"

// server is Debian's sshd at a loopback port, with files of its own. root logs
// in with the key in Key.
type server struct {
	t       testing.TB
	dir     string
	addr    string // host:port
	key     string // file of a private key that is let in
	hostKey string // line of a known_hosts file
	cmd     *exec.Cmd
}

// startServer starts an sshd with lines added to its configuration.
func startServer(t testing.TB, lines ...string) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), addr: freeAddress(t)}
	host, port, _ := net.SplitHostPort(s.addr)
	s.key = filepath.Join(s.dir, "user_key")
	user := writeKey(t, s.key, newKey(t, "ed25519"), "")
	write(t, filepath.Join(s.dir, "authorized_keys"), string(ssh.MarshalAuthorizedKey(user)))
	s.newHostKey()
	config := []string{
		"Port " + port,
		"ListenAddress " + host,
		"HostKey " + filepath.Join(s.dir, "host_key"),
		"AuthorizedKeysFile " + filepath.Join(s.dir, "authorized_keys"),
		"StrictModes no",
		"UsePAM no",
		"UseDNS no",
		"PidFile none",
		"PermitRootLogin yes",
		"PasswordAuthentication no",
		"Subsystem sftp internal-sftp",
	}
	// The first of a kind counts. Without the home directory no profile of
	// root's is read.
	config = append(append(config, lines...), "SetEnv HOME="+s.dir)
	write(t, s.config(), strings.Join(config, "\n")+"\n")
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd wants it for its unprivileged half
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(s.kill)
	return s
}

func (s *server) config() string { return filepath.Join(s.dir, "sshd_config") }

// newHostKey gives the server another host key, from the next start on.
func (s *server) newHostKey() {
	public := writeKey(s.t, filepath.Join(s.dir, "host_key"), newKey(s.t, "ed25519"), "")
	s.hostKey = knownLine(s.addr, public)
}

func knownLine(addr string, key ssh.PublicKey) string {
	host, port, _ := net.SplitHostPort(addr)
	return fmt.Sprintf("[%s]:%s %s", host, port, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))))
}

func (s *server) start() {
	s.t.Helper()
	s.cmd = exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", s.config())
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd.Stderr = log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", s.addr)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			text, _ := os.ReadFile(log.Name())
			s.t.Fatalf("sshd does not start: %v\n%s", err, text)
		}
	}
}

// kill ends the server and the processes of its connections.
func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	pids := children(s.cmd.Process.Pid)
	s.cmd.Process.Kill()
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	s.cmd.Wait()
	s.cmd = nil
}

// children returns the process ids of pid's descendants.
func children(pid int) []int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	var all []int
	for _, field := range strings.Fields(string(text)) {
		if child, err := strconv.Atoi(field); err == nil {
			all = append(append(all, child), children(child)...)
		}
	}
	return all
}

func (s *server) options() Options {
	return Options{User: "root", Keys: []string{s.key}, HostKeys: []string{s.hostKey}}
}

// open opens the store in dir on the server.
func (s *server) open(scheme, dir string) *Store { return s.openAt(scheme, s.addr, dir, s.options()) }

func (s *server) openAt(scheme, addr, dir string, o Options) *Store {
	s.t.Helper()
	return open(s.t, scheme+"://root@"+addr+dir, o)
}

func open(t testing.TB, address string, o Options) *Store {
	t.Helper()
	st, err := New(address, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

func freeAddress(t testing.TB) string {
	t.Helper()
	address, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func newKey(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	if kind == "rsa" {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		_, key, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// writeKey writes key to path, encrypted if there is a passphrase, and returns
// its public half.
func writeKey(t testing.TB, path string, key crypto.Signer, passphrase string) ssh.PublicKey {
	t.Helper()
	var block *pem.Block
	var err error
	if passphrase == "" {
		block, err = ssh.MarshalPrivateKey(key, "")
	} else {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, string(pem.EncodeToMemory(block)))
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// chunk returns the ID and the stored form of n reproducible bytes.
func chunk(seed, n int) (index.ID, []byte) {
	plain := []byte(strings.Repeat(fmt.Sprintf("%x ", seed*seed+17), n/3+1))[:n]
	copy(plain, fmt.Sprint(seed, " "))
	return index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
}

// fill writes n chunks into dir without a store, and returns their names.
func fill(t testing.TB, dir string, n int) []index.ID {
	t.Helper()
	var ids []index.ID
	for i := range n {
		id, frame := chunk(i, 3000)
		shard, file := chunkstore.Place(id)
		if err := os.MkdirAll(filepath.Join(dir, shard), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, shard, file), string(frame))
		ids = append(ids, id)
	}
	return ids
}

// proxy passes TCP connections on, late or not at all.
type proxy struct {
	addr string

	mu    sync.Mutex
	delay time.Duration // each way
	conns []net.Conn
	holes map[net.Conn]bool // take everything and pass on nothing
}

func startProxy(t testing.TB, target string, delay time.Duration) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: l.Addr().String(), delay: delay, holes: map[net.Conn]bool{}}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, in, out)
			p.mu.Unlock()
			go p.pass(in, out)
			go p.pass(out, in)
		}
	}()
	t.Cleanup(func() { l.Close(); p.cut() })
	return p
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// silence makes the present connections swallow what is sent on them; later
// ones are not concerned.
func (p *proxy) silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		p.holes[c] = true
	}
}

func (p *proxy) pass(from, to net.Conn) {
	type part struct {
		b   []byte
		due time.Time
	}
	parts := make(chan part, 10_000)
	go func() {
		defer close(parts)
		for {
			b := make([]byte, 64<<10)
			n, err := from.Read(b)
			p.mu.Lock()
			hole, delay := p.holes[from], p.delay
			p.mu.Unlock()
			if n > 0 && !hole {
				parts <- part{b[:n], time.Now().Add(delay)}
			}
			if err != nil {
				return
			}
		}
	}()
	for q := range parts {
		time.Sleep(time.Until(q.due))
		if _, err := to.Write(q.b); err != nil {
			break
		}
	}
	from.Close()
	to.Close()
}

// fakeServer is an SSH server with the given authentication whose commands are
// run by run; nil refuses them.
func fakeServer(t testing.TB, config *ssh.ServerConfig, run func(command string, ch io.ReadWriteCloser)) (addr, hostKey string) {
	t.Helper()
	signer, err := ssh.NewSignerFromSigner(newKey(t, "ed25519"))
	if err != nil {
		t.Fatal(err)
	}
	config.AddHostKey(signer)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, channels, requests, err := ssh.NewServerConn(c, config)
				if err != nil {
					return
				}
				go ssh.DiscardRequests(requests)
				for open := range channels {
					ch, requests, err := open.Accept()
					if err != nil {
						return
					}
					go func() {
						for r := range requests {
							ok := r.Type == "exec" && run != nil
							r.Reply(ok, nil)
							if ok {
								var command struct{ Text string }
								ssh.Unmarshal(r.Payload, &command)
								go run(command.Text, ch)
							}
						}
					}()
				}
			}()
		}
	}()
	return l.Addr().String(), knownLine(l.Addr().String(), signer.PublicKey())
}
