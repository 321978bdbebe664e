package s3store

import (
	"cmp"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/index"
)

// env are the variables of a test: nobody else's.
type env map[string]string

func (e env) sources() Sources {
	return Sources{Getenv: func(name string) string {
		if v, ok := e[name]; ok {
			return v
		}
		return map[string]string{"AWS_EC2_METADATA_DISABLED": "true"}[name]
	}}
}

func TestAddress(t *testing.T) {
	for _, tt := range []struct {
		address, env  string // of AWS_REGION
		name          string // "" if it is address
		bucket, chunk string // URLs; chunk up to its name
		region        string
	}{
		{"s3+https://h.example/chunks", "", "", "https://h.example/chunks", "https://h.example/chunks/", "us-east-1"},
		{"s3+http://h:9000/chunks/a/b/", "", "s3+http://h:9000/chunks/a/b", "http://h:9000/chunks", "http://h:9000/chunks/a/b/", "us-east-1"},
		{"s3+https://H.example:443/chunks", "", "s3+https://h.example/chunks", "https://h.example/chunks", "https://h.example/chunks/", "us-east-1"},
		{"s3+http://[::1]:80/chunks", "", "s3+http://[::1]/chunks", "http://[::1]/chunks", "http://[::1]/chunks/", "us-east-1"},
		{"s3+https://h/chunks?region=eu-1", "us-west-2", "", "https://h/chunks", "https://h/chunks/", "eu-1"},
		{"s3+https://h/chunks", "us-west-2", "s3+https://h/chunks?region=us-west-2", "https://h/chunks", "https://h/chunks/", "us-west-2"},
		{"s3+https://h/chunks", "us-east-1", "", "https://h/chunks", "https://h/chunks/", "us-east-1"},
		{"s3+https://h/chunks/p?style=virtual", "", "", "https://chunks.h/", "https://chunks.h/p/", "us-east-1"},
		{"s3+https://h/chunks?lookup=dns", "", "s3+https://h/chunks?style=virtual", "https://chunks.h/", "https://chunks.h/", "us-east-1"},
		{"s3+https://h/chunks/a%20b+c%25", "", "s3+https://h/chunks/a%20b%2Bc%25", "https://h/chunks", "https://h/chunks/a%20b%2Bc%25/", "us-east-1"},
		{"s3+https://s3.eu-west-1.amazonaws.com/chunks/p", "us-west-2", "", "https://chunks.s3.eu-west-1.amazonaws.com/", "https://chunks.s3.eu-west-1.amazonaws.com/p/", "eu-west-1"},
		{"s3+https://s3-eu-west-1.amazonaws.com/chunks", "", "", "https://chunks.s3-eu-west-1.amazonaws.com/", "https://chunks.s3-eu-west-1.amazonaws.com/", "eu-west-1"},
		{"s3+https://s3.amazonaws.com/chunks", "", "", "https://chunks.s3.amazonaws.com/", "https://chunks.s3.amazonaws.com/", "us-east-1"},
		{"s3+https://s3.amazonaws.com/chunks", "eu-west-1", "s3+https://s3.amazonaws.com/chunks?region=eu-west-1", "https://chunks.s3.eu-west-1.amazonaws.com/", "https://chunks.s3.eu-west-1.amazonaws.com/", "eu-west-1"},
		{"s3+https://s3.dualstack.eu-west-1.amazonaws.com/chunks?style=path", "", "", "https://s3.dualstack.eu-west-1.amazonaws.com/chunks", "https://s3.dualstack.eu-west-1.amazonaws.com/chunks/", "eu-west-1"},
		{"s3+https://s3.cn-north-1.amazonaws.com.cn/my.chunks", "", "", "https://s3.cn-north-1.amazonaws.com.cn/my.chunks", "https://s3.cn-north-1.amazonaws.com.cn/my.chunks/", "cn-north-1"},
		{"s3+https://s3.us-gov-west-1.amazonaws.com/chunks", "", "", "https://chunks.s3.us-gov-west-1.amazonaws.com/", "https://chunks.s3.us-gov-west-1.amazonaws.com/", "us-gov-west-1"},
	} {
		s, err := New(tt.address, Options{Sources: env{"AWS_REGION": tt.env}.sources()})
		if err != nil {
			t.Error(err)
			continue
		}
		if want := cmp.Or(tt.name, tt.address); s.String() != want {
			t.Errorf("%s: its name is %s, want %s", tt.address, s, want)
		}
		if again, err := New(s.String(), Options{Sources: env{}.sources()}); err != nil || *again.place.Load() != *s.place.Load() || *again.address != *s.address {
			t.Errorf("%s: its name leads elsewhere, %v", tt.address, err)
		}
		p := s.place.Load()
		if got := s.address.url(p, "", "").String(); got != tt.bucket || p.region != tt.region {
			t.Errorf("%s: got bucket %s in %s, want %s in %s", tt.address, got, p.region, tt.bucket, tt.region)
		}
		var zero index.ID
		want := tt.chunk + "0000/" + strings.Repeat("0", 64) + ".cacnk"
		if got := s.address.url(p, s.address.key(zero), "").String(); got != want {
			t.Errorf("%s: got %s, want %s", tt.address, got, want)
		}
		if got, ok := s.address.chunkOf(s.address.key(zero)); !ok || got != zero {
			t.Errorf("%s: key %s is no chunk's", tt.address, s.address.key(zero))
		}
	}
}

func TestAddressRefused(t *testing.T) {
	for address, want := range map[string]string{
		"s3+ftp://h/chunks":                                "unknown kind",
		"s3+https:///chunks":                               "no host",
		"s3+https://h":                                     "no bucket",
		"s3+https://h/":                                    "no bucket",
		"s3+https://h/_":                                   "no bucket's name",
		"s3+https://h/chunks/../x":                         "not clean",
		"s3+https://h/chunks/a//b":                         "not clean",
		"s3+https://h/chunks/a%0ab":                        "cannot be read",
		"s3+https://h/chunks#x":                            "behind the path",
		"s3+https://hidden:hidden@h/chunks":                "do not belong",
		"s3+https://h/hidden@chunks":                       "do not belong",
		"s3+https://h/chunks?secret=hidden":                "unknown option",
		"s3+https://h/chunks?style=hidden":                 "unknown style",
		"s3+https://h/chunks?region=hid/den":               "no region",
		"s3+https://h/%zz?hidden":                          "no address",
		"s3+http://127.0.0.1:9000/chunks?style=virtual":    "IP address",
		"s3+https://chunks.s3.eu-west-1.amazonaws.com/pre": "s3+https://s3.eu-west-1.amazonaws.com/chunks/…",
	} {
		_, err := New(address, Options{Sources: env{}.sources()})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hid") || strings.ContainsAny(err.Error(), "\n\r") {
			t.Errorf("%s: got %v, want one line with %q and nothing hidden", address, err, want)
		}
	}
}

func TestChunkOf(t *testing.T) {
	a := &address{prefix: "p/"}
	name := strings.Repeat("ab", 32)
	for key, want := range map[string]bool{
		"p/abab/" + name + ".cacnk":                  true,
		"p/abab/" + name:                             false,
		"p/abac/" + name + ".cacnk":                  false,
		"abab/" + name + ".cacnk":                    false,
		"p/q/abab/" + name + ".cacnk":                false,
		"p/abab/" + strings.ToUpper(name) + ".cacnk": false,
		"p/": false, "p/a": false, "": false,
	} {
		if _, got := a.chunkOf(key); got != want {
			t.Errorf("%q: got %v, want %v", key, got, want)
		}
	}
}
