package e2e

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/reads"
)

// rangeLog forwards to the registry and notes the requests for parts of blobs.
type rangeLog struct {
	address string
	mu      sync.Mutex
	of      []*rangeRequest // guarded by mu
}

type rangeRequest struct {
	digest, bytes string
	countingBody
}

// isPartOf reports whether q asked for nothing that p had not asked for.
func (q *rangeRequest) isPartOf(p *rangeRequest) bool {
	var first, last, pFirst, pLast int64
	_, err := fmt.Sscanf(q.bytes+" "+p.bytes, "bytes=%d-%d bytes=%d-%d", &first, &last, &pFirst, &pLast)
	return err == nil && q.digest == p.digest && first >= pFirst && last <= pLast
}

func newRangeLog(t *testing.T) *rangeLog {
	l := &rangeLog{}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: w.registry.Address})
			r.Out.Host = r.In.Host
		},
		ModifyResponse: func(r *http.Response) error {
			if bytes := r.Request.Header.Get("Range"); bytes != "" && r.Request.Method == http.MethodGet {
				q := &rangeRequest{path.Base(r.Request.URL.Path), bytes, countingBody{r.Body, new(atomic.Int64)}}
				l.mu.Lock()
				defer l.mu.Unlock()
				l.of = append(l.of, q)
				r.Body = &q.countingBody
			}
			return nil
		},
		ErrorLog: log.New(io.Discard, "", 0),
	}
	s := httptest.NewServer(forward)
	t.Cleanup(s.Close)
	l.address = strings.TrimPrefix(s.URL, "http://")
	return l
}

// during returns what was asked for while f ran.
func (l *rangeLog) during(f func()) []*rangeRequest {
	l.mu.Lock()
	l.of = nil
	l.mu.Unlock()
	f()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.of
}

// profileOf records a start of image and returns what was read.
func profileOf(t *testing.T, image string, args ...string) []reads.Range {
	t.Helper()
	file := filepath.Join(t.TempDir(), "start-set")
	args = append([]string{"profile", image, "-o", file, "--run-flag=--network=host"}, args...)
	if out, err := w.command(args...).CombinedOutput(); err != nil {
		t.Fatalf("bootfs-convert %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ranges, err := reads.Parse(f)
	if err != nil {
		t.Fatal(err)
	}
	return ranges
}

// has reports whether a file whose path ends in suffix is among ranges.
func has(ranges []reads.Range, suffix string) bool {
	return slices.ContainsFunc(ranges, func(g reads.Range) bool { return strings.HasSuffix(g.Path, suffix) })
}

// storedOf returns the compressed bytes of the chunks of img in which ranges lie.
func storedOf(t *testing.T, img *converted.Image, ranges []reads.Range) (stored int64) {
	t.Helper()
	meta, err := erofs.NewReader(img.Meta)
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[index.ID]bool)
	for _, g := range ranges {
		n, err := meta.Inode(meta.RootNID())
		for name := range strings.SplitSeq(g.Path[1:], "/") {
			var nid uint64
			if nid, err = meta.Lookup(n, name); err == nil {
				n, err = meta.Inode(nid)
			}
			if err != nil {
				t.Fatalf("%s: %v", g.Path, err)
			}
		}
		for off := g.Offset; off < g.Offset+g.Size; {
			at, size, err := meta.Span(n, off)
			if err != nil {
				t.Fatalf("%s: %v", g.Path, err)
			}
			size = min(size, g.Offset+g.Size-off)
			off += size
			for pos := img.Index.Find(at); at >= 0 && pos < img.Index.Len(); pos++ {
				c, err := img.Index.At(pos)
				if err != nil {
					t.Fatal(err)
				}
				if c.Offset >= at+size {
					break
				}
				place, err := img.Locators.At(pos)
				if err != nil {
					t.Fatal(err)
				}
				if !known[c.ID] {
					known[c.ID] = true
					stored += int64(place.Length)
				}
			}
		}
	}
	return stored
}

// TestStartSet records what a program reads, converts with that, and wants a cold
// start with one to three requests for all of it, and little beside it.
func TestStartSet(t *testing.T) {
	program := []string{"--", "python3", "-c", `import json,ssl,sqlite3; print("ok")`}
	recorded := profileOf(t, w.image, program...)
	if !hasModule(recorded, "/json/decoder.py") || len(recorded) < 20 {
		t.Fatalf("it has recorded %v", recorded)
	}
	file := filepath.Join(t.TempDir(), "start-set")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := reads.Write(f, recorded); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	through := newRangeLog(t)
	for name, base := range map[string]string{"alone": "none", "on top of the image without": w.image} {
		t.Run(name, func(t *testing.T) {
			image := w.image + "-start-set"
			if out, err := w.command("--boot", w.boot, "--start-set", file, "--base", base, "oci:"+w.layout, image).CombinedOutput(); err != nil {
				t.Fatalf("convert: %v\n%s", err, out)
			}
			if r := docker(t, "pull", "--quiet", image); r.code != 0 {
				t.Fatal(r.stderr)
			}
			img := openImage(t, image)
			start := make(map[string]bool) // packs
			for i := range img.Locators.Packs() {
				p, err := img.Locators.Pack(i)
				if err != nil {
					t.Fatal(err)
				}
				start[p.Digest] = p.Start
			}
			var touched []reads.Range
			requests := through.during(func() {
				touched = profileOf(t, image, append([]string{"--run-flag=-eBOOTFS_MIRRORS=http://" + through.address}, program...)...)
			})
			var moved int64
			ofStart, others := 0, 0
			for i, q := range requests {
				if slices.ContainsFunc(requests[:i], q.isPartOf) {
					continue // what is slow to come is asked for a second time
				}
				moved += q.n.Load()
				if start[q.digest] {
					ofStart++
				} else {
					others++
				}
			}
			want := storedOf(t, img, touched)
			t.Logf("%d requests for the start set and %d others moved %d bytes; the chunks that are read have %d: %.3f", ofStart, others, moved, want, float64(moved)/float64(want))
			if ofStart < 1 || ofStart > 3 || others > 3 {
				t.Errorf("%d requests for the start set and %d others, want 1 to 3 and hardly any", ofStart, others)
			}
			if moved*100 > want*115 {
				t.Errorf("moved %d bytes, want at most 1.15 times the %d of the chunks that are read", moved, want)
			}
			if base == "none" {
				wantReadAhead(t, image)
			}
		})
	}
}

// wantReadAhead starts an image with a recorded start set, and wants the kernel to
// read ahead little in it and later as much as elsewhere.
func wantReadAhead(t *testing.T, image string) {
	t.Helper()
	// The mount of the image has no path. It is what was not there before.
	of := func() map[string]string {
		files, err := filepath.Glob("/sys/class/bdi/0:*/read_ahead_kb")
		if err != nil {
			t.Fatal(err)
		}
		all := make(map[string]string)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil { // others come and go
				all[f] = strings.TrimSpace(string(b))
			}
		}
		return all
	}
	before := of()
	start(t, image, "sleep", "600")
	var little []string
	eventually(t, "the kernel reads 32 KiB ahead", func() bool {
		for f, kib := range of() {
			if before[f] == "" && kib == "32" {
				little = append(little, f)
			}
		}
		return len(little) > 0
	})
	eventually(t, "the kernel reads 128 KiB ahead", func() bool {
		now := of()
		return slices.ContainsFunc(little, func(f string) bool { return now[f] == "128" })
	})
}

// TestProfileUntilReady records programs that go on when they are ready, and some
// that never are.
func TestProfileUntilReady(t *testing.T) {
	before := docker(t, "ps", "--all", "--quiet").stdout
	port := freePort(t)
	byPort := profileOf(t, w.image, "--until-port", port, "--", "python3", "-c",
		"import socket; s = socket.create_server(('127.0.0.1', "+port+")); import time; time.sleep(600)")
	byLine := profileOf(t, w.image, "--until-log", "^I am ready$", "--", "python3", "-c",
		"import json; print('I am ready', flush=True); import time; time.sleep(600)")
	byTime := profileOf(t, w.image, "--until-time", "5s", "--", "python3", "-c", "import time; time.sleep(300); import sqlite3; time.sleep(600)")
	for name, tt := range map[string]struct {
		ranges []reads.Range
		has    string
		not    string
	}{
		"port": {byPort, "/socket.py", "/json/decoder.py"},
		"line": {byLine, "/json/decoder.py", "/socket.py"},
		"time": {byTime, "/ld.so.cache", "/sqlite3/dbapi2.py"},
	} {
		if !hasModule(tt.ranges, tt.has) || hasModule(tt.ranges, tt.not) {
			t.Errorf("%s: got %v, want %s in it and not %s", name, tt.ranges, tt.has, tt.not)
		}
	}

	for _, tt := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"it ends before its port is open", []string{w.image, "--until-port", port, "--", "python3", "-c", "print('I cannot')"}, 7, "ended with 0 before it was ready; it wrote: I cannot"},
		{"it ends before its line", []string{w.image, "--until-log", "^never$", "--", "true"}, 7, `before it wrote a line that matches "^never$"`},
		{"it is never ready", []string{w.image, "--until-log", "^never$", "--timeout", "2s", "--", "sleep", "600"}, 7, "is not ready after 2s"},
		{"it cannot be started", []string{w.image, "--run-flag=--entrypoint=/nowhere"}, 3, "no such file or directory"},
		{"it fails", []string{w.image, "--", "false"}, 0, "ended with 1, and what it read until then counts"},
		{"no converted image", []string{w.source, "--", "true"}, 3, "it is not a converted image"},
		{"no image", []string{w.image + "-nowhere"}, 3, "nowhere"},
	} {
		cmd := w.command(append([]string{"profile", "--run-flag=--network=host"}, tt.args...)...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != tt.code || !strings.Contains(string(out), tt.says) {
			t.Errorf("%s: %v, %q; want exit %d and %q", tt.name, err, out, tt.code, tt.says)
		}
	}
	if after := docker(t, "ps", "--all", "--quiet").stdout; after != before {
		t.Errorf("containers before:\n%s\nand after:\n%s", before, after)
	}
}

// hasModule is has for a module of Python, as source or compiled.
func hasModule(ranges []reads.Range, module string) bool {
	dir, name := path.Split(module)
	return has(ranges, module) || slices.ContainsFunc(ranges, func(g reads.Range) bool {
		return strings.Contains(g.Path, dir+"__pycache__/"+strings.TrimSuffix(name, "py")) && strings.HasSuffix(g.Path, ".pyc")
	})
}

// TestStartSetIsAskedFor asks the boot of a container that nobody has told to
// record, and that of one that records.
func TestStartSetIsAskedFor(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	quiet := start(t, image, "sleep", "600")
	var r result
	eventually(t, "boot answers", func() bool {
		r = docker(t, "exec", quiet, "/.bootfs/boot", "start-set")
		return strings.Contains(r.stderr, "BOOTFS_RECORD")
	})
	if r.code != 1 || r.stdout != "" {
		t.Errorf("%+v", r)
	}
	if r := docker(t, "exec", quiet, "/.bootfs/boot", "start-set", "now"); r.code != 2 || !strings.Contains(r.stderr, "usage") {
		t.Errorf("%+v", r)
	}
	id := start(t, "--env", "BOOTFS_RECORD=exit", image, "sh", "-c", "test ! -e /.bootfs && test -z \"$BOOTFS_RECORD\" && exec sleep 600")
	eventually(t, "the program has been read", func() bool {
		r = docker(t, "exec", id, "/.bootfs/boot", "start-set")
		ranges, err := reads.Parse(strings.NewReader(r.stdout))
		return r.code == 0 && err == nil && has(ranges, "/busybox")
	})
	if r := docker(t, "run", "--rm", "--env", "BOOTFS_RECORD=5", image); r.code != 125 || !strings.Contains(r.stderr, "BOOTFS_RECORD") {
		t.Errorf("%+v", r)
	}
}
