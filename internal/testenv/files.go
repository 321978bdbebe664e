package testenv

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// denseSize is the size of the large file of the files image, in bytes.
const denseSize = 100 << 20

// ProbeGroups are the groups of calls of fsprobe.
var ProbeGroups = []string{
	"copyup", "writers", "rename", "renamedir", "whiteouts", "links", "sparse", "copying", "range", "direct", "mmap", "locks", "watches", "dirs",
	"times", "metadata", "ancient", "xattrs", "acls", "users", "special", "names", "exec", "many", "identity", "replaced", "statfs", "refused", "kernel",
}

// FilesImage returns an OCI layout with the small image, fsprobe in /bin and,
// below /trees, what its groups work on: files, directories, names, modes and
// attributes of every kind for each, a file of 100 MiB, 5,000 files in one
// directory.
func (c *Cache) FilesImage(ctx context.Context) (string, error) {
	busybox, applets, err := staticBusybox(ctx)
	if err != nil {
		return "", err
	}
	programs := map[string][]byte{}
	narrow := map[string]string{"amd64": "386", "arm64": "arm/v7"}[runtime.GOARCH]
	for name, of := range map[string]struct{ pkg, arch string }{
		"testapp": {"testapp", runtime.GOARCH}, "fsprobe": {"fsprobe", runtime.GOARCH}, "testapp32": {"testapp", narrow},
	} {
		if programs[name], err = c.compile(ctx, of.pkg, "linux/"+of.arch); err != nil {
			return "", err
		}
	}
	small := smallFiles(busybox, applets, programs["testapp"])
	var lower bytes.Buffer
	files := []entry{
		{name: "bin", typ: tar.TypeDir, mode: 0o755, mtime: made},
		{name: "bin/fsprobe", mode: 0o755, mtime: made, data: programs["fsprobe"]},
		{name: "trees", typ: tar.TypeDir, mode: 0o755, mtime: made},
	}
	for _, group := range ProbeGroups {
		files = append(files, probeFiles(group, programs)...)
	}
	if err := entries(files...)(&lower); err != nil {
		return "", err
	}
	return c.layout(ctx, "files-image", []imageSource{{
		platform: "linux/" + runtime.GOARCH,
		config:   v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/bin:/usr/bin:/bin"}},
		layers: []layerSource{
			{"busybox and files of every kind", entries(small...)},
			{"fsprobe and its files", func(w io.Writer) error { _, err := w.Write(lower.Bytes()); return err }},
			{"a large file", entries(
				entry{name: "trees", typ: tar.TypeDir, mode: 0o755, mtime: made},
				entry{name: "trees/copyup", typ: tar.TypeDir, mode: 0o755, mtime: made},
				entry{name: "trees/copyup/dense", mode: 0o644, mtime: made, data: lines(denseSize)},
			)},
		},
		recipe: fmt.Sprintf("%x %x %d", sha256.Sum256(busybox), sha256.Sum256(lower.Bytes()), denseSize),
	}})
}

// lines is size bytes of text, each line another one.
func lines(size int) []byte {
	b := make([]byte, 0, size+64)
	for i := 0; len(b) < size; i++ {
		b = fmt.Appendf(b, "line %d of a file that compresses well\n", i*2654435761)
	}
	return b[:size]
}

// probeFiles are what a group of fsprobe finds at /lower.
func probeFiles(group string, programs map[string][]byte) []entry {
	const needPrograms, needMany = "copyup users special exec", "whiteouts dirs"
	root := "trees/" + group
	dir := func(name string, mode int64) entry {
		return entry{name: root + "/" + name, typ: tar.TypeDir, mode: mode, mtime: made}
	}
	file := func(name string, mode int64, data []byte) entry {
		return entry{name: root + "/" + name, mode: mode, mtime: made, data: data}
	}
	symlink := func(name, target string) entry {
		return entry{name: root + "/" + name, typ: tar.TypeSymlink, mode: 0o777, link: target, mtime: made}
	}
	hard := func(name, to string) entry {
		return entry{name: root + "/" + name, typ: tar.TypeLink, mode: 0o644, link: root + "/" + to, mtime: made}
	}
	with := func(e entry, xattr, value string) entry {
		e.xattrs = map[string]string{xattr: value}
		return e
	}
	text := lines(20000)
	shared, theirs := file("group", 0o664, text), file("theirs", 0o644, text)
	shared.gid, theirs.uid = 50, SmallUser
	sticky := file("sticky/theirs", 0o666, text)
	setgid := dir("setgid", 0o2777)
	setgid.gid = 50
	old := file("old", 0o644, text)
	old.mtime = time.Unix(1e9, 123456789)
	ancient := file("ancient", 0o644, text)
	ancient.mtime = time.Unix(-86400*365*5, 0)

	all := []entry{
		{name: root, typ: tar.TypeDir, mode: 0o755, mtime: made},
		symlink("probe-link", "fsprobe"),
		file("script", 0o755, []byte("#!/bin/sh\necho \"$0: $# arguments: $*\"\n")),
		file("chain", 0o755, []byte("#!/lower/script option\n")),
		file("orphan", 0o755, []byte("#!/no/such/interpreter\n")),
		file("empty", 0o755, nil),
		file("text", 0o644, text),
		file("log", 0o644, []byte("the first line\n")),
		file("private", 0o600, text),
		dir("private-dir", 0o700),
		file("private-dir/inside", 0o644, text),
		shared, theirs, old, ancient, setgid,
		dir("sticky", 0o1777),
		sticky,
		symlink("symlink", "text"),
		symlink("loop", "loop"),
		symlink("long", strings.Repeat("t", 1000)),
		dir("dir", 0o755),
		file("dir/locked", 0o644, text),
		dir("dir/sub", 0o755),
		file("dir/sub/file", 0o644, text),
		dir("hard", 0o755),
		file("hard/a", 0o644, []byte("three names\n")),
		hard("hard/b", "hard/a"),
		dir("hard/sub", 0o755),
		hard("hard/sub/c", "hard/a"),
		dir("kinds", 0o755),
		{name: root + "/kinds/fifo", typ: tar.TypeFifo, mode: 0o620, gid: 5, mtime: made},
		{name: root + "/kinds/null", typ: tar.TypeChar, mode: 0o666, major: 1, minor: 3, mtime: made},
		symlink("kinds/symlink", "file"),
		file("kinds/file", 0o644, nil),
		dir("kinds/dir", 0o755),
		dir("xattrs", 0o755),
		with(file("xattrs/user", 0o644, text), "user.note", "kept"),
		with(file("xattrs/capability", 0o755, text), "security.capability", capability(13)),
		with(file("xattrs/acl", 0o640, text), "system.posix_acl_access", accessACL(33)),
		with(dir("xattrs/dir", 0o755), "user.of", "a directory"),
		dir("white", 0o755),
		file("white/file", 0o644, text),
		file("white/open", 0o644, text),
		symlink("white/link", "file"),
		dir("white/cwd", 0o755),
		dir("white/sub", 0o755),
		file("white/sub/inside", 0o644, text),
		dir("white/sub/deeper", 0o755),
		dir("rename", 0o755),
		dir("rename/dir", 0o755),
		file("rename/dir/inside", 0o644, text),
		dir("rename/empty", 0o755),
		dir("copy", 0o755),
		dir("names", 0o755),
		dir("many", 0o755),
	}
	for i := 1; i <= 9; i++ {
		all = append(all, file(fmt.Sprint("rename/", i), 0o644, fmt.Append(text, i)))
	}
	for _, name := range []string{"truncate to 0", "truncate to less", "truncate to more", "open with O_TRUNC", "write in the middle",
		"chmod", "chown", "chmod and write", "setxattr", "open for writing and nothing more"} {
		all = append(all, file("copy/"+name, 0o644, text))
	}
	for _, name := range []string{"\xff\xfe", "a\nb", " ", "-rf", "...", `\`, "é", strings.Repeat("n", 255)} {
		all = append(all, file("names/"+name, 0o644, []byte(name)))
	}
	deep := "deep"
	for range 19 {
		all = append(all, dir(deep, 0o755))
		deep += "/" + strings.Repeat("d", 200)
	}
	all = append(all, dir(deep, 0o755), file(deep+"/bottom", 0o644, []byte("deep")))
	if strings.Contains(needPrograms, group) {
		all = append(all, file("fsprobe", 0o755, programs["fsprobe"]), file("setuid", 0o4755, programs["fsprobe"]), file("testapp32", 0o755, programs["testapp32"]))
	}
	if group == "sparse" {
		all = append(all, file("holes", 0o644, slices.Concat(text, make([]byte, 16<<20), text)))
	}
	if strings.Contains(needMany, group) {
		for i := range 5000 {
			all = append(all, file(fmt.Sprintf("many/%05d", i), 0o644, nil))
		}
	}
	return all
}

// toolsPackages are those of the tools image above the base root.
var toolsPackages = []string{"iputils-ping", "sudo"}

// ToolsImage returns an OCI layout with a Debian root that has sudo and ping. It
// runs as user "app", who may become anybody with sudo; root's password is
// "secret".
func (c *Cache) ToolsImage(ctx context.Context) (string, error) {
	base, err := c.Root(ctx)
	if err != nil {
		return "", err
	}
	full, err := c.Root(ctx, toolsPackages...)
	if err != nil {
		return "", err
	}
	files := []entry{
		{name: "etc", typ: tar.TypeDir, mode: 0o755, mtime: made},
		{name: "etc/sudoers.d", typ: tar.TypeDir, mode: 0o755, mtime: made},
		{name: "etc/sudoers.d/app", mode: 0o440, mtime: made, data: []byte("app ALL=(ALL) NOPASSWD: ALL\n")},
	}
	for _, f := range []struct {
		name, more string
		mode       int64
	}{
		{"etc/passwd", "app:x:1000:1000::/:/bin/bash\n", 0o644},
		{"etc/group", "app:x:1000:\n", 0o644},
		{"etc/shadow", "app:*:19000:0:99999:7:::\n", 0o640},
	} {
		b, err := os.ReadFile(filepath.Join(full, f.name))
		if err != nil {
			return "", err
		}
		// Of "secret".
		b = bytes.Replace(b, []byte("root:*:"), []byte("root:$6$bootfs$nJtNxHCCJDmgTgdDXHE2Np5W8I9wlvllLNy7ZzqK6sGYeMLcood4gAO7nL/xCwwLUTu1IPSFYPfqyeHtee7IM1:"), 1)
		files = append(files, entry{name: f.name, mode: f.mode, mtime: made, data: append(b, f.more...)})
	}
	return c.layout(ctx, "tools-image", []imageSource{{
		platform: "linux/" + runtime.GOARCH,
		config:   v1.Config{Cmd: []string{"bash"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}, User: "app"},
		layers: []layerSource{
			{"debian root, minbase", func(w io.Writer) error { return diff(w, "", base) }},
			{"apt-get install " + strings.Join(toolsPackages, " "), func(w io.Writer) error { return diff(w, base, full) }},
			{"users", entries(files...)},
		},
		recipe: fmt.Sprintf("%s %s %v", base, full, files),
	}})
}
