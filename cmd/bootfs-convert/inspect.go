package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// readFlags are those of the commands that read converted images.
type readFlags struct {
	*common
	stores []string
	only   bool // no other stores count
}

func (f *readFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&f.stores, "store", nil, "`STORE` to look for chunks in first (see bootfs-convert --help); may be repeated")
}

// open opens a converted image.
func (f *readFlags) open(ctx context.Context, image string, d display) (*converted.Opened, error) {
	ref, err := f.ref(image)
	if err != nil {
		return nil, err
	}
	t, err := f.transportOptions()
	if err != nil {
		return nil, err
	}
	for _, s := range f.stores {
		if err := checkStore(s); err != nil {
			return nil, err
		}
	}
	list := f.stores
	if len(list) == 0 {
		list = stores.Split(f.getenv(envBlobStore))
	}
	if list, err = absStores(list); err != nil {
		return nil, err
	}
	o, err := converted.Open(ctx, ref, converted.Options{Transport: t, Stores: list, Only: f.only, Access: f.access(), Log: f.logger(d)})
	if err != nil {
		return nil, &convert.Error{Part: convert.Source, Err: err}
	}
	return o, nil
}

func newInspect(c *common) *cobra.Command {
	f := &readFlags{common: c}
	cmd := &cobra.Command{
		Use:   "inspect REF",
		Short: "Show what is in a converted image",
		Args:  exactArgs("REF"),
		RunE:  func(cmd *cobra.Command, args []string) error { return runInspect(cmd.Context(), f, args[0]) },
	}
	f.register(cmd)
	return cmd
}

// inspection is what inspect shows.
type inspection struct {
	Image       string     `json:"image"`
	StoredBytes int64      `json:"storedBytes"` // of all platforms; 0 for loose stores, where it is not known
	BootBytes   int64      `json:"bootBytes"`   // of all platforms; an engine pulls one
	Platforms   []platform `json:"platforms"`
}

// platform is what inspect shows of one platform.
type platform struct {
	Platform     string            `json:"platform"`
	Digest       string            `json:"digest"` // of the boot image
	Profile      string            `json:"profile"`
	Source       string            `json:"source"`
	SourceDigest string            `json:"sourceDigest"`
	Layers       []bootimage.Layer `json:"layers"`         // of the source, bottom first
	History      []step            `json:"history"`        // of the image: the source's steps, then the converter's
	Base         string            `json:"base,omitempty"` // boot image whose packs it refers to beside its own
	IndexDigest  string            `json:"indexDigest"`
	RootBytes    int64             `json:"rootBytes"`
	MetaBytes    int64             `json:"metaBytes"`
	FileBytes    int64             `json:"fileBytes"` // logical sizes of the regular files
	Inodes       int               `json:"inodes"`
	Regular      int               `json:"regularFiles"`
	Directories  int               `json:"directories"`
	Symlinks     int               `json:"symlinks"`
	Chunks       int               `json:"chunks"`
	Distinct     int               `json:"distinctChunks"`
	Packs        []pack            `json:"packs,omitempty"`
	StoredBytes  int64             `json:"storedBytes"` // of the distinct chunks; 0 for loose stores
	StartChunks  int               `json:"startChunks"`
	StartBytes   int64             `json:"startBytes"` // stored
	Stores       []string          `json:"stores"`
	XattrClasses []string          `json:"xattrClasses,omitempty"`
	BootBytes    int64             `json:"bootBytes"` // what an engine pulls
}

// step is an entry of an image's history.
type step struct {
	Created   string `json:"created,omitempty"` // RFC 3339
	CreatedBy string `json:"createdBy,omitempty"`
	Author    string `json:"author,omitempty"`
	Comment   string `json:"comment,omitempty"`
}

type pack struct {
	Digest string `json:"digest"`
	Bytes  int64  `json:"bytes"`
	Start  bool   `json:"start,omitempty"`
}

func runInspect(ctx context.Context, f *readFlags, image string) error {
	d := f.display()
	defer d.close()
	o, err := f.open(ctx, image, d)
	if err != nil {
		return err
	}
	defer o.Close()
	all := inspection{Image: image}
	for _, img := range o.Images {
		p, err := inspect(img)
		if err != nil {
			return &convert.Error{Part: convert.Source, Err: fmt.Errorf("%s: %s: %w", image, img.Platform, err)}
		}
		all.Platforms = append(all.Platforms, *p)
		all.StoredBytes += p.StoredBytes
		all.BootBytes += p.BootBytes
	}
	d.close()
	if f.json {
		return f.writeJSON(all)
	}
	w := tabwriter.NewWriter(f.stdout, 0, 0, 2, ' ', 0)
	for n, p := range all.Platforms {
		if n > 0 {
			fmt.Fprintln(w)
		}
		p.print(w)
	}
	return w.Flush()
}

func inspect(img *converted.Image) (*platform, error) {
	i := &platform{
		Platform: img.Platform.String(), Digest: img.Digest, Profile: img.Config.Profile,
		Source: img.Config.Source.Name, SourceDigest: img.Config.Source.Digest,
		Base: img.Config.Base, IndexDigest: img.Config.IndexDigest, RootBytes: img.Index.Size(), MetaBytes: int64(len(img.Meta)),
		Chunks: img.Index.Len(), Stores: img.Config.Stores, XattrClasses: img.Config.XattrClasses, BootBytes: img.BootBytes,
	}
	i.Layers = img.Config.Source.Layers
	for _, h := range img.History {
		s := step{CreatedBy: h.CreatedBy, Author: h.Author, Comment: h.Comment}
		if !h.Created.IsZero() {
			s.Created = h.Created.UTC().Format(time.RFC3339)
		}
		i.History = append(i.History, s)
	}
	t, err := converted.Tree(img.Meta, nil)
	if err != nil {
		return nil, err
	}
	seen := make(map[*tree.Inode]bool)
	err = t.Walk(func(_ string, n *tree.Inode) error {
		if n.Nlink > 1 && seen[n] {
			return nil
		}
		seen[n] = true
		i.Inodes++
		switch {
		case n.IsRegular():
			i.Regular++
			i.FileBytes += n.Size
		case n.IsDir():
			i.Directories++
		case n.IsSymlink():
			i.Symlinks++
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	ids := make(map[index.ID]bool)
	for pos := range img.Index.Len() {
		c, err := img.Index.At(pos)
		if err != nil {
			return nil, err
		}
		if ids[c.ID] {
			continue
		}
		ids[c.ID] = true
		if img.Locators == nil {
			continue
		}
		at, err := img.Locators.At(pos)
		if err != nil {
			return nil, err
		}
		i.StoredBytes += int64(at.Length)
		if at.Length == 0 {
			continue
		}
		p, err := img.Locators.Pack(at.Pack)
		if err != nil {
			return nil, err
		}
		if p.Start {
			i.StartChunks++
			i.StartBytes += int64(at.Length)
		}
	}
	i.Distinct = len(ids)
	if img.Locators != nil {
		for n := range img.Locators.Packs() {
			p, err := img.Locators.Pack(n)
			if err != nil {
				return nil, err
			}
			i.Packs = append(i.Packs, pack{p.Digest, p.Size, p.Start})
		}
	}
	return i, nil
}

// oneLine returns the first most runes of s for a terminal, blanks and what is
// not printable as one blank each.
func oneLine(s string, most int) string {
	words := strings.FieldsFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) || unicode.IsSpace(r) })
	runes := []rune(strings.Join(words, " "))
	if len(runes) > most {
		runes = append(runes[:most-1], '…')
	}
	return string(runes)
}

// print writes it as lines of name and value, separated by a tab.
func (i *platform) print(w *tabwriter.Writer) {
	row := func(name, format string, a ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, a...)) }
	bytes := scratch.Bytes
	row("platform", "%s", i.Platform)
	row("boot image", "%s, %s", i.Digest, bytes(i.BootBytes))
	row("source", "%s", strings.TrimPrefix(i.Source+"@"+i.SourceDigest, "@"))
	if i.Base != "" {
		row("base", "%s", i.Base)
	}
	for n, l := range i.Layers {
		name := ""
		if n == 0 {
			name = "layers"
		}
		made := ""
		if k := l.Step - 1; k >= 0 && k < len(i.History) {
			made = "  " + oneLine(i.History[k].CreatedBy, 60)
		}
		row(name, "%s, %s%s", cmp.Or(l.Digest, l.DiffID), bytes(max(0, l.Size)), made)
	}
	if len(i.History) > 0 {
		row("history", "%d steps, --json lists them", len(i.History))
	}
	row("root", "%s, %s, profile %s", i.IndexDigest, bytes(i.RootBytes), i.Profile)
	row("files", "%d: %d regular with %s, %d directories, %d symlinks", i.Inodes, i.Regular, bytes(i.FileBytes), i.Directories, i.Symlinks)
	row("metadata", "%s", bytes(i.MetaBytes))
	row("chunks", "%d, %d of them distinct", i.Chunks, i.Distinct)
	if len(i.Packs) > 0 {
		row("stored", "%s", bytes(i.StoredBytes))
		row("start set", "%d chunks, %s", i.StartChunks, bytes(i.StartBytes))
	}
	for n, p := range i.Packs {
		name := ""
		if n == 0 {
			name = "packs"
		}
		start := ""
		if p.Start {
			start = ", start set"
		}
		row(name, "%s, %s%s", p.Digest, bytes(p.Bytes), start)
	}
	stores := strings.Join(i.Stores, " ")
	if stores == "" {
		stores = "beside the image"
	}
	row("stores", "%s", stores)
	if len(i.XattrClasses) > 0 {
		row("xattrs", "%s", strings.Join(i.XattrClasses, ", "))
	}
}
