package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

// phaseCheck is that of reading a node cache, for progress.
const phaseCheck convert.Phase = "check"

// envCacheReserve is --reserve of cache prune, and what preload leaves free; boot knows it too.
const envCacheReserve = "BOOTFS_CACHE_RESERVE"

func newCache(c *common) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Look after a node cache: check, repair, prune, stats",
		Long: `Look after a node cache, the directory or volume that containers have at
/.bootfs/rootfs.castr. Containers may go on to use it meanwhile.`,
		Args: func(cmd *cobra.Command, args []string) error {
			return usagef("name what to do with the cache: check, repair, prune or stats; see %s --help", cmd.CommandPath())
		},
		RunE: func(*cobra.Command, []string) error { return nil },
	}
	cmd.AddGroup(&cobra.Group{ID: groupCache, Title: "Commands:"})
	for _, sub := range []*cobra.Command{newCacheCheck(c), newCacheRepair(c), newCachePrune(c), newCacheStats(c)} {
		sub.GroupID = groupCache
		cmd.AddCommand(sub)
	}
	return cmd
}

func newCacheCheck(c *common) *cobra.Command {
	return &cobra.Command{
		Use:   "check DIR",
		Short: "Read every chunk and compare it with its name",
		Long: `Read every chunk of the node cache DIR and compare it with its name, be that a
SHA-256 or a SHA-512/256. What is damaged is listed and makes the exit code 1;
containers that meet it fetch it anew.`,
		Example: `  bootfs-convert cache check /var/cache/bootfs`,
		Args:    exactArgs("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCacheCheck(cmd.Context(), c, args[0], false)
		},
	}
}

func newCacheRepair(c *common) *cobra.Command {
	return &cobra.Command{
		Use:   "repair DIR",
		Short: "Check, and remove what is damaged",
		Long: `Read every chunk of the node cache DIR and remove what is not what its name says.
A marker that cannot be read is removed as well. A cache in a format that this
version does not know is set aside, in a hidden subdirectory of DIR, for which
DIR becomes an empty cache.`,
		Example: `  bootfs-convert cache repair /var/cache/bootfs`,
		Args:    exactArgs("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCacheCheck(cmd.Context(), c, args[0], true)
		},
	}
}

// checkup is the result of cache check and repair.
type checkup struct {
	Cache    string `json:"cache"`
	Good     bool   `json:"good"`
	SetAside string `json:"setAside,omitempty"` // where a cache of an unknown format now is
	Unmarked bool   `json:"unmarked,omitempty"` // a marker that could not be read was removed
	nodecache.Checkup
	Seconds float64 `json:"seconds"`
}

func runCacheCheck(ctx context.Context, c *common, dir string, repair bool) error {
	began := time.Now()
	d := c.display()
	defer d.close()
	r := checkup{Cache: dir}
	cache, err := openCache(dir, nodecache.Options{})
	if version := (*nodecache.VersionError)(nil); errors.As(err, &version) && repair {
		if version.Version > 0 {
			r.SetAside, err = nodecache.SetAside(dir)
		} else {
			r.Unmarked, err = true, nodecache.Unmark(dir)
		}
		if err != nil {
			return &convert.Error{Part: convert.Destination, Err: err}
		}
		cache, err = openCache(dir, nodecache.Options{})
	}
	if err != nil {
		return err
	}
	defer cache.Close()
	usage, err := cache.Usage(ctx, false)
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	progress, end := blobMeter(d, phaseCheck, usage.Bytes)
	found, err := cache.Check(ctx, nodecache.CheckOptions{Remove: repair, Progress: progress})
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	end()
	d.close()
	r.Checkup, r.Good, r.Seconds = *found, found.Damaged == found.Removed, time.Since(began).Seconds()
	if c.json {
		err = c.writeJSON(r)
	} else {
		err = c.printCheckup(&r)
	}
	if err == nil && !r.Good {
		err = errDamaged
	}
	return err
}

func (c *common) printCheckup(r *checkup) error {
	var b strings.Builder
	if r.SetAside != "" {
		fmt.Fprintf(&b, "the cache that was here is in another format and was set aside in %s: remove that when nobody wants it\n", r.SetAside)
	}
	if r.Unmarked {
		b.WriteString("a marker that could not be read was removed\n")
	}
	for _, f := range r.Faults {
		fmt.Fprintf(&b, "damaged: %s: %s\n", f.File, f.Reason)
	}
	if n := r.Damaged - int64(len(r.Faults)); n > 0 {
		fmt.Fprintf(&b, "and %d more\n", n)
	}
	fmt.Fprintf(&b, "%s: %d of %d chunks are good; %s read in %.1f s", r.Cache, r.Chunks-r.Damaged, r.Chunks, scratch.Bytes(r.Bytes), r.Seconds)
	if r.Removed > 0 {
		fmt.Fprintf(&b, "; %d damaged ones removed", r.Removed)
	}
	b.WriteByte('\n')
	_, err := fmt.Fprint(c.stdout, b.String())
	return err
}

// openCache opens a node cache that is there.
func openCache(dir string, o nodecache.Options) (*nodecache.Cache, error) {
	if err := isDir(dir); err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: fmt.Errorf("node cache %s: %w", dir, err)}
	}
	cache, err := nodecache.Open(dir, o)
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	return cache, nil
}

func newCachePrune(c *common) *cobra.Command {
	var size, reserve string
	cmd := &cobra.Command{
		Use:   "prune DIR",
		Short: "Remove what was not used for the longest time",
		Long: `Remove from the node cache DIR what was not used for the longest time, until the
chunks take no more than --size of the disk and --reserve of it is free; without
--size the reserve alone counts. What killed writers have left goes as well.`,
		Example: `  bootfs-convert cache prune --size 20GiB /var/cache/bootfs
  bootfs-convert cache prune --reserve 10% /var/cache/bootfs`,
		Args: exactArgs("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCachePrune(cmd.Context(), c, args[0], size, reserve)
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "`SIZE` of the disk that the chunks may take, as in 20GiB; 0 empties the cache")
	cmd.Flags().StringVar(&reserve, "reserve", c.getenv(envCacheReserve), "`SHARE` or size of the disk to be free, as in 5% or 2GiB (default 5%, at most 10 GiB, or $"+envCacheReserve+")")
	return cmd
}

// pruning is the result of cache prune.
type pruning struct {
	Cache   string `json:"cache"`
	Removed amount `json:"removed"`
	Left    amount `json:"left"`    // files that killed writers had left, removed
	Remains int64  `json:"remains"` // bytes of the disk
	Short   int64  `json:"short"`   // bytes that should be gone and are not
}

func runCachePrune(ctx context.Context, c *common, dir, size, reserve string) error {
	o := nodecache.Options{Reserve: nodecache.DefaultReserve}
	keep := nodecache.Unlimited
	var err error
	if size != "" {
		if keep, err = nodecache.ParseSize(size); err != nil {
			return usagef("--size: %w", err)
		}
	}
	if reserve != "" {
		if o.Reserve, err = nodecache.ParseReserve(reserve); err != nil {
			return usagef("--reserve: %w", err)
		}
	}
	cache, err := openCache(dir, o)
	if err != nil {
		return err
	}
	defer cache.Close()
	e, err := cache.Prune(ctx, keep)
	if err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	r := pruning{dir, amount{e.Chunks, e.Bytes}, amount{e.Leftovers, e.LeftBytes}, e.Before - e.Bytes - e.LeftBytes, e.Short}
	if c.json {
		err = c.writeJSON(r)
	} else {
		line := fmt.Sprintf("%s: chunks removed: %s, %s remain", r.Cache, r.Removed, scratch.Bytes(r.Remains))
		if r.Left.Count > 0 {
			line += fmt.Sprintf("; files that killed writers had left: %s", r.Left)
		}
		_, err = fmt.Fprintln(c.stdout, line)
	}
	if err == nil && e.Short > 0 {
		err = &convert.Error{Part: convert.Destination, Err: fmt.Errorf("node cache %s: %s more should have gone, and there is nothing to remove", dir, scratch.Bytes(e.Short))}
	}
	return err
}

func newCacheStats(c *common) *cobra.Command {
	return &cobra.Command{
		Use:     "stats DIR",
		Short:   "Print how much is in the cache, and when it was last used",
		Long:    `Print how many chunks and bytes are in the node cache DIR, and when they were last used, to about 10 minutes.`,
		Example: `  bootfs-convert cache stats --json /var/cache/bootfs`,
		Args:    exactArgs("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCacheStats(cmd.Context(), c, args[0])
		},
	}
}

// cacheStats is the result of cache stats.
type cacheStats struct {
	Cache  string     `json:"cache"`
	Chunks amount     `json:"chunks"` // bytes of the disk
	Others amount     `json:"others"` // files that are being written, were left so, or cannot be chunks
	Oldest *time.Time `json:"oldest,omitempty"`
	Newest *time.Time `json:"newest,omitempty"`
	Ages   []cacheAge `json:"ages"`
	Disk   struct {
		Size int64 `json:"size"`
		Free int64 `json:"free"`
	} `json:"disk"`
}

// cacheAge is what was last used that long ago.
type cacheAge struct {
	Within string `json:"within"` // a duration, "older" for the rest
	amount
}

func runCacheStats(ctx context.Context, c *common, dir string) error {
	cache, err := openCache(dir, nodecache.Options{})
	if err != nil {
		return err
	}
	defer cache.Close()
	u, err := cache.Usage(ctx, true)
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	s := cacheStats{Cache: dir, Chunks: amount{u.Chunks, u.Bytes}, Others: amount{u.Leftovers, u.LeftBytes}}
	s.Disk.Size, s.Disk.Free = u.DiskSize, u.DiskFree
	if u.Chunks > 0 {
		s.Oldest, s.Newest = &u.Oldest, &u.Newest
	}
	for _, a := range u.Ages {
		s.Ages = append(s.Ages, cacheAge{ageName(a.Within), amount{a.Chunks, a.Bytes}})
	}
	if c.json {
		return c.writeJSON(s)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d chunks take %s", s.Cache, s.Chunks.Count, scratch.Bytes(s.Chunks.Bytes))
	if s.Others.Count > 0 {
		fmt.Fprintf(&b, ", %d other files %s", s.Others.Count, scratch.Bytes(s.Others.Bytes))
	}
	fmt.Fprintf(&b, "; %s of %s are free\n", scratch.Bytes(s.Disk.Free), scratch.Bytes(s.Disk.Size))
	for _, a := range s.Ages {
		if a.Count > 0 {
			fmt.Fprintf(&b, "  last used %s: %s\n", a.words(), a.amount)
		}
	}
	_, err = fmt.Fprint(c.stdout, b.String())
	return err
}

func ageName(within time.Duration) string {
	switch {
	case within == 0:
		return "older"
	case within%(24*time.Hour) == 0:
		return fmt.Sprintf("%dd", within/(24*time.Hour))
	}
	return fmt.Sprintf("%dh", within/time.Hour)
}

func (a *cacheAge) words() string {
	if a.Within == "older" {
		return "before that"
	}
	return "within " + a.Within
}
