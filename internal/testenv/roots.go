package testenv

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Suite is the Debian release that roots are made of.
const Suite = "bookworm"

// Cache keeps what takes long to make, between tests and between runs. Several
// processes may use one directory at once.
type Cache struct {
	Dir string
	Log io.Writer // says what is being made; nil is silent
}

// OpenCache returns the cache at $BOOTFS_CACHE, or else below the user's cache
// directory.
func OpenCache() (*Cache, error) {
	dir := os.Getenv("BOOTFS_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("no cache directory: %w: set BOOTFS_CACHE", err)
		}
		dir = filepath.Join(user, "bootfs")
	}
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	return &Cache{Dir: dir}, nil
}

func (c *Cache) say(format string, args ...any) {
	if c.Log != nil {
		fmt.Fprintf(c.Log, format+"\n", args...)
	}
}

// entry returns the path of a cached file or directory, made by make if it is
// not there yet. The name tells what it is, the recipe all that it is made of.
func (c *Cache) entry(name, recipe string, make func(tmp string) error) (string, error) {
	sum := sha256.Sum256([]byte(recipe))
	path := filepath.Join(c.Dir, name+"-"+hex.EncodeToString(sum[:6]))
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	// Another process may be making the same: it is waited for, not repeated.
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	// What a killed run left half made carries no other name than this.
	tmp := path + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return "", err
	}
	if err := make(tmp); err != nil {
		return "", errors.Join(err, os.RemoveAll(tmp))
	}
	return path, os.Rename(tmp, path)
}

// Root returns a directory that holds a real Debian root: the packages of
// mmdebstrap's minbase variant and the given ones, configured. It is shared
// and must not be written to.
func (c *Cache) Root(ctx context.Context, packages ...string) (string, error) {
	return c.root(ctx, "root", []string{Suite, Suite + "-updates", Suite + "-security"}, packages)
}

// ReleaseRoot returns a root as Root does, of the release alone: the same packages
// before Debian's updates, an earlier version of the same root.
func (c *Cache) ReleaseRoot(ctx context.Context, packages ...string) (string, error) {
	return c.root(ctx, "release", []string{Suite}, packages)
}

// root makes a root of packages from some of the machine's apt sources, for which
// kind stands.
func (c *Cache) root(ctx context.Context, kind string, codenames, packages []string) (string, error) {
	name := kind
	if len(packages) > 0 {
		name += "-" + packages[0]
	}
	packages = slices.Sorted(slices.Values(packages))
	recipe := strings.Join(append([]string{kind + " 1", Suite}, packages...), "\n")
	return c.entry(name, recipe, func(tmp string) error {
		c.say("making a Debian %s %s: minbase %s", Suite, kind, strings.Join(packages, " "))
		sources, err := aptSources(ctx, codenames)
		if err != nil {
			return err
		}
		args := []string{
			"--mode=root", "--variant=minbase", "--format=directory", "--quiet",
			"--keyring=/usr/share/keyrings",
			"--aptopt=Apt::Install-Recommends false",
			// Where the packages came from is the building machine's affair.
			`--customize-hook=: > "$1/etc/apt/sources.list"`,
		}
		if len(packages) > 0 {
			args = append(args, "--include="+strings.Join(packages, ","))
		}
		cmd := exec.CommandContext(ctx, "mmdebstrap", append(args, Suite, tmp, "-")...)
		cmd.Stdin = strings.NewReader(sources)
		_, err = output(cmd)
		return err
	})
}

// aptSources returns the machine's own apt sources of Debian's suites, one a
// line.
func aptSources(ctx context.Context, codenames []string) (string, error) {
	out, err := run(ctx, "apt-get", "indextargets",
		"--format", "$(CODENAME) deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
		"Created-By: Packages", "Origin: Debian")
	if err != nil {
		return "", err
	}
	var sources []string
	for line := range strings.Lines(string(out)) {
		codename, source, _ := strings.Cut(line, " ")
		if slices.Contains(codenames, codename) {
			sources = append(sources, source)
		}
	}
	if len(sources) == 0 {
		return "", fmt.Errorf("apt knows no source of Debian %s: run apt-get update, or add one", Suite)
	}
	slices.Sort(sources)
	return strings.Join(slices.Compact(sources), ""), nil
}
