package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// copyFlags are those of copy.
type copyFlags struct {
	readFlags
	rewrite string // address to record, ownStore for the destination's; "" keeps the image as it is
}

// ownStore is the value of --rewrite-store without an address.
const ownStore = "DST"

func newCopy(c *common) *cobra.Command {
	f := &copyFlags{readFlags: readFlags{common: c}}
	cmd := &cobra.Command{
		Use:   "copy SRC DST",
		Short: "Copy a converted image with its packs, digests and signatures",
		Long: `Copy a converted image between registries, repositories and OCI layouts, byte
for byte: all platforms, the packs, and what signs or describes the image or a
manifest in it (cosign's tags and OCI referrers). What DST has is not sent;
within one registry blobs are not sent at all. DST is what it was until all of
it is there.

The image still names the store that it was converted to. Containers that cannot
reach that one find the packs with BLOB_STORE; or --rewrite-store records the
new address in the image, which then has another digest and is to be signed
again.`,
		Example: `  bootfs-convert copy registry.example.com/app:1 oci:app
  bootfs-convert copy oci:app mirror.example.com/app:1
  bootfs-convert copy --rewrite-store registry.example.com/app:1 mirror.example.com/app:1`,
		Args: exactArgs("SRC", "DST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCopy(cmd.Context(), f, args[0], args[1])
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.rewrite, "rewrite-store", "", "record `ADDRESS` in the image as the place of its chunks (without one: DST)")
	cmd.Flags().Lookup("rewrite-store").NoOptDefVal = ownStore
	return cmd
}

// copied is the result of copy.
type copied struct {
	Source      string   `json:"source"`
	Destination string   `json:"destination"`
	Digest      string   `json:"digest"`
	SentBytes   int64    `json:"sentBytes"`
	ReusedBytes int64    `json:"reusedBytes"` // there before, or mounted
	Signatures  []string `json:"signatures"`  // digests of the manifests that refer to the image
	Store       string   `json:"store"`       // where the packs are now; "" in a layout, and for loose stores
	Rewritten   bool     `json:"rewritten"`
	Hints       []string `json:"hints"` // what is to be done or set
}

func runCopy(ctx context.Context, f *copyFlags, source, destination string) error {
	src, err := f.ref(source)
	if err != nil {
		return err
	}
	dst, err := f.ref(destination)
	if err != nil {
		return err
	}
	for _, r := range []transport.Ref{src, dst} {
		if !r.HoldsPacks() {
			return usagef("%s cannot hold an image with its packs: copy works between registries, oci: and oci-archive:", r)
		}
	}
	if len(f.platforms) > 0 {
		return usagef("--platform: copy takes the image as it is, with all its platforms")
	}
	d := f.display()
	defer d.close()
	from, err := f.open(ctx, source, d)
	if errors.Is(err, assembly.ErrNotConverted) {
		return &convert.Error{Part: convert.Source, Err: fmt.Errorf("%w; copy it with skopeo copy --all", err)}
	}
	if err != nil {
		return err
	}
	defer from.Close()
	stored, ok := from.Source().(transport.Stored)
	if !ok {
		return usagef("%s keeps no manifests", src)
	}
	t, err := f.transportOptions()
	if err != nil {
		return err
	}
	var sent atomic.Int64
	t.Progress = func(n int64) { d.event(convert.Event{Phase: convert.PhaseUpload, Done: sent.Add(n)}) }
	d.event(convert.Event{Phase: convert.PhaseUpload})
	to, err := transport.OpenDestination(ctx, dst, t)
	if err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	defer to.Close()

	r := &copied{Source: src.String(), Destination: dst.String(), Signatures: []string{}, Hints: []string{}}
	edition, err := f.edition(ctx, from, stored, to, r)
	if err != nil {
		return err
	}
	c, err := transport.Copy(ctx, stored, to, *edition)
	if errors.As(err, new(*transport.SourceError)) {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	if err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	d.event(convert.Event{Phase: convert.PhaseUpload, Done: sent.Load(), End: true})
	d.close()
	r.Digest, r.SentBytes, r.ReusedBytes = c.Digest, c.Sent, c.Reused
	r.Signatures = append(r.Signatures, c.Signed...)
	if f.json {
		return f.writeJSON(r)
	}
	_, err = io.WriteString(f.stdout, r.text())
	return err
}

// text is the result for people.
func (r *copied) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s is %s: %s sent, %s were there", r.Destination, r.Digest, scratch.Bytes(r.SentBytes), scratch.Bytes(r.ReusedBytes))
	if n := len(r.Signatures); n > 0 {
		fmt.Fprintf(&b, "; %d signatures and the like came along", n)
	}
	b.WriteByte('\n')
	for _, h := range r.Hints {
		fmt.Fprintln(&b, h)
	}
	return b.String()
}

// edition is what the copy has that the source has not: packs from elsewhere,
// and another address in the image.
func (f *copyFlags) edition(ctx context.Context, from *converted.Opened, stored transport.Stored, to transport.Destination, r *copied) (*transport.Edition, error) {
	e := &transport.Edition{}
	listed, err := transport.Blobs(ctx, stored)
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	loose, recorded := false, ""
	for _, img := range from.Images {
		recorded = cmp.Or(recorded, strings.Join(img.Config.Stores, " "))
		if img.Locators == nil {
			loose = true
			continue
		}
		if err := f.addPacks(ctx, e, img, stored, listed); err != nil {
			return nil, &convert.Error{Part: convert.Source, Err: err}
		}
	}
	address := to.StoreAddress()
	if loose {
		address = ""
		if f.rewrite == "" || f.rewrite == ownStore {
			r.Hints = append(r.Hints, "its chunks stay where they are, in "+recorded)
		}
	}
	r.Store = address
	switch {
	case f.rewrite == "":
		if !loose && address != "" && address != recorded {
			r.Hints = append(r.Hints, fmt.Sprintf("the image looks for its packs at %s; where that cannot be reached, set BLOB_STORE=%s", cmp.Or(recorded, "no place"), address))
		}
		return e, nil
	case f.rewrite != ownStore:
		if err := stores.Check(f.rewrite); err != nil {
			return nil, usagef("--rewrite-store: %w", err)
		}
		address = f.rewrite
	case address == "":
		return nil, usagef("--rewrite-store: %s is no address that chunks can be read from; give the address that it will have: --rewrite-store=ADDRESS", r.Destination)
	}
	r.Rewritten, r.Store = true, address
	r.Hints = append(r.Hints, "the image has a new digest: what signs the old one does not hold for it, sign it again")
	return e, rewriteStore(ctx, e, stored, address)
}

// addPacks adds the packs of img that the image's own index does not list: they
// lie in a repository of their own.
func (f *copyFlags) addPacks(ctx context.Context, e *transport.Edition, img *converted.Image, stored transport.Stored, listed map[string]bool) error {
	elsewhere := false
	for n := range img.Locators.Packs() {
		p, err := img.Locators.Pack(n)
		if err != nil {
			return err
		}
		elsewhere = elsewhere || !listed[p.Digest]
	}
	if !elsewhere {
		return nil
	}
	packs, err := f.packsFrom(ctx, img, stored)
	if err != nil {
		return err
	}
	for _, p := range packs {
		if !slices.ContainsFunc(e.Packs, func(have registrystore.Pack) bool { return have.Digest == p.Digest }) {
			e.Packs = append(e.Packs, p)
		}
	}
	data, err := registrystore.DataManifest(packs)
	if err != nil {
		return err
	}
	e.Data = append(e.Data, transport.PlatformImage{Platform: *registrystore.DataPlatform(), Boot: data})
	return nil
}

// rewriteStore makes address the recorded one in every platform of an image.
func rewriteStore(ctx context.Context, e *transport.Edition, stored transport.Stored, address string) error {
	e.Own = make(map[v1.Hash][]byte)
	with := make(map[v1.Hash]v1.Descriptor)
	for _, img := range stored.Images() {
		h, err := v1.NewHash(img.Digest)
		if err != nil {
			return err
		}
		raw, err := stored.Manifest(ctx, v1.Descriptor{Digest: h})
		if err != nil {
			return &convert.Error{Part: convert.Source, Err: err}
		}
		edited, err := assembly.SetStores(ctx, img, raw, []string{address})
		if err != nil {
			return &convert.Error{Part: convert.Source, Err: err}
		}
		for d, b := range edited.Parts {
			e.Own[d] = b
		}
		with[h] = edited.Manifest
	}
	root := stored.Root()
	if only, ok := with[root.Digest]; ok { // one image without an index
		e.Root = e.Own[only.Digest]
		return nil
	}
	raw, err := stored.Manifest(ctx, root)
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	var nested struct {
		Manifests []v1.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &nested); err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	for h := range with {
		if !slices.ContainsFunc(nested.Manifests, func(d v1.Descriptor) bool { return d.Digest == h }) {
			return &convert.Error{Part: convert.Source, Err: fmt.Errorf("index %s names %s through another index, which cannot be rewritten", root.Digest, h)}
		}
	}
	e.Root, err = transport.ReplaceManifests(raw, with)
	return err
}
