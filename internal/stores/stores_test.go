package stores

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/index"
)

// TestKinds: which address is of which kind decides where chunks go.
func TestKinds(t *testing.T) {
	for _, tt := range []struct {
		address              string
		known, loose, remote bool
	}{
		{"/srv/s.castr", true, true, false},
		{"s.castr", true, true, false},
		{"./ssh:odd", true, true, false},
		{"C", true, true, false},
		{"registry://h/r", true, false, true},
		{"registry+http://h/r", true, false, true},
		{"https://h/p", true, true, true},
		{"http://h/p", true, true, true},
		{"ssh://u@h/p", true, true, true},
		{"sftp://u@h:2222/p", true, true, true},
		{"s3+https://h/b", true, true, true},
		{"s3+http://h:9000/b/p", true, true, true},
		{"s3://b/p", false, false, true},
		{"oci:dir", true, false, false},
		{"", false, false, false},
		{"ssh:/p", false, false, false},
		{"registry:/a", false, false, false},
		{"ftp://h/p", false, false, true},
		{"docker-archive:x", false, false, false},
	} {
		if known := Check(tt.address) == nil; known != tt.known {
			t.Errorf("%q is known: %v", tt.address, known)
		}
		if loose, remote := Loose(tt.address), Remote(tt.address); loose != tt.loose || remote != tt.remote {
			t.Errorf("%q: got loose %v, remote %v, want %v, %v", tt.address, loose, remote, tt.loose, tt.remote)
		}
	}
	for form, n := range map[string]int{Forms(): 7, WrittenForms(): 6} {
		if got := len(strings.Split(strings.Replace(form, " or ", ", ", 1), ", ")); got != n {
			t.Errorf("%q names %d forms, want %d", form, got, n)
		}
	}
}

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
	// The scheme was forgotten, or stands behind.
	for _, address := range []string{"user:hidden@host/path", "user:hidden@host://path"} {
		if _, err := Open(address, Source{}); err == nil || strings.Contains(err.Error(), "hid") {
			t.Errorf("%s: got %v, want an error without the password", address, err)
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
		s, err := Open(tt.address, Source{Access: Access{Keychain: &k}})
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
