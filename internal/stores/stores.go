// Package stores turns the addresses that stand in a boot image and in
// BLOB_STORE into stores. The list of what bootfs can read from is [Open].
package stores

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Source is what is to be read: an index, and where its chunks lie in packs.
type Source struct {
	Index    *index.Index
	Locators *registrystore.Locators // nil: the chunks lie in loose stores only
	Registry registrystore.RemoteOptions
}

// Open returns the store at address:
//
//	/path                 a loose store in a directory
//	registry://host/repo  packs in a registry (http on the loopback)
//	registry+http://…     the same over plain HTTP
//	oci:/path             packs in an OCI layout
//	https://host/path     a loose store on a web server
//	http://host/path      the same over plain HTTP
//
// Credentials for a web server stand in its address, as user:password@, or are
// those that the keychain has for its host and port; the latter are not sent
// over plain HTTP, but for the loopback.
func Open(address string, s Source) (chunkstore.Store, error) {
	switch {
	case filepath.IsAbs(address):
		return local.Open(address)
	case strings.HasPrefix(address, "registry://"), strings.HasPrefix(address, "registry+http://"):
		blobs, err := registrystore.NewRemote(address, s.Registry)
		if err != nil {
			return nil, err
		}
		return s.packs(address, blobs)
	case IsWeb(address):
		return httpstore.New(address, httpstore.Options{Login: webLogin(s.Registry.Keychain, address)})
	case strings.HasPrefix(address, "oci:"):
		return s.packs(address, registrystore.NewLayoutBlobs(strings.TrimPrefix(address, "oci:")))
	}
	// What follows a scheme may hold a password.
	if scheme, _, ok := strings.Cut(address, "://"); ok {
		address = scheme + "://…"
	}
	return nil, fmt.Errorf("store %q: want /path, registry://host/repository, https://host/path or oci:/path", address)
}

func (s Source) packs(address string, b registrystore.Blobs) (chunkstore.Store, error) {
	if s.Locators == nil {
		return nil, fmt.Errorf("store %q: the image was converted to a loose store and knows no packs: name the loose store", address)
	}
	return registrystore.NewStore(b, s.Locators, s.Index), nil
}

// IsWeb reports whether address is that of a web server.
func IsWeb(address string) bool {
	return strings.HasPrefix(address, "https://") || strings.HasPrefix(address, "http://")
}

// webLogin looks up the server at address in k, nil being docker's and podman's
// credentials. It is nil where they must not be sent.
func webLogin(k authn.Keychain, address string) func(context.Context) (httpstore.Login, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" && !httpio.IsLoopback(u.Host) {
		return nil
	}
	if k == nil {
		k = authn.DefaultKeychain
	}
	return func(ctx context.Context) (httpstore.Login, error) {
		found, err := authn.Resolve(ctx, k, webHost(u.Host))
		if err != nil {
			return httpstore.Login{}, err
		}
		c, err := authn.Authorization(ctx, found)
		if err != nil {
			return httpstore.Login{}, err
		}
		return httpstore.Login{User: c.Username, Password: c.Password, Token: c.RegistryToken}, nil
	}
}

// webHost is the authn.Resource of a web server.
type webHost string

func (h webHost) String() string      { return string(h) }
func (h webHost) RegistryStr() string { return string(h) }

// Remote reports whether the store at address is reached over a network.
func Remote(address string) bool {
	return strings.Contains(address, "://")
}

// Split returns the addresses in a list separated by white space, as BLOB_STORE
// holds them.
func Split(list string) []string { return strings.Fields(list) }
