package testenv

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

// s3Server is the program that StartS3 runs. It is built once for each version
// of it, in the cache.
const s3Server = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"

// S3 is a real S3 server, which checks signatures: versitygw on a directory.
type S3 struct {
	Address              string // "127.0.0.1:PORT", plain HTTP
	Dir                  string // its buckets, as directories of objects
	AccessKey, SecretKey string
	Region               string
	// Domain is below which a bucket has a host of its own, BUCKET.Domain. No
	// name server knows it.
	Domain string

	program string
	home    string // what is its own
	daemon  *daemon
}

// StartS3 starts an S3 server at a free port of the loopback, with what is its
// own below dir. It has no buckets yet.
func StartS3(ctx context.Context, dir string) (*S3, error) {
	dir, err := absDir(dir)
	if err != nil {
		return nil, err
	}
	cache, err := OpenCache()
	if err != nil {
		return nil, err
	}
	program, err := cache.program(ctx, s3Server)
	if err != nil {
		return nil, err
	}
	address, err := freeport.Address() // kept for its later starts
	if err != nil {
		return nil, err
	}
	s := &S3{
		Address:   address,
		Dir:       filepath.Join(dir, "buckets"),
		AccessKey: "AKIABOOTFSTEST",
		SecretKey: "the+secret/of=the test",
		Region:    "test-region-1",
		Domain:    "s3.test",
		program:   program,
		home:      dir,
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	return s, s.Start(ctx)
}

// Start starts the server again after Close, at the same address.
func (s *S3) Start(ctx context.Context) error {
	iam := filepath.Join(s.home, "iam")
	if err := os.MkdirAll(iam, 0o755); err != nil {
		return err
	}
	cmd := exec.Command(s.program,
		"--port", s.Address, "--region", s.Region, "--virtual-domain", s.Domain,
		"--iam-dir", iam, // with users, it tells them from strangers
		"--keep-alive", "--quiet", "--health", "/health",
		"posix", s.Dir)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+s.AccessKey, "ROOT_SECRET_ACCESS_KEY="+s.SecretKey)
	var err error
	if s.daemon, err = startDaemon("versitygw", filepath.Join(s.home, "s3.log"), cmd, syscall.SIGKILL); err != nil {
		return err
	}
	if err := s.daemon.ready(ctx, s.probe); err != nil {
		return errors.Join(err, s.Close())
	}
	return nil
}

func (s *S3) probe(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Address+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", req.URL, resp.Status)
	}
	return nil
}

// MakeBucket makes an empty bucket.
func (s *S3) MakeBucket(name string) error { return os.Mkdir(filepath.Join(s.Dir, name), 0o755) }

// Log returns the last lines of the server's log.
func (s *S3) Log() string { return s.daemon.tail() }

// Close stops the server. Its data stay.
func (s *S3) Close() error {
	// Asked to end, it waits for connections that nobody uses. What it has
	// answered is in its files.
	s.daemon.cmd.Process.Kill()
	<-s.daemon.done
	return nil
}
