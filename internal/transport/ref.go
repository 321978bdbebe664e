package transport

import (
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// The transports, by the names that skopeo gives them.
const (
	Registry      = "docker"
	Daemon        = "docker-daemon"
	DockerArchive = "docker-archive"
	OCI           = "oci"
	OCIArchive    = "oci-archive"
)

// Forms lists how an image can be named, for help texts and errors.
const Forms = "NAME, docker://NAME, docker-daemon:NAME, docker-archive:FILE[:NAME], oci:DIR[:TAG] or oci-archive:FILE[:TAG]"

// Ref names an image and where it is.
type Ref struct {
	Transport string // one of the constants
	Path      string // file or directory of the transports that have one
	Name      string // image name, or tag in an OCI layout; "" where it may be left out
}

// Parse reads s as skopeo would. A name without a transport belongs to the
// transport bare ("" means Registry).
func Parse(s, bare string) (Ref, error) {
	if bare == "" {
		bare = Registry
	}
	r := Ref{Transport: bare, Name: s}
	scheme, rest, ok := strings.Cut(s, ":")
	switch scheme {
	case DockerArchive, OCI, OCIArchive:
	default:
		// Before an error repeats the password.
		if _, host, ok := cutLast(s, "@"); ok && strings.Contains(host, "/") && !strings.HasPrefix(host, "sha256:") {
			return Ref{}, fmt.Errorf("image …@%s: a name has no user and no password in it: use docker login", host)
		}
	}
	if ok {
		switch scheme {
		case Registry:
			after, ok := strings.CutPrefix(rest, "//")
			if !ok {
				return Ref{}, fmt.Errorf("image %q: docker: is followed by two slashes; did you mean docker://%s or docker-daemon:%s?", s, rest, rest)
			}
			r = Ref{Transport: scheme, Name: after}
		case Daemon:
			r = Ref{Transport: scheme, Name: rest}
		case DockerArchive, OCI, OCIArchive:
			path, name, _ := strings.Cut(rest, ":")
			if path == "" {
				return Ref{}, fmt.Errorf("image %q: the path after %s: is missing", s, scheme)
			}
			r = Ref{Transport: scheme, Path: path, Name: name}
		case "dir", "containers-storage", "docker-tarfile", "ostree", "sif", "tarball":
			return Ref{}, fmt.Errorf("image %q: transport %s: is not supported; an image is %s", s, scheme, Forms)
		default:
			if strings.HasPrefix(rest, "//") {
				return Ref{}, fmt.Errorf("image %q: there is no transport %s://; an image is %s", s, scheme, Forms)
			}
		}
	}
	if r.Transport == OCI || r.Transport == OCIArchive {
		if r.Path == "" {
			return Ref{}, fmt.Errorf("image %q: the path of an OCI layout is missing", s)
		}
		return r, nil
	}
	if r.Name == "" && r.Transport == DockerArchive {
		return r, nil
	}
	if r.Name == "" {
		return Ref{}, fmt.Errorf("image %q: the name is missing; an image is %s", s, Forms)
	}
	if r.Transport == Daemon && isImageID(r.Name) {
		return r, nil
	}
	if _, err := name.ParseReference(r.Name); err != nil {
		return Ref{}, fmt.Errorf("image %q: %w; an image is %s", s, err, Forms)
	}
	return r, nil
}

// cutLast is strings.Cut at the last sep.
func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// isImageID reports whether s names an image of a daemon by its ID.
func isImageID(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && len(hex) == 64 && strings.Trim(hex, "0123456789abcdef") == ""
}

// String returns the form that Parse reads, with the transport.
func (r Ref) String() string {
	switch {
	case r.Transport == Registry:
		return "docker://" + r.Name
	case r.Path == "":
		return r.Transport + ":" + r.Name
	case r.Name == "":
		return r.Transport + ":" + r.Path
	}
	return r.Transport + ":" + r.Path + ":" + r.Name
}

// WithTagSuffix names the tag beside r's that has suffix behind it: an image
// name without a transport.
func (r Ref) WithTagSuffix(suffix string) (string, error) {
	if r.Transport != Registry {
		return "", fmt.Errorf("%s is not in a registry", r)
	}
	ref, err := name.ParseReference(r.Name)
	if err != nil {
		return "", err
	}
	tag, ok := ref.(name.Tag)
	if !ok {
		return "", fmt.Errorf("%s has no tag", r)
	}
	beside := ref.Context().Tag(tag.TagStr() + suffix)
	if _, err := name.NewTag(beside.Name()); err != nil {
		return "", err
	}
	return beside.Name(), nil
}

// HoldsPacks reports whether the place that r names can hold packs and several
// platforms beside one another: a registry and OCI layouts can, what Docker
// loads cannot.
func (r Ref) HoldsPacks() bool {
	return r.Transport == Registry || r.Transport == OCI || r.Transport == OCIArchive
}
