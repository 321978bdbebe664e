package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// noSockets is a seccomp profile with which a container ends as soon as one of
// its processes opens a socket that could lead to a network, be it to look up a
// name.
func noSockets(t *testing.T) (flag []string) {
	t.Helper()
	type arg struct {
		Index int    `json:"index"`
		Value int    `json:"value"`
		Op    string `json:"op"`
	}
	type rule struct {
		Names  []string `json:"names"`
		Action string   `json:"action"`
		Args   []arg    `json:"args"`
	}
	var rules []rule
	for _, family := range []int{unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET} {
		rules = append(rules, rule{[]string{"socket"}, "SCMP_ACT_KILL_PROCESS", []arg{{0, family, "SCMP_CMP_EQ"}}})
	}
	b, err := json.Marshal(map[string]any{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "seccomp.json")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return []string{"--security-opt", "seccomp=" + file}
}

// preload fills a cache with all chunks of an image.
func preload(t *testing.T, image string, more ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if out, err := w.command(append([]string{"preload", "-q", image, "--cache", dir}, more...)...).CombinedOutput(); err != nil {
		t.Fatalf("preload: %v\n%s", err, out)
	}
	return dir
}

// namesChunk matches a line of boot that says of which chunk it is.
var namesChunk = regexp.MustCompile(`chunk [0-9a-f]{64}: `)

// TestOffline forbids the network to containers that could use it: with a
// preloaded cache they open no socket, without one they end at once.
func TestOffline(t *testing.T) {
	watched := append([]string{"run", "--rm", "--network", "host"}, noSockets(t)...)
	const bySIGSYS = 128 + int(unix.SIGSYS)
	if r := docker(t, append(watched, "--env", "BOOTFS_MODE=fill", w.image, "true")...); r.code != bySIGSYS {
		t.Errorf("a boot that fetches: exit %d, want %d as it opens a socket\n%s", r.code, bySIGSYS, r.stderr)
	}
	cache := []string{"--volume", preload(t, w.image) + ":/.bootfs/rootfs.castr"}
	for mode, flags := range map[string][]string{
		"fuse": {"--env", "BOOTFS_MODE=fuse", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN"},
		"fill": {"--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet"},
	} {
		t.Run(mode, func(t *testing.T) {
			flags := append(append(watched, flags...), "--env", "BOOTFS_OFFLINE=1")
			docker(t, append(append(flags, cache...), w.image, "python3", "-c", "import ssl, os; print([v for v in os.environ if v.startswith('BOOTFS')])")...).want(t, "[]\n")

			r := docker(t, append(flags, w.image, "python3", "-c", "print(1)")...)
			if r.code != 125 || strings.Count(r.stderr, "\n") != 1 || !namesChunk.MatchString(r.stderr) ||
				!strings.Contains(r.stderr, "no network is used: fill the cache with bootfs-convert preload IMAGE --cache DIR, and add -v DIR:/.bootfs/rootfs.castr") {
				t.Errorf("without a cache: exit %d, want 125 and one line that says what to do, got:\n%s", r.code, r.stderr)
			}
		})
	}
	if r := docker(t, append(watched, "--env", "BOOTFS_OFFLINE=yes", w.image, "true")...); r.code != 125 || r.stderr != "bootfs: BOOTFS_OFFLINE=\"yes\": want 1, or 0\n" {
		t.Errorf("a setting that cannot be read: exit %d, %q", r.code, r.stderr)
	}
}
