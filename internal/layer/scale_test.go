package layer

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// manyEntries streams a gzip layer of n small files, perDir to a directory.
func manyEntries(n, perDir int) Blob {
	return Blob{Name: "many", Size: -1, Open: func(context.Context) (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			z, _ := gzip.NewWriterLevel(w, gzip.NoCompression)
			tw := tar.NewWriter(z)
			dir := ""
			for i := range n {
				if i%perDir == 0 {
					dir = fmt.Sprintf("usr/lib/node_modules/package-%07d/", i)
					_ = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755})
				}
				_ = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%smodule-%07d.js", dir, i), Mode: 0o644, Size: 4})
				_, _ = io.WriteString(tw, "data")
			}
			_ = tw.Close()
			w.CloseWithError(z.Close())
		}()
		return r, nil
	}}
}

// TestMemory holds what a tree costs. The heap that lives is half of what a
// process takes at Go's default, so this is the number to keep small.
func TestMemory(t *testing.T) {
	for _, tt := range []struct{ files, perDir int }{{500_000, 10}, {100_000, 100_000}} {
		t.Run(fmt.Sprintf("%d files, %d to a directory", tt.files, tt.perDir), func(t *testing.T) {
			heap := func() uint64 {
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return m.HeapAlloc
			}
			before := heap()
			start := time.Now()
			l, err := Read(t.Context(), manyEntries(tt.files, tt.perDir), Options{TempDir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			read, list := time.Since(start), heap()-before
			start = time.Now()
			tr, err := Merge([]*Layer{l})
			if err != nil {
				t.Fatal(err)
			}
			merged := time.Since(start)
			all := heap() - before
			t.Logf("list %d MiB in %v, tree %d MiB in %v", list>>20, read, all>>20, merged)
			if limit := uint64(tt.files) * 300; list > limit || all > limit {
				t.Errorf("the list takes %d bytes and the tree %d, want at most %d", list, all, limit)
			}
			runtime.KeepAlive(tr)
		})
	}
}

// streamed is a gzip layer that is written while it is read, so that it takes no
// memory.
func streamed(write func(*tar.Writer) error) Blob {
	return Blob{Name: "L", Size: -1, Open: func(context.Context) (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
			tw := tar.NewWriter(z)
			w.CloseWithError(errors.Join(write(tw), tw.Close(), z.Close()))
		}()
		return r, nil
	}}
}

// TestHostileSizes holds that a small layer cannot become a large one in
// memory or on disk, nor take long.
func TestHostileSizes(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	long := strings.Repeat("x", 4000)
	tests := []struct {
		name string
		blob Blob
		want string
	}{
		{"long targets", streamed(func(w *tar.Writer) error {
			for i := range 20_000 {
				if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("%06d", i), Linkname: long}); err != nil {
					return err
				}
			}
			return nil
		}), "more than 16777216 bytes"},
		{"zeros", streamed(func(w *tar.Writer) error {
			const size = 128 << 20
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Mode: 0o644, Size: size}); err != nil {
				return err
			}
			for range size / len(zeros) {
				if _, err := w.Write(zeros[:]); err != nil {
					return err
				}
			}
			return nil
		}), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bounded.Case(t)
			start := time.Now()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			l, err := Read(t.Context(), tt.blob, Options{TempDir: t.TempDir(), Limits: Limits{Metadata: 16 << 20}})
			runtime.ReadMemStats(&after)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > 256<<20 {
				t.Errorf("allocated %d bytes", n)
			}
			if err == nil {
				defer l.Close()
				if st, err := l.spool.Stat(); err != nil || st.Size() > 1<<20 {
					t.Errorf("spooled %d bytes (%v)", st.Size(), err)
				}
			}
			t.Log(time.Since(start))
		})
	}
}

func BenchmarkRead(b *testing.B) {
	// Half of it compresses, as in most roots.
	data := make([]byte, 64<<20)
	state := uint64(1)
	for i := 0; i < len(data); i += 2 {
		state = state*6364136223846793005 + 1442695040888963407
		data[i] = byte(state >> 56)
		data[i+1] = "bootfs"[i%6]
	}
	var items []item
	for off, i := 0, 0; off < len(data); i++ {
		n := min(1000<<(i%12), len(data)-off)
		items = append(items, reg(fmt.Sprint(i), string(data[off:off+n])))
		off += n
	}
	plain := pack(b, items)
	for _, form := range []struct {
		name string
		blob Blob
	}{{"gzip", blob("L", gz(b, plain))}, {"zstd", blob("L", zst(b, plain))}, {"plain", Blob{Name: "L", Size: int64(len(plain)), Plain: bytes.NewReader(plain)}}} {
		form.blob.DiffID = diffID(plain)
		b.Run(form.name, func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				l, err := Read(b.Context(), form.blob, Options{TempDir: b.TempDir()})
				if err != nil {
					b.Fatal(err)
				}
				if err := l.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkEntries(b *testing.B) {
	var t *tree.Tree
	for b.Loop() {
		l, err := Read(b.Context(), manyEntries(100_000, 20), Options{TempDir: os.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		if t, err = Merge([]*Layer{l}); err != nil {
			b.Fatal(err)
		}
		l.Close()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/entry")
	runtime.KeepAlive(t)
}
