package main

import (
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// treeFile writes n bytes of what lies below dir to a file, over and over if
// there are fewer.
func treeFile(b *testing.B, dir string, n int64) string {
	b.Helper()
	out, err := os.Create(filepath.Join(b.TempDir(), "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer out.Close()
	for n > 0 {
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || n == 0 {
				return err
			}
			in, err := os.Open(p)
			if err != nil {
				return err
			}
			defer in.Close()
			k, err := io.CopyN(out, in, n)
			if n -= k; err == io.EOF {
				return nil
			}
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	return out.Name()
}

// BenchmarkCasync measures make and extract against casync's, one after the
// other on the same 400 MB, into a directory on the same disk: x of casync's
// time, the median and both ends of what was measured.
func BenchmarkCasync(b *testing.B) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	file := treeFile(b, strings.TrimSpace(string(root)), 400e6)
	dir := b.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	timed := func(f func()) float64 {
		runtime.GC()
		began := time.Now()
		f()
		return time.Since(began).Seconds()
	}
	ours := func(args ...string) func() {
		return func() {
			if code := run(b.Context(), append(args, "-q"), stdio{io.Discard, os.Stderr, func(string) string { return "" }}); code != exitOK {
				b.Fatalf("bootfs-convert %v: exit code %d", args, code)
			}
		}
	}
	casync := func(args ...string) func() {
		return func() {
			if out, err := exec.Command("casync", args...).CombinedOutput(); err != nil {
				b.Fatalf("casync %v: %v\n%s", args, err, out)
			}
		}
	}
	var made, extracted []float64
	var seconds [2][]float64
	for b.Loop() {
		for _, name := range []string{"a.castr", "b.castr", "a", "b"} {
			if err := os.RemoveAll(path(name)); err != nil {
				b.Fatal(err)
			}
		}
		theirs := timed(casync("make", "--digest=sha256", "--store="+path("a.castr"), path("a.caibx"), file))
		our := timed(ours("make", "--store", path("b.castr"), file, path("b.caibx")))
		made, seconds[0] = append(made, our/theirs), append(seconds[0], our)
		// Each puts together what it has made; for both it lies in memory.
		theirs = timed(casync("extract", "--store="+path("a.castr"), path("a.caibx"), path("a")))
		our = timed(ours("extract", "--store", path("b.castr"), path("b.caibx"), path("b")))
		extracted, seconds[1] = append(extracted, our/theirs), append(seconds[1], our)
	}
	b.ReportMetric(0, "ns/op") // it would be the sum of both
	for name, x := range map[string][]float64{"make": made, "extract": extracted} {
		slices.Sort(x)
		b.ReportMetric(x[len(x)/2], "x-"+name)
		b.ReportMetric(x[0], "x-"+name+"-min")
		b.ReportMetric(x[len(x)-1], "x-"+name+"-max")
	}
	for i, name := range []string{"make", "extract"} {
		slices.Sort(seconds[i])
		b.ReportMetric(seconds[i][len(seconds[i])/2], "s-"+name)
	}
}
