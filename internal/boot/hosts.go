package boot

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/crypto/x509roots/fallback/bundle"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/hosts"
)

// openHosts returns what the user mounted at bootimage.CertsDir, which is held
// by descriptor, and set in the environment.
func openHosts(s *settings) (*hosts.Hosts, error) {
	o := hosts.Options{
		Mirrors:  s.mirrors,
		Insecure: s.insecure,
		Roots:    sync.OnceValue(embeddedRoots),
		Advice: func(host string) string {
			return fmt.Sprintf("mount the certificate of its authority: -v CA.crt:%s/%s/ca.crt", bootimage.CertsDir, hosts.DirName(host))
		},
	}
	dir, err := holdDir(bootimage.CertsDir)
	switch {
	case err == nil:
		o.Dirs = []hosts.Dir{{Name: bootimage.CertsDir, FS: dir, Common: true}}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return hosts.New(o)
}

// heldDir is a directory with what is mounted in it, all held by descriptor:
// when boot reads it, the mounts have no path any more.
type heldDir []heldMount // the inner ones behind those around them

type heldMount struct {
	at   string   // path in the directory, "." for itself
	dir  *os.Root // nil for a file
	file *os.File
}

func holdDir(name string) (heldDir, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	held := heldDir{{at: ".", dir: root}}
	inner, err := mountinfo.GetMounts(mountinfo.PrefixFilter(name))
	if err != nil {
		return nil, err
	}
	for _, m := range inner {
		at, ok := strings.CutPrefix(m.Mountpoint, name+"/")
		if !ok {
			continue
		}
		mount := heldMount{at: at}
		info, err := os.Stat(m.Mountpoint)
		switch {
		case err != nil:
		case info.IsDir():
			mount.dir, err = os.OpenRoot(m.Mountpoint)
		case info.Mode().IsRegular():
			mount.file, err = os.Open(m.Mountpoint)
		default:
			continue
		}
		if err != nil {
			return nil, err
		}
		held = append(held, mount)
	}
	return held, nil
}

// Open implements fs.FS.
func (d heldDir) Open(name string) (fs.File, error) {
	for _, m := range slices.Backward(d) {
		below, ok := strings.CutPrefix(name, m.at+"/")
		switch {
		case m.at == ".":
			return m.dir.FS().Open(name)
		case name == m.at && m.file != nil:
			return &heldFile{io.NewSectionReader(m.file, 0, math.MaxInt64), m.file}, nil
		case name == m.at:
			return m.dir.FS().Open(".")
		case ok && m.dir != nil:
			return m.dir.FS().Open(below)
		}
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

// heldFile reads a file that stays open.
type heldFile struct {
	*io.SectionReader
	file *os.File
}

func (f *heldFile) Stat() (fs.FileInfo, error) { return f.file.Stat() }
func (f *heldFile) Close() error               { return nil }

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
