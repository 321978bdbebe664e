// Package stores turns the addresses that stand in a boot image and in
// BLOB_STORE into stores. The list of what bootfs can read from is [Open].
package stores

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/index"
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
	case strings.HasPrefix(address, "oci:"):
		return s.packs(address, registrystore.NewLayoutBlobs(strings.TrimPrefix(address, "oci:")))
	}
	// What follows a scheme may hold a password.
	if scheme, _, ok := strings.Cut(address, "://"); ok {
		address = scheme + "://…"
	}
	return nil, fmt.Errorf("store %q: want /path, registry://host/repository or oci:/path", address)
}

func (s Source) packs(address string, b registrystore.Blobs) (chunkstore.Store, error) {
	if s.Locators == nil {
		return nil, fmt.Errorf("store %q: the image was converted to a loose store and knows no packs: name the loose store", address)
	}
	return registrystore.NewStore(b, s.Locators, s.Index), nil
}

// Remote reports whether the store at address is reached over a network.
func Remote(address string) bool {
	return strings.Contains(address, "://")
}

// Split returns the addresses in a list separated by white space, as BLOB_STORE
// holds them.
func Split(list string) []string { return strings.Fields(list) }
