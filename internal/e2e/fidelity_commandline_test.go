package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/sys/capability"
)

// whoAmI is a script that shows what identity, place and limits it has.
const whoAmI = `id; pwd; umask; echo "home $HOME"; grep -E '^(Groups|Cap.*|NoNewPrivs|Seccomp):' /proc/self/status`

// commandLineRows are what docker run is told, and what an image's
// configuration says.
var commandLineRows = slices.Concat(
	entrypointRows(),
	[]row{
		{what: "neither entrypoint nor command", do: failedOf("none", "IMAGE"), differs: map[string]string{
			"fuse": "exits 125 as well, but the container is made and boot is who says it",
			"fill": "exits 125 as well, but the container is made and boot is who says it",
		}},
		{what: "`--entrypoint` by name", do: ran("--entrypoint", "testapp", "IMAGE", "env", "a b", "")},
		{what: "`--entrypoint` by absolute path", do: ran("--entrypoint", "/bin/testapp", "IMAGE", "env")},
		{what: "`--entrypoint` outside PATH", do: ran("--entrypoint", "/opt/tools/bin/deep", "IMAGE", "a b", "c")},
		{what: "`--entrypoint` by relative path", do: each(
			ran("--entrypoint", "opt/tools/script", "IMAGE", "x"),
			ran("--entrypoint", "./script", "--workdir", "/opt/tools", "IMAGE", "x"),
			ran("--entrypoint", "../tools/bin/deep", "--workdir", "/opt/current", "IMAGE", "x"))},
		{what: "`--entrypoint` through symlinks to a file and to a directory", do: each(
			ran("--entrypoint", "/opt/absolute", "IMAGE", "x"),
			ran("--entrypoint", "/opt/relative", "IMAGE", "x"),
			ran("--entrypoint", "/opt/tools/link", "IMAGE", "x"),
			ran("--entrypoint", "/opt/current/bin/deep", "IMAGE", "x"))},
		{inSoak: true, what: "`--entrypoint` with a first line that has an option", do: ran("--entrypoint", "/opt/tools/option", "IMAGE", "x")},
		{what: "`--entrypoint` empty, over an image that has one", do: each(
			ranOf("exec-exec", "--entrypoint", "", "IMAGE", "echo", "only the command"),
			ranOf("exec-exec", "--entrypoint", "", "IMAGE", "/opt/tools/script", "x"))},
		{inSoak: true, what: "`--entrypoint` over an image with a command, which is then dropped", do: ranOf("none-exec", "--entrypoint", "/opt/tools/script", "IMAGE")},
		{what: "`--entrypoint` of a file that is not executable", do: failed("--entrypoint", "/opt/tools/text", "IMAGE"), differs: map[string]string{
			"fuse": "exits 127 instead of 126: the engine finds nothing there, as only executables have links to boot",
			"fill": "exits 127 instead of 126: the engine finds nothing there, as only executables have links to boot",
		}},
		{what: "`--entrypoint` of a library that can be run", do: failed("--entrypoint", "/opt/tools/libtool.so", "IMAGE"), differs: map[string]string{
			"fuse": "exits 127, as libraries have no links to boot: `--entrypoint /.bootfs/boot IMAGE /opt/tools/libtool.so` runs it",
			"fill": "exits 127, as libraries have no links to boot: `--entrypoint /.bootfs/boot IMAGE /opt/tools/libtool.so` runs it",
		}},
		{inSoak: true, what: "a library that can be run, as command", do: ran("IMAGE", "/opt/tools/libtool.so")},
		{what: "a command that does not exist (127)", do: each(
			failed("IMAGE", "nope"), failed("IMAGE", "/nope"), failed("IMAGE", "./nope"), failed("IMAGE", "/opt/dangling"),
			failed("--entrypoint", "nope", "IMAGE"), failed("--entrypoint", "/opt/dangling", "IMAGE"))},
		{what: "`docker inspect` of a container whose command does not exist", do: stateOfMissing, differs: map[string]string{
			"fuse": "has status *exited* instead of *created*, and no `State.Error`: boot had started; the message is in `docker logs`",
			"fill": "has status *exited* instead of *created*, and no `State.Error`: boot had started; the message is in `docker logs`",
		}},
		{what: "a command that is a directory, not executable, or not for the user (126)", do: each(
			status("IMAGE", "/opt/tools"), failed("IMAGE", "/opt/tools/text"), failed("--user", "app", "IMAGE", "/opt/tools/rootonly"),
			failed("--user", "app", "IMAGE", "/opt/private/script"), status("--entrypoint", "/opt/tools", "IMAGE"),
			failed("--user", "app", "--entrypoint", "/opt/tools/rootonly", "IMAGE"), failed("--user", "app", "--entrypoint", "/opt/private/script", "IMAGE"))},
		{inSoak: true, what: "a command behind a loop of symlinks or a file (125)", do: each(status("IMAGE", "/opt/loop"), status("IMAGE", "/etc/passwd/x"))},
		{inSoak: true, what: "a command in a directory of PATH that is not absolute (125)", do: failed("--env", "PATH=.:/bin", "--workdir", "/opt/tools", "IMAGE", "script")},
		{what: "a script without `#!`, one whose interpreter is missing, an empty file (1)", do: each(
			ran("IMAGE", "/opt/tools/plain"), ran("IMAGE", "/opt/tools/orphan"), ran("IMAGE", "/opt/tools/empty"), ran("--entrypoint", "/opt/tools/orphan", "IMAGE"))},

		{what: "`-e`: PATH decides where the command is", do: each(
			ran("--env", "PATH=/opt/tools/bin:/opt/tools", "IMAGE", "deep", "x"), failed("--env", "PATH=/nowhere", "IMAGE", "sh"), failed("--env", "PATH=", "IMAGE", "sh"))},
		{inSoak: true, what: "an image without PATH", do: ranOf("no-path", "IMAGE")},
		{what: "`-e`: newlines, `=`, UTF-8, spaces, empty, twice, without value", do: ranOf("env",
			"--env", "LINES=one\ntwo\n", "--env", "EQ==a=b=", "--env", "UTF=größe 大", "--env", "EMPTY=", "--env", "TWICE=1", "--env", "TWICE=2",
			"--env", "DOCKER_CONTEXT", "--env", "NO_SUCH_VARIABLE", "--env", "IMAGE_ONE=changed", "IMAGE", "sh", "-c", "tr '\\0\\n' '\\n$' < /proc/self/environ | sort")}, // the engine has no order for -e
		{what: "`--env-file`", do: envFile},
		{inSoak: true, what: "the order of an image's environment", do: ranOf("env", "IMAGE", "env")},
		{inSoak: true, what: "HOME: from passwd, from `-e`, of a user without an entry", do: each(
			shown(`echo $HOME`), shown(`echo $HOME`, "--user", "app"), shown(`echo $HOME`, "--user", "12345"), shown(`echo $HOME`, "--env", "HOME=/x", "--user", "app"), shown(`echo "[$HOME]"`, "--env", "HOME="))},
		{what: "`-w` existing", do: shown(`pwd; ls`, "--workdir", "/opt/tools")},
		{what: "`-w` not existing", do: each(shown(`pwd; stat -c '%a %u:%g' . /new /new/dir`, "--workdir", "/new/dir/here"), shown(`pwd; stat -c '%a %u:%g' .`, "--workdir", "/new", "--user", "app"))},
		{what: "`-w` symlinked", do: each(shown(`pwd; echo x`, "--workdir", "/opt/current"), shown(`pwd`, "--workdir", "/srv/out"), shown(`pwd; stat -c '%n %F %a %u:%g' /srv/current /srv/app/new`, "--workdir", "/srv/current/new", "--user", "app"))},
		{inSoak: true, what: "`-w` relative, or a file", do: each(failed("--workdir", "relative", "IMAGE", "pwd"), status("--workdir", "/etc/passwd", "IMAGE", "pwd"))},
		{what: "`-w` that the user may not enter", do: each(status("--workdir", "/root", "--user", "app", "IMAGE", "pwd"), status("--workdir", "/srv/closed", "--user", "app", "IMAGE", "pwd"))},
		{inSoak: true, what: "WORKDIR of the image: existing, symlinked, not existing", do: each(
			shownOf("workdir", `pwd; ls`), shownOf("workdir-link", `pwd; ls`), shownOf("workdir-new", `pwd; stat -c '%a %u:%g' .`))},

		{what: "HEALTHCHECK in exec form: healthy, then unhealthy", do: health("health-exec")},
		{inSoak: true, what: "HEALTHCHECK in shell form", do: health("health-shell")},
		{what: "`--health-cmd`", do: health("plain", "--health-cmd", "echo probed; test -e /tmp/ok", "--health-interval", "200ms", "--health-retries", "1")},
		{what: "STOPSIGNAL", do: stopSignal("full")},
		{inSoak: true, what: "`--stop-signal`", do: stopSignal("plain", "--stop-signal", "USR1")},
		{what: "`docker inspect`: ONBUILD, labels, EXPOSE, STOPSIGNAL, HEALTHCHECK, SHELL, user, environment and all else of the configuration", do: imageConfig(func(c map[string]any) {
			delete(c, "Entrypoint")
			delete(c, "Volumes")
		})},
		{what: "`docker inspect`: entrypoint and volumes", do: imageConfig(func(c map[string]any) {
			maps.DeleteFunc(c, func(name string, _ any) bool { return name != "Entrypoint" && name != "Volumes" })
		}), differs: map[string]string{
			"fuse": "boot stands before the entrypoint, and `/.bootfs/rw` among the volumes: `bootfs-convert inspect` has the source's",
			"fill": "boot stands before the entrypoint, and `/.bootfs/rw` among the volumes: `bootfs-convert inspect` has the source's",
		}},

		{what: "`-u` name", do: each(shown(whoAmI, "--user", "app"), shown(whoAmI, "--user", "joe"), shown(whoAmI, "--user", "nobody"), shown(whoAmI, "--user", "root"))},
		{what: "`-u` uid, in passwd or not", do: each(shown(whoAmI, "--user", "1000"), shown(whoAmI, "--user", "12345"), shown(whoAmI, "--user", "0"))},
		{inSoak: true, what: "`-u` of a user whose name is a number", do: shown(whoAmI, "--user", "42")},
		{what: "`-u` uid:gid", do: each(shown(whoAmI, "--user", "1000:50"), shown(whoAmI, "--user", "12345:678"), shown(whoAmI, "--user", "0:29"))},
		{inSoak: true, what: "`-u` name:group", do: each(shown(whoAmI, "--user", "app:audio"), shown(whoAmI, "--user", "joe:1010"))},
		{what: "`-u` of an unknown user or group", do: each(failed("--user", "nope", "IMAGE"), failed("--user", "app:nope", "IMAGE"))},
		{what: "image USER: named, numeric, with group, absent from passwd", do: each(
			shownOf("user-named", whoAmI), shownOf("user-numeric", whoAmI), shownOf("user-group", whoAmI), shownOf("user-absent", whoAmI))},
		{inSoak: true, what: "image USER that is unknown", do: failedOf("user-unknown", "IMAGE")},
		{inSoak: true, what: "`-u root` over an image USER", do: shownOf("user-named", whoAmI, "--user", "root")},
		{what: "`--group-add`", do: each(shown(whoAmI, "--group-add", "staff", "--group-add", "4242"), shown(whoAmI, "--user", "app", "--group-add", "wheel"), shown(whoAmI, "--user", "12345", "--group-add", "audio"))},

		{what: "`--hostname`, `--domainname`", do: shown(`hostname; cat /proc/sys/kernel/hostname; grep here /etc/hosts; echo $HOSTNAME`, "--hostname", "here", "--domainname", "example.org")},
		{inSoak: true, what: "`--add-host`", do: shown(`grep db /etc/hosts`, "--add-host", "db:192.0.2.1", "--add-host", "db6:2001:db8::1")},
		{inSoak: true, what: "`--dns`, `--dns-search`, `--dns-option`", do: shown(`cat /etc/resolv.conf`, "--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "ndots:3")},
		{what: "`--init`", do: each(
			shown(`cat /proc/1/comm; mkfifo /tmp/end; sh -c 'cat /tmp/end &'; echo >/tmp/end; while ps -o stat,comm | grep -qE '^Z| cat$'; do :; done; echo reaped`, "--init"),
			ran("--init", "IMAGE", "sh", "-c", "exit 9"), ran("--init", "--user", "app", "--entrypoint", "/opt/tools/script", "IMAGE", "x"))},
		{what: "`--init`: the arguments of PID 1", do: shown(`tr '\0' ' ' </proc/1/cmdline`, "--init"), differs: map[string]string{
			"fill": "`/.bootfs/boot` stands among them",
		}},

		{what: "`-it`: Ctrl-C, Ctrl-Z, `fg`, `jobs`", do: jobControl},
		{what: "`-it`: size of the terminal, and its change", do: resized},
		{what: "`-it`: Ctrl-D ends the shell with its status", do: endOfInput},
		{what: "`-t` alone", do: ran("--tty", "IMAGE", "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tty; echo err >&2; exit 4")},
		{what: "`-i`: 32 MB piped in", do: func(t *testing.T, s *subject) string {
			return s.runWith(t, strings.NewReader(strings.Repeat("0123456789abcdef", 2<<20)), "--interactive", s.image, "sha256sum").String()
		}},
		{what: "`-i`: the program reads a part only", do: func(t *testing.T, s *subject) string {
			return s.runWith(t, strings.NewReader(strings.Repeat("line\n", 1<<20)), "--interactive", s.image, "head", "-n", "2").String()
		}},
		{inSoak: true, what: "without `-i`: stdin is empty", do: func(t *testing.T, s *subject) string {
			return s.runWith(t, strings.NewReader("unread\n"), s.image, "sh", "-c", "wc -c; readlink /proc/self/fd/0").String()
		}},
		{what: "stdout and stderr apart, 8 MB", do: func(t *testing.T, s *subject) string {
			r := s.run(t, s.image, "sh", "-c", "yes out | head -c 8M; yes err | head -c 1M >&2; exit 6")
			return fmt.Sprint(r.code, len(r.stdout), strings.Count(r.stdout, "out\n"), len(r.stderr), strings.Count(r.stderr, "err\n"))
		}},
		{inSoak: true, what: "`-a stdout`, `-a stderr`", do: each(
			ran("--attach", "stdout", "IMAGE", "sh", "-c", "echo out; echo err >&2"), ran("--attach", "stderr", "IMAGE", "sh", "-c", "echo out; echo err >&2; exit 3"))},
		{what: "`-d`, then `docker attach`", do: attachLater},

		{inSoak: true, what: "`--read-only`", do: shown(`touch /x /etc/passwd /tmp/x; mkdir /vol/new; echo x > /dev/shm/x && cat /dev/shm/x; rm /etc/passwd; cat /opt/tools/text`, "--read-only"),
			differs: map[string]string{"fill": "exits 125 and says so: a root that is read-only cannot be filled"}},
		{what: "`--read-only --tmpfs`", do: shown(`touch /x; touch /tmp/x && stat -c '%a %u:%g' /tmp /srv/closed; df -T /tmp | tail -1 | tr -s ' ' | cut -d' ' -f1,2`, "--read-only", "--tmpfs", "/tmp", "--tmpfs", "/srv/closed:mode=700,size=1m"),
			differs: map[string]string{"fill": "exits 125 and says so: a root that is read-only cannot be filled"}},
		{what: "`--tmpfs`, `--mount type=tmpfs`", do: shown(`stat -c '%n %a %u:%g' /tmp /mem /vol/full; ls -A /tmp /mem /vol/full; df -k /mem | tail -1 | tr -s ' ' | cut -d' ' -f1,2,6; grep -E ' /(tmp|mem|vol/full) ' /proc/mounts | cut -d' ' -f2-4 | sort`,
			"--tmpfs", "/tmp", "--mount", "type=tmpfs,destination=/mem,tmpfs-size=1048576,tmpfs-mode=1750", "--tmpfs", "/vol/full:uid=1000,noexec,size=64k")},
		{what: "`--mount type=bind`, `type=volume`", do: mounted},

		{what: "`--network none`, from a preloaded cache", do: cutOff("/.bootfs/rootfs.castr")},
		{inSoak: true, what: "`--network none`, from a path store", do: cutOff("/store", "--env", "BLOB_STORE=/store")},

		{inSoak: true, what: "`--ulimit`", do: shown(`ulimit -Sn; ulimit -Hn; ulimit -Su; ulimit -Hc; cat /proc/self/limits`, "--ulimit", "nofile=123:456", "--ulimit", "nproc=77", "--ulimit", "core=0")},
		{inSoak: true, what: "default limits", do: shown(`cat /proc/self/limits`)},
		{what: "`-m`, `--cpus`: what the program sees", do: shown(`cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null`, "--memory", "96m", "--cpus", "1.5")},
		{inSoak: true, what: "`--pids-limit`: what the program sees", do: shown(`cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null`, "--pids-limit", "64")},
		{what: "`--pids-limit`: how many processes there can be", do: crowd, differs: map[string]string{
			"fuse": "boot's threads, up to 20, count too: add 20 to the limit",
		}},
		{what: "`--cap-add NET_ADMIN`", do: shown(whoAmI, "--cap-add", "NET_ADMIN")},
		{what: "`--cap-drop NET_RAW`", do: shown(whoAmI+"; testapp-netraw status | grep Cap", "--cap-drop", "NET_RAW")},
		{what: "`--cap-add` of all", do: withAll(), differs: map[string]string{
			"fuse": "the program has all but SYS_ADMIN: `-e BOOTFS_KEEP_SYS_ADMIN=1` gives it that too",
			"fill": "the program has all but SYS_ADMIN: `-e BOOTFS_KEEP_SYS_ADMIN=1` gives it that too",
		}},
		{what: "`--cap-add` of all, `-e BOOTFS_KEEP_SYS_ADMIN=1`", do: withAll("--env", "BOOTFS_KEEP_SYS_ADMIN=1")},
		{what: "`--cap-drop ALL`", do: shown(whoAmI, "--cap-drop", "ALL"), differs: map[string]string{
			"fuse": "exits 125 and names the capabilities that boot needs: add them with `--cap-add`",
			"fill": "exits 125 and names the capabilities that boot needs: add them with `--cap-add`",
		}},
		{what: "capabilities of a user, of setuid programs, of files", do: each(
			shown("testapp-setuid status | grep -E '^(Uid|Gid|Cap.*)'; testapp-netraw status | grep -E '^(Uid|Cap.*)'", "--user", "app"))},
		{what: "`--security-opt no-new-privileges`, as root", do: shown(whoAmI+"; testapp-setuid status | grep Uid", "--security-opt", "no-new-privileges")},
		{what: "`--security-opt no-new-privileges`, as another user", do: shown(whoAmI, "--security-opt", "no-new-privileges", "--user", "app"), differs: map[string]string{
			"fuse": "exits 125 and says so: boot needs its setuid bit; start as root and let the program change its user, or leave the option out",
			"fill": "exits 125 and says so: boot needs its setuid bit; start as root and let the program change its user, or leave the option out",
		}},
		{what: "`--security-opt seccomp=unconfined -e BOOTFS_KEEP_SYS_ADMIN=1`", do: shown(`grep Seccomp: /proc/self/status`, "--security-opt", "seccomp=unconfined", "--env", "BOOTFS_KEEP_SYS_ADMIN=1")},
		{inSoak: true, what: "`--security-opt seccomp=unconfined`", do: shown(`grep Seccomp: /proc/self/status`, "--security-opt", "seccomp=unconfined"), differs: map[string]string{
			"fuse": "boot's own filter stays, for the calls that SYS_ADMIN would open: `-e BOOTFS_KEEP_SYS_ADMIN=1` takes it away",
		}},
		{what: "`--security-opt seccomp=FILE`", do: ownProfile},
		{what: "`--device`", do: shown(`stat -c '%F %t,%T' /dev/mine; head -c 3 /dev/mine | od -An -tx1; ls /dev/null`, "--device", "/dev/zero:/dev/mine:r")},
		{inSoak: true, what: "`--sysctl`", do: shown(`cat /proc/sys/kernel/shm_rmid_forced; echo 0 > /proc/sys/kernel/shm_rmid_forced`, "--sysctl", "kernel.shm_rmid_forced=1")},
		{inSoak: true, what: "`--shm-size`", do: shown(`df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2`, "--shm-size", "16m")},
		{inSoak: true, what: "`--ipc` host, private, container", do: each(shown(`df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; ls /dev/shm | wc -l`, "--ipc", "private"), hostIPC, sharedIPC)},
		{what: "`--pid host`", do: shown(`[ $$ = 1 ] && echo alone || echo among others`, "--pid", "host"), differs: map[string]string{
			"fuse": "the program sees its own processes only, as PID 1: `-e BOOTFS_MODE=fill` gives it the host's",
		}},
		{what: "`--pid container:ID`", do: sharedPID, differs: map[string]string{
			"fuse": "the program sees its own processes only: `-e BOOTFS_MODE=fill` gives it the other's",
		}},
		{inSoak: true, what: "`--uts host`", do: shown(`hostname`, "--uts", "host")},
		{inSoak: true, what: "`--cgroupns`, `/proc/self/cgroup`", do: each(
			shown(`sed 's/[0-9a-f]\{64\}/ID/' /proc/self/cgroup`, "--cgroupns", "private"), shown(`sed 's/[0-9a-f]\{64\}/ID/' /proc/self/cgroup`, "--cgroupns", "host"))},
		{inSoak: true, what: "`--cidfile`, `--rm`", do: cidfile},
		{what: "`--restart on-failure:2`", do: restarted3},
		{inSoak: true, what: "`--log-driver`, `--log-opt`", do: logDriver},
		{what: "`--oom-score-adj`", do: shown(`cat /proc/self/oom_score_adj /proc/1/oom_score_adj`, "--oom-score-adj", "321"), differs: map[string]string{
			"fuse": "the program has a few points more, so that it and not boot is the victim when memory is short",
		}},
		{inSoak: true, what: "`--platform`", do: ran("--platform", "linux/"+runtime.GOARCH, "IMAGE", "uname", "-m")},
		{what: "`/proc/self/status`", do: shown(`grep -vE '^(Seccomp_filters|Vm|Rss|HugetlbPages|voluntary|nonvoluntary|Cpus|Mems|Speculation|x86_|SigQ)' /proc/self/status | sed -E 's/^((|NS)(Tgid|Ngid|Pid|PPid|pid|tgid|pgid|sid|gid)):.*/\1/'`)},
		{what: "`/proc/self/mountinfo`: mount points and options but those of `/`", do: shown(`cut -d' ' -f5,6 /proc/self/mountinfo | grep -v '^/ ' | sort`), differs: map[string]string{
			"fill": "`/.bootfs/rw` and what else is mounted in `/.bootfs` is there too; with SYS_ADMIN it is unmounted",
		}},
		{what: "processes: PID 1, session, group, terminal", do: ran("IMAGE", "testapp", "env")},
		{what: "signal mask and dispositions, open files", do: shown(`grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status; ls /proc/self/fd; for l in /dev/fd /dev/stdin /proc/1/cwd /proc/1/root; do readlink $l; done; cat /proc/1/comm; cut -d' ' -f18,19 /proc/self/stat`)},
	},
)

// The configurations of the small image, beside the combinations that
// [entrypointRows] makes.
func init() {
	path := []string{smallPath}
	for name, c := range map[string]v1.Config{
		"none":         {Env: path},
		"no-path":      {Cmd: []string{"sh", "-c", "echo $PATH; env"}},
		"env":          {Env: []string{smallPath, "IMAGE_ONE=1", "IMAGE_EMPTY=", "IMAGE_LINES=a\nb", "ZZ=z", "AA=a"}, Cmd: []string{"env"}},
		"workdir":      {Env: path, WorkingDir: "/opt/tools"},
		"workdir-link": {Env: path, WorkingDir: "/opt/current"},
		"workdir-new":  {Env: path, WorkingDir: "/not/there", User: "app"},
		"user-named":   {Env: path, User: "app"},
		"user-numeric": {Env: path, User: "1001"},
		"user-group":   {Env: path, User: "app:audio"},
		"user-absent":  {Env: path, User: "54321"},
		"user-unknown": {Env: path, User: "ghost", Cmd: []string{"id"}},
		"health-exec": {Env: path, Cmd: []string{"sleep", "600"}, Healthcheck: &v1.HealthConfig{
			Test: []string{"CMD", "/bin/sh", "-c", "echo probed; test -e /tmp/ok"}, Interval: 200 * time.Millisecond, Retries: 1}},
		"health-shell": {Env: path, Cmd: []string{"sleep", "600"}, Healthcheck: &v1.HealthConfig{
			Test: []string{"CMD-SHELL", "echo probed; test -e /tmp/ok"}, Interval: 200 * time.Millisecond, Timeout: 20 * time.Second, Retries: 1}},
		"full": {
			Env: path, Cmd: []string{"sh"}, Entrypoint: []string{"/bin/env", "--"}, User: "root", WorkingDir: "/srv", StopSignal: "SIGUSR1",
			Labels:       map[string]string{"one": "1", "with space": "a \"quoted\" value", "org.opencontainers.image.title": "small"},
			ExposedPorts: map[string]struct{}{"80/tcp": {}, "53/udp": {}}, Volumes: map[string]struct{}{"/vol/empty": {}},
			OnBuild: []string{"RUN echo built", "COPY . /app"}, Shell: []string{"/bin/sh", "-ec"},
			Healthcheck: &v1.HealthConfig{Test: []string{"NONE"}, Interval: time.Second, Timeout: 2 * time.Second, StartPeriod: 3 * time.Second, Retries: 4},
		},
	} {
		smallConfigs[name] = c
	}
}

// entrypointRows are the combinations of entrypoint and command.
func entrypointRows() []row {
	forms := []string{"none", "exec", "shell"}
	command := map[string][]string{
		"exec":  {"first", "second arg"},
		"shell": {"/bin/sh", "-c", "echo from the shell: $0 $1"},
	}
	entrypoint := map[string][]string{
		"exec":  {"/opt/tools/script", "of the image"},
		"shell": {"/bin/sh", "-c", `echo entered: "$0" "$@"`},
	}
	var rows []row
	for _, e := range forms {
		for _, c := range forms {
			if e == "none" && c == "none" {
				continue
			}
			name := e + "-" + c
			config := v1.Config{Env: []string{smallPath}, Entrypoint: entrypoint[e], Cmd: command[c]}
			if e == "none" && c == "exec" {
				config.Cmd = []string{"testapp", "env"}
			}
			smallConfigs[name] = config
			rows = append(rows, row{
				what: fmt.Sprintf("entrypoint: %s form, command: %s form; without and with arguments", e, c),
				do:   each(ranOf(name, "IMAGE"), ranOf(name, "IMAGE", "echo", "an argument")),
				// The others are combinations of what these have.
				inSoak: !slices.Contains([]string{"none-exec", "exec-exec", "shell-shell"}, name),
			})
		}
	}
	return rows
}

// shown is a row's do that runs a script in the small image, with flags.
func shown(script string, flags ...string) func(*testing.T, *subject) string {
	return shownOf("plain", script, flags...)
}

func shownOf(name, script string, flags ...string) func(*testing.T, *subject) string {
	return ranOf(name, slices.Concat(flags, []string{"IMAGE", "sh", "-c", script})...)
}

var (
	engineSays = regexp.MustCompile(`(?m)^docker: Error response from daemon: (.*unable to start container process: )?(error during container init: )?`)
	clientSays = regexp.MustCompile(`(?m)^time="[^"]*" level=error msg="error waiting for container.*\n`)
	// Engines quote the name or not.
	execSays = regexp.MustCompile(`exec:? "?([^":]*)"?: `)
)

// failed is ran for what cannot start: it shows the status, and the reason
// without who gives it.
func failed(args ...string) func(*testing.T, *subject) string { return failedOf("plain", args...) }

func failedOf(name string, args ...string) func(*testing.T, *subject) string {
	do := ranOf(name, args...)
	return func(t *testing.T, s *subject) string {
		text := clientSays.ReplaceAllString(do(t, s), "")
		text = engineSays.ReplaceAllString(text, "")
		text = strings.ReplaceAll(text, "bootfs: ", "")
		text = strings.ReplaceAll(text, ": unknown.", "")
		text = strings.ReplaceAll(text, "\nRun 'docker run --help' for more information\n", "")
		return execSays.ReplaceAllString(text, "exec $1: ")
	}
}

// status is ran for what cannot start, with the status alone: engines of
// different versions have different words.
func status(args ...string) func(*testing.T, *subject) string {
	do := ran(args...)
	return func(t *testing.T, s *subject) string {
		code, _, _ := strings.Cut(do(t, s), "\n")
		return code + "\n"
	}
}

func stateOfMissing(t *testing.T, s *subject) string {
	id := s.create(t, s.image, "nope")
	r := docker(t, "start", "--attach", id)
	state := docker(t, "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}} error {{len .State.Error | lt 0}}", id)
	return fmt.Sprint(r.code, " ", state.stdout)
}

func envFile(t *testing.T, s *subject) string {
	file := filepath.Join(directory(t), "env")
	if err := os.WriteFile(file, []byte("# a comment\nONE=1\nTWO=a = b \nQUOTED=\"kept\"\n\nDOCKER_CONTEXT\nUNSET_HERE\nUTF=ü\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.run(t, "--env-file", file, "--env", "ONE=2", s.image, "testapp", "env").String()
}

// health starts a container whose probe wants /tmp/ok, makes that, removes it,
// and shows what the engine said of each.
func health(name string, flags ...string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		s = s.of(t, name)
		id := s.start(t, slices.Concat(flags, []string{s.image, "sh", "-c", "touch /tmp/ok; exec sleep 600"})...)
		var b strings.Builder
		show := func(want string) {
			var log struct {
				Status string
				Log    []struct {
					ExitCode int
					Output   string
				}
			}
			eventually(t, "the container is "+want, func() bool {
				r := docker(t, "inspect", "--format", "{{json .State.Health}}", id)
				return json.Unmarshal([]byte(r.stdout), &log) == nil && log.Status == want
			})
			last := log.Log[len(log.Log)-1]
			fmt.Fprintf(&b, "%s: status %d, output %q\n", log.Status, last.ExitCode, last.Output)
		}
		show("healthy")
		if r := docker(t, "exec", id, "rm", "/tmp/ok"); r.code != 0 {
			t.Fatal(r.stderr)
		}
		show("unhealthy")
		return b.String()
	}
}

func stopSignal(name string, flags ...string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		s = s.of(t, name)
		const script = `trap 'echo got USR1; exit 5' USR1; echo up; while :; do sleep 0.1; done`
		id := s.start(t, slices.Concat(flags, []string{"--entrypoint", "sh", s.image, "-c", script})...)
		eventually(t, "the program is up", func() bool { return docker(t, "logs", id).stdout == "up\n" })
		docker(t, "stop", "--time", "30", id)
		return docker(t, "logs", id).String() + docker(t, "inspect", "--format", "{{.State.ExitCode}}", id).stdout
	}
}

// imageConfig shows the configuration of an image, reduced by without.
func imageConfig(without func(map[string]any)) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		r := docker(t, "inspect", "--format", "{{json .Config}}", s.of(t, "full").image)
		var c map[string]any
		if err := json.Unmarshal([]byte(r.stdout), &c); err != nil {
			t.Fatalf("%v\n%s", err, r.stderr)
		}
		without(c)
		b, err := json.MarshalIndent(c, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

func jobControl(t *testing.T, s *subject) string {
	m := openTerminal(t, append([]string{"run", "--rm", "-it"}, s.args([]string{s.image, "sh"})...)...)
	m.expect("# ")
	m.press("echo rea''dy\n")
	m.expect("ready")
	m.expect("# ")
	// What the command shows says that it has the terminal, and differs from what
	// was typed.
	m.press("sh -c 'echo on$((1)); exec sleep 600'\n")
	m.expect("on1")
	m.press("\x03")
	m.expect("# ")
	m.press("echo status=$?\n")
	m.expect("status=130")
	m.expect("# ")
	m.press(`sh -c 'trap "echo on\$((3))" CONT; echo on$((2)); while :; do sleep 0.1; done'` + "\n")
	m.expect("on2")
	m.press("\x1a")
	m.expect("Stopped")
	m.expect("# ")
	m.press("jobs -l; echo on$((4))\n")
	m.expect("Stopped")
	m.expect("on4")
	m.expect("# ")
	m.press("fg\n")
	m.expect("on3")
	m.press("\x03")
	m.expect("# ")
	m.press("echo status=$?\n")
	m.expect("status=130")
	m.expect("# ")
	m.press("exit 12\n")
	return fmt.Sprint("exit ", m.close())
}

func resized(t *testing.T, s *subject) string {
	m := openTerminal(t, append([]string{"run", "--rm", "-it"}, s.args([]string{s.image, "sh", "-c",
		`trap 'echo changed: $(stty size)' WINCH; until [ "$(stty size)" = "24 80" ]; do sleep 0.1; done; echo first; while :; do sleep 0.1; done`})...)...)
	m.expect("first")
	m.resize(41, 102)
	m.expect("changed: 41 102")
	m.resize(12, 34)
	m.expect("changed: 12 34")
	m.press("\x03")
	return fmt.Sprint("exit ", m.close())
}

func endOfInput(t *testing.T, s *subject) string {
	m := openTerminal(t, append([]string{"run", "--rm", "-it"}, s.args([]string{s.image, "sh"})...)...)
	m.expect("# ")
	m.press("tty; (exit 7)\n")
	m.expect("/dev/")
	m.expect("# ")
	m.press("\x04")
	return fmt.Sprint("exit ", m.close())
}

func attachLater(t *testing.T, s *subject) string {
	// An engine may lose what is written in the moment of a container's end.
	id := s.start(t, "--interactive", s.image, "sh", "-c", "read line; echo got $line; sleep 1; exit 3")
	// It also ends the output of who came later with the input, so that stays open.
	input, line, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer input.Close()
	defer line.Close()
	if _, err := line.WriteString("a line\n"); err != nil {
		t.Fatal(err)
	}
	r := dockerWith(t, input, "attach", id)
	return r.String() + docker(t, "logs", id).String()
}

func mounted(t *testing.T, s *subject) string {
	dir := directory(t)
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return s.run(t, "--mount", "type=bind,source="+dir+",destination=/mnt/bound,readonly", "--mount", "type=bind,source="+dir+"/file,destination=/etc/os-release",
		"--mount", "type=volume,destination=/srv/volume", s.image, "sh", "-c",
		`cat /mnt/bound/file /etc/os-release; touch /mnt/bound/x; echo x > /srv/volume/x && ls /srv/volume; grep -E ' /(mnt|srv|etc/os)' /proc/mounts | cut -d' ' -f2 | sort`).String()
}

// cutOff runs without a network from the chunks in a directory, mounted at the
// path at.
func cutOff(at string, flags ...string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		args := []string{"--network", "none"}
		if s.converted() {
			chunks := directory(t)
			preloadTo(t, s.image, chunks)
			args = slices.Concat(args, flags, []string{"--volume", chunks + ":" + at})
		}
		return s.run(t, append(args, s.image, "sh", "-c", "cat $(find /opt /bin /etc/passwd -type f | sort) | sha256sum; ip link | grep -c UP")...).String()
	}
}

func crowd(t *testing.T, s *subject) string {
	return s.run(t, "--pids-limit", "40", s.image, "sh", "-c", `n=0; while sleep 600 & do n=$((n+1)); echo $n; done 2>/dev/null`).stdout
}

func ownProfile(t *testing.T, s *subject) string {
	profile := filepath.Join(directory(t), "profile.json")
	const text = `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["setpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`
	if err := os.WriteFile(profile, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return s.run(t, "--security-opt", "seccomp="+profile, s.image, "sh", "-c", "renice -n 5 -p $$ && echo renice; grep Seccomp: /proc/self/status").String()
}

func hostIPC(t *testing.T, s *subject) string {
	return s.run(t, "--ipc", "host", s.image, "sh", "-c", "readlink /proc/self/ns/ipc").String()
}

func sharedIPC(t *testing.T, s *subject) string {
	id := s.start(t, "--ipc", "shareable", s.image, "sh", "-c", "echo shared > /dev/shm/file; exec sleep 600")
	eventually(t, "the first container runs", func() bool { return docker(t, "exec", id, "test", "-s", "/dev/shm/file").code == 0 })
	return s.run(t, "--ipc", "container:"+id, s.image, "cat", "/dev/shm/file").String()
}

func sharedPID(t *testing.T, s *subject) string {
	id := s.start(t, s.image, "sleep", "654")
	eventually(t, "the first container's program runs", func() bool {
		for line := range strings.Lines(docker(t, "top", id, "-o", "pid,args").stdout) {
			if slices.Equal(strings.Fields(line)[1:], []string{"sleep", "654"}) {
				return true
			}
		}
		return false
	})
	return s.run(t, "--pid", "container:"+id, s.image, "sh", "-c", "ps -o args | grep -c '^sleep 654'").String()
}

func cidfile(t *testing.T, s *subject) string {
	file := filepath.Join(directory(t), "id")
	r := s.run(t, "--cidfile", file, s.image, "true")
	id, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return r.String() + withoutIDs(string(id)) + docker(t, "ps", "--all", "--quiet", "--filter", "id="+string(id)).String()
}

func restarted3(t *testing.T, s *subject) string {
	id := s.start(t, "--restart", "on-failure:2", s.image, "sh", "-c", "echo run >> /count; cat /count; exit 3")
	eventually(t, "the container is given up", func() bool {
		return docker(t, "inspect", "--format", "{{.State.Status}} {{.RestartCount}}", id).stdout == "exited 2\n"
	})
	return docker(t, "logs", id).String() + docker(t, "inspect", "--format", "{{.State.ExitCode}}", id).stdout
}

func logDriver(t *testing.T, s *subject) string {
	none := s.start(t, "--log-driver", "none", s.image, "echo", "unseen")
	docker(t, "wait", none)
	tagged := s.start(t, "--log-driver", "json-file", "--log-opt", "max-size=1m", "--log-opt", "labels=a", "--label", "a=b", s.image, "sh", "-c", "echo seen; echo err >&2")
	docker(t, "wait", tagged)
	return docker(t, "logs", none).String() + docker(t, "logs", "--details", tagged).String()
}

// directory is t.TempDir with a name that can stand in flags: that has the
// row's in it.
func directory(t *testing.T) string {
	dir, err := os.MkdirTemp("", "fidelity")
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

// withAll shows who it is with every capability that this machine has to give.
func withAll(flags ...string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		args := slices.Clone(flags)
		all, err := capability.ListSupported()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			has, err := capability.GetBound(c)
			if err == nil && has && c <= capability.CAP_AUDIT_READ { // the later ones are news to some engines
				args = append(args, "--cap-add", strings.ToUpper(c.String()))
			}
		}
		return s.run(t, append(args, s.image, "sh", "-c", whoAmI)...).String()
	}
}
