package main

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// countingRegistry is a registry within this process. Its blobs are files, so a
// Range request reads what it asks for; its manifests live as long as it does.
type countingRegistry struct {
	address string // "127.0.0.1:PORT"
	dir     string
	sent    atomic.Int64 // bytes of blobs
	server  *http.Server
	done    chan error
}

func startRegistry(dir string) (*countingRegistry, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &countingRegistry{address: l.Addr().String(), dir: dir, done: make(chan error, 1)}
	disk := registry.NewDiskBlobHandler(dir)
	blobs := registry.New(
		registry.WithBlobHandler(blobFiles{disk, disk.(registry.BlobPutHandler), dir}),
		registry.Logger(log.New(io.Discard, "", 0)))
	r.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/sha256:") {
			w = &countingWriter{w, &r.sent}
		}
		blobs.ServeHTTP(w, req)
	})}
	go func() { r.done <- r.server.Serve(l) }()
	return r, nil
}

// blobFiles tells the size of a blob from its file. The handler below it reads
// and hashes the whole file, for each Range request anew.
type blobFiles struct {
	registry.BlobHandler
	registry.BlobPutHandler
	dir string
}

func (b blobFiles) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	info, err := os.Stat(filepath.Join(b.dir, h.Algorithm, h.Hex))
	if errors.Is(err, os.ErrNotExist) {
		return 0, registry.ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (r *countingRegistry) close() error {
	err := r.server.Close()
	if served := <-r.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.n.Add(int64(n))
	return n, err
}
