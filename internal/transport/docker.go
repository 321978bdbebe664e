package transport

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/registrystore"
)

// dockerManifest names the table of contents of what docker save writes.
const dockerManifest = "manifest.json"

// savedImage is one entry of it.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// dockerArchive reads what docker save wrote.
type dockerArchive struct {
	*archive
	image Image
}

func openDockerArchive(ctx context.Context, r Ref, o Options) (Source, error) {
	a, err := openArchive(ctx, r.Path, o)
	if err != nil {
		return nil, err
	}
	s, err := newDockerArchive(a, r.Name, o)
	if err != nil {
		a.file.Close()
		if _, ociErr := a.find(indexFile); ociErr == nil && errors.Is(err, errNoFile) {
			err = fmt.Errorf("it is an OCI layout; name it oci-archive:%s", r.Path)
		}
		return nil, err
	}
	return s, nil
}

func newDockerArchive(a *archive, want string, o Options) (*dockerArchive, error) {
	raw, err := a.read(dockerManifest, maxManifest)
	if err != nil {
		return nil, err
	}
	var saved []savedImage
	if err := json.Unmarshal(raw, &saved); err != nil {
		return nil, fmt.Errorf("%s: %w", dockerManifest, err)
	}
	m, err := findSaved(saved, want)
	if err != nil {
		return nil, err
	}
	rawConfig, err := a.read(m.Config, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(rawConfig))
	if err != nil {
		return nil, fmt.Errorf("configuration %.200q: %w", m.Config, err)
	}
	platform, err := imagePlatform(v1.Descriptor{}, config)
	if err != nil {
		return nil, err
	}
	if !matchesAny(platform, o.Platforms) {
		return nil, fmt.Errorf("no image for platform %s; it is for %s", platformList(o.Platforms), platform)
	}
	if got, want := len(m.Layers), len(config.RootFS.DiffIDs); got != want {
		return nil, fmt.Errorf("%s lists %d layers, the configuration %d", dockerManifest, got, want)
	}
	digest, _, err := v1.SHA256(bytes.NewReader(rawConfig))
	if err != nil {
		return nil, err
	}
	s := &dockerArchive{archive: a, image: Image{Platform: platform, Digest: digest.String(), Config: config, RawConfig: rawConfig}}
	for i, l := range m.Layers {
		b, err := s.layer(l, config.RootFS.DiffIDs[i])
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		s.image.Layers = append(s.image.Layers, b)
	}
	return s, nil
}

// findSaved chooses the image called want, or the only one.
func findSaved(saved []savedImage, want string) (savedImage, error) {
	if want == "" {
		if len(saved) != 1 {
			return savedImage{}, fmt.Errorf("the archive holds %d images; choose one of %q", len(saved), repoTags(saved))
		}
		return saved[0], nil
	}
	for _, m := range saved {
		for _, tag := range m.RepoTags {
			if sameName(tag, want) {
				return m, nil
			}
		}
	}
	return savedImage{}, fmt.Errorf("the archive holds no image %q; it has %q", want, repoTags(saved))
}

func repoTags(saved []savedImage) []string {
	var tags []string
	for _, m := range saved {
		tags = append(tags, m.RepoTags...)
	}
	return tags[:min(len(tags), 20)]
}

// sameName compares names by what they mean: ubuntu is
// docker.io/library/ubuntu:latest.
func sameName(a, b string) bool {
	x, errA := name.ParseReference(a)
	y, errB := name.ParseReference(b)
	return errA == nil && errB == nil && x.Name() == y.Name()
}

func (s *dockerArchive) layer(file string, diffID v1.Hash) (layer.Blob, error) {
	at, err := s.find(file)
	if err != nil {
		return layer.Blob{}, err
	}
	b := layer.Blob{
		Name:   diffID.String(),
		DiffID: diffID.String(),
		Size:   at.size,
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(s.section(at)), nil
		},
	}
	// An engine with containerd's image store saves layers as they were
	// pulled, compressed, under the same kind of name.
	plain, err := isTar(s.section(at))
	if err != nil {
		return layer.Blob{}, err
	}
	if plain {
		b.Plain = s.section(at)
	}
	return b, nil
}

// isTar recognises the first header of a POSIX or GNU tar.
func isTar(r io.ReaderAt) (bool, error) {
	magic := make([]byte, 5)
	n, err := r.ReadAt(magic, 257)
	if err != nil && err != io.EOF {
		return false, err
	}
	return string(magic[:n]) == "ustar", nil
}

func (s *dockerArchive) Images() []Image                     { return []Image{s.image} }
func (s *dockerArchive) Skipped() []Skipped                  { return nil }
func (s *dockerArchive) StoreAddress() string                { return "" }
func (s *dockerArchive) Blobs() (registrystore.Blobs, error) { return nil, nil }
func (s *dockerArchive) Close() error                        { return s.file.Close() }

// noPacks is the part of a destination that Docker loads from.
type noPacks struct{}

func (noPacks) HoldsPacks() bool     { return false }
func (noPacks) StoreAddress() string { return "" }

func (noPacks) PutPack(context.Context, registrystore.Pack) (bool, error) {
	return false, errNoPacks
}

// dockerArchiveDestination writes what docker load reads.
type dockerArchiveDestination struct {
	noPacks
	name string
	o    Options
	file *replacement
}

func openDockerArchiveDestination(r Ref, o Options) (Destination, error) {
	tag, err := repoTag(r.Name)
	if err != nil {
		return nil, err
	}
	sweep(r.Path)
	f, err := newReplacement(r.Path)
	if err != nil {
		return nil, err
	}
	return &dockerArchiveDestination{name: tag, o: o, file: f}, nil
}

// CheckTag returns nil if engines can call an image s, else what is wrong with
// it.
func CheckTag(s string) error {
	_, err := repoTag(s)
	return err
}

// repoTag returns the name under which docker load enters an image, with its
// tag; "" stays "".
func repoTag(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	ref, err := name.ParseReference(s)
	if err != nil {
		return "", err
	}
	if _, ok := ref.(name.Tag); !ok || isImageID(s) {
		return "", errors.New("an image cannot be written under a digest; name a tag")
	}
	full := ref.Name()
	if rest, ok := strings.CutPrefix(full, name.DefaultRegistry+"/"); ok {
		full = "docker.io/" + rest
	}
	return full, nil
}

func (d *dockerArchiveDestination) Commit(ctx context.Context, images []PlatformImage) (string, error) {
	img, err := onlyImage(images)
	if err != nil {
		return "", err
	}
	id, err := writeSaved(ctx, d.file, img, d.name, d.o.progress)
	if err != nil {
		return "", err
	}
	if err := d.file.commit(0o644); err != nil {
		return "", err
	}
	return id, nil
}

func (d *dockerArchiveDestination) Close() error {
	d.file.abandon()
	return nil
}

// writeSaved writes img as docker save does, with plain layers, which every
// engine loads. It returns the image ID.
func writeSaved(ctx context.Context, w io.Writer, img v1.Image, repoTag string, progress func(int64)) (string, error) {
	id, err := img.ConfigName()
	if err != nil {
		return "", err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return "", err
	}
	t := tarWriter{tar.NewWriter(w)}
	saved := savedImage{Config: id.Hex + ".json", RepoTags: []string{}}
	if repoTag != "" {
		saved.RepoTags = []string{repoTag}
	}
	if err := t.add(saved.Config, int64(len(config)), bytes.NewReader(config)); err != nil {
		return "", err
	}
	layers, err := img.Layers()
	if err != nil {
		return "", err
	}
	for _, l := range layers {
		file, err := writeSavedLayer(ctx, t, l, progress)
		if err != nil {
			return "", err
		}
		saved.Layers = append(saved.Layers, file)
	}
	m, err := json.Marshal([]savedImage{saved})
	if err != nil {
		return "", err
	}
	if err := t.add(dockerManifest, int64(len(m)), bytes.NewReader(m)); err != nil {
		return "", err
	}
	return id.String(), t.Close()
}

func writeSavedLayer(ctx context.Context, t tarWriter, l v1.Layer, progress func(int64)) (string, error) {
	diffID, err := l.DiffID()
	if err != nil {
		return "", err
	}
	// A tar header states the size in front of the bytes.
	size, err := plainSize(l)
	if err != nil {
		return "", err
	}
	rc, err := l.Uncompressed()
	if err != nil {
		return "", err
	}
	defer rc.Close()
	v, err := verify(rc, v1.Descriptor{Digest: diffID, Size: size})
	if err != nil {
		return "", err
	}
	file := diffID.Hex + ".tar"
	return file, t.add(file, size, &progressReader{ctx: ctx, r: v, progress: progress})
}

func plainSize(l v1.Layer) (int64, error) {
	rc, err := l.Uncompressed()
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	return io.Copy(io.Discard, rc)
}
