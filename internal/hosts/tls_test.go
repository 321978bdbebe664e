package hosts

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// serve starts a server with TLS; ca is the authority of its certificate.
func serve(t *testing.T, auth tls.ClientAuthType, h http.HandlerFunc) (address, ca string) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{ClientAuth: auth}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// clientPair makes a client certificate that signs itself.
func clientPair(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "us"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

func get(t *testing.T, transport http.RoundTripper, url string) error {
	t.Helper()
	resp, err := (&http.Client{Transport: transport}).Get(url)
	if err == nil {
		resp.Body.Close()
	}
	return err
}

func common(d Dir) Dir {
	d.Common = true
	return d
}

// TestTrust reaches a server whose certificate a private authority has signed,
// as registry and as web server.
func TestTrust(t *testing.T) {
	host, ca := serve(t, tls.RequestClientCert, func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) > 0 {
			w.Header().Set("X-Client", r.TLS.PeerCertificates[0].Subject.CommonName)
		}
	})
	in := DirName(host)
	cert, key := clientPair(t)
	for _, tt := range []struct {
		name    string
		dirs    []Dir
		o       Options
		problem string // as registry
		web     string // as web server
		client  string
	}{
		{name: "nobody", problem: "certificate signed by unknown authority: mount CA of " + host, web: "certificate signed by unknown authority: mount CA of " + host},
		{name: "docker's directory", dirs: []Dir{dir(in+"/ca.crt", ca)}},
		{name: "with a colon", dirs: []Dir{dir(host+"/ca.crt", ca)}},
		{name: "default", dirs: []Dir{dir("_default/any.crt", ca)}},
		{name: "for all", dirs: []Dir{common(dir("ca.crt", ca))}},
		{name: "for all, where that is not meant", dirs: []Dir{dir("ca.crt", ca)}, problem: "unknown authority", web: "unknown authority"},
		{name: "hosts.toml", dirs: []Dir{dir(in+"/hosts.toml", "ca = 'x/our.pem'", in+"/x/our.pem", ca)}},
		{name: "hosts.toml, several", dirs: []Dir{dir(in+"/hosts.toml", "server = 'https://"+host+"'\nca = ['our.pem']", in+"/our.pem", ca)}},
		{name: "hosts.toml stands before certificates", dirs: []Dir{dir(in+"/hosts.toml", "", in+"/ca.crt", ca)}, problem: "unknown authority", web: "unknown authority"},
		{name: "hosts.toml for all, certificates elsewhere", dirs: []Dir{dir("_default/hosts.toml", "[host.'http://mirror']"), dir(in+"/ca.crt", ca)}},
		{name: "certificates, hosts.toml for all elsewhere", dirs: []Dir{dir(in+"/ca.crt", ca), dir("_default/hosts.toml", "[host.'http://mirror']")}},
		{name: "skip_verify", dirs: []Dir{dir(in+"/hosts.toml", "skip_verify = true")}},
		{name: "insecure", o: Options{Insecure: []string{host}}},
		{name: "another insecure", o: Options{Insecure: []string{"127.0.0.1"}}, problem: "unknown authority", web: "unknown authority"},
		{name: "no certificate", dirs: []Dir{dir(in+"/ca.crt", "hello")}, problem: "/certs.d/" + in + "/ca.crt: there is no certificate in it", web: "there is no certificate in it"},
		{name: "missing", dirs: []Dir{dir(in+"/hosts.toml", "ca = 'x.pem'")}, problem: "/certs.d/" + in + "/x.pem: file does not exist", web: "file does not exist"},
		{name: "client", dirs: []Dir{dir(in+"/ca.crt", ca, in+"/client.cert", cert, in+"/client.key", key)}, client: "us"},
		{name: "client in one file", dirs: []Dir{dir(in+"/ca.crt", ca, in+"/client.cert", cert+key)}, client: "us"},
		{name: "client of hosts.toml", dirs: []Dir{dir(in+"/hosts.toml", "ca = 'a'\nclient = [['b', 'c']]", in+"/a", ca, in+"/b", cert, in+"/c", key)}, client: "us"},
		{name: "client without key", dirs: []Dir{dir(in+"/ca.crt", ca, in+"/client.cert", cert)}, problem: "client certificate /certs.d/" + in + "/client.cert: ", web: "client certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.o.Dirs = tt.dirs
			tt.o.Advice = func(host string) string { return "mount CA of " + host }
			h := newHosts(t, tt.o)
			e, err := h.Origin(host)
			if err != nil {
				t.Fatal(err)
			}
			check := func(as string, rt http.RoundTripper, want string) {
				err := get(t, rt, "https://"+host+"/v2/")
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("%s: got %v, want %q", as, err, want)
				}
			}
			check("registry", e.Transport, tt.problem)
			check("web server", h.Transport(), tt.web)
			if tt.client != "" {
				resp, err := (&http.Client{Transport: e.Transport}).Get("https://" + host)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if got := resp.Header.Get("X-Client"); got != tt.client {
					t.Errorf("the server saw the client %q, want %q", got, tt.client)
				}
			}
		})
	}
}

// TestAway follows an endpoint's redirect: the other host is trusted by the same
// authority, but sees neither headers nor client certificate.
func TestAway(t *testing.T) {
	away, awayCA := serve(t, tls.RequestClientCert, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Secret") != "" || len(r.TLS.PeerCertificates) > 0 {
			t.Errorf("the other host got %v and %d certificates", r.Header, len(r.TLS.PeerCertificates))
		}
	})
	home, homeCA := serve(t, tls.RequestClientCert, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Secret") != "s3cret" || len(r.TLS.PeerCertificates) != 1 {
			t.Errorf("the endpoint got %v and %d certificates", r.Header, len(r.TLS.PeerCertificates))
		}
		// Without the headers that a client takes along by itself.
		w.Header().Set("Location", "https://"+away)
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	cert, key := clientPair(t)
	in := DirName(home)
	h := newHosts(t, Options{Dirs: []Dir{dir(
		in+"/hosts.toml", "ca = 'ca'\nclient = [['cert', 'key']]\n[header]\nx-secret = 's3cret'",
		in+"/ca", homeCA+awayCA, in+"/cert", cert, in+"/key", key,
	)}})
	e, err := h.Origin(home)
	if err != nil {
		t.Fatal(err)
	}
	if err := get(t, e.Transport, "https://"+home); err != nil {
		t.Error(err)
	}
	if err := get(t, h.Transport(), "https://"+away); err == nil {
		t.Error("the other host is trusted by itself")
	}
}

// TestLazy: no authority is parsed before a handshake, and then once.
func TestLazy(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer plain.Close()
	host, ca := serve(t, tls.NoClientCert, func(http.ResponseWriter, *http.Request) {})
	asked := 0
	h := newHosts(t, Options{Dirs: []Dir{common(dir("ca.crt", ca))}, Roots: func() *x509.CertPool { asked++; return x509.NewCertPool() }})
	if err := get(t, h.Transport(), plain.URL); err != nil || asked != 0 {
		t.Errorf("got %v, asked %d times", err, asked)
	}
	for range 2 {
		if err := get(t, h.Transport(), "https://"+host); err != nil || asked != 1 {
			t.Errorf("got %v, asked %d times, want once", err, asked)
		}
	}
}

// TestHealed: a certificate that was missing is read once it is there.
func TestHealed(t *testing.T) {
	host, ca := serve(t, tls.NoClientCert, func(http.ResponseWriter, *http.Request) {})
	d := dir(DirName(host)+"/hosts.toml", "ca = 'ca'")
	h := newHosts(t, Options{Dirs: []Dir{d}})
	e, err := h.Origin(host)
	if err != nil {
		t.Fatal(err)
	}
	if err := get(t, e.Transport, "https://"+host); err == nil {
		t.Error("trusted without a certificate")
	}
	healed := dir(DirName(host)+"/ca", ca)
	h.o.Dirs[0].FS = healed.FS
	if err := get(t, e.Transport, "https://"+host); err != nil {
		t.Errorf("with the certificate: %v", err)
	}
}

// TestNoMoreRequests: a request that is sent after CloseIdleConnections has a
// connection of its own, also where HTTP/2 would have it share that of one which
// waits.
func TestNoMoreRequests(t *testing.T) {
	release, waits := make(chan struct{}), make(chan string, 1)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			waits <- r.RemoteAddr
			<-release
		}
		io.WriteString(w, r.Proto+" "+r.RemoteAddr)
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	h, err := New(Options{Roots: func() *x509.CertPool { return roots }})
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: h.Transport()}
	said := func(path string) string {
		resp, err := client.Get(s.URL + path)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	done := make(chan string)
	go func() { done <- said("/wait") }()
	first := "HTTP/2.0 " + <-waits
	if got := said("/"); got != first {
		t.Errorf("got %q, want %q: requests share a connection", got, first)
	}
	client.CloseIdleConnections()
	second := said("/")
	if second == first || !strings.HasPrefix(second, "HTTP/2.0 ") {
		t.Errorf("got %q, want another connection than %q", second, first)
	}
	if got := said("/"); got != second {
		t.Errorf("got %q, want %q, as before", got, second)
	}
	close(release)
	if got := <-done; got != first {
		t.Errorf("the request that waited: got %q, want %q", got, first)
	}
}
