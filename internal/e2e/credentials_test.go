package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/crypto/ssh"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// planted are credentials, by the place that they come from. Each is a text
// that occurs nowhere by chance.
var planted = map[string]string{
	"password in Docker's configuration": "pl4nted-A-docker-config",
	"password of a credential helper":    "pl4nted-B-helper",
	"identity token":                     "pl4nted-C-identity-token",
	"registry's own token":               "pl4nted-D-bearer-of-registry",
	"signature in a URL":                 "pl4nted-E-signed-url",
	"password in a URL":                  "pl4nted-F-userinfo",
	"bearer token":                       "pl4nted-G-bearer-token",
	"SSH password":                       "pl4nted-H-ssh-password",
	"passphrase of an SSH key":           "pl4nted-I-passphrase",
	"password of a proxy":                "pl4nted-J-proxy",
	"password that is refused":           "pl4nted-K-refused",
}

// forms are the ways in which a credential can be written.
func forms(secret string) []string {
	out := []string{secret, url.QueryEscape(secret), url.PathEscape(secret)}
	// In base64 of user:password it may begin at any of three places.
	for i := range 3 {
		b := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", i) + secret))
		out = append(out, b[4:len(b)-4])
	}
	return out
}

func reveals(text []byte, secret string) bool {
	return slices.ContainsFunc(forms(secret), func(f string) bool { return bytes.Contains(text, []byte(f)) })
}

// witness keeps all that hosts receive and programs say.
type witness struct {
	t *testing.T

	mu   sync.Mutex
	seen map[string]*bytes.Buffer // by the name of who received or said it
}

func (w *witness) note(who string, b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen[who] == nil {
		w.seen[who] = &bytes.Buffer{}
	}
	w.seen[who].Write(append(b, '\n'))
}

// host starts a server that notes each request, whole, before it is served.
func (w *witness) host(who string, h http.Handler) (address string) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		b, err := httputil.DumpRequest(r, true)
		if err != nil {
			b = append(b, err.Error()...)
		}
		w.note(who, b)
		h.ServeHTTP(rw, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	w.t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// allow are those who may know a credential.
type allow map[string][]string

// check looks for every credential at everybody.
func (w *witness) check(may allow) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for source, secret := range planted {
		var knows []string
		for who, b := range w.seen {
			if !reveals(b.Bytes(), secret) {
				continue
			}
			knows = append(knows, who)
			if !slices.Contains(may[source], who) {
				w.t.Errorf("%s: %s got it\n%s", source, who, around(b.Bytes(), secret))
			}
		}
		// Otherwise the test would prove nothing.
		for _, who := range may[source] {
			if !slices.Contains(knows, who) {
				w.t.Errorf("%s: it did not come to %s, where it belongs", source, who)
			}
		}
	}
}

// around is what stands beside a credential in text.
func around(text []byte, secret string) []byte {
	for _, f := range forms(secret) {
		if i := bytes.Index(text, []byte(f)); i >= 0 {
			return text[max(0, i-300):min(len(text), i+len(f)+100)]
		}
	}
	return nil
}

// guardedRegistry is a registry that asks for a token, whose token server is
// the registry itself, and which sends readers of blobs to another host.
type guardedRegistry struct {
	http.Handler // the registry without a guard
	elsewhere    atomic.Pointer[string]
	requests     atomic.Int64
	mu           sync.Mutex
	uses         map[string]int // of each token that is still good
}

// tokenUses is after how many requests a token expires: more than are under way
// at once, as a new token that is used up before its request is a refusal.
const tokenUses = 20

func (g *guardedRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		g.token(w, r)
		return
	}
	if !g.admits(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="registry"`, r.Host))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	blob := r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:")
	if blob && g.requests.Add(1)%4 == 0 {
		http.Error(w, "try again", http.StatusServiceUnavailable)
		return
	}
	if to := g.elsewhere.Load(); blob && to != nil {
		http.Redirect(w, r, "http://"+*to+r.URL.Path+"?X-Signature="+planted["signature in a URL"], http.StatusTemporaryRedirect)
		return
	}
	g.Handler.ServeHTTP(w, r)
}

func (g *guardedRegistry) token(w http.ResponseWriter, r *http.Request) {
	_, password, _ := r.BasicAuth()
	switch {
	case password == planted["password in Docker's configuration"], password == planted["password of a credential helper"]:
	case r.Method == http.MethodPost && r.FormValue("refresh_token") == planted["identity token"]:
	default:
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	token := fmt.Sprintf("%s-%d", planted["registry's own token"], len(g.uses))
	g.uses[token] = tokenUses
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]string{"token": token, "access_token": token})
}

func (g *guardedRegistry) admits(token string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.uses[token]--
	return g.uses[token] >= 0
}

// signedOnly serves those who know the signature.
func signedOnly(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("X-Signature") != planted["signature in a URL"] {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// failing makes every nth GET fail.
func failing(n int64, h http.Handler) http.Handler {
	var requests atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && requests.Add(1)%n == 0 {
			http.Error(w, "try again", http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// webFiles is a web server of chunks in a directory that wants credentials,
// sends every third reader elsewhere, and fails now and then.
type webFiles struct {
	dir       string
	elsewhere string // host:port
	requests  atomic.Int64
}

func (f *webFiles) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, password, _ := r.BasicAuth()
	if password != planted["password in a URL"] && r.Header.Get("Authorization") != "Bearer "+planted["bearer token"] {
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return
	}
	path := filepath.Join(f.dir, filepath.Clean(r.URL.Path))
	if r.Method == http.MethodPut {
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(path), 0o755)
		}
		if err == nil {
			err = os.WriteFile(path, b, 0o644)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
		return
	}
	switch n := f.requests.Add(1); {
	case r.Method == http.MethodGet && n%3 == 0:
		http.Redirect(w, r, "http://"+f.elsewhere+r.URL.Path, http.StatusFound)
	case r.Method == http.MethodGet && n%5 == 0:
		http.Error(w, "try again", http.StatusBadGateway)
	default:
		http.ServeFile(w, r, path)
	}
}

// TestCredentials plants a credential in every place that one can come from,
// converts and runs with it against servers that ask for it, redirect
// elsewhere, let it expire and fail, and looks for it at every host, in
// everything that is printed, in the images, and in all that the program can
// read.
func TestCredentials(t *testing.T) {
	t.Parallel()
	wit := &witness{t: t, seen: make(map[string]*bytes.Buffer)}
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	source, err := cache.ScratchImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	quiet := registry.Logger(log.New(io.Discard, "", 0))

	// Images that everybody may pull; packs that are guarded, and read from
	// elsewhere; chunks on a web server, and from elsewhere.
	images := wit.host("the image's registry", registry.New(quiet))
	guard := &guardedRegistry{Handler: registry.New(quiet), uses: make(map[string]int)}
	guarded := wit.host("the guarded registry", guard)
	away := wit.host("the registry's other host", signedOnly(guard.Handler))
	guard.elsewhere.Store(&away)
	files := &webFiles{dir: t.TempDir()}
	files.elsewhere = wit.host("the web server's other host", http.FileServer(http.Dir(files.dir)))
	web := wit.host("the web server", files)
	server := startSSHD(t, testenv.SSHDOptions{Password: planted["SSH password"]})
	s3, s3Env, s3Secrets := startS3(t, "chunks")
	planted["secret key of S3"] = s3.SecretKey // it signs, and goes nowhere
	bucket := wit.host("the S3 server", failing(6, &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: s3.Address})
		r.Out.Host = r.In.Host // it is signed
	}}))

	// config writes a Docker configuration and returns its directory.
	config := func(text string) string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	basic := func(source string) string {
		return base64.StdEncoding.EncodeToString([]byte("joe:" + planted[source]))
	}
	helpers := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nread host\nprintf '{\"ServerURL\":\"%%s\",\"Username\":\"joe\",\"Secret\":\"%s\"}' \"$host\"\n", planted["password of a credential helper"])
	if err := os.WriteFile(filepath.Join(helpers, "docker-credential-planted"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	home := sshHome(t, server.Key, server)
	sshSecrets := encryptedKey(t, server.Key)
	wrong := config(fmt.Sprintf(`{"auths": {%q: {"auth": %q}, %q: {"auth": %q}}}`, guarded, basic("password that is refused"), web, basic("password that is refused")))

	auths := config(fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, guarded, basic("password in Docker's configuration")))
	identity := config(fmt.Sprintf(`{"auths": {%q: {"auth": %q, "identitytoken": %q}}}`, guarded, base64.StdEncoding.EncodeToString([]byte("joe:")), planted["identity token"]))
	bearer := config(fmt.Sprintf(`{"auths": {%q: {"registrytoken": %q}}}`, web, planted["bearer token"]))
	packs := "registry://" + guarded + "/packs"
	chunks := "http://" + web + "/rootfs.castr"
	mounted := func(dir string) []string { return []string{"--volume", dir + ":/.bootfs/secrets:ro"} }
	for _, c := range []struct {
		name    string
		store   string
		convert []string // environment of the conversion
		run     []string // flags of docker run
	}{
		{"docker-config", packs, []string{"DOCKER_CONFIG=" + auths}, mounted(auths)},
		{"helper", packs, []string{"DOCKER_CONFIG=" + config(fmt.Sprintf(`{"credHelpers": {%q: "planted"}}`, guarded)), "PATH=" + helpers + ":" + os.Getenv("PATH")}, mounted(auths)},
		{"identity-token", packs, []string{"DOCKER_CONFIG=" + identity}, mounted(identity)},
		{"url", "http://joe:" + planted["password in a URL"] + "@" + web + "/rootfs.castr", nil, []string{"--env", "BLOB_STORE=http://joe:" + planted["password in a URL"] + "@" + web + "/rootfs.castr"}},
		{"bearer", chunks, []string{"DOCKER_CONFIG=" + bearer}, mounted(bearer)},
		{"ssh-password", "ssh://root@" + server.Address + "/srv/a.castr", []string{"HOME=" + home, "SSH_AUTH_SOCK=", "DROPBEAR_PASSWORD=" + planted["SSH password"]}, []string{"--env", "DROPBEAR_PASSWORD=" + planted["SSH password"]}},
		{"s3-file", "s3+http://" + bucket + "/chunks/a.castr", s3Env, mounted(s3Secrets)},
		{"s3-environment", "s3+http://" + bucket + "/chunks/b.castr", s3Env, []string{"--env", s3Env[0], "--env", s3Env[1]}},
		{"ssh-key", "sftp://root@" + server.Address + "/srv/b.castr", []string{"HOME=" + home, "SSH_AUTH_SOCK="}, mounted(sshSecrets)},
	} {
		image := images + "/app:" + c.name
		cmd := w.command("--boot", w.boot, "--store", c.store, "oci:"+source, image)
		cmd.Env = append(cmd.Env, c.convert...)
		out, err := cmd.CombinedOutput()
		wit.note("the converter's output", out)
		if err != nil {
			t.Fatalf("%s: convert: %v\n%s", c.name, err, out)
		}
		for _, what := range []string{"inspect", "check"} {
			args := []string{what, "--store", c.store, image}
			if what == "check" {
				args = []string{what, "--store", c.store, "oci:" + source, image}
			}
			cmd := w.command(args...)
			cmd.Env = append(cmd.Env, c.convert...)
			out, err := cmd.CombinedOutput()
			wit.note("the output of "+what, out)
			if err != nil {
				t.Errorf("%s: %s: %v\n%s", c.name, what, err, out)
			}
		}
		noteImage(t, wit, image)

		flags := append(slices.Clone(c.run), "--env", "BOOTFS_LOG=debug")
		r := runBeside(t, append(slices.Clone(flags), image, "dump")...)
		wit.note("the program", []byte(r.stdout))
		wit.note("the container's log", []byte(r.stderr))
		if r.code != 0 || !strings.Contains(r.stdout, "/proc/1/environ: ") {
			t.Errorf("%s: exit %d, %d bytes, %s", c.name, r.code, len(r.stdout), r.stderr)
		}
		if !strings.HasPrefix(c.store, "http") && !strings.HasPrefix(c.store, "registry") {
			continue
		}
		// Credentials that are refused, and no server at all.
		for _, flags := range [][]string{
			mounted(wrong),
			{"--env", "BLOB_STORE=http://joe:" + planted["password that is refused"] + "@" + web + "/rootfs.castr"},
		} {
			r := runBeside(t, append(flags, "--env", "BOOTFS_LOG=debug", image)...)
			wit.note("the container's log", []byte(r.stdout+r.stderr))
			if r.code != 125 {
				t.Errorf("%s: with credentials that are refused: exit %d, %s", c.name, r.code, r.stderr)
			}
		}
	}

	// Addresses that lead nowhere, and what is no address, with a password in it.
	secret := planted["password that is refused"]
	var attempts sync.WaitGroup
	say := func(args ...string) {
		attempts.Go(func() {
			out, err := w.command(args...).CombinedOutput()
			wit.note("the converter's output", out)
			if err == nil {
				t.Errorf("%s: no error", args)
			}
		})
	}
	for _, address := range []string{
		"http://joe:" + secret + "@127.0.0.1:1/x", "http://joe:" + secret + "@no such host/x", "http://joe:" + secret + "@[::1/x",
		"http://joe:" + secret + "@127.0.0.1:port/x", "http://joe:" + secret + "%zz@127.0.0.1/x", "registry://joe:" + secret + "@127.0.0.1:1/x",
		"registry+http://joe:" + secret + "@127.0.0.1:1/x", "ssh://joe:" + secret + "@127.0.0.1:1/x", "sftp://joe:" + secret + "@127.0.0.1:1/x",
		"ssh://joe:" + secret + "@[::1/x", "s3+http://joe:" + secret + "@127.0.0.1:1/x", "ftp://joe:" + secret + "@127.0.0.1:1/x",
	} {
		say("--boot", w.boot, "--store", address, "oci:"+source, images+"/app:none")
	}
	for _, address := range []string{"joe:" + secret + "@127.0.0.1:1/x", "docker://joe:" + secret + "@127.0.0.1:1/x", "https://joe:" + secret + "@127.0.0.1:1/x"} {
		say("--boot", w.boot, address, images+"/app:none")
		say("--boot", w.boot, "oci:"+source, address)
		say("inspect", address)
	}
	attempts.Wait()
	bad := "http://joe:" + secret + "@[::1/x ssh://joe:" + secret + "@127.0.0.1:1/x ftp://joe:" + secret + "@h/x"
	r := runBeside(t, "--env", "BOOTFS_LOG=debug", "--env", "BLOB_STORE="+bad, images+"/app:bearer")
	wit.note("the container's log", []byte(r.stdout+r.stderr))
	if r.code != 125 {
		t.Errorf("BLOB_STORE of no use: exit %d, %s", r.code, r.stderr)
	}
	throughProxy(t, wit, source, images)

	wit.check(allow{
		"password in Docker's configuration": {"the guarded registry"},
		"password of a credential helper":    {"the guarded registry"},
		"identity token":                     {"the guarded registry"},
		"registry's own token":               {"the guarded registry"},
		"signature in a URL":                 {"the registry's other host"},
		"password in a URL":                  {"the web server"},
		"bearer token":                       {"the web server"},
		"password of a proxy":                {"the proxy"},
		"password that is refused":           {"the guarded registry", "the web server"},
	})
}

// throughProxy runs and checks through a proxy that wants a password, from a
// web server that only the proxy reaches, and through proxies that fail.
func throughProxy(t *testing.T, wit *witness, source, images string) {
	dir := t.TempDir()
	behind := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := httputil.DumpRequest(r, false)
		if err != nil {
			b = append(b, err.Error()...)
		}
		wit.note("the web server behind the proxy", b)
		if r.Host == "chunks.test" && strings.HasSuffix(r.URL.Path, "0.cacnk") {
			http.Redirect(w, r, "http://elsewhere.test"+r.URL.Path, http.StatusFound)
			return
		}
		http.FileServer(http.Dir(dir)).ServeHTTP(w, r)
	})
	proxy := wit.host("the proxy", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.Header.Get("Proxy-Authorization"), base64.StdEncoding.EncodeToString([]byte("joe:"+planted["password of a proxy"]))) {
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		r.Header.Del("Proxy-Authorization")
		behind.ServeHTTP(w, r)
	}))
	image := images + "/app:proxy"
	out, err := w.command("--boot", w.boot, "--store", filepath.Join(dir, "rootfs.castr"), "oci:"+source, image).CombinedOutput()
	wit.note("the converter's output", out)
	if err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	env := "HTTP_PROXY=http://joe:" + planted["password of a proxy"] + "@"
	flags := []string{"--env", "BOOTFS_LOG=debug", "--env", "BLOB_STORE=http://chunks.test/rootfs.castr", "--env"}
	r := runBeside(t, append(slices.Clone(flags), env+proxy, image)...)
	wit.note("the container's log", []byte(r.stdout+r.stderr))
	if r.code != 0 {
		t.Errorf("through the proxy: exit %d, %s", r.code, r.stderr)
	}
	for _, bad := range []string{"127.0.0.1:1", "127.0.0.1:port"} {
		id := startWith(t, besideFlags(), append(slices.Clone(flags), env+bad, image)...)
		eventually(t, "the log says that the store fails", func() bool { return strings.Contains(docker(t, "logs", id).stderr, "store fails") })
		wit.note("the container's log", []byte(docker(t, "logs", id).stderr))
	}
	for _, address := range []string{proxy, "127.0.0.1:1", "127.0.0.1:port"} {
		cmd := w.command("check", "--store", "http://chunks.test/rootfs.castr", "oci:"+source, image)
		cmd.Env = append(cmd.Env, env+address)
		out, err := cmd.CombinedOutput() // where the proxy fails, from the directory
		wit.note("the output of check", out)
		if err != nil {
			t.Errorf("check through %s: %v\n%s", address, err, out)
		}
	}
}

// encryptedKey returns a directory with a private key that a passphrase
// protects, and the passphrase.
func encryptedKey(t *testing.T, plain string) (dir string) {
	t.Helper()
	b, err := os.ReadFile(plain)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParseRawPrivateKey(b)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(planted["passphrase of an SSH key"]))
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "id_ed25519"), pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "passphrase"), []byte(planted["passphrase of an SSH key"]+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// noteImage notes all of a converted image that a registry has.
func noteImage(t *testing.T, wit *witness, image string) {
	t.Helper()
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(ref, remote.WithAuth(authn.Anonymous))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := index.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	wit.note("the image", raw)
	for _, m := range manifest.Manifests {
		img, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		for _, get := range []func() ([]byte, error){img.RawManifest, img.RawConfigFile} {
			b, err := get()
			if err != nil {
				t.Fatal(err)
			}
			wit.note("the image", b)
		}
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range layers {
			r, err := l.Uncompressed()
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				t.Fatal(err)
			}
			wit.note("the image", b)
		}
	}
}
