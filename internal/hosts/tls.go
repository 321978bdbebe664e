package hosts

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// idleConnections are kept to each host.
const idleConnections = 32

// trust is what TLS with a server takes beside the common authorities.
type trust struct {
	ca     []file    // more authorities
	client []keyPair // who we are
	skip   bool      // whoever it is
}

// keyPair is a client certificate. The key may stand in the same file.
type keyPair struct{ cert, key file }

// at returns t for the server at host, which may be insecure.
func (t trust) at(host string, insecure bool) trust {
	t.skip = t.skip || insecure
	return t
}

// key tells apart what needs connections of its own.
func (t trust) key() string {
	var b strings.Builder
	for _, f := range t.ca {
		fmt.Fprintf(&b, "ca %s\n", f.name())
	}
	for _, p := range t.client {
		fmt.Fprintf(&b, "client %s %s\n", p.cert.name(), p.key.name())
	}
	fmt.Fprint(&b, t.skip)
	return b.String()
}

// way is how a connection is made.
type way struct {
	timeout time.Duration // of dialling; 0: as always
	direct  bool          // without a proxy
}

// connections makes connections to servers that are trusted alike.
type connections struct {
	hosts *Hosts
	trust trust
	way   way

	mu     sync.Mutex
	plain  *http.Transport // nil until it is needed, as is the next
	secure *http.Transport
}

// connections returns the connections for t, which all who trust alike share.
func (h *Hosts) connections(t trust, w way) *connections {
	key := fmt.Sprint(t.key(), w)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.made[key] == nil {
		h.made[key] = &connections{hosts: h, trust: t, way: w}
	}
	return h.made[key]
}

// RoundTrip implements http.RoundTripper.
func (c *connections) RoundTrip(req *http.Request) (*http.Response, error) {
	t, err := c.transport(req.URL.Scheme == "https")
	if err != nil {
		return refuse(req, err)
	}
	resp, err := t.RoundTrip(req)
	var unknown x509.UnknownAuthorityError
	if err != nil && c.hosts.o.Advice != nil && errors.As(err, &unknown) {
		err = fmt.Errorf("%w: %s", err, c.hosts.o.Advice(req.URL.Host))
	}
	return resp, err
}

// refuse ends a request that is not sent, as somebody has to put a file right.
func refuse(req *http.Request, err error) (*http.Response, error) {
	if req.Body != nil {
		req.Body.Close()
	}
	return nil, &httpio.Error{Err: err}
}

// transport reads the certificates for TLS. It remembers no failure.
func (c *connections) transport(secure bool) (*http.Transport, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	made := &c.plain
	if secure {
		made = &c.secure
	}
	if *made != nil {
		return *made, nil
	}
	t := httpio.NewTransport(idleConnections)
	if c.way.timeout > 0 {
		t.DialContext = (&net.Dialer{Timeout: c.way.timeout, KeepAlive: httpio.KeepAlive}).DialContext
	}
	if c.way.direct {
		t.Proxy = nil
	}
	if secure {
		var err error
		if t.TLSClientConfig, err = c.config(); err != nil {
			return nil, err
		}
	}
	*made = t
	return t, nil
}

// closeIdle closes connections that nobody uses. With HTTP/2 all requests share one,
// which may be dead while it is in use: no more requests go there.
func (c *connections) closeIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.plain != nil {
		c.plain.CloseIdleConnections()
	}
	if c.secure != nil {
		c.secure.CloseIdleConnections()
		c.secure = c.secure.Clone() // the former one closes what becomes idle later
	}
}

func (c *connections) config() (*tls.Config, error) {
	config := &tls.Config{InsecureSkipVerify: c.trust.skip}
	common, err := c.hosts.commonAuthorities()
	if err != nil {
		return nil, err
	}
	ca := append(common, c.trust.ca...)
	switch {
	case c.trust.skip:
		ca = nil
	case c.hosts.o.Roots != nil:
		config.RootCAs = c.hosts.o.Roots()
	case len(ca) > 0:
		if config.RootCAs, err = x509.SystemCertPool(); err != nil {
			return nil, fmt.Errorf("certificate authorities of the system: %w", err)
		}
	}
	if len(ca) > 0 {
		config.RootCAs = config.RootCAs.Clone()
	}
	for _, f := range ca {
		pem, err := f.read()
		if err != nil {
			return nil, err
		}
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: there is no certificate in it, want PEM", f.name())
		}
	}
	for _, p := range c.trust.client {
		cert, err := p.cert.read()
		if err != nil {
			return nil, err
		}
		key := cert
		if p.key.path != "" {
			if key, err = p.key.read(); err != nil {
				return nil, err
			}
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("client certificate %s: %w", p.cert.name(), err)
		}
		config.Certificates = append(config.Certificates, pair)
	}
	return config, nil
}

func (h *Hosts) closeIdle() {
	h.mu.Lock()
	made := slices.Collect(maps.Values(h.made))
	h.mu.Unlock()
	for _, c := range made {
		c.closeIdle()
	}
}

// Transport makes connections to web servers, each as its host is to be reached.
func (h *Hosts) Transport() http.RoundTripper { return hostTransport{h, way{}} }

// Direct is Transport without a proxy.
func (h *Hosts) Direct() http.RoundTripper { return hostTransport{h, way{direct: true}} }

type hostTransport struct {
	hosts *Hosts
	way   way
}

func (t hostTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	return t.hosts.roundTrip(req, nil, t.way)
}

func (t hostTransport) CloseIdleConnections() { t.hosts.closeIdle() }

// roundTrip asks the host of req. Where nothing is known of that, the
// authorities ca are trusted too.
func (h *Hosts) roundTrip(req *http.Request, ca []file, w way) (*http.Response, error) {
	own, err := h.trustOf(req.URL.Host)
	if err != nil {
		return refuse(req, err)
	}
	if own == nil {
		own = &trust{ca: ca}
	}
	return h.connections(own.at(req.URL.Host, h.insecure[req.URL.Host]), w).RoundTrip(req)
}

// endpointTransport reaches an endpoint, and where that leads to.
type endpointTransport struct {
	hosts        *Hosts
	scheme, host string
	plain        bool
	header       http.Header
	own          *connections
	away         []file // authorities that sign for where it leads to, too
}

// RoundTrip implements http.RoundTripper. Other hosts see neither the headers
// nor the client certificate of the endpoint.
func (t *endpointTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != t.host {
		return t.hosts.roundTrip(req, t.away, way{})
	}
	if len(t.header) > 0 && (req.URL.Scheme == "https" || t.plain) {
		req = req.Clone(req.Context())
		for name, values := range t.header {
			req.Header[name] = values
		}
	}
	return t.own.RoundTrip(req)
}

func (t *endpointTransport) CloseIdleConnections() { t.hosts.closeIdle() }
