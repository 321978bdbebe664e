package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// measured is one image pulled and run.
type measured struct {
	title, image string
	flags        []string // of docker run

	pulled, fetched int64 // bytes that the registry sent: to the engine, to the container
	chunks          int   // files in the node cache afterwards
	pull            time.Duration
	first           time.Duration // from docker run to the first byte of output, or to the end if there is none
	output          string
}

// After its first output a program has this long to end by itself; a server
// is stopped then. One that says nothing is stopped after the second time.
const (
	afterOutput   = 5 * time.Second
	withoutOutput = 2 * time.Minute
)

func (d *demo) measure(ctx context.Context, m *measured) error {
	say("\n$ docker pull %s", m.image)
	sent, start := d.registry.sent.Load(), time.Now()
	if _, err := d.docker.Output(ctx, "pull", "--quiet", m.image); err != nil {
		return err
	}
	m.pull, m.pulled = time.Since(start), d.registry.sent.Load()-sent

	name := "bootfs-demo-" + strconv.Itoa(os.Getpid())
	flags := append([]string{"--rm", "--network", "host"}, m.flags...)
	say("$ docker run %s", strings.Join(append(append(flags[:len(flags):len(flags)], m.image), d.args...), " "))
	args := append([]string{"run", "--name", name}, flags...)
	args = append(append(args, m.image), d.args...)

	sent, start = d.registry.sent.Load(), time.Now()
	cmd := d.docker.Command(ctx, args...)
	out := &firstOutput{start: start, seen: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stopped, err := d.await(ctx, name, out, ended)
	if err != nil && !stopped {
		return fmt.Errorf("docker run %s: %w", m.image, err)
	}
	m.first, m.output = out.first(), out.String()
	m.fetched = d.registry.sent.Load() - sent
	m.chunks, err = countChunks(d.cache())
	return err
}

// await waits for the container to end, and ends it when its time is over.
func (d *demo) await(ctx context.Context, name string, out *firstOutput, ended <-chan error) (stopped bool, err error) {
	select {
	case err := <-ended:
		return false, err
	case <-out.seen:
		select {
		case err := <-ended:
			return false, err
		case <-time.After(afterOutput):
		}
	case <-time.After(withoutOutput):
	case <-ctx.Done():
	}
	say("(stopped)")
	// Also after an interrupt: the engine may not be ours to end.
	_, err = d.docker.Output(context.WithoutCancel(ctx), "rm", "--force", name)
	return true, errors.Join(err, <-ended, ctx.Err())
}

// firstOutput notes when the first byte comes and shows all.
type firstOutput struct {
	start time.Time
	seen  chan struct{} // closed at the first byte

	mu  sync.Mutex // guards the two below
	at  time.Duration
	buf bytes.Buffer
}

func (o *firstOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.at == 0 {
		o.at = time.Since(o.start)
		close(o.seen)
	}
	o.buf.Write(p)
	return os.Stdout.Write(p)
}

func (o *firstOutput) first() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.at == 0 {
		return time.Since(o.start)
	}
	return o.at
}

func (o *firstOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// countChunks counts the chunks in a loose store.
func countChunks(dir string) (int, error) {
	n := 0
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if filepath.Ext(path) == ".cacnk" {
			n++
		}
		return err
	})
	return n, err
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) }
