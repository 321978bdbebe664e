package transport

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// UserKeychain finds the credentials that the user's other tools have, in the
// first of their files that knows the registry: $REGISTRY_AUTH_FILE, Docker's
// config.json ($DOCKER_CONFIG or ~/.docker) and Podman's auth.json (below
// $XDG_RUNTIME_DIR, $XDG_CONFIG_HOME or ~/.config), with the helper programs
// that they name.
var UserKeychain authn.Keychain = userKeychain{}

type userKeychain struct{}

// credentialFiles lists where credentials may be.
func credentialFiles() []string {
	var out []string
	add := func(dir string, names ...string) {
		if dir != "" {
			out = append(out, filepath.Join(append([]string{dir}, names...)...))
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		home = "" // a service may have none
	}
	add(os.Getenv("REGISTRY_AUTH_FILE"))
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		add(dir, "config.json")
	} else {
		add(home, ".docker", "config.json")
	}
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	add(os.Getenv("XDG_CONFIG_HOME"), "containers", "auth.json")
	add(home, ".config", "containers", "auth.json")
	return out
}

func (userKeychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	keys := credentialKeys(target)
	for _, file := range credentialFiles() {
		a, err := credentialsIn(file, keys)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue // another user's home
		}
		if err != nil {
			return nil, fmt.Errorf("credentials in %s: %w", file, err)
		}
		if a != nil {
			return a, nil
		}
	}
	return authn.Anonymous, nil
}

// credentialKeys are the names under which credentials for target may stand,
// the most particular first: Podman has some for parts of a registry.
func credentialKeys(target authn.Resource) []string {
	host := target.RegistryStr()
	var out []string
	for key := target.String(); strings.HasPrefix(key, host+"/"); key = key[:strings.LastIndexByte(key, '/')] {
		out = append(out, key)
	}
	if host == name.DefaultRegistry {
		return append(out, authn.DefaultAuthKey, "docker.io")
	}
	return append(out, host)
}

// credentialsIn looks into one file; nil says that it has none.
func credentialsIn(file string, keys []string) (authn.Authenticator, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := config.LoadFromReader(f)
	if err != nil {
		return nil, err
	}
	for _, key := range keys {
		found, err := c.GetAuthConfig(key)
		if err != nil {
			return nil, err
		}
		found.ServerAddress = "" // is set in any case
		if found == (types.AuthConfig{}) {
			continue
		}
		return authn.FromConfig(authn.AuthConfig{
			Username: found.Username, Password: found.Password, Auth: found.Auth,
			IdentityToken: found.IdentityToken, RegistryToken: found.RegistryToken,
		}), nil
	}
	return nil, nil
}
