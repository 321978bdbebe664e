package e2e

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// damaged is a cache in which each chunk that files of the image need is damaged, so
// that boot has a line to say of each that is read.
func damaged(t *testing.T, program string) (cache string, chunks int) {
	t.Helper()
	cache = t.TempDir()
	run(t, "--env", "BOOTFS_PREFETCH=none", "--volume", cache+":/.bootfs/rootfs.castr", w.image, "sh", "-c", program+" >/dev/null").want(t, "")
	err := filepath.WalkDir(cache, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, ".cacnk") {
			return err
		}
		chunks++
		if err := os.Chmod(name, 0o644); err != nil {
			return err
		}
		return os.WriteFile(name, []byte("damaged"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	return cache, chunks
}

// parentOf returns the parent of a process.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // behind the name
	parent, err := strconv.Atoi(strings.Fields(rest)[1])
	if err != nil {
		t.Fatal(err)
	}
	return parent
}

// TestNobodyReadsTheLog: the pipe at stderr is full and its reader stands still, while
// boot has hundreds of lines to say. The program reads on, and the container ends with
// it.
func TestNobodyReadsTheLog(t *testing.T) {
	const program = "cat /usr/lib/python3/dist-packages/numpy/core/*.so /usr/bin/*"
	const sum = program + " | sha256sum"
	want := docker(t, "run", "--rm", w.source, "sh", "-c", sum).stdout
	cache, chunks := damaged(t, program)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	id := start(t, "--env", "BOOTFS_PREFETCH=none", "--volume", cache+":/.bootfs/rootfs.castr", "--volume", dir+":/up", w.image, "sh", "-c",
		"touch /up/up; until [ -e /up/go ]; do sleep 0.1; done; timeout 2 sh -c 'cat /dev/zero >&2'; { "+sum+"; } >/up/part; mv /up/part /up/sum; exit 7")
	exists := func(name string) func() bool {
		return func() bool {
			_, err := os.Stat(filepath.Join(dir, name))
			return err == nil
		}
	}
	eventually(t, "the program is up", exists("up"))
	boot, err := strconv.Atoi(strings.TrimSpace(docker(t, "inspect", "--format", "{{.State.Pid}}", id).stdout))
	if err != nil {
		t.Fatal(err)
	}
	shim := parentOf(t, boot)
	if err := unix.Kill(shim, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer unix.Kill(shim, unix.SIGCONT)
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the program has read", exists("sum"))
	if got, err := os.ReadFile(filepath.Join(dir, "sum")); err != nil || string(got) != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	eventually(t, "boot has ended", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", boot))
		return err != nil || strings.Contains(string(stat), ") Z ") // the shim reaps it later
	})
	if err := unix.Kill(shim, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	docker(t, "wait", id).want(t, "7\n")
	t.Logf("%d chunks were damaged", chunks)
}

// TestLogFormat: with BOOTFS_LOG_FORMAT=json each of boot's lines is an object that says
// whose it is, and by default it begins with a prefix.
func TestLogFormat(t *testing.T) {
	const program = "cat /usr/bin/env"
	cache, _ := damaged(t, program)
	r := run(t, "--env", "BOOTFS_LOG_FORMAT=json", "--env", "BOOTFS_LOG=info", "--env", "BOOTFS_PREFETCH=none", "--volume", cache+":/.bootfs/rootfs.castr", w.image,
		"sh", "-c", program+" >/dev/null; env | grep BOOTFS")
	if r.code != 1 || r.stdout != "" {
		t.Errorf("%+v, want no variable for the program", r)
	}
	damages := 0
	for line := range strings.Lines(r.stderr) {
		var said struct{ Logger, Level, Msg, Time, Chunk string }
		if err := json.Unmarshal([]byte(line), &said); err != nil || said.Logger != "bootfs" || said.Level == "" || said.Time == "" || said.Msg == "" {
			t.Errorf("%v in %q", err, line)
		}
		if said.Level == "WARN" && len(said.Chunk) == 64 && strings.Contains(said.Msg, "corrupt chunk in the cache") {
			damages++
		}
	}
	if damages == 0 {
		t.Errorf("got %q, want lines about chunks", r.stderr)
	}
	r = run(t, "--env", "BOOTFS_LOG_FORMAT=xml", w.image, "true")
	if r.code != 125 || r.stderr != "bootfs: BOOTFS_LOG_FORMAT=\"xml\": want text or json\n" {
		t.Errorf("%+v", r)
	}
}
