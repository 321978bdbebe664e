package boot

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
)

func TestRequested(t *testing.T) {
	for _, c := range []struct {
		name, exec, cwd string
		args            []string
		program         string
		argv            []string
		fails           bool
	}{
		{name: "the image's entrypoint", exec: "/.bootfs/boot", cwd: "/", args: []string{"/.bootfs/boot", "python3", "-V"}, program: "python3", argv: []string{"python3", "-V"}},
		{name: "a link", exec: "/usr/bin/python3", cwd: "/", args: []string{"python3", "-V"}, program: "/usr/bin/python3", argv: []string{"python3", "-V"}},
		{name: "a relative link", exec: "bin/app", cwd: "/opt", args: []string{"bin/app"}, program: "bin/app", argv: []string{"bin/app"}},
		{name: "a link in the working directory", exec: "app", cwd: "/opt/bin", args: []string{"app"}, program: "./app", argv: []string{"app"}},
		{name: "boot by another spelling", exec: "/.bootfs/../.bootfs/boot", cwd: "/", args: []string{"x", "true"}, program: "true", argv: []string{"true"}},
		{name: "nothing to run", exec: "/.bootfs/boot", cwd: "/", args: []string{"/.bootfs/boot"}, fails: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			program, argv, err := requested(c.exec, c.cwd, c.args)
			if (err != nil) != c.fails {
				t.Fatalf("error %v, want one: %v", err, c.fails)
			}
			if program != c.program || !reflect.DeepEqual(argv, c.argv) {
				t.Errorf("got %q %q, want %q %q", program, argv, c.program, c.argv)
			}
		})
	}
}

func TestWithInit(t *testing.T) {
	own := []string{"/.bootfs/boot", "sleep", "9"}
	for _, c := range []struct {
		name, program string
		first, argv   []string
	}{
		{"docker's init", "/sbin/docker-init", append([]string{"/sbin/docker-init", "--"}, own...), []string{"/sbin/docker-init", "--", "sleep", "9"}},
		{"another parent", "sleep", []string{"/pause"}, []string{"sleep", "9"}},
		{"one with other arguments", "sleep", []string{"/sbin/init", "--", "/.bootfs/boot", "sleep", "8"}, []string{"sleep", "9"}},
		{"boot's own line", "sleep", own, []string{"sleep", "9"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := &caller{program: "sleep", argv: []string{"sleep", "9"}}
			got.withInit(c.first, own)
			if got.program != c.program || !reflect.DeepEqual(got.argv, c.argv) {
				t.Errorf("got %q %q, want %q %q", got.program, got.argv, c.program, c.argv)
			}
		})
	}
}

func TestWithoutOwnEnv(t *testing.T) {
	c := &caller{env: []string{"PATH=/bin", "BLOB_STORE=registry://u:p@h/r", "BOOTFS_LOG=debug", "DROPBEAR_PASSWORD=x", "EMPTY="}}
	if got, want := c.withoutOwnEnv(false).env, []string{"PATH=/bin", "EMPTY="}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	c.env = []string{"AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY=b", "AWS_SESSION_TOKEN=c", "AWS_REGION=r", "S3_ACCESS_KEY=a", "S3_SECRET_KEY=b", "S3_SESSION_TOKEN=c"}
	if got := c.withoutOwnEnv(false).env; !reflect.DeepEqual(got, c.env) {
		t.Errorf("without a store in S3: got %q, want %q", got, c.env)
	}
	if got, want := c.withoutOwnEnv(true).env, []string{"AWS_REGION=r"}; !reflect.DeepEqual(got, want) {
		t.Errorf("with credentials for S3: got %q, want %q", got, want)
	}
}

// dockerMounts is the mount table of a container as Docker 28 sets it up, with
// a node cache, a secret and a volume.
const dockerMounts = `
500 400 0:60 / / rw,relatime - overlay overlay rw
501 500 0:61 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
502 500 0:62 / /dev rw,nosuid - tmpfs tmpfs rw
503 502 0:63 / /dev/pts rw,nosuid,noexec,relatime - devpts devpts rw
504 500 0:64 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs ro
505 504 0:65 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw
506 500 254:1 /v/rw /.bootfs/rw rw,relatime - ext4 /dev/vda rw
507 500 254:1 /v/cache /.bootfs/rootfs.castr rw,relatime - ext4 /dev/vda rw
508 500 254:1 /c/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/vda rw
509 500 254:1 /secret /run/secrets/bootfs-auth ro,relatime - ext4 /dev/vda rw
510 500 254:1 /v/data /data\040dir rw,relatime - ext4 /dev/vda rw
511 510 0:66 / /data\040dir/tmp rw - tmpfs tmpfs rw
512 501 0:61 /sys /proc/sys ro,nosuid,nodev,noexec,relatime - proc proc rw
513 501 0:62 /null /proc/kcore rw,nosuid - tmpfs tmpfs rw
`

func TestSortMounts(t *testing.T) {
	all, err := mountinfo.GetMountsFromReader(strings.NewReader(strings.TrimPrefix(dockerMounts, "\n")), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := sortMounts(all)
	if err != nil {
		t.Fatal(err)
	}
	want := &engineMounts{
		points: []string{"/proc", "/dev", "/sys", "/etc/resolv.conf", "/data dir"},
		own:    []string{"/run/secrets/bootfs-auth", "/.bootfs/rootfs.castr", "/.bootfs/rw"},
		masks: []mask{
			{Path: "/proc/sys", Bind: true, Flags: unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
			{Path: "/proc/kcore", Flags: unix.MS_NOSUID},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestSortMountsNeedsRoot(t *testing.T) {
	if _, err := sortMounts(nil); err == nil {
		t.Error("a table without / was accepted")
	}
}

func TestPlace(t *testing.T) {
	const dir, file = unix.S_IFDIR | 0o755, unix.S_IFREG | 0o644
	for _, c := range []struct {
		name   string
		links  map[string]string
		path   string
		mode   uint32
		really string // where it stands below the root
		fails  error
	}{
		{name: "the root itself", path: "/", mode: dir, really: "."},
		{name: "missing parents", path: "/a/b/c", mode: dir, really: "a/b/c"},
		{name: "a file", path: "/etc/hosts", mode: file, really: "etc/hosts"},
		{name: "a linked directory", links: map[string]string{"run": "var/run"}, path: "/run/x", mode: dir, really: "var/run/x"},
		{name: "an absolute link stays inside", links: map[string]string{"out": "/tmp/place"}, path: "/out/x", mode: file, really: "tmp/place/x"},
		{name: "a link that climbs stays inside", links: map[string]string{"out": "../../../etc"}, path: "/out/x", mode: file, really: "etc/x"},
		{name: "a dangling file link", links: map[string]string{"resolv.conf": "run/stub/resolv.conf"}, path: "/resolv.conf", mode: file, really: "run/stub/resolv.conf"},
		{name: "a loop", links: map[string]string{"a": "b", "b": "a"}, path: "/a/x", mode: dir, fails: unix.ELOOP},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for name, target := range c.links {
				if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
					t.Fatal(err)
				}
			}
			top, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(top)
			fd, err := place(top, c.path, c.mode)
			if c.fails != nil {
				if !errors.Is(err, c.fails) {
					t.Fatalf("got %v, want %v", err, c.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			var got, want unix.Stat_t
			if err := unix.Fstat(fd, &got); err != nil {
				t.Fatal(err)
			}
			if err := unix.Lstat(filepath.Join(root, c.really), &want); err != nil {
				t.Fatal(err)
			}
			if got.Ino != want.Ino || got.Mode&unix.S_IFMT != c.mode&unix.S_IFMT {
				t.Errorf("got inode %d of mode %o, want inode %d at %s", got.Ino, got.Mode, want.Ino, c.really)
			}
		})
	}
}

// TestStatusOfAServersWords: a terminal that is shown the JSON obeys nothing of what
// a server has said.
func TestStatusOfAServersWords(t *testing.T) {
	hostile := errors.New("status 500: \u009b2J\x1b[2J\nno")
	p := &prefetching{}
	p.ended(hostile)
	for _, got := range []string{storeStatusOf(chunkstore.StoreStats{LastError: hostile}).LastError, p.status().Error} {
		if want := "status 500: 2J [2J no"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestCutOff(t *testing.T) {
	failing := chunkstore.StoreStats{Name: "registry://r/a", LastError: fmt.Errorf("registry://r/a: %w", &net.OpError{Op: "dial", Err: unix.ECONNREFUSED})}
	unknown := chunkstore.StoreStats{Name: "ssh://r/a", LastError: errors.New("ssh://r/a: r does not let root in")}
	numbered := chunkstore.StoreStats{Name: "registry+http://[2001:db8::1]:5000/a", LastError: failing.LastError}
	answering := chunkstore.StoreStats{Name: "/store", Count: chunkstore.Count{Chunks: 1}}
	for _, c := range []struct {
		name   string
		stores []chunkstore.StoreStats
		says   []string
		not    string
	}{
		{"nothing was asked for", []chunkstore.StoreStats{{Name: "registry://r/a"}}, nil, ""},
		{"one of two answers", []chunkstore.StoreStats{failing, answering}, nil, ""},
		{"none answers", []chunkstore.StoreStats{failing, {Name: "unasked"}}, []string{"in 5s: registry://r/a: dial", "resolver 192.0.2.1, 192.0.2.2", "--network", "BLOB_STORE"}, "unasked"},
		{"an address needs no resolver", []chunkstore.StoreStats{numbered}, []string{"refused: give", "--network"}, "resolver"},
		{"one of two has a name", []chunkstore.StoreStats{numbered, failing}, []string{"resolver 192.0.2.1, 192.0.2.2"}, ""},
		{"who asks is unknown", []chunkstore.StoreStats{unknown}, []string{"in 5s: ssh://r/a: r does not let root in"}, "--network"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := cutOff(chunkstore.Stats{Stores: c.stores}, []string{"192.0.2.1", "192.0.2.2"})
			if (got == "") != (c.says == nil) {
				t.Fatalf("got %q", got)
			}
			if c.not != "" && strings.Contains(got, c.not) {
				t.Errorf("got %q, want nothing of %q", got, c.not)
			}
			for _, part := range c.says {
				if !strings.Contains(got, part) {
					t.Errorf("got %q, want it to say %q", got, part)
				}
			}
		})
	}
}

func TestResolvers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("# nameserver 1\nsearch x\nnameserver 192.0.2.1\nnameserver\n nameserver ::1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, want := resolvers(path), []string{"192.0.2.1", "::1"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := resolvers(path + ".absent"); got != nil {
		t.Errorf("got %q of an absent file", got)
	}
}
