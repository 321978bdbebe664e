// Package bootbin holds the boot binaries that the converter puts into images,
// each as the layer that it is there: compressing it takes longer than all else
// of a conversion that finds nothing new. [Open] returns that of a platform.
// make build writes them as boot-OS-ARCH.tar.gz beside this file, and the digest
// of each tar as boot-OS-ARCH.diffid, from where they are embedded; a build without make has none and says so when one is
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

// How the names of embedded files end, of a layer and of its DiffID.
const (
	LayerSuffix  = ".tar.gz"
	DiffIDSuffix = ".diffid"
)

// FileName returns how the names of the embedded files for platform begin.
func FileName(platform string) string {
	return "boot-" + strings.ReplaceAll(platform, "/", "-")
}

// Open returns the layer of the boot binary of platform, one of Platforms, in
// its stored form, and its DiffID.
func Open(platform string) (layer []byte, diffID string, err error) {
	return open(files, platform)
}

func open(files fs.FS, platform string) (layer []byte, diffID string, err error) {
	if !slices.Contains(Platforms, platform) {
		return nil, "", fmt.Errorf("no boot binary for platform %q: bootfs has them for %s; give another with --boot FILE", platform, strings.Join(Platforms, ", "))
	}
	layer, err = fs.ReadFile(files, FileName(platform)+LayerSuffix)
	var id []byte
	if err == nil {
		id, err = fs.ReadFile(files, FileName(platform)+DiffIDSuffix)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("the boot binary for %s is not built in: build bootfs-convert with make build, or give --boot FILE", platform)
	}
	return layer, string(id), err
}
