package main

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// useful is what each application of a start prints once it is of use.
const useful = "useful output"

// maxStart is the longest that a start may take.
const maxStart = 10 * time.Minute

//go:embed app/Hello.class
var helloClass []byte

// application is an image whose program says when it is of use, and then waits.
type application struct {
	name     string
	packages []string // of Debian
	files    map[string][]byte
	config   v1.Config
	small    bool // less than 250 MB
}

const debianPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

var applications = []application{
	{
		name:     "python",
		packages: []string{"python3", "python3-numpy", "python3-requests", "python3-cryptography"},
		files: map[string][]byte{"app/main.py": []byte(`import signal
import cryptography.hazmat.primitives.asymmetric.ec
import numpy
import requests
print("useful output:", numpy.arange(10).sum(), requests.__version__, flush=True)
signal.pause()
`)},
		config: v1.Config{Entrypoint: []string{"python3"}, Cmd: []string{"/app/main.py"}, Env: []string{debianPath}},
	},
	{
		name:     "node",
		packages: []string{"nodejs", "node-express"},
		files: map[string][]byte{"app/server.js": []byte(`const express = require("express");
const app = express();
app.get("/", (req, res) => res.send("hello"));
app.listen("/tmp/app.sock", () => console.log("useful output: listening"));
`)},
		config: v1.Config{Cmd: []string{"node", "/app/server.js"}, Env: []string{debianPath, "NODE_PATH=/usr/share/nodejs"}},
	},
	{
		name:     "java",
		packages: []string{"openjdk-17-jdk-headless"},
		files:    map[string][]byte{"app/Hello.class": helloClass},
		config:   v1.Config{Cmd: []string{"java", "-cp", "/app", "Hello"}, Env: []string{debianPath}},
	},
	{
		name:     "postgres",
		packages: []string{"postgresql-15"},
		files: map[string][]byte{"app/start": []byte(`#!/bin/sh
set -e
PATH=/usr/lib/postgresql/15/bin:$PATH
initdb --no-sync --auth=trust -D /tmp/data >/dev/null
postgres -D /tmp/data -c listen_addresses= -k /tmp >/tmp/log 2>&1 &
until psql -h /tmp -At -c "SELECT 'useful output: ' || count(*) FROM pg_class" postgres 2>/dev/null; do sleep 0.01; done
wait
`)},
		config: v1.Config{Cmd: []string{"/app/start"}, Env: []string{debianPath, "LANG=C.UTF-8"}, User: "postgres"},
	},
	{
		name:     "go",
		packages: []string{"golang-go"},
		files: map[string][]byte{
			"app/start": []byte(`#!/bin/sh
go run /app/hello.go
exec sleep 600
`),
			"app/hello.go": []byte(`package main

import "fmt"

func main() { fmt.Println("useful output: hello, world") }
`),
		},
		config: v1.Config{Cmd: []string{"/app/start"}, Env: []string{debianPath, "HOME=/tmp", "CGO_ENABLED=0"}},
	},
	{
		name:     "nginx",
		small:    true,
		packages: []string{"nginx-light", "curl"},
		files: map[string][]byte{
			"app/start": []byte(`#!/bin/sh
nginx -c /app/nginx.conf
until curl --silent --fail --unix-socket /tmp/nginx.sock http://server/; do sleep 0.01; done
exec sleep 600
`),
			"app/nginx.conf": []byte(`pid /tmp/nginx.pid;
error_log /tmp/nginx.log;
events {}
http {
	access_log off;
	server { listen unix:/tmp/nginx.sock; root /app/html; }
}
`),
			"app/html/index.html": []byte("<p>useful output of nginx</p>\n"),
		},
		config: v1.Config{Cmd: []string{"/app/start"}, Env: []string{debianPath}},
	},
}

func (w *World) application(ctx context.Context, a application) (*image, error) {
	return w.imageOf(ctx, a.name, func() (string, error) {
		return w.cache.PackagesImage(ctx, "start-"+a.name, a.packages, a.files, a.config)
	})
}

// speeds are the lines over which a node starts its first container.
var speeds = []struct {
	key, title string
	speed      faultproxy.Speed
}{
	{"start-100mbit", "Cold start over 100 Mbit/s with a round trip of 20 ms", faultproxy.Speed{Bandwidth: 12.5e6, RoundTrip: 20 * time.Millisecond}},
	{"start-1gbit", "Cold start over 1 Gbit/s with a round trip of 2 ms", faultproxy.Speed{Bandwidth: 125e6, RoundTrip: 2 * time.Millisecond}},
}

// trips are the round trips that a lazy start has at least: the engine connects,
// asks for the index, for the manifest of its platform, and for configuration
// and layers at once; the container connects, and asks for its chunks at once.
const trips = 6

const startText = `
From an empty node to the first useful output of the program, by way of a proxy that gives the line's bandwidth, in each direction, to all connections
together, and holds each byte for half a round trip. *python* imports numpy, requests and cryptography; *node* requires express and listens;
*java* is a JVM that prints; *postgres* makes its database, starts and answers a query; *go* compiles and runs a program; *nginx* serves a page to curl.

- *docker pull, run* is the source image, as ` + "`docker run`" + ` pulls it.
- *stargz* is the same image as eStargz, optimized by running it (` + "`ctr-remote image optimize`" + `), mounted lazily by stargz-snapshotter with its defaults.
- *bootfs, in containerd* is what *bootfs, recorded start set* is, pulled and run by ` + "`ctr`" + ` as stargz is: Docker's engine has more to do before a program
  runs, and makes a connection for each request.
- *bootfs, no start set* fetches what the program reads when it reads it; *bootfs* also what the converter took for the start set; *bootfs, recorded start set* is
  the image that was converted with what an earlier start was seen to read (` + "`bootfs-convert profile`" + `), as stargz has its.
- *limit* is the time in which no lazy start can be beaten: what must move over the bandwidth, and %d round trips, one after the other, and then the time that
  ` + "`docker run`" + ` of the source needs where it was pulled before. What must move are the boot image and the chunks that the program reads until then, as they are stored.
- *MB* is what came over the line until the output; *× what is read* is that without the boot image, against the chunks that the program reads.
`

func startSections() []Section {
	var all []Section
	for _, s := range speeds {
		all = append(all, Section{Key: s.key, Title: s.title, Text: fmt.Sprintf(startText, trips)})
	}
	return all
}

func startRows(w *World) []Row {
	var rows []Row
	for _, s := range speeds {
		for _, a := range applications {
			rows = append(rows, w.startRow(s.key, s.speed, a))
		}
	}
	return rows
}

func (w *World) startRow(section string, speed faultproxy.Speed, a application) Row {
	var i *image
	var touched int64 // stored bytes of the chunks that a start reads
	docker := func(ref func() string, flags ...string) func(context.Context) (Measured, error) {
		return func(ctx context.Context) (Measured, error) {
			if err := w.emptyNode(ctx); err != nil {
				return Measured{}, err
			}
			return w.overLine(ctx, speed, func() error { return w.runUntilUseful(ctx, ref(), flags) })
		}
	}
	var recorded string
	source, converted := func() string { return i.source }, func() string { return i.converted }
	// read is how often a bootfs start fetches what it reads, beside the boot image.
	read := func(measure func(context.Context) (Measured, error)) func(context.Context) (Measured, error) {
		return func(ctx context.Context) (Measured, error) {
			m, err := measure(ctx)
			if err == nil {
				m.Also["× what is read"] = (m.Also["MB"]*1e6 - float64(i.report.BootBytes)) / float64(max(1, touched))
			}
			return m, err
		}
	}
	lazy := "docker run " + strings.Join(lazyFlags, " ")
	none := append(slices.Clone(lazyFlags), "--env", "BOOTFS_PREFETCH=none")
	var goals []Goal
	goals = append(goals, Goal{1.3, "limit"}, Goal{1, "stargz"})
	if section == "start-100mbit" && !a.small {
		goals = append(goals, Goal{0.2, "docker pull, run"})
	}
	return Row{
		Section: section, Name: a.name, Unit: "s", Against: "docker pull, run",
		Prepare: func(ctx context.Context) (func() error, error) {
			var err error
			if i, err = w.application(ctx, a); err != nil {
				return nil, err
			}
			if recorded, touched, err = w.recorded(ctx, a, i); err != nil {
				return nil, err
			}
			return func() error { return nil }, nil
		},
		Subjects: []Subject{
			{Name: "docker pull, run", Command: "docker run --network host REGISTRY/" + a.name + ":source", Measure: docker(source)},
			{
				Name:    "stargz",
				Command: fmt.Sprintf("ctr-remote image rpull --plain-http REGISTRY/%s:esgz && ctr run --net-host --snapshotter stargz REGISTRY/%s:esgz c", a.name, a.name),
				Measure: func(ctx context.Context) (Measured, error) { return w.startStargz(ctx, speed, a, i) },
			},
			{Name: "bootfs, no start set", Command: lazy + " --env BOOTFS_PREFETCH=none --network host REGISTRY/" + a.name + ":bootfs", Measure: read(docker(converted, none...))},
			{Name: "bootfs", Command: lazy + " --network host REGISTRY/" + a.name + ":bootfs", Measure: read(docker(converted, lazyFlags...))},
			{
				Name: "bootfs, recorded start set", Command: lazy + " --network host REGISTRY/" + a.name + ":bootfs-recorded", Goals: goals,
				Measure: read(docker(func() string { return recorded }, lazyFlags...)),
			},
			{
				Name: "bootfs, in containerd", Goals: []Goal{{1, "stargz"}},
				Command: fmt.Sprintf("ctr image pull --plain-http REGISTRY/%s:bootfs-recorded && ctr run --net-host %s REGISTRY/%s:bootfs-recorded c", a.name, strings.Join(ctrFlags, " "), a.name),
				Measure: read(func(ctx context.Context) (Measured, error) {
					return w.inContainerd(ctx, speed, recorded, []string{"ctr", "image", "pull"}, ctrFlags...)
				}),
			},
			{
				Name: "limit", Command: "docker pull REGISTRY/" + a.name + ":source; docker run --network host REGISTRY/" + a.name + ":source   # and what the line takes",
				Measure: func(ctx context.Context) (Measured, error) {
					local, err := w.startLocal(ctx, i.source)
					bytes := i.report.BootBytes + touched
					line := float64(bytes)/float64(speed.Bandwidth) + trips*speed.RoundTrip.Seconds()
					return Measured{local + line, map[string]float64{"MB": float64(bytes) / 1e6, "s of it on the line": line}}, err
				},
			},
		},
	}
}

// ctrFlags are what ctr run needs for a mounted root, and for what Docker makes a
// volume.
var ctrFlags = []string{
	"--device", "/dev/fuse", "--cap-add", "CAP_SYS_ADMIN", "--allow-new-privs",
	"--mount", "type=bind,src=DIR,dst=/.bootfs/rw,options=rbind:rw",
}

// recorded converts an image with the start set that a start of it is seen to
// read, and returns its address and the stored bytes of that start set: of the
// chunks that a start reads.
func (w *World) recorded(ctx context.Context, a application, i *image) (string, int64, error) {
	file, ref := w.path(a.name+".start-set"), i.converted+"-recorded"
	cmd := exec.CommandContext(ctx, w.convert, "profile", i.converted, "--output", file, "--until-log", useful, "--run-flag=--network=host")
	cmd.Env = append(os.Environ(), w.docker.Env()...)
	if _, err := output(cmd); err != nil {
		return "", 0, err
	}
	report, err := w.convertImage(ctx, "--base", "none", "--start-set", file, i.source, ref)
	return ref, report.StartBytes, err
}

// overLine measures f with the line at a speed: its time, and the megabytes that
// came over the line.
func (w *World) overLine(ctx context.Context, speed faultproxy.Speed, f func() error) (Measured, error) {
	w.line.Set(speed)
	defer w.line.Set(faultproxy.Speed{})
	before, _, _ := w.line.Traffic()
	m, err := timed(f)
	after, _, _ := w.line.Traffic()
	m.Also = map[string]float64{"MB": float64(after-before) / 1e6}
	return m, errors.Join(err, w.removeContainers(ctx))
}

// startLocal is the time of a start where the image was pulled before.
func (w *World) startLocal(ctx context.Context, ref string) (float64, error) {
	if err := w.emptyNode(ctx); err != nil {
		return 0, err
	}
	if _, err := w.docker.Output(ctx, "pull", "--quiet", ref); err != nil {
		return 0, err
	}
	m, err := timed(func() error { return w.runUntilUseful(ctx, ref, nil) })
	return m.Value, errors.Join(err, w.removeContainers(ctx))
}

// runUntilUseful runs an image and returns when it is of use. The container goes
// on.
func (w *World) runUntilUseful(ctx context.Context, ref string, flags []string) error {
	args := slices.Concat([]string{"run", "--network", "host"}, flags, []string{ref})
	return untilUseful(ctx, w.docker.Command(ctx, args...), "")
}

// untilUseful starts a command and returns when its output has the word, which it
// has in a file where log is given. The command goes on until the container that
// it waits for is removed.
func untilUseful(ctx context.Context, cmd *exec.Cmd, log string) error {
	seen := make(chan struct{})
	var out watched
	if log == "" {
		out.seen = seen
	}
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if log != "" {
		go watchFile(ctx, log, seen)
	}
	select {
	case <-seen:
		return nil
	case err := <-ended:
		select {
		case <-seen:
			return nil
		default:
			return fmt.Errorf("%s: it ended (%v) and printed %q", strings.Join(cmd.Args, " "), err, out.String())
		}
	case <-time.After(maxStart):
		return fmt.Errorf("%s: not done in %v; it printed %q", strings.Join(cmd.Args, " "), maxStart, out.String())
	case <-ctx.Done():
		return ctx.Err()
	}
}

// watched closes seen when the word comes by.
type watched struct {
	seen chan struct{} // nil: nobody waits

	mu   sync.Mutex // guards text
	text []byte
	told bool
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, p...)
	if w.seen != nil && !w.told && strings.Contains(string(w.text), useful) {
		w.told = true
		close(w.seen)
	}
	return len(p), nil
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return string(w.text)
}

// watchFile closes seen when the word comes out of a FIFO.
func watchFile(ctx context.Context, path string, seen chan struct{}) {
	f, err := os.OpenFile(path, os.O_RDWR, 0) // so that it waits for no writer
	if err != nil {
		return
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.SetDeadline(time.Now()) })
	defer stop()
	f.SetDeadline(time.Now().Add(maxStart))
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if strings.Contains(lines.Text(), useful) {
			close(seen)
			return
		}
	}
}

// stargzNode is a containerd with the stargz snapshotter, empty.
func (w *World) stargzNode(ctx context.Context) (*testenv.Containerd, string, error) {
	if w.stargz == "" {
		program := w.path("stargz")
		if err := build(ctx, w.root+"/internal/evaluation/stargz", program, "."); err != nil {
			return nil, "", err
		}
		w.stargz = program
	}
	dir, err := os.MkdirTemp(w.dir, "sg")
	if err != nil {
		return nil, "", err
	}
	c, err := testenv.StartContainerdWith(ctx, dir, "stargz", func(socket string) []string {
		return []string{w.stargz, socket, dir + "/stargz"}
	})
	if err != nil {
		return nil, "", errors.Join(err, os.RemoveAll(dir))
	}
	return c, dir, nil
}

// eStargz makes the image's eStargz form, which knows what a start reads.
func (w *World) eStargz(ctx context.Context, a application, i *image) (err error) {
	if i.estargz != "" {
		return nil
	}
	c, dir, err := w.stargzNode(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close(), os.RemoveAll(dir)) }()
	made := w.line.Addr() + "/" + a.name + ":esgz"
	if _, err := c.Output(ctx, "image", "pull", "--plain-http", i.source); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"image", "optimize", "--oci", "--net-host", "--period", "20", i.source, made},
		{"image", "push", "--plain-http", made},
	} {
		if _, err := output(c.Inside(ctx, "ctr-remote", args...)); err != nil {
			return err
		}
	}
	i.estargz = made
	return nil
}

// startStargz starts the eStargz image.
func (w *World) startStargz(ctx context.Context, speed faultproxy.Speed, a application, i *image) (Measured, error) {
	if err := w.eStargz(ctx, a, i); err != nil {
		return Measured{}, err
	}
	return w.inContainerd(ctx, speed, i.estargz, []string{"ctr-remote", "image", "rpull"}, "--snapshotter", "stargz")
}

// inContainerd pulls an image with a command and runs it, on a containerd of its
// own; DIR in a flag is an empty directory. ctr looks for the user in the image, by
// the mounts that the snapshotter has on that machine. The output goes through a
// FIFO: ctr loses what a program prints now and then.
func (w *World) inContainerd(ctx context.Context, speed faultproxy.Speed, ref string, pull []string, flags ...string) (m Measured, err error) {
	c, dir, err := w.stargzNode(ctx)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, c.Close(), os.RemoveAll(dir)) }()
	log := dir + "/log"
	container := filepath.Base(dir) // all containerds of a machine keep their containers' state in one place
	if err := shell(ctx, `mkfifo "$1"; chmod 666 "$1"`, log); err != nil {
		return m, err
	}
	empty := dir + "/volume"
	if err := os.Mkdir(empty, 0o755); err != nil {
		return m, err
	}
	run := []string{"run", "--net-host"}
	for _, f := range flags {
		run = append(run, strings.ReplaceAll(f, "DIR", empty))
	}
	run = append(run, "--log-uri", "file://"+log, ref, container)
	return w.overLine(ctx, speed, func() error {
		if _, err := output(c.Inside(ctx, pull[0], append(pull[1:], "--plain-http", ref)...)); err != nil {
			return err
		}
		return untilUseful(ctx, c.Inside(ctx, "ctr", run...), log)
	})
}
