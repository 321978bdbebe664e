package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// secrets is where the user mounted registry credentials: directories or files
// in the form of Docker's config.json, held by descriptor. A file is read each
// time it is asked, so that a rotated one counts.
type secrets struct {
	dirs  []*os.Root
	files []*os.File
}

// openSecrets opens bootimage.SecretsDir and everything below
// bootimage.SecretsPrefix.
func openSecrets() (*secrets, error) {
	names, err := filepath.Glob(bootimage.SecretsPrefix + "*")
	if err != nil {
		return nil, err
	}
	var s secrets
	for _, name := range append([]string{bootimage.SecretsDir}, names...) {
		info, err := os.Stat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
		case info.IsDir():
			var dir *os.Root
			if dir, err = os.OpenRoot(name); err == nil {
				s.dirs = append(s.dirs, dir)
			}
		default:
			var file *os.File
			if file, err = os.Open(name); err == nil {
				s.files = append(s.files, file)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("credentials at %s: %w", name, err)
		}
	}
	return &s, nil
}

// Resolve implements authn.Keychain.
func (s *secrets) Resolve(target authn.Resource) (authn.Authenticator, error) {
	var contents []string
	for _, dir := range s.dirs {
		b, err := dir.ReadFile("config.json")
		if errors.Is(err, fs.ErrNotExist) {
			b, err = dir.ReadFile(".dockerconfigjson") // as Kubernetes mounts a pull secret
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("registry credentials: %w", err)
		}
		contents = append(contents, string(b))
	}
	for _, file := range s.files {
		info, err := file.Stat()
		if err != nil {
			return nil, fmt.Errorf("registry credentials: %w", err)
		}
		b := make([]byte, info.Size())
		n, _ := file.ReadAt(b, 0)
		contents = append(contents, string(b[:n]))
	}
	for _, text := range contents {
		c, err := config.LoadFromReader(strings.NewReader(text))
		if err != nil {
			return nil, fmt.Errorf("registry credentials: %w", err)
		}
		if a, ok := find(c, target.RegistryStr()); ok {
			return a, nil
		}
	}
	return authn.Anonymous, nil
}

// find looks a registry up in a Docker configuration. Credential helpers are
// programs that a boot image does not have: only what stands in the file counts.
func find(c *configfile.ConfigFile, registry string) (authn.Authenticator, bool) {
	if registry == "index.docker.io" {
		registry = authn.DefaultAuthKey
	}
	for _, key := range []string{registry, "https://" + registry, "https://" + registry + "/v2/"} {
		if a, ok := c.AuthConfigs[key]; ok {
			return authn.FromConfig(authn.AuthConfig{
				Username: a.Username, Password: a.Password, Auth: a.Auth,
				IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
			}), true
		}
	}
	return nil, false
}
