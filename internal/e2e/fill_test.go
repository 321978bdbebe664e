package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPlainDockerRun gives docker run nothing but the image and the network.
func TestPlainDockerRun(t *testing.T) {
	source := docker(t, "run", "--rm", "--network", "host", w.source)
	r := docker(t, "run", "--rm", "--network", "host", w.image)
	if r.code != 0 || r.stdout != source.stdout {
		t.Errorf("exit %d, stdout %q, stderr %q; want the output of the source image, %q", r.code, r.stdout, r.stderr, source.stdout)
	}
	if !strings.HasPrefix(r.stderr, "bootfs: the root is filled in place: add --device /dev/fuse --cap-add SYS_ADMIN to docker run") {
		t.Errorf("stderr %q does not say what would make it lazy", r.stderr)
	}
	if r := runFilled(t, w.image); r.code != 0 || r.stdout != source.stdout || r.stderr != "" {
		t.Errorf("a fill that was asked for: exit %d, stdout %q, stderr %q; want the output of the source image and nothing else", r.code, r.stdout, r.stderr)
	}
}

// TestFilledRootIsTheSources compares what every file is, and what the program
// is. Their bytes are those of TestKilledWhileFilling.
func TestFilledRootIsTheSources(t *testing.T) {
	const script = `
		find / -xdev ! -path '/proc/*' ! -path '/.bootfs*' ! -path /.dockerenv ! -path '/etc/host*' ! -path /etc/resolv.conf ! -path /etc/mtab ! -path / |
			sort | xargs -d '\n' stat -c '%n %A %u:%g %h %s %t,%T %N' | sed -E 's/^(\/[^ ]* d[^ ]* [^ ]*) [0-9]+ [0-9]+/\1/'
		echo "pid $$"
		cat /proc/[0-9]*/comm | grep ^boot
		grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|Sig[BIC])' /proc/self/status
		env | grep -E 'BLOB_STORE|BOOTFS'
		ls /proc/self/fd
		grep -E ' /(proc|sys)' /proc/self/mountinfo | cut -d' ' -f5,6 | sort
		ulimit -n; umask; cat /proc/self/oom_score_adj`
	args := []string{"--user", "root"}
	source := docker(t, append(append([]string{"run", "--rm", "--network", "host"}, args...), w.source, "sh", "-c", script)...)
	filled := runFilled(t, append(args, w.image, "sh", "-c", script)...)
	if source.code != 0 || source != filled {
		t.Errorf("exit %d and %d, stderr %q and %q\n%s", source.code, filled.code, source.stderr, filled.stderr, firstDifference(filled.stdout, source.stdout))
	}
}

func TestFilledIdentity(t *testing.T) {
	const script = `id; pwd; umask; ulimit -n; env | sort; stat -c '%n %a %u:%g' / /tmp /etc/shadow; cat /proc/1/comm; readlink /proc/self/fd/0`
	source, converted := fidelityImage(t, "plain")
	for _, args := range [][]string{
		nil,
		{"--user", "1000:12"},
		{"--user", "nobody"},
		{"--user", "12345", "--group-add", "20"},
		{"--workdir", "/usr/bin"},
		{"--workdir", "/not/there/yet"},
		{"--env", "HOME=/elsewhere"},
		{"--ulimit", "nofile=123:456"},
		{"--tmpfs", "/run"},
		{"--init"},
		{"--security-opt", "no-new-privileges"},
		{"--cap-drop", "SETUID", "--cap-drop", "SETGID", "--user", "nobody"},
	} {
		t.Run(fmt.Sprint(args), func(t *testing.T) {
			t.Parallel()
			source := docker(t, append(append([]string{"run", "--rm", "--network", "host"}, args...), source, "sh", "-c", script)...)
			filled := runFilled(t, append(args, converted, "sh", "-c", script)...)
			if source != filled {
				t.Errorf("\nsource: %+v\nfilled: %+v", source, filled)
			}
		})
	}
}

// TestFilledWithoutNetwork fills roots from a cache, and from a store in a
// directory.
func TestFilledWithoutNetwork(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	left := t.TempDir()
	runFilled(t, "--volume", left+":/.bootfs/rootfs.castr", image, "echo", "once").want(t, "once\n")
	if chunksIn(t, left) == 0 {
		t.Error("a fill leaves nothing in the cache")
	}
	through := []string{"--volume", preload(t, image) + ":/.bootfs/rootfs.castr"}
	none := []string{"run", "--rm", "--network", "none", "--env", "BOOTFS_MODE=fill"}
	docker(t, append(append(none, through...), image, "echo", "again")...).want(t, "again\n")

	store := t.TempDir()
	stored := strings.TrimSuffix(image, "-converted") + "-stored"
	if out, err := w.command("--boot", w.boot, "--store", store, strings.TrimSuffix(image, "-converted"), stored).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	docker(t, "pull", "--quiet", stored).want(t, stored+"\n")
	docker(t, append(none, "--volume", store+":"+store+":ro", stored, "echo", "stored")...).want(t, "stored\n")
}

// TestFilledContainerRestarts stops a container of another user, and starts it
// again where nothing can be fetched.
func TestFilledContainerRestarts(t *testing.T) {
	id := startFilled(t, w.image, "sh", "-c", "echo $(id -un) >> /tmp/starts; cat /tmp/starts; exec sleep 600")
	eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "app\n" })
	w.proxy.hold(t)
	if r := docker(t, "restart", "--time", "1", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	eventually(t, "the program is up again", func() bool { return docker(t, "logs", id).stdout == "app\napp\napp\n" })
	// Boot has nothing left that the user could use.
	docker(t, "exec", id, "stat", "-c", "%a %u", "/.bootfs/boot").want(t, "755 0\n")
	docker(t, "exec", id, "ls", "/.bootfs/fill").notFound(t)
}

// TestStoppedWhileFilling stops containers that wait for their chunks.
func TestStoppedWhileFilling(t *testing.T) {
	release := w.proxy.hold(t)
	for _, args := range [][]string{nil, {"--init"}, {"--user", "nobody"}} {
		id := startFilled(t, append(args, w.image, "echo", "filled")...)
		eventually(t, "the fill has begun", func() bool { return strings.Contains(docker(t, "diff", id).stdout, "A /.bootfs/fill\n") })
		began := time.Now()
		if r := docker(t, "stop", "--time", "60", id); r.code != 0 {
			t.Fatal(r.stderr)
		}
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("%v: docker stop took %v of its 60 s", args, took)
		}
		docker(t, "inspect", "--format", "{{.State.ExitCode}}", id).want(t, "143\n")
	}
	release()
}

// TestKilledWhileFilling kills a container again and again, at other places of
// its fill, and then lets it come to an end.
func TestKilledWhileFilling(t *testing.T) {
	want := sumsOf(docker(t, "run", "--rm", "--user", "root", w.source, "sh", "-c", sums).stdout)
	r := docker(t, append(append([]string{"create"}, fillFlags...), "--user", "root", w.image, "sh", "-c", sums)...)
	id := strings.TrimSpace(r.stdout)
	removeAtEnd(t, id)
	for _, part := range []int64{1, 4, 16} {
		before := w.proxy.bytes.Load()
		if r := docker(t, "start", id); r.code != 0 {
			t.Fatal(r.stderr)
		}
		eventually(t, "some chunks have come", func() bool { return w.proxy.bytes.Load() > before+part<<20 })
		if r := docker(t, "kill", id); r.code != 0 {
			t.Fatal(r.stderr)
		}
		docker(t, "wait", id).want(t, "137\n")
	}
	before := w.proxy.bytes.Load()
	r = docker(t, "start", "--attach", id)
	t.Logf("the last start fetched %d bytes of %d", w.proxy.bytes.Load()-before, storedBytes(t))
	got := sumsOf(r.stdout)
	maps.DeleteFunc(got, func(file, _ string) bool { return strings.HasPrefix(file, "/.bootfs/") })
	if r.code != 0 || !maps.Equal(got, want) {
		t.Errorf("exit %d, %d files, want the %d of the source image\n%.2000s", r.code, len(got), len(want), r.stderr)
	}
}

// TestExecWhileFilling runs programs in a container that waits for its chunks.
func TestExecWhileFilling(t *testing.T) {
	release := w.proxy.hold(t)
	id := startFilled(t, w.image, "sleep", "600")
	type call struct {
		args []string
		want string
		got  chan result
	}
	calls := []*call{
		{args: []string{id, "python3", "-c", "import json; print(json.dumps([1]))"}, want: "[1]\n"},
		{args: []string{"--user", "nobody", "--workdir", "/usr", id, "/usr/bin/id", "-un"}, want: "nobody\n"},
		{args: []string{"--user", "root", id, "sh", "-c", "wc -l < /app/main.py; cat /proc/1/comm; readlink /proc/self/exe"}, want: "18\nsleep\n/usr/bin/readlink\n"},
	}
	for _, c := range calls {
		c.got = make(chan result, 1)
		go func() { c.got <- docker(t, append([]string{"exec"}, c.args...)...) }()
	}
	eventually(t, "the calls are in the container", func() bool {
		processes := docker(t, "top", id, "-o", "pid,comm").stdout // below a line with the title
		return strings.Count(processes, "\n") == 1+1+len(calls) && !strings.Contains(processes, "runc")
	})
	for _, c := range calls {
		select {
		case r := <-c.got:
			t.Errorf("%q did not wait for the root: %+v", c.args, r)
		default:
		}
	}
	release()
	for _, c := range calls {
		(<-c.got).want(t, c.want)
	}
}

// TestExecCarriesOn runs a program in a container whose fill was killed between
// its last renames: what the container begins with is in place already, and no
// boot comes.
func TestExecCarriesOn(t *testing.T) {
	source, image := fidelityImage(t, "plain")
	dir := t.TempDir()
	from := strings.TrimSpace(docker(t, "create", source).stdout)
	removeAtEnd(t, from)
	id := strings.TrimSpace(docker(t, append(append([]string{"create"}, fillFlags...), "--user", "root", "--entrypoint", "/bin/sleep", image, "600")...).stdout)
	removeAtEnd(t, id)
	if err := os.Mkdir(filepath.Join(dir, "fill"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"cp", "--follow-link", from + ":/bin/sleep", filepath.Join(dir, "sleep")},
		{"cp", filepath.Join(dir, "sleep"), id + ":/bin/sleep"},
		{"cp", filepath.Join(dir, "fill"), id + ":/.bootfs/fill"},
		{"start", id},
	} {
		if r := docker(t, args...); r.code != 0 {
			t.Fatal(r.stderr)
		}
	}
	docker(t, "exec", id, "sh", "-c", "cat /proc/1/comm; ls -d /.bootfs/fill* ; find /.bootfs -perm -4000").want(t, "sleep\n/.bootfs/filled\n")
}

// TestFillMeetsADamagedChunk wants a container that does not start rather than
// one with a wrong file.
func TestFillMeetsADamagedChunk(t *testing.T) {
	pack := packs(t)
	heal := flip(t, pack[len(pack)-1])
	defer heal()
	r := runFilled(t, w.image, "echo", "started")
	if r.code != 125 || r.stdout != "" || chunkName(r.stderr) == "" || !strings.Contains(r.stderr, "is corrupt") {
		t.Errorf("exit %d, stdout %q, stderr %q; want exit 125 and the name of the chunk", r.code, r.stdout, r.stderr)
	}
	if lines := strings.Count(r.stderr, "\n"); lines != 1 {
		t.Errorf("%d lines, want one:\n%s", lines, r.stderr)
	}
}

// TestCommitOfAFilledContainer runs an image that was made of one.
func TestCommitOfAFilledContainer(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	id := startFilled(t, "--user", "nobody", image, "sh", "-c", "echo changed > /tmp/file; echo done; exec sleep 600")
	eventually(t, "the program has run", func() bool { return docker(t, "logs", id).stdout == "done\n" })
	const name = "committed:filled"
	if r := docker(t, "commit", id, name); r.code != 0 {
		t.Fatal(r.stderr)
	}
	t.Cleanup(func() { _, _ = w.docker.Output(context.Background(), "rmi", "--force", name) })
	for _, args := range [][]string{nil, {"--read-only"}, {"--security-opt", "no-new-privileges"}, {"--cap-drop", "ALL"}, {"--env", "BOOTFS_MODE=auto", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN"}} {
		r := docker(t, append(append([]string{"run", "--rm", "--network", "none", "--user", "nobody"}, args...), name, "sh", "-c", "id -un; cat /tmp/file; env | grep ^BOOTFS; grep CapEff /proc/self/status")...)
		if r.code != 0 || r.stdout != "nobody\nchanged\nCapEff:\t0000000000000000\n" || r.stderr != "" {
			t.Errorf("%v: exit %d, stdout %q, stderr %q", args, r.code, r.stdout, r.stderr)
		}
	}
}

// TestFilledWithSysAdmin gives the container the capability all the same.
func TestFilledWithSysAdmin(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	secrets := t.TempDir()
	if err := os.WriteFile(filepath.Join(secrets, "password"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	const script = `grep CapBnd /proc/self/status; mount -t tmpfs none /tmp 2>/dev/null && echo mounted; cat /.bootfs/secrets/password 2>/dev/null; grep -c ' /.bootfs' /proc/self/mountinfo`
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "CapBnd:\t00000000a80425fb\nsecret2\n"},
		{[]string{"--cap-add", "SYS_ADMIN"}, "CapBnd:\t00000000a80425fb\n0\n"},
		{[]string{"--cap-add", "SYS_ADMIN", "--env", "BOOTFS_KEEP_SYS_ADMIN=1"}, "CapBnd:\t00000000a82425fb\nmounted\n0\n"},
	} {
		r := runFilled(t, append(c.args, "--security-opt", "apparmor=unconfined", "--volume", secrets+":/.bootfs/secrets:ro", image, "sh", "-c", script)...)
		if r.stdout != c.want || r.stderr != "" {
			t.Errorf("%v: exit %d, stdout %q, stderr %q; want stdout %q", c.args, r.code, r.stdout, r.stderr, c.want)
		}
	}
}

// TestProgressOfAFill wants it told only where a fill takes long.
func TestProgressOfAFill(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	release := w.proxy.hold(t)
	loud := []string{"--network", "host", "--env", "BOOTFS_MODE=fill"}
	plain := startWith(t, loud, image, "echo", "done")
	quiet := startFilled(t, image, "echo", "done")
	// The engine's log has whole lines only.
	screen := filepath.Join(t.TempDir(), "screen")
	shown, err := os.Create(screen)
	if err != nil {
		t.Fatal(err)
	}
	defer shown.Close()
	terminal := w.docker.Command(t.Context(), append(append([]string{"run", "--rm", "--tty"}, loud...), image, "echo", "done")...)
	terminal.Stdout = shown
	if err := terminal.Start(); err != nil {
		t.Fatal(err)
	}
	onScreen := func() string {
		b, err := os.ReadFile(screen)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	eventually(t, "the progress is told", func() bool {
		return strings.HasPrefix(docker(t, "logs", plain).stderr, "bootfs: filling the root") && strings.HasPrefix(onScreen(), "bootfs: filling the root")
	})
	release()
	for _, id := range []string{plain, quiet} {
		docker(t, "wait", id).want(t, "0\n")
	}
	if err := terminal.Wait(); err != nil {
		t.Error(err)
	}
	if r := docker(t, "logs", plain); r.stdout != "done\n" || !strings.HasSuffix(r.stderr, "\n") || strings.Contains(r.stderr, "\r") {
		t.Errorf("%+v", r)
	}
	if got := onScreen(); !strings.HasSuffix(got, "\r\x1b[Kdone\r\n") || strings.Count(got, "\n") != 1 {
		t.Errorf("a line of progress was left on the terminal: %q", got)
	}
	if r := docker(t, "logs", quiet); r.stdout != "done\n" || r.stderr != "" {
		t.Errorf("%+v", r)
	}
}

// withoutProgress leaves out the lines that a fill of more than 2 s writes.
func withoutProgress(log string) string {
	var b strings.Builder
	for line := range strings.Lines(log) {
		if !strings.HasPrefix(line, "bootfs: filling the root") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestChangesOfAMountedRoot takes a volume with changes to a fill, which does
// not see them and says so.
func TestChangesOfAMountedRoot(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	const volume = "changes-of-a-mounted-root"
	t.Cleanup(func() { _, _ = w.docker.Output(context.Background(), "volume", "rm", "--force", volume) })
	with := []string{"--volume", volume + ":/.bootfs/rw", image, "sh", "-c", "cat /root/changed; echo new > /root/changed"}
	run(t, with...)
	run(t, with...).want(t, "new\n")
	r := docker(t, append([]string{"run", "--rm", "--network", "host", "--env", "BOOTFS_MODE=fill"}, with...)...)
	r.stderr = withoutProgress(r.stderr)
	if r.stdout != "" || strings.Count(r.stderr, "bootfs:") != 1 || !strings.Contains(r.stderr, "stays aside in the volume at /.bootfs/rw") {
		t.Errorf("%+v", r)
	}
}

// TestMountRefused refuses what device and capabilities promise, as a security
// module does.
func TestMountRefused(t *testing.T) {
	source, image := fidelityImage(t, "plain")
	profile := filepath.Join(t.TempDir(), "seccomp.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mount"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	flags := []string{"run", "--rm", "--network", "host", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=" + profile}
	script := []string{"sh", "-c", "id; grep -c bootfs /proc/self/mountinfo; exit 3"}
	want := docker(t, slices.Concat(flags, []string{source}, script)...)
	r := docker(t, slices.Concat(flags, []string{image}, script)...)
	r.stderr = withoutProgress(r.stderr)
	if r.stdout != want.stdout || r.code != want.code {
		t.Errorf("exit %d, stdout %q, stderr %q; want exit %d, stdout %q", r.code, r.stdout, r.stderr, want.code, want.stdout)
	}
	const why = "the container may not mount: operation not permitted\n"
	if r.stderr != "bootfs: the root is filled in place: mounting it was refused: "+why {
		t.Errorf("stderr %q does not say why the root was filled", r.stderr)
	}
	refused := docker(t, slices.Concat(flags, []string{"--env", "BOOTFS_MODE=fuse", image}, script)...)
	if refused.code != 125 || refused.stdout != "" || refused.stderr != "bootfs: "+why {
		t.Errorf("with BOOTFS_MODE=fuse: %+v", refused)
	}
}
