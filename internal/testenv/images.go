package testenv

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// Tag is the name of the one image, or index, in a layout made here.
const Tag = "latest"

// AppUser is the uid and gid of the user "app", whom the Python image runs as.
const AppUser = 1000

// made is the time that images made here carry. It is fixed, so that the same
// parts give the same digests.
var made = time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)

var (
	//go:embed app/main.py
	mainPy []byte
	//go:embed app/entrypoint
	entrypoint []byte
)

// The Python image's layers above the base root, as sets of Debian packages.
var (
	pythonPackages = []string{"python3", "ca-certificates"}
	morePackages   = []string{"python3-numpy", "python3-requests", "python3-cryptography"}
)

// PythonImage returns an OCI layout with an image as people build them: a
// Debian root, python3 on it, more packages on that, and an application layer
// with whiteouts, an opaque directory, a setuid program, file capabilities, an
// ACL, hard links, a device, a FIFO and a file with a time in nanoseconds.
// Each layer of packages is the real difference of two roots.
//
// It runs as user "app" in /app; its entrypoint is a script that becomes the
// command, /app/main.py by default, which prints "ok" as its last line.
func (c *Cache) PythonImage(ctx context.Context) (string, error) {
	return c.pythonImage(ctx, "python-image", morePackages, mainPy)
}

// PythonImageNext returns the same image a version later: one more package is
// installed, and the application has a new line.
func (c *Cache) PythonImageNext(ctx context.Context) (string, error) {
	packages := append(slices.Clone(morePackages), "python3-yaml")
	return c.pythonImage(ctx, "python-image-next", packages, append(slices.Clone(mainPy), "# The second version.\n"...))
}

func (c *Cache) pythonImage(ctx context.Context, name string, packages []string, program []byte) (string, error) {
	base, err := c.Root(ctx)
	if err != nil {
		return "", err
	}
	python, err := c.Root(ctx, pythonPackages...)
	if err != nil {
		return "", err
	}
	full, err := c.Root(ctx, slices.Concat(pythonPackages, packages)...)
	if err != nil {
		return "", err
	}
	testapp, err := c.compile(ctx, "testapp", "linux/"+runtime.GOARCH)
	if err != nil {
		return "", err
	}
	var app bytes.Buffer
	if err := writeAppLayer(&app, full, program, testapp); err != nil {
		return "", err
	}
	config := v1.Config{
		Entrypoint: []string{"/usr/local/bin/entrypoint"},
		Cmd:        []string{"python3", "/app/main.py"},
		Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"LANG=C.UTF-8",
			"APP_NAME=bootfs test",
		},
		WorkingDir: "/app",
		User:       "app",
		Labels:     map[string]string{"org.opencontainers.image.title": "Python on Debian, with an application"},
	}
	layers := []layerSource{
		{"debian root, minbase", func(w io.Writer) error { return diff(w, "", base) }},
		{"apt-get install " + strings.Join(pythonPackages, " "), func(w io.Writer) error { return diff(w, base, python) }},
		{"apt-get install " + strings.Join(packages, " "), func(w io.Writer) error { return diff(w, python, full) }},
		{"the application", func(w io.Writer) error { _, err := w.Write(app.Bytes()); return err }},
	}
	return c.layout(ctx, name, []imageSource{{
		platform: "linux/" + runtime.GOARCH,
		config:   config,
		layers:   layers,
		recipe:   fmt.Sprintf("%s %s %s %x", base, python, full, sha256.Sum256(app.Bytes())),
	}})
}

// ScratchImage returns an OCI layout with a small image that holds one static
// program, [testapp] as /testapp, and /etc/passwd. Several platforms make an
// index. The default is the machine's platform.
func (c *Cache) ScratchImage(ctx context.Context, platforms ...string) (string, error) {
	if len(platforms) == 0 {
		platforms = []string{"linux/" + runtime.GOARCH}
	}
	var images []imageSource
	for _, p := range platforms {
		testapp, err := c.compile(ctx, "testapp", p)
		if err != nil {
			return "", err
		}
		images = append(images, imageSource{
			platform: p,
			config: v1.Config{
				Entrypoint: []string{"/testapp"},
				Env:        []string{"PATH=/"},
				WorkingDir: "/",
			},
			layers: []layerSource{
				{"users", entries(
					entry{name: "etc", typ: tar.TypeDir, mode: 0o755, mtime: made},
					entry{name: "etc/passwd", mode: 0o644, mtime: made, data: []byte("root:x:0:0::/:/testapp\napp:x:1000:1000::/:/testapp\n")},
					entry{name: "etc/group", mode: 0o644, mtime: made, data: []byte("root:x:0:\napp:x:1000:\n")},
				)},
				{"program", entries(entry{name: "testapp", mode: 0o755, mtime: made, data: testapp})},
			},
			recipe: fmt.Sprintf("%x", sha256.Sum256(testapp)),
		})
	}
	return c.layout(ctx, "scratch-image", images)
}

// RootImage returns an OCI layout with an image whose one layer is a root that is
// in the cache.
func (c *Cache) RootImage(ctx context.Context, root string) (string, error) {
	return c.layout(ctx, filepath.Base(root), []imageSource{{
		platform: "linux/" + runtime.GOARCH,
		config:   v1.Config{Cmd: []string{"sh"}},
		layers:   []layerSource{{"debian root", func(w io.Writer) error { return diff(w, "", root) }}},
		recipe:   root,
	}})
}

// Push copies the one image or index of an OCI layout to a registry.
func Push(ctx context.Context, layoutDir, ref string) error {
	to, err := name.ParseReference(ref)
	if err != nil {
		return err
	}
	p, err := layout.FromPath(layoutDir)
	if err != nil {
		return err
	}
	root, err := p.ImageIndex()
	if err != nil {
		return err
	}
	m, err := root.IndexManifest()
	if err != nil {
		return err
	}
	if len(m.Manifests) != 1 {
		return fmt.Errorf("push %s: got %d manifests in its index.json, want 1", layoutDir, len(m.Manifests))
	}
	d := m.Manifests[0]
	if d.MediaType.IsIndex() {
		index, err := root.ImageIndex(d.Digest)
		if err != nil {
			return err
		}
		return remote.WriteIndex(to, index, remote.WithContext(ctx))
	}
	image, err := root.Image(d.Digest)
	if err != nil {
		return err
	}
	return remote.Write(to, image, remote.WithContext(ctx))
}

// imageSource is what an image is made of.
type imageSource struct {
	platform string
	config   v1.Config
	layers   []layerSource // bottom first
	recipe   string        // tells two sources with different layers apart
}

type layerSource struct {
	history string
	write   func(w io.Writer) error // writes the plain tar stream
}

func diff(w io.Writer, old, new string) error {
	l := newLayerWriter(w)
	return errors.Join(l.addDiff(old, new), l.close())
}

func entries(es ...entry) func(io.Writer) error {
	return func(w io.Writer) error {
		l := newLayerWriter(w)
		for _, e := range es {
			if err := l.add(e); err != nil {
				return err
			}
		}
		return l.close()
	}
}

// layout returns a cached OCI layout of the images.
func (c *Cache) layout(ctx context.Context, name string, images []imageSource) (string, error) {
	recipe := "layout 1\n"
	for _, s := range images {
		config, err := json.Marshal(s.config)
		if err != nil {
			return "", err
		}
		recipe += fmt.Sprintf("%s %s %s\n", s.platform, config, s.recipe)
	}
	return c.entry(name, recipe, func(tmp string) error {
		c.say("making an image: %s", name)
		p, err := layout.Write(tmp, empty.Index)
		if err != nil {
			return err
		}
		tag := layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": Tag})
		index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
		for _, s := range images {
			image, done, err := s.build(ctx, c.Dir)
			if err != nil {
				return err
			}
			defer done()
			if len(images) == 1 {
				return p.AppendImage(image, tag)
			}
			platform, err := v1.ParsePlatform(s.platform)
			if err != nil {
				return err
			}
			index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: platform}})
		}
		return p.AppendIndex(index, tag)
	})
}

// build makes the image. Its layers lie in temporary files below dir until
// done is called.
func (s imageSource) build(ctx context.Context, dir string) (image v1.Image, done func() error, err error) {
	tmp, err := os.MkdirTemp(dir, "layers-")
	if err != nil {
		return nil, nil, err
	}
	done = func() error { return os.RemoveAll(tmp) }
	defer func() {
		if err != nil {
			err = errors.Join(err, done())
		}
	}()
	platform, err := v1.ParsePlatform(s.platform)
	if err != nil {
		return nil, nil, err
	}
	image = mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	if image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: platform.OS, Architecture: platform.Architecture, Variant: platform.Variant,
		Created: v1.Time{Time: made}, Config: s.config,
		RootFS: v1.RootFS{Type: "layers"},
	}); err != nil {
		return nil, nil, err
	}
	for i, l := range s.layers {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		path := filepath.Join(tmp, fmt.Sprint(i))
		if err := writeGzip(path, l.write); err != nil {
			return nil, nil, fmt.Errorf("layer %q: %w", l.history, err)
		}
		layer, err := tarball.LayerFromFile(path, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, nil, fmt.Errorf("layer %q: %w", l.history, err)
		}
		if image, err = mutate.Append(image, mutate.Addendum{
			Layer: layer, History: v1.History{Created: v1.Time{Time: made}, CreatedBy: l.history},
		}); err != nil {
			return nil, nil, err
		}
	}
	return image, done, nil
}

func writeGzip(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	z := gzip.NewWriter(f)
	return errors.Join(write(z), z.Close(), f.Close())
}

// writeAppLayer writes the Python image's top layer with program as /app/main.py;
// root is what it lies on.
func writeAppLayer(w io.Writer, root string, program, testapp []byte) error {
	passwd, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
	if err != nil {
		return err
	}
	group, err := os.ReadFile(filepath.Join(root, "etc/group"))
	if err != nil {
		return err
	}
	passwd = append(passwd, fmt.Sprintf("app:x:%d:%d::/app:/bin/sh\n", AppUser, AppUser)...)
	group = append(group, fmt.Sprintf("app:x:%d:\n", AppUser)...)

	const netRaw = 13 // CAP_NET_RAW
	dir := func(name string, owner int) entry {
		return entry{name: name, typ: tar.TypeDir, mode: 0o755, uid: owner, gid: owner, mtime: made}
	}
	return entries( // with every parent: see addParents
		dir("app", AppUser),
		entry{name: "app/main.py", mode: 0o644, uid: AppUser, gid: AppUser, mtime: made, data: program},
		dir("app/data", AppUser),
		entry{name: "app/data/notes.txt", mode: 0o640, uid: AppUser, gid: AppUser, mtime: made.Add(123456789),
			data: []byte("a time in nanoseconds, and one more reader\n"), xattrs: map[string]string{"system.posix_acl_access": accessACL(33), "user.note": "kept"}},
		entry{name: "app/data/same.txt", typ: tar.TypeLink, link: "app/data/notes.txt", mode: 0o640, uid: AppUser, gid: AppUser, mtime: made.Add(123456789)},
		entry{name: "app/data/" + strings.Repeat("n", 255), mode: 0o600, uid: AppUser, gid: AppUser, mtime: made, data: []byte("the longest name\n")},
		entry{name: "app/data/old", mode: 0o644, mtime: time.Unix(-86400, 0), data: []byte("from before 1970\n")},
		entry{name: "app/current", typ: tar.TypeSymlink, link: "data", mode: 0o777, uid: AppUser, gid: AppUser, mtime: made},
		entry{name: "app/pipe", typ: tar.TypeFifo, mode: 0o620, uid: AppUser, gid: 5, mtime: made},
		entry{name: "app/null", typ: tar.TypeChar, mode: 0o666, major: 1, minor: 3, mtime: made},
		entry{name: "app/shared", typ: tar.TypeDir, mode: 0o3775, gid: AppUser, mtime: made},

		dir("etc", 0),
		entry{name: "etc/passwd", mode: 0o644, mtime: made, data: passwd},
		entry{name: "etc/group", mode: 0o644, mtime: made, data: group},
		entry{name: "etc/.wh.issue.net"},

		dir("usr", 0),
		dir("usr/local", 0),
		dir("usr/local/bin", 0),
		entry{name: "usr/local/bin/entrypoint", mode: 0o755, mtime: made, data: entrypoint},
		entry{name: "usr/local/bin/testapp", mode: 0o755, mtime: made, data: testapp},
		entry{name: "usr/local/bin/testapp-again", typ: tar.TypeLink, link: "usr/local/bin/testapp", mode: 0o755, mtime: made},
		entry{name: "usr/local/bin/testapp-setuid", mode: 0o4755, mtime: made, data: testapp},
		entry{name: "usr/local/bin/testapp-netraw", mode: 0o755, mtime: made, data: testapp, xattrs: map[string]string{"security.capability": capability(netRaw)}},

		dir("usr/share", 0),
		entry{name: "usr/share/.wh.man"},
		dir("usr/share/doc", 0),
		entry{name: "usr/share/doc/.wh..wh..opq"},
		entry{name: "usr/share/doc/README", mode: 0o644, mtime: made, data: []byte("The documentation was removed.\n")},
	)(w)
}

// compile returns the static program of a package below this one, for a
// platform.
func (c *Cache) compile(ctx context.Context, pkg, platform string) ([]byte, error) {
	p, err := v1.ParsePlatform(platform)
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "bootfs-"+pkg+"-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, pkg)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w",
		"-o", bin, "github.com/container-bootfs/bootfs/internal/testenv/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Architecture)
	if p.Architecture == "arm" {
		cmd.Env = append(cmd.Env, "GOARM="+strings.TrimPrefix(p.Variant, "v"))
	}
	if _, err := output(cmd); err != nil {
		return nil, err
	}
	return os.ReadFile(bin)
}
