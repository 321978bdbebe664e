package stores

import (
	"bytes"
	"strings"
	"testing"
	"unicode"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
	"github.com/container-bootfs/bootfs/index"
)

// FuzzOpen opens the store at any address, with any host key beside it, as a
// boot image may name them. Nothing is connected to; what is refused is refused
// in one line.
func FuzzOpen(f *testing.F) {
	for _, s := range []string{
		"registry://h/r", "registry+http://h:5000/a/b", "https://h/p", "http://u:p@h/p?q", "ssh://u@h:2222/~/s", "sftp://u@[::1]/p",
		"s3+https://h/bucket/p?region=r&style=path", "s3+http://s3.eu-west-1.amazonaws.com/b", "s3://b/p", "ftp://h", "ssh://-oProxyCommand=x/p", "https://h/%", "",
		"registry+http://\x1b[31m/a", "registry://h/\x00", "https://h/\u0085", "ssh://u@h\u009b/p", "/\r://",
	} {
		f.Add(s, "")
	}
	f.Add("ssh://u@h/p", "h ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPKSUTyz1HwHReFVvD5obVsALAgJRNarH4TRpNePnAS")
	f.Add("ssh://u@h/p", "@cert-authority * ssh-ed25519 AAAA")
	var empty bytes.Buffer
	if err := index.NewWriter(&empty, chunker.V1, index.SHA256).Close(); err != nil {
		f.Fatal(err)
	}
	x, err := index.Open(empty.Bytes())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, address, hostKey string) {
		if k, ok := kindOf(address); ok && (k.schemes == nil || k.form == "oci:DIR") && Check(address) == nil {
			return // a path of this machine
		}
		o := sshstore.Options{User: "u"}
		if hostKey != "" {
			o.HostKeys = []string{hostKey}
		}
		list, err := OpenAll(address, Source{Index: x, Access: Access{SSH: o}})
		switch {
		case err == nil && len(list) == 0:
			t.Errorf("%q: neither a store nor an error", address)
		case err != nil && strings.ContainsFunc(err.Error(), unicode.IsControl):
			t.Errorf("%q: got %q", address, err)
		}
		for _, s := range list {
			if strings.ContainsFunc(s.String(), unicode.IsControl) {
				t.Errorf("%q is called %q", address, s)
			}
		}
	})
}
