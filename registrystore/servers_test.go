package registrystore

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/freeport"
)

// TestMain keeps the tests from the credentials of whoever runs them.
func TestMain(m *testing.M) {
	home, err := os.MkdirTemp("", "registrystore-home-*")
	if err != nil {
		log.Fatal(err)
	}
	for _, v := range []string{"DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "HTTP_PROXY", "http_proxy"} {
		os.Unsetenv(v)
	}
	os.Setenv("HOME", home)
	code := m.Run()
	os.RemoveAll(home)
	os.Exit(code)
}

// goRegistry starts go-containerregistry's registry and returns its host:port.
func goRegistry(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(discardLog)))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// dockerRegistry starts Debian's docker-registry and returns its host:port and
// configuration file.
func dockerRegistry(t testing.TB) (addr, config string) {
	t.Helper()
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatalf("%v: install the package docker-registry", err)
	}
	dir := t.TempDir()
	config = filepath.Join(dir, "config.yml")
	// Another process may take the free port before the registry does.
	for range 5 {
		if addr, err = freeport.Address(); err != nil {
			t.Fatal(err)
		}
		err = os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %s/data}
  delete: {enabled: true}
http: {addr: %s}
`, dir, addr), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		cmd := exec.Command(path, "serve", config)
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		t.Cleanup(func() { cmd.Process.Kill(); <-ended })
		for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if resp, err := http.Get("http://" + addr + "/v2/"); err == nil {
				resp.Body.Close()
				return addr, config
			}
			select {
			case <-ended:
				deadline = time.Time{}
			default:
			}
		}
		t.Logf("docker-registry did not start: %s", out.Bytes())
	}
	t.Fatal("docker-registry does not start")
	return "", ""
}

// push uploads packs to a repository.
func push(t testing.TB, host, repo string, packs []Pack) {
	t.Helper()
	r, err := name.NewRepository(host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packs {
		l, err := p.Layer()
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.WriteLayer(r, l); err != nil {
			t.Fatal(err)
		}
	}
}

// storeAt returns a Store of the image at a registry.
func (im *image) storeAt(t testing.TB, address string, o RemoteOptions) *Store {
	t.Helper()
	b, err := NewRemote(address, o)
	if err != nil {
		t.Fatal(err)
	}
	return NewStore(b, im.locators, im.index)
}

// faulty returns an image whose packs are in a registry behind a proxy.
func faulty(t testing.TB, chunks int) (*image, *faultproxy.Proxy) {
	t.Helper()
	im := newImage(t, chunks)
	host := goRegistry(t)
	push(t, host, "app", im.packs)
	p, err := faultproxy.New("http://" + host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return im, p
}

var discardLog = log.New(io.Discard, "", 0)

// keychain is a Keychain of one login for one host.
type keychain struct {
	host, user, password string
}

func (k *keychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	if r.RegistryStr() != k.host {
		return authn.Anonymous, nil
	}
	return &authn.Basic{Username: k.user, Password: k.password}, nil
}

func TestStoreReadsEverywhere(t *testing.T) {
	t.Parallel()
	im := newImage(t, 300)
	t.Run("go-containerregistry", func(t *testing.T) {
		host := goRegistry(t)
		push(t, host, "some/app", im.packs)
		im.readAll(t, im.storeAt(t, "registry://"+host+"/some/app", RemoteOptions{}))
	})
	t.Run("docker-registry", func(t *testing.T) {
		host, _ := dockerRegistry(t)
		push(t, host, "some/app", im.packs)
		im.readAll(t, im.storeAt(t, "registry://"+host+"/some/app", RemoteOptions{}))
	})
	t.Run("layout", func(t *testing.T) {
		dir := t.TempDir()
		data, err := DataManifest(im.packs)
		if err != nil {
			t.Fatal(err)
		}
		empty, err := layout.Write(dir, emptyIndex)
		if err != nil {
			t.Fatal(err)
		}
		if err := empty.AppendImage(data); err != nil {
			t.Fatal(err)
		}
		im.readAll(t, NewStore(NewLayoutBlobs(dir), im.locators, im.index))
	})
}
