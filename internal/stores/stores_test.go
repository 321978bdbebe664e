package stores

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/registrystore"
)

// TestRefusalsHideCredentials: what is said of an address goes to a log.
func TestRefusalsHideCredentials(t *testing.T) {
	for _, address := range []string{
		"https://user:hid/hidden@host/path",
		"https://user:hidden@host/path?query",
		"http://user:hidden@host:port/path",
		"ssh://user:hidden@host/path",
		"s3+https://host/bucket?secret=hidden",
		"registry://user:hidden@host/repo",
		"registry://user:hid/hidden@host/repo",
		"registry://host/user:hidden@repo",
		"registry+http://user:hidden@host/repo",
	} {
		_, err := Open(address, Source{})
		if err == nil || strings.Contains(err.Error(), "hid") || !strings.Contains(err.Error(), address[:strings.Index(address, ":")]) {
			t.Errorf("%s: got %v, want an error that names the scheme and no password", address, err)
		}
	}
}

// keychain has one login for every host.
type keychain struct{ asked []string }

func (k *keychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	k.asked = append(k.asked, r.RegistryStr())
	return &authn.Basic{Username: "joe", Password: "hidden"}, nil
}

// TestWebLogin: a web server's credentials come from its address, or from the
// keychain where nobody can listen.
func TestWebLogin(t *testing.T) {
	var user, password string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ = r.BasicAuth()
		w.Write([]byte("x"))
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	for _, tt := range []struct{ address, user, password, asked string }{
		{server.URL + "/path", "joe", "hidden", host},
		{"http://ann:secret@" + host + "/path", "ann", "secret", ""},
	} {
		var k keychain
		s, err := Open(tt.address, Source{Registry: registrystore.RemoteOptions{Keychain: &k}})
		if err != nil {
			t.Fatal(err)
		}
		if s.String() != server.URL+"/path" {
			t.Errorf("%s: its name is %s", tt.address, s)
		}
		if _, err := s.Get(t.Context(), index.ID{}, nil); err != nil {
			t.Error(err)
		}
		if user != tt.user || password != tt.password || strings.Join(k.asked, " ") != tt.asked {
			t.Errorf("%s: got %s:%s after asking for %q", tt.address, user, password, k.asked)
		}
	}
	for address, want := range map[string]bool{
		"https://store.example.com/p": true, "http://store.example.com/p": false, "http://10.0.0.1/p": false, "http://[::1]:1/p": true,
	} {
		if got := webLogin(new(keychain), address) != nil; got != want {
			t.Errorf("%s: the keychain is used: %v, want %v", address, got, want)
		}
	}
}
