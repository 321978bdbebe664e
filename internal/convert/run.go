package convert

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/convcache"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/reads"
	"github.com/container-bootfs/bootfs/internal/rootimage"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/startset"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/tree"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Profile names the cutting and layout parameters that Run uses, which the
// records of a cache follow too.
const Profile = convcache.Profile

// Options are what Run needs to know.
type Options struct {
	Source      transport.Ref
	Destination transport.Ref
	// Platforms restricts the conversion; nil takes every Linux platform, or
	// this machine's where the destination holds only one.
	Platforms []v1.Platform
	// Store is where the chunks go, one of stores.WrittenForms; "" puts packs
	// beside the image.
	Store string
	// Access lets us into Store where that takes single chunks.
	Access stores.Access
	// Base is the image whose packs are reused; nil is what the destination's
	// name stands for until now, if it can serve.
	Base *transport.Ref
	// Canonical has no base: the digests then depend on nothing but the source,
	// the boot binary and these options.
	Canonical bool
	// RewriteBelow is the part of the base's packs, all in all, that must be used
	// for them to be referred to; 0 is DefaultRewriteBelow.
	RewriteBelow float64
	// StartSet is what the program was seen to read until it was ready, in order;
	// nil leaves it to what its files tell.
	StartSet []reads.Range
	// KeepTag leaves a second tag that no later conversion moves, so that the
	// packs stay when the destination's name goes to another image.
	KeepTag bool
	// Attestations says what becomes of what signs or describes the source; ""
	// is Carry.
	Attestations Attestations
	// CacheFrom are the conversion caches that are asked for layers, in order;
	// CacheTo those that are written. Their faults fail nothing.
	CacheFrom, CacheTo []CachePlace
	// Boot returns the boot binary for a platform.
	Boot func(v1.Platform) (*assembly.BootLayer, error)
	// TempDir holds temporary files; "" means os.TempDir(). They have no name
	// there, so nothing stays however the process ends.
	TempDir string
	// Transport says how to reach registries and daemons. Its Platforms,
	// TempDir and Progress are set by Run.
	Transport transport.Options
	// Progress is told of steps, from several goroutines at once; may be nil.
	Progress func(Event)
	// Log gets what a person should know; nil discards it.
	Log *slog.Logger
}

// Run converts an image.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.TempDir == "" {
		o.TempDir = os.TempDir()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Progress == nil {
		o.Progress = func(Event) {}
	}
	began := time.Now()
	c := &conversion{o: o}
	report, err := c.run(ctx)
	var e *Error
	if errors.As(err, &e) && e.Part == Destination {
		return nil, err // a full disk there is not a matter of temporary files
	}
	if err != nil {
		return nil, scratch.Explain(o.TempDir, err)
	}
	report.Seconds = time.Since(began).Seconds()
	return report, nil
}

// conversion is one Run.
type conversion struct {
	o      Options
	base   *base // nil without
	dest   transport.Destination
	to     *chunkPlace
	cache  *convcache.Cache // nil without
	upload *meter
}

func (c *conversion) rewriteBelow() float64 {
	return cmp.Or(c.o.RewriteBelow, DefaultRewriteBelow)
}

// transport returns the options for a source or destination whose bytes m
// counts.
func (c *conversion) transport(m *meter) transport.Options {
	t := c.o.Transport
	t.Platforms, t.TempDir, t.Progress = c.o.Platforms, c.o.TempDir, m.add
	return t
}

// check refuses options that do not fit one another.
func (o *Options) check() error {
	switch {
	case o.Store == "" && !o.Destination.HoldsPacks():
		return fmt.Errorf("%s cannot hold chunks: name a store for them with --store: %s", o.Destination, stores.WrittenForms())
	case o.StartSet != nil && stores.Loose(o.Store):
		return errors.New("a start set has chunks put beside one another in packs, and the store takes single chunks: leave --start-set out")
	case o.KeepTag && !o.Destination.HoldsPacks():
		return fmt.Errorf("%s holds one image and no second tag for it: leave --keep-tag out", o.Destination)
	case o.Base != nil && stores.Loose(o.Store):
		return errors.New("a base is for packs: a store of single chunks knows what it has")
	}
	return nil
}

// checkSpace looks for the temporary space of images, which are converted one
// after the other, and returns an estimate of it in bytes.
func (c *conversion) checkSpace(images []input) (estimate int64, err error) {
	other := int64(0)
	if !stores.Loose(c.o.Store) {
		other = registrystore.PackSpace
	}
	for _, img := range images {
		layers := img.Layers
		if len(c.o.CacheFrom) > 0 {
			layers = nil // which of them are read will be known then
		}
		n, err := CheckSpace(c.o.TempDir, layers, other, c.o.Log)
		if err != nil {
			return 0, err
		}
		estimate = max(estimate, n)
	}
	return estimate, nil
}

func (c *conversion) run(ctx context.Context) (_ *Report, err error) {
	o := c.o
	if err := o.check(); err != nil {
		return nil, &Error{Usage, err}
	}
	spooled := c.meter("", PhaseSource, 0)
	src, err := transport.Open(ctx, o.Source, c.transport(spooled))
	if err != nil {
		return nil, in(Source, err)
	}
	defer src.Close()
	spooled.end()
	report := &Report{Source: o.Source.String(), Destination: o.Destination.String()}
	images, err := c.choose(src.Images(), report)
	if err != nil {
		return nil, err
	}
	signs, err := c.treatEvidence(ctx, src, images, report)
	if err != nil {
		return nil, err
	}
	if report.TempBytes, err = c.checkSpace(images); err != nil {
		return nil, err
	}

	c.upload = c.meter("", PhaseUpload, 0)
	to := c.transport(c.upload)
	to.KeepTag = o.KeepTag
	c.dest, err = transport.OpenDestination(ctx, o.Destination, to)
	if err != nil {
		return nil, in(Destination, err)
	}
	defer c.dest.Close()
	if c.to, err = openChunkPlace(ctx, c); err != nil {
		return nil, in(Destination, err)
	}
	defer c.to.close()
	report.Store = c.to.address
	if c.base, err = c.openBase(ctx, images); err != nil {
		return nil, err
	}
	defer c.base.close()
	var closeCache func()
	c.cache, closeCache, err = c.openCache()
	defer closeCache()
	if err != nil {
		return nil, err
	}

	var out []transport.PlatformImage
	for _, img := range images {
		p, r, err := c.platform(ctx, img)
		if err != nil {
			if len(images) > 1 {
				err = fmt.Errorf("%s: %w", img.Platform, err)
			}
			return nil, err
		}
		p.Attestations = signs.byImage[img.Digest]
		out = append(out, p)
		report.Platforms = append(report.Platforms, *r)
	}
	if err := signs.carry(ctx, c, report); err != nil {
		return nil, in(Destination, err)
	}
	// The chunks are complete before anything refers to them.
	if err := c.to.commit(ctx, out); err != nil {
		return nil, in(Destination, err)
	}
	if report.Digest, err = c.dest.Commit(ctx, out); err != nil {
		return nil, in(Destination, err)
	}
	if c.cache != nil {
		c.cache.Save(ctx)
	}
	c.upload.end()
	return report, nil
}

// input is an image that is to be converted, and the boot binary for it.
type input struct {
	transport.Image
	boot *assembly.BootLayer
}

// choose narrows images to what the destination can hold and boot can start.
// What it leaves out without having been told to goes to the report.
func (c *conversion) choose(images []transport.Image, report *Report) ([]input, error) {
	o := c.o
	for _, img := range images {
		if _, ok := img.Config.Config.Volumes[bootimage.WritablePath]; ok {
			return nil, in(Source, fmt.Errorf("%s: it is a converted image already", o.Source))
		}
	}
	if len(images) > 1 && !o.Destination.HoldsPacks() {
		var have []string
		var own []transport.Image
		for _, img := range images {
			if len(o.Platforms) == 0 && img.Platform.Architecture == runtime.GOARCH {
				own = append(own, img)
			}
			have = append(have, img.Platform.String())
		}
		if images = own; len(images) != 1 {
			return nil, &Error{Usage, fmt.Errorf("%s holds one platform, the source has %s: choose one with --platform", o.Destination, strings.Join(have, ", "))}
		}
	}
	var out []input
	var missing error
	for _, img := range images {
		boot, err := o.Boot(img.Platform)
		switch {
		case err == nil:
			out = append(out, input{img, boot})
		case len(o.Platforms) > 0 || len(images) == 1:
			return nil, err
		default:
			missing = err
			o.Log.Warn(fmt.Sprintf("left out: %s: %v", img.Platform, err))
			report.Skipped = append(report.Skipped, fmt.Sprintf("%s (%s: %v)", img.Digest, img.Platform, err))
		}
	}
	if len(out) == 0 {
		return nil, missing
	}
	return out, nil
}

// platform converts one image, all but its manifests. Where that fails with
// layers of a cache, it is done without: what the cache says may be at fault.
func (c *conversion) platform(ctx context.Context, img input) (transport.PlatformImage, *PlatformReport, error) {
	out, r, fromCache, err := c.tryPlatform(ctx, img, true)
	var e *Error
	if err != nil && fromCache && ctx.Err() == nil && (!errors.As(err, &e) || e.Part == Source) {
		c.o.Log.Warn(fmt.Sprintf("converting again without the cache: %v", err))
		out, r, _, err = c.tryPlatform(ctx, img, false)
	}
	return out, r, err
}

// tryPlatform says in fromCache whether layers of a cache were used.
func (c *conversion) tryPlatform(ctx context.Context, img input, useCache bool) (_ transport.PlatformImage, _ *PlatformReport, fromCache bool, _ error) {
	fail := func(err error) (transport.PlatformImage, *PlatformReport, bool, error) {
		return transport.PlatformImage{}, nil, fromCache, err
	}
	clock := newClock()
	base := c.base.of(img.Platform)
	s, err := c.readTree(ctx, img.Image, base, useCache)
	if s != nil {
		defer s.close()
		fromCache = s.cached()
	}
	if err != nil {
		return fail(err)
	}
	root := s.root
	layerSeconds := clock.lap()
	plan, err := rootimage.New(root)
	if err != nil {
		return fail(in(Source, err))
	}
	conf := img.Config.Config
	meta, err := erofs.NewReader(plan.Meta())
	if err != nil {
		return fail(err)
	}
	start, missing, err := startOf(root, plan, meta, c.o.StartSet, startset.Program{
		Args: append(append([]string{}, conf.Entrypoint...), conf.Cmd...), Env: conf.Env, WorkingDir: conf.WorkingDir})
	if err != nil {
		return fail(err)
	}
	if n := len(missing); n > 0 {
		c.o.Log.Warn(fmt.Sprintf("%d files of the start set are not in the image for %s, the first is %q: what the program needs by its own files counts beside it; record it anew with bootfs-convert profile", n, img.Platform, missing[0]))
	}
	mergeSeconds := clock.lap()

	ch, list, err := c.to.chunks(ctx, plan, start, s, base, img.Platform.String())
	if err != nil {
		return fail(err)
	}
	r := &ch.report
	r.Platform, r.SourceDigest = img.Platform.String(), img.Digest
	r.LayerSeconds, r.MergeSeconds, r.ChunkSeconds = layerSeconds, mergeSeconds, clock.lap()-r.NameSeconds
	r.IndexDigest, r.Files = digestOf(ch.index), int64(meta.Inodes())

	out, err := c.assemble(img, root, plan, ch, list)
	if err != nil {
		return fail(err)
	}
	r.ImageSeconds = clock.lap()
	if err := s.finish(r); err != nil {
		return fail(err)
	}
	if err := c.keep(s, plan, ch); err != nil {
		return fail(err)
	}
	return out, r, fromCache, nil
}

// assemble makes the image of what is known, and completes the report on it.
// list is nil when the chunks lie in a directory.
func (c *conversion) assemble(img input, root *tree.Tree, plan *rootimage.Plan, ch *chunked, list []registrystore.Pack) (out transport.PlatformImage, err error) {
	r := &ch.report
	out.Platform = img.Platform
	var locators []byte
	if list != nil {
		x, err := index.Open(ch.index)
		if err != nil {
			return out, err
		}
		descriptors := make([]registrystore.PackDescriptor, len(list))
		for i, p := range list {
			descriptors[i] = p.PackDescriptor
		}
		if locators, err = registrystore.EncodeLocators(x, descriptors, ch.locations); err != nil {
			return out, err
		}
		if out.Data, err = registrystore.DataManifest(list); err != nil {
			return out, err
		}
	}
	var stores, hostKeys []string
	if c.to.address != "" {
		stores = []string{c.to.address}
	}
	if c.to.hostKey != "" {
		hostKeys = []string{c.to.hostKey}
	}
	conf := img.Config.Config
	out.Boot, err = assembly.BootImage(assembly.Input{
		Source: img.Image,
		Tree:   root,
		Boot:   img.boot,
		Config: bootimage.Config{
			Version:      bootimage.Version,
			Profile:      Profile,
			IndexDigest:  r.IndexDigest,
			Base:         ch.base,
			Stores:       stores,
			HostKeys:     hostKeys,
			XattrClasses: plan.XattrClasses(),
			Recorded:     len(c.o.StartSet) > 0,
			Source: bootimage.Source{
				Name: sourceName(c.o.Source), Digest: img.Digest,
				Entrypoint: conf.Entrypoint, Cmd: conf.Cmd, User: conf.User, WorkingDir: conf.WorkingDir,
				Layers: sourceLayers(img.Image),
			},
		},
		Index:    ch.index,
		Locators: locators,
		Meta:     plan.Meta(),
	})
	if err != nil {
		return out, err
	}
	manifest, err := out.Boot.Manifest()
	if err != nil {
		return out, err
	}
	r.BootBytes = manifest.Config.Size
	for _, l := range manifest.Layers {
		r.BootBytes += l.Size
	}
	digest, err := out.Boot.Digest()
	r.BootDigest = digest.String()
	return out, err
}

// sourceLayers is what an image says of the layers that it was made of.
func sourceLayers(img transport.Image) []bootimage.Layer {
	var steps []int
	for i, h := range img.Config.History {
		if !h.EmptyLayer {
			steps = append(steps, i+1)
		}
	}
	out := make([]bootimage.Layer, len(img.Layers))
	for i, l := range img.Layers {
		out[i] = bootimage.Layer{Digest: l.Digest, DiffID: l.DiffID, MediaType: l.MediaType, Size: l.Size}
		if len(steps) == len(img.Layers) {
			out[i].Step = steps[i]
		}
	}
	return out
}

// sourceName is what an image says of where it came from. Paths of the machine
// that converted it are not part of that: the digests would follow them.
func sourceName(r transport.Ref) string { return r.Name }

// digestOf is the OCI digest of b.
func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}
