package tree

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
)

// Names returns the names of a directory's entries, sorted bytewise.
func (n *Inode) Names() []string {
	names := make([]string, 0, len(n.Entries))
	for name := range n.Entries {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Walk calls fn for every entry of the tree: "/" first, a directory before
// what is in it, names in byte order. An inode with several links is visited
// once under each of its names. Walk stops at fn's first error and returns it.
func (t *Tree) Walk(fn func(path string, n *Inode) error) error {
	if err := fn("/", t.Root); err != nil {
		return err
	}
	// A stack of its own, because the source decides how deep a tree is.
	type level struct {
		dir   *Inode
		path  string // ends with "/"
		names []string
	}
	stack := []level{{t.Root, "/", t.Root.Names()}}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if len(top.names) == 0 {
			stack = stack[:len(stack)-1]
			continue
		}
		name := top.names[0]
		top.names = top.names[1:]
		child, path := top.dir.Entries[name], top.path+name
		if err := fn(path, child); err != nil {
			return err
		}
		if child.IsDir() && len(child.Entries) > 0 {
			stack = append(stack, level{child, path + "/", child.Names()})
		}
	}
	return nil
}

// Lookup returns the inode at path, or nil if there is none. It follows no
// symlink: below one there is nothing. ".." leads to the parent directory and
// stays in the root.
func (t *Tree) Lookup(path string) *Inode {
	dirs := []*Inode{t.Root}
	components := strings.Split(path, "/")
	for i, c := range components {
		dir := dirs[len(dirs)-1]
		switch c {
		case "", ".":
			continue
		case "..":
			dirs = dirs[:max(1, len(dirs)-1)]
			continue
		}
		n := dir.Entries[c]
		switch {
		case n == nil:
			return nil
		case n.IsDir():
			dirs = append(dirs, n)
		case i == len(components)-1:
			return n
		default:
			return nil
		}
	}
	return dirs[len(dirs)-1]
}

// maxLinks is how many symlinks one path may lead through, as in Linux.
const maxLinks = 40

// ErrLoop says that a path leads through too many symlinks.
var ErrLoop = errors.New("too many levels of symlinks")

// Follow leads path through a root filesystem of any shape, as the kernel leads
// a process whose root directory is root, and returns where it ends. step
// enters one component: it returns what has that name in the directory dir, or
// the target of the symlink that is to be followed there. last says that
// nothing comes behind name. The first error of step ends the walk.
func Follow[T any](root T, path string, step func(dir T, name string, last bool) (next T, link string, err error)) (T, error) {
	var none T
	at := []T{root}
	links := 0
	for rest := path; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		next, link, err := step(at[len(at)-1], name, rest == "")
		if err != nil {
			return none, err
		}
		if link == "" {
			at = append(at, next)
			continue
		}
		if links++; links > maxLinks {
			return none, ErrLoop
		}
		if strings.HasPrefix(link, "/") {
			at = at[:1]
		}
		rest = link + "/" + rest
	}
	return at[len(at)-1], nil
}

// Resolve follows path through the symlinks of the tree, the last component
// included, as a process does whose root directory is t.Root. It returns the
// path without symlinks and the inode there, or "" and nil if path leads
// nowhere or round in circles.
func (t *Tree) Resolve(path string) (string, *Inode) {
	type place struct {
		path string // ends with "/"
		node *Inode
	}
	end, err := Follow(place{"/", t.Root}, path, func(dir place, name string, last bool) (next place, link string, err error) {
		n := dir.node.Entries[name]
		switch {
		case n == nil, !n.IsDir() && !n.IsSymlink() && !last:
			return place{}, "", fs.ErrNotExist
		case n.IsSymlink():
			link = n.Target
		}
		return place{dir.path + name + "/", n}, link, nil
	})
	if err != nil {
		return "", nil
	}
	if end.node == t.Root {
		return "/", t.Root
	}
	return strings.TrimSuffix(end.path, "/"), end.node
}
