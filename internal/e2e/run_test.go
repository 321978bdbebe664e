package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// inspection is what bootfs-convert inspect --json says of an image, as far as
// these tests look at it.
type inspection struct {
	StoredBytes int64 `json:"storedBytes"`
}

func TestLazyStart(t *testing.T) {
	const program = `import json,ssl,sqlite3; print("ok")`
	const budget = 12 << 20
	t.Logf("docker pull: %d bytes", w.pulled)
	if w.pulled == 0 || w.pulled > budget {
		t.Errorf("docker pull moved %d bytes, want some and at most %d", w.pulled, budget)
	}
	fetched := w.proxy.measure(func() {
		run(t, "--env", "BOOTFS_PREFETCH=none", w.image, "python3", "-c", program).want(t, "ok\n")
	})
	stored := storedBytes(t)
	t.Logf("fetched %d of %d bytes of chunks (%.1f %%)", fetched, stored, 100*float64(fetched)/float64(stored))
	if fetched > stored*15/100 {
		t.Errorf("fetched %d bytes, want at most 15 %% of %d", fetched, stored)
	}
}

// storedBytes is the size of all chunks of the converted image in their packs.
func storedBytes(t *testing.T) int64 {
	t.Helper()
	out, err := w.command("inspect", "--json", w.image).Output()
	if err != nil {
		t.Fatal(err)
	}
	var i inspection
	if err := json.Unmarshal(out, &i); err != nil || i.StoredBytes == 0 {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	return i.StoredBytes
}

func TestImageDefaults(t *testing.T) {
	r := run(t, w.image)
	if r.code != 0 || !strings.HasSuffix(r.stdout, "\nok\n") || r.stderr != "" {
		t.Errorf("exit %d, stdout %q, stderr %q; want the application's output and nothing else", r.code, r.stdout, r.stderr)
	}
}

func TestCheckFindsNoDifference(t *testing.T) {
	if out, err := w.command("check", "oci:"+w.layout, w.image).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSharedCache(t *testing.T) {
	cache := t.TempDir()
	args := []string{"--volume", cache + ":/.bootfs/rootfs.castr", "--env", "BOOTFS_PREFETCH=none", w.image, "python3", "-uc", "import json; print(1)"}
	first := w.proxy.measure(func() {
		const wait = "; import time; time.sleep(600)"
		id := start(t, append(args[:len(args)-1:len(args)-1], args[len(args)-1]+wait)...)
		eventually(t, "the program has run", func() bool { return docker(t, "logs", id).stdout == "1\n" })
		eventually(t, "what was fetched is in the cache", func() bool {
			s := statusOf(t, id)
			return s.Reads.Waiting == 0 && s.Cache.Written+s.Cache.Dropped >= s.Stores[0].Chunks
		})
	})
	if first == 0 {
		t.Error("the first container fetched nothing")
	}
	// How far the kernel reads ahead is chance: a chunk more may be asked for.
	if second := w.proxy.measure(func() { run(t, args...).want(t, "1\n") }); second > first/20 {
		t.Errorf("the second container fetched %d bytes, the first %d", second, first)
	}
}

func TestCacheGrowsAsFilesAreRead(t *testing.T) {
	cache := t.TempDir()
	id := start(t, "--volume", cache+":/.bootfs/rootfs.castr", "--env", "BOOTFS_PREFETCH=none", w.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	// Chunks come to their names in groups, when the disk has them.
	settled := func(more int) int {
		n := -1
		eventually(t, "the cache grows and settles", func() bool {
			before := n
			n = chunksIn(t, cache)
			time.Sleep(time.Second)
			return n == before && n > more
		})
		return n
	}
	before := settled(0)
	docker(t, "exec", id, "sh", "-c", "cat /usr/lib/python3/dist-packages/numpy/core/*.so >/dev/null").want(t, "")
	t.Logf("%d chunks after the start, %d after reading more", before, settled(before))
}

func chunksIn(t *testing.T, cache string) int {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(cache, "*", "*.cacnk"))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		command string
		status  int
	}{
		{"exit 0", 0},
		{"exit 7", 7},
		{"exit 255", 255},
		{"kill -TERM $$; sleep 1; exit 3", 3}, // PID 1 ignores what it has no handler for
		{"sh -c 'kill -KILL $$'", 137},
		{"exec /no/such/program", 127},
		{"exec /etc/passwd", 126},
	} {
		if r := run(t, w.image, "sh", "-c", c.command); r.code != c.status {
			t.Errorf("%s: exit %d, want %d (stderr %q)", c.command, r.code, c.status, r.stderr)
		}
	}
	if r := run(t, "--entrypoint", "/.bootfs/boot", w.image, "no-such-program"); r.code != 127 {
		t.Errorf("a program that does not exist: exit %d, want 127 (stderr %q)", r.code, r.stderr)
	}
}

func TestStopEndsAtOnce(t *testing.T) {
	id := start(t, w.image, "python3", "-u", "-c",
		`import signal,sys,time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); print("up"); time.sleep(600)`)
	eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "up\n" })
	began := time.Now()
	if r := docker(t, "stop", "--time", "60", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	if took := time.Since(began); took > 40*time.Second {
		t.Errorf("docker stop took %v of its 60 s, although the program ends at once", took)
	}
	docker(t, "inspect", "--format", "{{.State.ExitCode}}", id).want(t, "9\n")
}

func TestAppIsAlone(t *testing.T) {
	const script = `
		echo "pid $$"
		cat /proc/[0-9]*/comm | grep ^boot
		grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status
		ls -A /.bootfs 2>/dev/null
		env | grep -E 'BLOB_STORE|BOOTFS'
		ls /proc/self/fd
		mount -t tmpfs none /mnt 2>/dev/null && echo mounted
		unshare -U true 2>/dev/null && echo unshared
		grep -E ' /(proc|sys)/' /proc/self/mountinfo | cut -d' ' -f5,6 | sort
		exit 0`
	inside := func(args ...string) string {
		t.Helper()
		r := docker(t, args...)
		if r.code != 0 {
			t.Fatalf("exit %d: %s", r.code, r.stderr)
		}
		return r.stdout
	}
	tail := []string{"--user", "root", "--env", "BOOTFS_PREFETCH=none"}
	source := inside(append(append([]string{"run", "--rm", "--network", "host"}, tail...), w.source, "sh", "-c", script)...)
	source = strings.Replace(source, "BOOTFS_PREFETCH=none\n", "", 1)
	converted := inside(append(append(append([]string{"run", "--rm"}, flags...), tail...), w.image, "sh", "-c", script)...)
	if source != converted {
		t.Errorf("the app sees other things than in its source image\nsource:\n%s\nconverted:\n%s", source, converted)
	}
}

func TestVolumesStandWhereTheyAreMounted(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{"/data", "/app", "/usr/lib/python3", "/var/run/data", "/a/b/c"} {
		run(t, "--volume", dir+":"+at, w.image, "cat", at+"/file").want(t, "from the host\n")
	}
	run(t, "--volume", dir+"/file:/etc/machine-id:ro", w.image, "cat", "/etc/machine-id").want(t, "from the host\n")
	run(t, "--volume", dir+":/data", "--user", "root", w.image, "sh", "-c", "echo back > /data/answer").want(t, "")
	if b, err := os.ReadFile(filepath.Join(dir, "answer")); err != nil || string(b) != "back\n" {
		t.Errorf("written into the volume: %q, %v", b, err)
	}
}

func TestWritableRoot(t *testing.T) {
	id := start(t, "--user", "root", "--workdir", "/", w.image, "sh", "-c", "echo changed > /etc/hostname.new; rm /usr/bin/env; mv /app /moved; chown -R 7 /opt /home; sleep 600")
	check := func() bool {
		return docker(t, "exec", id, "sh", "-c", "cat /etc/hostname.new; ls /usr/bin/env /moved/main.py").stdout == "changed\n/moved/main.py\n"
	}
	eventually(t, "the changes stand", check)
	docker(t, "restart", "--time", "1", id)
	eventually(t, "the changes outlive a restart", func() bool {
		r := docker(t, "exec", id, "cat", "/etc/hostname.new")
		return r.code == 0 && r.stdout == "changed\n"
	})
}

func TestReadOnlyRoot(t *testing.T) {
	r := run(t, "--read-only", "--user", "root", w.image, "sh", "-c", "touch /x; touch /dev/shm/y && echo shm")
	if r.stdout != "shm\n" || !strings.Contains(r.stderr, "Read-only file system") {
		t.Errorf("%+v", r)
	}
}

func TestTerminal(t *testing.T) {
	const script = `tty; python3 -c 'import os; print(os.getsid(0), os.tcgetpgrp(0) == os.getpgrp())'`
	for _, args := range [][]string{{"--tty"}, {"--tty", "--init"}} {
		source := docker(t, append(append([]string{"run", "--rm", "--network", "host"}, args...), w.source, "sh", "-c", script)...)
		converted := run(t, append(args, w.image, "sh", "-c", script)...)
		if len(args) == 1 && source != converted {
			t.Errorf("%v\nsource:    %+v\nconverted: %+v", args, source, converted)
		}
		if converted.code != 0 || !strings.Contains(converted.stdout, "True") {
			t.Errorf("%v: %+v", args, converted)
		}
	}
}

func TestPlainRefusals(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		says string
	}{
		{"no device", []string{"--cap-add", "SYS_ADMIN"}, "--device /dev/fuse"},
		{"no capability", []string{"--device", "/dev/fuse"}, "--cap-add SYS_ADMIN"},
		{"neither", nil, "--device /dev/fuse --cap-add SYS_ADMIN"},
		{"another user without new privileges", []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--security-opt", "no-new-privileges"}, "no-new-privileges"},
		{"no other capability", []string{"--device", "/dev/fuse", "--cap-drop", "ALL", "--cap-add", "SYS_ADMIN"}, "--cap-add CHOWN --cap-add DAC_OVERRIDE"},
		{"no capability to enter the root", []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--cap-drop", "SYS_CHROOT"}, "--cap-add SYS_CHROOT"},
		{"no capability to drop one", []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--cap-drop", "SETPCAP"}, "--cap-add SETPCAP"},
		{"an unknown mode", []string{"--env", "BOOTFS_MODE=fast"}, "want auto, fuse or fill"},
		{"an unknown level", []string{"--env", "BOOTFS_LOG=loud"}, "want quiet, info or debug"},
		{"an unknown setting", []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--env", "BOOTFS_PREFETCH=sometimes"}, "BOOTFS_PREFETCH"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := docker(t, append(append([]string{"run", "--rm", "--network", "none", "--env", "BOOTFS_MODE=fuse", "--env", "BOOTFS_PREFETCH=none"}, c.args...), w.image, "true")...)
			if r.code != 125 || !strings.Contains(r.stderr, c.says) || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("exit %d, stderr %q; want exit 125 and one line with %q", r.code, r.stderr, c.says)
			}
		})
	}
}
