package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	chunkers "github.com/PlakarKorp/go-cdc-chunkers"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/fastcdc"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/ultracdc"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/jotfs/fastcdc-go"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/internal/transport"
)

const conversionText = `
Time to make chunks of an image (Python on Debian, with numpy and more) on this machine's disk, from its layers on the same disk, into an empty place. *casync
make* takes the same tree from a directory, *mksquashfs* too, and *zstd* is the least that compressing takes: level 3 with two threads over the
layers' tar streams, with nothing cut and nothing named. *Unchanged* is a conversion of an image that was converted before, in bytes of its layers per second,
against a copy of them by cat. *Chunker* cuts the tree's content in memory, at 16, 64 and 256 KiB, on one core.
`

func conversionSection() Section {
	return Section{Key: "conversion", Title: "Converting", Text: conversionText, Ratios: true}
}

// pythonLayers makes what conversions start from: the image as a layout with gzip
// layers, as an archive with plain ones, the layers' streams and the tree.
func (w *World) pythonLayers(ctx context.Context) (s struct{ layout, archive, plain, tree string }, err error) {
	if s.layout, err = w.cache.PythonImage(ctx); err != nil {
		return s, err
	}
	s.archive, s.plain, s.tree = w.path("python.tar"), w.path("python.layers"), w.path("python.tree")
	if _, err := os.Stat(s.tree); err == nil {
		return s, nil
	}
	return s, shell(ctx, `
skopeo copy --quiet "oci:$1:$2" "docker-archive:$3:python:source"
mkdir "$4.parts"
tar -x -C "$4.parts" -f "$3"
find "$4.parts" -name '*.tar' ! -type l -exec cat {} + >"$4"
umoci unpack --image "$1:$2" "$5.bundle" >/dev/null
mv "$5.bundle/rootfs" "$5"
rm -r "$4.parts" "$5.bundle"`, s.layout, testenv.Tag, s.archive, s.plain, s.tree)
}

func conversionRows(w *World) []Row {
	dir := w.path("conversion")
	fresh := func() error { return errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)) }
	var src struct{ layout, archive, plain, tree string }
	prepare := func(ctx context.Context) (func() error, error) {
		var err error
		src, err = w.pythonLayers(ctx)
		return func() error { return os.RemoveAll(dir) }, err
	}
	run := func(script string, args func() []string) func(context.Context) (Measured, error) {
		return func(ctx context.Context) (Measured, error) {
			if err := fresh(); err != nil {
				return Measured{}, err
			}
			return timed(func() error { return shell(ctx, script, append([]string{dir}, args()...)...) })
		}
	}
	// convert runs bootfs-convert, which tells how much memory it took at most.
	convert := func(source func() string, before func(ctx context.Context) error) func(context.Context) (Measured, error) {
		return func(ctx context.Context) (Measured, error) {
			if err := fresh(); err != nil {
				return Measured{}, err
			}
			base := "none"
			if before != nil {
				if err := before(ctx); err != nil {
					return Measured{}, err
				}
				base = "oci:" + dir + "/out"
			}
			var resident float64
			m, err := timed(func() (err error) {
				resident, err = peak(exec.CommandContext(ctx, w.convert, "-q", "--base", base, source(), "oci:"+dir+"/out"))
				return err
			})
			m.Also = map[string]float64{"MiB resident": resident}
			return m, err
		}
	}
	// rate turns the time for the layers into their bytes over it.
	rate := func(measure func(context.Context) (Measured, error)) func(context.Context) (Measured, error) {
		return func(ctx context.Context) (Measured, error) {
			m, err := measure(ctx)
			if err != nil {
				return m, err
			}
			info, err := os.Stat(src.plain)
			if err != nil {
				return m, err
			}
			m.Value = float64(info.Size()) / 1e9 / m.Value
			return m, nil
		}
	}
	archive := func() string { return "docker-archive:" + src.archive }
	gzip := func() string { return "oci:" + src.layout }
	tree := func() []string { return []string{src.tree} }
	rows := []Row{
		{
			Section: "conversion", Name: "plain layers", Unit: "s", Against: "casync make", Prepare: prepare,
			Subjects: []Subject{
				{Name: "casync make", Command: "casync make --digest=sha256 --store=DIR/castr DIR/tree.caidx TREE", Measure: run(`casync make --digest=sha256 --store="$1/castr" "$1/tree.caidx" "$2" >/dev/null`, tree)},
				{Name: "zstd", Command: "zstd -3 -T2 LAYERS.tar -o DIR/out.zst", Measure: run(`zstd -q -3 -T2 "$2" -o "$1/out.zst"`, func() []string { return []string{src.plain} })},
				{Name: "mksquashfs", Command: "mksquashfs TREE DIR/out.squashfs -comp zstd -Xcompression-level 3", Measure: run(`mksquashfs "$2" "$1/out.squashfs" -comp zstd -Xcompression-level 3 -processors 2 -quiet -no-progress`, tree)},
				{Name: "bootfs", Command: "bootfs-convert --base none docker-archive:SOURCE.tar oci:DIR/out", Goals: []Goal{{0.25, "casync make"}, {1.6, "zstd"}}, Measure: convert(archive, nil)},
			},
		},
		{
			Section: "conversion", Name: "gzip layers", Unit: "s", Against: "gunzip, zstd", Prepare: prepare,
			Subjects: []Subject{
				{Name: "gunzip, zstd", Command: "for l in LAYERS.tar.gz; do gunzip -c $l; done | zstd -3 -T2 -o DIR/out.zst", Measure: run(`find "$2/blobs" -type f -size +64k -exec gunzip -c {} + | zstd -q -3 -T2 -o "$1/out.zst"`, func() []string { return []string{src.layout} })},
				{Name: "bootfs", Command: "bootfs-convert --base none oci:SOURCE oci:DIR/out", Goals: []Goal{{1.3, "gunzip, zstd"}}, Measure: convert(gzip, nil)},
			},
		},
		{
			Section: "conversion", Name: "unchanged", Unit: "GB/s", More: true, Against: "cat", Prepare: prepare,
			Subjects: []Subject{
				{Name: "cat", Command: "cat LAYERS.tar >DIR/out", Measure: rate(run(`cat "$2" >"$1/out"`, func() []string { return []string{src.plain} }))},
				{Name: "bootfs", Command: "bootfs-convert docker-archive:SOURCE.tar oci:DIR/out   # where it was converted to before", Goals: []Goal{{Times: 1}},
					Measure: rate(convert(archive, func(ctx context.Context) error {
						_, err := output(exec.CommandContext(ctx, w.convert, "-q", "--base", "none", archive(), "oci:"+dir+"/out"))
						return err
					}))},
			},
		},
	}
	return append(rows, w.chunkerRow())
}

// peak runs a command and returns how much memory it has had, in MiB. What the kernel
// says when a process has ended counts that of its parent, too, in which it began.
func peak(cmd *exec.Cmd) (mib float64, err error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			if err != nil {
				err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
			}
			return mib, err
		case <-time.After(20 * time.Millisecond):
			if now, err := statusMiB(cmd.Process.Pid, "VmHWM"); err == nil { // else it has just ended
				mib = now
			}
		}
	}
}

// chunkerBytes is how much of a tree the chunkers cut, in memory.
const chunkerBytes = 256 << 20

func (w *World) chunkerRow() Row {
	var data []byte
	cut := func(f func(data []byte) (chunks int, err error)) func(context.Context) (Measured, error) {
		return func(context.Context) (Measured, error) {
			n := 0
			m, err := timed(func() (err error) { n, err = f(data); return err })
			m.Value = float64(len(data)) / 1e9 / m.Value
			m.Also = map[string]float64{"KiB average": float64(len(data)) / 1024 / float64(max(1, n))}
			return m, err
		}
	}
	plakar := func(algorithm string) func(data []byte) (int, error) {
		return func(data []byte) (n int, err error) {
			c, err := chunkers.NewChunker(algorithm, bytes.NewReader(data), &chunkers.ChunkerOpts{MinSize: 16 << 10, NormalSize: 64 << 10, MaxSize: 256 << 10})
			if err != nil {
				return 0, err
			}
			for {
				_, err := c.Next()
				if errors.Is(err, io.EOF) {
					return n + 1, nil
				}
				if err != nil {
					return n, err
				}
				n++
			}
		}
	}
	return Row{
		Section: "conversion", Name: "chunker", Unit: "GB/s", More: true, Against: "jotfs/fastcdc-go",
		Prepare: func(ctx context.Context) (func() error, error) {
			src, err := w.pythonLayers(ctx)
			if err == nil {
				data, err = contents(src.tree, chunkerBytes)
			}
			return func() error { data = nil; return nil }, err
		},
		Subjects: []Subject{
			{Name: "jotfs/fastcdc-go", Command: "fastcdc.NewChunker(r, fastcdc.Options{MinSize: 16 << 10, AverageSize: 64 << 10, MaxSize: 256 << 10})", Measure: cut(func(data []byte) (n int, err error) {
				c, err := fastcdc.NewChunker(bytes.NewReader(data), fastcdc.Options{MinSize: 16 << 10, AverageSize: 64 << 10, MaxSize: 256 << 10})
				if err != nil {
					return 0, err
				}
				for {
					if _, err := c.Next(); errors.Is(err, io.EOF) {
						return n, nil
					} else if err != nil {
						return n, err
					}
					n++
				}
			})},
			{Name: "PlakarKorp fastcdc", Command: `chunkers.NewChunker("fastcdc", r, opts)`, Measure: cut(plakar("fastcdc"))},
			{Name: "PlakarKorp ultracdc", Command: `chunkers.NewChunker("ultracdc", r, opts)`, Measure: cut(plakar("ultracdc"))},
			{Name: "bootfs", Command: "chunker.New(chunker.V1)", Goals: []Goal{{Times: 2.2}}, Measure: cut(func(data []byte) (n int, err error) {
				c, err := chunker.New(chunker.V1)
				if err != nil {
					return 0, err
				}
				for len(data) > 0 {
					data = data[c.Cut(data):]
					n++
				}
				return n, nil
			})},
		},
	}
}

// contents is what the files below dir hold, one behind the other, up to so many
// bytes.
func contents(dir string, limit int) ([]byte, error) {
	data := make([]byte, 0, limit)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || len(data) == limit {
			return err
		}
		b, err := os.ReadFile(path)
		data = append(data, b[:min(len(b), limit-len(data))]...)
		return err
	})
	return data, err
}

const storedText = `
New bytes that the second of two versions costs, where the first is stored already: as compressed chunks, by casync (its defaults, zstd) from the tree, and by bootfs
as it writes packs (with the pack of the start set, and all that is written anew). *python*, *node* and *jdk* are Debian with these packages as the release has them,
and with the updates since; *go* is Debian with go1.25.1 and go1.25.2. Below each: how many chunks are new; the first version, with the boot image, against its layers
as gzip; and all that is written when the time of each file is another and nothing else is.
`

func storedSection() Section {
	return Section{Key: "stored", Title: "Stored bytes", Text: storedText, Ratios: true}
}

// versions are two versions of an image.
type versions struct {
	name      string
	old, next func(ctx context.Context, c *testenv.Cache) (layout string, err error)
	goal      float64 // of casync's bytes
}

func goRoot(version string) func(ctx context.Context, c *testenv.Cache) (string, error) {
	return func(ctx context.Context, c *testenv.Cache) (string, error) {
		dir, err := toolchain(ctx, version)
		if err != nil {
			return "", err
		}
		files := map[string][]byte{}
		err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			name, err := filepath.Rel(dir, path)
			if err == nil {
				files["usr/local/go/"+name], err = os.ReadFile(path)
			}
			return err
		})
		if err != nil {
			return "", err
		}
		return c.PackagesImage(ctx, "go-"+version, []string{"ca-certificates"}, files, application{}.config)
	}
}

// toolchain is the directory of a Go toolchain, which is a module.
func toolchain(ctx context.Context, version string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "env", "GOROOT")
	cmd.Env = append(os.Environ(), "GOTOOLCHAIN="+version)
	out, err := output(cmd)
	return strings.TrimSpace(string(out)), err
}

// updated is a pair of roots with the same packages of Debian: as the release has
// them, and with the updates since.
func updated(name string, goal float64, packages ...string) versions {
	root := func(of func(*testenv.Cache, context.Context, ...string) (string, error)) func(context.Context, *testenv.Cache) (string, error) {
		return func(ctx context.Context, c *testenv.Cache) (string, error) {
			dir, err := of(c, ctx, packages...)
			if err != nil {
				return "", err
			}
			return c.RootImage(ctx, dir)
		}
	}
	return versions{name, root((*testenv.Cache).ReleaseRoot), root((*testenv.Cache).Root), goal}
}

var versionPairs = []versions{
	updated("python", 0.40, "python3", "python3-numpy", "python3-requests", "python3-cryptography"),
	updated("node", 0.55, "nodejs"),
	{"go", goRoot("go1.25.1"), goRoot("go1.25.2"), 0.80},
	updated("jdk", 0.72, "openjdk-17-jdk-headless"),
}

func storedRows(w *World) []Row {
	var rows []Row
	for i, v := range versionPairs {
		dir := w.path("stored" + strconv.Itoa(i))
		var layouts [2]string
		var first conversion
		var chunks struct{ casync, bootfs, casyncAll, bootfsAll int64 } // new ones, and those of the first version
		prepare := func(ctx context.Context) (func() error, error) {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, err
			}
			for at, layout := range []func(context.Context, *testenv.Cache) (string, error){v.old, v.next} {
				var err error
				if layouts[at], err = layout(ctx, w.cache); err != nil {
					return nil, err
				}
			}
			return func() error { return os.RemoveAll(dir) }, nil
		}
		megabytes := func(n int64, also map[string]float64) Measured { return Measured{float64(n) / 1e6, also} }
		// known returns what the row of the new bytes has learned.
		known := func(get func() Measured) func(context.Context) (Measured, error) {
			return func(context.Context) (Measured, error) {
				if first.SourceBytes == 0 || chunks.casyncAll == 0 {
					return Measured{}, fmt.Errorf("it takes the row %q", v.name+": new")
				}
				return get(), nil
			}
		}
		const thenNext = "   # after the same of the version before"
		casyncMake := "casync make --store=castr NEXT.caidx NEXT" + thenNext
		convertNext := "bootfs-convert oci:NEXT oci:DIR" + thenNext
		rows = append(rows, Row{
			Section: "stored", Name: v.name + ": new", Unit: "MB", Against: "casync", Once: true, Prepare: prepare,
			Subjects: []Subject{
				{Name: "casync", Command: casyncMake, Measure: func(ctx context.Context) (Measured, error) {
					counts, sizes, err := casyncStore(ctx, dir, layouts)
					chunks.casync, chunks.casyncAll = counts[1]-counts[0], counts[0]
					return megabytes(sizes[1]-sizes[0], nil), err
				}},
				{Name: "bootfs", Command: convertNext, Goals: []Goal{{v.goal, "casync"}}, Measure: func(ctx context.Context) (Measured, error) {
					out := "oci:" + dir + "/out"
					var err error
					if first, err = w.convertImage(ctx, "--base", "none", "oci:"+layouts[0], out); err != nil {
						return Measured{}, err
					}
					before, err := readConverted(ctx, out)
					if err != nil {
						return Measured{}, err
					}
					next, err := w.convertImage(ctx, "oci:"+layouts[1], out)
					if err != nil {
						return Measured{}, err
					}
					after, err := readConverted(ctx, out)
					chunks.bootfs, _ = after.since(before)
					chunks.bootfsAll = int64(first.Distinct)
					return megabytes(next.NewBytes, map[string]float64{"MB boot image": float64(next.BootBytes) / 1e6}), err
				}},
			},
		}, Row{
			Section: "stored", Name: v.name + ": new chunks", Against: "casync", Once: true,
			Subjects: []Subject{
				{Name: "casync", Command: casyncMake, Measure: known(func() Measured {
					return Measured{float64(chunks.casync), map[string]float64{"in the first": float64(chunks.casyncAll)}}
				})},
				{Name: "bootfs", Command: convertNext, Goals: []Goal{{1.7, "casync"}}, Measure: known(func() Measured {
					return Measured{float64(chunks.bootfs), map[string]float64{"in the first": float64(chunks.bootfsAll)}}
				})},
			},
		}, Row{
			Section: "stored", Name: v.name + ": first", Unit: "MB", Against: "gzip layers", Once: true,
			Subjects: []Subject{
				{Name: "gzip layers", Command: "skopeo inspect oci:OLD", Measure: known(func() Measured { return megabytes(first.SourceBytes, nil) })},
				{Name: "bootfs", Command: "bootfs-convert --base none oci:OLD oci:DIR", Goals: []Goal{{1.05, "gzip layers"}}, Measure: known(func() Measured {
					return megabytes(first.NewBytes+first.BootBytes, nil)
				})},
			},
		}, Row{
			Section: "stored", Name: v.name + ": other times", Unit: "MB", Against: "casync", Once: true,
			Prepare: func(ctx context.Context) (func() error, error) {
				done, err := prepare(ctx)
				if err != nil {
					return nil, err
				}
				layouts[1] = dir + "/touched"
				return done, touched(layouts[0], layouts[1])
			},
			Subjects: []Subject{
				{Name: "casync", Command: casyncMake, Measure: func(ctx context.Context) (Measured, error) {
					_, sizes, err := casyncStore(ctx, dir, layouts)
					return megabytes(sizes[1]-sizes[0], nil), err
				}},
				{Name: "bootfs", Command: convertNext, Goals: []Goal{{Times: 0.7}}, Measure: func(ctx context.Context) (Measured, error) {
					out := "oci:" + dir + "/out"
					var sizes [2]int64
					var read [2]*convertedImage
					for at, layout := range layouts {
						if _, err := w.convertImage(ctx, "oci:"+layout, out); err != nil {
							return Measured{}, err
						}
						var err error
						if read[at], err = readConverted(ctx, out); err != nil {
							return Measured{}, err
						}
						if _, sizes[at], err = filesBelow(dir + "/out"); err != nil {
							return Measured{}, err
						}
					}
					_, content := read[1].since(read[0])
					return megabytes(sizes[1]-sizes[0], map[string]float64{"bytes of content": float64(content)}), nil
				}},
			},
		})
	}
	return rows
}

// casyncStore makes chunks of two layouts' trees, one after the other in a store
// below dir, and returns how many files that store has after each, and their
// bytes.
func casyncStore(ctx context.Context, dir string, layouts [2]string) (counts, sizes [2]int64, err error) {
	for at, layout := range layouts {
		if err := shell(ctx, `umoci unpack --image "$1:$2" "$3/bundle" >/dev/null; casync make --store="$3/castr" "$3/$4.caidx" "$3/bundle/rootfs" >/dev/null; rm -r "$3/bundle"`,
			layout, testenv.Tag, dir, strconv.Itoa(at)); err != nil {
			return counts, sizes, err
		}
		if counts[at], sizes[at], err = filesBelow(dir + "/castr"); err != nil {
			return counts, sizes, err
		}
	}
	return counts, sizes, nil
}

// touched makes a layout of another one in which the times of the image's files
// are others.
func touched(from, to string) error {
	p, err := layout.FromPath(from)
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
	image, err := root.Image(m.Manifests[0].Digest)
	if err != nil {
		return err
	}
	if image, err = mutate.Time(image, time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)); err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	// Its layers are Docker's by type, which umoci does not take in OCI's manifest.
	var added []mutate.Addendum
	for _, l := range layers {
		added = append(added, mutate.Addendum{Layer: l, MediaType: types.OCILayer})
	}
	config = config.DeepCopy()
	config.RootFS.DiffIDs, config.History = nil, nil
	image = mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return err
	}
	if image, err = mutate.Append(image, added...); err != nil {
		return err
	}
	p, err = layout.Write(to, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(image, layout.WithAnnotations(m.Manifests[0].Annotations))
}

// convertedImage is what the chunks of a converted image are counted by.
type convertedImage struct {
	chunks []index.Chunk // each once
	meta   int64         // bytes of metadata, with which the root image begins
}

func readConverted(ctx context.Context, ref string) (*convertedImage, error) {
	r, err := transport.Parse(ref, "")
	if err != nil {
		return nil, err
	}
	o, err := converted.Open(ctx, r, converted.Options{})
	if err != nil {
		return nil, err
	}
	defer o.Close()
	chunks, err := converted.Distinct(o.Images[0].Index, nil)
	return &convertedImage{chunks, int64(len(o.Images[0].Meta))}, err
}

// since counts the chunks that an earlier image does not have, and their plain
// bytes as far as they are content of files.
func (i *convertedImage) since(earlier *convertedImage) (n, content int64) {
	known := map[index.ID]bool{}
	for _, c := range earlier.chunks {
		known[c.ID] = true
	}
	for _, c := range i.chunks {
		if known[c.ID] {
			continue
		}
		if n++; c.Offset >= i.meta {
			content += int64(c.Size)
		}
	}
	return n, content
}

// filesBelow counts files and their bytes.
func filesBelow(dir string) (n, size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n, size = n+1, size+info.Size()
		}
		return err
	})
	return n, size, err
}
