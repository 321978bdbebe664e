// Command gen builds the boot binary for the platforms that it is given and
// writes the layer of each where package bootbin embeds it. It is run from the
// top of the repository; make build calls it.
//
// The same source and Go release give the same bytes: they become a layer that
// all images of a release share.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/container-bootfs/bootfs/internal/assembly"
	"github.com/container-bootfs/bootfs/internal/bootbin"
)

// cold are the packages of the boot binary in which no time is spent. What is
// inlined there makes the binary 5 % larger.
var cold = []string{
	"encoding/...", "fmt", "log/slog", "math/big", "mime/...", "net/...", "reflect", "regexp/...", "time", "vendor/...",
	"crypto/tls", "crypto/x509", "golang.org/x/crypto/ssh/...",
	"github.com/google/...", "github.com/pelletier/...", "github.com/pkg/sftp",
	module + "/chunkstore/s3store", module + "/chunkstore/sshstore", module + "/internal/boot", module + "/internal/hosts",
}

const module = "github.com/container-bootfs/bootfs"

func main() {
	platforms := os.Args[1:]
	if len(platforms) == 0 {
		platforms = bootbin.Platforms
	}
	for _, p := range platforms {
		if err := generate(p); err != nil {
			fmt.Fprintf(os.Stderr, "boot binary for %s: %v\n", p, err)
			os.Exit(1)
		}
	}
}

func generate(platform string) error {
	if !slices.Contains(bootbin.Platforms, platform) {
		return fmt.Errorf("unknown platform, want one of %s", strings.Join(bootbin.Platforms, ", "))
	}
	// The go command leaves a binary that is up to date as it is.
	bin := filepath.Join("bin", bootbin.FileName(platform))
	goos, goarch, _ := strings.Cut(platform, "/")
	link := "-s -w"
	if goarch == "amd64" {
		// As on most machines, and as C compilers have it. Go's 32 here make the
		// binary 1 % larger.
		link += " -funcalign=16"
	}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=" + link, "-o", bin}
	for _, pattern := range cold {
		args = append(args, "-gcflags="+pattern+"=-l")
	}
	cmd := exec.Command("go", append(args, "./cmd/bootfs-boot")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOAMD64=v1", "GOOS="+goos, "GOARCH="+goarch)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return err
	}
	plain, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	layer, err := assembly.NewBootLayer(plain)
	if err != nil {
		return err
	}
	path := filepath.Join("internal", "bootbin", bootbin.FileName(platform))
	packed := layer.Bytes()
	written, err := write(path+bootbin.LayerSuffix, packed)
	if err != nil {
		return err
	}
	if written {
		fmt.Printf("%-14s boot binary: %5.1f MiB, %4.1f MiB compressed\n", platform, mib(plain), mib(packed))
	}
	_, err = write(path+bootbin.DiffIDSuffix, []byte(layer.DiffID()))
	return err
}

// write leaves an unchanged file alone: what embeds it is not linked anew.
func write(path string, b []byte) (written bool, err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
		return false, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, os.WriteFile(path, b, 0o644)
}

func mib(b []byte) float64 { return float64(len(b)) / (1 << 20) }
