package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/unpack"
)

type extractFlags struct {
	readFlags
	image string
	index string
}

func newExtract(c *common) *cobra.Command {
	f := &extractFlags{readFlags: readFlags{common: c}}
	cmd := &cobra.Command{
		Use:   "extract REF [DIR] | INDEX.caibx FILE",
		Short: "Write a converted image's root, or what an index stands for, to a directory or a file",
		Long: `Write the root of a converted image, verified: into DIR, which is made or is
empty; with --image as the EROFS image that the kernel mounts; with --index as
the index from which casync makes that image, given the chunks:

  bootfs-convert --store /srv/rootfs.castr SRC DST
  bootfs-convert extract --index rootfs.caibx DST
  casync extract --store=/srv/rootfs.castr rootfs.caibx rootfs.erofs

Owners, devices and privileged attributes need root; who is not root gets the
rest, and is told. A missing or damaged chunk is noticed before DIR is touched;
a full disk or an interrupt leaves there what was written by then.

Of an index in a file, as make and casync write it, make FILE from the chunks in
--store. A FILE that is there is replaced once the new one is complete, and
chunks that are right in it are not fetched; a block device is written in place,
where it differs.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && isIndexFile(args[0]) {
				return exactArgs("INDEX.caibx", "FILE")(cmd, args)
			}
			if len(args) == 1 && (f.image != "" || f.index != "") {
				return nil
			}
			return exactArgs("REF", "DIR")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if isIndexFile(args[0]) {
				return runExtractBlob(cmd.Context(), f, args[0], args[1])
			}
			return runExtract(cmd.Context(), f, append(args, "")[:2])
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&f.image, "image", "", "`FILE` to write the root to as an EROFS image")
	cmd.Flags().StringVar(&f.index, "index", "", "`FILE` to write the index of the root (.caibx) to")
	return cmd
}

// extraction is the result of extract.
type extraction struct {
	Platform  string `json:"platform"`
	Files     int64  `json:"files,omitempty"` // inodes written into the directory
	Bytes     int64  `json:"bytes,omitempty"` // of their contents
	Omitted   int64  `json:"omitted,omitempty"`
	RootBytes int64  `json:"rootBytes"`
}

func runExtract(ctx context.Context, f *extractFlags, args []string) error {
	if err := f.checkDestinations(args[1]); err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	d := f.display()
	defer d.close()
	o, err := f.open(ctx, args[0], d)
	if err != nil {
		return err
	}
	defer o.Close()
	img, err := f.one(o)
	if err != nil {
		return err
	}
	result := extraction{Platform: img.Platform.String(), RootBytes: img.Index.Size()}
	if f.index != "" {
		err := replaceFile(f.index, func(w *os.File) error {
			_, err := w.Write(img.RawIndex)
			return err
		})
		if err != nil {
			return err
		}
	}
	progress, end := meter(d, img, phaseFetch, img.Index.Size())
	if f.image != "" {
		err := replaceFile(f.image, func(w *os.File) error {
			if err := w.Truncate(img.Index.Size()); err != nil {
				return err
			}
			return img.WriteTo(ctx, w, progress)
		})
		if err != nil {
			return err
		}
		end()
	}
	if dir := args[1]; dir != "" {
		if err := f.extractDir(ctx, d, img, dir, &result); err != nil {
			return err
		}
	}
	d.close()
	if f.json {
		return f.writeJSON(result)
	}
	var made []string
	if f.index != "" {
		made = append(made, fmt.Sprintf("%s: index of %d chunks", f.index, img.Index.Len()))
	}
	if f.image != "" {
		made = append(made, fmt.Sprintf("%s: EROFS image of %s", f.image, scratch.Bytes(result.RootBytes)))
	}
	if args[1] != "" {
		made = append(made, fmt.Sprintf("%s: %d files, %s", args[1], result.Files, scratch.Bytes(result.Bytes)))
	}
	_, err = fmt.Fprintln(f.stdout, strings.Join(made, "\n"))
	return err
}

// blobExtraction is the result of extract from an index in a file.
type blobExtraction struct {
	File    string       `json:"file"`
	Bytes   int64        `json:"bytes"`
	Chunks  int          `json:"chunks"`
	Stores  []storeCount `json:"stores"` // what was fetched from where
	Seconds float64      `json:"seconds"`
}

// storeCount is what came from a store.
type storeCount struct {
	Store  string `json:"store"`
	Chunks int64  `json:"chunks"`
	Bytes  int64  `json:"bytes"` // stored
}

// runExtractBlob makes file of the index in the file name.
func runExtractBlob(ctx context.Context, f *extractFlags, name, file string) error {
	began := time.Now()
	if f.image != "" || f.index != "" {
		return usagef("--image and --index are for converted images; %s is an index", name)
	}
	x, err := readIndexFile(name)
	if err != nil {
		return err
	}
	list, done, err := f.indexStores(x)
	if err != nil {
		return err
	}
	defer done()
	d := f.display()
	defer d.close()
	fetcher := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: x.Digest(), Stores: list, Log: f.logger(d)})
	defer fetcher.Close()
	progress, end := blobMeter(d, phaseWrite, x.Size())
	if err := writeBlob(ctx, x, fetcher, file, progress); err != nil {
		return err
	}
	end()
	d.close()
	result := blobExtraction{File: file, Bytes: x.Size(), Chunks: x.Len(), Seconds: time.Since(began).Seconds()}
	for _, s := range fetcher.Stats().Stores {
		result.Stores = append(result.Stores, storeCount{s.Name, s.Chunks, s.Stored})
	}
	if f.json {
		return f.writeJSON(result)
	}
	_, err = fmt.Fprintf(f.stdout, "%s: %s in %d chunks, in %.1f s\n", file, scratch.Bytes(x.Size()), x.Len(), result.Seconds)
	return err
}

// writeBlob writes what x stands for to file.
func writeBlob(ctx context.Context, x *index.Index, f *chunkstore.Fetcher, file string, progress func(int64)) error {
	failed := func(err error) error {
		return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("write %s: %w", file, bare(err))}
	}
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return replaceFile(file, func(w *os.File) error {
			return fillBlob(ctx, x, f, w, nil, progress)
		})
	case err != nil:
		return failed(err)
	case info.Mode().IsRegular():
		old, err := os.Open(file)
		if err != nil {
			return failed(err)
		}
		defer old.Close()
		return replaceFile(file, func(w *os.File) error {
			return fillBlob(ctx, x, f, w, old, progress)
		})
	case info.Mode().Type() != fs.ModeDevice:
		return failed(errors.New("not a plain file or a block device"))
	}
	w, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return failed(err)
	}
	defer w.Close()
	size, err := w.Seek(0, io.SeekEnd)
	if err == nil && size < x.Size() {
		err = fmt.Errorf("it has %s, %s are needed", scratch.Bytes(size), scratch.Bytes(x.Size()))
	}
	if err != nil {
		return failed(err)
	}
	if err := converted.WriteBlob(ctx, x, f, converted.Target{WriterAt: w, Seed: w, InPlace: true}, progress); err != nil {
		return asDestination(file, w, err)
	}
	if err := w.Sync(); err != nil {
		return failed(err)
	}
	return nil
}

// fillBlob writes a new file. seed is an earlier one or nil.
func fillBlob(ctx context.Context, x *index.Index, f *chunkstore.Fetcher, w *os.File, seed io.ReaderAt, progress func(int64)) error {
	if err := w.Truncate(x.Size()); err != nil {
		return err
	}
	return converted.WriteBlob(ctx, x, f, converted.Target{WriterAt: w, Blank: true, Seed: seed}, progress)
}

// asDestination says of an error of w, which is the file that the user called
// name, that the destination cannot be written.
func asDestination(name string, w *os.File, err error) error {
	if e := (*fs.PathError)(nil); errors.As(err, &e) && e.Path == w.Name() {
		return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("write %s: %w", name, bare(err))}
	}
	return err
}

// checkDestinations looks for what would be noticed only after everything was
// fetched.
func (f *extractFlags) checkDestinations(dir string) error {
	for _, name := range []string{f.image, f.index} {
		if name == "" {
			continue
		}
		if err := isDir(filepath.Dir(name)); err != nil {
			return fmt.Errorf("extract to %s: %s: %w", name, filepath.Dir(name), err)
		}
	}
	if dir == "" {
		return nil
	}
	switch names, err := os.ReadDir(dir); {
	case errors.Is(err, fs.ErrNotExist): // it is made
		return nil
	case err != nil:
		return fmt.Errorf("extract to %s: %w", dir, bare(err))
	case len(names) > 0:
		return fmt.Errorf("extract to %s: it is not empty: it has %q", dir, names[0].Name())
	}
	return nil
}

// extractDir fetches the whole root before it writes the first file, so that a
// missing chunk leaves no half of a directory.
func (f *extractFlags) extractDir(ctx context.Context, d display, img *converted.Image, dir string, result *extraction) error {
	progress, end := meter(d, img, phaseFetch, img.Index.Size())
	root, err := img.Spool(ctx, f.tempDir, progress)
	if err != nil {
		return err
	}
	defer root.Close()
	end()
	if err := img.CheckMeta(root); err != nil {
		return err
	}
	t, err := converted.Tree(img.Meta, root)
	if err != nil {
		return err
	}
	progress, end = meter(d, img, phaseWrite, 0)
	r, err := unpack.Dir(ctx, t, dir, unpack.Options{Unprivileged: os.Geteuid() != 0, Progress: progress})
	if err != nil {
		return fmt.Errorf("extract to %s: %w", dir, err)
	}
	end()
	result.Files, result.Bytes, result.Omitted = r.Files, r.Bytes, r.Omitted
	if r.Omitted > 0 {
		f.logger(d).Warn(fmt.Sprintf("%d files lack their owner, device or privileged attributes: only root can write them", r.Omitted))
	}
	return nil
}

// Phases of the commands that read.
const (
	phaseFetch convert.Phase = "fetch"
	phaseWrite convert.Phase = "write"
)

// replaceFile gives name the content that fill writes, or leaves it as it was.
func replaceFile(name string, fill func(*os.File) error) error {
	failed := func(err error) error {
		return &convert.Error{Part: convert.Destination, Err: fmt.Errorf("write %s: %w", name, bare(err))}
	}
	w, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return failed(err)
	}
	defer os.Remove(w.Name())
	defer w.Close()
	if err := fill(w); err != nil {
		return asDestination(name, w, err) // or it failed to read what it writes
	}
	if err := w.Chmod(0o644); err != nil {
		return failed(err)
	}
	// A name that survives a power cut must not lead to an empty file.
	if err := w.Sync(); err != nil {
		return failed(err)
	}
	if err := os.Rename(w.Name(), name); err != nil {
		return &convert.Error{Part: convert.Destination, Err: err}
	}
	return nil
}
