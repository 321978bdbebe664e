package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/stores"
)

type makeFlags struct {
	*common
	store string
	sizes string
}

func newMake(c *common) *cobra.Command {
	f := &makeFlags{common: c}
	cmd := &cobra.Command{
		Use:   "make FILE INDEX.caibx",
		Short: "Cut a file or a block device into an index and a chunk store",
		Long: `Cut FILE, a plain file or a block device, into chunks, put those that are not
there yet into the store, and then write INDEX.caibx, from which

  bootfs-convert extract --store STORE INDEX.caibx FILE
  casync extract --store=STORE INDEX.caibx FILE

make the file again. Holes in FILE are not read.`,
		Args: exactArgs("FILE", "INDEX.caibx"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runMake(cmd.Context(), f, args[0], args[1])
		},
	}
	v1 := chunker.V1
	cmd.Flags().StringVar(&f.store, "store", "", "`STORE` that the chunks go to, one of single chunks (default $"+envStore+")")
	cmd.Flags().StringVar(&f.sizes, "chunk-size", fmt.Sprintf("%d:%d:%d", v1.Min, v1.Avg, v1.Max), "`MIN:AVG:MAX` of a chunk, in bytes")
	return cmd
}

func runMake(ctx context.Context, f *makeFlags, file, name string) error {
	params, err := parseSizes(f.sizes)
	if err != nil {
		return usagef("--chunk-size %s: %w", f.sizes, err)
	}
	store := cmp.Or(f.store, f.getenv(envStore))
	if store == "" {
		return usagef("name a store for the chunks with --store: %s", stores.LooseForms())
	}
	if err := checkStore(store); err != nil {
		return err
	}
	if err := isDir(filepath.Dir(name)); err != nil {
		return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("write %s: %s: %w", name, filepath.Dir(name), err)}
	}
	d := f.display()
	defer d.close()
	var report *convert.BlobReport
	err = replaceFile(name, func(w *os.File) (err error) {
		report, err = convert.Blob(ctx, w, convert.BlobOptions{
			File: file, Store: store, Params: params, Access: f.access(), Progress: d.event,
		})
		return err
	})
	d.close()
	if err != nil {
		return err
	}
	if f.json {
		return f.writeJSON(report)
	}
	_, err = fmt.Fprintf(f.stdout, "%s: %s in %d chunks; %s stored, %s of it new; made in %.1f s\n", name,
		scratch.Bytes(report.Bytes), report.Chunks, scratch.Bytes(report.StoredBytes), scratch.Bytes(report.NewBytes), report.Seconds)
	return err
}

// parseSizes reads the sizes of chunks.
func parseSizes(s string) (chunker.Params, error) {
	var p chunker.Params
	parts := strings.Split(s, ":")
	if len(parts) != 3 {
		return p, fmt.Errorf("want MIN:AVG:MAX")
	}
	for i, to := range []*int{&p.Min, &p.Avg, &p.Max} {
		n, err := strconv.Atoi(parts[i])
		if err != nil {
			return p, fmt.Errorf("want MIN:AVG:MAX in bytes, got %q", parts[i])
		}
		*to = n
	}
	return p, p.Validate()
}
