// Package bootbin holds the boot binaries that the converter puts into images,
// each as the layer that it is there: compressing it takes longer than all else
// of a conversion that finds nothing new. [Open] returns that of a platform.
// make build writes them as boot-OS-ARCH.tar.gz beside this file, from where
// they are embedded; a build without make has none and says so when one is
// asked for.
package bootbin

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Platforms are those that make build embeds a boot binary for, as OS/ARCH.
// There is none of 32 bits: go-fuse v2.12 does not compile for them.
var Platforms = []string{"linux/amd64", "linux/arm64", "linux/ppc64le", "linux/riscv64", "linux/s390x"}

// The pattern also matches boot-binaries.md, which is always there: a clean
// checkout compiles.
//
//go:embed boot-*
var files embed.FS

// Suffix is how the names of embedded files end.
const Suffix = ".tar.gz"

// FileName returns the name of the embedded file that holds the boot binary of
// platform.
func FileName(platform string) string {
	return "boot-" + strings.ReplaceAll(platform, "/", "-") + Suffix
}

// Open returns the layer of the boot binary of platform, one of Platforms, in
// its stored form.
func Open(platform string) ([]byte, error) {
	return open(files, platform)
}

func open(files fs.FS, platform string) ([]byte, error) {
	if !slices.Contains(Platforms, platform) {
		return nil, fmt.Errorf("no boot binary for platform %q: bootfs has them for %s; give another with --boot FILE", platform, strings.Join(Platforms, ", "))
	}
	layer, err := fs.ReadFile(files, FileName(platform))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the boot binary for %s is not built in: build bootfs-convert with make build, or give --boot FILE", platform)
	}
	return layer, err
}
