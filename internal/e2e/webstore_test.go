package e2e

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestWebStore converts to a web server that wants a password of everybody, and
// runs from it. The container finds the password where registries' are.
func TestWebStore(t *testing.T) {
	t.Parallel()
	const password = "pl4nted"
	dir := t.TempDir()
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		name := filepath.Join(dir, filepath.Clean(r.URL.Path))
		if _, p, _ := r.BasicAuth(); p != password {
			rw.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.Method != http.MethodPut {
			http.ServeFile(rw, r, name)
			return
		}
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(name), 0o755)
		}
		if err == nil {
			err = os.WriteFile(name, b, 0o644)
		}
		if err != nil {
			t.Error(err)
			rw.WriteHeader(http.StatusInternalServerError)
			return
		}
		rw.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	image := w.proxy.address + "/python:web"
	out, err := w.command("--boot", w.boot, "--store", "http://ci:"+password+"@"+host+"/rootfs.castr", "oci:"+w.layout, image).CombinedOutput()
	if err != nil || strings.Contains(string(out), password) {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	out, err = w.command("inspect", "--json", image).CombinedOutput()
	if err != nil || strings.Contains(string(out), password) || !strings.Contains(string(out), `"`+server.URL+`/rootfs.castr"`) {
		t.Errorf("inspect: %v, want the address without the password\n%s", err, out)
	}

	secret := filepath.Join(t.TempDir(), "config.json")
	auth := base64.StdEncoding.EncodeToString([]byte("ci:" + password))
	if err := os.WriteFile(secret, fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, host, auth), 0o600); err != nil {
		t.Fatal(err)
	}
	r := runBeside(t, "--env", "BOOTFS_LOG=debug", "--volume", secret+":/run/secrets/bootfs.json:ro", image, "python3", "-c", "import ssl; print('ok')")
	r.want(t, "ok\n")
	if strings.Contains(r.stderr, password) || strings.Contains(r.stderr, auth) {
		t.Errorf("the log has the password: %s", r.stderr)
	}
	runBeside(t, "--env", "BLOB_STORE=http://ci:"+password+"@"+host+"/rootfs.castr", image, "sh", "-c", "env | grep "+password+" || echo none").want(t, "none\n")

	r = runBeside(t, image, "true")
	if r.code != 125 || !strings.Contains(r.stderr, "401 Unauthorized: the server wants credentials") {
		t.Errorf("without the password: exit %d, %s", r.code, r.stderr)
	}
}
