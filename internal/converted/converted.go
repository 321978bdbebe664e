// Package converted opens images that bootfs has converted, for those who look
// into them without running them.
//
// [Open] finds the image wherever transport can. Each [Image] then answers
// from its boot image alone, which is small: what is in it, and the metadata of
// its root. The bytes of files come from the stores, chunk by chunk and
// verified, through [Image.Fetcher] or all at once by [Image.WriteTo].
package converted

import (
	"bytes"
	"context"

	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Options of Open. The zero value reads the chunks from where the image is or
// says that they are.
type Options struct {
	Transport transport.Options
	Stores    []string // addresses that are tried first; directories are absolute
	Only      bool     // no others than Stores are tried, if there are any
	Access    stores.Access
	Log       *slog.Logger
}

// Opened is an open image, all platforms of it.
type Opened struct {
	Images []*Image
	source transport.Source
}

// Source is where the images are.
func (o *Opened) Source() transport.Source { return o.source }

// Close ends the use of the images.
func (o *Opened) Close() error { return o.source.Close() }

// Image is the converted image of one platform.
type Image struct {
	Platform  v1.Platform
	Digest    string // of the boot image's manifest, or its image ID
	BootBytes int64  // of its layers as stored; 0 if unknown
	Config    bootimage.Config
	History   []v1.History // of the image's configuration: the source's, then the converter's
	Index     *index.Index
	RawIndex  []byte                  // the file of Index
	Locators  *registrystore.Locators // nil: the chunks lie in loose stores
	Meta      []byte                  // front region of the root image

	options Options
	beside  registrystore.Blobs     // packs beside the image; nil if its place holds none
	located *registrystore.Locators // of those packs: Locators, or what lies beside an image that has none; may be nil
	source  transport.Source
}

// Open opens the image that r names.
func Open(ctx context.Context, r transport.Ref, o Options) (*Opened, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	src, err := transport.Open(ctx, r, o.Transport)
	if err != nil {
		return nil, err
	}
	out := &Opened{source: src}
	for _, from := range src.Images() {
		img, err := open(ctx, from)
		if err != nil {
			src.Close()
			return nil, fmt.Errorf("%s: %s: %w", r, from.Platform, err)
		}
		img.options, img.source = o, src
		if img.beside, err = src.Blobs(); err != nil {
			src.Close()
			return nil, fmt.Errorf("%s: %w", r, err)
		}
		if img.located = img.Locators; img.located == nil {
			if img.located, err = locatorsBeside(ctx, src, img); err != nil {
				src.Close()
				return nil, fmt.Errorf("%s: %s: %w", r, from.Platform, err)
			}
		}
		out.Images = append(out.Images, img)
	}
	return out, nil
}

func open(ctx context.Context, from transport.Image) (*Image, error) {
	c, err := assembly.ReadContents(ctx, from)
	if err != nil {
		return nil, err
	}
	img := &Image{Platform: from.Platform, Digest: from.Digest, Config: c.Config, History: from.Config.History, RawIndex: c.Index, Meta: c.Meta}
	for _, l := range from.Layers {
		img.BootBytes += max(0, l.Size)
	}
	if img.Index, err = index.Open(c.Index); err == nil {
		err = img.Index.Verify()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", bootimage.IndexPath, err)
	}
	if c.Locators != nil {
		if img.Locators, err = registrystore.OpenLocators(c.Locators, img.Index); err != nil {
			return nil, fmt.Errorf("%s: %w", bootimage.LocatorsPath, err)
		}
	}
	return img, nil
}

// Located says where the chunks lie in packs: Locators, or what lies beside a
// boot image that has none; nil if they are in loose stores only.
func (i *Image) Located() *registrystore.Locators { return i.located }

// Stores are the stores of the image's chunks, in the order in which they are
// asked: those of Options, the packs beside the image, those that the image
// names. One that cannot be opened is passed over; why is in the log.
func (i *Image) Stores() ([]chunkstore.Store, error) {
	from := stores.Source{Index: i.Index, Locators: i.located, Access: i.options.Access}
	// An image names servers and their keys, and may have been made to collect
	// passwords: they go to servers that the user knows.
	if from.SSH.Password == "" {
		from.SSH.HostKeys = i.Config.HostKeys
	}
	var (
		out  []chunkstore.Store
		seen []string
		errs []error
	)
	add := func(address string) {
		if slices.Contains(seen, address) {
			return
		}
		seen = append(seen, address)
		list, err := stores.OpenAll(address, from)
		if err != nil {
			errs = append(errs, err)
			return
		}
		out = append(out, list...)
	}
	for _, a := range i.options.Stores {
		add(a)
	}
	others := !i.options.Only || len(i.options.Stores) == 0
	switch address := i.source.StoreAddress(); {
	case !others || i.located == nil:
	case address != "":
		add(address)
	case i.beside != nil:
		out = append(out, registrystore.NewStore(i.beside, i.located, i.Index))
	}
	if others {
		for _, a := range i.Config.Stores {
			add(a)
		}
	}
	if len(out) == 0 {
		var reasons strings.Builder
		for _, err := range errs {
			fmt.Fprintf(&reasons, "; %v", err)
		}
		return nil, fmt.Errorf("no store of the image's chunks can be read, name one with --store: %w%s", chunkstore.ErrNotFound, &reasons)
	}
	for _, err := range errs {
		i.options.Log.Warn("store left out", "reason", err)
	}
	return out, nil
}

// Fetcher returns a fetcher of the image's chunks.
func (i *Image) Fetcher(cache chunkstore.Writer) (*chunkstore.Fetcher, error) {
	s, err := i.Stores()
	if err != nil {
		return nil, err
	}
	return chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: i.Index.Digest(), Cache: cache, Stores: s, Log: i.options.Log}), nil
}

// WriteTo writes the root image to w, a new file of Index.Size bytes that
// reads as zeros: chunks of zeros are not written. Every chunk is verified.
func (i *Image) WriteTo(ctx context.Context, w io.WriterAt, progress func(int64)) error {
	f, err := i.Fetcher(nil)
	if err != nil {
		return err
	}
	defer f.Close()
	return WriteBlob(ctx, i.Index, f, Target{WriterAt: w, Blank: true}, progress)
}

// Spool returns an unnamed temporary file in dir that holds the root image. It
// looks first whether there is room.
func (i *Image) Spool(ctx context.Context, dir string, progress func(int64)) (*os.File, error) {
	if err := scratch.Check(dir, i.Index.Size()); err != nil {
		return nil, err
	}
	f, err := scratch.File(dir)
	if err != nil {
		return nil, err
	}
	if err = f.Truncate(i.Index.Size()); err == nil {
		err = i.WriteTo(ctx, f, progress)
	}
	if err != nil {
		f.Close()
		return nil, scratch.Explain(dir, err)
	}
	return f, nil
}

// CheckMeta compares the metadata in the boot image with those at the front of
// the root image, which the index names.
func (i *Image) CheckMeta(image io.ReaderAt) error {
	front := make([]byte, len(i.Meta))
	if _, err := image.ReadAt(front, 0); err != nil {
		return err
	}
	if !bytes.Equal(front, i.Meta) {
		return fmt.Errorf("%s is not what the root image begins with", bootimage.MetaPath)
	}
	return nil
}
