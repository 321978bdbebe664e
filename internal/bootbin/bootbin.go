// Package bootbin holds the boot binaries that the converter puts into images:
// [Open] returns that of a platform. make build writes them as
// boot-OS-ARCH.zst beside this file, from where they are embedded; a
// build without make has none and says so when one is asked for.
package bootbin

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// Platforms are those that make build embeds a boot binary for, as OS/ARCH.
// There is none of 32 bits: go-fuse v2.12 does not compile for them.
var Platforms = []string{"linux/amd64", "linux/arm64", "linux/ppc64le", "linux/riscv64", "linux/s390x"}

// The pattern also matches boot-binaries.md, which is always there: a clean
// checkout compiles.
//
//go:embed boot-*
var files embed.FS

// maxSize bounds a boot binary, in bytes, when it is decompressed.
const maxSize = 64 << 20

// FileName returns the name of the embedded file that holds the boot binary of
// platform.
func FileName(platform string) string {
	return "boot-" + strings.ReplaceAll(platform, "/", "-") + ".zst"
}

// Open returns the boot binary of platform, one of Platforms.
func Open(platform string) ([]byte, error) {
	return open(files, platform)
}

func open(files fs.FS, platform string) ([]byte, error) {
	if !slices.Contains(Platforms, platform) {
		return nil, fmt.Errorf("no boot binary for platform %q: bootfs has them for %s; give another with --boot FILE", platform, strings.Join(Platforms, ", "))
	}
	packed, err := fs.ReadFile(files, FileName(platform))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the boot binary for %s is not built in: build bootfs-convert with make build, or give --boot FILE", platform)
	}
	if err != nil {
		return nil, err
	}
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxSize), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	bin, err := d.DecodeAll(packed, nil)
	if err != nil {
		return nil, fmt.Errorf("boot binary for %s: %w", platform, err)
	}
	return bin, nil
}
