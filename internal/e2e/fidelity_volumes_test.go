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
		name := freshVolume(t)
		seed(t, name, "theirs")
		return s.run(t, "-v", name+":/vol/full", s.image, "ls", "-A", "/vol/full").String() + hostTree(t, volumeDir(t, name))
	}},
	{what: "a volume that the program empties, and `docker restart`", do: func(t *testing.T, s *subject) string {
		name := freshVolume(t)
		id := s.start(t, "-v", name+":/vol/full", "-v", freshVolume(t)+":/srv", s.image, "sh", "-c", "ls -A /vol/full /srv; rm -r /vol/full/* /srv/*; echo up; exec sleep 600")
		untilUp(t, id)
		docker(t, "restart", "--time", "0", id)
		eventually(t, "it is up again", func() bool { return strings.Count(docker(t, "logs", id).stdout, "up\n") == 2 })
		return docker(t, "logs", id).String()
	}},
	{what: "`docker create`, `docker cp` into a volume, `docker start`", do: func(t *testing.T, s *subject) string {
		s = s.of(t, "volumes")
		id := s.create(t, "-v", freshVolume(t)+":/etc", s.image, "sh", "-c", "cat /vol/full/file /etc/passwd; ls /vol/full")
		file := hostFile(t, "file", "changed before the start\n", 0o644)
		return docker(t, "cp", file, id+":/vol/full/file").String() + docker(t, "cp", file, id+":/etc/passwd").String() +
			docker(t, "start", "--attach", id).String() + hostTree(t, mountOf(t, id, "/vol/full"))
	}},
	{what: "`-v A:/vol -v B:/vol/full`, a volume in a volume", differs: map[string]string{
		"fill": "the same in the container, but the outer volume lacks what lies below the inner one: `--cap-add SYS_ADMIN` brings it too",
	}, do: func(t *testing.T, s *subject) string {
		outer, inner := freshVolume(t), freshVolume(t)
		return s.run(t, "-v", outer+":/vol", "-v", inner+":/vol/full", s.image, "sh", "-c", "find /vol | sort").String() +
			hostTree(t, volumeDir(t, outer)) + hostTree(t, volumeDir(t, inner))
	}},
	{what: "`--volumes-from`", do: func(t *testing.T, s *subject) string {
		s = s.of(t, "volumes")
		id := s.create(t, s.image)
		return s.run(t, "--volumes-from", id, s.image, "sh", "-c", "find /vol | sort; echo more >>/vol/full/file").String() +
			s.run(t, "--volumes-from", id, s.image, "cat", "/vol/full/file").String()
	}},
	mountRow("`-v FILE:/etc/passwd`, `/etc/hosts`, `/vol/full/file`", "id app; cat /etc/passwd /etc/hosts /vol/full/file; head -c 7 /etc/hostname >/dev/null && echo named",
		"-u", "app", "-v", "FILE:/etc/passwd", "-v", "FILE:/etc/hosts", "-v", "FILE:/vol/full/file:ro"),
	mountRow("`-v` at links: to a directory, absolute, relative, dangling, in a directory that is one",
		"find /opt /no /run /srv /usr -xdev | grep -v busybox | sort | xargs stat -c '%n %F %a %h'; cat /opt/tools/script /opt/absolute /no/such/file; ls /opt/tools/bin /srv/app /run/x",
		"-v", "DIR:/opt/current/bin", "-v", "FILE:/opt/absolute", "-v", "FILE:/opt/relative", "-v", "FILE:/opt/dangling", "-v", "DIR:/srv/out", "-v", "DIR:/var/run/x/y:ro").
		but("fill", "a mount at a link that the boot image lacks (it has those of the upper directories) stays in the link's place; mount where the link leads"),
	mountRow("`-v` and `--mount` where the image has nothing", "find /new /srv | sort | xargs stat -c '%n %F %a %u:%g'; cat /new/deep/file; touch /new/deep/dir/t /srv/app/x/y/t; ls /new/deep/dir",
		"-v", "DIR:/new/deep/dir", "--mount", "type=bind,src=FILE,dst=/new/deep/file,ro", "--mount", "type=volume,dst=/new/volume", "--mount", "type=tmpfs,dst=/new/tmpfs,tmpfs-mode=1750,tmpfs-size=1m", "-v", "DIR:/srv/app/x/y:ro"),
	mountRow("mounts in mounts", "find /opt /srv | sort; cat /opt/a/b/file; cat /opt/tools/script",
		"-v", "DIR:/opt", "-v", "DIR:/opt/a/b", "-v", "FILE:/opt/a/b/file", "-v", "FILE:/opt/tools/script", "--tmpfs", "/opt/a/b/tmp", "-v", "DIR:/srv/app", "-v", "DIR:/srv/app/data.d"),
	mountRow("`-v DIR:/srv/app -w /srv/app/made`, over the working directory", "pwd; ls -A . ..; touch here && ls; stat -c '%a %u:%g' .",
		"-v", "DIR:/srv/app", "-w", "/srv/app/made"),
	mountRow("`-v DIR:/usr/bin`, over a directory of programs", "ls -A /usr/bin; /usr/bin/tool; tool", "-v", "DIR:/usr/bin"),
	mountRow("`--tmpfs` at directories with modes of their own", "stat -c '%n %a %u:%g %t' /tmp /srv/shared /srv/closed /opt/private /var/cache /vol/empty /new; ls -A /srv/shared",
		"--tmpfs", "/tmp", "--tmpfs", "/srv/shared", "--tmpfs", "/srv/closed:size=1m", "--tmpfs", "/opt/private:mode=1700,exec", "--tmpfs", "/var/cache", "--tmpfs", "/vol/empty:uid=1000", "--tmpfs", "/new"),
	mountRow("`-v DIR:/etc`, over all of `/etc`", "ls -A /etc; stat -c %n /etc/hosts /etc/resolv.conf; id -u", "-v", "DIR:/etc"),
	mountRow("mounts of the host below a mount: `bind-nonrecursive` `:rslave` `:rshared` `:rprivate` `:z`", "ls /a /b /c /d /e /b/inner",
		"-v", "SHARED:/a:z", "--mount", "type=bind,src=SHARED,dst=/b,bind-nonrecursive=true", "-v", "SHARED:/c:rslave", "-v", "SHARED:/d:rshared", "-v", "SHARED:/e:rprivate"),
	mountRow("`--read-only` with mounts", "touch /x; touch /new/dir/x /vol/full/x /run/x && echo written; stat -c '%n %a' /new /new/dir",
		"--read-only", "-v", "DIR:/new/dir", "-v", "DIR:/vol/full", "--tmpfs", "/run").
		but("fill", "exit 125: a read-only root cannot be filled"),
	{what: "what the host mounts below `:rslave` while the container runs", do: func(t *testing.T, s *subject) string {
		dir := sharedDir(t)
		id := s.start(t, "-v", dir+":/mnt:rslave", s.image, "sh", "-c", "echo up; while ! test -e /mnt/later/file; do sleep 0.1; done; echo seen; exec sleep 600")
		untilUp(t, id)
		if err := unix.Mount(filepath.Join(dir, "inner"), filepath.Join(dir, "later"), "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "later"), unix.MNT_DETACH) })
		eventually(t, "the mount is seen", func() bool { return strings.HasSuffix(docker(t, "logs", id).stdout, "seen\n") })
		return docker(t, "exec", id, "cat", "/mnt/later/file").String()
	}},
	{what: "200 mounts", do: func(t *testing.T, s *subject) string {
		dir, args := t.TempDir(), []string(nil)
		for i := range 200 {
			args = append(args, "-v", fmt.Sprintf("%s:/mnt/%d/%d:ro", dir, i%7, i))
		}
		return s.run(t, append(args, s.image, "sh", "-c", "ls /mnt/*; grep -c /mnt/ /proc/self/mountinfo")...).String()
	}},
	{what: "a library and a device as GPU toolkits mount them", do: func(t *testing.T, s *subject) string {
		s = s.of(t, python)
		library, err := filepath.EvalSymlinks("/lib/x86_64-linux-gnu/libz.so.1")
		if err != nil {
			t.Fatal(err)
		}
		const program = `import ctypes, os; print(ctypes.CDLL("libgpu.so.1").zlibCompileFlags() > 0, os.stat("/dev/gpu0").st_rdev, os.path.exists("/usr/bin/gpu-smi"))`
		return s.run(t, "-v", library+":/usr/lib/x86_64-linux-gnu/libgpu.so.1.2.3:ro", "-v", library+":/usr/lib/x86_64-linux-gnu/libgpu.so.1:ro",
			"-v", library+":/lib/x86_64-linux-gnu/libgpu-ml.so.1:ro", "-v", "/bin/true:/usr/bin/gpu-smi:ro", "--device", "/dev/null:/dev/gpu0",
			s.image, "python3", "-c", program).String()
	}},
}

func withDifference(r row, subject, difference string) row {
	r.differs = map[string]string{subject: difference}
	return r
}

// mountRow is a row that runs the small image with a script and flags, in which
// FILE, DIR and SHARED stand for what is mounted, and shows the mounts.
func mountRow(what, script string, flags ...string) row {
	return row{what: what, do: func(t *testing.T, s *subject) string {
		file := hostFile(t, "file", "app:x:77:78:of the host:/:/bin/sh\n", 0o644)
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "tool"), []byte("#!/bin/sh\necho \"a tool of the host: $0\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		args := []string(nil)
		for _, f := range flags {
			f = strings.ReplaceAll(strings.ReplaceAll(f, "FILE", file), "DIR", dir)
			if strings.Contains(f, "SHARED") {
				f = strings.ReplaceAll(f, "SHARED", sharedDir(t))
			}
			args = append(args, f)
		}
		// What is mounted in /.bootfs shows after a fill: another row's difference.
		const mounts = `; sed 's/:[0-9]*//g' /proc/self/mountinfo | awk '$5 != "/" && $5 !~ "^/(proc|sys|dev|.bootfs)" { print $5, $6, $7 }' | sort`
		return s.run(t, append(args, s.image, "sh", "-c", script+mounts)...).String()
	}}
}

// but is the row with the documented difference of a subject.
func (r row) but(subject, difference string) row {
	r.differs = map[string]string{subject: difference}
	return r
}

// sharedDir is a directory on a shared mount of the host, with another mount in
// it at "inner", and a directory "later".
func sharedDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, m := range []struct {
		at    string
		fs    string
		flags uintptr
	}{
		{dir, "tmpfs", 0}, {dir, "", unix.MS_SHARED}, {filepath.Join(dir, "inner"), "tmpfs", 0},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", m.at, m.fs, m.flags, ""); err != nil {
			t.Fatalf("mount %s: %v", m.at, err)
		}
		if m.fs != "" {
			t.Cleanup(func() { _ = unix.Unmount(m.at, unix.MNT_DETACH) })
		}
	}
	for _, name := range []string{"later", "inner/made"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "inner/file"), []byte("of the inner mount\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// filledRow is a row that runs the small image with a new volume at a place and
// then looks into the volume.
func filledRow(what, at string, options ...string) row {
	return row{what: what, do: func(t *testing.T, s *subject) string {
		name := freshVolume(t)
		arg := strings.Join(append([]string{name, at}, options...), ":")
		return s.run(t, "-v", arg, s.image, "sh", "-c", "stat -c '%n %a %u:%g' "+at+" "+at+"/*; touch "+at+"/new && echo writable && rm "+at+"/new").String() + hostTree(t, volumeDir(t, name))
	}}
}

// freshVolume makes a volume that is removed when the test ends.
func freshVolume(t *testing.T) string {
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
