package boot

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// FuzzConfig reads the configuration of any boot image: what is accepted has
// this version and a digest that is fit for the name of a directory.
func FuzzConfig(f *testing.F) {
	digest := "sha256:" + strings.Repeat("0f", 32)
	full, err := json.Marshal(bootimage.Config{
		Version: bootimage.Version, Profile: "v1", IndexDigest: digest, Stores: []string{"registry://h/r", "/srv"},
		HostKeys: []string{"h ssh-ed25519 AAAA"}, XattrClasses: []string{"user"}, Marked: []string{"/var"},
		Source: bootimage.Source{Cmd: []string{"/bin/sh"}, Layers: []bootimage.Layer{{DiffID: digest, Size: -1}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	for _, s := range []string{``, `null`, `{"version":1}`, `{"version":2}`, `{"version":1,"indexDigest":"sha256:../../x"}`, `{"version":1e99}`, `[`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseConfig(b)
		if err != nil {
			if c != nil || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000+len(b) {
				t.Errorf("got %v, %v", c, err)
			}
			return
		}
		digits, _ := strings.CutPrefix(c.IndexDigest, "sha256:")
		if c.Version != bootimage.Version || len(digits) != 64 || strings.Trim(strings.ToLower(digits), "0123456789abcdef") != "" {
			t.Errorf("accepted version %d, %q", c.Version, c.IndexDigest)
		}
	})
}

// FuzzDockerConfig asks a mounted configuration of Docker's for the login at a
// registry: it gives that of this registry or none, and no error repeats it.
func FuzzDockerConfig(f *testing.F) {
	for _, s := range []string{
		`{"auths":{"h:5000":{"auth":"am9lOnMzY3JldA=="}}}`,
		`{"auths":{"https://h:5000/v2/":{"username":"joe","password":"s3cret"}},"credsStore":"pass"}`,
		`{"auths":{"h:5000":{"identitytoken":"t","registrytoken":"r"}}}`,
		`{"auths":{"other":{"auth":"am9lOnMzY3JldA=="}}}`,
		`{"auths":{"h:5000":{"auth":"no base64"}}}`, `{"auths":[]}`, `{"auths":null}`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseDockerAuths(b)
		if err != nil {
			return
		}
		a, ok := c.find("h:5000")
		if !ok {
			return
		}
		if !slices.ContainsFunc([]string{"h:5000", "https://h:5000", "https://h:5000/v2/"}, func(key string) bool { _, there := c.Auths[key]; return there }) {
			t.Error("a login of another registry")
		}
		if got, err := authn.Authorization(t.Context(), a); err == nil && got == nil {
			t.Error("neither a login nor an error")
		}
	})
}

// FuzzMounts sorts any mount table: what is boot's own is not brought into the
// root, and flags are only those that protect.
func FuzzMounts(f *testing.F) {
	f.Add(`21 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=/l
22 21 0:21 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
23 22 0:21 /bus /proc/bus ro,relatime - proc proc rw
24 22 0:22 / /proc/acpi ro,relatime shared:7 master:3 - tmpfs tmpfs ro
25 21 8:1 /var/lib/docker/volumes/v/_data /data\040x rw - ext4 /dev/sda1 rw
26 21 8:1 /c /.bootfs/rootfs.castr rw - ext4 /dev/sda1 rw
27 21 0:30 / /run/secrets/bootfs rw - tmpfs tmpfs rw
`)
	f.Add("1 1 0:1 / / rw - x y z\n")
	f.Add("1 1 0:1 / /\\134\\0 rw - x y z\n")
	f.Add("1 1 0:1 / /")
	f.Fuzz(func(t *testing.T, table string) {
		all, err := mountinfo.GetMountsFromReader(strings.NewReader(table), nil)
		if err != nil {
			return
		}
		e, err := sortMounts(all)
		if err != nil {
			return
		}
		if len(e.points)+len(e.own) > len(all) {
			t.Errorf("%d mounts of %d", len(e.points)+len(e.own), len(all))
		}
		for _, p := range e.points {
			if ownMount(p) {
				t.Errorf("%q goes into the root", p)
			}
		}
		const known = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
		for _, m := range e.masks {
			if !strings.HasPrefix(m.Path, "/proc/") || m.Flags&^known != 0 {
				t.Errorf("got the mask %s", fmt.Sprint(m))
			}
		}
	})
}
