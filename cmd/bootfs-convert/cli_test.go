package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/transport"
)

func TestExplain(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	plain := errors.New("cause")
	for _, tt := range []struct {
		name string
		ctx  context.Context
		err  error
		code int
		line string
	}{
		{"anything", t.Context(), plain, exitFailed, "cause"},
		{"usage", t.Context(), fmt.Errorf("x: %w", usagef("flag %q", "a")), exitUsage, `x: flag "a"`},
		{"options", t.Context(), &convert.Error{Part: convert.Usage, Err: plain}, exitUsage, "cause"},
		{"source", t.Context(), &convert.Error{Part: convert.Source, Err: plain}, exitSource, "cause"},
		{"destination", t.Context(), fmt.Errorf("linux/arm64: %w", &convert.Error{Part: convert.Destination, Err: plain}), exitDestination, "linux/arm64: cause"},
		{"space", t.Context(), &convert.Error{Part: convert.Source, Err: fmt.Errorf("layer: %w", scratch.ErrNoSpace)}, exitSpace,
			"layer: too little temporary space (name another directory with --tmp-dir)"},
		{"damaged chunk", t.Context(), fmt.Errorf("x: %w", &chunkstore.CorruptError{Where: "pack", Got: "a", Want: "b"}), exitChunk, ""},
		{"missing chunk", t.Context(), fmt.Errorf("x: %w", chunkstore.ErrNotFound), exitChunk, "x: chunk not found"},
		{"differences were listed", t.Context(), errDifferent, exitDifferent, ""},
		{"damage was listed", t.Context(), errDamaged, exitDifferent, ""},
		{"interrupted", cancelled, &convert.Error{Part: convert.Source, Err: context.Canceled}, exitInterrupted, "interrupted"},
		{"several lines", t.Context(), errors.Join(errors.New("one\t1"), errors.New("two")), exitFailed, "one 1; two"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, line := explain(tt.ctx, tt.err)
			if code != tt.code || line != tt.line && tt.name != "damaged chunk" || strings.Contains(line, "\n") {
				t.Errorf("got %d, %q, want %d, %q", code, line, tt.code, tt.line)
			}
			if !strings.Contains(exitHelp, fmt.Sprintf("  %-5d", code)) {
				t.Errorf("--help does not list exit code %d", code)
			}
		})
	}
}

// TestRun calls the command in process.
func TestRun(t *testing.T) {
	var stdout, stderr bytes.Buffer
	s := stdio{&stdout, &stderr, func(string) string { return "" }}
	if code := run(t.Context(), []string{"inspect", "oci:/no/such"}, s); code != exitSource {
		t.Errorf("got exit code %d, want %d", code, exitSource)
	}
	if got := stderr.String(); !strings.HasPrefix(got, "bootfs-convert: oci:/no/such: ") || strings.Count(got, "\n") != 1 || stdout.Len() > 0 {
		t.Errorf("got %q and %q, want one line on stderr", stdout.String(), got)
	}
}

func TestLineHandler(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(&lineHandler{w: &b, level: slog.LevelInfo}).With("image", "x")
	log.Debug("never")
	log.Info("told", "n", 3)
	log.Warn("careful")
	log.WithGroup("g").Error("wrong", "err", io.EOF)
	want := "told image=x n=3\nbootfs-convert: warning: careful image=x\nbootfs-convert: error: wrong image=x err=EOF\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func TestLines(t *testing.T) {
	var b bytes.Buffer
	l := &lines{w: &b, every: time.Hour}
	e := convert.Event{Platform: "linux/amd64", Phase: convert.PhaseChunks, Total: 4000}
	l.event(e)
	e.Done = 2000
	l.event(e) // too soon
	l.every = 0
	l.event(e)
	u := convert.Event{Phase: convert.PhaseUpload, Done: 5}
	l.event(u)
	u.Done = 70
	l.event(u)
	e.Done, e.End = 4000, true
	l.event(e)
	want := regexp.MustCompile(`^chunks linux/amd64: 2\.0 kB of 4\.0 kB, \S+ \S+/s, \d+s left\nupload: 70 B, \S+ \S+/s\nchunks linux/amd64: 4\.0 kB in 0\.\d s\n$`)
	if !want.MatchString(b.String()) {
		t.Errorf("got %q", b.String())
	}
	quiet := &lines{w: &b, every: -1}
	b.Reset()
	quiet.event(e)
	quiet.event(e)
	if b.Len() > 0 {
		t.Errorf("--quiet shows %q", b.String())
	}
}

// TestHowToRun reads the last line that a conversion writes.
func TestHowToRun(t *testing.T) {
	const begin = "run it: docker run --device /dev/fuse --cap-add SYS_ADMIN "
	daemon, registry := transport.Ref{Transport: transport.Daemon, Name: "a:1"}, transport.Ref{Transport: transport.Registry, Name: "r.example.com/a:1"}
	for _, tt := range []struct {
		name        string
		dst         transport.Ref
		flag, store string // --store, and where the chunks are
		quiet       bool
		want        string // "" for nothing
	}{
		{"a registry", registry, "", "registry://r.example.com/a", false, begin + "r.example.com/a:1; "},
		{"a registry on this machine", registry, "", "registry+http://127.0.0.1:5000/a", false, begin + "--network host r.example.com/a:1; "},
		{"a directory", daemon, "c", "/srv/c", false, begin + "-v /srv/c:/srv/c:ro a:1; "},
		{"a directory of the converter's container", daemon, "", "/output/c", false, begin + "-v DIRECTORY:/output/c:ro a:1; "},
		{"quiet", registry, "", "registry://r.example.com/a", true, ""},
		{"no engine has it", transport.Ref{Transport: transport.OCI, Path: "dir", Name: "a"}, "", "", false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			f := &convertFlags{common: &common{stdio: stdio{stdout: &out}, quiet: tt.quiet}, store: tt.flag}
			if err := f.printReport(&convert.Report{Store: tt.store}, tt.dst); err != nil {
				t.Fatal(err)
			}
			_, got, _ := strings.Cut(out.String(), "\n")
			if !strings.HasPrefix(got, tt.want) || (got == "") != (tt.want == "") {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestBootPlatform(t *testing.T) {
	for in, want := range map[string]string{
		"linux/amd64": "linux/amd64", "linux/amd64/v3": "linux/amd64", "linux/arm64/v8": "linux/arm64", "linux/arm64": "linux/arm64",
		"linux/arm/v7": "linux/arm/v7", "linux/arm": "linux/arm/v7", "linux/arm/v5": "linux/arm/v5", "linux/386": "linux/386",
	} {
		p, err := v1.ParsePlatform(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := bootPlatform(*p); got != want {
			t.Errorf("boot for %s is that of %s, want %s", in, got, want)
		}
	}
}

func TestAbsStores(t *testing.T) {
	got, err := absStores([]string{"a/b", "/c", "registry://h/r", "oci:d"})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"/cmd/bootfs-convert/a/b", "/c", "registry://h/r", "/cmd/bootfs-convert/d"} {
		if !strings.HasSuffix(got[i], want) || strings.HasPrefix(got[i], "oci:") && !strings.HasPrefix(got[i], "oci:/") {
			t.Errorf("got %q, want …%q", got[i], want)
		}
	}
}

func TestOnePlatform(t *testing.T) {
	p := func(s string) v1.Platform { return v1.Platform{OS: "linux", Architecture: s} }
	id := func(p v1.Platform) v1.Platform { return p }
	if got, err := onePlatform([]v1.Platform{p("vax")}, id, false); err != nil || got.Architecture != "vax" {
		t.Errorf("the only one: %v, %v", got, err)
	}
	var usage usageError
	if _, err := onePlatform([]v1.Platform{p("vax"), p("pdp11")}, id, false); !errors.As(err, &usage) || !strings.Contains(err.Error(), "linux/vax, linux/pdp11") {
		t.Errorf("none is this machine's: %v", err)
	}
}
