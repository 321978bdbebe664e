package local

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// image returns bytes that resemble a root image: files of many sizes, random
// and repetitive, with zeros between and behind them. bounds are the offsets
// at which files begin and end.
func image() (data []byte, bounds []int) {
	r := rand.New(rand.NewPCG(1, 2))
	random := rand.NewChaCha8([32]byte{1})
	for _, n := range []int{
		1, 2, 4095, 4096, 4097, 16<<10 - 1, 16 << 10, 16<<10 + 1, 100_000, 256<<10 - 1, 256 << 10, 256<<10 + 1, 1 << 20, 3_000_001,
	} {
		file := make([]byte, n)
		random.Read(file)
		if r.IntN(2) == 0 {
			for i := range file {
				file[i] &= 7
			}
		}
		data = append(data, file...)
		bounds = append(bounds, len(data))
		data = append(data, make([]byte, r.IntN(10_000))...)
		bounds = append(bounds, len(data))
	}
	data = append(data, make([]byte, 1<<20)...)
	return data, append(bounds, len(data))
}

// TestCasyncExtract: casync puts the image together from our index and store,
// with chunks shorter than the index's minimum where files end.
func TestCasyncExtract(t *testing.T) {
	data, bounds := image()
	cutter, err := chunker.New(chunker.V1)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		t.Run(d.String(), func(t *testing.T) {
			dir := t.TempDir()
			store := create(t, filepath.Join(dir, "store.castr"))
			var file bytes.Buffer
			w := index.NewWriter(&file, chunker.V1, d)
			start, short := 0, 0
			for _, end := range bounds {
				for start < end {
					n := cutter.Cut(data[start:end])
					if n < chunker.V1.Min {
						short++
					}
					plain := data[start : start+n]
					if err := store.Put(t.Context(), d.Sum(plain), chunkstore.Encode(nil, plain)); err != nil {
						t.Fatal(err)
					}
					if err := w.Append(d.Sum(plain), n); err != nil {
						t.Fatal(err)
					}
					start += n
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if short < 10 {
				t.Fatalf("got %d chunks below the minimum, want the test to have many", short)
			}
			caibx := filepath.Join(dir, "image.caibx")
			if err := os.WriteFile(caibx, file.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			out := filepath.Join(dir, "out")
			run(t, "casync", "extract", "--store="+store.String(), caibx, out)
			if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
				t.Errorf("casync extract: got %d bytes, %v, want the image's %d", len(got), err, len(data))
			}

			// casync takes every chunk for used, and neither counts nor touches
			// one that is being written.
			temp := filepath.Join(filepath.Dir(path(store.String(), d.Sum(data[:1]))), tempPrefix+"X")
			if err := os.WriteFile(temp, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			before := ids(t, store)
			run(t, "casync", "gc", "--store="+store.String(), caibx)
			if after := ids(t, store); len(after) != len(before) {
				t.Errorf("casync gc: got %d chunks, want the %d before it", len(after), len(before))
			}
			if _, err := os.Stat(temp); err != nil {
				t.Errorf("casync gc: %v", err)
			}
			// A store that we wrote is one that casync adds to.
			run(t, "casync", "make", "--digest="+d.String(), "--store="+store.String(), filepath.Join(dir, "again.caibx"), out)
		})
	}
}

func ids(t *testing.T, s *Store) map[index.ID]bool {
	t.Helper()
	got := make(map[index.ID]bool)
	for e, err := range s.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		got[e.ID] = true
	}
	return got
}

// TestCasyncMake: what casync cut, named and stored, our packages read.
func TestCasyncMake(t *testing.T) {
	data, _ := image()
	dir := t.TempDir()
	file := filepath.Join(dir, "image")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		for _, options := range []string{"16384:65536:262144 zstd", "16384:65536:262144 xz", "16384:65536:262144 gzip", "64:1024:4096 zstd"} {
			t.Run(d.String()+" "+options, func(t *testing.T) {
				sizes, compression, _ := strings.Cut(options, " ")
				dir := t.TempDir()
				caibx := filepath.Join(dir, "image.caibx")
				castr := filepath.Join(dir, "image.castr")
				source, content := file, data
				if strings.HasPrefix(sizes, "64:") { // a file per KiB takes its time
					source, content = filepath.Join(dir, "part"), data[:200_000]
					if err := os.WriteFile(source, content, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				run(t, "casync", "make", "--digest="+d.String(), "--chunk-size="+sizes, "--compression="+compression, "--store="+castr, caibx, source)
				raw, err := os.ReadFile(caibx)
				if err != nil {
					t.Fatal(err)
				}
				x, err := index.Open(raw)
				if err != nil {
					t.Fatal(err)
				}
				if err := x.Verify(); err != nil {
					t.Error(err)
				}
				if x.Digest() != d || x.Size() != int64(len(content)) {
					t.Fatalf("got digest %v, size %d, want %v, %d", x.Digest(), x.Size(), d, len(content))
				}
				store, err := Open(castr)
				if err != nil {
					t.Fatal(err)
				}
				defer store.Close()
				f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: d, Stores: []chunkstore.Store{store}})
				defer f.Close()
				var got []byte
				want := make(map[index.ID]bool)
				for i := range x.Len() {
					c, err := x.At(i)
					if err != nil {
						t.Fatal(err)
					}
					want[c.ID] = true
					if ok, err := store.Has(t.Context(), c.ID); err != nil || !ok {
						t.Errorf("chunk %s: Has: got %v, %v, want true", c.ID, ok, err)
					}
					if got, err = f.Fetch(t.Context(), c, got); err != nil {
						t.Fatal(err)
					}
				}
				if !bytes.Equal(got, content) {
					t.Errorf("got %d bytes, want the %d that casync stored", len(got), len(content))
				}
				if got := ids(t, store); len(got) != len(want) {
					t.Errorf("List: got %d chunks, want the index's %d", len(got), len(want))
				}
			})
		}
	}
}

// TestCasyncIndex: of the same chunk casync writes the same index, but for the
// flags that tell how it chooses the files of an archive.
func TestCasyncIndex(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a")
	if err := os.WriteFile(file, []byte("a"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		caibx := filepath.Join(dir, d.String()+".caibx")
		run(t, "casync", "make", "--digest="+d.String(), "--chunk-size=64:256:1024", "--store="+filepath.Join(dir, "store.castr"), caibx, file)
		want, err := os.ReadFile(caibx)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		w := index.NewWriter(&got, chunker.Params{Min: 64, Avg: 256, Max: 1024}, d)
		if err := w.Append(d.Sum([]byte("a")), 1); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		const flags = 16
		want[flags+7] &^= 0xd0
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%v: got\n%x, want\n%x", d, got.Bytes(), want)
		}
	}
}
