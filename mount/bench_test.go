package mount

import (
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/tree"
)

const (
	benchFiles = 11000
	benchLarge = 500 << 20
)

// words makes size bytes of text that zstd makes 2.5 times shorter or so.
func words(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, size+16)
	for len(b) < size {
		b = fmt.Appendf(b, "%x ", rng.Uint32N(1<<20)*2654435761>>8)
		if rng.IntN(3) > 0 && len(b) > 400 {
			at := rng.IntN(len(b) - 30)
			b = append(b, b[at:at+20]...)
		}
	}
	return b[:size]
}

// repeated is a large file: one MiB, over and over, with the count in front.
type repeated struct{ unit []byte }

func (r repeated) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		at := off + int64(n)
		part := p[n:]
		in := at % int64(len(r.unit))
		m := copy(part, r.unit[in:])
		for i := range min(m, 64) { // every 64 KiB differs from the others
			if (in+int64(i))%(64<<10) < 8 {
				part[i] ^= byte((at + int64(i)) >> 16)
			}
		}
		n += m
	}
	return len(p), nil
}

func benchTree() *tree.Tree {
	root := dir(entries{})
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range benchFiles {
		name := fmt.Sprintf("d%02d", i%40)
		d := root.Entries[name]
		if d == nil {
			d = dir(entries{})
			root.Entries[name] = d
		}
		sub := fmt.Sprintf("s%02d", i%31)
		if d.Entries[sub] == nil {
			d.Entries[sub] = dir(entries{})
		}
		size := int(100 * float64(int(1)<<rng.IntN(9)) * (1 + rng.Float64()))
		d.Entries[sub].Entries[fmt.Sprintf("file-%d.py", i)] = file(0o644, words(uint64(i), size))
	}
	large := &tree.Inode{Mode: unix.S_IFREG | 0o644, Size: benchLarge}
	large.Content = tree.Content{Source: repeated{words(1, 1<<20)}, Extents: []tree.Extent{{Length: benchLarge}}}
	root.Entries["large"] = large
	return &tree.Tree{Root: counted(root)}
}

// BenchmarkMount compares the first and the second touch of a root image that
// the kernel mounts, that is served from a file, and that is served out of
// chunks in memory, each decoded and verified. On a busy machine the least of
// some runs says more than their mean.
//
//	go test -run '^$' -bench Mount -benchtime 5x ./mount
func BenchmarkMount(b *testing.B) {
	root := benchTree()
	plan, image := imageOf(b, root)
	x, store := chunked(b, plan)
	fetcher := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: []chunkstore.Store{store}})
	quiet := slog.New(slog.DiscardHandler)
	serve := func(image Image, ahead int) func(b *testing.B) string {
		return func(b *testing.B) string {
			dir := b.TempDir()
			s, err := Serve(dir, Options{Meta: plan.Meta(), Image: image, Log: quiet, ReadAhead: ahead})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = s.Close() })
			return dir
		}
	}
	for _, work := range []struct{ name, command string }{
		{"find", "find $1 > /dev/null"},
		{"stat", "find $1 -printf %s%T@ > /dev/null"},
		{"ls-lR", "ls -lR $1 > /dev/null"},
		{"small-files", "find $1 -name '*.py' -print0 | xargs -0 cat > /dev/null"},
		{"sequential-500MB", "dd if=$1/large of=/dev/null bs=1M status=none"},
		{"random-4KiB", `python3 -c "
import os,random,sys
f=os.open(sys.argv[1]+'/large',os.O_RDONLY)
os.posix_fadvise(f,0,0,os.POSIX_FADV_RANDOM)
random.seed(1)
for i in range(5000): os.pread(f,4096,random.randrange(0,125000)*4096)" $1`},
	} {
		for _, kind := range []struct {
			name  string
			mount func(b *testing.B) string
		}{
			{"kernel", func(b *testing.B) string { return mountKernel(b, image.path) }},
			{"file", serve(image, 0)},
			{"chunks", serve(lazy.New(x, fetcher, lazy.Options{}), 0)},
			{"chunks-1MiB", serve(lazy.New(x, fetcher, lazy.Options{}), 1<<20)},
		} {
			b.Run(work.name+"/"+kind.name, func(b *testing.B) {
				dir := kind.mount(b)
				run := func(least time.Duration) time.Duration {
					start := time.Now()
					if out, err := exec.Command("sh", "-ec", work.command, "sh", dir).CombinedOutput(); err != nil {
						b.Fatalf("%s: %v: %s", work.command, err, out)
					}
					return min(least, time.Since(start))
				}
				b.Run("first", func(b *testing.B) {
					least := time.Hour
					for b.Loop() {
						b.StopTimer()
						dropCaches(b)
						f, err := os.Open(image.path) // what differs is the mount, not the disk
						if err != nil {
							b.Fatal(err)
						}
						_, _ = io.Copy(io.Discard, f)
						_ = f.Close()
						b.StartTimer()
						least = run(least)
					}
					b.ReportMetric(float64(least.Microseconds())/1000, "least-ms")
				})
				b.Run("second", func(b *testing.B) {
					least := time.Hour
					for b.Loop() {
						least = run(least)
					}
					b.ReportMetric(float64(least.Microseconds())/1000, "least-ms")
				})
			})
		}
	}
}

// BenchmarkReady is the time from nothing to a mount that answers.
func BenchmarkReady(b *testing.B) {
	root, _ := small()
	plan, image := imageOf(b, root)
	dir := b.TempDir()
	name := filepath.Join(dir, "short")
	for b.Loop() {
		s, err := Serve(dir, Options{Meta: plan.Meta(), Image: image})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := os.Lstat(name); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
