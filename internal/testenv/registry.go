package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"

	"github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/crypto/bcrypt"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

// Registry is a real registry: distribution.
type Registry struct {
	Address string // "127.0.0.1:PORT", plain HTTP
	Dir     string // its storage

	program string
	daemon  *daemon
}

// StartRegistry starts distribution 2, as Debian packages it, with its data
// below dir. An empty address takes a free port of loopback; the address of an
// earlier registry starts that one again.
func StartRegistry(ctx context.Context, dir, address string) (*Registry, error) {
	return startRegistry(ctx, "docker-registry", dir, address, "")
}

// StartPrivateRegistry starts distribution 2 for one user with a password.
func StartPrivateRegistry(ctx context.Context, dir, user, password string) (*Registry, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		return nil, err
	}
	users := filepath.Join(dir, "htpasswd")
	if err := os.WriteFile(users, fmt.Appendf(nil, "%s:%s\n", user, hash), 0o600); err != nil {
		return nil, err
	}
	return startRegistry(ctx, "docker-registry", dir, "", fmt.Sprintf("auth: {htpasswd: {realm: private, path: %q}}\n", users))
}

// distribution is the program of distribution 3, which Debian does not have,
// and the release that is tested with. It is no dependency of the module.
const distribution = "github.com/distribution/distribution/v3/cmd/registry@v3.1.2"

// StartDistribution starts distribution 3 as StartRegistry starts 2. The first
// one builds it from its Go module, which takes a minute.
func (c *Cache) StartDistribution(ctx context.Context, dir, address string) (*Registry, error) {
	bin, err := c.program(ctx, distribution)
	if err != nil {
		return nil, err
	}
	return startRegistry(ctx, bin, dir, address, "")
}

func startRegistry(ctx context.Context, program, dir, address, more string) (*Registry, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	if address == "" {
		if address, err = freeport.Address(); err != nil {
			return nil, err
		}
	}
	r := &Registry{Dir: dir, program: program}
	text := fmt.Sprintf(`version: 0.1
log: {level: info}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: true}
  maintenance: {uploadpurging: {enabled: false}}
http: {addr: %q}
`, filepath.Join(dir, "data"), address) + more
	if err := os.WriteFile(r.config(), []byte(text), 0o644); err != nil {
		return nil, err
	}
	if err := r.Start(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// Start starts the registry again after Close or Kill, at the same address.
func (r *Registry) Start(ctx context.Context) error {
	log := filepath.Join(r.Dir, "registry.log")
	// The address is read from the log: an earlier run's must not be found.
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	cmd := exec.Command(r.program, "serve", r.config())
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none") // 3 looks for a collector of traces otherwise
	var err error
	if r.daemon, err = startDaemon(filepath.Base(r.program), log, cmd, syscall.SIGKILL); err != nil {
		return err
	}
	if err := r.daemon.ready(ctx, r.probe); err != nil {
		return errors.Join(err, r.Close())
	}
	return nil
}

func (r *Registry) config() string { return filepath.Join(r.Dir, "registry.yml") }

// Processes returns the ids of the registry's processes.
func (r *Registry) Processes() []int { return r.daemon.processes() }

// Kill ends the registry with SIGKILL, as the kernel does when memory is short.
func (r *Registry) Kill() { r.daemon.kill() }

// listening is how the registry says which port it was given.
var listening = regexp.MustCompile(`msg="listening on (127\.[0-9.]+:[0-9]+)"`)

func (r *Registry) probe(ctx context.Context) error {
	b, err := os.ReadFile(r.daemon.log)
	if err != nil {
		return err
	}
	m := listening.FindSubmatch(b)
	if m == nil {
		return errors.New("it does not say yet where it listens")
	}
	r.Address = string(m[1])
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Address+"/v2/", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("GET %s: %s", req.URL, resp.Status)
	}
	return nil
}

// Log returns the last lines of the registry's log.
func (r *Registry) Log() string { return r.daemon.tail() }

// Close stops the registry. Its data stay.
func (r *Registry) Close() error { return r.daemon.stop() }

// GoRegistry is go-containerregistry's registry, within this process. It keeps
// what it has in memory.
type GoRegistry struct {
	Address string // "127.0.0.1:PORT", plain HTTP
	server  *http.Server
	done    chan error
}

// StartGoRegistry starts an empty GoRegistry at a free port.
func StartGoRegistry() (*GoRegistry, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	quiet := log.New(io.Discard, "", 0)
	r := &GoRegistry{
		Address: l.Addr().String(),
		server:  &http.Server{Handler: registry.New(registry.Logger(quiet)), ErrorLog: quiet},
		done:    make(chan error, 1),
	}
	go func() { r.done <- r.server.Serve(l) }()
	return r, nil
}

// Close stops the registry, which forgets all.
func (r *GoRegistry) Close() error {
	err := r.server.Close()
	if served := <-r.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}
