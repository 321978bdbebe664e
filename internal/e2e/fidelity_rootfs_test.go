package e2e

import (
	"strings"
	"sync"
	"testing"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// rootfsRows are what programs do with the root filesystem, and what they are
// kept from.
var rootfsRows = []row{
	{what: "files of the image are changed in every way (copy-up), one of 100 MiB among them", do: probe("copyup")},
	{what: "two processes append to one file of the image", do: probe("writers")},
	{what: "`rename(2)` and `renameat2(2)` with each flag; files replaced as dpkg does", do: probe("rename")},
	{what: "`rename(2)` of a directory of the image", do: probe("renamedir"), differs: map[string]string{
		"fuse": "works; in the source it fails with `EXDEV`, which `mv` and others answer by copying",
	}},
	{what: "files, trees and 5,000 entries of the image removed and made again", do: probe("whiteouts"), differs: map[string]string{
		"fill": "an open file that was removed has 0 links, where overlayfs says 1 of a file of the image",
	}},
	{what: "hard links, `O_TMPFILE`, `linkat(2)` of descriptors", do: probe("links"), differs: map[string]string{
		"fill": "a file of the image keeps its other names when it is linked or written to: it lies in the container's own layer, where overlayfs would part them",
	}},
	{what: "sparse files of 1 TiB, `SEEK_HOLE`, `fallocate(2)` with each flag", do: probe("sparse")},
	{what: "`copy_file_range` and `FICLONE` of a file of the image", do: probe("range"), differs: map[string]string{
		"fuse": "fails with `EXDEV`, as between two file systems; programs then read and write, as `cp` does",
	}},
	{what: "`sendfile`, `splice`, `fsync`, reads at the end", do: probe("copying")},
	{what: "`O_DIRECT`, of the image and beside it", do: probe("direct")},
	{what: "`mmap`: shared, private, executable, after a copy-up", do: probe("mmap"), differs: map[string]string{
		"fill": "who has mapped a file of the image sees what is written to it later, as between any two processes; overlayfs leaves him the old file",
	}},
	{what: "`flock`, POSIX and OFD locks between processes, leases", do: probe("locks")},
	{what: "inotify, fanotify", do: probe("watches")},
	{what: "a directory of 20,000 entries: seeking, removal while they are read, types", do: probe("dirs")},
	{what: "times: nanoseconds, before 1970, kept by a copy-up, relatime", do: probe("times")},
	{what: "a file that the image dates before 1970", do: probe("ancient"), differs: map[string]string{
		"fuse": "is of that date; Docker makes it 1970",
		"fill": "is of that date; Docker makes it 1970",
	}},
	{what: "a file of the image whose mode or owner was changed is opened for writing and not written", do: probe("metadata"), differs: map[string]string{
		"fuse": "its mtime is then the present: a changed mode copies no contents, the first opening for writing does; `touch -d` sets it again",
	}},
	{what: "`user.*`, `security.*` and `trusted.*` attributes", do: probe("xattrs")},
	{what: "POSIX ACLs: honoured, set, inherited", do: probe("acls")},
	{what: "other users: modes, setuid, setgid and sticky directories, groups", do: probe("users")},
	{what: "devices, FIFOs, sockets, descriptors sent, `chroot`", do: probe("special")},
	{what: "names: long, not UTF-8, deep, loops of links", do: probe("names")},
	{what: "running programs: scripts, memfd, 32 bit, text file busy", do: probe("exec")},
	{what: "10,000 files made and removed", do: probe("many")},
	{what: "which file is which: device and inode number", do: probe("identity")},
	{what: "device and inode number of a file of the image when it is first written to", do: probe("replaced"), differs: map[string]string{
		"fuse": "a file is on another device than its directory, and on a third one once it was written to; two names of one file still agree",
	}},
	{what: "`statfs`, `df`", do: probe("statfs")},
	{what: "`tar` of the whole root, with owners, times, ACLs and attributes", do: ranOf(python, "--user", "root", "IMAGE", "sh", "-c", tarOfRoot)},
	{what: "`apt-get install`, an upgrade, `dpkg --verify`, diversions, removal of a package of the image", do: ranOf("tools", "--user", "root", "IMAGE", "sh", "-c", packages)},
	{what: "`su`, `sudo`, `ping` as another user than root", do: ranOf("tools", "IMAGE", "sh", "-c", otherUsers)},
	{what: "mounts, swap, handles, `io_uring`: refused", do: probe("refused")},
	{what: "each file of `/proc`, `/dev` and `/sys` opened for reading and for writing: the engine's masks", do: probe("kernel")},
	{what: "an app as root tries other processes, namespaces, the kernel, capabilities of planted programs",
		do: ranOf(python, "--user", "root", "--env", "BOOTFS_PREFETCH=none", "IMAGE", "python3", "-c", attempts)},
	{what: "an app as root looks for `/.bootfs`", do: ranOf(python, "--user", "root", "IMAGE", "python3", "-c", corner),
		differs: map[string]string{"fill": "is there, with what the boot image has"}},
}

// tarOfRoot prints the SHA-256 of a tar of each directory of the root, without
// what engines make: mount points, names and times of what they lie in. Docker
// loses the date of app/data/old, as another row has it.
const tarOfRoot = `
cd /
for d in $(ls -A | grep -vxE 'proc|sys|dev|etc|\.dockerenv|\.bootfs') $(ls -Ad etc/* | grep -vxE 'etc/(hosts|hostname|resolv\.conf|mtab)'); do
	echo "$d $(tar -c --format=posix --pax-option=delete=atime,delete=ctime --sort=name --numeric-owner --xattrs --xattrs-include='user.*' --xattrs-include='security.*' --acls \
		--one-file-system --exclude app/data/old "$d" | sha256sum)"
done`

// packages installs a package from a repository of its own, and so on. What
// apt says of it is not compared, but what it does.
const packages = `
set -e
mkdir -p /repo && cd /repo
for v in 1 2; do
	mkdir -p p/DEBIAN p/usr/bin p/etc/probe p/usr/share/probe
	printf 'Package: probe\nVersion: %s\nArchitecture: all\nMaintainer: nobody <nobody@example.com>\nDescription: a package\n' $v > p/DEBIAN/control
	echo /etc/probe/conf > p/DEBIAN/conffiles
	printf '#!/bin/sh\necho "postinst $1 $2" >> /probe.log\n' > p/DEBIAN/postinst
	chmod 755 p/DEBIAN/postinst
	printf '#!/bin/sh\necho version %s\n' $v > p/usr/bin/probe
	chmod 4755 p/usr/bin/probe
	echo "setting $v" > p/etc/probe/conf
	echo $v > p/usr/share/probe/file$v
	ln -f p/usr/bin/probe p/usr/bin/probe-again
	[ $v = 1 ] || { rm -r p/usr/share/probe; ln -s ../lib p/usr/share/probe-link; }
	dpkg-deb --root-owner-group --build p probe_$v.deb > /dev/null
done
index() {
	dpkg-deb -f $1; printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' $1 $(stat -c %s $1) $(sha256sum $1 | cut -d' ' -f1)
}
echo 'deb [trusted=yes] file:/repo ./' > /etc/apt/sources.list
index probe_1.deb > Packages
apt-get -qq update
apt-get -qq -y install probe > /dev/null 2>&1
probe; stat -c '%n %a %h' /usr/bin/probe; cat /probe.log /usr/share/probe/file1
echo changed > /etc/probe/conf
index probe_2.deb > Packages
apt-get -qq update
apt-get -qq -y -o Dpkg::Options::=--force-confold upgrade > /dev/null 2>&1
probe; probe-again; cat /probe.log /etc/probe/conf; readlink /usr/share/probe-link; ls /usr/share/probe 2>&1 || true
dpkg -l probe | tail -n 1 | tr -s ' '
dpkg --verify && echo verified
dpkg-divert --quiet --local --rename --divert /usr/bin/env.real --add /usr/bin/env
ls /usr/bin/env* ; dpkg-divert --quiet --local --rename --remove /usr/bin/env; ls /usr/bin/env*
update-alternatives --quiet --install /usr/bin/chosen chosen /usr/bin/env 10; readlink -f /usr/bin/chosen
apt-get -qq -y purge probe > /dev/null 2>&1; ls -d /usr/bin/probe /etc/probe 2>&1 || true
dpkg --purge sudo > /dev/null 2>&1; ls /usr/bin/sudo /etc/sudoers 2>&1 || true
useradd -m later; stat -c '%U %a' /home/later; ldconfig && echo linked
dpkg --audit && echo consistent`

const otherUsers = `
id -un
echo secret | su -c 'id -u; id -g; cat /etc/shadow | wc -l' 2>/dev/null
echo wrong | su -c 'id -u' 2>/dev/null || echo refused
sudo -n id -u; sudo -n -u nobody id -un; sudo -n sh -c 'echo new > /etc/new; stat -c %U /etc/new'
sudo -n su app -c 'id -un'
ping -c 1 -W 5 127.0.0.1 | grep -o '1 received'
getcap /bin/ping 2>/dev/null; grep -E '^Cap(Eff|Bnd)' /proc/self/status; sudo -n grep -E '^Cap(Eff|Bnd)' /proc/self/status`

// probed is what fsprobe said for a subject, by group.
type probed struct {
	once   sync.Once
	result result
	said   map[string]string
}

// probes are what fsprobe said, by subject. All groups run in one container:
// filling a root takes its time.
var probes struct {
	sync.Mutex
	of map[string]*probed
}

// probe is a row's do that returns what a group of fsprobe said as root.
func probe(group string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		s = s.of(t, "files")
		probes.Lock()
		if probes.of == nil {
			probes.of = map[string]*probed{}
		}
		p := probes.of[s.name]
		if p == nil {
			p = &probed{said: map[string]string{}}
			probes.of[s.name] = p
		}
		probes.Unlock()
		p.once.Do(func() {
			p.result = s.run(t, append([]string{"--user", "root", s.image, "fsprobe"}, testenv.ProbeGroups...)...)
			for part := range strings.SplitSeq("\n"+p.result.stdout, "\n== ") {
				name, lines, _ := strings.Cut(part, "\n")
				p.said[name] = lines
			}
		})
		if p.result.code != 0 || p.result.stderr != "" || p.said[group] == "" {
			t.Fatalf("exit %d, stderr %q; of %s: %q", p.result.code, p.result.stderr, group, p.said[group])
		}
		return p.said[group]
	}
}
