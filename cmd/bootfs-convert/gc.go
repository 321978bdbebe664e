package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/stores"
)

type gcFlags struct {
	*common
	grace time.Duration
	dry   bool
	all   bool
}

func newGC(c *common) *cobra.Command {
	f := &gcFlags{common: c}
	cmd := &cobra.Command{
		Use:   "gc STORE REF|INDEX.caibx...",
		Short: "Remove the chunks of a store that no image or index refers to",
		Long: `Remove from STORE, one of single chunks, what none of the converted images REF,
all platforms of them, and indexes in files refers to. Name all that use the
store: the rest goes. All of them are read before the first chunk is removed,
and one that cannot be read ends the command.

What was written or used by a conversion within --grace stays, so that gc can
run beside conversions that take less; in S3, where what is used again does not
become young, none must run. What killed conversions have left goes as well.

Of a registry, whose own garbage collector is the one to remove, gc tells which
packs its tags lead to, and which tags of packs none of REF uses:

  bootfs-convert gc registry://HOST/REPOSITORY REF...`,
		Example: `  bootfs-convert gc --dry-run /srv/rootfs.castr app.example.com/app:1.0 app.example.com/app:1.1
  bootfs-convert gc sftp://store.example.com/srv/rootfs.castr disk.caibx`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("got no arguments, want STORE REF|INDEX.caibx...; see %s --help", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return runGC(cmd.Context(), f, args[0], args[1:])
		},
	}
	cmd.Flags().DurationVar(&f.grace, "grace", 24*time.Hour, "`DURATION` for which a chunk stays that nothing refers to")
	cmd.Flags().BoolVarP(&f.dry, "dry-run", "n", false, "remove nothing, only count")
	cmd.Flags().BoolVar(&f.all, "all", false, "remove chunks even if nothing refers to any chunk of the store")
	return cmd
}

// collection is the result of gc.
type collection struct {
	Store    string `json:"store"`
	DryRun   bool   `json:"dryRun"`
	Referred amount `json:"referred"` // chunks that something refers to
	Missing  int    `json:"missing"`  // chunks that something refers to, but the store has not
	Young    amount `json:"young"`    // chunks that nothing refers to, younger than the grace
	Removed  amount `json:"removed"`
	Left     amount `json:"left"` // files that killed writers had left
}

// amount is a number of chunks or files and their stored bytes.
type amount struct {
	Count int64 `json:"count"`
	Bytes int64 `json:"bytes"`
}

func (a *amount) add(n int64) { a.Count, a.Bytes = a.Count+1, a.Bytes+n }

func (a amount) String() string { return fmt.Sprintf("%d (%s)", a.Count, scratch.Bytes(a.Bytes)) }

func runGC(ctx context.Context, f *gcFlags, address string, names []string) error {
	switch {
	case f.grace < 0:
		return usagef("--grace %v: want 0 or more", f.grace)
	case len(f.platforms) > 0:
		return usagef("gc counts all platforms of an image: --platform would lose the chunks of the others")
	}
	if err := checkStore(address); err != nil {
		return err
	}
	if !stores.Loose(address) {
		return runRegistryGC(ctx, f, address, names)
	}
	if len(names) == 0 && !f.all {
		return usagef("name the images and indexes that use %s; without any, --all removes every chunk", address)
	}
	d := f.display()
	defer d.close()
	// What is written or touched from here on is young, whenever it is found.
	then := time.Now().Add(-f.grace)
	store, err := f.openCollected(address)
	if err != nil {
		return err
	}
	if c, ok := store.(io.Closer); ok {
		defer c.Close()
	}
	used, err := f.references(ctx, d, names)
	if err != nil {
		return err
	}
	result, old, err := sift(ctx, store, used, then)
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	if result.Referred.Count == 0 && len(old) > 0 && !f.all {
		return usagef("nothing that was named refers to any chunk of %s: is it the store? --all removes them nonetheless", store)
	}
	result.DryRun = f.dry
	if result.Removed, err = f.remove(ctx, store, old, then); err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	if s, ok := store.(chunkstore.Sweeper); ok {
		files, bytes, err := s.Sweep(ctx, then, f.dry)
		if err != nil {
			return &convert.Error{Part: convert.Destination, Err: err}
		}
		result.Left = amount{int64(files), bytes}
	}
	d.close()
	if f.json {
		return f.writeJSON(result)
	}
	return f.printCollection(result)
}

// collected is a store that gc can clean.
type collected interface {
	chunkstore.Store
	chunkstore.Lister
	chunkstore.Remover
}

func (f *gcFlags) openCollected(address string) (collected, error) {
	list, err := absStores([]string{address})
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(list[0], "oci-layout")); err == nil {
		return nil, usagef("%s is an OCI layout and holds packs, not single chunks: they go when the tool that removes its images collects the blobs", address)
	}
	s, err := stores.Open(list[0], stores.Source{Access: f.access()})
	if err != nil {
		return nil, &convert.Error{Part: convert.Destination, Err: err}
	}
	c, ok := s.(collected)
	if !ok {
		return nil, usagef("%s cannot be listed: clean it where its files are", s)
	}
	return c, nil
}

// references returns the chunks that the named images and indexes refer to.
func (f *gcFlags) references(ctx context.Context, d display, names []string) (map[index.ID]bool, error) {
	used := make(map[index.ID]bool)
	add := func(x *index.Index) error {
		for i := range x.Len() {
			c, err := x.At(i)
			if err != nil {
				return err
			}
			used[c.ID] = true
		}
		return nil
	}
	for _, name := range names {
		if isIndexFile(name) {
			x, err := readIndexFile(name)
			if err == nil {
				err = add(x)
			}
			if err != nil {
				return nil, err
			}
			continue
		}
		o, err := (&readFlags{common: f.common}).open(ctx, name, d)
		if err != nil {
			return nil, err
		}
		for _, img := range o.Images {
			if err = add(img.Index); err != nil {
				break
			}
		}
		o.Close()
		if err != nil {
			return nil, err
		}
	}
	return used, nil
}

// sift counts what is in a store, and returns the chunks that are unused and
// were last modified before then.
func sift(ctx context.Context, store collected, used map[index.ID]bool, then time.Time) (*collection, []chunkstore.Entry, error) {
	r := &collection{Store: store.String()}
	var old []chunkstore.Entry
	for e, err := range store.List(ctx) {
		switch {
		case err != nil:
			return nil, nil, err
		case used[e.ID]:
			r.Referred.add(e.Size)
		case !e.Modified.Before(then):
			r.Young.add(e.Size)
		default:
			old = append(old, e)
		}
	}
	r.Missing = len(used) - int(r.Referred.Count)
	return r, old, nil
}

// removeAtOnce is how many chunks are removed at a time.
const removeAtOnce = 32

// remove removes chunks that are still older than then, and counts them.
func (f *gcFlags) remove(ctx context.Context, store collected, old []chunkstore.Entry, then time.Time) (amount, error) {
	var count, size atomic.Int64
	var g errgroup.Group
	g.SetLimit(removeAtOnce)
	e, expires := store.(chunkstore.Expirer)
	for _, chunk := range old {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() (err error) {
			removed := true
			switch {
			case f.dry:
			case expires:
				removed, err = e.Expire(ctx, chunk.ID, then)
			default:
				err = store.Remove(ctx, chunk.ID)
			}
			if err == nil && removed {
				count.Add(1)
				size.Add(chunk.Size)
			}
			return err
		})
	}
	err := errors.Join(g.Wait(), ctx.Err())
	return amount{count.Load(), size.Load()}, err
}

func (f *gcFlags) printCollection(r *collection) error {
	var b strings.Builder
	removed := "removed"
	if f.dry {
		removed = "to be removed"
	}
	fmt.Fprintf(&b, "%s: chunks in use: %s, too young: %s, %s: %s", r.Store, r.Referred, r.Young, removed, r.Removed)
	if r.Left.Count > 0 {
		fmt.Fprintf(&b, "; files that killed writers had left: %s", r.Left)
	}
	b.WriteByte('\n')
	if r.Missing > 0 {
		fmt.Fprintf(&b, "%d chunks in use are not in this store\n", r.Missing)
	}
	_, err := fmt.Fprint(f.stdout, b.String())
	return err
}
