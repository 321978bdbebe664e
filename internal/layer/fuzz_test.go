package layer

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"io"
	"testing"
	"time"
)

// sameAsArchiveTar reads b with this package's scanner and with archive/tar,
// which engines use, and compares all that both say.
func sameAsArchiveTar(t *testing.T, b []byte) {
	ours := lister{layer: &Layer{limits: Limits{}.withDefaults()}, tar: scanner{r: bufio.NewReader(bytes.NewReader(b))}, source: bytes.NewReader(b)}
	theirs := tar.NewReader(bytes.NewReader(b))
	for i := 0; ; i++ {
		h, err := ours.tar.next()
		want, wantErr := theirs.Next()
		if (err == nil) != (wantErr == nil) || (err == io.EOF) != (wantErr == io.EOF) {
			if wantErr == nil && laterError(theirs, want, err) {
				return
			}
			t.Fatalf("entry %d: error %v, archive/tar has %v (%+v)", i, err, wantErr, want)
		}
		if err != nil {
			return
		}
		if h.name != want.Name && want.Typeflag != tar.TypeXGlobalHeader {
			t.Fatalf("entry %d: name %q, archive/tar has %q", i, h.name, want.Name)
		}
		if want.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		mtime := time.Unix(h.mtimeSec, int64(h.mtimeNsec))
		if h.typ != want.Typeflag || h.link != want.Linkname || h.mode != want.Mode || h.size != want.Size ||
			int(h.uid) != want.Uid || int(h.gid) != want.Gid || !mtime.Equal(want.ModTime) ||
			h.devMajor != want.Devmajor || h.devMinor != want.Devminor {
			t.Fatalf("entry %d: %+v, archive/tar has %+v", i, h, want)
		}
		records := 0
		for k, v := range want.PAXRecords {
			if len(k) > len(xattrRecord) && k[:len(xattrRecord)] == xattrRecord {
				records++
				found := false
				for _, x := range h.xattrs {
					found = found || x.Name == k[len(xattrRecord):] && string(x.Value) == v
				}
				if !found {
					t.Fatalf("entry %d: xattr %q is missing", i, k)
				}
			}
		}
		if h.typ == typeRegular || h.typ == typeGNUSparse {
			if h.size > 8<<20 {
				return // archive/tar would write out the holes
			}
			c, err := ours.content(h)
			data, wantErr := io.ReadAll(theirs)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("entry %d: content: error %v, archive/tar has %v", i, err, wantErr)
			}
			if err != nil {
				return
			}
			got := make([]byte, h.size)
			for _, e := range c.Extents {
				copy(got[e.Logical:e.Logical+e.Length], b[e.Physical:])
			}
			if !bytes.Equal(got, data) {
				t.Fatalf("entry %d: content differs from archive/tar's", i)
			}
		}
	}
}

// laterError reports whether archive/tar is going to refuse as well what the
// scanner refuses at once: data that a sparse map counts on and that is not
// there.
func laterError(r *tar.Reader, h *tar.Header, err error) bool {
	if errors.Is(err, errSize) || errors.Is(err, errPAX) {
		return true // sizes and times at the edge of 64 bits
	}
	if !errors.Is(err, errSparse) {
		return false
	}
	if h.Size > 8<<20 {
		return true // archive/tar would write out the holes
	}
	_, err = io.Copy(io.Discard, r)
	return err != nil
}

// mend gives every header in b the right checksum, so that a fuzzer gets past
// the first check.
func mend(b []byte) []byte {
	b = bytes.Clone(b)
	for at := 0; at+blockSize <= len(b); at += blockSize {
		if h := b[at : at+blockSize]; string(h[257:262]) == "ustar" {
			setChecksum(h)
		}
	}
	return b
}

func FuzzTar(f *testing.F) {
	for _, b := range goCorpus(f) {
		if len(b) < 100<<10 {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 1<<20 {
			sameAsArchiveTar(t, b)
			sameAsArchiveTar(t, mend(b))
		}
	})
}

// FuzzMerge reads two layers as they come and merges them.
func FuzzMerge(f *testing.F) {
	f.Add(pack(f, []item{dir("d", 0o755), reg("d/f", "x"), sym("s", "d"), hard("h", "d/f")}),
		pack(f, []item{reg("d/.wh.f", ""), reg("s/.wh..wh..opq", ""), hard("d/f/g", "s/f"), sym("d", "..")}))
	for _, b := range goCorpus(f) {
		if len(b) < 10<<10 {
			f.Add(b, gz(f, b))
		}
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		o := Options{TempDir: t.TempDir(), Limits: Limits{Entries: 1000, Metadata: 1 << 20, Bytes: 64 << 20}}
		var layers []*Layer
		for _, p := range [][]byte{mend(a), mend(b)} {
			l, err := Read(t.Context(), blob("L", p), o)
			if err != nil {
				continue
			}
			defer l.Close()
			viaRecord(t, l)
			layers = append(layers, l)
		}
		if tr, err := Merge(layers); err == nil {
			wellFormed(t, tr)
		}
	})
}

// FuzzRecord holds that a record of any bytes is refused, or is that of a layer
// that can be merged.
func FuzzRecord(f *testing.F) {
	for _, b := range [][]byte{someTar(f), strangeTar(f)} {
		l, err := Read(f.Context(), blob("L", b), Options{TempDir: f.TempDir()})
		if err != nil {
			f.Fatal(err)
		}
		defer l.Close()
		f.Add(l.Record())
	}
	f.Fuzz(func(t *testing.T, record []byte) {
		l, err := FromRecord("L", record, Limits{Entries: 1000, Metadata: 1 << 20}, nowhere)
		if err != nil {
			return
		}
		viaRecord(t, l)
		if tr, err := Merge([]*Layer{l}); err == nil {
			wellFormed(t, tr)
		}
	})
}
