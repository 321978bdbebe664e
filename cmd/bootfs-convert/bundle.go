package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

type bundleFlags struct {
	readFlags
	name string
}

func newBundle(c *common) *cobra.Command {
	f := &bundleFlags{readFlags: readFlags{common: c}}
	cmd := &cobra.Command{
		Use:   "bundle REF FILE",
		Short: "Write a converted image with all its chunks to one file, for machines without a network",
		Long: `Write a converted image, all platforms or those of --platform, with all its
chunks to one tar archive. docker load and podman load take the boot image from it,
preload the chunks; it is an OCI layout, too, for skopeo and containerd.

Engines call the image as REF does, or --name. Docker without containerd's image
store knows one platform of an image: it gets that of this machine under the name,
and the others with their platform behind it (NAME:TAG-arm64).

The packs of the image go into the archive as they are. The chunks of one that was
converted to a loose store are lined up in packs, which its boot image does not
know: they serve preload. What signs the image does not come along; check it
before, or carry it with copy REF oci-archive:FILE, which engines do not load.

FILE is replaced in one step once the archive is whole. The same image under the
same name gives the same bytes again.`,
		Example: `  bootfs-convert bundle registry.example.com/app:1.0-lazy app.bundle
  bootfs-convert bundle --platform linux/arm64 --name app:1.0 oci:app:lazy app.bundle

  # on the other machine
  docker load -i app.bundle
  bootfs-convert preload oci-archive:app.bundle --cache /var/cache/bootfs
  docker run --network none -e BOOTFS_OFFLINE=1 -v /var/cache/bootfs:/.bootfs/rootfs.castr registry.example.com/app:1.0-lazy`,
		Args: exactArgs("REF", "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runBundle(cmd.Context(), f, args[0], args[1])
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.name, "name", "", "`NAME[:TAG]` that engines give the image (default: that of REF)")
	return cmd
}

// bundled is the result of bundle.
type bundled struct {
	File      string            `json:"file"`
	Bytes     int64             `json:"bytes"`
	Digest    string            `json:"digest"` // of the OCI index
	Platforms []bundledPlatform `json:"platforms"`
}

type bundledPlatform struct {
	Platform string `json:"platform"`
	Name     string `json:"name"`   // that docker load gives it, "" for none
	Digest   string `json:"digest"` // of the boot image's manifest
}

func runBundle(ctx context.Context, f *bundleFlags, image, file string) error {
	ref, err := f.ref(image)
	if err != nil {
		return err
	}
	name, err := f.engineName(ref)
	if err != nil {
		return err
	}
	d := f.display()
	defer d.close()
	from, err := f.open(ctx, image, d)
	if err != nil {
		return err
	}
	defer from.Close()
	t, err := f.transportOptions()
	if err != nil {
		return err
	}
	var written atomic.Int64
	t.Progress = func(n int64) { d.event(convert.Event{Phase: phaseWrite, Done: written.Add(n)}) }
	d.event(convert.Event{Phase: phaseWrite})
	to, err := transport.OpenBundle(file, name, t)
	if err != nil {
		return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("%s: %w", file, bare(err))}
	}
	defer to.Close()
	r, err := f.bundle(ctx, d, from, to)
	if err != nil {
		return bundleError(file, err)
	}
	d.event(convert.Event{Phase: phaseWrite, Done: written.Load(), End: true})
	d.close()
	info, err := os.Stat(file)
	if err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	r.File, r.Bytes = file, info.Size()
	if f.json {
		return f.writeJSON(r)
	}
	_, err = io.WriteString(f.stdout, r.text())
	return err
}

// engineName is what engines call the image.
func (f *bundleFlags) engineName(r transport.Ref) (string, error) {
	if f.name != "" {
		if err := transport.CheckTag(f.name); err != nil {
			return "", usagef("--name %s: want NAME[:TAG] as docker tag takes it: %w", f.name, err)
		}
		return f.name, nil
	}
	// A tag in a layout is no name, and neither are a digest and an ID.
	layout := r.Transport == transport.OCI || r.Transport == transport.OCIArchive
	if r.Name == "" || layout && !strings.ContainsAny(r.Name, ":/") || transport.CheckTag(r.Name) != nil {
		return "", usagef("%s: how engines are to call the image is not known: say it with --name NAME:TAG", r)
	}
	return r.Name, nil
}

// bundleError says whose fault err is.
func bundleError(file string, err error) error {
	var known *convert.Error
	switch {
	case errors.As(err, &known):
		return err
	case errors.As(err, new(*transport.SourceError)):
		return &convert.Error{Part: convert.Source, Err: err}
	}
	return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("%s: %w", file, err)}
}

// bundle writes the images of from.
func (f *bundleFlags) bundle(ctx context.Context, d display, from *converted.Opened, to *transport.Bundle) (*bundled, error) {
	r := &bundled{}
	src := from.Source()
	var (
		boots     []v1.Image
		platforms []v1.Platform
		digests   []v1.Hash
	)
	for _, img := range src.Images() {
		boot, err := transport.Writable(ctx, src, img)
		if err != nil {
			return nil, err
		}
		h, err := boot.Digest()
		if err != nil {
			return nil, err
		}
		boots, platforms, digests = append(boots, boot), append(platforms, img.Platform), append(digests, h)
	}
	for i, name := range to.Names(platforms, digests) {
		r.Platforms = append(r.Platforms, bundledPlatform{platforms[i].String(), name, digests[i].String()})
	}
	whole, err := f.isWhole(ctx, from)
	if err != nil {
		return nil, err
	}
	if whole {
		r.Digest, err = to.CommitStored(ctx, src.(transport.Stored))
		return r, err
	}
	var images []transport.PlatformImage
	for i, img := range from.Images {
		data, err := f.putChunks(ctx, d, img, src, to)
		if err != nil {
			return nil, err
		}
		images = append(images, transport.PlatformImage{Platform: img.Platform, Boot: boots[i], Data: data})
	}
	r.Digest, err = to.Commit(ctx, images)
	return r, err
}

// isWhole reports whether all that the image stands for is wanted, with packs
// that its own index lists: then the bundle holds that very index.
func (f *bundleFlags) isWhole(ctx context.Context, from *converted.Opened) (bool, error) {
	stored, ok := from.Source().(transport.Stored)
	if !ok || len(f.platforms) > 0 {
		return false, nil
	}
	listed, err := transport.Blobs(ctx, stored)
	if err != nil {
		return false, err
	}
	for _, img := range from.Images {
		l := img.Located()
		if l == nil {
			return false, nil
		}
		for n := range l.Packs() {
			if p, err := l.Pack(n); err != nil || !listed[p.Digest] {
				return false, err
			}
		}
	}
	return true, nil
}

// putChunks writes the packs of img, and returns the manifest that lists them.
func (f *bundleFlags) putChunks(ctx context.Context, d display, img *converted.Image, src transport.Source, to *transport.Bundle) (v1.Image, error) {
	put := func(ctx context.Context, p registrystore.Pack) error {
		_, err := to.PutPack(ctx, p)
		return err
	}
	if img.Locators == nil {
		progress, end := meter(d, img, phaseFetch, img.Index.Size())
		packs, locators, err := img.PackChunks(ctx, f.tempDir, put, progress)
		if err != nil {
			return nil, err
		}
		end()
		return registrystore.LocatedManifest(packs, locators)
	}
	packs, err := f.packsFrom(ctx, img, src)
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	for _, p := range packs {
		if err := put(ctx, p); err != nil {
			return nil, err
		}
	}
	return registrystore.DataManifest(packs)
}

// packsFrom returns the packs of img, which lie somewhere.
func (f *readFlags) packsFrom(ctx context.Context, img *converted.Image, src transport.Source) ([]registrystore.Pack, error) {
	var packs []registrystore.Pack
	for n := range img.Locators.Packs() {
		p, err := img.Locators.Pack(n)
		if err != nil {
			return nil, err
		}
		packs = append(packs, registrystore.Pack{PackDescriptor: p})
	}
	if len(packs) == 0 {
		return nil, nil
	}
	blobs, address, err := f.packsOf(ctx, img, src, packs[0])
	if err != nil {
		return nil, err
	}
	for i := range packs {
		p := &packs[i]
		p.From = address
		p.Open = func() (io.ReadCloser, error) { return transport.OpenBlob(ctx, blobs, p.Digest, p.Size) }
	}
	return packs, nil
}

// packsOf finds where the packs of img lie: the first place that has one.
func (f *readFlags) packsOf(ctx context.Context, img *converted.Image, src transport.Source, one registrystore.Pack) (registrystore.Blobs, string, error) {
	list := f.stores
	if len(list) == 0 {
		list = stores.Split(f.getenv(envBlobStore))
	}
	var reasons []error
	try := func(b registrystore.Blobs, err error) bool {
		if err == nil && b != nil {
			_, err = registrystore.ReadRange(ctx, b, one.Digest, 0, 1, nil)
		}
		reasons = append(reasons, err)
		return err == nil && b != nil
	}
	for _, address := range append(list, img.Config.Stores...) {
		if !strings.HasPrefix(address, "registry") {
			continue
		}
		b, err := stores.Packs(address, f.access())
		if try(b, err) {
			return b, address, nil
		}
	}
	if b, err := src.Blobs(); try(b, err) {
		return b, src.StoreAddress(), nil
	}
	return nil, "", fmt.Errorf("the packs of %s are not to be found, name their store with --store: %w", img.Platform, errors.Join(reasons...))
}

// text is the result for people.
func (r *bundled) text() string {
	var b strings.Builder
	for _, p := range r.Platforms {
		fmt.Fprintf(&b, "%s: docker load calls it %s\n", p.Platform, p.Name)
	}
	fmt.Fprintf(&b, "%s is %s: %s; use it: docker load -i %[1]s, bootfs-convert preload oci-archive:%[1]s --cache DIR\n", r.File, r.Digest, scratch.Bytes(r.Bytes))
	return b.String()
}
