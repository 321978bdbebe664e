package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/freeport"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// realImageJobs are what the real images are for. Each does it with one
// subject and returns what a user sees of it, which is the same in all.
var realImageJobs = map[string]func(t *testing.T, s, source *subject) string{
	"postgres": postgresJob,
	"nginx":    nginxJob,
	"redis":    redisJob,
	"node":     nodeJob,
	"static":   staticJob,
	"python":   program("python3", "job.py"),
	"ruby":     program("ruby", "job.rb"),
	"perl":     program("perl", "job.pl"),
	"go": program("sh", "-e", "-c", `
		cp -r /src /go/src/tally; cd /go/src/tally
		export GOPROXY=off
		go vet ./...; go test ./... | sed 's/\t[0-9.]*s$//'
		go install .; tally b a b
		go list -deps . | wc -l; gofmt -l .; go version -m /go/bin/tally`),
	"java": program("sh", "-e", "-c", `
		javac -d /tmp/classes *.java; cd /tmp
		java -cp classes app.Main a b
		jar --create --file app.jar --main-class app.Main -C classes .
		java -XX:ArchiveClassesAtExit=app.jsa -jar app.jar >/dev/null 2>&1
		java -Xshare:on -XX:SharedArchiveFile=app.jsa -Xlog:class+load -jar app.jar | grep -o 'app.Main source.*'
		java -Xshare:dump >/dev/null; java -Xshare:on -jar app.jar | head -n 2
		jdeps --print-module-deps app.jar; jlink --add-modules java.base --output small; small/bin/java -cp classes app.Main | tail -n 3
		echo 'System.out.println(6*7)' | jshell -s - 2>/dev/null`),
}

// inEveryTest are the real images of every test run, which take the least and
// show the most. The soak test has all of them.
var inEveryTest = []string{"postgres", "nginx", "perl"}

func TestRealImages(t *testing.T) {
	t.Parallel()
	names := inEveryTest
	if os.Getenv("BOOTFS_IMAGES") == "all" {
		names = testenv.RealImageNames
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			subjects := realSubjects(t, name)
			var want string
			for i, s := range subjects {
				began := time.Now()
				got := realImageJobs[name](t, s, subjects[0])
				t.Logf("%s: %v", s.name, time.Since(began).Round(time.Millisecond))
				if i == 0 {
					want = got
					t.Logf("%s", got)
				}
				if got != want {
					t.Errorf("%s does something else than its source\nsource:\n%s\n%s:\n%s", s.name, want, s.name, got)
				}
			}
		})
	}
}

// realSubjects puts a real image into the registry, converts it there, and
// returns the ways to run it, the source first.
func realSubjects(t testing.TB, name string) []*subject {
	t.Helper()
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	cache.Log = t.Output()
	layout, err := cache.RealImage(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	source, converted := w.proxy.address+"/real/"+name+":source", w.proxy.address+"/real/"+name+":converted"
	if err := testenv.Push(t.Context(), layout, source); err != nil {
		t.Fatal(err)
	}
	out, err := w.command("--boot", w.boot, source, converted).CombinedOutput()
	if err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	for _, image := range []string{source, converted} {
		if out, err := w.docker.Output(t.Context(), "pull", "--quiet", image); err != nil {
			t.Fatal(err, out)
		}
	}
	real := []*subject{{name: "source", image: source}}
	for _, mode := range []string{"fuse", "fill"} {
		// No line says how far a fill is, which takes long on a busy machine.
		real = append(real, &subject{name: mode, image: converted, flags: append(modeFlags(mode), "--env", "BOOTFS_LOG=quiet")})
	}
	return real
}

// program is the job of an image that runs a program and ends.
func program(args ...string) func(t *testing.T, s, source *subject) string {
	return func(t *testing.T, s, _ *subject) string {
		r := s.run(t, append([]string{s.image}, args...)...)
		if r.code != 0 {
			t.Errorf("%s: exit %d", s.name, r.code)
		}
		return r.stdout + r.stderr
	}
}

// postgresJob makes a database on a new volume, works with it, and takes the
// volume through a restart and through new containers of this and of the source
// image.
func postgresJob(t *testing.T, s, source *subject) string {
	var seen strings.Builder
	volume := newVolume(t)
	port := freePort(t)
	start := func(s *subject) (id string) {
		id = s.start(t, "--env", "POSTGRES_PASSWORD=pass word", "--env", "PGPORT="+port, "--volume", volume+":/var/lib/postgresql/data", s.image)
		healthy(t, id)
		return id
	}
	ask := func(id, sql string) {
		t.Helper()
		r := docker(t, "exec", "--env", "PGPASSWORD=pass word", "--user", "postgres", id,
			"psql", "--host=127.0.0.1", "--username=postgres", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "--command="+sql)
		fmt.Fprintf(&seen, "%s → %d %s%s", sql, r.code, r.stdout, r.stderr)
	}
	stop := func(id string) {
		t.Helper()
		log := logsSince(t, id)
		fmt.Fprintf(&seen, "stop: %s%s", stopped(t, id), log())
	}

	id := start(s)
	fmt.Fprintf(&seen, "first start:\n%s", inKind(docker(t, "logs", id)))
	ask(id, "SELECT count(*), max(body) FROM notes")
	ask(id, "SELECT id FROM notes WHERE to_tsvector('english', body) @@ to_tsquery('english', '4711')")
	ask(id, "SELECT twice(21), version(), current_setting('data_directory'), inet_server_port() > 0")
	ask(id, "CREATE TABLE sorted AS SELECT n, md5(n::text) FROM generate_series(1, 200000) n ORDER BY 2")
	ask(id, "SELECT max(pg_size_bytes('1 MB')), count(DISTINCT md5) FROM sorted")
	ask(id, "COPY (SELECT * FROM notes LIMIT 3) TO PROGRAM 'wc -l >&2'")
	ask(id, "SELECT nonsense")
	r := docker(t, "exec", "--user", "postgres", "--env", "PGPASSWORD=pass word", id, "bash", "-c", `
		cd /tmp; export PGHOST=127.0.0.1
		pgbench --initialize --quiet 2>/dev/null && pgbench --client=4 --jobs=2 --transactions=50 2>/dev/null | grep 'actually processed'
		pg_dump --format=custom postgres >dump && createdb copy && pg_restore --dbname=copy dump && psql -At -c 'SELECT count(*) FROM notes' copy
		stat -c '%U %a' $PGDATA $PGDATA/PG_VERSION`)
	fmt.Fprintf(&seen, "tools → %d %s%s", r.code, r.stdout, r.stderr)

	log := logsSince(t, id)
	if r := docker(t, "restart", "--time", "60", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	healthy(t, id)
	fmt.Fprintf(&seen, "restart:\n%s", log())
	ask(id, "INSERT INTO notes (body) VALUES ('restarted') RETURNING id")
	stop(id)
	for _, next := range []*subject{s, source, s} {
		id := start(next)
		fmt.Fprintf(&seen, "new container:\n%s", inKind(docker(t, "logs", id)))
		ask(id, "INSERT INTO notes (body) VALUES ('again') RETURNING id, (SELECT count(*) FROM notes)")
		stop(id)
	}
	return seen.String()
}

// nginxJob serves files, takes a new configuration while it serves, and ends
// when the last answer is out.
func nginxJob(t *testing.T, s, _ *subject) string {
	var seen strings.Builder
	port := freePort(t)
	id := s.start(t, "--env", "PORT="+port, s.image)
	healthy(t, id)
	get := func(path string, header ...string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+port+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatalf("%s: %v\n%+v", path, err, docker(t, "logs", id))
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintln(path, resp.Status, resp.Header["Content-Type"], resp.Header["Content-Encoding"], resp.Header["Last-Modified"],
			resp.Header["Etag"], strings.ReplaceAll(resp.Header.Get("Location"), port, "PORT"), resp.Header["X-Version"], len(body), string(body[:min(len(body), 80)]))
	}
	seen.WriteString(get("/"))
	seen.WriteString(get("/", "Accept-Encoding", "gzip"))
	seen.WriteString(get("/", "Range", "bytes=10-19"))
	seen.WriteString(get("/nothing"))
	seen.WriteString(get("/old/"))
	seen.WriteString(get("/private/page.txt"))
	seen.WriteString(get("/private/page.txt", "Authorization", "Basic cmVhZGVyOm9mIGJvb2tz"))

	r := docker(t, "exec", id, "sh", "-c", `sed -i 's/root /add_header X-Version 2; root /' /etc/nginx/conf.d/default.conf && nginx -t`)
	fmt.Fprintf(&seen, "new configuration → %d %s%s", r.code, r.stdout, r.stderr)
	if r := docker(t, "kill", "--signal", "HUP", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	eventually(t, "the new configuration is in force", func() bool { return strings.Contains(get("/"), "[2]") })
	seen.WriteString(get("/"))

	began := make(chan struct{})
	slow := make(chan string)
	go func() {
		resp, err := http.Get("http://127.0.0.1:" + port + "/slow/GPL-3")
		close(began)
		if err != nil {
			slow <- err.Error()
			return
		}
		defer resp.Body.Close()
		n, err := io.Copy(io.Discard, resp.Body)
		slow <- fmt.Sprintln("while it ends:", resp.Status, n, err)
	}()
	<-began
	status := stopped(t, id)
	seen.WriteString(<-slow + status)
	logs := docker(t, "logs", id)
	var access []string
	for line := range strings.Lines(logs.stdout) {
		// The health check and the waiting ask for the first page, who knows how often.
		if !strings.Contains(line, `"GET / `) {
			access = append(access, line)
		}
	}
	fmt.Fprint(&seen, inKind(result{stdout: strings.Join(access, "")}), "notices: ", strings.Contains(logs.stderr, "gracefully shutting down"))
	return seen.String()
}

// redisJob keeps data in an append-only file on a new volume, and takes that
// through a restart and through new containers of this and of the source image.
func redisJob(t *testing.T, s, source *subject) string {
	var seen strings.Builder
	volume := newVolume(t)
	port := freePort(t)
	ask := func(id string, args ...string) string {
		r := docker(t, append([]string{"exec", id, "redis-cli", "-p", port}, args...)...)
		return fmt.Sprintf("%v → %d %s%s", args, r.code, r.stdout, r.stderr)
	}
	start := func(s *subject) (id string) {
		id = s.start(t, "--volume", volume+":/data", s.image, "--port", port, "--appendonly", "yes")
		within(t, 3*time.Minute, "redis answers", func() bool { return strings.HasSuffix(ask(id, "PING"), "PONG\n") })
		return id
	}
	id := start(s)
	for _, args := range [][]string{
		{"SET", "key", "value"},
		{"RPUSH", "list", "a", "b", "c"},
		{"EVAL", "for i = 1, 10000 do redis.call('HSET', 'hash', i, i * i) end return redis.call('HLEN', 'hash')", "0"},
		{"BGREWRITEAOF"},
		{"CONFIG", "GET", "dir"},
		{"NONSENSE"},
	} {
		seen.WriteString(ask(id, args...))
	}
	eventually(t, "the file is written anew", func() bool {
		return strings.Contains(ask(id, "INFO", "persistence"), "aof_rewrite_in_progress:0")
	})
	if r := docker(t, "restart", "--time", "60", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	eventually(t, "redis answers", func() bool { return strings.HasSuffix(ask(id, "PING"), "PONG\n") })
	seen.WriteString(ask(id, "HGET", "hash", "99"))
	seen.WriteString(stopped(t, id))
	for _, next := range []*subject{s, source, s} {
		id := start(next)
		seen.WriteString(ask(id, "LRANGE", "list", "0", "-1"))
		seen.WriteString(ask(id, "APPEND", "key", "+"))
		r := docker(t, "exec", id, "sh", "-c", `id -un; stat -c '%U %a %n' . *; grep ^Uid /proc/$(pidof redis-server)/status | tr -s '[:space:]' ' '`)
		fmt.Fprintf(&seen, "%d %s%s\n", r.code, r.stdout, r.stderr)
		seen.WriteString(stopped(t, id))
		seen.WriteString(inKind(docker(t, "logs", id)))
	}
	return seen.String()
}

func nodeJob(t *testing.T, s, _ *subject) string {
	r := s.run(t, s.image, "-p", "process.version + process.cwd() + os.userInfo().username + require('greet')('you')")
	return fmt.Sprintln(r) + serveAndStop(t, s, "/", "/primes", "/hash", "/gzip", "/child", "/nothing")
}

func staticJob(t *testing.T, s, _ *subject) string {
	return serveAndStop(t, s, "/", "/files", "/lookup")
}

// serveAndStop starts an image that is a web server, asks for pages and stops
// it.
func serveAndStop(t *testing.T, s *subject, pages ...string) string {
	var seen strings.Builder
	port := freePort(t)
	id := s.start(t, "--env", "PORT="+port, s.image)
	within(t, 3*time.Minute, "the server listens", func() bool { return strings.Contains(docker(t, "logs", id).stdout, "listening\n") })
	for _, page := range pages {
		var resp *http.Response
		eventually(t, "the server answers", func() (ok bool) {
			var err error
			resp, err = http.Get("http://127.0.0.1:" + port + page)
			return err == nil
		})
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		fmt.Fprintln(&seen, page, resp.Status, string(body), err)
	}
	seen.WriteString(stopped(t, id))
	fmt.Fprintf(&seen, "%+v", docker(t, "logs", id))
	return seen.String()
}

// stopped stops a container and returns what became of it.
func stopped(t *testing.T, id string) string {
	t.Helper()
	if r := docker(t, "stop", "--time", "60", id); r.code != 0 {
		t.Fatal(r.stderr)
	}
	return docker(t, "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}", id).stdout
}

// healthy waits until a container's health check says that it is well.
func healthy(t *testing.T, id string) {
	t.Helper()
	within(t, 3*time.Minute, "the container is healthy", func() bool {
		state := docker(t, "inspect", "--format", "{{.State.Status}} {{.State.Health.Status}}", id).stdout
		if strings.HasPrefix(state, "exited") {
			t.Fatalf("the container ended: %+v", docker(t, "logs", id))
		}
		return state == "running healthy\n"
	})
}

var (
	variable = regexp.MustCompile(`[0-9]+|[0-9a-f]{8,}`)
	blanks   = regexp.MustCompile(`[ \t]+`)

	interrupted = regexp.MustCompile(`(?m)^.*FATAL: (canceling authentication due to timeout|terminating connection due to administrator command|the database system is (starting up|shutting down))\n`)
)

// inKind is what a program logged, without the times and numbers that differ
// from run to run. A health check that a start or a stop interrupts is left out:
// chance has it.
func inKind(r result) string {
	return interrupted.ReplaceAllString(blanks.ReplaceAllString(variable.ReplaceAllString(r.stdout+r.stderr, "N"), " "), "")
}

// logsSince returns a function that returns what a container has logged since
// now, in kind.
func logsSince(t *testing.T, id string) func() string {
	before := docker(t, "logs", id)
	return func() string {
		now := docker(t, "logs", id)
		return inKind(result{stdout: strings.TrimPrefix(now.stdout, before.stdout), stderr: strings.TrimPrefix(now.stderr, before.stderr)})
	}
}

// newVolume makes a named volume that goes when the test ends.
func newVolume(t *testing.T) string {
	t.Helper()
	r := docker(t, "volume", "create")
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	name := strings.TrimSpace(r.stdout)
	t.Cleanup(func() {
		if out, err := w.docker.Command(context.Background(), "volume", "rm", name).CombinedOutput(); err != nil {
			t.Errorf("docker volume rm: %v\n%s", err, out)
		}
	})
	return name
}

// freePort returns a TCP port of the host that nobody listens at now.
func freePort(t *testing.T) string {
	t.Helper()
	address, err := freeport.Address()
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return port
}
