package assembly

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// ErrNotConverted is wrapped by ReadContents' error for an image that is no
// boot image.
var ErrNotConverted = errors.New("not an image that bootfs-convert made")

// Contents is what stands in a boot image.
type Contents struct {
	Config   bootimage.Config
	Index    []byte // package index
	Locators []byte // package registrystore; nil when the stores are loose
	Meta     []byte // package erofs: the front region of the root image; empty from ReadIndex
}

// Limits on the files of a boot image, in bytes. An index of 128 MiB names
// chunks of some 200 GiB, and 1 GiB of metadata is that of ten million inodes.
var limits = map[string]int64{
	bootimage.ConfigPath:   bootimage.MaxConfig,
	bootimage.IndexPath:    128 << 20,
	bootimage.LocatorsPath: 128 << 20,
	bootimage.MetaPath:     1 << 30,
}

// maxExpansion bounds how many times its compressed size a layer may have,
// beyond minPlain bytes. Metadata has 3 times, a layer of links 30 times.
const (
	maxExpansion = 64
	minPlain     = 8 << 20
)

// ReadContents reads a boot image back. What it returns is verified against
// the image's digest, and its parts against one another's versions; it is not
// parsed.
func ReadContents(ctx context.Context, img transport.Image) (*Contents, error) {
	return readContents(ctx, img, true)
}

// ReadIndex is ReadContents without the metadata, which is all of a large image
// that is large in memory.
func ReadIndex(ctx context.Context, img transport.Image) (*Contents, error) {
	return readContents(ctx, img, false)
}

func readContents(ctx context.Context, img transport.Image, meta bool) (*Contents, error) {
	if _, ok := img.Config.Config.Volumes[bootimage.WritablePath]; !ok {
		return nil, ErrNotConverted
	}
	found := map[string][]byte{}
	// An image that was built on the boot image has layers above its own, and
	// the layer of the binary lies below: it need not be read.
	for _, l := range slices.Backward(img.Layers) {
		if err := readLayer(ctx, l, meta, found); err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Name, err)
		}
		if found[bootimage.ConfigPath] != nil && found[bootimage.IndexPath] != nil && found[bootimage.MetaPath] != nil {
			return newContents(found)
		}
	}
	return nil, fmt.Errorf("%w: %s is missing", ErrNotConverted, bootimage.ConfigPath)
}

func newContents(found map[string][]byte) (*Contents, error) {
	c := &Contents{
		Index:    found[bootimage.IndexPath],
		Locators: found[bootimage.LocatorsPath],
		Meta:     found[bootimage.MetaPath],
	}
	var version struct{ Version int }
	if err := json.Unmarshal(found[bootimage.ConfigPath], &version); err != nil {
		return nil, fmt.Errorf("%s: %w", bootimage.ConfigPath, err)
	}
	if version.Version != bootimage.Version {
		return nil, fmt.Errorf("%s: format version %d, this program knows %d", bootimage.ConfigPath, version.Version, bootimage.Version)
	}
	if err := json.Unmarshal(found[bootimage.ConfigPath], &c.Config); err != nil {
		return nil, fmt.Errorf("%s: %w", bootimage.ConfigPath, err)
	}
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(c.Index)); got != c.Config.IndexDigest {
		return nil, fmt.Errorf("%s: its digest is %s, %s says %.80q", bootimage.IndexPath, got, bootimage.ConfigPath, c.Config.IndexDigest)
	}
	return c, nil
}

// plainLimit bounds the plain bytes of a layer.
func plainLimit(l layer.Blob) int64 { return minPlain + maxExpansion*max(0, l.Size) }

// readLayer adds the boot image's files that l holds to found, unless a layer
// above had them. Without meta, the metadata is found but not read.
func readLayer(ctx context.Context, l layer.Blob, meta bool, found map[string][]byte) error {
	plain, err := layer.OpenPlain(ctx, l, plainLimit(l), nil)
	if err != nil {
		return err
	}
	defer plain.Close()
	here := map[string][]byte{}
	for t := tar.NewReader(plain); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		most, ok := limits[name]
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		if h.Size > most {
			return fmt.Errorf("%s has %d bytes, at most %d are read", name, h.Size, most)
		}
		if name == bootimage.MetaPath && !meta {
			here[name] = []byte{}
			continue
		}
		// The buffer grows with what arrives, not with what is claimed.
		var b bytes.Buffer
		if _, err := b.ReadFrom(t); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		here[name] = b.Bytes()
	}
	// The digest covers what follows the archive, too.
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return err
	}
	for name, b := range here {
		if _, ok := found[name]; !ok {
			found[name] = b
		}
	}
	return nil
}
