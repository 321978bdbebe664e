// Package e2e runs converted images in a real Docker engine, with their chunks
// in a real registry, and looks at what a user would see.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// The world of these tests: one engine, one registry, one image and its
// converted form.
type world struct {
	docker   *testenv.Docker
	registry *testenv.Registry
	proxy    *countingProxy // the way to the registry for engine and boot
	convert  string         // path of bootfs-convert
	boot     string         // path of bootfs-boot
	layout   string         // the source image, as an OCI layout
	source   string         // the source image, in the registry
	image    string         // the converted image, in the registry
	pulled   int64          // bytes of blobs that the engine pulled for it

	// hostNetwork is the host's network by way of a container that has it. Docker
	// 20.10 may lock itself up when containers with a network of their own,
	// --network host among them, end at the same time.
	hostNetwork string
}

var w *world

// soak has tests done in their long form.
var soak = os.Getenv("BOOTFS_SOAK") != ""

// long are the tests that have been begun in their long form.
var long sync.Map

// inLongForm reports whether t, which takes half an hour, is to do so: in the soak
// test, and there once.
func inLongForm(t *testing.T) bool {
	if !soak {
		return false
	}
	_, done := long.LoadOrStore(t.Name(), true)
	return !done
}

func TestMain(m *testing.M) {
	testenv.EnterContainer()
	code, err := runInWorld(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func runInWorld(m *testing.M) (code int, err error) {
	ctx := context.Background()
	// Short: sockets of the engine lie below it.
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)

	w = &world{convert: filepath.Join(dir, "bootfs-convert"), boot: filepath.Join(dir, "bootfs-boot")}
	if err := build(w.boot, "../../cmd/bootfs-boot"); err != nil {
		return 0, err
	}
	if err := build(w.convert, "../../cmd/bootfs-convert"); err != nil {
		return 0, err
	}
	cache, err := testenv.OpenCache()
	if err != nil {
		return 0, err
	}
	layout, err := cache.PythonImage(ctx)
	if err != nil {
		return 0, err
	}
	w.layout = layout
	if w.registry, err = testenv.StartRegistry(ctx, filepath.Join(dir, "registry"), ""); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.registry.Close()) }()
	w.proxy = newCountingProxy(w.registry.Address)
	defer w.proxy.Close()
	if w.docker, err = testenv.StartDocker(ctx, filepath.Join(dir, "docker")); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.docker.Close()) }()

	w.source = w.proxy.address + "/python:source"
	if err := testenv.Push(ctx, layout, w.source); err != nil {
		return 0, err
	}
	if _, err := w.docker.Output(ctx, "pull", "--quiet", w.source); err != nil {
		return 0, err
	}
	id, err := w.docker.Output(ctx, "run", "--detach", "--network", "host", w.source, "sleep", "infinity")
	if err != nil {
		return 0, err
	}
	w.hostNetwork = "container:" + strings.TrimSpace(id)
	w.image = w.proxy.address + "/python:converted"
	if out, err := w.command("--boot", w.boot, "oci:"+layout, w.image).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("convert: %w\n%s", err, out)
	}
	w.pulled = w.proxy.measure(func() { _, err = w.docker.Output(ctx, "pull", "--quiet", w.image) })
	if err != nil {
		return 0, err
	}
	return m.Run(), nil
}

func build(out, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
	}
	return nil
}

// command is a call of bootfs-convert.
func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.Command(w.convert, args...)
	cmd.Env = append(os.Environ(), w.docker.Env()...)
	return cmd
}

// flags are what a converted image needs of docker run, and the way to the
// registry.
var flags = []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--network", "host"}

// fillFlags are those of a container that fills its root in place: it needs
// neither device nor capability. Quiet, as a fill of more than 2 s says so.
var fillFlags = []string{"--network", "host", "--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet"}

// runFilled and startFilled are run and start in that mode.
func runFilled(t *testing.T, args ...string) result {
	t.Helper()
	return docker(t, append(append([]string{"run", "--rm"}, fillFlags...), args...)...)
}

func startFilled(t *testing.T, args ...string) string {
	t.Helper()
	return startWith(t, fillFlags, args...)
}

// result is how a command ended.
type result struct {
	stdout, stderr string
	code           int
}

// docker runs the docker client.
func docker(t *testing.T, args ...string) result {
	t.Helper()
	return dockerWith(t, nil, args...)
}

// dockerWith runs the docker client with stdin.
func dockerWith(t *testing.T, stdin io.Reader, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := w.docker.Command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, w.docker.Log())
	}
	if ctx.Err() != nil {
		t.Fatalf("docker %s: not done in 5 min\n%s%s", strings.Join(args, " "), stdout.String(), stderr.String())
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// run runs a converted image: docker run with the flags that it needs, then
// more of docker's flags and the image with its arguments.
func run(t *testing.T, args ...string) result {
	t.Helper()
	return docker(t, append(append([]string{"run", "--rm"}, flags...), args...)...)
}

// besideFlags are flags for tests that run beside others (t.Parallel): see
// [world.hostNetwork]. Such a test neither holds nor measures w.proxy, nor looks at
// what is on the machine of all containers.
func besideFlags() []string {
	return []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--network", w.hostNetwork}
}

// runBeside is run with besideFlags.
func runBeside(t *testing.T, args ...string) result {
	t.Helper()
	return docker(t, append(append([]string{"run", "--rm"}, besideFlags()...), args...)...)
}

// start runs a converted image in the background until the test ends and
// returns the container's ID.
func start(t *testing.T, args ...string) string {
	t.Helper()
	return startWith(t, flags, args...)
}

func startWith(t *testing.T, flags []string, args ...string) string {
	t.Helper()
	r := docker(t, append(append([]string{"run", "--detach"}, flags...), args...)...)
	if r.code != 0 {
		t.Fatalf("docker run %s: exit %d\n%s", strings.Join(args, " "), r.code, r.stderr)
	}
	id := strings.TrimSpace(r.stdout)
	removeAtEnd(t, id)
	return id
}

func removeAtEnd(t *testing.T, id string) {
	t.Cleanup(func() {
		if out, err := w.docker.Command(context.Background(), "rm", "--force", "--volumes", id).CombinedOutput(); err != nil {
			t.Errorf("docker rm: %v\n%s", err, out)
		}
	})
}

// want fails the test unless the command ended with status 0 and wrote stdout.
func (r result) want(t *testing.T, stdout string) {
	t.Helper()
	if r.code != 0 || r.stdout != stdout {
		t.Errorf("exit %d, stdout %q, stderr %q; want exit 0, stdout %q", r.code, r.stdout, r.stderr, stdout)
	}
}

// eventually waits until check holds.
func eventually(t *testing.T, what string, check func() bool) {
	t.Helper()
	within(t, 2*time.Minute, what, check)
}

// within is eventually for what may take longer.
func within(t *testing.T, limit time.Duration, what string, check func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !check() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// countingProxy forwards to a registry, counts what comes back, and can keep
// it back.
type countingProxy struct {
	*httptest.Server
	address string
	bytes   atomic.Int64 // of blobs' bodies
	sent    atomic.Int64 // of blobs that were sent to the registry
	gate    sync.RWMutex // held for writing while blobs are kept back
}

func newCountingProxy(target string) *countingProxy {
	p := &countingProxy{}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: target})
			r.Out.Host = r.In.Host // the registry makes its Locations from it
			if r.In.Body != nil && strings.Contains(r.In.URL.Path, "/blobs/") {
				r.Out.Body = &countingBody{r.In.Body, &p.sent}
			}
		},
		ModifyResponse: func(r *http.Response) error {
			if r.Request.Method == http.MethodGet && strings.Contains(r.Request.URL.Path, "/blobs/") {
				p.gate.RLock()
				defer p.gate.RUnlock()
				r.Body = &countingBody{r.Body, &p.bytes}
			}
			return nil
		},
	}
	// Boot leaves requests of its prefetch behind when the container ends.
	forward.ErrorLog = log.New(io.Discard, "", 0)
	p.Server = httptest.NewServer(forward)
	p.address = strings.TrimPrefix(p.URL, "http://")
	return p
}

// hold keeps every answer with a blob back until the test calls release or ends.
func (p *countingProxy) hold(t *testing.T) (release func()) {
	p.gate.Lock()
	release = sync.OnceFunc(p.gate.Unlock)
	t.Cleanup(release)
	return release
}

// measure returns the bytes of blobs that crossed the proxy while f ran.
func (p *countingProxy) measure(f func()) int64 {
	before := p.bytes.Load()
	f()
	return p.bytes.Load() - before
}

type countingBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}
