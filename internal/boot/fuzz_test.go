package boot

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

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

// FuzzStatus reads any answer about a container's status: for people it becomes
// lines that a terminal takes for text, one for each thing, whatever they say.
func FuzzStatus(f *testing.F) {
	began := time.Date(2024, 2, 3, 4, 5, 6, 7, time.UTC)
	full, err := json.Marshal(&status{
		Version: statusVersion, State: stateRunning, Mode: "fuse", Why: "asked for", Doing: "fetching", UptimeSeconds: 1.5, Started: began,
		Image: imageStatus{Root: "sha256:" + strings.Repeat("0f", 32), Source: "h/r:t", Chunks: 7, Bytes: 1 << 30},
		Local: &localStatus{Chunks: 3, Bytes: 1 << 20, RegistryNeeded: true, Counted: began},
		Cache: cacheStatus{Kind: "shared", LimitBytes: 1 << 30},
		Stores: []storeStatus{
			{Name: "registry://h/r", State: "troubled", LastError: "status 500: \x1b[2J\u009b\nno", LastErrorAt: &began},
			{Name: "/srv", State: "good"},
		},
		Slowest:  &slowStatus{Seconds: 2, Chunk: strings.Repeat("ab", 32), Store: "/srv", At: began},
		Prefetch: prefetchStatus{What: "all", State: "failed", Error: "no\r"},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	f.Add([]byte{wordReady})
	f.Add([]byte{wordWait, wordWait, wordReady})
	for _, s := range []string{
		``, `null`, `{}`, `{"version":0}`, `{"version":2,"state":"new"}`, `{"version":1,"stores":null}`, `{"version":1,"uptimeSeconds":1e308}`,
		`{"version":1,"uptimeSeconds":-1e308,"state":"filled","started":"0001-01-01T00:00:00Z"}`, `{"version":1,"local":{"bytes":-9223372036854775808}}`,
		`{"version":1,"image":{"bytes":-1},"local":{"bytes":9223372036854775807}}`, `{"version":1,"started":"9999-12-31T23:59:59Z","slowestFetch":{"seconds":1e308}}`,
		`{"version":1,"cache":{"kind":"\u001b]0;x\u0007","limitBytes":-1}}`, `{"version":1,"state":"a\nb","mode":"\u202e"}`, `{"version":1}{"version":1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		s, err := parseStatus(answer)
		if err != nil {
			if s != nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, %v", s, err)
			}
			return
		}
		var out strings.Builder
		s.print(&out)
		text, ended := strings.CutSuffix(out.String(), "\n")
		lines := strings.Split(text, "\n")
		if most := 11 + 2*len(s.Stores); !ended || len(lines) > most {
			t.Errorf("%d lines, want at most %d: %.1000q", len(lines), most, text)
		}
		for _, line := range lines {
			if i := strings.IndexFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
				t.Errorf("%q has %q", line, line[i:])
			}
		}
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseStatus(again); err != nil {
			t.Errorf("written again as %s: %v", again, err)
		}
	})
}

// FuzzSettings reads variables of any value: what is accepted is within its
// bounds, and what is not is named in one line.
func FuzzSettings(f *testing.F) {
	for _, s := range []string{
		"BOOTFS_CACHE_SIZE=20GiB", "BOOTFS_CACHE_SIZE=", "BOOTFS_CACHE_SIZE=-1", "BOOTFS_CACHE_RESERVE=5%", "BOOTFS_CACHE_RESERVE=100%", "BOOTFS_MODE=fuse",
		"BOOTFS_PREFETCH=all", "BOOTFS_OFFLINE=1", "BOOTFS_OFFLINE=yes", "BOOTFS_ON_FAILURE=hold", "BOOTFS_READ_TIMEOUT=60s", "BOOTFS_READ_TIMEOUT=1ns",
		"BOOTFS_READ_TIMEOUT=9999999h", "BOOTFS_METRICS=:9100", "BOOTFS_METRICS=unix:/run/m", "BOOTFS_METRICS=[::1]:99999", "BLOB_STORE= a  b\n", "BOOTFS_INSECURE=h:1 h",
		"BOOTFS_MIRRORS=h=https://m", "=", "BOOTFS_MODE", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, variable string) {
		s, err := readSettings([]string{variable})
		if err != nil {
			name, _, _ := strings.Cut(variable, "=")
			if s != nil || !strings.HasPrefix(err.Error(), name) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, %v", s, err)
			}
			return
		}
		if s.cacheSize != nil && *s.cacheSize < 0 || s.readTimeout != 0 && s.readTimeout < minReadTimeout || s.cacheReserve.Bytes < 0 || s.cacheReserve.Percent < 0 || s.cacheReserve.Percent >= 100 {
			t.Errorf("accepted %+v", s)
		}
		if slices.Contains(append(s.stores, s.insecure...), "") {
			t.Errorf("an empty word: %q, %q", s.stores, s.insecure)
		}
	})
}
