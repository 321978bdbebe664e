package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/registrystore"
)

func newVerify(c *common) *cobra.Command {
	f := &readFlags{common: c, only: true}
	cmd := &cobra.Command{
		Use:   "verify REF | INDEX.caibx",
		Short: "Fetch and check every chunk of a converted image or an index",
		Long: `Fetch every chunk of the converted image REF, all platforms, or of an index in a
file, and compare it with its name. The chunks are looked for beside the image
and then where the image says, or in --store and nowhere else; a chunk that the
first store lacks may be in the next. What is missing or damaged is listed and
makes the exit code 1.`,
		Example: `  bootfs-convert verify registry.example.com/app:1.0-lazy
  bootfs-convert verify --store registry://mirror.example.com/app registry.example.com/app:1.0-lazy
  bootfs-convert verify --store /srv/disk.castr disk.caibx`,
		Args: exactArgs("REF"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runVerify(cmd.Context(), f, args[0])
		},
	}
	cmd.Flags().StringSliceVar(&f.stores, "store", nil, "only `STORE` is to have the chunks (see bootfs-convert --help); may be repeated")
	return cmd
}

// verifications is the result of verify.
type verifications struct {
	Good  bool               `json:"good"`
	Roots []rootVerification `json:"roots"`
}

// rootVerification is the result for one platform, or for an index in a file.
type rootVerification struct {
	Platform string `json:"platform,omitempty"`
	*converted.Verification
	Seconds float64 `json:"seconds"`
}

func runVerify(ctx context.Context, f *readFlags, name string) error {
	d := f.display()
	defer d.close()
	all := verifications{Good: true}
	verify := func(platform string, x *index.Index, l *registrystore.Locators, from []chunkstore.Store) error {
		v, err := f.verify(ctx, d, platform, x, l, from)
		if err != nil {
			return err
		}
		all.Good = all.Good && len(v.Faults) == 0
		all.Roots = append(all.Roots, *v)
		return nil
	}
	if isIndexFile(name) {
		x, err := readIndexFile(name)
		if err != nil {
			return err
		}
		list, done, err := f.indexStores(x)
		if err != nil {
			return err
		}
		defer done()
		if err := verify("", x, nil, list); err != nil {
			return err
		}
	} else {
		o, err := f.open(ctx, name, d)
		if err != nil {
			return err
		}
		defer o.Close()
		for _, img := range o.Images {
			list, err := img.Stores()
			if err != nil {
				return err
			}
			if err := verify(img.Platform.String(), img.Index, img.Locators, list); err != nil {
				return err
			}
		}
	}
	d.close()
	var err error
	if f.json {
		err = f.writeJSON(all)
	} else {
		err = f.printVerified(all.Roots)
	}
	if err == nil && !all.Good {
		err = errDamaged
	}
	return err
}

// verify checks the chunks of one index.
func (f *readFlags) verify(ctx context.Context, d display, platform string, x *index.Index, l *registrystore.Locators, from []chunkstore.Store) (*rootVerification, error) {
	began := time.Now()
	cs, err := converted.Distinct(x, l)
	if err != nil {
		return nil, err
	}
	var size int64
	for _, c := range cs {
		size += int64(c.Size)
	}
	progress, end := eventMeter(d, convert.Event{Platform: platform, Phase: phaseFetch, Total: size})
	v, err := converted.Verify(ctx, x.Digest(), cs, from, progress)
	if err != nil {
		return nil, err
	}
	end()
	return &rootVerification{platform, v, time.Since(began).Seconds()}, nil
}

func (f *readFlags) printVerified(all []rootVerification) error {
	var b strings.Builder
	for _, v := range all {
		for _, x := range v.Faults {
			fmt.Fprintf(&b, "%s: chunk %s, %d bytes at %d", x.Reason, x.Chunk, x.Size, x.Offset)
			if x.Where != "" {
				fmt.Fprintf(&b, ": %s", x.Where)
			}
			b.WriteByte('\n')
		}
		if v.Platform != "" {
			fmt.Fprintf(&b, "%s: ", v.Platform)
		}
		fmt.Fprintf(&b, "%d of %d chunks are good; %s fetched in %.1f s, %s/s\n",
			v.Good, v.Chunks, scratch.Bytes(v.StoredBytes), v.Seconds, scratch.Bytes(int64(float64(v.StoredBytes)/max(v.Seconds, 1e-3))))
		for _, s := range v.Stores {
			fmt.Fprintf(&b, "  %s: %d good, %d missing, %d corrupt", s.Store, s.Chunks, s.Missing, s.Corrupt)
			if s.Error != "" {
				fmt.Fprintf(&b, "; given up: %s", s.Error)
			}
			b.WriteByte('\n')
		}
	}
	_, err := fmt.Fprint(f.stdout, b.String())
	return err
}
