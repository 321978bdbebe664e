package boot

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Without a network there are the chunks that are made of nothing, and an
// answer at once for the others.
func TestNoNetwork(t *testing.T) {
	zeros, other := make([]byte, 5000), []byte(strings.Repeat("data", 2000))
	zerosID, otherID := index.SHA256.Sum(zeros), index.SHA256.Sum(other)
	var file bytes.Buffer
	w := index.NewWriter(&file, chunker.V1, index.SHA256)
	err := errors.Join(w.Append(zerosID, len(zeros)), w.Append(otherID, len(other)), w.Close())
	if err != nil {
		t.Fatal(err)
	}
	x, err := index.Open(file.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	packs := []registrystore.PackDescriptor{{Digest: "sha256:" + strings.Repeat("0f", 32), Size: 100}}
	b, err := registrystore.EncodeLocators(x, packs, []registrystore.Location{{}, {Length: 100}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := registrystore.OpenLocators(b, x)
	if err != nil {
		t.Fatal(err)
	}
	packed := &noNetwork{source: "registry.example.com/app:1", index: x, locators: l}
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: []chunkstore.Store{packed}})
	if got, err := f.Fetch(t.Context(), index.Chunk{ID: zerosID, Size: len(zeros)}, nil); err != nil || !bytes.Equal(got, zeros) {
		t.Errorf("zeros: got %d bytes, error %v", len(got), err)
	}
	if err := packed.lastError(); err != nil {
		t.Errorf("nothing was missing, got %v", err)
	}
	_, err = f.Fetch(t.Context(), index.Chunk{ID: otherID, Size: len(other)}, nil)
	if !errors.Is(err, chunkstore.ErrNotFound) || err.Error() != packed.lastError().Error() ||
		!strings.HasPrefix(err.Error(), "chunk "+otherID.String()+": BOOTFS_OFFLINE=1: ") || !strings.Contains(err.Error(), "(it was made from registry.example.com/app:1)") {
		t.Errorf("another chunk: got %v, and later %v", err, packed.lastError())
	}
	loose := &noNetwork{index: x}
	for id, want := range map[index.ID]bool{zerosID: false, otherID: false} {
		if got, err := loose.Has(t.Context(), id); got != want || err != nil {
			t.Errorf("loose: Has: got %v, %v, want %v", got, err, want)
		}
	}
}
