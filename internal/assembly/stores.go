package assembly

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// Edited is a boot image that differs from another one in a few parts.
type Edited struct {
	Manifest v1.Descriptor
	Parts    map[v1.Hash][]byte // the manifest and the blobs that the other one has not
}

// SetStores gives a boot image, whose manifest is raw, other addresses of
// stores. The rest of its files stays as it is.
func SetStores(ctx context.Context, img transport.Image, raw []byte, stores []string) (*Edited, error) {
	e, err := setStores(ctx, img, raw, stores)
	if err != nil {
		return nil, fmt.Errorf("boot image %s: %w", img.Digest, err)
	}
	return e, nil
}

func setStores(ctx context.Context, img transport.Image, raw []byte, stores []string) (*Edited, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	e := &Edited{Parts: map[v1.Hash][]byte{}}
	for i, l := range slices.Backward(img.Layers) {
		next, err := editLayer(ctx, l, stores)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Name, err)
		}
		if next == nil {
			continue
		}
		d := next.descriptor()
		if m.MediaType == types.DockerManifestSchema2 {
			d.MediaType = types.DockerLayer
		}
		e.Parts[d.Digest], m.Layers[i] = next.compressed, d
		config, err := setDiffID(img.RawConfig, i, next.diffID)
		if err != nil {
			return nil, err
		}
		if m.Config.Digest, m.Config.Size, err = v1.SHA256(bytes.NewReader(config)); err != nil {
			return nil, err
		}
		e.Parts[m.Config.Digest] = config
		if raw, err = json.Marshal(m); err != nil {
			return nil, err
		}
		e.Manifest = v1.Descriptor{MediaType: m.MediaType}
		if e.Manifest.Digest, e.Manifest.Size, err = v1.SHA256(bytes.NewReader(raw)); err != nil {
			return nil, err
		}
		e.Parts[e.Manifest.Digest] = raw
		return e, nil
	}
	return nil, fmt.Errorf("%w: %s is missing", ErrNotConverted, bootimage.ConfigPath)
}

// editLayer writes a layer anew if the boot image's configuration is in it;
// else it returns nil.
func editLayer(ctx context.Context, l layer.Blob, stores []string) (*imageLayer, error) {
	plain, err := layer.OpenPlain(ctx, l, plainLimit(l), nil)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	found := false
	next, err := packLayer(fastLevel, func(t *tar.Writer) error {
		for r := tar.NewReader(plain); ; {
			h, err := r.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			var content io.Reader = r
			if path.Clean("/"+h.Name) == bootimage.ConfigPath && h.Typeflag == tar.TypeReg {
				found = true
				b, err := editConfig(r, h.Size, stores)
				if err != nil {
					return fmt.Errorf("%s: %w", bootimage.ConfigPath, err)
				}
				h.Size, content = int64(len(b)), bytes.NewReader(b)
			}
			if err := t.WriteHeader(h); err != nil {
				return err
			}
			if _, err := io.Copy(t, content); err != nil {
				return fmt.Errorf("%s: %w", h.Name, err)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	// The digest covers what follows the archive, too.
	if _, err := io.Copy(io.Discard, plain); err != nil || !found {
		return nil, err
	}
	return next, nil
}

// editConfig refuses fields that it does not know: they would be lost.
func editConfig(r io.Reader, size int64, stores []string) ([]byte, error) {
	if most := limits[bootimage.ConfigPath]; size > most {
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", size, most)
	}
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	var c bootimage.Config
	if err := d.Decode(&c); err != nil {
		return nil, fmt.Errorf("%w; was the image made by a newer bootfs-convert?", err)
	}
	c.Stores = stores
	return json.Marshal(c)
}

// setDiffID changes one layer of an image's configuration.
func setDiffID(raw []byte, i int, to v1.Hash) ([]byte, error) {
	top, err := parseObject("configuration", raw)
	if err != nil {
		return nil, err
	}
	var root v1.RootFS
	if err := json.Unmarshal(top.get("rootfs"), &root); err != nil {
		return nil, fmt.Errorf("configuration: rootfs: %w", err)
	}
	if i >= len(root.DiffIDs) {
		return nil, fmt.Errorf("configuration: it lists %d layers", len(root.DiffIDs))
	}
	root.DiffIDs[i] = to
	if err := top.set("rootfs", root); err != nil {
		return nil, err
	}
	return json.Marshal(top)
}
