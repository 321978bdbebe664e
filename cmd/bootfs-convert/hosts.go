package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/container-bootfs/bootfs/internal/hosts"
)

// systemCerts is where engines keep what they know of registries, in the form
// of hosts.toml or of certificates.
var systemCerts = []string{"/etc/containerd/certs.d", "/etc/containers/certs.d", "/etc/docker/certs.d"}

// openHosts makes of the flags and of what the engines have how registries and
// web servers are reached.
func (c *common) openHosts() error {
	o := hosts.Options{
		Mirrors:  c.getenv(envMirrors),
		Insecure: c.insecure,
		Advice: func(host string) string {
			return fmt.Sprintf("put the certificate of its authority into /etc/docker/certs.d/%s/ca.crt or --certs-d DIR", host)
		},
	}
	if c.certsDir != "" {
		if err := isDir(c.certsDir); err != nil {
			return usagef("--certs-d %s: %w", c.certsDir, err)
		}
		dir, err := filepath.Abs(c.certsDir)
		if err != nil {
			return err
		}
		o.Dirs = append(o.Dirs, hosts.Dir{Name: dir, FS: os.DirFS(dir), Common: true, Local: true})
	}
	for _, dir := range systemCerts {
		if isDir(dir) == nil {
			o.Dirs = append(o.Dirs, hosts.Dir{Name: dir, FS: os.DirFS(dir), Local: true})
		}
	}
	var err error
	if c.hosts, err = hosts.New(o); err != nil {
		return usagef("%w", err)
	}
	return nil
}
