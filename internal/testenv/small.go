package testenv

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Users of the small image beside root and nobody. The first two have further
// groups.
const (
	SmallUser   = 1000 // "app", of group app, in audio and staff too; home /home/app
	SmallMember = 1001 // "joe", of group users, in audio too; his home is missing
)

const (
	smallPasswd = `root:x:0:0:root:/root:/bin/sh
app:x:1000:1000:the application:/home/app:/bin/sh
joe:x:1001:100::/home/joe:/bin/sh
42:x:1042:1042:a user with a number for a name:/:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
`
	smallGroup = `root:x:0:
audio:x:29:app,joe
staff:x:50:app
users:x:100:
app:x:1000:
wheel:x:1010:root
nogroup:x:65534:
`
)

// SmallImage returns an OCI layout with a small image with config, named
// name in the cache: busybox with a link for each applet in /bin, [testapp] in
// /bin and with other modes elsewhere, users, and files of every kind. Images
// with other configurations share its layer.
//
//	/opt/tools        executables outside PATH: scripts of every kind, a link, what cannot be run
//	/opt/current      a link to tools; /opt/absolute, /opt/relative and /opt/dangling lead to files
//	/srv              directories with setgid and sticky bits, owners and links
//	/vol              content for volumes
func (c *Cache) SmallImage(ctx context.Context, name string, config v1.Config) (string, error) {
	busybox, applets, err := staticBusybox(ctx)
	if err != nil {
		return "", err
	}
	testapp, err := c.compile(ctx, "testapp", "linux/"+runtime.GOARCH)
	if err != nil {
		return "", err
	}
	files := smallFiles(busybox, applets, testapp)
	var layer bytes.Buffer
	if err := entries(files...)(&layer); err != nil {
		return "", err
	}
	return c.layout(ctx, "small-"+name, []imageSource{{
		platform: "linux/" + runtime.GOARCH,
		config:   config,
		layers:   []layerSource{{"busybox and files of every kind", entries(files...)}},
		recipe:   fmt.Sprintf("%x", sha256.Sum256(layer.Bytes())),
	}})
}

// staticBusybox returns the machine's busybox and the names of its applets.
func staticBusybox(ctx context.Context) (program []byte, applets []string, err error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, nil, err
	}
	if program, err = os.ReadFile(path); err != nil {
		return nil, nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, nil, fmt.Errorf("%s needs libraries: install the package busybox-static", path)
		}
	}
	list, err := run(ctx, path, "--list")
	if err != nil {
		return nil, nil, err
	}
	return program, strings.Fields(string(list)), nil
}

func smallFiles(busybox []byte, applets []string, testapp []byte) []entry {
	dir := func(name string, mode int64, owner ...int) entry {
		e := entry{name: name, typ: tar.TypeDir, mode: mode, mtime: made}
		if len(owner) == 2 {
			e.uid, e.gid = owner[0], owner[1]
		}
		return e
	}
	file := func(name string, mode int64, text string, owner ...int) entry {
		e := dir(name, mode, owner...)
		e.typ, e.data = 0, []byte(text)
		return e
	}
	link := func(name, target string) entry {
		return entry{name: name, typ: tar.TypeSymlink, mode: 0o777, link: target, mtime: made}
	}
	const netRaw = 13 // CAP_NET_RAW
	withCapability := file("bin/testapp-netraw", 0o755, string(testapp))
	withCapability.xattrs = map[string]string{"security.capability": capability(netRaw)}
	noted := file("vol/full/noted", 0o640, "with an attribute\n", SmallUser, SmallUser)
	noted.xattrs = map[string]string{"user.note": "kept"}

	const script = "#!/bin/sh\necho \"$0: $# arguments: $*\"\n"
	files := []entry{
		dir("bin", 0o755),
		file("bin/busybox", 0o755, string(busybox)),
		file("bin/testapp", 0o755, string(testapp)),
		file("bin/testapp-setuid", 0o4755, string(testapp)),
		withCapability,

		dir("etc", 0o755),
		file("etc/passwd", 0o644, smallPasswd),
		file("etc/group", 0o644, smallGroup),
		file("etc/shadow", 0o640, "root:*:19000:0:99999:7:::\n", 0, 42),
		file("etc/os-release", 0o644, "ID=small\nPRETTY_NAME=\"A small system\"\n"),

		dir("home", 0o755),
		dir("home/app", 0o750, SmallUser, SmallUser),
		file("home/app/notes", 0o600, "private\n", SmallUser, SmallUser),

		dir("opt", 0o755),
		dir("opt/tools", 0o755),
		file("opt/tools/script", 0o755, script),
		file("opt/tools/option", 0o755, "#!/bin/busybox sh\necho \"option: $0: $*\"\n"),
		file("opt/tools/plain", 0o755, "echo a script without a first line\n"),
		file("opt/tools/orphan", 0o755, "#!/no/such/interpreter\n"),
		file("opt/tools/text", 0o644, script),
		file("opt/tools/rootonly", 0o700, script),
		file("opt/tools/empty", 0o755, ""),
		file("opt/tools/program", 0o755, string(testapp)),
		file("opt/tools/libtool.so", 0o755, string(testapp)),
		link("opt/tools/link", "script"),
		dir("opt/tools/bin", 0o755),
		file("opt/tools/bin/deep", 0o755, script),
		dir("opt/private", 0o700),
		file("opt/private/script", 0o755, script),
		link("opt/current", "tools"),
		link("opt/absolute", "/opt/tools/script"),
		link("opt/relative", "tools/script"),
		link("opt/dangling", "/no/such/file"),
		link("opt/loop", "loop"),

		dir("proc", 0o755),
		dir("root", 0o700),
		file("root/secret", 0o600, "root's\n"),

		dir("srv", 0o755),
		dir("srv/shared", 0o2775, 0, 50),
		dir("srv/closed", 0o700),
		dir("srv/app", 0o755, SmallUser, SmallUser),
		file("srv/app/data", 0o664, "data\n", SmallUser, SmallUser),
		link("srv/current", "app"),
		link("srv/out", "/srv/app"),
		dir("sys", 0o755),
		dir("tmp", 0o1777),
		dir("usr", 0o755),
		dir("usr/bin", 0o755),
		link("usr/bin/env", "/bin/env"),
		dir("usr/lib", 0o755),
		dir("var", 0o755),
		dir("var/cache", 0o755),
		link("var/run", "../run"),
		dir("run", 0o755),

		dir("vol", 0o755),
		dir("vol/empty", 0o1770, SmallUser, 50),
		dir("vol/full", 0o750, SmallUser, SmallUser),
		file("vol/full/file", 0o640, "content\n", SmallUser, SmallUser),
		{name: "vol/full/again", typ: tar.TypeLink, link: "vol/full/file", mode: 0o640, uid: SmallUser, gid: SmallUser, mtime: made},
		noted,
		link("vol/full/link", "file"),
		dir("vol/full/sub", 0o2755, SmallUser, 50),
		file("vol/full/sub/run", 0o755, script),
		link("vol/link", "full"),
	}
	for _, name := range applets {
		if name != "busybox" && !slices.ContainsFunc(files, func(e entry) bool { return e.name == "bin/"+name }) {
			files = append(files, link("bin/"+name, "busybox"))
		}
	}
	return files
}
