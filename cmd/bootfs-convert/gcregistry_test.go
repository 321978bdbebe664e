package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/registrystore"
)

// TestState: which tags of packs are used. Pack "a" has 1 byte, "b" 2 and so on.
func TestState(t *testing.T) {
	pack := func(name rune) registrystore.PackDescriptor {
		return registrystore.PackDescriptor{Digest: string(name), Size: int64(1 + name - 'a')}
	}
	for _, test := range []struct {
		name   string
		tags   string // tag=packs or tag=packs@digest
		images string
		used   string // tags
		want   string // all packs, those that can be freed, those without a tag
	}{
		{"nothing", "", "", "", "0/0 0/0"},
		{"an image's own", "1=ab", "", "1", "2/3 0/0"},
		{"no packs", "latest=", "", "", "0/0 0/0"},
		{"unused", "packs-1=ab packs-2=bc", "x=bc", "packs-2", "3/6 1/1"},
		{"both used", "packs-1=ab packs-2=bc", "x=bc y=ab", "packs-1 packs-2", "3/6 0/0"},
		{"a chain of versions", "packs-1=a packs-2=ab packs-3=abc", "x=abc", "packs-3", "3/6 0/0"},
		{"a chain, the old one is used", "packs-1=a packs-2=ab packs-3=abc", "x=a", "packs-1 packs-2 packs-3", "3/6 0/0"},
		{"no tag has all", "packs-1=ab packs-2=bc packs-3=d", "x=abc", "packs-1 packs-2", "4/10 1/4"},
		{"a pack without a tag", "packs-1=a", "x=abc", "packs-1", "1/1 0/0 x:2/5"},
		{"kept by another image's own tag", "1=a packs-1=ab", "", "1", "2/3 1/2"},
		{"the same under two tags", "keep-1=ab@z packs-1=ab@z", "", "keep-1 packs-1", "2/3 0/0"},
		{"a loose store's image", "packs-1=a", "x=", "", "1/1 1/1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var tags []transport.TagPacks
			for _, f := range strings.Fields(test.tags) {
				tag, packs, _ := strings.Cut(f, "=")
				packs, digest, ok := strings.Cut(packs, "@")
				if !ok {
					digest = tag
				}
				have := transport.TagPacks{Tag: tag, Digest: digest}
				for _, p := range packs {
					have.Packs = append(have.Packs, pack(p))
				}
				tags = append(tags, have)
			}
			images := make(map[string]map[string]registrystore.PackDescriptor)
			for _, f := range strings.Fields(test.images) {
				name, packs, _ := strings.Cut(f, "=")
				images[name] = make(map[string]registrystore.PackDescriptor)
				for _, p := range packs {
					images[name][string(p)] = pack(p)
				}
			}
			s := state("registry://host/repo", tags, images)
			var used []string
			for _, tag := range s.Tags {
				if tag.Used {
					used = append(used, tag.Tag)
				}
			}
			got := fmt.Sprintf("%d/%d %d/%d", s.Packs.Count, s.Packs.Bytes, s.Free.Count, s.Free.Bytes)
			for _, u := range s.Untagged {
				got += fmt.Sprintf(" %s:%d/%d", u.Image, u.Packs.Count, u.Packs.Bytes)
			}
			if strings.Join(used, " ") != test.used || got != test.want {
				t.Errorf("got used %q, %s, want %q, %s", used, got, test.used, test.want)
			}
		})
	}
}
