package boot

import (
	"context"
	"fmt"
	"sync"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/registrystore"
)

// noNetwork is the last of the stores of a container that must not use the
// network. It has the chunks that are made and not fetched, those of zeros, and
// of each other one it says at once what is to be done.
type noNetwork struct {
	source   string // what the image was made from, "" if that is not known
	index    *index.Index
	locators *registrystore.Locators // nil where the chunks lie in loose stores

	mu   sync.Mutex // guards what follows
	last error      // of the last chunk that was asked for; names it
}

func (n *noNetwork) String() string { return "BOOTFS_OFFLINE=1" }

// Get implements chunkstore.Store.
func (n *noNetwork) Get(_ context.Context, id index.ID, dst []byte) ([]byte, error) {
	if size, ok := n.zeros(id); ok {
		return chunkstore.AppendZeros(dst, size), nil
	}
	from := ""
	if n.source != "" {
		from = " (it was made from " + n.source + ")"
	}
	err := fmt.Errorf("%w in the cache, and no network is used: fill the cache with bootfs-convert preload IMAGE --cache DIR%s, and add -v DIR:%s",
		chunkstore.ErrNotFound, from, bootimage.CachePath)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last = fmt.Errorf("chunk %s: %s: %w", id, n, err)
	return dst, err
}

// lastError is why the last chunk was not to be had.
func (n *noNetwork) lastError() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last
}

// Has implements chunkstore.Store.
func (n *noNetwork) Has(_ context.Context, id index.ID) (bool, error) {
	_, ok := n.zeros(id)
	return ok, nil
}

// zeros returns the size of a chunk that lies in no pack, as it is all zeros.
func (n *noNetwork) zeros(id index.ID) (size int, ok bool) {
	if n.locators == nil {
		return 0, false
	}
	pos, err := n.locators.Lookup(id)
	if err != nil {
		return 0, false
	}
	at, err := n.locators.At(pos)
	if err != nil || at.Length != 0 {
		return 0, false
	}
	c, err := n.index.At(pos)
	return c.Size, err == nil
}
