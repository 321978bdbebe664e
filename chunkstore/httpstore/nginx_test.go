package httpstore

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/freeport"
)

// TestMain keeps the tests from a proxy that the environment names.
func TestMain(m *testing.M) {
	for _, v := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"} {
		os.Unsetenv(v)
	}
	os.Exit(m.Run())
}

const (
	user     = "ci"
	password = "pl4nted/pass@word" // to be found nowhere but in its header
)

// nginx is a running one with the configuration of samples/http.
type nginx struct {
	addr string // host:port
	dir  string // what it serves
	log  string // file: protocol, method, status and Authorization header of each request
}

// startNginx starts Debian's nginx. replace are further pairs of old and new
// text in the configuration.
func startNginx(t testing.TB, replace ...string) *nginx {
	t.Helper()
	path, err := exec.LookPath("nginx")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/nginx"); err != nil {
			t.Fatalf("%v: install the package nginx", err)
		}
	}
	sample, err := os.ReadFile("../../samples/http/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	n := &nginx{dir: filepath.Join(dir, "chunks"), log: filepath.Join(dir, "access.log")}
	for _, name := range []string{"chunks", "chunks.incoming", "tmp"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "chunk-writers"), []byte(user+":{PLAIN}"+password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Another process may take the free port before nginx does.
	for range 5 {
		if n.addr, err = freeport.Address(); err != nil {
			t.Fatal(err)
		}
		site := strings.NewReplacer(append(slices.Clone(replace), // before the general ones
			"listen 80;", "listen ADDR;",
			"/srv/chunks", n.dir,
			"/etc/nginx/", dir+"/",
		)...).Replace(string(sample))
		site = strings.ReplaceAll(site, "ADDR", n.addr)
		config := filepath.Join(dir, "nginx.conf")
		err = os.WriteFile(config, fmt.Appendf(nil, `daemon off;
user root;
worker_processes 2;
pid %[1]s/pid;
error_log %[1]s/error.log;
events { worker_connections 512; }
http {
	log_format seen '$server_protocol $request_method $status "$http_authorization"';
	access_log %[2]s seen;
	proxy_temp_path %[1]s/tmp/proxy;
	fastcgi_temp_path %[1]s/tmp/fastcgi;
	uwsgi_temp_path %[1]s/tmp/uwsgi;
	scgi_temp_path %[1]s/tmp/scgi;
	%[3]s
}
`, dir, n.log, site), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		cmd := exec.Command(path, "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", config)
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		t.Cleanup(func() {
			cmd.Process.Signal(syscall.SIGTERM) // the master ends its workers
			select {
			case <-ended:
			case <-time.After(2 * time.Minute):
				t.Errorf("nginx did not end")
				cmd.Process.Kill()
			}
		})
		for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if c, err := net.Dial("tcp", n.addr); err == nil {
				c.Close()
				return n
			}
			select {
			case <-ended:
				deadline = time.Time{}
			default:
			}
		}
		t.Logf("nginx did not start: %s", out.Bytes())
	}
	t.Fatal("nginx does not start")
	return nil
}

// withTLS are replacements that make the sample speak TLS and HTTP/2 with the
// certificate of client.
func withTLS(t testing.TB) (client *httptest.Server, replace []string) {
	t.Helper()
	client = httptest.NewUnstartedServer(nil)
	client.EnableHTTP2 = true
	client.StartTLS()
	t.Cleanup(client.Close)
	own := client.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(own.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "pem")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	if err := os.WriteFile(name, both, 0o600); err != nil {
		t.Fatal(err)
	}
	return client, []string{
		"# listen 443 ssl http2;", "listen ADDR ssl http2;",
		"    listen 80;", "",
		"# ssl_certificate ", "ssl_certificate ", "# ssl_certificate_key", "ssl_certificate_key",
		"/etc/nginx/chunks.pem", name, "/etc/nginx/chunks.key", name,
	}
}

func login(user, password string) Options {
	return Options{Login: func(ctx context.Context) (Login, error) { return Login{User: user, Password: password}, nil }}
}

func open(t testing.TB, address string, o Options) *Store {
	t.Helper()
	s, err := New(address, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestContract runs the contract against nginx as in the sample, against one
// that makes no directories by itself, and over HTTP/2.
func TestContract(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, n *nginx, scheme string, o Options) {
		stores := 0
		storetest.Run(t, func() chunkstore.Writer {
			stores++
			name := fmt.Sprintf("store %d.castr", stores)
			if err := os.Mkdir(filepath.Join(n.dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
			return open(t, scheme+n.addr+"/"+strings.ReplaceAll(name, " ", "%20"), o)
		})
	}
	t.Run("sample", func(t *testing.T) {
		run(t, startNginx(t), "http://", login(user, password))
	})
	t.Run("MKCOL", func(t *testing.T) {
		run(t, startNginx(t, "create_full_put_path on;", "", "dav_methods PUT;", "dav_methods PUT MKCOL;"), "http://", login(user, password))
	})
	t.Run("HTTP2", func(t *testing.T) {
		client, replace := withTLS(t)
		n := startNginx(t, replace...)
		o := login(user, password)
		o.Transport = client.Client().Transport
		run(t, n, "https://", o)
		seen, err := os.ReadFile(n.log)
		if err != nil || !bytes.Contains(seen, []byte("HTTP/2.0 PUT 201")) || bytes.Contains(seen, []byte("HTTP/1")) {
			t.Errorf("got other protocols than HTTP/2 in nginx's log, %v", err)
		}
	})
}

// TestSample: everybody reads, and writers need their password.
func TestSample(t *testing.T) {
	t.Parallel()
	n := startNginx(t)
	base := "http://" + n.addr + "/rootfs.castr"
	id, frame := chunk(1, 100_000)
	for _, tt := range []struct{ address, want string }{
		{base, "401 Unauthorized: the server wants credentials"},
		{"http://ci:wrong@" + n.addr + "/rootfs.castr", "401 Unauthorized: the server refuses the credentials"},
		{"http://ci:pl4nted%2Fpass%40word@" + n.addr + "/rootfs.castr", ""},
	} {
		s := open(t, tt.address, Options{})
		checkError(t, "Put", s.Put(t.Context(), id, frame), tt.want, false)
		if s.String() != base {
			t.Errorf("got name %s, want %s", s, base)
		}
	}
	s := open(t, base+"/", Options{})
	if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	err := filepath.WalkDir(n.dir+".incoming", func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// image returns bytes, and their chunks in order.
func image(t testing.TB, d index.Digest) (data []byte, chunks []index.Chunk) {
	t.Helper()
	cutter, err := chunker.New(chunker.V1)
	if err != nil {
		t.Fatal(err)
	}
	data = make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	for i := range data[:1<<20] {
		data[i] &= 7
	}
	data = append(data, make([]byte, 600<<10)...)
	for off := 0; off < len(data); {
		n := cutter.Cut(data[off:])
		chunks = append(chunks, index.Chunk{ID: d.Sum(data[off : off+n]), Offset: int64(off), Size: n})
		off += n
	}
	return data, chunks
}

// TestCasyncExtract: casync reads over HTTP what a Store wrote.
func TestCasyncExtract(t *testing.T) {
	t.Parallel()
	n := startNginx(t)
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		base := n.addr + "/" + d.String() + ".castr"
		s := open(t, "http://"+base, login(user, password))
		data, chunks := image(t, d)
		var file bytes.Buffer
		w := index.NewWriter(&file, chunker.V1, d)
		for _, c := range chunks {
			if err := s.Put(t.Context(), c.ID, chunkstore.Encode(nil, data[c.Offset:c.Offset+int64(c.Size)])); err != nil {
				t.Fatal(err)
			}
			if err := w.Append(c.ID, c.Size); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		caibx, out := filepath.Join(dir, "image.caibx"), filepath.Join(dir, "out")
		if err := os.WriteFile(caibx, file.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		casync(t, "extract", "--store="+s.String(), caibx, out)
		if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: casync extract: got %d bytes, %v, want %d", d, len(got), err, len(data))
		}
	}
}

// TestCasyncMake: a Store reads over HTTP what casync made.
func TestCasyncMake(t *testing.T) {
	t.Parallel()
	n := startNginx(t)
	for i, compression := range []string{"zstd", "xz", "gzip"} {
		d := []index.Digest{index.SHA256, index.SHA512_256}[i%2]
		data, _ := image(t, d)
		dir := t.TempDir()
		file, caibx := filepath.Join(dir, "image"), filepath.Join(dir, "image.caibx")
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
		casync(t, "make", "--digest="+d.String(), "--compression="+compression, "--store="+filepath.Join(n.dir, compression+".castr"), caibx, file)
		b, err := os.ReadFile(caibx)
		if err != nil {
			t.Fatal(err)
		}
		x, err := index.Open(b)
		if err != nil {
			t.Fatal(err)
		}
		s := open(t, "http://"+n.addr+"/"+compression+".castr", Options{})
		got := readAll(t, s, x)
		if !bytes.Equal(got, data) {
			t.Errorf("%s: got %d bytes, want the image's %d", compression, len(got), len(data))
		}
	}
}

func readAll(t testing.TB, s chunkstore.Store, x *index.Index) []byte {
	t.Helper()
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: x.Digest(), Stores: []chunkstore.Store{s}})
	defer f.Close()
	var chunks []index.Chunk
	for i := range x.Len() {
		c, err := x.At(i)
		if err != nil {
			t.Fatal(err)
		}
		chunks = append(chunks, c)
	}
	got := make([]byte, x.Size())
	err := f.FetchBatch(t.Context(), chunks, func(i int, plain []byte) error {
		copy(got[chunks[i].Offset:], plain)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return got
}

func casync(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "casync", args...).CombinedOutput(); err != nil {
		t.Fatalf("casync %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestSharedWithLocal: the layout is that of chunkstore/local.
func TestSharedWithLocal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	files := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer files.Close()
	l, err := local.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := open(t, files.URL, Options{})
	for i := range 20 {
		id, frame := chunk(i, 1000*i+1)
		if err := l.Put(t.Context(), id, frame); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		if ok, err := s.Has(t.Context(), id); err != nil || !ok {
			t.Errorf("got %v, %v", ok, err)
		}
	}
}

var discardLog = log.New(io.Discard, "", 0)

// dialTo connects to the same port of another host.
func dialTo(host string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(host, port))
	}
}
