package e2e

import (
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/hosts"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// TestMovedImage runs an image that was copied to another registry, after the
// first one has gone: one variable says where the chunks are.
func TestMovedImage(t *testing.T) {
	t.Parallel()
	first, err := testenv.StartRegistry(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	second, err := testenv.StartRegistry(t.Context(), t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := second.Close(); err != nil {
			t.Error(err)
		}
	})
	from := first.Address + "/team/app:1"
	out, err := w.command("--quiet", "--boot", w.boot, "oci:"+w.layout, from).CombinedOutput()
	if err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	for _, to := range []string{second.Address + "/team/app:1", second.Address + "/elsewhere:2"} {
		out, err := exec.Command("skopeo", "copy", "--quiet", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+from, "docker://"+to).CombinedOutput()
		if err != nil {
			t.Fatalf("skopeo: %v\n%s", err, out)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	certs := t.TempDir()
	own := filepath.Join(certs, hosts.DirName(first.Address))
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(own, "hosts.toml"), fmt.Appendf(nil, "[host.\"http://%s\"]\ncapabilities = [\"pull\"]\n", second.Address), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		image string
		flags []string
	}{
		"BLOB_STORE":                    {"team/app:1", []string{"--env", "BLOB_STORE=registry://" + second.Address + "/team/app"}},
		"BLOB_STORE, another name":      {"elsewhere:2", []string{"--env", "BLOB_STORE=registry://" + second.Address + "/elsewhere"}},
		"BOOTFS_MIRRORS":                {"team/app:1", []string{"--env", "BOOTFS_MIRRORS=http://" + second.Address}},
		"BOOTFS_MIRRORS of one":         {"team/app:1", []string{"--env", "BOOTFS_MIRRORS=" + first.Address + "=http://" + second.Address}},
		"BOOTFS_MIRRORS, a dead one":    {"team/app:1", []string{"--env", "BOOTFS_MIRRORS=http://127.0.0.1:1 http://" + second.Address}},
		"hosts.toml":                    {"team/app:1", []string{"--volume", certs + ":/.bootfs/certs.d:ro"}},
		"hosts.toml on read-only roots": {"team/app:1", []string{"--read-only", "--volume", certs + ":/.bootfs/certs.d:ro"}},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"--pull", "always"}, c.flags...)
			r := runBeside(t, append(args, second.Address+"/"+c.image, "python3", "-c", "import ssl, os; print('ok', os.path.exists('/.bootfs/certs.d'), [v for v in os.environ if v.startswith('BOOTFS')])")...)
			r.want(t, "ok False []\n")
		})
	}
	out, err = w.command("verify", "--insecure", second.Address, second.Address+"/team/app:1").CombinedOutput()
	if err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}
}

// TestPrivateCA converts to, and runs from, a registry and a web server whose
// certificates a private authority has signed.
func TestPrivateCA(t *testing.T) {
	t.Parallel()
	secure := func(h http.Handler) (address, dir string) {
		s := httptest.NewUnstartedServer(h)
		s.EnableHTTP2 = true
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.StartTLS()
		t.Cleanup(s.Close)
		dir = t.TempDir()
		ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
		address = s.Listener.Addr().String()
		own := filepath.Join(dir, hosts.DirName(address))
		if err := os.Mkdir(own, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(own, "ca.crt"), ca, 0o644); err != nil {
			t.Fatal(err)
		}
		return address, dir
	}
	proxy := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: w.registry.Address})
		r.Out.Host = r.In.Host
		r.SetXForwarded() // the registry makes its Locations from it
	}}
	chunks := t.TempDir()
	registry, registryCerts := secure(proxy)
	web, webCerts := secure(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut {
			http.FileServer(http.Dir(chunks)).ServeHTTP(rw, r)
			return
		}
		name := filepath.Join(chunks, filepath.Clean(r.URL.Path))
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(name), 0o755)
		}
		if err == nil {
			err = os.WriteFile(name, b, 0o644)
		}
		if err != nil {
			t.Error(err)
		}
		rw.WriteHeader(http.StatusCreated)
	}))
	for _, c := range []struct{ name, host, store, certs string }{
		{"registry", registry, "registry://" + registry + "/private", registryCerts},
		{"web", web, "https://" + web + "/rootfs.castr", webCerts},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := w.proxy.address + "/python:private-" + c.name
			args := []string{"--quiet", "--boot", w.boot, "--store", c.store, "oci:" + w.layout, image}
			out, err := w.command(args...).CombinedOutput()
			if err == nil || !strings.Contains(string(out), "certificate") || !strings.Contains(string(out), c.host) {
				t.Errorf("convert without the authority: %v\n%s", err, out)
			}
			if out, err := w.command(append([]string{"--certs-d", c.certs}, args...)...).CombinedOutput(); err != nil {
				t.Fatalf("convert: %v\n%s", err, out)
			}
			ca := filepath.Join(c.certs, hosts.DirName(c.host), "ca.crt")
			cmd := w.command("verify", image)
			cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+ca)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("verify with SSL_CERT_FILE: %v\n%s", err, out)
			}

			program := []string{image, "python3", "-c", "import ssl; print('ok')"}
			for _, flags := range [][]string{
				{"--volume", c.certs + ":/.bootfs/certs.d:ro"},
				{"--volume", ca + ":/.bootfs/certs.d/" + hosts.DirName(c.host) + "/ca.crt:ro"},
				{"--volume", ca + ":/.bootfs/certs.d/our.crt:ro"},
				{"--env", "BOOTFS_INSECURE=" + c.host},
			} {
				r := runBeside(t, append(flags, program...)...)
				r.want(t, "ok\n")
			}
			r := runBeside(t, image, "true")
			want := "certificate signed by unknown authority: mount the certificate of its authority: -v CA.crt:/.bootfs/certs.d/" + hosts.DirName(c.host) + "/ca.crt"
			if r.code != 125 || !strings.Contains(r.stderr, want) {
				t.Errorf("without the authority: exit %d, %q, want %q", r.code, r.stderr, want)
			}
		})
	}
}
