package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/container-bootfs/bootfs/chunkstore/s3store"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/hosts"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// stdio is what a command reads its environment from and writes to.
type stdio struct {
	stdout, stderr io.Writer
	getenv         func(string) string
}

// Environment variables of the command.
const (
	envBareTransport = "BOOTFS_BARE_TRANSPORT"      // transport of a name that has none
	envStore         = "BOOTFS_STORE"               // --store, where the destination cannot hold chunks
	envMirrors       = "BOOTFS_MIRRORS"             // boot knows it too
	envBlobStore     = "BLOB_STORE"                 // --store of the commands that read; boot knows it too
	envCacheSize     = "BOOTFS_CACHE_SIZE"          // preload --size; boot knows it too
	envSSHKey        = "BOOTFS_SSH_KEY"             // file, in the place of those in ~/.ssh
	envSSHPassphrase = "BOOTFS_SSH_PASSPHRASE_FILE" // of that key
	envSSHPassword   = "DROPBEAR_PASSWORD"          // for ssh:// and sftp://, as container-bootfs named it; boot knows it too
)

// memoryLimit is where the garbage collector starts to work hard, in bytes.
// The pipeline needs less than half of it; the rest is for trees of millions
// of files.
const memoryLimit = 400 << 20

// run executes the command line args and returns the exit code.
func run(ctx context.Context, args []string, s stdio) int {
	if debug.SetMemoryLimit(-1) == math.MaxInt64 { // GOMEMLIMIT is not set
		debug.SetMemoryLimit(memoryLimit)
	}
	root := newRoot(s)
	root.SetArgs(args)
	root.SetOut(s.stdout)
	root.SetErr(s.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code, line := explain(ctx, err)
	if line != "" {
		fmt.Fprintln(s.stderr, "bootfs-convert: "+line)
	}
	return code
}

// common are the flags of all commands.
type common struct {
	stdio
	platforms []string
	tempDir   string
	insecure  []string
	certsDir  string
	quiet     bool
	json      bool

	hosts *hosts.Hosts // how registries and web servers are reached, by the flags
}

var rootLong = `Convert a container image into one that starts before it is downloaded.
It runs with docker run, and starts at once with --device /dev/fuse --cap-add
SYS_ADMIN; otherwise all its files are fetched first.

SRC, DST and REF are named as in skopeo:

  NAME, docker://NAME         an image in a registry
  docker-daemon:NAME          an image of the Docker engine
  docker-archive:FILE[:NAME]  what docker save writes
  oci:DIR[:TAG]               an OCI layout
  oci-archive:FILE[:TAG]      an OCI layout in a tar file

The chunks of the root filesystem go to packs beside the image, where DST is a
registry or an OCI layout, or to a STORE:

` + strings.TrimSuffix(stores.Table(), "\n")

const rootExample = `  bootfs-convert debian:12 registry.example.com/debian:12-lazy
  bootfs-convert check debian:12 registry.example.com/debian:12-lazy
  bootfs-convert docker-archive:app.tar oci:converted:1.0
  bootfs-convert --store /srv/rootfs.castr docker-daemon:app docker-daemon:app-lazy`

func newRoot(s stdio) *cobra.Command {
	c := &common{stdio: s}
	f := &convertFlags{common: c}
	root := &cobra.Command{
		Use:           "bootfs-convert SRC DST",
		Short:         "Convert a container image into one that starts before it is downloaded",
		Long:          rootLong,
		Example:       rootExample,
		Args:          exactArgs("SRC", "DST"),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, args []string) error {
			err := runConvert(cmd.Context(), f, args[0], args[1])
			var e *convert.Error
			if hint := meant(cmd, args); hint != "" && errors.As(err, &e) && e.Part == convert.Source {
				err = fmt.Errorf("%w%s", err, hint)
			}
			return err
		},
		SuggestionsMinimumDistance: 2,
		CompletionOptions:          cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return c.openHosts() }
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usagef("%w", err) })
	p := root.PersistentFlags()
	p.StringSliceVar(&c.platforms, "platform", nil, "only this platform, `OS/ARCH[/VARIANT]`; may be repeated")
	p.StringVar(&c.tempDir, "tmp-dir", "", "`DIR` for temporary files (default $TMPDIR or /tmp)")
	p.StringSliceVar(&c.insecure, "insecure", nil, "`HOST[:PORT]` of a registry without TLS or without a valid certificate; may be repeated")
	p.StringVar(&c.certsDir, "certs-d", "", "`DIR` with HOST/hosts.toml or HOST/ca.crt, as containerd and docker have it; *.crt in it holds for all hosts")
	p.BoolVarP(&c.quiet, "quiet", "q", false, "no progress, only warnings and errors")
	p.BoolVar(&c.json, "json", false, "write the result as JSON")
	f.register(root)
	root.SetUsageTemplate(usageTemplate)
	root.AddGroup(&cobra.Group{ID: groupImages, Title: "Commands for converted images:"}, &cobra.Group{ID: groupStores, Title: "Commands for files and stores:"})
	for _, cmd := range []*cobra.Command{newInspect(c), newCheck(c), newMount(c), newExtract(c), newCopy(c), newVerify(c), newProfile(c), newPreload(c), newBundle(c)} {
		cmd.GroupID = groupImages
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{newMake(c), newGC(c), newCache(c)} {
		cmd.GroupID = groupStores
		root.AddCommand(cmd)
	}
	return root
}

// Groups of commands in --help.
const (
	groupImages = "images"
	groupStores = "stores"
	groupCache  = "cache"
)

// usageTemplate is what --help shows below the description of a command.
const usageTemplate = `Usage:
  {{.UseLine}}{{if .HasAvailableSubCommands}}
  {{.CommandPath}} COMMAND ...{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{$commands := .Commands}}{{range $group := .Groups}}

{{.Title}}{{range $commands}}{{if eq .GroupID $group.ID}}
  {{rpad .Name .NamePadding}}  {{.Short}}{{end}}{{end}}{{end}}

Flags:
{{.LocalNonPersistentFlags.FlagUsagesWrapped 100 | trimTrailingWhitespaces}}

Flags of all commands:
{{if .HasParent}}{{.InheritedFlags.FlagUsagesWrapped 100 | trimTrailingWhitespaces}}{{else}}{{.PersistentFlags.FlagUsagesWrapped 100 | trimTrailingWhitespaces}}

` + exitHelp + `
` + envHelp + `
"{{.CommandPath}} COMMAND --help" tells more about a command.{{end}}
`

const envHelp = `Environment:
  BOOTFS_BARE_TRANSPORT  transport of a NAME without one: docker (default) or docker-daemon
  BOOTFS_STORE           --store of make, and for destinations that cannot hold chunks
  BLOB_STORE             --store for commands that read, separated by blanks
  BOOTFS_MIRRORS         mirrors of registries to read chunks from first: URL, or HOST=URL for one
                         registry, separated by blanks
  BOOTFS_SSH_KEY         file with the key for ssh:// and sftp://, in the place of those in ~/.ssh
  BOOTFS_SSH_PASSPHRASE_FILE
                         file with the passphrase of that key, if it has one
  DROPBEAR_PASSWORD      password for ssh:// and sftp://, where no key is accepted
  AWS_ACCESS_KEY_ID …    credentials, profile and region for s3+https://, named as for AWS's tools
                         or, S3_ACCESS_KEY …, as for desync
`

// exactArgs wants one argument for each name.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			noun := "arguments"
			if len(args) == 1 {
				noun = "argument"
			}
			return usagef("got %d %s, want %s; see %s --help%s",
				len(args), noun, strings.Join(names, " "), cmd.CommandPath(), meant(cmd, args))
		}
		return nil
	}
}

// meant is what to add to a failure when the first argument, which is taken
// for an image, may be a command with a slip in it; else "".
func meant(cmd *cobra.Command, args []string) string {
	if len(args) == 0 || args[0] == "" {
		return ""
	}
	if names := cmd.SuggestionsFor(args[0]); len(names) > 0 {
		return "; did you mean " + cmd.CommandPath() + " " + strings.Join(names, " or ") + "?"
	}
	return ""
}

// ref parses an image name of the command line.
func (c *common) ref(s string) (transport.Ref, error) {
	if strings.HasPrefix(s, "/") || strings.HasPrefix(s, ".") {
		return transport.Ref{}, usagef("image %q: a path needs a transport: oci:%[1]s, oci-archive:%[1]s or docker-archive:%[1]s", s)
	}
	r, err := transport.Parse(s, c.getenv(envBareTransport))
	if err != nil {
		return transport.Ref{}, usagef("%w", err)
	}
	return r, nil
}

// transportOptions are what the flags say about reaching images.
func (c *common) transportOptions() (transport.Options, error) {
	o := transport.Options{TempDir: c.tempDir, Hosts: c.hosts}
	if c.tempDir != "" {
		if err := isDir(c.tempDir); err != nil {
			return o, usagef("--tmp-dir %s: %w", c.tempDir, err)
		}
	}
	for _, s := range c.platforms {
		p, err := transport.ParsePlatform(s)
		if err != nil {
			return o, usagef("%w", err)
		}
		o.Platforms = append(o.Platforms, p)
	}
	return o, nil
}

// writeJSON writes v for programs.
func (c *common) writeJSON(v any) error {
	e := json.NewEncoder(c.stdout)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// onePlatform picks the image that a command on a single root is about: the
// only one, or this machine's unless the platforms were asked for.
func onePlatform[T any](images []T, platform func(T) v1.Platform, asked bool) (T, error) {
	var have []string
	for _, img := range images {
		p := platform(img)
		if len(images) == 1 || !asked && p.Architecture == runtime.GOARCH {
			return img, nil
		}
		have = append(have, p.String())
	}
	var none T
	return none, usagef("the image is for several platforms, choose one with --platform: %s", strings.Join(have, ", "))
}

// isDir returns nil if name is a directory, else what is wrong with it.
func isDir(name string) error {
	info, err := os.Stat(name)
	if err != nil {
		return bare(err)
	}
	if !info.IsDir() {
		return syscall.ENOTDIR
	}
	return nil
}

// bare strips from a file's error the operation and the path, which may be that
// of a temporary file: the caller names what the user has named.
func bare(err error) error {
	if e := (*fs.PathError)(nil); errors.As(err, &e) {
		return e.Err
	}
	return err
}

// checkStore refuses an address of a kind that is not known, which would be
// taken for a directory.
func checkStore(address string) error {
	if address == "" {
		return nil
	}
	if err := stores.Check(address); err != nil {
		return usagef("--store: %w", err)
	}
	return nil
}

// access is who we are to stores.
func (c *common) access() stores.Access {
	a := stores.Access{Keychain: transport.UserKeychain, SSH: sshstore.UserOptions(), Hosts: c.hosts, S3: s3store.Options{Sources: s3store.Sources{Getenv: c.getenv}}}
	a.SSH.Password = c.getenv(envSSHPassword)
	if key := c.getenv(envSSHKey); key != "" {
		a.SSH.Keys, a.SSH.PassphraseFile = []string{key}, c.getenv(envSSHPassphrase)
	}
	return a
}

// absStores makes directories among addresses absolute.
func absStores(addresses []string) ([]string, error) {
	out := make([]string, len(addresses))
	for i, a := range addresses {
		out[i] = a
		if dir, ok := strings.CutPrefix(a, "oci:"); ok {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return nil, err
			}
			out[i] = "oci:" + abs
		} else if !strings.Contains(a, "://") {
			abs, err := filepath.Abs(a)
			if err != nil {
				return nil, err
			}
			out[i] = abs
		}
	}
	return out, nil
}
