package assembly

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
)

const (
	// maxSkeleton bounds the files of a boot image.
	maxSkeleton = 100_000
	// maxShipped bounds the bytes of the source's files that a boot image
	// carries; maxShippedFile those of one. What is larger is left to the root
	// image: nobody needs it before that is mounted.
	maxShipped     = 128 << 20
	maxShippedFile = 64 << 20
	// maxElsewhere bounds the links outside the directories on PATH. An image
	// has some 100 to 250 executables there; where every file is one, by its
	// mode, the rest is left out.
	maxElsewhere = 5_000
	// maxDirs bounds the directories that are entered for the engine to mount
	// something at: two or three levels of a Debian root.
	maxDirs = 500
)

// Files of the source that are read in the boot image, before or without its
// start: names in the engine's user lookup, the rest by scanners. A name that
// ends with "/*" stands for the files of that directory.
var shippedFiles = []string{
	"/etc/passwd", "/etc/group",
	"/etc/os-release", "/usr/lib/os-release", "/etc/lsb-release",
	"/etc/debian_version", "/etc/alpine-release", "/etc/redhat-release", "/etc/centos-release",
	"/var/lib/dpkg/status", "/var/lib/dpkg/status.d/*",
	"/lib/apk/db/installed", "/usr/lib/apk/db/installed",
	"/var/lib/rpm/*", "/usr/lib/sysimage/rpm/*",
}

// skeleton is what a boot image has of the source's tree.
type skeleton struct {
	src     *tree.Tree
	files   map[string]file // by path without symlinks, "/" excluded
	volumes []string        // declared ones, without symlinks
	linked  map[string]bool // directories whose executables are linked, without symlinks
	shipped int64           // bytes of the source's files
	marked  []string        // directories with a bootimage.VolumeMark, sorted
}

// newSkeleton takes from the source what engines, scanners and users look for
// in an image that does not run yet.
func newSkeleton(src *tree.Tree, c *v1.Config) (*skeleton, error) {
	if src.Lookup(bootimage.Dir) != nil {
		return nil, fmt.Errorf("the source has a %s: it is converted already", bootimage.Dir)
	}
	s := &skeleton{src: src, files: map[string]file{}, linked: map[string]bool{}}
	// Engines mount here, and refuse to where a symlink is.
	for _, name := range []string{"/proc", "/sys", "/dev", "/etc"} {
		f := file{mode: modeDir | 0o755}
		if n := src.Lookup(name); n != nil && n.IsDir() {
			f = fileOf(n)
		}
		s.add(name, f)
	}
	for v := range c.Volumes {
		if at, n := src.Resolve(v); n != nil {
			s.volumes = append(s.volumes, at)
			s.follow(v)
		}
	}
	// Mount points of volumes are mostly made at the top, and /bin or /lib
	// may be links there.
	for _, name := range src.Root.Names() {
		s.followDir("/" + name)
	}
	if _, n := src.Resolve("/var"); n != nil && n.IsDir() {
		for _, name := range n.Names() {
			if n.Entries[name].IsSymlink() {
				s.followDir("/var/" + name)
			}
		}
	}
	s.followDir(c.WorkingDir)
	for _, name := range shippedFiles {
		s.ship(name)
	}
	for _, name := range namedPaths(c) {
		s.link(name)
	}
	for _, dir := range strings.Split(searchPath(c), ":") {
		s.linkAll(dir)
		if len(s.files) > maxSkeleton {
			return nil, fmt.Errorf("PATH directory %.200q: the boot image would need more than %d files for its links", dir, maxSkeleton)
		}
	}
	s.linkElsewhere()
	s.addDirs()
	s.mark()
	return s, nil
}

// searchPath returns the PATH that the image's processes start with.
func searchPath(c *v1.Config) string {
	for _, e := range slices.Backward(c.Env) {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			return p
		}
	}
	return bootimage.DefaultPath
}

// namedPaths returns the paths that the image's commands name, absolute.
func namedPaths(c *v1.Config) []string {
	words := slices.Concat(c.Entrypoint, c.Cmd)
	if h := c.Healthcheck; h != nil && len(h.Test) > 0 {
		switch h.Test[0] {
		case "CMD":
			words = append(words, h.Test[1:]...)
		case "CMD-SHELL":
			shell := c.Shell
			if len(shell) == 0 {
				shell = []string{"/bin/sh"}
			}
			words = slices.Concat(words, shell, h.Test[1:])
		}
	}
	var paths []string
	for _, arg := range words {
		for _, w := range strings.FieldsFunc(arg, isShellSpace) {
			if !strings.Contains(w, "/") {
				continue // found on PATH
			}
			if !path.IsAbs(w) {
				w = path.Join("/", c.WorkingDir, w)
			}
			paths = append(paths, w)
		}
	}
	return paths
}

// isShellSpace tells the characters that end a word in a shell's command.
func isShellSpace(r rune) bool { return strings.ContainsRune(" \t\n;&|()<>'\"`$", r) }

// add enters a file, unless the place is taken.
func (s *skeleton) add(at string, f file) {
	if _, ok := s.files[at]; !ok {
		s.files[at] = f
	}
}

// follow enters the directories and symlinks through which name leads, as they
// are in the source; none if name leads to nothing.
func (s *skeleton) follow(name string) {
	if _, end := s.src.Resolve(name); end == nil {
		return
	}
	type place struct {
		path string
		node *tree.Inode
	}
	// Resolve has found that no step fails.
	_, _ = tree.Follow(place{"/", s.src.Root}, name, func(dir place, base string, _ bool) (next place, link string, err error) {
		next = place{path.Join(dir.path, base), dir.node.Entries[base]}
		if next.node.IsDir() || next.node.IsSymlink() {
			s.add(next.path, fileOf(next.node))
		}
		return next, next.node.Target, nil
	})
}

// followDir is follow for what leads to a directory; other paths are ignored.
func (s *skeleton) followDir(name string) {
	if _, n := s.src.Resolve(name); n != nil && n.IsDir() {
		s.follow(name)
	}
}

// ship enters a file of the source with its content.
func (s *skeleton) ship(name string) {
	if dir, ok := strings.CutSuffix(name, "/*"); ok {
		if _, n := s.src.Resolve(dir); n != nil && n.IsDir() {
			for _, base := range n.Names() {
				s.ship(dir + "/" + base)
			}
		}
		return
	}
	at, n := s.src.Resolve(name)
	if n == nil || !n.IsRegular() || n.Size > maxShippedFile || s.shipped+n.Size > maxShipped {
		return
	}
	s.follow(name)
	if _, ok := s.files[at]; !ok {
		s.shipped += n.Size
		s.add(at, fileOf(n))
	}
}

// linkAll links the executables of a directory on PATH to boot.
func (s *skeleton) linkAll(dir string) {
	if !path.IsAbs(dir) {
		return
	}
	at, n := s.src.Resolve(dir)
	if n == nil || !n.IsDir() || s.inVolume(at) {
		return
	}
	s.follow(dir)
	if s.linked[at] {
		return
	}
	s.linked[at] = true
	for _, name := range namesOf(n, mayRun) {
		if len(s.files) > maxSkeleton {
			return
		}
		s.link(path.Join(at, name))
	}
}

// linkElsewhere links the executables that are not on PATH, those in the upper
// directories first, and enters the symlinks that lead to their directories.
// The mode alone tells what is executable: a look into each file would read
// layers that a conversion has no other need of.
func (s *skeleton) linkElsewhere() {
	type dir struct {
		path string
		node *tree.Inode
	}
	var links []string // symlinks to directories
	left := maxElsewhere
	for queue := []dir{{"/", s.src.Root}}; len(queue) > 0; queue = queue[1:] {
		d := queue[0]
		if s.inVolume(d.path) {
			continue
		}
		for _, name := range namesOf(d.node, func(n *tree.Inode) bool { return n.IsDir() || mayRun(n) }) {
			at, n := path.Join(d.path, name), d.node.Entries[name]
			if n.IsDir() {
				queue = append(queue, dir{at, n})
				continue
			}
			if n.IsSymlink() {
				if _, end := s.src.Resolve(at); end != nil && end.IsDir() {
					links = append(links, at)
					continue
				}
			}
			before := len(s.files)
			if left > 0 && before < maxSkeleton {
				s.link(at)
			}
			if len(s.files) > before {
				left--
			}
		}
	}
	for _, name := range links {
		if at, _ := s.src.Resolve(name); s.files[at].mode&modeType == modeDir {
			s.follow(name)
		}
	}
}

// namesOf returns the names of those entries of dir that keep accepts, sorted
// bytewise. They are few where dir has a million.
func namesOf(dir *tree.Inode, keep func(*tree.Inode) bool) []string {
	var names []string
	for name, n := range dir.Entries {
		if keep(n) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// mayRun reports whether n is an executable or a symlink, which may lead to one.
func mayRun(n *tree.Inode) bool {
	return n.IsSymlink() || n.IsRegular() && n.Mode&0o111 != 0
}

// link puts a link to boot at the place of an executable, so that boot is what
// starts when the engine is told to run that.
func (s *skeleton) link(name string) {
	resolved, n := s.src.Resolve(name)
	if n == nil || !n.IsRegular() || n.Mode&0o111 == 0 || isLibrary(name) || isLibrary(resolved) {
		return
	}
	dir, _ := s.src.Resolve(path.Dir(name))
	at := path.Join(dir, path.Base(name))
	if s.inVolume(at) {
		return
	}
	s.follow(path.Dir(name))
	s.add(at, file{mode: modeRegular | 0o4755, linkTo: bootimage.LinkPath})
}

// inVolume reports whether a path lies in a declared volume: engines would
// copy a link there into the volume, where it outlives the container.
func (s *skeleton) inVolume(at string) bool {
	return slices.ContainsFunc(s.volumes, func(v string) bool {
		return at == v || v == "/" || strings.HasPrefix(at, v+"/")
	})
}

// addDirs enters directories, the upper ones first. An engine that mounts a
// tmpfs at one gives it its mode, and copies it into a new volume.
func (s *skeleton) addDirs() {
	type dir struct {
		path string
		node *tree.Inode
	}
	left := maxDirs
	for queue := []dir{{"/", s.src.Root}}; len(queue) > 0 && left > 0; queue = queue[1:] {
		d := queue[0]
		for _, name := range namesOf(d.node, (*tree.Inode).IsDir) {
			at, n := path.Join(d.path, name), d.node.Entries[name]
			if s.inVolume(path.Dir(at)) {
				continue
			}
			switch at {
			case "/proc", "/sys", "/dev":
				continue
			}
			if left--; left < 0 || len(s.files) >= maxSkeleton {
				return
			}
			s.add(at, fileOf(n))
			queue = append(queue, dir{at, n})
		}
	}
}

// mark puts the mark into the directories that are not all of what the source
// has there: an engine that copies one of them into a volume copies the mark.
func (s *skeleton) mark() {
	for _, at := range slices.Sorted(maps.Keys(s.files)) {
		switch at {
		case "/proc", "/sys", "/dev":
			continue
		}
		n := s.src.Lookup(at)
		if s.files[at].mode&modeType != modeDir || n == nil || len(n.Entries) == 0 && len(n.Xattrs) == 0 || n.Entries[bootimage.VolumeMark] != nil {
			continue
		}
		s.marked = append(s.marked, at)
	}
	for _, at := range s.marked {
		s.add(path.Join(at, bootimage.VolumeMark), file{mode: modeDir | 0o700})
	}
}

// library matches shared objects and the dynamic loaders among them, which are
// executable here and there: boot in their place would run where code is
// merely loaded.
var library = regexp.MustCompile(`\.so(\.[0-9]+)*$`)

func isLibrary(name string) bool { return library.MatchString(path.Base(name)) }
