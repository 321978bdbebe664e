package boot

import (
	"crypto/x509"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/crypto/x509roots/fallback/bundle"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/hosts"
)

// newHosts returns what the user mounted at bootimage.CertsDir and set in the
// environment.
func newHosts(s *settings, mounted held) (*hosts.Hosts, error) {
	o := hosts.Options{
		Mirrors:  s.mirrors,
		Insecure: s.insecure,
		Roots:    sync.OnceValue(embeddedRoots),
		Advice: func(host string) string {
			return fmt.Sprintf("mount the certificate of its authority: -v CA.crt:%s/%s/ca.crt", bootimage.CertsDir, hosts.DirName(host))
		},
	}
	if _, ok := mounted.way(bootimage.CertsDir); ok {
		o.Dirs = []hosts.Dir{{Name: bootimage.CertsDir, FS: heldDir{mounted, bootimage.CertsDir}, Common: true}}
	}
	return hosts.New(o)
}

// embeddedRoots are the certificate authorities that boot brings along: a boot
// image has none of its own. Those of the root image must not be used: reading
// them would wait for the connection that they are to verify.
func embeddedRoots() *x509.CertPool {
	pool := x509.NewCertPool()
	for root := range bundle.Roots() {
		cert, err := x509.ParseCertificate(root.Certificate)
		if err != nil {
			continue
		}
		if root.Constraint == nil {
			pool.AddCert(cert)
		} else {
			pool.AddCertWithConstraint(cert, root.Constraint)
		}
	}
	return pool
}

// words splits a list in a variable, at blanks or commas.
func words(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' })
}
