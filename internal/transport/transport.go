// Package transport reads and writes images where people keep them.
//
// [Open] finds an image by the names that skopeo uses, in a registry, a Docker
// daemon, a docker-save archive or an OCI layout, and offers each of its Linux
// platforms with the layers as they are stored. [OpenDestination] takes a
// converted image to such a place: packs while the conversion runs, then the
// manifests, and last the one step that makes the image visible. Until that
// step the destination is what it was.
package transport

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/hosts"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Options are what sources and destinations need to know. The zero value
// works.
type Options struct {
	// Platforms restricts a source to the platforms named; nil takes every
	// Linux platform.
	Platforms []v1.Platform
	// TempDir is where a source that cannot be read in place is spooled; ""
	// means os.TempDir(). The files have no name there.
	TempDir string
	// Keychain finds credentials for registries; nil reads Docker's and
	// Podman's configuration.
	Keychain authn.Keychain
	// Hosts knows how registries are reached; nil knows what everybody knows.
	Hosts *hosts.Hosts
	// Insecure lists registries, as HOST[:PORT], that may be spoken to over
	// plain HTTP or with a certificate that cannot be verified. Loopback
	// addresses may always.
	Insecure []string
	// DockerHost is the daemon's address; "" means DOCKER_HOST or the default
	// socket.
	DockerHost string
	// KeepTag makes Commit leave a second name that no later conversion moves:
	// KeepTag of the index.
	KeepTag bool
	// Progress is told of bytes as they are spooled from a source or written
	// to a destination, and takes back those that must be sent again; it may
	// be called concurrently. May be nil.
	Progress func(n int64)
}

func (o *Options) progress(n int64) {
	if o.Progress != nil {
		o.Progress(n)
	}
}

// Source is an opened image.
type Source interface {
	// Images are the Linux platforms that were asked for, in the order of the
	// source's index; at least one.
	Images() []Image
	// Skipped lists what else the source holds under that name.
	Skipped() []Skipped
	// StoreAddress is the address of the chunk store that lies beside an image
	// of this source, "registry://HOST/REPOSITORY"; "" when there is none.
	StoreAddress() string
	// Blobs reads the packs that lie beside the image; nil when the transport
	// cannot hold them.
	Blobs() (registrystore.Blobs, error)
	// Close frees what the source holds. Layers cannot be read afterwards.
	Close() error
}

// Stored is a source that keeps manifests and what they name under digests: a
// registry or an OCI layout. What Docker saved does not.
type Stored interface {
	Source
	// Root describes what the source's name stands for, an index or one image.
	Root() v1.Descriptor
	// Manifest reads a manifest whose bytes are those of its digest.
	Manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// Blob reads a blob, and ends with io.EOF only if its bytes were those of
	// its digest.
	Blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
	// attached lists what signs or describes a manifest.
	attached(ctx context.Context, subject v1.Hash) ([]attachment, error)
}

// Image is one platform of a source.
type Image struct {
	Platform v1.Platform
	// Digest is that of the manifest, or of the configuration (Docker's image
	// ID) where the transport knows no manifests.
	Digest      string
	Config      *v1.ConfigFile
	RawConfig   []byte            // as stored, verified
	Annotations map[string]string // of the manifest
	Layers      []layer.Blob      // bottom first; as many as Config.RootFS.DiffIDs
}

// Skipped is a manifest of the source that is not among its Images.
type Skipped struct {
	Digest   string
	Platform string // "" if none is stated
	Reason   string // "attestation", "not a Linux platform", …
	// Of is the digest of the image that it describes, "" if of none.
	Of         string
	Descriptor v1.Descriptor // as the index has it
}

// Open finds the image that r names.
func Open(ctx context.Context, r Ref, o Options) (Source, error) {
	var (
		s   Source
		err error
	)
	switch r.Transport {
	case Registry:
		s, err = openRegistry(ctx, r, o)
	case Daemon:
		s, err = openDaemon(ctx, r, o)
	case DockerArchive:
		s, err = openDockerArchive(ctx, r, o)
	case OCI:
		s, err = openLayout(ctx, r, o)
	case OCIArchive:
		s, err = openOCIArchive(ctx, r, o)
	default:
		err = fmt.Errorf("unknown transport; an image is %s", Forms)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	return s, nil
}

// Destination takes a converted image. Its methods may be called concurrently,
// but for Commit and Close.
type Destination interface {
	// HoldsPacks reports whether packs and several platforms can lie beside
	// one another here.
	HoldsPacks() bool
	// PutPack stores p unless it is there; reused says that it was.
	PutPack(ctx context.Context, p registrystore.Pack) (reused bool, err error)
	// StoreAddress is the address under which boot will find the packs,
	// "registry://HOST/REPOSITORY"; "" where they lie in a layout that has no
	// address of its own.
	StoreAddress() string
	// Commit stores the manifests and makes the image visible under its name
	// in one step. It returns the digest of what the name now stands for: the
	// index, or for Docker the image ID.
	Commit(ctx context.Context, images []PlatformImage) (digest string, err error)
	// Close ends the use of the destination. Without a successful Commit it
	// takes back what was written, as far as the transport can.
	Close() error
}

// PlatformImage is the converted image of one platform. Where boot images and
// packs go to different places, each place gets one of the two.
type PlatformImage struct {
	Platform v1.Platform
	Boot     v1.Image // nil in a place for packs only
	Data     v1.Image // lists the packs of Boot; nil when its chunks are elsewhere
	// Attestations are manifests that describe the source image and are at the
	// destination; the index lists them for the boot image.
	Attestations []v1.Descriptor
}

// OpenDestination prepares the place that r names, and fails at once where it
// can be seen that a later write would.
func OpenDestination(ctx context.Context, r Ref, o Options) (Destination, error) {
	var (
		d   Destination
		err error
	)
	switch r.Transport {
	case Registry:
		d, err = openRegistryDestination(ctx, r, o)
	case Daemon:
		d, err = openDaemonDestination(ctx, r, o)
	case DockerArchive:
		d, err = openDockerArchiveDestination(r, o)
	case OCI:
		d, err = openLayoutDestination(r, o)
	case OCIArchive:
		d, err = openOCIArchiveDestination(r, o)
	default:
		err = fmt.Errorf("unknown transport; an image is %s", Forms)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	return d, nil
}

// errNoPacks is what destinations say that Docker loads from.
var errNoPacks = errors.New("packs cannot lie beside this image; give the chunks a store of their own")

// onlyImage returns the single image of a destination that holds one.
func onlyImage(images []PlatformImage) (v1.Image, error) {
	if len(images) != 1 {
		return nil, fmt.Errorf("got images of %d platforms, this transport holds one", len(images))
	}
	if images[0].Boot == nil || images[0].Data != nil {
		return nil, errNoPacks
	}
	return images[0].Boot, nil
}
