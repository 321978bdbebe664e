package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// An otherEngine runs the small image: the source or the converted one, with
// arguments as docker run has them. An engine that has an argument under
// another name translates it.
type otherEngine struct {
	name    string
	dir     string // what it keeps lies below
	command func(ctx context.Context, args ...string) *exec.Cmd
	image   func(s *engineSubject) string
	all     []string // flags of every container
	store   []string // flags of a converted one: the way to its chunks
	ctr     *testenv.Containerd
}

// An engineSubject is an image in an engine: the source or the converted one,
// with the flags of its mode.
type engineSubject struct {
	*otherEngine
	name  string
	flags []string
}

// call runs the engine's client.
func (e *otherEngine) call(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := e.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(cmd.Args, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// container is the name of a row's container, unlike any other's.
func (s *engineSubject) container(t *testing.T) string {
	return fmt.Sprintf("row-%x", sha256.Sum256([]byte(t.Name())))[:20]
}

// run runs a container to its end: docker run --rm with flags, then the image
// with args.
func (s *engineSubject) run(t *testing.T, flags []string, args ...string) result {
	t.Helper()
	log := s.output(t)
	return log.addTo(t, s.call(t, s.runLine(t, log, []string{"--rm"}, flags, args)...))
}

// start runs a container in the background until the test ends and returns its
// name.
func (s *engineSubject) start(t *testing.T, flags []string, args ...string) string {
	t.Helper()
	if r := s.call(t, s.runLine(t, s.output(t), []string{"--detach"}, flags, args)...); r.code != 0 {
		t.Fatalf("exit %d: %s", r.code, r.stderr)
	}
	name := s.container(t)
	t.Cleanup(func() {
		remove := []string{"rm", "--force", "--volumes", name}
		kill := []string{"kill", "--signal", "KILL", name} // or podman waits for the end of what ignores SIGTERM
		if s.ctr != nil {
			remove = []string{"container", "rm", name}
			kill = []string{"task", "rm", "--force", name}
		}
		_ = s.command(context.Background(), kill...).Run() // it may have ended
		if out, err := s.command(context.Background(), remove...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(remove, " "), err, out)
		}
	})
	return name
}

func (s *engineSubject) runLine(t *testing.T, log outputFile, first, flags, args []string) []string {
	line := slices.Concat([]string{"run"}, first, s.all, s.flags, flags)
	if s.ctr == nil {
		return slices.Concat(line, []string{"--name", s.container(t), s.image(s)}, args)
	}
	if s.name == "fuse" {
		// ctr makes no volumes.
		line = append(line, "--volume", openDir(t)+":/.bootfs/rw")
	}
	return slices.Concat(forCtr(line), log.flags(), []string{s.image(s), s.container(t)}, args)
}

// An outputFile is the path of a file that gets what a program under ctr writes,
// "" in other engines: ctr itself loses the output of a program that ends soon.
type outputFile string

// outputWait is how long output may take to come; a program that writes none
// takes as long.
const outputWait = 2 * time.Second

func (s *engineSubject) output(t *testing.T) outputFile {
	if s.ctr == nil {
		return ""
	}
	return outputFile(filepath.Join(openDir(t), "output"))
}

func (f outputFile) flags() []string { return []string{"--log-uri", "file://" + string(f)} }

// addTo puts the output into r.
func (f outputFile) addTo(t *testing.T, r result) result {
	t.Helper()
	if f == "" {
		return r
	}
	// The file is written by another process than the one that has ended.
	for end := time.Now().Add(outputWait); ; time.Sleep(outputWait / 20) {
		b, err := os.ReadFile(string(f))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if len(b) > 0 || time.Now().After(end) {
			r.stdout += string(b)
			return r
		}
	}
}

// forCtr gives docker's flags the names that ctr has for them.
func forCtr(docker []string) []string {
	names := map[string]string{"--workdir": "--cwd"}
	var line []string
	for i := 0; i < len(docker); i++ {
		flag := docker[i]
		switch flag {
		case "--volume":
			i++
			from, to, _ := strings.Cut(docker[i], ":")
			line = append(line, "--mount", "type=bind,src="+from+",dst="+to+",options=rbind:rw")
		case "--cap-add":
			i++
			line = append(line, flag, "CAP_"+docker[i])
		default:
			if name, ok := names[flag]; ok {
				flag = name
			}
			line = append(line, flag)
		}
	}
	return line
}

// openDir makes a directory that everybody may write to and come to, for as
// long as the test runs.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "open")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// exec runs a program in a running container.
func (s *engineSubject) exec(t *testing.T, flags []string, container string, args ...string) result {
	t.Helper()
	line, log := []string{"exec"}, s.output(t)
	if s.ctr != nil {
		line = append([]string{"task", "exec", "--exec-id", fmt.Sprint("exec-", time.Now().UnixNano())}, log.flags()...)
	}
	return log.addTo(t, s.call(t, slices.Concat(line, flags, []string{container}, args)...))
}

// kill sends a signal to a container.
func (s *engineSubject) kill(t *testing.T, signal, container string) {
	t.Helper()
	line := []string{"kill"}
	if s.ctr != nil {
		line = []string{"task", "kill"}
	}
	if r := s.call(t, append(line, "--signal", signal, container)...); r.code != 0 {
		t.Fatalf("kill: exit %d: %s", r.code, r.stderr)
	}
}

// An engineRow is a thing that users do, with an image in another engine.
type engineRow struct {
	what string
	// do returns what a user sees of it.
	do func(t *testing.T, s *engineSubject) string
	// fill says that the converted image is also filled in place, without flags.
	fill bool
	// without are the engines that have no such thing.
	without []string
	// differs has what is different in an engine, by its name.
	differs map[string]string
}

const (
	remapped = "dockerd with userns-remap"
	rootful  = "podman"
	rootless = "rootless podman"
	plainCtr = "containerd's ctr"
)

const podmanUnshare = "refused, as in Docker; `-e BOOTFS_KEEP_SYS_ADMIN=1` leaves it to podman's filter"

var engineNames = []string{remapped, rootful, rootless, plainCtr}

// runs is a row's do that runs the image once.
func runs(flags []string, args ...string) func(*testing.T, *engineSubject) string {
	return func(t *testing.T, s *engineSubject) string { return s.run(t, flags, args...).String() }
}

// in is a row's do that runs a shell script.
func in(script string, flags ...string) func(*testing.T, *engineSubject) string {
	return runs(flags, "sh", "-c", script)
}

var engineRows = []engineRow{
	{what: "a command", do: runs(nil, "echo", "hello")},
	{what: "`--entrypoint`", do: runs([]string{"--entrypoint", "/opt/tools/script"}, "a b", "c"), without: []string{plainCtr}},
	{what: "`-u` with name, number, group; supplementary groups", fill: true, without: []string{plainCtr}, do: func(t *testing.T, s *engineSubject) string {
		var b strings.Builder
		for _, user := range []string{"app", "1001", "1234:50"} {
			b.WriteString(s.run(t, []string{"--user", user}, "sh", "-c", "id; tail -n 2 /etc/passwd").String())
		}
		return b.String()
	}},
	{what: "`-w` to a directory of the image", do: runs([]string{"--workdir", "/srv/app"}, "sh", "-c", "pwd; ls -l")},
	{what: "`-e`", do: in("env | grep -v ^HOSTNAME | sort", "--env", "GREETING=hello")},
	{what: "exit status", do: func(t *testing.T, s *engineSubject) string {
		var b strings.Builder
		for _, script := range []string{"exit 0", "exit 7", "exit 255", "exec /no/such/program", "exec /opt/tools/text", "sh -c 'kill -9 $$'"} {
			// What says nothing is waited for: see outputWait.
			fmt.Fprintln(&b, script, s.run(t, nil, "sh", "-c", "echo; "+script).code)
		}
		return b.String()
	}},
	{what: "`exec`", do: func(t *testing.T, s *engineSubject) string {
		c := s.start(t, nil, "sleep", "600")
		r := result{}
		eventually(t, "the container runs", func() bool {
			r = s.exec(t, nil, c, "sh", "-c", "id; pwd; cat /opt/tools/script; ls -A / | grep -v bootfs; exit 3")
			return r.code == 3
		})
		return r.String()
	}},
	{what: "SIGTERM to a program with a handler", do: func(t *testing.T, s *engineSubject) string {
		return s.ended(t, "TERM", "trap 'echo ending; exit 9' TERM; touch /up/up; echo up; while :; do sleep 0.1; done")
	}},
	{what: "SIGKILL", do: func(t *testing.T, s *engineSubject) string {
		return s.ended(t, "KILL", "touch /up/up; echo up; exec sleep 600")
	}},
	{what: "`restart` keeps what was written", without: []string{plainCtr}, do: func(t *testing.T, s *engineSubject) string {
		c := s.start(t, nil, "sh", "-c", "echo started >> /home/count; exec sleep 600")
		for n := range 2 {
			eventually(t, "it has counted", func() bool {
				return strings.Count(s.exec(t, nil, c, "cat", "/home/count").stdout, "started") == n+1
			})
			if n == 0 {
				if r := s.call(t, "restart", "--time", "0", c); r.code != 0 {
					t.Fatal(r.stderr)
				}
			}
		}
		return "two starts"
	}},
	{what: "`-v`", do: func(t *testing.T, s *engineSubject) string {
		dir := openDir(t)
		said := s.run(t, []string{"--volume", dir + ":/srv/new/place"}, "sh", "-c", "echo text > /srv/new/place/file; ls /srv/new/place /srv/app; umask").String()
		b, err := os.ReadFile(filepath.Join(dir, "file"))
		return fmt.Sprint(said, string(b), err)
	}},
	{what: "`-v` with an empty volume, which gets the image's content", without: []string{plainCtr}, do: func(t *testing.T, s *engineSubject) string {
		return s.run(t, []string{"--volume", s.container(t) + ":/vol/full"}, "sh", "-c", `find /vol/full -exec stat -c '%n %F %a %u:%g %s' {} + | sort`).String()
	}},
	{what: "files, their modes, owners and links", fill: true, do: in(
		`find / -xdev \( -path /.bootfs -o -path /proc -o -path /sys -o -path /dev -o -name .dockerenv -o -name .containerenv -o -name mtab \) -prune -o ! -path / -exec stat -c '%n %F %a %u:%g %h' {} + 2>&1 | sed '/directory/s/ [0-9]*$//' | sort; for l in /opt/current /opt/dangling /etc/mtab; do readlink $l; done`)},
	{what: "a writable root: copy-up, removal, renames", fill: true, do: in(`
		exec 2>&1
		echo more >> /opt/tools/script; cat /opt/tools/script
		rm -r /vol/full; ls /vol; mkdir /vol/full; ls -lA /vol/full
		mv /srv/app/data /srv/app/data.old && echo new > /srv/app/data && cat /srv/app/data.old /srv/app/data
		mv /opt/tools /opt/moved; ls /opt /opt/moved
		cp /bin/busybox /bin/busybox.new && mv /bin/busybox.new /bin/busybox && busybox echo replaced
		chmod 4711 /opt/moved/plain; chown 7:8 /opt/moved/plain; stat -c '%a %u:%g' /opt/moved/plain
		chown -R 1000:1000 /srv && stat -c '%n %u:%g' /srv /srv/*
		ln /etc/passwd /etc/passwd.link; stat -c %h /etc/passwd; ln -s a /tmp/b; mkfifo /tmp/fifo; ls /tmp
		truncate -s 5 /etc/os-release; cat /etc/os-release`)},
	{what: "set-user-ID programs and file capabilities", fill: true, do: in(`testapp-setuid status | grep -E '^(Uid|Gid|Cap...):'; testapp-netraw status | grep -E '^(Uid|Cap...):'`)},
	{what: "the same of a user", without: []string{plainCtr}, do: in(`testapp-setuid status | grep -E '^(Uid|Gid|Cap...):'; testapp-netraw status | grep -E '^(Uid|Cap...):'`, "--user", "app")},
	{what: "capabilities, processes, descriptors, masks", fill: true, do: in(`
		grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' /proc/self/status
		echo $$; cat /proc/[0-9]*/comm; ls /proc/self/fd
		mount -t tmpfs none /mnt 2>/dev/null && echo mounted
		grep -E ' /(proc|sys)/' /proc/self/mountinfo | cut -d' ' -f5,6 | sort`)},
	{what: "`-t`", without: []string{plainCtr}, do: in("tty; stty size </dev/tty >/dev/null && echo a terminal of its own", "--tty")},
	{what: "`--read-only`", do: in("exec 2>&1; touch /x; touch /dev/shm/y && echo shm", "--read-only")},
	{what: "`--tmpfs` over a directory of the image", without: []string{plainCtr}, do: in("ls -A /srv; grep -c ' /srv ' /proc/self/mountinfo", "--tmpfs", "/srv")},
	{what: "a user namespace of the program's own", do: in("unshare -U true 2>/dev/null && echo made"), differs: map[string]string{
		rootful: podmanUnshare, rootless: podmanUnshare,
	}},
	{what: "the same with `-e BOOTFS_KEEP_SYS_ADMIN=1`", without: []string{remapped, plainCtr}, do: in("unshare -U true 2>/dev/null && echo made", "--env", "BOOTFS_KEEP_SYS_ADMIN=1")},
}

// ended runs a script, which makes /up/up when it is up, sends it a signal and returns what it
// has said and its exit status.
func (s *engineSubject) ended(t *testing.T, signal, script string) string {
	t.Helper()
	dir := openDir(t)
	done := make(chan result, 1)
	go func() {
		done <- s.run(t, []string{"--volume", dir + ":/up"}, "sh", "-c", script)
	}()
	eventually(t, "the program is up", func() bool {
		_, err := os.Stat(filepath.Join(dir, "up"))
		return err == nil
	})
	s.kill(t, signal, s.container(t))
	return (<-done).String()
}

// TestOtherEngines runs the source and the converted image in engines other
// than an ordinary dockerd and compares what a user sees.
func TestOtherEngines(t *testing.T) {
	t.Parallel()
	var running sync.WaitGroup
	for _, name := range engineNames {
		running.Go(func() { t.Run(name, func(t *testing.T) { compareIn(t, startEngine(t, name)) }) })
	}
	running.Wait()
}

// compareIn runs the rows in an engine.
func compareIn(t *testing.T, e *otherEngine) {
	subjects := []*engineSubject{
		{otherEngine: e, name: "source"},
		{otherEngine: e, name: "fuse", flags: slices.Concat(e.store, []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--env", "BOOTFS_MODE=fuse"})},
		{otherEngine: e, name: "fill", flags: slices.Concat(e.store, []string{"--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet"})},
	}
	for _, r := range engineRows {
		if slices.Contains(r.without, e.name) {
			continue
		}
		t.Run(r.what, func(t *testing.T) {
			if r.fill {
				r.compare(t, subjects)
			} else {
				r.compare(t, subjects[:2])
			}
		})
	}
	t.Run("without flags", func(t *testing.T) {
		bare := &engineSubject{otherEngine: e, name: "bare", flags: slices.Concat(e.store, []string{"--env", "BOOTFS_MODE=fuse"})}
		says := map[string]string{remapped: "to docker run\n", rootful: "to podman run\n", rootless: "to podman run\n", plainCtr: "to docker run (what ctr"}
		var r result
		for range 5 { // ctr loses all output now and then
			if r = bare.run(t, nil, "true"); r.stdout+r.stderr != "" {
				break
			}
		}
		if r.code != 125 || !strings.Contains(r.stdout+r.stderr, "add --device /dev/fuse --cap-add SYS_ADMIN "+says[e.name]) {
			t.Errorf("%+v; want exit 125 and the flags", r)
		}
	})
	if e.ctr == nil { // which loses the output of an exec now and then
		for _, converted := range subjects[1:] {
			t.Run("the status, "+converted.name, func(t *testing.T) { converted.tellsStatus(t) })
		}
	}
	t.Run("boot ends without waiting for itself", func(t *testing.T) {
		fuse := subjects[1]
		r := fuse.run(t, []string{"--env", "BOOTFS_LOG=info"}, "true")
		if r.code != 0 || !strings.Contains(r.stdout+r.stderr, "the root is mounted") || strings.Contains(r.stdout+r.stderr, "while ending") {
			t.Errorf("%+v", r)
		}
	})
	eventually(t, "no boot is left", func() bool { return !e.runsBoot(t) })
}

// tellsStatus asks a container of a user's how it does, as root and as that user.
func (s *engineSubject) tellsStatus(t *testing.T) {
	state := map[string]string{"fuse": "running", "fill": "filled"}[s.name]
	c := s.start(t, []string{"--user", "app"}, "sleep", "600")
	for _, user := range []string{"0", "1001"} {
		var r result
		eventually(t, "the status is told", func() bool {
			r = s.exec(t, []string{"--user", user}, c, "/.bootfs/boot", "status", "--json")
			var told bootStatus
			return r.code == 0 && json.Unmarshal([]byte(r.stdout), &told) == nil && told.State == state && told.Mode == s.name && told.Image.Chunks > 0
		})
		r = s.exec(t, []string{"--user", user}, c, "/.bootfs/boot", "status")
		if r.code != 0 || !strings.Contains(r.stdout, "the root is ") || !strings.Contains(r.stdout, "\nstore     registry") {
			t.Errorf("user %s: %+v", user, r)
		}
	}
}

// runsBoot reports whether a boot runs in one of the engine's containers.
func (e *otherEngine) runsBoot(t *testing.T) bool {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		comm, _ := os.ReadFile(filepath.Join(p, "comm")) // it may have ended
		mounts, _ := os.ReadFile(filepath.Join(p, "mountinfo"))
		if string(comm) == "boot\n" && strings.Contains(string(mounts), filepath.Base(e.dir)) {
			return true
		}
	}
	return false
}

func (r *engineRow) compare(t *testing.T, subjects []*engineSubject) {
	var source string
	for i, s := range subjects {
		var got string
		t.Run(s.name, func(t *testing.T) { got = strings.ReplaceAll(r.do(t, s), s.container(t), "CONTAINER") })
		if i == 0 {
			source = got
			continue
		}
		switch difference := r.differs[s.otherEngine.name]; {
		case source != got && difference == "":
			t.Errorf("differs from the source image\nsource: %s\n%s: %s", source, s.name, got)
		case source == got && difference != "":
			t.Errorf("%s: as with the source image, but the page says: %s\n%s", s.name, difference, got)
		}
	}
}

// engineSection is the page's section about other engines.
func engineSection() string {
	var b strings.Builder
	b.WriteString(`## Other engines

The same comparison in engines other than an ordinary dockerd, with the root mounted (FUSE). In the first and the third, root of a container is
an ordinary user of the host. ctr runs with ` + "`--allow-new-privs --seccomp`" + ` and a directory for what is written; – is what it does not have. The
rows with * were also compared with the root filled in place, without flags.

| what | `)
	b.WriteString(strings.Join(engineNames, " | "))
	b.WriteString(" |\n|---|" + strings.Repeat("---|", len(engineNames)) + "\n")
	for _, r := range engineRows {
		what := r.what
		if r.fill {
			what += " *"
		}
		fmt.Fprintf(&b, "| %s |", inTable(what))
		for _, name := range engineNames {
			cell := "same"
			if slices.Contains(r.without, name) {
				cell = "–"
			} else if d := r.differs[name]; d != "" {
				cell = d
			}
			fmt.Fprintf(&b, " %s |", inTable(cell))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// startEngine starts the named engine with both images in it.
func startEngine(t *testing.T, name string) *otherEngine {
	t.Helper()
	ctx := t.Context()
	source, converted := fidelityImage(t, "plain")
	dir, err := os.MkdirTemp("", "engine")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	// Containers of ordinary users come by here.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	e := &otherEngine{name: name, dir: dir, image: func(s *engineSubject) string {
		if s.name == "source" {
			return source
		}
		return converted
	}}
	stop := func(close func() error) {
		t.Cleanup(func() {
			if err := close(); err != nil {
				t.Error(err)
			}
		})
	}
	pull := []string{"pull", "--quiet"}
	switch name {
	case remapped:
		d, err := testenv.StartRemappedDocker(ctx, dir)
		if err != nil {
			t.Fatal(err)
		}
		stop(d.Close)
		if _, err := d.Output(ctx, "pull", "--quiet", source); err != nil {
			t.Fatal(err)
		}
		pod, err := testenv.StartPod(ctx, d, source, "sleep", "600")
		if err != nil {
			t.Fatal(err)
		}
		stop(pod.Close)
		address, err := pod.Forward(w.proxy.address)
		if err != nil {
			t.Fatal(err)
		}
		e.command = d.Command
		e.all = []string{"--network", pod.Network}
		e.store = []string{"--env", "BLOB_STORE=registry+http://" + address + "/small"}
	case rootful, rootless:
		p, err := testenv.StartPodman(ctx, dir, name == rootless)
		if err != nil {
			t.Fatal(err)
		}
		stop(p.Close)
		e.command = p.Command
		pull = append(pull, "--tls-verify=false")
	case plainCtr:
		c, err := testenv.StartContainerd(ctx, dir)
		if err != nil {
			t.Fatal(err)
		}
		stop(c.Close)
		e.command, e.ctr = c.Command, c
		e.all = []string{"--net-host", "--allow-new-privs", "--seccomp"}
		pull = []string{"image", "pull", "--plain-http"}
	}
	for _, image := range []string{source, converted} {
		if r := e.call(t, append(pull, image)...); r.code != 0 {
			t.Fatalf("pull: exit %d: %s", r.code, r.stderr)
		}
	}
	return e
}
