package transport

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/registrystore"
)

// maxArchiveEntries bounds how many files a tar of an image may have.
const maxArchiveEntries = 100_000

// archive is a tar file whose files are read in place.
type archive struct {
	file  *os.File
	files map[string]span   // by cleaned name
	links map[string]string // cleaned name → cleaned name
}

// span is where a file lies in the archive.
type span struct{ off, size int64 } // bytes

// openArchive opens the tar file at path. What cannot be read in place, a pipe
// or a compressed file, is spooled.
func openArchive(ctx context.Context, path string, o Options) (*archive, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if info.IsDir() {
		f.Close()
		return nil, fmt.Errorf("%s is a directory, not an archive; did you mean oci:%s?", path, path)
	}
	plain, format, err := layer.Decompress(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if format == "" && info.Mode().IsRegular() {
		return scanArchive(ctx, f)
	}
	defer f.Close()
	defer plain.Close()
	if err := scratch.Check(o.TempDir, info.Size()); err != nil {
		return nil, err
	}
	spooled, _, err := spool(ctx, o.TempDir, plain, o.progress)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return scanArchive(ctx, spooled)
}

// scanArchive notes where the files of the tar lie, and takes over f.
func scanArchive(ctx context.Context, f *os.File) (*archive, error) {
	a := &archive{file: f, files: map[string]span{}, links: map[string]string{}}
	if err := a.scan(ctx); err != nil {
		f.Close()
		return nil, fmt.Errorf("not a tar archive of an image: %w", err)
	}
	return a, nil
}

func (a *archive) scan(ctx context.Context) error {
	end, err := a.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	// archive/tar reads headers without looking ahead and seeks over contents,
	// so the position behind a header is where the content begins.
	r := io.NewSectionReader(a.file, 0, end)
	t := tar.NewReader(r)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		if n > maxArchiveEntries {
			return fmt.Errorf("it has more than %d entries", maxArchiveEntries)
		}
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			if _, sparse := h.PAXRecords["GNU.sparse.major"]; sparse {
				continue
			}
			off, err := r.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			if h.Size > end-off {
				return fmt.Errorf("%.100q ends %d bytes behind the end of the file: %w", h.Name, h.Size-(end-off), io.ErrUnexpectedEOF)
			}
			a.files[name] = span{off, h.Size}
			delete(a.links, name)
		case tar.TypeLink:
			a.links[name] = path.Clean("/" + h.Linkname)
		case tar.TypeSymlink:
			a.links[name] = path.Join(path.Dir(name), h.Linkname)
		}
	}
}

// find returns where a file lies. Older engines link equal layers.
func (a *archive) find(name string) (span, error) {
	at := path.Clean("/" + name)
	for range 10 {
		if s, ok := a.files[at]; ok {
			return s, nil
		}
		next, ok := a.links[at]
		if !ok {
			break
		}
		at = next
	}
	return span{}, fmt.Errorf("%.200q: %w in the archive", name, errNoFile)
}

// errNoFile reads better than fs.ErrNotExist, which it wraps.
var errNoFile error = &explained{"no such file", fs.ErrNotExist}

func (a *archive) section(s span) *io.SectionReader {
	return io.NewSectionReader(a.file, s.off, s.size)
}

// read reads a small file.
func (a *archive) read(name string, limit int64) ([]byte, error) {
	s, err := a.find(name)
	if err != nil {
		return nil, err
	}
	if s.size > limit {
		return nil, fmt.Errorf("%.200q has %d bytes, at most %d are read", name, s.size, limit)
	}
	b := make([]byte, s.size)
	if _, err := io.ReadFull(a.section(s), b); err != nil {
		return nil, fmt.Errorf("%.200q: %w", name, err)
	}
	return b, nil
}

// ociArchive reads an OCI layout in a tar file.
type ociArchive struct {
	resolved
	*archive
	path string
}

func openOCIArchive(ctx context.Context, r Ref, o Options) (Source, error) {
	a, err := openArchive(ctx, r.Path, o)
	if err != nil {
		return nil, err
	}
	none := fmt.Errorf("it holds no OCI layout: it has no %s", indexFile)
	if _, err := a.find(dockerManifest); err == nil {
		none = fmt.Errorf("it is an archive of docker save; name it docker-archive:%s", r.Path)
	}
	return readLayout(ctx, &ociArchive{archive: a, path: r.Path}, r, o, none)
}

func (s *ociArchive) StoreAddress() string                { return "" }
func (s *ociArchive) Blobs() (registrystore.Blobs, error) { return s, nil }
func (s *ociArchive) String() string                      { return OCIArchive + ":" + s.path }
func (s *ociArchive) Close() error                        { return s.file.Close() }

func (s *ociArchive) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	return s.read(blobPath(d.Digest), maxManifest)
}

func (s *ociArchive) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	at, err := s.find(blobPath(d.Digest))
	if err != nil {
		return nil, err
	}
	return io.NopCloser(s.section(at)), nil
}

func (s *ociArchive) local(d v1.Descriptor) io.ReaderAt {
	at, err := s.find(blobPath(d.Digest))
	if err != nil || at.size != d.Size {
		return nil // reading the blob will say why
	}
	return s.section(at)
}

// Range implements registrystore.Blobs.
func (s *ociArchive) Range(ctx context.Context, digest string, off, n int64) (io.ReadCloser, error) {
	fail := func(err error) error {
		return registrystore.Failed(s.String(), digest, err)
	}
	h, err := v1.NewHash(digest)
	if err != nil {
		return nil, fail(err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fail(err)
	}
	at, err := s.find(blobPath(h))
	if err != nil {
		return nil, fail(err)
	}
	if off < 0 || n < 0 || off > math.MaxInt64-n || off+n > at.size {
		return nil, fail(fmt.Errorf("%d bytes at %d of a blob of %d", n, off, at.size))
	}
	return io.NopCloser(io.NewSectionReader(s.file, at.off+off, n)), nil
}

// tarWriter writes the files of an image into a tar that depends on nothing
// but their names and bytes.
type tarWriter struct{ *tar.Writer }

func (w tarWriter) add(name string, size int64, r io.Reader) error {
	h := &tar.Header{Name: name, Mode: 0o644, Size: size, Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
	if strings.HasSuffix(name, "/") {
		h.Mode, h.Typeflag = 0o755, tar.TypeDir
	}
	if err := w.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if size == 0 {
		return nil
	}
	if _, err := io.Copy(w, r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// ociArchiveDestination writes an OCI layout as a tar. Packs go into it as
// they come, so that they are never stored twice.
type ociArchiveDestination struct {
	name  string
	image string // what engines call it that read an OCI layout, "" if only name is known
	o     Options

	mu     sync.Mutex // guards the tar and what is in it
	beside []named    // further names that the commit enters
	file   *replacement
	tar    tarWriter
	has    map[v1.Hash]bool
	err    error // a half-written entry spoils the rest
}

func openOCIArchiveDestination(r Ref, o Options) (*ociArchiveDestination, error) {
	sweep(r.Path)
	f, err := newReplacement(r.Path)
	if err != nil {
		return nil, err
	}
	d := &ociArchiveDestination{name: r.Name, o: o, file: f, tar: tarWriter{tar.NewWriter(f)}, has: map[v1.Hash]bool{}}
	err = d.tar.add(layoutFile, int64(len(layoutText)), strings.NewReader(layoutText))
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err == nil {
			err = d.tar.add(dir, 0, nil)
		}
	}
	if err != nil {
		f.abandon()
		return nil, err
	}
	return d, nil
}

func (d *ociArchiveDestination) HoldsPacks() bool     { return true }
func (d *ociArchiveDestination) StoreAddress() string { return "" }

// jobs is 1: a tar takes one file at a time, and its bytes shall not depend on
// which comes first.
func (d *ociArchiveDestination) jobs() int { return 1 }

func (d *ociArchiveDestination) PutPack(ctx context.Context, p registrystore.Pack) (bool, error) {
	return putPack(ctx, d, p)
}

func (d *ociArchiveDestination) putManifest(ctx context.Context, m v1.Descriptor, raw []byte) error {
	_, err := d.put(ctx, bytesBlob(m.Digest, raw))
	return err
}

func (d *ociArchiveDestination) put(ctx context.Context, b blob) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return false, d.err
	}
	if d.has[b.digest] {
		return true, nil
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
	if d.err = d.tar.add(blobPath(b.digest), b.size, &progressReader{ctx: ctx, r: v, progress: d.o.progress}); d.err != nil {
		return false, d.err
	}
	d.has[b.digest] = true
	return false, nil
}

func (d *ociArchiveDestination) Commit(ctx context.Context, images []PlatformImage) (string, error) {
	return commitImages(ctx, d, images)
}

func (d *ociArchiveDestination) hasManifest(context.Context, v1.Descriptor) (bool, error) {
	return false, nil // put looks itself
}

func (d *ociArchiveDestination) tag(_ context.Context, name string, m v1.Descriptor, _ []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.beside = append(d.beside, named{name: name, desc: m})
	return nil
}

func (d *ociArchiveDestination) lookup(context.Context, string) ([]byte, error) {
	return nil, fs.ErrNotExist // it is written anew
}

func (d *ociArchiveDestination) finish(_ context.Context, m v1.Descriptor, _ []byte) error {
	names := d.o.names(d.name, m)
	names[len(names)-1].image = d.image
	index, err := emptyLayoutIndex().set(append(d.beside, names...))
	if err != nil {
		return err
	}
	if err := d.tar.add(indexFile, int64(len(index)), bytes.NewReader(index)); err != nil {
		return err
	}
	if err := d.tar.Close(); err != nil {
		return err
	}
	return d.file.commit(0o644)
}

func (d *ociArchiveDestination) Close() error {
	d.file.abandon()
	return nil
}
