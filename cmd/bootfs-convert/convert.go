package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/bootbin"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/internal/scratch"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// convertFlags are those of bootfs-convert SRC DST.
type convertFlags struct {
	*common
	store        string
	boot         string
	base         string
	rewriteBelow float64
	keepTag      bool
	attestations string
	cacheFrom    []string
	cacheTo      []string
	startSets    []string
}

// noBase is the value of --base that asks for the canonical form.
const noBase = "none"

func (f *convertFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringVar(&f.store, "store", "", "`STORE` that the chunks go to (default packs beside the image)")
	fs.StringVar(&f.base, "base", "", "`REF` of a converted image whose packs are reused, or none (default what DST stands for until now)")
	fs.Float64Var(&f.rewriteBelow, "rewrite-below", convert.DefaultRewriteBelow, "`FRACTION` of the base's packs that must be used; packs that are used least are given up until it is, and what is used of them is stored again")
	fs.BoolVar(&f.keepTag, "keep-tag", false, "also tag the image keep-DIGEST, so that its packs stay when DST is moved")
	fs.StringVar(&f.attestations, "attestations", string(convert.Carry), "`WHAT` becomes of the source's attestations, SBOMs and signatures: carry, refuse or drop")
	fs.StringArrayVar(&f.cacheFrom, "cache-from", nil, "`CACHE` of an earlier conversion, whose layers need not be fetched: DIR or type=local,src=DIR, REF or type=registry,ref=REF, type=inline (beside DST); may be repeated")
	fs.StringArrayVar(&f.cacheTo, "cache-to", nil, "`CACHE` to write: DIR or type=local,dest=DIR, REF or type=registry,ref=REF, type=inline (beside DST); may be repeated")
	fs.StringArrayVar(&f.startSets, "start-set", nil, "`FILE` of profile with what the program reads until it is ready: its chunks are stored beside one another; may be repeated, for several uses of the image (default what the program's files tell)")
	fs.StringVar(&f.boot, "boot", "", "`FILE` with the boot binary for the image (default the built-in one)")
}

func runConvert(ctx context.Context, f *convertFlags, source, destination string) error {
	src, err := f.ref(source)
	if err != nil {
		return err
	}
	dst, err := f.ref(destination)
	if err != nil {
		return err
	}
	if src.String() == dst.String() {
		return usagef("SRC and DST are both %s, and the source would lose its name: choose another DST", src)
	}
	t, err := f.transportOptions()
	if err != nil {
		return err
	}
	store := f.store
	if store == "" && !dst.HoldsPacks() {
		store = f.getenv(envStore)
	}
	if err := checkStore(store); err != nil {
		return err
	}
	boot := builtInBoot
	if f.boot != "" {
		if boot, err = bootFromFile(f.boot); err != nil {
			return err
		}
	}
	if f.rewriteBelow <= 0 || f.rewriteBelow > 1 {
		return usagef("--rewrite-below %v: want a number above 0 and up to 1", f.rewriteBelow)
	}
	var base *transport.Ref
	if f.base != "" && f.base != noBase {
		r, err := f.ref(f.base)
		if err != nil {
			return err
		}
		base = &r
	}
	attestations, err := convert.ParseAttestations(f.attestations)
	if err != nil {
		return usagef("--%w", err)
	}
	cacheFrom, err := parseCaches("--cache-from", "src", f.cacheFrom)
	if err != nil {
		return err
	}
	cacheTo, err := parseCaches("--cache-to", "dest", f.cacheTo)
	if err != nil {
		return err
	}
	startSet, err := readStartSets(f.startSets)
	if err != nil {
		return err
	}
	d := f.display()
	report, err := convert.Run(ctx, convert.Options{
		StartSet:  startSet,
		CacheFrom: cacheFrom, CacheTo: cacheTo,
		Base: base, Canonical: f.base == noBase, RewriteBelow: f.rewriteBelow,
		Source: src, Destination: dst, Platforms: t.Platforms, Store: store, KeepTag: f.keepTag, Attestations: attestations, Access: f.access(), Boot: boot,
		TempDir: f.tempDir, Transport: t, Progress: d.event, Log: f.logger(d),
	})
	d.close()
	if err != nil {
		return err
	}
	if f.json {
		return f.writeJSON(report)
	}
	return f.printReport(report, dst)
}

// printReport writes the result of a conversion to dst for people.
func (f *convertFlags) printReport(r *convert.Report, dst transport.Ref) error {
	var b strings.Builder
	for _, p := range r.Platforms {
		switch {
		case p.CachedLayers > 0:
			fmt.Fprintf(&b, "%s: layers known from the cache: %d, %s of %s not fetched\n", p.Platform, p.CachedLayers, scratch.Bytes(p.CachedBytes), scratch.Bytes(p.SourceBytes))
		case len(f.cacheFrom) > 0:
			fmt.Fprintf(&b, "%s: no layer is known from the cache\n", p.Platform)
		}
		fmt.Fprintf(&b, "%s: %d files, %s in %d chunks", p.Platform, p.Files, scratch.Bytes(p.RootBytes), p.Chunks)
		fmt.Fprintf(&b, "; %s stored", scratch.Bytes(p.StoredBytes))
		if p.Packs > 0 {
			fmt.Fprintf(&b, " in %d packs", p.Packs)
		}
		if p.Base != "" {
			fmt.Fprintf(&b, ", %d of them the base's", p.BasePacks)
		}
		fmt.Fprintf(&b, "; %s written%s; engines pull %s\n", scratch.Bytes(p.NewBytes+p.CopiedBytes), writtenFor(p), scratch.Bytes(p.BootBytes))
	}
	fmt.Fprintf(&b, "%s is %s, made in %.1f s\n", r.Destination, r.Digest, r.Seconds)
	if f.keepTag {
		index, err := v1.NewHash(r.Digest)
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "also tagged %s\n", transport.KeepTag(index))
	}
	if !f.quiet && (dst.Transport == transport.Registry || dst.Transport == transport.Daemon) {
		fmt.Fprintf(&b, "run it: docker run %s; without the first two flags its files are fetched before it starts\n", f.runArgs(r.Store, dst.Name))
	}
	_, err := fmt.Fprint(f.stdout, b.String())
	return err
}

// runArgs are the arguments of docker run for an image whose root is to be
// mounted and whose chunks are in store.
func (f *convertFlags) runArgs(store, image string) string {
	args := []string{"--device /dev/fuse --cap-add SYS_ADMIN"}
	switch u, err := url.Parse(store); {
	case filepath.IsAbs(store) && f.store == "":
		// The environment of the converter's container names a directory there.
		args = append(args, "-v DIRECTORY:"+store+":ro")
	case filepath.IsAbs(store):
		args = append(args, "-v "+store+":"+store+":ro")
	case err == nil && httpio.IsLoopback(u.Host):
		args = append(args, "--network host")
	}
	return strings.Join(append(args, image), " ")
}

// writtenFor says why the bytes of p were written, where that is not because
// they are new.
func writtenFor(p convert.PlatformReport) string {
	if p.Base == "" || p.NewBytes+p.CopiedBytes == 0 {
		return ""
	}
	parts := []string{scratch.Bytes(p.NewChunkBytes) + " of new chunks"}
	for _, part := range []struct {
		n   int64
		why string
	}{{p.StartPackBytes, "for the start set"}, {p.RewrittenBytes, "rewritten"}, {p.CopiedBytes, "copied"}} {
		if part.n > 0 {
			parts = append(parts, scratch.Bytes(part.n)+" "+part.why)
		}
	}
	return " (" + strings.Join(parts, ", ") + ")"
}

// builtInBoot returns the boot binary that was built into this command.
func builtInBoot(p v1.Platform) (*assembly.BootLayer, error) {
	layer, diffID, err := bootbin.Open(bootPlatform(p))
	if err != nil {
		return nil, err
	}
	return assembly.OpenBootLayer(layer, diffID)
}

// bootPlatform is the platform whose boot binary serves p. Variants other than
// those of 32-bit ARM do not matter to it.
func bootPlatform(p v1.Platform) string {
	s := p.OS + "/" + p.Architecture
	switch {
	case p.Architecture != "arm":
		return s
	case p.Variant == "" || p.Variant == "v8":
		return s + "/v7"
	}
	return s + "/" + p.Variant
}

// machines are the ELF machines of platforms, so that a binary for another one
// is noticed before an image carries it.
var machines = map[string]elf.Machine{
	"386": elf.EM_386, "amd64": elf.EM_X86_64, "arm": elf.EM_ARM, "arm64": elf.EM_AARCH64,
	"ppc64le": elf.EM_PPC64, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390,
}

// bootFromFile returns the binary in a file for the platforms that it runs on.
func bootFromFile(name string) (func(v1.Platform) (*assembly.BootLayer, error), error) {
	bin, err := os.ReadFile(name)
	if err != nil {
		return nil, usagef("--boot: %w", err)
	}
	e, err := elf.NewFile(bytes.NewReader(bin))
	if err != nil {
		return nil, usagef("--boot %s: not an ELF program: %w", name, err)
	}
	pack := sync.OnceValues(func() (*assembly.BootLayer, error) { return assembly.NewBootLayer(bin) })
	return func(p v1.Platform) (*assembly.BootLayer, error) {
		if want, ok := machines[p.Architecture]; ok && e.Machine != want {
			return nil, usagef("--boot %s is for %s, not for %s: choose the platform with --platform", name, e.Machine, p)
		}
		return pack()
	}, nil
}
