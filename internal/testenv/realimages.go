package testenv

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/rogpeppe/go-internal/txtar"
)

// realFiles has the top layer of each real image: NAME.txtar.
//
//go:embed real/*.txtar
var realFiles embed.FS

// realImage is how an image that people run is made of Debian's packages.
type realImage struct {
	packages []string
	config   v1.Config
	owned    map[string]string // directories of the top layer: who they belong to
	links    map[string]string // symlinks of the top layer: their targets
	removed  []string          // what the top layer removes
}

// realPath is the PATH of the official images.
const realPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// realImages are made after the official images of Docker Hub: the same
// entrypoints, users, volumes, ports, signals.
var realImages = map[string]realImage{
	"python": {
		packages: pythonPackages,
		config:   v1.Config{Cmd: []string{"python3"}, Env: []string{realPath, "LANG=C.UTF-8"}, WorkingDir: "/app"},
	},
	"node": {
		packages: []string{"nodejs"},
		config: v1.Config{
			Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"server.js"},
			Env: []string{realPath, "NODE_ENV=production"}, WorkingDir: "/app", User: "www-data",
			ExposedPorts: map[string]struct{}{"8080/tcp": {}},
		},
	},
	"java": {
		packages: []string{"openjdk-17-jdk-headless"},
		config: v1.Config{
			Cmd:        []string{"jshell"},
			Env:        []string{"JAVA_HOME=/usr/lib/jvm/java-17-openjdk-amd64", realPath, "LANG=C.UTF-8"},
			WorkingDir: "/app",
		},
	},
	"postgres": {
		packages: []string{"postgresql-15", "gosu"},
		config: v1.Config{
			Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"postgres"},
			Env:          []string{realPath + ":/usr/lib/postgresql/15/bin", "PGDATA=/var/lib/postgresql/data", "LANG=C.UTF-8"},
			Volumes:      map[string]struct{}{"/var/lib/postgresql/data": {}},
			ExposedPorts: map[string]struct{}{"5432/tcp": {}},
			StopSignal:   "SIGINT",
			Healthcheck:  &v1.HealthConfig{Test: []string{"CMD-SHELL", "pg_isready --quiet --host=127.0.0.1 --username=postgres"}, Interval: time.Second},
		},
		owned:   map[string]string{"var/lib/postgresql/data": "postgres", "run/postgresql": "postgres"},
		removed: []string{"var/lib/postgresql/15", "etc/postgresql/15"}, // the cluster that Debian's package makes
	},
	"nginx": {
		packages: []string{"nginx-light", "gettext-base", "curl"},
		config: v1.Config{
			Entrypoint: []string{"/docker-entrypoint.sh"}, Cmd: []string{"nginx", "-g", "daemon off;"},
			Env:          []string{realPath, "PORT=80"},
			ExposedPorts: map[string]struct{}{"80/tcp": {}},
			StopSignal:   "SIGQUIT",
			Healthcheck:  &v1.HealthConfig{Test: []string{"CMD-SHELL", "curl --silent --fail http://127.0.0.1:$PORT/ >/dev/null"}, Interval: time.Second},
		},
		links: map[string]string{"var/log/nginx/access.log": "/dev/stdout", "var/log/nginx/error.log": "/dev/stderr"},
	},
	"redis": {
		packages: []string{"redis-server", "gosu"},
		config: v1.Config{
			Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"redis-server"},
			Env: []string{realPath}, WorkingDir: "/data",
			Volumes:      map[string]struct{}{"/data": {}},
			ExposedPorts: map[string]struct{}{"6379/tcp": {}},
		},
		owned: map[string]string{"data": "redis"},
	},
	"ruby": {
		packages: []string{"ruby"},
		config:   v1.Config{Cmd: []string{"irb"}, Env: []string{realPath, "LANG=C.UTF-8"}, WorkingDir: "/app"},
	},
	"perl": {
		packages: []string{"perl"},
		config:   v1.Config{Cmd: []string{"perl", "-de0"}, Env: []string{realPath}, WorkingDir: "/app"},
	},
	"go": {
		packages: []string{"golang-go", "gcc", "libc6-dev"},
		config:   v1.Config{Cmd: []string{"bash"}, Env: []string{"GOPATH=/go", "PATH=/go/bin:" + strings.TrimPrefix(realPath, "PATH=")}, WorkingDir: "/go"},
		owned:    map[string]string{"go/bin": "root", "go/src": "root"},
	},
	"static": {
		config: v1.Config{Entrypoint: []string{"/webapp"}, Env: []string{"PATH=/"}, User: "65532:65532", WorkingDir: "/"},
	},
}

// RealImageNames are what [Cache.RealImage] makes.
var RealImageNames = []string{"postgres", "nginx", "perl", "python", "node", "java", "redis", "ruby", "go", "static"}

// RealImage returns an OCI layout with an image as people run it: python,
// node, java, postgres, nginx, redis, ruby, perl and go are a Debian root, the
// packages that the name says, and what real/NAME.txtar adds; static is one
// program and nothing else.
func (c *Cache) RealImage(ctx context.Context, name string) (string, error) {
	image, ok := realImages[name]
	if !ok {
		return "", fmt.Errorf("no image is called %q", name)
	}
	source := imageSource{platform: "linux/" + runtime.GOARCH, config: image.config}
	if name == "static" {
		program, err := c.compile(ctx, "webapp", source.platform)
		if err != nil {
			return "", err
		}
		source.layers = []layerSource{{"program", entries(entry{name: "webapp", mode: 0o755, mtime: made, data: program})}}
		source.recipe = fmt.Sprintf("%x", sha256.Sum256(program))
		return c.layout(ctx, "static-image", []imageSource{source})
	}
	archive, err := realFiles.ReadFile("real/" + name + ".txtar")
	if err != nil {
		return "", err
	}
	files := map[string][]byte{}
	for _, f := range txtar.Parse(archive).Files {
		files[f.Name] = f.Data
	}
	return c.packagesImage(ctx, name, image, files)
}

// PackagesImage returns an OCI layout with an image of three layers: a Debian
// root, packages on it, and files by their paths, of which those that begin with
// "#!" or as an ELF file can be executed. Without packages, the files are all.
func (c *Cache) PackagesImage(ctx context.Context, name string, packages []string, files map[string][]byte, config v1.Config) (string, error) {
	return c.packagesImage(ctx, name, realImage{packages: packages, config: config}, files)
}

func (c *Cache) packagesImage(ctx context.Context, name string, image realImage, files map[string][]byte) (string, error) {
	source := imageSource{platform: "linux/" + runtime.GOARCH, config: image.config}
	var base, full string
	if len(image.packages) > 0 {
		var err error
		if base, err = c.Root(ctx); err != nil {
			return "", err
		}
		if full, err = c.Root(ctx, image.packages...); err != nil {
			return "", err
		}
		source.layers = []layerSource{
			{"debian root, minbase", func(w io.Writer) error { return diff(w, "", base) }},
			{"apt-get install " + strings.Join(image.packages, " "), func(w io.Writer) error { return diff(w, base, full) }},
		}
	}
	sum := sha256.New()
	if err := image.writeTopLayer(sum, files, full); err != nil {
		return "", err
	}
	source.layers = append(source.layers, layerSource{"entrypoint and application", func(w io.Writer) error { return image.writeTopLayer(w, files, full) }})
	source.recipe = fmt.Sprintf("%s %s %x", base, full, sum.Sum(nil))
	return c.layout(ctx, name+"-image", []imageSource{source})
}

// writeTopLayer writes what lies on the packages in root, "" if there are none.
func (i realImage) writeTopLayer(w io.Writer, contents map[string][]byte, root string) error {
	var files []entry
	for name, data := range contents {
		mode := int64(0o644)
		if bytes.HasPrefix(data, []byte("#!")) || bytes.HasPrefix(data, []byte("\x7fELF")) {
			mode = 0o755
		}
		files = append(files, entry{name: name, mode: mode, mtime: made, data: data})
	}
	for at, target := range i.links {
		files = append(files, entry{name: at, typ: tar.TypeSymlink, link: target, mode: 0o777, mtime: made})
	}
	for _, at := range i.removed {
		files = append(files, entry{name: path.Join(path.Dir(at), ".wh."+path.Base(at))})
	}
	for at, owner := range i.owned {
		uid, gid, err := userOf(root, owner)
		if err != nil {
			return err
		}
		files = append(files, entry{name: at, typ: tar.TypeDir, mode: 0o755, uid: uid, gid: gid, mtime: made})
	}
	slices.SortFunc(files, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	l := newLayerWriter(w)
	for _, f := range files {
		if err := l.inventParents(root, f.name); err != nil {
			return err
		}
		if err := l.add(f); err != nil {
			return err
		}
		if f.typ == tar.TypeDir {
			l.dirs[f.name] = true
		}
	}
	return l.close()
}

// inventParents is addParents, with directories of their own for those that
// root lacks.
func (l *layerWriter) inventParents(root, name string) error {
	dir := path.Dir(name)
	if dir == "." || l.dirs[dir] {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(root, dir)); root != "" && err == nil {
		return l.addParents(root, name)
	}
	if err := l.inventParents(root, dir); err != nil {
		return err
	}
	l.dirs[dir] = true
	return l.add(entry{name: dir, typ: tar.TypeDir, mode: 0o755, mtime: made})
}

// userOf returns the ids of a user of a root.
func userOf(root, name string) (uid, gid int, err error) {
	passwd, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(passwd)) {
		if f := strings.Split(line, ":"); f[0] == name && len(f) > 3 {
			if uid, err = strconv.Atoi(f[2]); err != nil {
				return 0, 0, err
			}
			gid, err = strconv.Atoi(f[3])
			return uid, gid, err
		}
	}
	return 0, 0, fmt.Errorf("%s has no user %s", root, name)
}
