package stores

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/registrystore"
)

// gate passes TCP connections on, unless it is shut: then nothing passes, and
// nobody is told, as when a cable is pulled.
type gate struct {
	addr string
	shut sync.RWMutex // held for writing while nothing passes
}

func newGate(t *testing.T, target string) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	g := &gate{addr: l.Addr().String()}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			go g.pass(in, out)
			go g.pass(out, in)
		}
	}()
	return g
}

func (g *gate) pass(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		g.shut.RLock()
		_, failed := to.Write(b[:n])
		g.shut.RUnlock()
		if err != nil || failed != nil {
			return
		}
	}
}

// everywhere is one index whose chunks lie in a store of every kind.
type everywhere struct {
	source  Source
	plain   [][]byte
	hosts   map[string]string // by kind, "host:port" of its server
	address map[string]string // by kind, with %s for host:port
}

func (e *everywhere) at(kind, host string) string { return fmt.Sprintf(e.address[kind], host) }

func newEverywhere(t *testing.T) *everywhere {
	t.Helper()
	const chunks, chunkSize = 400, 5000
	ctx := t.Context()
	sshd, err := testenv.StartSSHD(ctx, t.TempDir(), testenv.SSHDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sshd.Close() })
	s3, err := testenv.StartS3(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s3.Close() })
	if err := s3.MakeBucket("chunks"); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(sshd.Srv, "rootfs.castr")
	web := httptest.NewServer(http.FileServer(http.Dir(sshd.Srv)))
	t.Cleanup(web.Close)
	blobs := t.TempDir()
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			return
		}
		http.ServeFile(w, r, filepath.Join(blobs, filepath.Base(r.URL.Path)))
	}))
	t.Cleanup(registry.Close)
	host := func(url string) string { return strings.TrimPrefix(url, "http://") }

	_, key, _ := strings.Cut(sshd.HostKey, " ")
	e := &everywhere{
		hosts: map[string]string{"ssh": sshd.Address, "sftp": sshd.Address, "web": host(web.URL), "registry": host(registry.URL), "s3": s3.Address, "directory": ""},
		address: map[string]string{
			"ssh":       "ssh://root@%s" + dir,
			"sftp":      "sftp://root@%s/srv/rootfs.castr",
			"web":       "http://%s/rootfs.castr",
			"registry":  "registry://%s/repo",
			"s3":        "s3+http://%s/chunks/rootfs.castr?region=" + s3.Region,
			"directory": dir + "%s",
		},
	}
	e.source.SSH.Keys = []string{sshd.Key}
	e.source.SSH.HostKeys = []string{key} // for any host: gates stand before the server
	e.source.S3.Sources.Getenv = func(name string) string {
		return map[string]string{"AWS_ACCESS_KEY_ID": s3.AccessKey, "AWS_SECRET_ACCESS_KEY": s3.SecretKey}[name]
	}

	var file bytes.Buffer
	w := index.NewWriter(&file, chunker.V1, index.SHA256)
	var locations []registrystore.Location
	packs := registrystore.NewPackWriter(ctx, t.TempDir(), func(_ context.Context, p registrystore.Pack) error {
		r, err := p.Open()
		if err != nil {
			return err
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(blobs, p.Digest), b, 0o600)
	})
	var written []chunkstore.Writer
	for _, kind := range []string{"directory", "s3"} {
		s, err := Create(e.at(kind, e.hosts[kind]), e.source.Access)
		if err != nil {
			t.Fatal(err)
		}
		written = append(written, s)
	}
	for i := range chunks {
		plain := []byte(strings.Repeat(fmt.Sprintf("chunk %d ", i), chunkSize/8))[:chunkSize]
		id, frame := index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
		e.plain = append(e.plain, plain)
		at, err := packs.Append(id, frame, false)
		if err == nil {
			locations = append(locations, at)
			err = w.Append(id, len(plain))
		}
		for _, s := range written {
			if err == nil {
				err = s.Put(ctx, id, frame)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	descriptors, err := packs.Close()
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		e.source.Index, err = index.Open(file.Bytes())
	}
	var b []byte
	if err == nil {
		b, err = registrystore.EncodeLocators(e.source.Index, descriptors, locations)
	}
	if err == nil {
		e.source.Locators, err = registrystore.OpenLocators(b, e.source.Index)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// patience is how long a Fetcher waits for a store in TestLists.
const patience = 5 * time.Second

// TestLists takes the first of three stores of different kinds away and gives
// it back. Reading goes on from the second after one timeout, whatever the
// number of chunks, and comes back to the first.
func TestLists(t *testing.T) {
	e := newEverywhere(t)
	var all sync.WaitGroup // not t.Parallel, which counts those that only wait
	for _, kinds := range [][]string{
		{"ssh", "web", "directory"},
		{"sftp", "registry", "directory"},
		{"web", "ssh", "directory"},
		{"registry", "s3", "directory"},
		{"s3", "sftp", "directory"},
	} {
		gate := newGate(t, e.hosts[kinds[0]])
		list := e.at(kinds[0], gate.addr)
		for _, kind := range kinds[1:] {
			list += " " + e.at(kind, e.hosts[kind])
		}
		all.Go(func() {
			if err := e.comeAndGo(t, gate, list); err != nil {
				t.Errorf("%s: %v", kinds, err)
			}
		})
	}
	all.Wait()
}

// comeAndGo reads from a list of stores of which the first is behind the gate.
func (e *everywhere) comeAndGo(t *testing.T, gate *gate, list string) error {
	var opened []chunkstore.Store
	for _, address := range Split(list) {
		s, err := Open(address, e.source)
		if err != nil {
			return err
		}
		if c, ok := s.(io.Closer); ok {
			defer c.Close()
		}
		opened = append(opened, s)
	}
	// A second request for what is slow would come from any store.
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: opened, HedgeAfter: -1})
	defer f.Close()
	next := 0
	// read reads n more chunks, as a program does, one after the other.
	read := func(n int) error {
		for range n {
			c, err := e.source.Index.At(next % len(e.plain))
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
			got, err := f.Fetch(ctx, c, nil)
			cancel()
			if err != nil || !bytes.Equal(got, e.plain[next%len(e.plain)]) {
				return fmt.Errorf("chunk %d: %d bytes, %w", next, len(got), err)
			}
			next++
		}
		return nil
	}
	// want reads n chunks and wants them from the store in a place of the list.
	chunks := make([]int64, len(opened))
	want := func(n, place int) error {
		err := read(n)
		chunks[place] += int64(n)
		for i, s := range f.Stats().Stores {
			if err == nil && s.Chunks != chunks[i] {
				err = fmt.Errorf("%d chunks are from %s, want %d", s.Chunks, s.Name, chunks[i])
			}
		}
		return err
	}
	if err := want(20, 0); err != nil {
		return fmt.Errorf("at first: %w", err)
	}

	gate.shut.Lock()
	open := sync.OnceFunc(gate.shut.Unlock)
	defer open()
	began := time.Now()
	if err := want(50, 1); err != nil {
		return fmt.Errorf("without the first store: %w", err)
	}
	if took := time.Since(began); took > 4*patience {
		return fmt.Errorf("50 chunks without the first store took %v, want one timeout of %v", took, patience)
	}

	open()
	for end := time.Now().Add(2 * time.Minute); f.Stats().Stores[0].Chunks == chunks[0]; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			return errors.New("the first store is not asked again")
		}
		if err := read(1); err != nil {
			return err
		}
	}
	for i, s := range f.Stats().Stores {
		chunks[i] = s.Chunks
	}
	if err := want(20, 0); err != nil {
		return fmt.Errorf("after the first store's return: %w", err)
	}
	return nil
}
