package main

import (
	"cmp"
	"context"
	"fmt"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/internal/treecmp"
)

func newCheck(c *common) *cobra.Command {
	f := &readFlags{common: c}
	cmd := &cobra.Command{
		Use:   "check SRC DST",
		Short: "Check that a converted image's root is exactly its source's",
		Long: `Merge the layers of SRC again, read every file of the converted image DST with
all its chunks verified, and compare: contents, modes, owners, times, extended
attributes, links and devices. Differences are listed and make the exit code 1.
The conversion is also computed anew: an identical index says that the same
source, profile and version of the layout give these very chunks.`,
		Args: exactArgs("SRC", "DST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCheck(cmd.Context(), f, args[0], args[1])
		},
	}
	f.register(cmd)
	return cmd
}

// checks is the result of check.
type checks struct {
	Same      bool      `json:"same"`
	Platforms []checked `json:"platforms"`
}

// checked is the result for one platform.
type checked struct {
	Platform    string   `json:"platform"`
	Files       int      `json:"files"`
	IndexDigest string   `json:"indexDigest"`
	SameIndex   bool     `json:"sameIndex"` // the conversion computed anew gives this index
	Differences []string `json:"differences"`
}

func runCheck(ctx context.Context, f *readFlags, source, image string) error {
	d := f.display()
	defer d.close()
	ref, err := f.ref(source)
	if err != nil {
		return err
	}
	t, err := f.transportOptions()
	if err != nil {
		return err
	}
	dst, err := f.open(ctx, image, d)
	if err != nil {
		return err
	}
	defer dst.Close()
	for _, img := range dst.Images {
		if len(f.platforms) == 0 { // the source may have more
			t.Platforms = append(t.Platforms, img.Platform)
		}
	}
	src, err := transport.Open(ctx, ref, t)
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	defer src.Close()
	all := checks{Same: true}
	for _, img := range dst.Images {
		from, err := onePlatform(samePlatform(src.Images(), img.Platform), func(i transport.Image) v1.Platform { return i.Platform }, true)
		if err != nil {
			return err
		}
		c, err := f.check(ctx, d, from, img)
		if err != nil {
			return err
		}
		all.Same = all.Same && len(c.Differences) == 0
		all.Platforms = append(all.Platforms, *c)
	}
	d.close()
	if f.json {
		err = f.writeJSON(all)
	} else {
		err = f.printChecked(all.Platforms)
	}
	if err == nil && !all.Same {
		err = errDifferent
	}
	return err
}

func samePlatform(images []transport.Image, p v1.Platform) []transport.Image {
	var out []transport.Image
	for _, i := range images {
		if i.Platform.Equals(p) {
			out = append(out, i)
		}
	}
	if len(out) == 0 {
		return images
	}
	return out
}

// check compares one platform.
func (f *readFlags) check(ctx context.Context, d display, from transport.Image, img *converted.Image) (*checked, error) {
	dir := cmp.Or(f.tempDir, os.TempDir())
	if _, err := convert.CheckSpace(dir, from.Layers, img.Index.Size(), f.logger(d)); err != nil {
		return nil, err
	}
	var size int64
	for _, l := range from.Layers {
		size += max(0, l.Size)
	}
	progress, end := meter(d, img, convert.PhaseLayers, size)
	layers, done, err := convert.ReadLayers(ctx, from.Layers, f.tempDir, progress)
	if err != nil {
		return nil, err
	}
	defer done()
	end()
	source, err := layer.Merge(layers)
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	out := &checked{Platform: img.Platform.String(), IndexDigest: img.Config.IndexDigest, Differences: []string{}}

	progress, end = meter(d, img, convert.PhaseChunks, img.Index.Size())
	digest, err := convert.IndexDigest(ctx, source, progress)
	if err != nil {
		return nil, err
	}
	end()
	out.SameIndex = digest == img.Config.IndexDigest

	progress, end = meter(d, img, phaseFetch, img.Index.Size())
	root, err := img.Spool(ctx, f.tempDir, progress)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	end()
	if err := img.CheckMeta(root); err != nil {
		out.Differences = append(out.Differences, err.Error())
	}
	have, err := converted.Tree(img.Meta, root)
	if err != nil {
		return nil, err
	}
	want, err := treecmp.Tree(source)
	if err != nil {
		return nil, err
	}
	got, err := treecmp.Tree(have)
	if err != nil {
		return nil, err
	}
	out.Files = len(want)
	out.Differences = append(out.Differences, treecmp.Diff(got, want)...)
	return out, nil
}

func (f *readFlags) printChecked(all []checked) error {
	for _, c := range all {
		for _, line := range c.Differences {
			if _, err := fmt.Fprintln(f.stdout, line); err != nil {
				return err
			}
		}
		index := "the conversion computed anew gives the same index"
		if !c.SameIndex {
			index = "the conversion computed anew gives another index"
		}
		verdict := fmt.Sprintf("no difference in %d paths", c.Files)
		if n := len(c.Differences); n > 0 {
			verdict = fmt.Sprintf("%d differences in %d files", n, c.Files)
		}
		if _, err := fmt.Fprintf(f.stdout, "%s: %s; %s\n", c.Platform, verdict, index); err != nil {
			return err
		}
	}
	return nil
}
