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
	{what: "files of the image are changed in every way (copy-up), one of 200 MiB among them", do: probe("copyup")},
	{what: "two processes append to one file of the image", do: probe("writers")},
	{what: "`rename(2)` and `renameat2(2)` with each flag; files replaced as dpkg does", do: probe("rename")},
	{what: "`rename(2)` of a directory of the image", do: probe("renamedir"), differs: map[string]string{
		"fuse": "works; in the source it fails with `EXDEV`, which `mv` and others answer by copying",
	}},
	{what: "files, trees and 5,000 entries of the image removed and made again", do: probe("whiteouts")},
	{what: "hard links, `O_TMPFILE`, `linkat(2)` of descriptors", do: probe("links")},
	{what: "sparse files of 1 TiB, `SEEK_HOLE`, `fallocate(2)` with each flag", do: probe("sparse")},
	{what: "`copy_file_range` and `FICLONE` of a file of the image", do: probe("range"), differs: map[string]string{
		"fuse": "fails with `EXDEV`, as between two file systems; programs then read and write, as `cp` does",
	}},
	{what: "`sendfile`, `splice`, `fsync`, reads at the end", do: probe("copying")},
	{what: "`O_DIRECT`, of the image and beside it", do: probe("direct")},
	{what: "`mmap`: shared, private, executable, after a copy-up", do: probe("mmap")},
	{what: "`flock`, POSIX and OFD locks between processes, leases", do: probe("locks")},
	{what: "inotify, fanotify", do: probe("watches")},
	{what: "a directory of 50,000 entries: seeking, removal while they are read, types", do: probe("dirs")},
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
	{what: "20,000 files made and removed", do: probe("many")},
	{what: "which file is which: device and inode number", do: probe("identity")},
	{what: "device and inode number of a file of the image when it is first written to", do: probe("replaced"), differs: map[string]string{
		"fuse": "a file is on another device than its directory, and on a third one once it was written to; two names of one file still agree",
	}},
	{what: "`statfs`, `df`", do: probe("statfs")},
	{what: "mounts, swap, handles, `io_uring`: refused", do: probe("refused")},
}

// probes are what fsprobe said, by subject. All groups run in one container:
// filling a root takes its time.
var probes struct {
	sync.Mutex
	said map[string]func() (result, map[string]string)
}

// probe is a row's do that returns what a group of fsprobe said as root.
func probe(group string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		s = s.of(t, "files")
		probes.Lock()
		if probes.said == nil {
			probes.said = map[string]func() (result, map[string]string){}
		}
		if probes.said[s.name] == nil {
			probes.said[s.name] = sync.OnceValues(func() (result, map[string]string) {
				r := s.run(t, append([]string{"--user", "root", s.image, "fsprobe"}, testenv.ProbeGroups...)...)
				said := map[string]string{}
				for part := range strings.SplitSeq("\n"+r.stdout, "\n== ") {
					name, lines, _ := strings.Cut(part, "\n")
					said[name] = lines
				}
				return r, said
			})
		}
		run := probes.said[s.name]
		probes.Unlock()
		r, said := run()
		if r.code != 0 || r.stderr != "" || said[group] == "" {
			t.Fatalf("exit %d, stderr %q; of %s: %q", r.code, r.stderr, group, said[group])
		}
		return said[group]
	}
}
