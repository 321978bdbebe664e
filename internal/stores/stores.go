// Package stores turns the addresses that stand in a boot image and in
// BLOB_STORE into stores. What bootfs can read from is the list of its kinds.
package stores

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/chunkstore/s3store"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/hosts"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Source is what is to be read: an index, where its chunks lie in packs, and
// how to be let in where they lie.
type Source struct {
	Index    *index.Index
	Locators *registrystore.Locators // nil: the chunks lie in loose stores only
	Access
}

// Access is who we are to stores elsewhere, and whom we trust there. The zero
// value is nobody.
type Access struct {
	Keychain authn.Keychain // of registries and web servers; nil has none
	Advice   string         // what to do where a registry lets nobody in, for messages
	SSH      sshstore.Options
	S3       s3store.Options
	Hosts    *hosts.Hosts // how registries and web servers are reached; nil: as everybody reaches them
}

// kind is a form of address, and what lies there.
type kind struct {
	schemes []string // what the address begins with; none: it is a directory
	form    string   // as messages and help show it
	what    string   // what lies there, for help
	loose   bool     // single chunks
	written bool     // a conversion can put chunks there
	open    func(address string, s Source) (chunkstore.Store, error)
}

// kinds are the stores that bootfs has.
func kinds() []kind {
	return []kind{
		{form: "a directory", what: "a casync chunk store", loose: true, written: true, open: openDirectory},
		{schemes: []string{"registry://", "registry+http://"}, form: "registry://HOST/REPOSITORY", what: "packs in a repository", written: true, open: openRegistry},
		{schemes: []string{"https://", "http://"}, form: "https://HOST/PATH", what: "a chunk store on a web server; written with PUT", loose: true, written: true, open: openWeb},
		{schemes: []string{"ssh://"}, form: "ssh://[USER@]HOST/PATH", what: "on an SSH server, by casync's protocol or SFTP", loose: true, written: true, open: openSSH},
		{schemes: []string{"sftp://"}, form: "sftp://[USER@]HOST/PATH", what: "on an SSH server, by SFTP", loose: true, written: true, open: openSSH},
		{schemes: []string{"s3+https://", "s3+http://"}, form: "s3+https://HOST/BUCKET[/PREFIX]", what: "in S3 or a server like it", loose: true, written: true, open: openS3},
		{schemes: []string{"oci:"}, form: "oci:DIR", what: "packs in an OCI layout, only to read", open: openLayout},
	}
}

// kindOf returns the kind of store at address. What begins like a scheme is no
// directory, unless ./ stands before it.
func kindOf(address string) (kind, bool) {
	end := strings.IndexFunc(address, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune("+.-", r))
	})
	scheme := end > 0 && address[end] == ':'
	for _, k := range kinds() {
		if !scheme && k.schemes == nil && address != "" ||
			slices.ContainsFunc(k.schemes, func(s string) bool { return strings.HasPrefix(address, s) }) {
			return k, true
		}
	}
	return kind{}, false
}

// Forms lists the addresses that [Open] takes, for messages and help.
func Forms() string { return forms(func(kind) bool { return true }) }

// WrittenForms lists the addresses of stores that a conversion can write to.
func WrittenForms() string { return forms(func(k kind) bool { return k.written }) }

// LooseForms lists the addresses of stores that single chunks go to.
func LooseForms() string { return forms(func(k kind) bool { return k.loose && k.written }) }

// Table lists all kinds of stores for help, a line each.
func Table() string {
	var b strings.Builder
	for _, k := range kinds() {
		fmt.Fprintf(&b, "  %-31s %s\n", k.form, k.what)
	}
	return b.String()
}

func forms(with func(kind) bool) string {
	var list []string
	for _, k := range kinds() {
		if with(k) {
			list = append(list, k.form)
		}
	}
	last := len(list) - 1
	return strings.Join(list[:last], ", ") + " or " + list[last]
}

// Check refuses an address that is of no kind, and one with control characters:
// images name stores, and messages repeat their addresses.
func Check(address string) error {
	if _, ok := kindOf(address); !ok {
		return fmt.Errorf("store %q: want %s", hide(address), Forms())
	}
	if strings.ContainsFunc(address, unicode.IsControl) {
		return fmt.Errorf("store %q: control characters", hide(address))
	}
	return nil
}

// hide returns what of an address of no kind can be shown: behind a scheme may
// stand a password.
func hide(address string) string {
	shown := httpio.WithoutUser(address)
	if scheme, _, ok := strings.Cut(shown, "://"); ok {
		return scheme + "://…"
	}
	return shown
}

// Loose reports whether single chunks lie at address.
func Loose(address string) bool {
	k, ok := kindOf(address)
	return ok && k.loose
}

// Remote reports whether the store at address is reached over a network.
func Remote(address string) bool { return strings.Contains(address, "://") }

// Open returns the store at address, of one of the [Forms]; a directory is an
// absolute path. It does not connect yet. The store may be an [io.Closer].
//
// Credentials for a web server stand in its address, as user:password@, or are
// those that the keychain has for its host and port; the latter are not sent
// over plain HTTP, but for the loopback.
func Open(address string, s Source) (chunkstore.Store, error) {
	if err := Check(address); err != nil {
		return nil, err
	}
	k, _ := kindOf(address)
	return k.open(address, s)
}

// OpenAll returns the stores to ask for what lies at address, in order: a
// registry's mirrors, and last the place itself.
func OpenAll(address string, s Source) ([]chunkstore.Store, error) {
	if !strings.HasPrefix(address, "registry") {
		one, err := Open(address, s)
		if err != nil {
			return nil, err
		}
		return []chunkstore.Store{one}, nil
	}
	if err := Check(address); err != nil {
		return nil, err
	}
	blobs, err := registrystore.NewRemotes(address, s.remote())
	if err != nil {
		return nil, err
	}
	out := make([]chunkstore.Store, len(blobs))
	for i, b := range blobs {
		if out[i], err = s.packs(address, b); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Create returns the store of single chunks at address, to be written to, as
// [Open] does. A directory is made, and may be a relative path.
func Create(address string, a Access) (chunkstore.Writer, error) {
	k, ok := kindOf(address)
	if !ok || !k.loose {
		return nil, fmt.Errorf("store %q: single chunks do not go there", hide(address))
	}
	if k.schemes == nil {
		dir, err := filepath.Abs(address)
		if err != nil {
			return nil, err
		}
		return local.Create(dir)
	}
	s, err := k.open(address, Source{Access: a})
	if err != nil {
		return nil, err
	}
	w, ok := s.(chunkstore.Writer)
	if !ok {
		return nil, fmt.Errorf("store %s: it cannot be written to", s)
	}
	return w, nil
}

func openDirectory(address string, _ Source) (chunkstore.Store, error) {
	if !filepath.IsAbs(address) {
		return nil, fmt.Errorf("store %q: want an absolute path", address)
	}
	return local.Open(address)
}

func openRegistry(address string, s Source) (chunkstore.Store, error) {
	blobs, err := Packs(address, s.Access)
	if err != nil {
		return nil, err
	}
	return s.packs(address, blobs)
}

// Packs returns the blobs of the repository at address,
// registry://HOST/REPOSITORY.
func Packs(address string, a Access) (registrystore.Blobs, error) {
	return registrystore.NewRemote(address, a.remote())
}

func (a Access) hosts() *hosts.Hosts {
	if a.Hosts == nil {
		return hosts.Everybody()
	}
	return a.Hosts
}

func (a Access) remote() registrystore.RemoteOptions {
	return registrystore.RemoteOptions{Hosts: a.Hosts, Keychain: a.Keychain, Advice: a.Advice}
}

func openLayout(address string, s Source) (chunkstore.Store, error) {
	return s.packs(address, registrystore.NewLayoutBlobs(strings.TrimPrefix(address, "oci:")))
}

func (s Source) packs(address string, b registrystore.Blobs) (chunkstore.Store, error) {
	if s.Locators == nil {
		return nil, fmt.Errorf("store %q: the image was converted to a loose store and knows no packs: name the loose store", address)
	}
	return registrystore.NewStore(b, s.Locators, s.Index), nil
}

func openWeb(address string, s Source) (chunkstore.Store, error) {
	return httpstore.New(address, httpstore.Options{Login: webLogin(s.Keychain, address), Transport: s.hosts().Transport()})
}

func openSSH(address string, s Source) (chunkstore.Store, error) {
	return sshstore.New(address, s.SSH)
}

func openS3(address string, s Source) (chunkstore.Store, error) {
	o := s.S3
	o.Transport, o.Sources.Transport = s.hosts().Transport(), s.hosts().Direct()
	return s3store.New(address, o)
}

// webLogin looks up the server at address in k. It is nil where credentials must
// not be sent.
func webLogin(k authn.Keychain, address string) func(context.Context) (httpstore.Login, error) {
	u, err := url.Parse(address)
	if err != nil || k == nil || u.Scheme != "https" && !httpio.IsLoopback(u.Host) {
		return nil
	}
	return func(ctx context.Context) (httpstore.Login, error) {
		found, err := authn.Resolve(ctx, k, webHost(u.Host))
		if err != nil {
			return httpstore.Login{}, err
		}
		c, err := authn.Authorization(ctx, found)
		if err != nil {
			return httpstore.Login{}, err
		}
		return httpstore.Login{User: c.Username, Password: c.Password, Token: c.RegistryToken}, nil
	}
}

// webHost is the authn.Resource of a web server.
type webHost string

func (h webHost) String() string      { return string(h) }
func (h webHost) RegistryStr() string { return string(h) }

// Split returns the addresses in a list separated by white space, as BLOB_STORE
// holds them.
func Split(list string) []string { return strings.Fields(list) }
