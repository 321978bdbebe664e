package testenv

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// Registry is a real registry: distribution, as Debian packages it.
type Registry struct {
	Address string // "127.0.0.1:PORT", plain HTTP
	Dir     string // its storage
	daemon  *daemon
}

// StartRegistry starts a registry with its data below dir. An empty address
// takes a free port of loopback; the address of an earlier registry starts
// that one again.
func StartRegistry(ctx context.Context, dir, address string) (*Registry, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	listen := address
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	config := filepath.Join(dir, "registry.yml")
	text := fmt.Sprintf(`version: 0.1
log: {level: info}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: true}
  maintenance: {uploadpurging: {enabled: false}}
http: {addr: %q}
`, filepath.Join(dir, "data"), listen)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	log := filepath.Join(dir, "registry.log")
	// The address is read from the log: an earlier run's must not be found.
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	r := &Registry{Dir: dir}
	if r.daemon, err = startDaemon("docker-registry", log, exec.Command("docker-registry", "serve", config), syscall.SIGKILL); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := r.daemon.ready(ctx, func() error { return r.probe(ctx) }); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

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
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", req.URL, resp.Status)
	}
	return nil
}

// Log returns the last lines of the registry's log.
func (r *Registry) Log() string { return r.daemon.tail() }

// Close stops the registry. Its data stay.
func (r *Registry) Close() error { return r.daemon.stop(10 * time.Second) }
