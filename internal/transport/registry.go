package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/hosts"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/registrystore"
)

// remoteJobs bounds the parallel transfers with one registry.
const remoteJobs = 8

// repository is a repository and the means to speak to its registry.
type repository struct {
	ref       name.Reference
	insecure  bool
	keychain  authn.Keychain
	transport *hostTransport
}

func newRepository(r Ref, o Options) (*repository, error) {
	ref, err := name.ParseReference(r.Name)
	if err != nil {
		return nil, err
	}
	p := &repository{ref: ref, keychain: o.Keychain, transport: newHostTransport(o)}
	if p.keychain == nil {
		p.keychain = UserKeychain
	}
	if p.transport.hosts.Insecure(p.host()) {
		p.insecure = true
		if p.ref, err = name.ParseReference(r.Name, name.Insecure); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *repository) host() string { return p.ref.Context().RegistryStr() }

// address names the repository as a chunk store.
func (p *repository) address() string {
	scheme := "registry://"
	if p.insecure {
		scheme = "registry+http://"
	}
	return scheme + p.ref.Context().Name()
}

func (p *repository) blobs() (registrystore.Blobs, error) {
	return registrystore.NewRemote(p.address(), registrystore.RemoteOptions{
		Hosts: p.transport.hosts, Insecure: p.insecure, Keychain: p.keychain,
	})
}

func (p *repository) options() []remote.Option {
	return []remote.Option{
		remote.WithAuthFromKeychain(p.keychain),
		remote.WithTransport(shortAnswers{p.transport}),
		remote.WithJobs(remoteJobs),
		remote.WithUserAgent("bootfs-convert"),
	}
}

// maxShort bounds what is read of a manifest or of a page of tags, in bytes.
const maxShort = 8 << 20

// shortAnswers fails where an answer has more than maxShort bytes. No layers are
// read through it.
type shortAnswers struct{ http.RoundTripper }

func (s shortAnswers) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := s.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = &shortBody{resp.Body, maxShort}
	}
	return resp, err
}

type shortBody struct {
	io.ReadCloser
	left int64 // bytes
}

func (b *shortBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left+1)])
	if b.left -= int64(n); b.left < 0 {
		_ = b.Close() // the caller may not
		return 0, fmt.Errorf("the answer has more than %d bytes", maxShort)
	}
	return n, err
}

// explain makes of an error what a person can act on, in one line.
func (p *repository) explain(err error) error {
	if err == nil {
		return nil
	}
	var (
		status *transport.Error
		cert   *tls.CertificateVerificationError
		dns    *net.DNSError
		own    *unreadable
	)
	host := p.host()
	switch {
	case errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, fs.ErrNotExist) || errors.As(err, &own):
		return err
	case errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden):
		login := "docker login " + host
		if host == name.DefaultRegistry {
			login = "docker login"
		}
		return &explained{fmt.Sprintf("%s denies access; log in with: %s", host, login), err}
	case errors.As(err, &status) && status.StatusCode == http.StatusNotFound && status.Request != nil && status.Request.Method == http.MethodGet:
		return &explained{fmt.Sprintf("%s has no image %s in %s", host, p.ref.Identifier(), p.ref.Context().RepositoryStr()), err}
	case errors.As(err, &status) && status.StatusCode == http.StatusTooManyRequests:
		return &explained{host + " refuses more requests for now; log in or try again later", err}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &explained{fmt.Sprintf("connection to %s refused; is the registry running?", host), err}
	case errors.As(err, &dns):
		return &explained{fmt.Sprintf("cannot resolve %s: %s", dns.Name, dns.Err), err}
	case errors.Is(err, errPlainHTTP):
		return &explained{fmt.Sprintf("%s speaks plain HTTP only; allow that with --insecure %s", host, host), err}
	case errors.As(err, &cert):
		return &explained{fmt.Sprintf("the certificate of %s cannot be verified (%v); put that of its authority into /etc/docker/certs.d/%s/ca.crt, or allow it with --insecure %s", host, cert.Err, host, host), err}
	}
	return &explained{strings.Join(strings.Fields(err.Error()), " "), err}
}

// explained is an error with a text of its own.
type explained struct {
	text  string
	cause error
}

func (e *explained) Error() string { return e.text }
func (e *explained) Unwrap() error { return e.cause }

var errPlainHTTP = errors.New("plain HTTP refused")

// hostTransport decides by host what may go unprotected: nothing, but for
// loopback and the hosts that the user named.
type hostTransport struct {
	hosts *hosts.Hosts
	inner http.RoundTripper
}

func newHostTransport(o Options) *hostTransport {
	h := o.Hosts
	if h == nil {
		h = hosts.Everybody()
	}
	for _, host := range o.Insecure {
		h = h.With(host)
	}
	return &hostTransport{hosts: h, inner: h.Transport()}
}

func (t *hostTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !t.hosts.Insecure(r.URL.Host) && !httpio.IsLoopback(r.URL.Host) {
		return nil, fmt.Errorf("%s: %w", r.URL.Host, errPlainHTTP)
	}
	resp, err := t.inner.RoundTrip(r)
	var header tls.RecordHeaderError
	if errors.As(err, &header) || err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		err = fmt.Errorf("%s: %w: %w", r.URL.Host, errPlainHTTP, err)
	}
	return resp, err
}

// CloseIdleConnections lets http.Client give up connections that died.
func (t *hostTransport) CloseIdleConnections() {
	t.inner.(interface{ CloseIdleConnections() }).CloseIdleConnections()
}

// registrySource reads an image from a registry.
type registrySource struct {
	resolved
	*repository
	puller *remote.Puller
	client *uploader // for what the puller does not know
	reader registrystore.Blobs
	root   *remote.Descriptor
}

func openRegistry(ctx context.Context, r Ref, o Options) (Source, error) {
	p, err := newRepository(r, o)
	if err != nil {
		return nil, err
	}
	s := &registrySource{repository: p}
	if s.puller, err = remote.NewPuller(p.options()...); err != nil {
		return nil, err
	}
	if s.reader, err = p.blobs(); err != nil {
		return nil, err
	}
	if s.root, err = s.puller.Get(ctx, p.ref); err != nil {
		return nil, p.explain(err)
	}
	s.client = newUploader(p, func(int64) {})
	s.client.scopes = []string{p.ref.Context().Scope(transport.PullScope)}
	if err := s.resolve(ctx, s, s.root.Descriptor, o.Platforms); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *registrySource) StoreAddress() string                { return s.address() }
func (s *registrySource) Blobs() (registrystore.Blobs, error) { return s.reader, nil }

func (s *registrySource) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}

func (s *registrySource) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	raw := s.root.Manifest
	if d.Digest != s.root.Digest {
		m, err := s.puller.Get(ctx, s.ref.Context().Digest(d.Digest.String()))
		if err != nil {
			return nil, s.explain(err)
		}
		raw = m.Manifest
	}
	if len(raw) > maxManifest {
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", len(raw), maxManifest)
	}
	return raw, nil
}

func (s *registrySource) local(v1.Descriptor) io.ReaderAt { return nil }

func (s *registrySource) blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	return newResumed(ctx, s.reader, d, 0), nil
}

// maxFailures is how often in a row a blob's transfer may fail without
// bringing a byte.
const maxFailures = 5

// resumed reads a blob from a registry to its end: where a connection breaks,
// another one goes on. Close may be called while a Read waits, and ends it.
type resumed struct {
	ctx    context.Context
	cancel context.CancelFunc
	blobs  registrystore.Blobs
	desc   v1.Descriptor

	mu  sync.Mutex    // guards what follows
	off int64         // bytes read
	rc  io.ReadCloser // nil: to be opened at off
}

func newResumed(ctx context.Context, blobs registrystore.Blobs, d v1.Descriptor, off int64) *resumed {
	r := &resumed{blobs: blobs, desc: d, off: off}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

func (r *resumed) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for failures := 0; ; {
		n, err := r.read(p)
		r.off += int64(n)
		if n > 0 {
			return n, nil // an error that came with it will come again
		}
		if err == nil || err == io.EOF {
			return 0, err
		}
		r.reset()
		var e *chunkstore.Error
		if failures++; failures > maxFailures || !errors.As(err, &e) || !e.Temporary() {
			return 0, err
		}
		wait := time.Duration(float64(50*time.Millisecond<<(2*failures)) * (0.5 + rand.Float64()))
		select {
		case <-time.After(max(wait, e.RetryAfter())):
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}

func (r *resumed) read(p []byte) (int, error) {
	if r.rc == nil {
		rc, err := r.blobs.Range(r.ctx, r.desc.Digest.String(), r.off, r.desc.Size-r.off)
		if err != nil {
			return 0, err
		}
		r.rc = rc
	}
	return r.rc.Read(p)
}

func (r *resumed) reset() {
	if r.rc != nil {
		r.rc.Close()
		r.rc = nil
	}
}

func (r *resumed) Close() error {
	r.cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reset()
	return nil
}

// registryDestination writes an image to a registry. Until the tag is set to
// the new index nobody sees it; what was uploaded for nothing is garbage that
// registries collect.
type registryDestination struct {
	*repository
	up *uploader
	o  Options
}

func openRegistryDestination(ctx context.Context, r Ref, o Options) (Destination, error) {
	p, err := newRepository(r, o)
	if err != nil {
		return nil, err
	}
	if _, ok := p.ref.(name.Tag); !ok {
		return nil, errors.New("an image cannot be written under a digest; name a tag")
	}
	allowed := make(chan error, 1)
	go func() { allowed <- remote.CheckPushPermission(p.ref, p.keychain, p.transport) }()
	select {
	case err = <-allowed:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, p.explain(err)
	}
	return &registryDestination{repository: p, up: newUploader(p, o.progress), o: o}, nil
}

func (d *registryDestination) HoldsPacks() bool     { return true }
func (d *registryDestination) StoreAddress() string { return d.address() }

func (d *registryDestination) PutPack(ctx context.Context, p registrystore.Pack) (bool, error) {
	b, err := packBlob(p)
	if err != nil {
		return false, err
	}
	b.from = d.sibling(p.From)
	return d.put(ctx, b)
}

// sibling returns the repository of a store's address if it is another one of
// the same registry, else "".
func (p *repository) sibling(address string) string {
	_, rest, _ := strings.Cut(address, "://")
	from, err := name.NewRepository(rest)
	if err != nil || !strings.HasPrefix(address, "registry") || from.RegistryStr() != p.host() || from.RepositoryStr() == p.ref.Context().RepositoryStr() {
		return ""
	}
	return from.RepositoryStr()
}

func (d *registryDestination) put(ctx context.Context, b blob) (bool, error) {
	reused, err := d.up.put(ctx, b)
	return reused, d.explain(err)
}

func (d *registryDestination) putManifest(ctx context.Context, m v1.Descriptor, raw []byte) error {
	_, err := d.up.putManifest(ctx, m.Digest.String(), m, raw)
	return d.explain(err)
}

func (d *registryDestination) Commit(ctx context.Context, images []PlatformImage) (string, error) {
	return commitImages(ctx, d, images)
}

func (d *registryDestination) hasManifest(ctx context.Context, m v1.Descriptor) (bool, error) {
	ok, err := d.up.has(ctx, "manifests/"+m.Digest.String())
	return ok, d.explain(err)
}

func (d *registryDestination) tag(ctx context.Context, name string, m v1.Descriptor, raw []byte) error {
	_, err := d.up.putManifest(ctx, name, m, raw)
	return d.explain(err)
}

func (d *registryDestination) lookup(ctx context.Context, name string) ([]byte, error) {
	raw, err := d.up.manifest(ctx, name)
	return raw, d.explain(err)
}

func (d *registryDestination) finish(ctx context.Context, m v1.Descriptor, raw []byte) error {
	if d.o.KeepTag {
		if err := d.tag(ctx, KeepTag(m.Digest), m, raw); err != nil {
			return err
		}
	}
	return d.tag(ctx, d.ref.Identifier(), m, raw)
}

func (d *registryDestination) Close() error {
	d.transport.CloseIdleConnections()
	return nil
}
