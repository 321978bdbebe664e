package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"github.com/container-bootfs/bootfs/internal/scratch"
)

// daemon is a Docker engine.
type daemon struct {
	*client.Client
}

// dialDaemon connects to the engine and makes sure that it answers.
func dialDaemon(ctx context.Context, o Options) (*daemon, error) {
	opts := []client.Opt{client.FromEnv}
	if o.DockerHost != "" {
		opts = append(opts, client.WithHost(o.DockerHost))
	}
	c, err := client.New(opts...)
	if err != nil {
		return nil, err
	}
	d := &daemon{c}
	if _, err := c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		c.Close()
		return nil, d.explain(err)
	}
	return d, nil
}

// explain makes of an error what a person can act on, in one line.
func (d *daemon) explain(err error) error {
	switch {
	// The client says the second in its own words.
	case errors.Is(err, os.ErrPermission), client.IsErrConnectionFailed(err) && strings.Contains(err.Error(), "permission denied"):
		return &explained{fmt.Sprintf("no permission to use the Docker daemon at %s", d.DaemonHost()), err}
	case client.IsErrConnectionFailed(err):
		return &explained{fmt.Sprintf("cannot reach the Docker daemon at %s; is it running, or is DOCKER_HOST wrong?", d.DaemonHost()), err}
	}
	return &explained{strings.Join(strings.Fields(err.Error()), " "), err}
}

// openDaemon reads an image of the engine. The engine hands it out as one
// stream, which is spooled.
func openDaemon(ctx context.Context, r Ref, o Options) (Source, error) {
	d, err := dialDaemon(ctx, o)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	found, err := d.ImageInspect(ctx, r.Name)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("the Docker daemon at %s has no such image", d.DaemonHost())
	}
	if err != nil {
		return nil, d.explain(err)
	}
	if err := scratch.Check(o.TempDir, found.Size); err != nil {
		return nil, err
	}
	saved, err := d.ImageSave(ctx, []string{r.Name})
	if err != nil {
		return nil, d.explain(err)
	}
	defer saved.Close()
	f, _, err := spool(ctx, o.TempDir, saved, o.progress)
	if err != nil {
		return nil, err
	}
	a, err := scanArchive(ctx, f)
	if err != nil {
		return nil, err
	}
	s, err := newDockerArchive(a, "", o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// daemonDestination loads an image into the engine, which enters it when it
// has all of it.
type daemonDestination struct {
	noPacks
	*daemon
	name string
	o    Options
}

func openDaemonDestination(ctx context.Context, r Ref, o Options) (Destination, error) {
	tag, err := repoTag(r.Name)
	if err != nil {
		return nil, err
	}
	d, err := dialDaemon(ctx, o)
	if err != nil {
		return nil, err
	}
	return &daemonDestination{daemon: d, name: tag, o: o}, nil
}

func (d *daemonDestination) Commit(ctx context.Context, images []PlatformImage) (string, error) {
	img, err := onlyImage(images)
	if err != nil {
		return "", err
	}
	pr, pw := io.Pipe()
	written := make(chan error, 1)
	var id string
	go func() {
		var err error
		id, err = writeSaved(ctx, pw, img, d.name, d.o.progress)
		pw.CloseWithError(err)
		written <- err
	}()
	loadErr := d.load(ctx, pr)
	pr.CloseWithError(errors.New("the daemon stopped reading"))
	writeErr := <-written
	// What the daemon says is the cause when it stopped reading, and the
	// consequence when writing failed first.
	if loadErr != nil && (writeErr == nil || errors.As(loadErr, new(*loadError))) {
		return "", loadErr
	}
	if writeErr != nil {
		return "", writeErr
	}
	return id, nil
}

// loadError is a failure that the engine reports.
type loadError struct{ message string }

func (e *loadError) Error() string { return "docker load: " + e.message }

func (d *daemonDestination) load(ctx context.Context, r io.Reader) error {
	resp, err := d.ImageLoad(ctx, r, client.ImageLoadWithQuiet(true))
	if err != nil {
		return d.explain(err)
	}
	defer resp.Close()
	for dec := json.NewDecoder(resp); ; {
		var line struct {
			Error string `json:"error"`
		}
		err := dec.Decode(&line)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("answer to docker load: %w", err)
		}
		if line.Error != "" {
			return &loadError{line.Error}
		}
	}
}

func (d *daemonDestination) Close() error { return d.Client.Close() }
