// Package assembly makes the boot image: what an engine pulls and starts in
// the place of the source image.
//
// [BootImage] puts the boot binary, the index, the locators and the metadata of
// a root image into two layers, with what engines and scanners look for in an
// image that does not run, and links to boot where executables are started
// from. Equal input gives equal bytes; the layer of the binary is the same in
// every image made with it. [ReadContents] reads a boot image back.
package assembly

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Annotations that say which image a boot image stands for.
const (
	annotationBaseName   = "org.opencontainers.image.base.name"
	annotationBaseDigest = "org.opencontainers.image.base.digest"
)

// Input is what a boot image is made of.
type Input struct {
	Source   transport.Image  // its configuration and annotations
	Tree     *tree.Tree       // the root filesystem; its files are read
	Boot     *BootLayer       // with the boot binary for the platform
	Config   bootimage.Config // content of bootimage.ConfigPath
	Index    []byte           // package index
	Locators []byte           // package registrystore; nil when the stores are loose
	Meta     []byte           // package erofs: the front region of the root image
}

// BootLayer is the layer of a boot binary: all that the images made with it
// share.
type BootLayer struct {
	layer *imageLayer
	head  []byte // the binary's first bytes: what it is an executable of
}

// NewBootLayer packs a boot binary.
func NewBootLayer(boot []byte) (*BootLayer, error) {
	if len(boot) == 0 {
		return nil, errors.New("the boot binary is empty")
	}
	l, err := newLayer(map[string]file{
		bootimage.Dir: {mode: modeDir | 0o755},
		// Started by a user that is not root, boot must mount all the same.
		bootimage.BootPath: bytesFile(0o4755, boot),
	}, bootLevel)
	if err != nil {
		return nil, fmt.Errorf("boot binary: %w", err)
	}
	return &BootLayer{l, boot[:min(headSize, len(boot))]}, nil
}

// OpenBootLayer returns the layer whose stored form is b and whose DiffID is
// diffID, as Bytes and DiffID gave them: unpacking it to find that out would take
// a tenth of a conversion that finds nothing new.
func OpenBootLayer(b []byte, diffID string) (*BootLayer, error) {
	id, err := v1.NewHash(diffID)
	if err != nil {
		return nil, fmt.Errorf("boot binary: its layer's DiffID: %w", err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("boot binary: %w", err)
	}
	var head []byte
	for t := tar.NewReader(z); head == nil; {
		h, err := t.Next()
		if err == nil && h.Typeflag == tar.TypeReg {
			head, err = io.ReadAll(io.LimitReader(t, headSize))
		}
		if err != nil {
			return nil, fmt.Errorf("boot binary: %w", err)
		}
	}
	return &BootLayer{storedLayer(b, id), head}, nil
}

// Bytes returns the stored form of l: a tar, compressed.
func (l *BootLayer) Bytes() []byte { return l.layer.compressed }

// DiffID returns the digest of the tar.
func (l *BootLayer) DiffID() string { return l.layer.diffID.String() }

// BootImage returns the boot image of one platform.
func BootImage(in Input) (v1.Image, error) {
	img, err := bootImage(in)
	if err != nil {
		return nil, fmt.Errorf("boot image: %w", err)
	}
	return img, nil
}

func bootImage(in Input) (v1.Image, error) {
	skeleton, err := newSkeleton(in.Tree, &in.Source.Config.Config)
	if err != nil {
		return nil, err
	}
	in.Config.Marked = skeleton.marked
	config, err := json.Marshal(in.Config)
	if err != nil {
		return nil, err
	}
	link, err := linkTo(in.Boot.head, bootimage.BootPath)
	if err != nil {
		return nil, err
	}
	files := skeleton.files
	limitLinks(files, link)
	maps.Copy(files, map[string]file{
		bootimage.LowerPath:    {mode: modeDir | 0o755},
		bootimage.RootPath:     {mode: modeDir | 0o755},
		bootimage.CachePath:    {mode: modeDir | 0o755},
		bootimage.WritablePath: {mode: modeDir | 0o700},
		bootimage.TmpPath:      {mode: modeDir | 0o700},
		bootimage.SecretsDir:   {mode: modeDir | 0o700},
		bootimage.LinkPath:     bytesFile(0o4755, link),
		bootimage.ConfigPath:   bytesFile(0o644, config),
		bootimage.IndexPath:    bytesFile(0o644, in.Index),
		bootimage.MetaPath:     bytesFile(0o644, in.Meta),
	})
	if in.Locators != nil {
		files[bootimage.LocatorsPath] = bytesFile(0o644, in.Locators)
	}
	second, err := newLayer(files, fastLevel)
	if err != nil {
		return nil, err
	}
	return newImage(in, in.Boot.layer, second)
}

// image is a v1.Image in memory.
type image struct {
	config, manifest []byte
	layers           []*imageLayer
}

func newImage(in Input, layers ...*imageLayer) (v1.Image, error) {
	config, err := bootConfig(in.Source.RawConfig, in.Source.Config, layers)
	if err != nil {
		return nil, err
	}
	i := &image{config: config, layers: layers}
	name, err := partial.ConfigName(i)
	if err != nil {
		return nil, err
	}
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: name},
		Annotations:   map[string]string{},
	}
	maps.Copy(m.Annotations, in.Source.Annotations)
	for k, v := range map[string]string{
		annotationBaseName:   in.Config.Source.Name,
		annotationBaseDigest: in.Config.Source.Digest,
	} {
		delete(m.Annotations, k) // would be the base of the source
		if v != "" {
			m.Annotations[k] = v
		}
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, l.descriptor())
	}
	if i.manifest, err = json.Marshal(m); err != nil {
		return nil, err
	}
	return partial.CompressedToImage(i)
}

func (i *image) RawConfigFile() ([]byte, error)      { return i.config, nil }
func (i *image) RawManifest() ([]byte, error)        { return i.manifest, nil }
func (i *image) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

func (i *image) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range i.layers {
		if l.digest == h {
			return l, nil
		}
	}
	return nil, fmt.Errorf("boot image has no layer %s", h)
}
