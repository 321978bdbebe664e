package assembly

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// File types in file.mode, as in st_mode.
const (
	modeDir     = 0o040000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeType    = 0o170000
)

// file is a file of a boot image's layer.
type file struct {
	mode     uint32 // st_mode
	uid, gid uint32
	mtime    int64 // seconds since 1970
	target   string
	linkTo   string      // path in the same layer of which this is a hard link, "" if it is none
	size     int64       // bytes of content
	content  io.ReaderAt // nil if size is 0
}

func bytesFile(mode uint32, b []byte) file {
	return file{mode: modeRegular | mode, size: int64(len(b)), content: bytes.NewReader(b)}
}

// fileOf is a file as the source has it.
func fileOf(n *tree.Inode) file {
	return file{mode: n.Mode, uid: n.UID, gid: n.GID, mtime: n.MtimeSec, target: n.Target, size: n.Size, content: n}
}

// imageLayer is a compressed layer in memory.
type imageLayer struct {
	compressed     []byte
	digest, diffID v1.Hash
}

func (l *imageLayer) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l *imageLayer) DiffID() (v1.Hash, error)            { return l.diffID, nil }
func (l *imageLayer) Size() (int64, error)                { return int64(len(l.compressed)), nil }
func (l *imageLayer) MediaType() (types.MediaType, error) { return types.OCILayer, nil }

func (l *imageLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.compressed)), nil
}

func (l *imageLayer) descriptor() v1.Descriptor {
	return v1.Descriptor{MediaType: types.OCILayer, Size: int64(len(l.compressed)), Digest: l.digest}
}

// Levels of gzip. The highest takes four to ten times as long and saves a third
// of a percent: that is for the layer that is made once.
const (
	bootLevel = gzip.BestCompression
	fastLevel = 8
)

// newLayer packs files. Its bytes depend on them alone, and on the compressor,
// which go.mod holds fast where the standard library's changes with the
// toolchain. Every engine reads gzip.
func newLayer(files map[string]file, level int) (*imageLayer, error) {
	return packLayer(level, func(t *tar.Writer) error {
		// Byte order puts a directory before what is in it. A hard link comes after
		// the file that it is another name of.
		order := func(a, b string) int {
			return cmp.Or(cmp.Compare(min(1, len(files[a].linkTo)), min(1, len(files[b].linkTo))), strings.Compare(a, b))
		}
		for _, name := range slices.SortedFunc(maps.Keys(files), order) {
			if err := writeFile(t, name, files[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
}

// packLayer makes a layer of the entries that write adds.
func packLayer(level int, write func(*tar.Writer) error) (*imageLayer, error) {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		return nil, err
	}
	plain := sha256.New()
	t := tar.NewWriter(io.MultiWriter(z, plain))
	if err := write(t); err != nil {
		return nil, err
	}
	if err := t.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return storedLayer(out.Bytes(), v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", plain.Sum(nil))}), nil
}

// storedLayer is the layer that b is the stored form of.
func storedLayer(b []byte, diffID v1.Hash) *imageLayer {
	return &imageLayer{
		compressed: b,
		digest:     v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sha256.Sum256(b))},
		diffID:     diffID,
	}
}

func writeFile(t *tar.Writer, name string, f file) error {
	h := &tar.Header{
		Name:    strings.TrimPrefix(name, "/"),
		Mode:    int64(f.mode & 0o7777),
		Uid:     int(f.uid),
		Gid:     int(f.gid),
		ModTime: time.Unix(f.mtime, 0),
	}
	switch f.mode & modeType {
	case modeRegular:
		h.Typeflag, h.Size = tar.TypeReg, f.size
		if f.linkTo != "" {
			h.Typeflag, h.Size, h.Linkname = tar.TypeLink, 0, strings.TrimPrefix(f.linkTo, "/")
		}
	case modeDir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case modeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.target
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	if h.Size == 0 {
		return nil
	}
	_, err := io.Copy(t, io.NewSectionReader(f.content, 0, f.size))
	return err
}
