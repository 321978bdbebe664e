package transport

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// TestUserKeychain logs in at a registry that wants a password, with what
// stands where Docker and Podman have it.
func TestUserKeychain(t *testing.T) {
	const password = "pl4nted"
	reg := must(testenv.StartPrivateRegistry(context.Background(), t.TempDir(), "ci", password))(t)
	defer reg.Close()
	auth := base64.StdEncoding.EncodeToString([]byte("ci:" + password))
	wrong := base64.StdEncoding.EncodeToString([]byte("ci:wrong"))
	auths := func(key, auth string) string { return fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, key, auth) }
	helper := fmt.Sprintf("#!/bin/sh\nread host\n[ \"$1 $host\" = \"get %s\" ] && echo '{\"Username\":\"ci\",\"Secret\":%q}' && exit\necho 'credentials not found in native keychain'; exit 1\n", reg.Address, password)
	img := map[string]v1.Image{"amd64": testImage(t, "amd64", gzipLayers(t, "a")...)}
	for _, tt := range []struct {
		name  string
		files map[string]string // by path in the home directory
		env   map[string]string // values with ~ for it
		fails string
	}{
		{name: "docker", files: map[string]string{".docker/config.json": auths(reg.Address, auth)}},
		{name: "DOCKER_CONFIG", files: map[string]string{"d/config.json": auths(reg.Address, auth)}, env: map[string]string{"DOCKER_CONFIG": "~/d"}},
		{name: "credsStore", files: map[string]string{".docker/config.json": `{"credsStore": "test"}`}},
		{name: "credHelpers", files: map[string]string{".docker/config.json": fmt.Sprintf(`{"credHelpers": {%q: "test"}}`, reg.Address)}},
		{name: "REGISTRY_AUTH_FILE", env: map[string]string{"REGISTRY_AUTH_FILE": "~/a.json"},
			files: map[string]string{"a.json": auths(reg.Address, auth), ".docker/config.json": auths(reg.Address, wrong)}},
		{name: "runtime directory", files: map[string]string{"run/containers/auth.json": auths(reg.Address, auth)}, env: map[string]string{"XDG_RUNTIME_DIR": "~/run"}},
		{name: "Podman behind Docker", files: map[string]string{".docker/config.json": auths("example.com", wrong), ".config/containers/auth.json": auths(reg.Address, auth)}},
		{name: "of a namespace", files: map[string]string{".config/containers/auth.json": strings.Replace(auths(reg.Address+"/team", auth), "}}}", fmt.Sprintf("}, %q: {\"auth\": %q}}}", reg.Address, wrong), 1)}},
		{name: "none", fails: "docker login " + reg.Address},
		{name: "wrong", files: map[string]string{".docker/config.json": auths(reg.Address, wrong)}, fails: "denies access"},
		{name: "no helper", files: map[string]string{".docker/config.json": `{"credsStore": "absent"}`}, fails: "docker-credential-absent"},
		{name: "damaged", files: map[string]string{".docker/config.json": `{"auths": [`}, fails: ".docker/config.json"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			home := t.TempDir()
			for _, v := range []string{"DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
				t.Setenv(v, strings.Replace(tt.env[v], "~", home, 1))
			}
			t.Setenv("HOME", home)
			t.Setenv("PATH", filepath.Join(home, "bin")+":"+os.Getenv("PATH"))
			files := map[string]string{"bin/docker-credential-test": helper}
			for name, content := range tt.files {
				files[name] = content
			}
			for name, content := range files {
				path := filepath.Join(home, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			ref := reg.Address + "/team/app:" + strings.ReplaceAll(strings.ToLower(tt.name), " ", "-")
			if tt.fails != "" {
				_, err := OpenDestination(t.Context(), mustParse(t, ref), Options{})
				if err == nil || !strings.Contains(err.Error(), tt.fails) || strings.Contains(err.Error(), password) || strings.Contains(err.Error(), "\n") {
					t.Errorf("got %v, want one line with %q", err, tt.fails)
				}
				return
			}
			commit(t, ref, Options{}, []string{"pack"}, img)
			s := open(t, ref, Options{})
			checkImage(t, s.Images()[0], img["amd64"], true)
		})
	}
}
