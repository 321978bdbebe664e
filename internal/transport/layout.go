package transport

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/registrystore"
)

// Names in an OCI layout.
const (
	layoutFile  = "oci-layout"
	indexFile   = "index.json"
	layoutText  = `{"imageLayoutVersion":"1.0.0"}`
	refNameAnno = "org.opencontainers.image.ref.name"
	// imageNameAnno is what containerd and podman call an image that they load.
	imageNameAnno = "io.containerd.image.name"
)

func blobPath(d v1.Hash) string { return filepath.Join("blobs", d.Algorithm, d.Hex) }

// layoutIndex is index.json. What this program does not know it keeps.
type layoutIndex struct {
	fields    map[string]json.RawMessage
	manifests []json.RawMessage
}

func parseLayoutIndex(raw []byte) (*layoutIndex, error) {
	x := &layoutIndex{}
	if err := json.Unmarshal(raw, &x.fields); err != nil {
		return nil, fmt.Errorf("%s: %w", indexFile, err)
	}
	if x.fields == nil {
		return nil, fmt.Errorf("%s: it is no JSON object", indexFile)
	}
	if m, ok := x.fields["manifests"]; ok {
		if err := json.Unmarshal(m, &x.manifests); err != nil {
			return nil, fmt.Errorf("%s: manifests: %w", indexFile, err)
		}
	}
	return x, nil
}

// refName is how a descriptor of index.json is called, "" if it has no name.
func refName(raw json.RawMessage) (string, error) {
	var d struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return "", fmt.Errorf("%s: %w", indexFile, err)
	}
	return d.Annotations[refNameAnno], nil
}

// besideName matches names in a layout that no image is meant by: what signs or
// describes a manifest, and the second name of a conversion.
var besideName = regexp.MustCompile(`^(sha256-[0-9a-f]{64}(\.[a-z]+)?|keep-[0-9a-f]{64}|` + PacksPrefix + `[0-9a-f]{32})$`)

// find returns what name stands for. Without a name, the layout must hold one
// image.
func (x *layoutIndex) find(name string) (v1.Descriptor, error) {
	var (
		found []json.RawMessage
		names []string
	)
	for _, m := range x.manifests {
		n, err := refName(m)
		if err != nil {
			return v1.Descriptor{}, err
		}
		if name == "" && besideName.MatchString(n) {
			continue
		}
		if n != "" && len(names) < 20 {
			names = append(names, n)
		}
		if name == "" || n == name {
			found = append(found, m)
		}
	}
	switch {
	case len(found) == 0 && name == "":
		return v1.Descriptor{}, errors.New("the layout holds no image")
	case len(found) == 0:
		return v1.Descriptor{}, &explained{fmt.Sprintf("no image is called %q; there are %q", name, names), fs.ErrNotExist}
	case len(found) > 1 && name == "":
		return v1.Descriptor{}, fmt.Errorf("the layout holds %d images; choose one of %q", len(found), names)
	case len(found) > 1:
		return v1.Descriptor{}, fmt.Errorf("%d images are called %q", len(found), name)
	}
	var d v1.Descriptor
	if err := json.Unmarshal(found[0], &d); err != nil {
		return v1.Descriptor{}, fmt.Errorf("%s: %w", indexFile, err)
	}
	if d.Digest.Hex == "" {
		return v1.Descriptor{}, fmt.Errorf("%s: a descriptor without digest", indexFile)
	}
	return d, nil
}

// lookup returns the manifest with a name, if there is one.
func (x *layoutIndex) lookup(name string) (v1.Descriptor, bool) {
	d, err := x.find(name)
	return d, err == nil && name != ""
}

// unnamed are the descriptors without a name, which may be referrers.
func (x *layoutIndex) unnamed() []v1.Descriptor {
	var out []v1.Descriptor
	for _, m := range x.manifests {
		var d v1.Descriptor
		if n, err := refName(m); err == nil && n == "" && json.Unmarshal(m, &d) == nil {
			out = append(out, d)
		}
	}
	return out
}

// named is an entry of index.json that is to be.
type named struct {
	name  string // "" for none
	desc  v1.Descriptor
	image string // the whole name, of which name is the tag; "" if only name is known
}

// names are the entries of an image.
func (o *Options) names(name string, d v1.Descriptor) []named {
	if o.KeepTag {
		return []named{{name: KeepTag(d.Digest), desc: d}, {name: name, desc: d}}
	}
	return []named{{name: name, desc: d}}
}

// set lets each name stand for its descriptor and for nothing else.
func (x *layoutIndex) set(names []named) ([]byte, error) {
	for _, n := range names {
		var kept []json.RawMessage
		for _, m := range x.manifests {
			have, err := refName(m)
			if err != nil {
				return nil, err
			}
			if have != n.name {
				kept = append(kept, m)
			}
		}
		if n.name != "" {
			n.desc.Annotations = map[string]string{refNameAnno: n.name}
		}
		if n.image != "" {
			n.desc.Annotations[imageNameAnno] = n.image
		}
		raw, err := json.Marshal(n.desc)
		if err != nil {
			return nil, err
		}
		x.manifests = append(kept, raw)
	}
	var err error
	if x.fields["manifests"], err = json.Marshal(x.manifests); err != nil {
		return nil, err
	}
	return json.Marshal(x.fields)
}

func emptyLayoutIndex() *layoutIndex {
	return &layoutIndex{fields: map[string]json.RawMessage{
		"schemaVersion": json.RawMessage("2"),
		"mediaType":     json.RawMessage(`"application/vnd.oci.image.index.v1+json"`),
	}}
}

// layoutSource reads an OCI layout in a directory.
type layoutSource struct {
	resolved
	root *os.Root

	mu    sync.Mutex
	files []*os.File // opened for local, until Close
}

// resolveLayout finds the images that name stands for in a layout with this
// index.
func (r *resolved) resolveLayout(ctx context.Context, c contents, index []byte, name string, want []v1.Platform) error {
	x, err := parseLayoutIndex(index)
	if err != nil {
		return err
	}
	d, err := x.find(name)
	if err != nil {
		return err
	}
	r.beside = x
	return r.resolve(ctx, c, d, want)
}

func openLayout(ctx context.Context, r Ref, o Options) (Source, error) {
	root, err := os.OpenRoot(r.Path)
	if err != nil {
		return nil, err
	}
	return readLayout(ctx, &layoutSource{root: root}, r, o, &explained{fmt.Sprintf("%s is no OCI layout: it has no %s", r.Path, indexFile), fs.ErrNotExist})
}

// layoutReader is a layout, wherever it lies.
type layoutReader interface {
	Source
	contents
	read(name string, limit int64) ([]byte, error)
	resolveLayout(ctx context.Context, c contents, index []byte, name string, want []v1.Platform) error
}

// readLayout finds the images that r names in s, which it closes if that
// fails; none is the error when there is no index.
func readLayout(ctx context.Context, s layoutReader, r Ref, o Options, none error) (Source, error) {
	raw, err := s.read(indexFile, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		err = none
	}
	if err == nil {
		err = s.resolveLayout(ctx, s, raw, r.Name, o.Platforms)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *layoutSource) StoreAddress() string { return "" }

func (s *layoutSource) Blobs() (registrystore.Blobs, error) {
	return registrystore.NewLayoutBlobs(s.root.Name()), nil
}

func (s *layoutSource) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		f.Close()
	}
	return s.root.Close()
}

// read reads a small file.
func (s *layoutSource) read(name string, limit int64) ([]byte, error) {
	f, size, err := openRegular(s.root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read", name, size, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func (s *layoutSource) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	return s.read(blobPath(d.Digest), maxManifest)
}

func (s *layoutSource) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	f, _, err := openRegular(s.root, blobPath(d.Digest))
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (s *layoutSource) local(d v1.Descriptor) io.ReaderAt {
	f, size, err := openRegular(s.root, blobPath(d.Digest))
	if err != nil {
		return nil // reading the blob will say why
	}
	if size != d.Size {
		f.Close()
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files = append(s.files, f)
	return f
}

// layoutDestination writes an OCI layout in a directory. Blobs that no
// manifest names are not part of it, so index.json is all that commits.
type layoutDestination struct {
	dir      string
	name     string
	o        Options
	lock     *os.File // of the directory
	made     string   // the topmost directory that was created, "" if none was
	finished bool

	mu      sync.Mutex // guards what follows
	written []string   // blobs stored by this run
	beside  []named    // further names that the commit enters
}

func openLayoutDestination(r Ref, o Options) (Destination, error) {
	d := &layoutDestination{dir: r.Path, name: r.Name, o: o}
	info, err := os.Stat(r.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		d.made = firstMissing(r.Path)
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, errors.New("it exists and is not a directory")
	default:
		if err := checkLayoutDir(r.Path); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Join(r.Path, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	// A run that fails takes its blobs back; another one at the same time
	// could be relying on them.
	if d.lock, err = os.Open(r.Path); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.lock.Close()
		return nil, fmt.Errorf("another conversion is writing to this directory: %w", err)
	}
	removeTemporary(filepath.Join(r.Path, "blobs", "sha256"))
	return d, nil
}

// removeTemporary removes what killed runs left in the making. Nobody else has
// such a file there: the caller holds the lock.
func removeTemporary(dir string) {
	stale, err := filepath.Glob(filepath.Join(dir, temporaryPrefix+"*"+temporarySuffix+"*"))
	if err != nil {
		return // a pattern that is wrong for this path removes nothing
	}
	for _, name := range stale {
		os.Remove(name)
	}
}

// firstMissing returns the topmost directory of path that does not exist.
func firstMissing(path string) string {
	path = filepath.Clean(path)
	for {
		parent := filepath.Dir(path)
		if _, err := os.Stat(parent); err == nil || parent == path {
			return path
		}
		path = parent
	}
}

// checkLayoutDir refuses a directory that holds something else than a layout.
func checkLayoutDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case layoutFile, indexFile:
			return nil
		case "blobs": // of a run that was killed before it committed
		default:
			return fmt.Errorf("the directory holds %q and no %s: it is not an OCI layout", e.Name(), layoutFile)
		}
	}
	return nil
}

func (d *layoutDestination) HoldsPacks() bool     { return true }
func (d *layoutDestination) StoreAddress() string { return "" }

func (d *layoutDestination) PutPack(ctx context.Context, p registrystore.Pack) (bool, error) {
	return putPack(ctx, d, p)
}

func (d *layoutDestination) putManifest(ctx context.Context, m v1.Descriptor, raw []byte) error {
	_, err := d.put(ctx, bytesBlob(m.Digest, raw))
	return err
}

func (d *layoutDestination) put(ctx context.Context, b blob) (bool, error) {
	path := filepath.Join(d.dir, blobPath(b.digest))
	// A blob of another size is what a power cut left: it is replaced.
	if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() && info.Size() == b.size {
		return true, nil
	}
	if b.file != nil && nameFile(b.file, path, 0o644) == nil {
		d.o.progress(b.size)
		d.wrote(path)
		return false, nil
	}
	rc, err := b.open(ctx, 0)
	if err != nil {
		return false, err
	}
	defer rc.Close()
	v, err := verify(rc, v1.Descriptor{Digest: b.digest, Size: b.size})
	if err != nil {
		return false, err
	}
	f, err := newReplacement(path)
	if err != nil {
		return false, err
	}
	defer f.abandon()
	if _, err := io.Copy(f, &progressReader{ctx: ctx, r: v, progress: d.o.progress}); err != nil {
		return false, err
	}
	if err := f.commit(0o644); err != nil {
		return false, err
	}
	d.wrote(path)
	return false, nil
}

// wrote notes a blob for a run that fails.
func (d *layoutDestination) wrote(path string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.written = append(d.written, path)
}

func (d *layoutDestination) Commit(ctx context.Context, images []PlatformImage) (string, error) {
	return commitImages(ctx, d, images)
}

func (d *layoutDestination) hasManifest(context.Context, v1.Descriptor) (bool, error) {
	return false, nil // put looks itself
}

func (d *layoutDestination) tag(_ context.Context, name string, m v1.Descriptor, _ []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.beside = append(d.beside, named{name: name, desc: m})
	return nil
}

func (d *layoutDestination) lookup(_ context.Context, name string) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(d.dir, indexFile))
	if err != nil {
		return nil, err
	}
	x, err := parseLayoutIndex(raw)
	if err != nil {
		return nil, err
	}
	m, ok := x.lookup(name)
	if !ok {
		return nil, fs.ErrNotExist
	}
	return os.ReadFile(filepath.Join(d.dir, blobPath(m.Digest)))
}

func (d *layoutDestination) finish(_ context.Context, m v1.Descriptor, _ []byte) error {
	// What index.json names stays, even if that is not known to last.
	var err error
	d.finished, err = d.commitIndex(append(d.beside, d.o.names(d.name, m)...))
	return err
}

// commitIndex enters the image in index.json, and says whether it stands there.
func (d *layoutDestination) commitIndex(names []named) (entered bool, err error) {
	path := filepath.Join(d.dir, indexFile)
	x := emptyLayoutIndex()
	raw, err := os.ReadFile(path)
	if err == nil {
		x, err = parseLayoutIndex(raw)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	next, err := x.set(names)
	if err != nil {
		return false, err
	}
	if _, err := replaceFile(filepath.Join(d.dir, layoutFile), []byte(layoutText)); err != nil {
		return false, err
	}
	return replaceFile(path, next)
}

// replaceFile gives the file at path the content b, unless it has it. placed
// says that it has it now, with an error too.
func replaceFile(path string, b []byte) (placed bool, err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(bytes.TrimSpace(old), b) {
		return true, nil
	}
	f, err := newReplacement(path)
	if err != nil {
		return false, err
	}
	defer f.abandon()
	if _, err := f.Write(b); err != nil {
		return false, err
	}
	err = f.commit(0o644)
	return f.placed, err
}

func (d *layoutDestination) Close() error {
	defer d.lock.Close()
	if d.finished {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.made != "" {
		err := os.RemoveAll(d.dir)
		// The directories above may have become another conversion's as well:
		// they go as far as they are empty.
		for p := filepath.Clean(d.dir); err == nil && p != d.made; {
			p = filepath.Dir(p)
			if os.Remove(p) != nil {
				break
			}
		}
		return err
	}
	var errs []error
	for _, p := range d.written {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
