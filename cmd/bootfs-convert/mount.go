package main

import (
	"context"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/mount"
)

type mountFlags struct {
	readFlags
	cache string
}

func newMount(c *common) *cobra.Command {
	f := &mountFlags{readFlags: readFlags{common: c}}
	cmd := &cobra.Command{
		Use:   "mount REF DIR",
		Short: "Mount a converted image's root, read-only, and fetch what is read",
		Long: `Mount a converted image's root on DIR, read-only, and serve it until it is
unmounted or the command is interrupted. Chunks are fetched when they are read.`,
		Args: exactArgs("REF", "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runMount(cmd.Context(), f, args[0], args[1])
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.cache, "cache", "", "`DIR` to keep fetched chunks in, shared by all who name it")
	return cmd
}

func runMount(ctx context.Context, f *mountFlags, image, dir string) error {
	if err := isDir(dir); err != nil {
		return usagef("mount on %s: %w", dir, err)
	}
	d := f.display()
	defer d.close()
	o, err := f.open(ctx, image, d)
	if err != nil {
		return err
	}
	defer o.Close()
	img, err := f.one(o)
	if err != nil {
		return err
	}
	var cache chunkstore.Writer
	if f.cache != "" {
		c, err := local.Create(f.cache, local.Batched())
		if err != nil {
			return fmt.Errorf("--cache: %w", err)
		}
		defer c.Close()
		cache = c
	}
	fetcher, err := img.Fetcher(cache)
	if err != nil {
		return err
	}
	defer fetcher.Close()
	log := f.logger(d)
	server, err := mount.Serve(dir, mount.Options{
		Meta: img.Meta, Image: lazy.New(img.Index, fetcher, lazy.Options{}),
		XattrClasses: img.Config.XattrClasses, Name: image, Log: log,
	})
	if err != nil {
		return fmt.Errorf("mount on %s: %w", dir, err)
	}
	log.Info(fmt.Sprintf("%s is mounted on %s; interrupt this command or run umount to end it", image, dir))
	done := make(chan struct{})
	go func() {
		server.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	err = server.Close()
	for _, s := range fetcher.Stats().Stores {
		log.Info(fmt.Sprintf("fetched %d chunks, %s, from %s", s.Chunks, scratch.Bytes(s.Stored), s.Name))
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// one picks the platform that a command on a single root is about: the one
// asked for, else this machine's.
func (f *readFlags) one(o *converted.Opened) (*converted.Image, error) {
	return onePlatform(o.Images, func(i *converted.Image) v1.Platform { return i.Platform }, len(f.platforms) > 0)
}
