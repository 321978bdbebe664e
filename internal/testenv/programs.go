package testenv

import (
	"context"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
)

// program returns the path of a Go program, "MODULE/PATH@VERSION", built once
// for each version. Building needs the Go module proxy.
func (c *Cache) program(ctx context.Context, pkg string) (string, error) {
	name, _, _ := strings.Cut(path.Base(pkg), "@")
	dir, err := c.entry("program-"+name, pkg+" "+runtime.GOOS+"/"+runtime.GOARCH, func(tmp string) error {
		c.say("building %s", pkg)
		cmd := exec.CommandContext(ctx, "go", "install", "-trimpath", "-ldflags=-s -w", pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+tmp, "GOFLAGS=", "GOOS=", "GOARCH=")
		_, err := output(cmd)
		return err
	})
	return filepath.Join(dir, name), err
}
