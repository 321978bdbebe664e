// Package hosts knows how registries and web servers are reached: by which
// mirrors, over plain HTTP or TLS, trusting whom, as which client.
//
// What it knows comes from directories in the form of containerd's and docker's
// certs.d, from BOOTFS_MIRRORS, and from the hosts that the user named as
// insecure:
//
//	h, err := hosts.New(hosts.Options{Dirs: dirs, Mirrors: os.Getenv("BOOTFS_MIRRORS")})
//	endpoints, err := h.Registry("registry.example.com")
//
// Certificates are parsed at the first TLS handshake that needs them, not
// before. A mirror is trusted for location, never for bytes: who reads from one
// verifies what comes.
package hosts

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// maxMirrors bounds the mirrors of one registry.
const maxMirrors = 16

// Options say what is known beside what everybody knows. The zero value trusts
// the system's certificate authorities and knows no mirrors.
type Options struct {
	// Dirs are looked into in order.
	Dirs []Dir
	// Mirrors is BOOTFS_MIRRORS: URL, for every registry, or HOST=URL, separated
	// by blanks. They are asked before those of Dirs.
	Mirrors string
	// Insecure are hosts, as HOST[:PORT], that may be spoken to over plain HTTP
	// or with a certificate that cannot be verified.
	Insecure []string
	// Roots are the certificate authorities that are trusted for every host; nil
	// is those of the system.
	Roots func() *x509.CertPool
	// Advice says what to do about the certificate of a host that nobody
	// trusted has signed; nil says nothing.
	Advice func(host string) string
}

// Hosts answers for each host. It is safe for concurrent use.
type Hosts struct {
	o        Options
	mirrors  []mirror
	insecure map[string]bool

	mu   sync.Mutex // guards what follows
	made map[string]*connections
}

// Endpoint is a server that is asked for the blobs of a registry.
type Endpoint struct {
	Scheme string // "http" or "https"
	Host   string // HOST[:PORT]
	Path   string // of the API, "/v2" but where hosts.toml has another; without a slash at its end
	// Namespace is the registry that a mirror stands for, to be told to it as
	// the query parameter ns; "" for the registry itself.
	Namespace string
	// Plain allows plain HTTP. With Scheme "http" the server may turn out to
	// speak TLS.
	Plain bool
	// Transport makes the connections. It sends the headers that hosts.toml has
	// for this server, and to this server only.
	Transport http.RoundTripper
}

// New returns Hosts that know what o says. It reads no files yet.
func New(o Options) (*Hosts, error) {
	h := &Hosts{o: o, insecure: make(map[string]bool), made: make(map[string]*connections)}
	for _, host := range o.Insecure {
		if host == "" || strings.Contains(host, "/") {
			return nil, fmt.Errorf("insecure host %q: want HOST[:PORT]", host)
		}
		h.insecure[host] = true
	}
	var err error
	h.mirrors, err = parseMirrors(o.Mirrors)
	return h, err
}

// Everybody returns Hosts that know what everybody knows.
func Everybody() *Hosts {
	h, _ := New(Options{}) // there is nothing to be wrong
	return h
}

// Insecure reports whether the user named host as insecure.
func (h *Hosts) Insecure(host string) bool { return h.insecure[host] }

// With returns Hosts that know the same and take one more host as insecure.
func (h *Hosts) With(insecure string) *Hosts {
	if h.insecure[insecure] {
		return h
	}
	o := h.o
	o.Insecure = append(slices.Clone(o.Insecure), insecure)
	more, _ := New(o) // what h was made from
	return more
}

// Origin returns the registry called host itself.
func (h *Hosts) Origin(host string) (Endpoint, error) {
	list, err := h.configured(host)
	if err != nil {
		return Endpoint{}, err
	}
	for _, c := range list {
		if c.host == "" || c.host == apiHost(host) {
			return h.endpoint(c, host), nil
		}
	}
	return h.endpoint(server{}, host), nil
}

// Registry returns the servers to ask for blobs of the registry called host, in
// order: its mirrors, and at last the registry itself, unless a hosts.toml says
// otherwise.
func (h *Hosts) Registry(host string) ([]Endpoint, error) {
	list, err := h.configured(host)
	if err != nil {
		return nil, err
	}
	var out []Endpoint
	add := func(e Endpoint) {
		same := func(o Endpoint) bool { return o.Scheme == e.Scheme && o.Host == e.Host && o.Path == e.Path }
		if !slices.ContainsFunc(out, same) && len(out) < maxMirrors {
			out = append(out, e)
		}
	}
	for _, m := range h.mirrors {
		if m.registry == "" || m.registry == namespace(host) {
			add(h.endpoint(m.server, host))
		}
	}
	for _, c := range list {
		if !c.cannotPull {
			add(h.endpoint(c, host))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the hosts.toml of %s leaves no host to pull from", host)
	}
	return out, nil
}

// server is a host as hosts.toml or BOOTFS_MIRRORS names it.
type server struct {
	scheme, host, path string // host is "" for the registry itself
	cannotPull         bool
	trust              trust
	header             http.Header
	dialTimeout        time.Duration
}

func (h *Hosts) endpoint(s server, registry string) Endpoint {
	e := Endpoint{Scheme: s.scheme, Host: s.host, Path: s.path}
	if e.Host == "" {
		e.Host, e.Path, e.Scheme = registry, "/v2", "https"
		if h.insecure[registry] || httpio.IsLoopback(registry) {
			e.Scheme = "http"
		}
	}
	if e.Host != apiHost(registry) && e.Host != registry {
		e.Namespace = namespace(registry)
	}
	e.Plain = e.Scheme == "http"
	e.Transport = &endpointTransport{
		hosts: h, scheme: e.Scheme, plain: e.Plain, host: e.Host, header: s.header,
		own:  h.connections(s.trust.at(e.Host, h.insecure[e.Host]), way{timeout: s.dialTimeout}),
		away: s.trust.ca,
	}
	return e
}

// Docker Hub has three names: that of images, the one under which credentials
// are kept, and that of its server.
const (
	hubName   = "docker.io"
	hubIndex  = "index.docker.io"
	hubServer = "registry-1.docker.io"
)

// namespace returns the name of a registry that images have.
func namespace(host string) string {
	if host == hubIndex || host == hubServer {
		return hubName
	}
	return host
}

// apiHost returns the name of a registry's server.
func apiHost(host string) string {
	if host == hubName || host == hubIndex {
		return hubServer
	}
	return host
}

// Login returns the name under which the credentials for a host are kept.
func Login(host string) string {
	if namespace(host) == hubName {
		return hubIndex
	}
	return host
}

// mirror is one word of BOOTFS_MIRRORS.
type mirror struct {
	registry string // "" for every one
	server
}

func parseMirrors(list string) ([]mirror, error) {
	var out []mirror
	for _, word := range strings.Fields(list) {
		var m mirror
		address := word
		if host, rest, ok := strings.Cut(word, "="); ok && !strings.Contains(host, "/") {
			m.registry, address = namespace(host), rest
		}
		u, err := parseServer(address)
		if err != nil {
			return nil, fmt.Errorf("mirror %q: want URL or HOST=URL, with http:// or https://: %w", httpio.WithoutUser(word), err)
		}
		m.scheme, m.host, m.path = u.Scheme, u.Host, u.Path
		// A path that leads into the API, as proxies of several registries have
		// it, is taken as it is.
		if !slices.Contains(strings.Split(m.path, "/"), "v2") {
			m.path += "/v2"
		}
		out = append(out, m)
	}
	return out, nil
}

// parseServer reads "http://HOST[:PORT][/PATH]"; without a scheme it is https.
func parseServer(s string) (*url.URL, error) {
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("not a URL")
	case u.User != nil:
		return nil, errors.New("credentials do not stand in an address, but in config.json")
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", u.RawQuery != "", u.Fragment != "":
		return nil, errors.New("not an http:// or https:// address of a server")
	}
	if u.Path != "" {
		u.Path = strings.TrimSuffix(path.Clean(u.Path), "/")
	}
	return u, nil
}
