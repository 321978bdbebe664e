package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// inPlace says how to have what the engine itself does with the container's
// files, which are not in the engine's storage where the root is mounted.
const inPlace = "with `BOOTFS_MODE=fill` it is as with the source image"

// lifeRows are what happens to a container after it has started.
var lifeRows = []row{
	{what: "exit status", do: statuses("1", "125", "127", "137", "255")},
	{what: "`--init`, death by a signal", do: deaths("TERM", "KILL", "SEGV", "35")},
	{what: "a core dump of a child", do: ran("IMAGE", "sh", "-c", `ulimit -c unlimited; mkdir /tmp/core; cd /tmp/core; sh -c 'kill -SEGV $$'; echo $?; ls | sed 's/[0-9]//g'`)},
	{what: "`docker kill -s` of signals that the program handles", do: signalled("", func(n int) bool { return !strings.Contains(bootsOwn, fmt.Sprintf(" %d ", n)) && (n < 32 || n%9 == 1) })},
	{what: "… with `--init`", do: signalled("--init", func(n int) bool { return n == 1 || n == 10 || n == 15 || n == 28 || n == 37 })},
	{what: "… CHLD, PIPE, PROF, URG, RTMIN", do: signalled("", func(n int) bool { return strings.Contains(bootsOwn, fmt.Sprintf(" %d ", n)) }),
		differs: map[string]string{"fuse": "not passed on, as boot gets them for reasons of its own: send another one, or `docker exec ID kill -s …` to the program's own number"}},
	{what: "`docker kill -s` of signals that the program does not handle", do: unhandled},
	{what: "`docker kill -s STOP`", do: stoppedBySignal,
		differs: map[string]string{"fuse": "stops boot, and the program only when it needs boot, until `-s CONT`: use `docker pause`"}},
	{what: "`docker stop`, of a program that ends and of one that does not", do: stoppedByDocker},
	{what: "`docker restart`, with a changed file", do: restartedOnce},
	{what: "`--restart on-failure:2`", do: restartedOnFailure},
	{what: "`--restart always`, then `docker stop`", do: restartedAlways},
	{what: "`docker pause`, `docker unpause`", do: paused},
	{what: "`docker start -ai` with input", do: attached},
	{what: "`docker logs`, `-t`, `--tail`", do: logs},
	{what: "`docker logs` of a terminal", do: logsOfTerminal},
	{what: "orphans belong to the program", do: ran("IMAGE", "sh", "-c", `(sleep 600 & ); until grep PPid $(grep -lx sleep /proc/[0-9]*/comm 2>/dev/null | sed s/comm/status/) </dev/null; do sleep 0; done`)},
	{what: "`--init` reaps orphans", do: ran("--init", "IMAGE", "sh", "-c", `for i in $(seq 200); do (true & ); done; for i in $(seq 600); do grep -q '^State:.Z' /proc/[0-9]*/status || exit 0; sleep 0.1; done; echo they stay`)},
	{what: "`-m 64m`, a program that needs more", do: outOfMemory("exec tail /dev/zero")},
	{what: "`-m 64m`, a child that needs more", do: outOfMemory("tail /dev/zero; echo $?")},
	{what: "`oom_score_adj` of the program", do: ran("-m", "512m", "IMAGE", "cat", "/proc/self/oom_score_adj"),
		differs: map[string]string{"fuse": "higher, by the part of the memory limit that boot itself may need in thousandths (102 of 512 MB), on top of `--oom-score-adj`: the kernel then ends the program's processes first, as with the source image"}},
	{what: "health checks from the first moment", do: healthyAtOnce},
	{what: "`docker exec`", do: execd},
	{what: "`docker exec -u`, `-w`, `-e`, `-i`, `-t`, `-d`", do: execdWith},
	{what: "`docker exec` of what does not exist or may not be run", do: execdWrong},
	{what: "`docker exec -u` with a user that the program has added", do: execdAsAdded,
		differs: map[string]string{"fuse": "the engine looks the name up in the image: use the numbers, `-u UID:GID`"}},
	{what: "`docker exec -u UID:GID` with a user that the program has added", do: execdAsNumber},
	{what: "`docker exec ID ps`", do: inside([]string{"sleep", "600"}, `until ps -o args | grep -q '^sleep 600'; do sleep 0.1; done; ps -o pid,comm | grep -vE 'ps|grep|COMMAND|sh$|exe$'`),
		differs: map[string]string{"fuse": "shows boot as PID 1 and the program as its child, which has PID 1 in its own view. A signal to PID 1 reaches the program"}},
	{what: "`docker exec ID kill -TERM 1`", do: killedFromExec},
	{what: "`docker top`", do: top,
		differs: map[string]string{"fuse": "has a line for boot"}},
	{what: "`docker stats`, processes", do: stats,
		differs: map[string]string{"fuse": "counts boot's threads, up to 20, and its memory, 15 to 52 MB"}},
	{what: "`docker cp` of a file of the image out", do: copyOut,
		differs: map[string]string{"fuse": "not found, as the engine does not see the mounted root: `docker exec ID tar c -C DIR FILE`, or `bootfs-convert extract`; " + inPlace}},
	{what: "`docker exec ID tar c`, unpacked outside", do: tarOut},
	{what: "`docker cp` of a file into a running container", do: copyIn,
		differs: map[string]string{"fuse": "the program does not see it: `tar c FILE | docker exec -i ID tar x -C DIR`, or a volume; " + inPlace}},
	{what: "`docker exec -i ID tar x`", do: tarIn},
	{what: "`docker cp` between `docker create` and `docker start`", do: copyBeforeStart,
		differs: map[string]string{"fuse": "the program does not see it: mount the file with `-v`"}},
	{what: "`docker cp` into and out of a volume", do: copyVolume},
	{what: "`docker diff`", do: diffed,
		differs: map[string]string{
			"fuse": "does not show what the program wrote: `docker exec ID find / -xdev -newer /.dockerenv`",
			"fill": "shows the files of the image, too, as they lie in the container's own layer: `docker exec ID find / -xdev -newer /.dockerenv`"}},
	{what: "`docker exec ID find … -newer /.dockerenv`", do: inside([]string{"sh", "-c", "sleep 1.1; echo new >/srv/made; exec sleep 600"}, "while [ ! -e /srv/made ]; do sleep 0.1; done; find /srv /tmp /home -xdev -newer /.dockerenv -type f")},
	{what: "`docker commit`", do: committed,
		differs: map[string]string{"fuse": "the new image runs, but without what was written: `docker exec ID tar c … | docker import -`; " + inPlace}},
	{what: "`docker export`: the names of all files, but for those in `/.bootfs`", do: exported,
		differs: map[string]string{"fuse": "has the boot image: `docker exec ID tar c …`, or `bootfs-convert extract` for what the image has; " + inPlace}},
	{what: "`docker exec ID tar c … | docker import -`", do: imported},
}

// bootsOwn are the signals that boot cannot tell from its own. The C library
// keeps 32 and 33, and nobody catches 9 and 19.
const bootsOwn = " 13 17 23 27 34 "

func statuses(codes ...string) func(*testing.T, *subject) string {
	var all []func(*testing.T, *subject) string
	for _, c := range codes {
		all = append(all, ran("IMAGE", "sh", "-c", "exit "+c))
	}
	return each(all...)
}

func deaths(signals ...string) func(*testing.T, *subject) string {
	var all []func(*testing.T, *subject) string
	for _, s := range signals {
		all = append(all, ran("--init", "IMAGE", "sh", "-c", "kill -"+s+" $$; sleep 5"))
	}
	return each(all...)
}

// says waits until a container has written want to its stdout.
func says(t *testing.T, id, want string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the container says %q", want), func() bool { return strings.Contains(docker(t, "logs", id).stdout, want) })
}

// ended waits for the end of a container and returns all that it said.
func ended(t *testing.T, id string) string {
	t.Helper()
	code := docker(t, "wait", id)
	return code.stdout + docker(t, "logs", id).String()
}

// inside is a row's do that runs a shell command by docker exec, in a container
// with a command of its own.
func inside(command []string, script string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		id := s.start(t, append([]string{s.image}, command...)...)
		r := docker(t, "exec", id, "sh", "-c", script)
		r.stdout = numbers.ReplaceAllString(r.stdout, "N")
		return r.String()
	}
}

var numbers = regexp.MustCompile(`\b[0-9]+\b`)

// signalled sends the signals to a program that handles all that can be.
func signalled(flag string, which func(n int) bool) func(*testing.T, *subject) string {
	// It has no children: their ends are signals too.
	const program = `mkfifo /tmp/never
for s in $(seq 64); do
	case $s in 9|19|32|33) ;; *) trap "echo got $s" $s;; esac
done
echo up
while true; do read -t 1 x <>/tmp/never; done`
	return func(t *testing.T, s *subject) string {
		args := []string{s.image, "sh", "-c", program}
		if flag != "" {
			args = append([]string{flag}, args...)
		}
		id := s.start(t, args...)
		says(t, id, "up\n")
		for n := 1; n <= 64; n++ {
			if n == 9 || n == 19 || n == 32 || n == 33 || !which(n) {
				continue
			}
			docker(t, "kill", "--signal", strconv.Itoa(n), id)
		}
		docker(t, "kill", "--signal", "64", id)
		says(t, id, "got 64\n")
		// Signals that wait together arrive in any order.
		lines := strings.Split(docker(t, "logs", id).stdout, "\n")
		slices.Sort(lines)
		return strings.Join(slices.Compact(lines), "\n")
	}
}

func unhandled(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", "echo up; exec sleep 600")
	says(t, id, "up\n")
	for _, n := range []string{"HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "TERM", "TSTP", "TTIN", "IO", "RTMIN+5"} {
		docker(t, "kill", "--signal", n, id)
	}
	running := docker(t, "inspect", "--format", "{{.State.Status}}", id).String()
	docker(t, "kill", id)
	return running + ended(t, id)
}

func stoppedBySignal(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", "mkfifo /tmp/never; while true; do echo tick; read -t 1 x <>/tmp/never; done")
	says(t, id, "tick\n")
	docker(t, "kill", "--signal", "STOP", id)
	ticks := func() int { return strings.Count(docker(t, "logs", id).stdout, "tick\n") }
	// What the program said before may come to the log after.
	first, last, still := ticks(), ticks(), time.Now()
	for last < first+5 && time.Since(still) < 5*time.Second {
		time.Sleep(100 * time.Millisecond)
		if n := ticks(); n > last {
			last, still = n, time.Now()
		}
	}
	docker(t, "kill", "--signal", "CONT", id)
	eventually(t, "the program goes on", func() bool { return ticks() > last })
	return fmt.Sprintf("stood still: %v\n", last < first+5)
}

func stoppedByDocker(t *testing.T, s *subject) string {
	obeys := s.start(t, s.image, "testapp", "sleep")
	says(t, obeys, "ready\n")
	ignores := s.start(t, s.image, "sh", "-c", "echo up; exec sleep 600")
	says(t, ignores, "up\n")
	out := docker(t, "stop", "--time", "20", obeys).String() + docker(t, "stop", "--time", "1", ignores).String()
	return withoutIDs(out) + ended(t, obeys) + ended(t, ignores)
}

func restartedOnce(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", "cat /srv/made; echo made >/srv/made; exec testapp sleep")
	says(t, id, "ready\n")
	out := docker(t, "restart", "--time", "20", id).String()
	says(t, id, "made\nready\n")
	docker(t, "stop", "--time", "20", id)
	return withoutIDs(out) + ended(t, id)
}

func restartedOnFailure(t *testing.T, s *subject) string {
	id := s.start(t, "--restart", "on-failure:2", s.image, "sh", "-c", "echo run; exit 3")
	state := func() string {
		return docker(t, "inspect", "--format", "{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}", id).stdout
	}
	eventually(t, "it has ended", func() bool { return strings.HasPrefix(state(), "exited 2") })
	return state() + docker(t, "logs", id).String()
}

func restartedAlways(t *testing.T, s *subject) string {
	id := s.start(t, "--restart", "always", s.image, "sh", "-c", "echo run; sleep 0.1")
	eventually(t, "it has started thrice", func() bool { return strings.Count(docker(t, "logs", id).stdout, "run\n") >= 3 })
	docker(t, "stop", "--time", "0", id)
	return docker(t, "inspect", "--format", "{{.State.Status}}", id).String()
}

func paused(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", "echo up; exec sleep 600")
	says(t, id, "up\n")
	// The kernel freezes no process that waits for a file, as one that starts does.
	docker(t, "exec", id, "true").want(t, "")
	var b strings.Builder
	for _, args := range [][]string{{"pause", id}, {"inspect", "--format", "{{.State.Status}}", id}, {"exec", id, "true"}, {"unpause", id}, {"exec", id, "echo", "goes on"}} {
		b.WriteString(docker(t, args...).String())
	}
	return withoutIDs(b.String())
}

func attached(t *testing.T, s *subject) string {
	id := s.create(t, "--interactive", s.image, "sh", "-c", "read a; echo got $a; cat; exit 5")
	return dockerWith(t, strings.NewReader("first\nsecond\n"), "start", "--attach", "--interactive", id).String()
}

const talk = "for i in 1 2 3; do echo out $i; sleep 0.1; echo err $i >&2; sleep 0.1; done"

var logTime = regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\dT[\d:.]+Z`)

func logs(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", talk)
	out := ended(t, id)
	for _, flag := range []string{"--timestamps", "--tail=1", "--since=1h"} {
		r := docker(t, "logs", flag, id)
		if flag == "--tail=1" {
			r = result{stdout: r.stdout + r.stderr} // the last line may be of either
			r.stdout = fmt.Sprintln(strings.Count(r.stdout, "\n"), "line")
		}
		out += logTime.ReplaceAllString(r.String(), "TIME")
	}
	return out
}

func logsOfTerminal(t *testing.T, s *subject) string {
	return ended(t, s.start(t, "--tty", s.image, "sh", "-c", talk))
}

func outOfMemory(program string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		var out, killed string
		// The engine hears of it in its own time, and with the end of the container
		// now and then not at all.
		for range 4 {
			id := s.start(t, "--memory", "64m", "--memory-swap", "64m", s.image, "sh", "-c", program)
			out = ended(t, id)
			for range 20 {
				if killed = docker(t, "inspect", "--format", "{{.State.OOMKilled}}", id).stdout; killed == "true\n" {
					return out + killed
				}
				time.Sleep(100 * time.Millisecond)
			}
		}
		return out + killed
	}
}

func healthyAtOnce(t *testing.T, s *subject) string {
	id := s.start(t, "--health-cmd", "cat /srv/app/data", "--health-interval", "100ms", s.image, "sleep", "600")
	eventually(t, "the container is healthy", func() bool {
		return docker(t, "inspect", "--format", "{{.State.Health.Status}}", id).stdout == "healthy\n"
	})
	return docker(t, "inspect", "--format", "{{with index .State.Health.Log 0}}{{.ExitCode}} {{.Output}}{{end}}", id).String()
}

func execd(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sleep", "600")
	var b strings.Builder
	for _, script := range []string{
		"id; pwd; umask; env | grep -v ^BOOTFS_ | sort; ls /", "cat /etc/passwd | wc -l", "exit 3", "kill -TERM $$; sleep 5", "kill -KILL $$", "echo err >&2",
	} {
		b.WriteString(docker(t, "exec", id, "sh", "-c", script).String())
	}
	return b.String()
}

func execdWith(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sleep", "600")
	var b strings.Builder
	for _, args := range [][]string{
		{"--user", "app", id, "id"},
		{"--user", "nobody", id, "id"},
		{"--user", "1234:29", id, "id"},
		{"--workdir", "/srv", id, "pwd"},
		{"--workdir", "/not/there", id, "pwd"},
		{"--env", "A=b c", id, "sh", "-c", "echo $A"},
		{"--tty", id, "sh", "-c", "tty; [ -t 0 ] && echo terminal; stty size"},
		{"--detach", id, "sh", "-c", "echo detached >/tmp/detached"},
	} {
		b.WriteString(docker(t, append([]string{"exec"}, args...)...).String())
	}
	b.WriteString(dockerWith(t, strings.NewReader("input\n"), "exec", "--interactive", id, "cat").String())
	eventually(t, "the detached command has run", func() bool { return docker(t, "exec", id, "cat", "/tmp/detached").stdout == "detached\n" })
	return withoutIDs(b.String())
}

func execdWrong(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sleep", "600")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	var b strings.Builder
	for _, program := range []string{"no-such-program", "/no/such/program", "/etc/passwd", "/srv"} {
		b.WriteString(docker(t, "exec", id, program).String())
	}
	return withoutIDs(b.String())
}

const addUser = "echo added:x:2345:2345::/:/bin/sh >>/etc/passwd && echo up; exec sleep 600"

func execdAsAdded(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", addUser)
	says(t, id, "up\n")
	return withoutIDs(docker(t, "exec", "--user", "added", id, "id").String())
}

func execdAsNumber(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", addUser)
	says(t, id, "up\n")
	return docker(t, "exec", "--user", "2345:2345", id, "id").String()
}

func killedFromExec(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "testapp", "sleep")
	says(t, id, "ready\n")
	// Detached: its own status is chance, as the end of the container ends it too.
	return docker(t, "exec", "--detach", id, "kill", "-TERM", "1").String() + ended(t, id)
}

func top(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "testapp", "sleep")
	says(t, id, "ready\n")
	r := docker(t, "top", id, "-o", "pid,args")
	r.stdout = strings.Join(strings.Fields(numbers.ReplaceAllString(r.stdout, "N")), " ")
	return r.String()
}

func stats(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", "echo up; exec sleep 600")
	says(t, id, "up\n")
	return docker(t, "stats", "--no-stream", "--format", "{{.PIDs}}", id).String()
}

// tree returns the files below dir with their contents.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s: %q\n", strings.TrimPrefix(path, dir), content)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// copyFiles is docker cp. It says what it has done on stderr, with the paths.
func copyFiles(t *testing.T, from, to string) result {
	t.Helper()
	return result{code: docker(t, "cp", from, to).code}
}

func copyOut(t *testing.T, s *subject) string {
	dir := t.TempDir()
	// The engine's storage has the files once a fill is done.
	id := s.start(t, s.image, "sh", "-c", "echo up; exec sleep 600")
	says(t, id, "up\n")
	r := copyFiles(t, id+":/opt/tools", dir)
	return r.String() + tree(t, dir)
}

func tarOut(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sleep", "600")
	r := docker(t, "exec", id, "tar", "c", "-C", "/opt", "tools")
	dir := t.TempDir()
	unpack(t, r.stdout, dir)
	return fmt.Sprintf("%d %q\n", r.code, r.stderr) + tree(t, dir)
}

func unpack(t *testing.T, archive, dir string) {
	t.Helper()
	cmd := exec.Command("tar", "x", "-C", dir)
	cmd.Stdin = strings.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
}

// fileToCopy makes a file called "in" and returns its path.
func fileToCopy(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(path, []byte("from outside\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func copyIn(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sh", "-c", "echo up; exec sleep 600")
	says(t, id, "up\n") // a fill has made /srv
	return copyFiles(t, fileToCopy(t), id+":/srv/in").String() + docker(t, "exec", id, "cat", "/srv/in").String()
}

func tarIn(t *testing.T, s *subject) string {
	archive, err := exec.Command("tar", "c", "-C", filepath.Dir(fileToCopy(t)), "in").Output()
	if err != nil {
		t.Fatal(err)
	}
	id := s.start(t, s.image, "sleep", "600")
	return dockerWith(t, bytes.NewReader(archive), "exec", "--interactive", id, "tar", "x", "-C", "/srv").String() + docker(t, "exec", id, "cat", "/srv/in").String()
}

func copyBeforeStart(t *testing.T, s *subject) string {
	id := s.create(t, s.image, "cat", "/in")
	out := copyFiles(t, fileToCopy(t), id+":/in").String()
	return out + docker(t, "start", "--attach", id).String()
}

func copyVolume(t *testing.T, s *subject) string {
	id := s.start(t, "--volume", "/data", s.image, "sleep", "600")
	in := copyFiles(t, fileToCopy(t), id+":/data/in")
	read := docker(t, "exec", id, "sh", "-c", "cat /data/in; echo back >/data/out")
	dir := t.TempDir()
	out := copyFiles(t, id+":/data/out", dir)
	return in.String() + read.String() + out.String() + tree(t, dir)
}

// writes starts a container that has written /srv/made.
func writes(t *testing.T, s *subject) (id string) {
	id = s.start(t, s.image, "sh", "-c", "echo new >/srv/made; echo up; exec sleep 600")
	says(t, id, "up\n")
	return id
}

func diffed(t *testing.T, s *subject) string {
	id := writes(t, s)
	lines := slices.Sorted(strings.Lines(docker(t, "diff", id).stdout))
	if s.name == "fill" && !slices.Contains(lines, "A /srv/made\n") {
		t.Errorf("docker diff lacks what the program wrote:\n%s", strings.Join(lines, ""))
	}
	return strings.Join(lines, "")
}

func committed(t *testing.T, s *subject) string {
	id := writes(t, s)
	image := strings.TrimSpace(docker(t, "commit", id).stdout)
	t.Cleanup(func() { forget(t, image) })
	return s.run(t, image, "cat", "/srv/made", "/opt/tools/../../etc/group").String()
}

func exported(t *testing.T, s *subject) string {
	id := writes(t, s)
	cmd := exec.Command("tar", "t")
	cmd.Stdin = strings.NewReader(docker(t, "export", id).stdout)
	names, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := slices.Sorted(strings.Lines(string(names)))
	return strings.Join(slices.DeleteFunc(lines, func(name string) bool { return strings.HasPrefix(name, ".bootfs/") }), "")
}

func imported(t *testing.T, s *subject) string {
	id := writes(t, s)
	archive := docker(t, "exec", id, "sh", "-c", "cd /; tar c $(ls | grep -vE '^(dev|proc|sys)$')").stdout
	r := dockerWith(t, strings.NewReader(archive), "import", "-")
	image := strings.TrimSpace(r.stdout)
	t.Cleanup(func() { forget(t, image) })
	return fmt.Sprintln(r.code) + docker(t, "run", "--rm", "--network", "none", image, "sh", "-c", "cat /srv/made; ls /; ls -l /opt/tools | wc -l").String()
}

// forget removes an image once its containers have been.
func forget(t *testing.T, image string) {
	if out, err := w.docker.Command(context.Background(), "rmi", "--force", image).CombinedOutput(); err != nil {
		t.Errorf("docker rmi: %v\n%s", err, out)
	}
}
