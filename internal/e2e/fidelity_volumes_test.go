package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// volumeRows are what is mounted into a container.
var volumeRows = []row{
	{what: "`-v FILE:/bin/testapp`, a program in the place of one of the image's", do: func(t *testing.T, s *subject) string {
		program := hostFile(t, "program", "#!/bin/sh\necho \"this is $0 with $*\"\n", 0o755)
		args := []string{"-v", program + ":/bin/testapp:ro"}
		return s.run(t, append(args, s.image, "sh", "-c", "testapp a b; ls -l /bin/testapp; cut -d' ' -f5,6 /proc/self/mountinfo | grep bin")...).String() +
			s.run(t, append(args, "--entrypoint", "/bin/testapp", s.image, "c")...).String() +
			s.run(t, append(args, "--entrypoint", "cat", s.image, "/etc/passwd")...).String()
	}},
	{what: "declared `VOLUME`s without `-v`: content, owner, modes", do: func(t *testing.T, s *subject) string {
		s = s.of(t, "volumes")
		id := s.start(t, s.image, "sh", "-c", "stat -c '%n %a %u:%g %h' /vol/* /vol/*/*; cat /vol/full/file; touch /vol/full/mine; echo up; exec sleep 600")
		said := untilUp(t, id)
		return said + hostTree(t, mountOf(t, id, "/vol/full")) + hostTree(t, mountOf(t, id, "/vol/empty")) + hostTree(t, mountOf(t, id, "/vol/absent"))
	}},
	filledRow("`-v NAME:/vol/full`, a new volume at a directory with content", "/vol/full"),
	filledRow("`-v NAME:/vol/empty`, at an empty directory", "/vol/empty"),
	filledRow("`-v NAME:/vol`, at a directory of directories", "/vol"),
	filledRow("`-v NAME:/vol/link`, at a link to a directory", "/vol/link"),
	filledRow("`-v NAME:/opt/tools/bin`, at a directory of programs", "/opt/tools/bin"),
	filledRow("`-v NAME:/etc`, at `/etc`", "/etc"),
	filledRow("`-v NAME:/bin`, at the programs", "/bin"),
	filledRow("`-v NAME:/not/there`, at no directory", "/not/there"),
	withDifference(filledRow("`-v NAME:/vol/full:ro`, read-only", "/vol/full", "ro"), "fill",
		"a new volume cannot be initialised through a read-only mount, exit 125: start the container once without `:ro`, or with `--cap-add SYS_ADMIN`"),
	filledRow("`-v NAME:/vol/full:nocopy`", "/vol/full", "nocopy"),
	{what: "a volume that holds something already", do: func(t *testing.T, s *subject) string {
		name := freshVolume(t, s)
		seed(t, name, "theirs")
		return s.run(t, "-v", name+":/vol/full", s.image, "ls", "-A", "/vol/full").String() + hostTree(t, volumeDir(t, name))
	}},
	{what: "a volume that the program empties, and `docker restart`", do: func(t *testing.T, s *subject) string {
		name := freshVolume(t, s)
		id := s.start(t, "-v", name+":/vol/full", "-v", freshVolume(t, s)+":/srv", s.image, "sh", "-c", "ls -A /vol/full /srv; rm -r /vol/full/* /srv/*; echo up; exec sleep 600")
		untilUp(t, id)
		docker(t, "restart", "--time", "0", id)
		eventually(t, "it is up again", func() bool { return strings.Count(docker(t, "logs", id).stdout, "up\n") == 2 })
		return docker(t, "logs", id).String()
	}},
	{what: "`docker create`, `docker cp` into a volume, `docker start`", do: func(t *testing.T, s *subject) string {
		s = s.of(t, "volumes")
		id := s.create(t, "-v", freshVolume(t, s)+":/etc", s.image, "sh", "-c", "cat /vol/full/file /etc/passwd; ls /vol/full")
		file := hostFile(t, "file", "changed before the start\n", 0o644)
		return docker(t, "cp", file, id+":/vol/full/file").String() + docker(t, "cp", file, id+":/etc/passwd").String() +
			docker(t, "start", "--attach", id).String() + hostTree(t, mountOf(t, id, "/vol/full"))
	}},
	{what: "`-v A:/vol -v B:/vol/full`, a volume in a volume", differs: map[string]string{
		"fill": "the same in the container, but the outer volume lacks what lies below the inner one: `--cap-add SYS_ADMIN` brings it too",
	}, do: func(t *testing.T, s *subject) string {
		outer, inner := freshVolume(t, s), freshVolume(t, s)
		return s.run(t, "-v", outer+":/vol", "-v", inner+":/vol/full", s.image, "sh", "-c", "find /vol | sort").String() +
			hostTree(t, volumeDir(t, outer)) + hostTree(t, volumeDir(t, inner))
	}},
	{what: "`--volumes-from`", do: func(t *testing.T, s *subject) string {
		s = s.of(t, "volumes")
		id := s.create(t, s.image)
		return s.run(t, "--volumes-from", id, s.image, "sh", "-c", "find /vol | sort; echo more >>/vol/full/file").String() +
			s.run(t, "--volumes-from", id, s.image, "cat", "/vol/full/file").String()
	}},
}

func withDifference(r row, subject, difference string) row {
	r.differs = map[string]string{subject: difference}
	return r
}

// filledRow is a row that runs the small image with a new volume at a place and
// then looks into the volume.
func filledRow(what, at string, options ...string) row {
	return row{what: what, do: func(t *testing.T, s *subject) string {
		name := freshVolume(t, s)
		arg := strings.Join(append([]string{name, at}, options...), ":")
		return s.run(t, "-v", arg, s.image, "sh", "-c", "stat -c '%n %a %u:%g' "+at+" "+at+"/*; touch "+at+"/new && echo writable && rm "+at+"/new").String() + hostTree(t, volumeDir(t, name))
	}}
}

// freshVolume makes a volume that is removed when the test ends.
func freshVolume(t *testing.T, s *subject) string {
	t.Helper()
	name := strings.TrimSpace(docker(t, "volume", "create").stdout)
	t.Cleanup(func() {
		if out, err := w.docker.Command(context.Background(), "volume", "rm", name).CombinedOutput(); err != nil {
			t.Errorf("docker volume rm: %v\n%s", err, out)
		}
	})
	return name
}

// volumeDir is where a volume lies on the host.
func volumeDir(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(docker(t, "volume", "inspect", "--format", "{{.Mountpoint}}", name).stdout)
}

// seed puts a file into a volume.
func seed(t *testing.T, volume, file string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(volumeDir(t, volume), file), []byte("seed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// mountOf is where what is mounted in a container lies on the host.
func mountOf(t *testing.T, id, at string) string {
	t.Helper()
	return strings.TrimSpace(docker(t, "inspect", "--format", `{{range .Mounts}}{{if eq .Destination "`+at+`"}}{{.Source}}{{end}}{{end}}`, id).stdout)
}

// untilUp waits until a container says that it is up and returns what it said.
func untilUp(t *testing.T, id string) string {
	t.Helper()
	var r result
	eventually(t, "the container is up", func() bool {
		r = docker(t, "logs", id)
		return strings.HasSuffix(r.stdout, "up\n")
	})
	return r.String()
}

// hostTree describes all that is below a directory of the host: what ls shows,
// the contents of small files, xattrs, and the times of files.
func hostTree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		fmt.Fprintf(&b, "%s %o %d:%d", name, st.Mode, st.Uid, st.Gid)
		if !e.IsDir() {
			fmt.Fprintf(&b, " %d links, %d bytes", st.Nlink, st.Size)
		}
		if e.Type().IsRegular() && st.Size < 1000 {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", text)
		}
		if e.Type() == fs.ModeSymlink {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		}
		list := make([]byte, 4096)
		n, _ := unix.Llistxattr(path, list)
		for x := range strings.SplitSeq(string(list[:max(n, 0)]), "\x00") {
			if x != "" {
				value := make([]byte, 4096)
				n, _ := unix.Lgetxattr(path, x, value)
				fmt.Fprintf(&b, " %s=%q", x, value[:max(n, 0)])
			}
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return dirHeader + b.String()
}

const dirHeader = "-- on the host\n"

// hostFile makes a file on the host for a container to mount.
func hostFile(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}
