package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// packStatement is what gc says of a repository.
type packStatement struct {
	Store string    `json:"store"`
	Tags  []packTag `json:"tags"`  // those that lead to packs
	Packs amount    `json:"packs"` // that any tag leads to
	// Free is what only tags lead to that are not Used: the registry's garbage
	// collector takes it once they are deleted.
	Free amount `json:"free"`
	// Untagged is what an image needs and no tag leads to: the collector may take
	// it at any time.
	Untagged []untaggedPacks `json:"untagged,omitempty"`
}

type packTag struct {
	Tag    string   `json:"tag"`
	Digest string   `json:"digest"`
	Packs  amount   `json:"packs"`
	Used   bool     `json:"used"`             // it is a converted image, or holds the packs of one that was named
	UsedBy []string `json:"usedBy,omitempty"` // the images that were named
}

type untaggedPacks struct {
	Image string `json:"image"`
	Packs amount `json:"packs"`
}

// runRegistryGC tells what the packs in a repository are there for.
func runRegistryGC(ctx context.Context, f *gcFlags, address string, names []string) error {
	d := f.display()
	defer d.close()
	o, err := f.transportOptions()
	if err != nil {
		return err
	}
	if !strings.HasPrefix(address, "registry") {
		return usagef("gc %s: want a store of single chunks or registry://HOST/REPOSITORY", address)
	}
	images := make(map[string]map[string]registrystore.PackDescriptor) // packs by image
	for _, name := range names {
		if images[name], err = f.packsOf(ctx, d, name); err != nil {
			return err
		}
	}
	tags, err := transport.ListPacks(ctx, address, o)
	if err != nil {
		return &convert.Error{Part: convert.Source, Err: err}
	}
	d.close()
	s := state(address, tags, images)
	if f.json {
		return f.writeJSON(s)
	}
	return f.printStatement(s)
}

// packsOf returns the packs that an image needs, by digest.
func (f *gcFlags) packsOf(ctx context.Context, d display, name string) (map[string]registrystore.PackDescriptor, error) {
	if isIndexFile(name) {
		return nil, usagef("gc of a registry: %s is an index, want images", name)
	}
	o, err := (&readFlags{common: f.common}).open(ctx, name, d)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	packs := make(map[string]registrystore.PackDescriptor)
	for _, img := range o.Images {
		if img.Locators == nil {
			continue
		}
		for i := range img.Locators.Packs() {
			p, err := img.Locators.Pack(i)
			if err != nil {
				return nil, err
			}
			packs[p.Digest] = p
		}
	}
	return packs, nil
}

// state finds out which tags of packs are used. An image uses the tags that
// hold all of its packs; if there is none, those that hold any.
func state(address string, tags []transport.TagPacks, images map[string]map[string]registrystore.PackDescriptor) *packStatement {
	s := &packStatement{Store: address, Tags: []packTag{}}
	users := make(map[string][]string) // by tag
	held := make(map[string]bool)      // packs that a tag leads to
	for _, t := range tags {
		for _, p := range t.Packs {
			held[p.Digest] = true
		}
	}
	for name, packs := range images {
		var all, some []string
		for _, t := range tags {
			n := 0
			for _, p := range t.Packs {
				if _, ok := packs[p.Digest]; ok {
					n++
				}
			}
			if n > 0 {
				some = append(some, t.Tag)
			}
			if n > 0 && n == len(packs) {
				all = append(all, t.Tag)
			}
		}
		if len(all) > 0 {
			some = all
		}
		for _, tag := range some {
			users[tag] = append(users[tag], name)
		}
		var gone amount
		for digest, p := range packs {
			if !held[digest] {
				gone.add(p.Size)
			}
		}
		if gone.Count > 0 {
			s.Untagged = append(s.Untagged, untaggedPacks{name, gone})
		}
	}
	used := make(map[string]bool) // digests: to delete a tag may delete what it stands for
	for _, t := range tags {
		used[t.Digest] = used[t.Digest] || len(users[t.Tag]) > 0 || !strings.HasPrefix(t.Tag, transport.PacksPrefix)
	}
	kept, counted := make(map[string]bool), make(map[string]bool)
	for _, t := range tags {
		if len(t.Packs) == 0 {
			continue
		}
		tag := packTag{Tag: t.Tag, Digest: t.Digest, Used: used[t.Digest], UsedBy: users[t.Tag]}
		slices.Sort(tag.UsedBy)
		for _, p := range t.Packs {
			tag.Packs.add(p.Size)
			kept[p.Digest] = kept[p.Digest] || tag.Used
			if !counted[p.Digest] {
				counted[p.Digest] = true
				s.Packs.add(p.Size)
			}
		}
		s.Tags = append(s.Tags, tag)
	}
	slices.SortFunc(s.Tags, func(a, b packTag) int { return strings.Compare(a.Tag, b.Tag) })
	clear(counted)
	for _, t := range tags {
		for _, p := range t.Packs {
			if !kept[p.Digest] && !counted[p.Digest] {
				counted[p.Digest] = true
				s.Free.add(p.Size)
			}
		}
	}
	slices.SortFunc(s.Untagged, func(a, b untaggedPacks) int { return strings.Compare(a.Image, b.Image) })
	return s
}

func (f *gcFlags) printStatement(s *packStatement) error {
	var b strings.Builder
	unused := 0
	for _, t := range s.Tags {
		switch {
		case !t.Used:
			unused++
			fmt.Fprintf(&b, "%s: packs: %s; held for no image that was named\n", t.Tag, t.Packs)
		case strings.HasPrefix(t.Tag, transport.PacksPrefix):
			fmt.Fprintf(&b, "%s: packs: %s; held for %s\n", t.Tag, t.Packs, cmp.Or(strings.Join(t.UsedBy, ", "), "an image here"))
		default:
			fmt.Fprintf(&b, "%s: packs: %s; a converted image\n", t.Tag, t.Packs)
		}
	}
	fmt.Fprintf(&b, "%s: packs: %s in all; unused tags of packs: %d. Nothing was deleted.\n", s.Store, s.Packs, unused)
	if unused > 0 {
		fmt.Fprintf(&b, "Deleting these tags lets the registry's garbage collector take these packs: %s\n", s.Free)
		_, repo, _ := strings.Cut(s.Store, "://")
		for _, t := range s.Tags {
			if !t.Used {
				fmt.Fprintf(&b, "  skopeo delete docker://%s:%s\n", repo, t.Tag)
			}
		}
	}
	for _, l := range s.Untagged {
		fmt.Fprintf(&b, "%s needs packs %s that no tag here leads to: the garbage collector may take them, if they are here\n", l.Image, l.Packs)
	}
	_, err := fmt.Fprint(f.stdout, b.String())
	return err
}
