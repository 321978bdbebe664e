package s3store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

var server *testenv.S3

func TestMain(m *testing.M) {
	code, err := runWithServer(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "s3store:", err)
		code = 1
	}
	os.Exit(code)
}

func runWithServer(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "s3store")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if server, err = testenv.StartS3(context.Background(), dir); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	return m.Run(), nil
}

// keysOf are the variables of somebody whom the server knows.
func keysOf(s *testenv.S3) env {
	return env{"AWS_ACCESS_KEY_ID": s.AccessKey, "AWS_SECRET_ACCESS_KEY": s.SecretKey, "AWS_REGION": s.Region}
}

var buckets atomic.Int64

// newBucket makes a bucket and returns its name.
func newBucket(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("bucket-%d", buckets.Add(1))
	if err := server.MakeBucket(name); err != nil {
		t.Fatal(err)
	}
	return name
}

func open(t testing.TB, address string, o Options) *Store {
	t.Helper()
	if o.Sources.Getenv == nil {
		o.Sources = keysOf(server).sources()
	}
	s, err := New(address, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// toServer is a transport that goes to the server whatever the host.
func toServer() *http.Transport {
	t := httpio.NewTransport(parallelRequests)
	t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, server.Address)
	}
	return t
}

// chunk returns the ID and the stored form of n reproducible bytes.
func chunk(seed, n int) (index.ID, []byte) {
	plain := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(plain)
	return index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
}

// again is a Store whose writes are tried again where that may help, as a
// conversion does: the server has conflicts between writers and removers.
type again struct{ *Store }

func (a again) Put(ctx context.Context, id index.ID, frame []byte) error {
	for attempt := 1; ; attempt++ {
		err := a.Store.Put(ctx, id, frame)
		if e := (*chunkstore.Error)(nil); !errors.As(err, &e) || !e.Temporary() || attempt == 10 {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestContract(t *testing.T) {
	storetest.Run(t, func() chunkstore.Writer {
		return again{open(t, "s3+http://"+server.Address+"/"+newBucket(t)+"/some/where.castr", Options{})}
	})
}

// TestStyles: all the forms of an address lead to the chunks, with prefixes that
// must be escaped, and the server accepts each signature.
func TestStyles(t *testing.T) {
	for _, tt := range []struct{ name, host, prefix, options string }{
		{"path", server.Address, "", ""},
		{"path with a prefix", server.Address, "/a/b", ""},
		{"escapes", server.Address, "/a%20b+c/%25d=&;ä~(x)'!*", ""},
		{"virtual", server.Domain, "/p", "?style=virtual"},
		{"virtual without a prefix", server.Domain, "", "?style=virtual"},
		{"another region", server.Address, "/p", "?region=us-east-1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bucket := newBucket(t)
			s := open(t, "s3+http://"+tt.host+"/"+bucket+tt.prefix+tt.options, Options{Transport: toServer()})
			id, frame := chunk(1, 5000)
			if ok, err := s.Has(t.Context(), id); ok || err != nil {
				t.Errorf("before: got %v, %v, want false", ok, err)
			}
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Fatal(err)
			}
			if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
				t.Errorf("got %d bytes, %v, want %d", len(got), err, len(frame))
			}
			n := 0
			for e, err := range s.List(t.Context()) {
				if err != nil || e.ID != id {
					t.Errorf("got chunk %s, %v, want %s", e.ID, err, id)
				}
				n++
			}
			if n != 1 {
				t.Errorf("listed %d chunks, want 1", n)
			}
			if err := s.Remove(t.Context(), id); err != nil {
				t.Error(err)
			}
			if _, err := s.Get(t.Context(), id, nil); !errors.Is(err, chunkstore.ErrNotFound) {
				t.Errorf("after removing: got %v, want ErrNotFound", err)
			}
		})
	}
}

// TestPayload: the body is hashed for the signature where nothing else protects
// it; the server takes both forms.
func TestPayload(t *testing.T) {
	bucket := newBucket(t)
	id, frame := chunk(1, 5000)
	var got string
	pass := httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: server.Address})
		r.Out.Host = r.In.Host // it is signed
		got = r.In.Header.Get("X-Amz-Content-Sha256")
	}}
	plain, secure := httptest.NewServer(&pass), httptest.NewTLSServer(&pass)
	defer plain.Close()
	defer secure.Close()
	for address, want := range map[string]string{plain.URL: hexSum(frame), secure.URL: unsignedPayload} {
		s := open(t, "s3+"+address+"/"+bucket, Options{Transport: secure.Client().Transport})
		if err := s.Put(t.Context(), id, frame); err != nil || got != want {
			t.Errorf("%s: %v, the hash of the body is %q, want %q", s, err, got, want)
		}
		if b, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(b, frame) || got != emptyPayload {
			t.Errorf("%s: got %d bytes, %v, with hash %q", s, len(b), err, got)
		}
	}
}

// TestLayout: the objects are the files of a store in a directory.
func TestLayout(t *testing.T) {
	bucket := newBucket(t)
	s := open(t, "s3+http://"+server.Address+"/"+bucket+"/store.castr", Options{})
	id, frame := chunk(1, 1000)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	l, err := local.Open(filepath.Join(server.Dir, bucket, "store.castr"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got, err := l.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v, want %d", len(got), err, len(frame))
	}
}

// TestListPages: a list of several pages, beside what is no chunk of the store.
func TestListPages(t *testing.T) {
	bucket := newBucket(t)
	s := open(t, "s3+http://"+server.Address+"/"+bucket+"/a b", Options{})
	dir := filepath.Join(server.Dir, bucket)
	want := map[index.ID]bool{}
	for i := range 2500 {
		id, frame := chunk(i, 8)
		want[id] = true
		file := filepath.Join(dir, s.address.key(id))
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, frame, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, other := range []string{"a b/README", "a b/0000/x", "a bc/" + strings.TrimPrefix(s.address.key(index.ID{}), "a b/"), "a b/c/" + strings.TrimPrefix(s.address.key(index.ID{}), "a b/")} {
		file := filepath.Join(dir, other)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("x"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	requests := countRequests(s)
	for e, err := range s.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if !want[e.ID] {
			t.Errorf("got chunk %s, twice or not of this store", e.ID)
		}
		delete(want, e.ID)
	}
	if len(want) > 0 {
		t.Errorf("%d chunks are missing", len(want))
	}
	if n := requests.Load(); n != 3 {
		t.Errorf("%d requests for 2500 chunks, want 3", n)
	}
}

// counted counts the requests of a transport.
type counted struct {
	http.RoundTripper
	n atomic.Int64
}

func (c *counted) RoundTrip(r *http.Request) (*http.Response, error) {
	c.n.Add(1)
	return c.RoundTripper.RoundTrip(r)
}

func countRequests(s *Store) *atomic.Int64 {
	c := &counted{RoundTripper: s.transport}
	s.transport = c
	return &c.n
}

// TestOneRequest: each call is one request.
func TestOneRequest(t *testing.T) {
	s := open(t, "s3+http://"+server.Address+"/"+newBucket(t), Options{})
	requests := countRequests(s)
	id, frame := chunk(1, 1000)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"Has, absent", func() error { _, err := s.Has(t.Context(), id); return err }},
		{"Put", func() error { return s.Put(t.Context(), id, frame) }},
		{"Has", func() error { _, err := s.Has(t.Context(), id); return err }},
		{"Get", func() error { _, err := s.Get(t.Context(), id, nil); return err }},
		{"Remove", func() error { return s.Remove(t.Context(), id) }},
	} {
		before := requests.Load()
		if err := step.do(); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
		if n := requests.Load() - before; n != 1 {
			t.Errorf("%s: %d requests, want 1", step.name, n)
		}
	}
}

// TestRefusals: what a real server says becomes one line that names what to do.
func TestRefusals(t *testing.T) {
	bucket := newBucket(t)
	known := keysOf(server)
	with := func(change env) env {
		e := env{}
		for _, m := range []env{known, change} {
			for k, v := range m {
				e[k] = v
			}
		}
		return e
	}
	id, frame := chunk(1, 1000)
	for _, tt := range []struct {
		name, bucket string
		env          env
		want         string
	}{
		{"nobody", bucket, env{}, "no credentials were found, and the bucket is not everybody's: set AWS_ACCESS_KEY_ID"},
		{"unknown key", bucket, with(env{"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}), "InvalidAccessKeyId: the server does not know the access key"},
		{"wrong secret", bucket, with(env{"AWS_SECRET_ACCESS_KEY": "hidden"}), "SignatureDoesNotMatch: the secret key is not that of the access key"},
		{"no bucket", "absent", known, `NoSuchBucket: there is no bucket "absent"`},
		{"half a key", bucket, env{"AWS_ACCESS_KEY_ID": "AKIA"}, "only one is set"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, "s3+http://"+server.Address+"/"+tt.bucket, Options{Sources: tt.env.sources()})
			_, errGet := s.Get(t.Context(), id, nil)
			var errList error
			for _, errList = range s.List(t.Context()) {
			}
			for call, err := range map[string]error{"Get": errGet, "Put": s.Put(t.Context(), id, frame), "List": errList} {
				wantError(t, call, err, tt.want, false)
			}
			if tt.name != "no bucket" { // HEAD cannot tell a bucket from a key
				_, err := s.Has(t.Context(), id)
				wantError(t, "Has", err, tt.want, false)
			}
		})
	}
}

// wantError wants err to be a *chunkstore.Error in one line with the given text.
func wantError(t *testing.T, call string, err error, text string, temporary bool) {
	t.Helper()
	var e *chunkstore.Error
	if !errors.As(err, &e) || !strings.Contains(err.Error(), text) || strings.ContainsAny(err.Error(), "\n\r") ||
		strings.Contains(err.Error(), "hidden") || e.Temporary() != temporary {
		t.Errorf("%s: got %v (temporary: %v), want %q in one line, temporary: %v", call, err, e != nil && e.Temporary(), text, temporary)
	}
}

// TestPublic: a bucket that everybody may read is read without credentials.
func TestPublic(t *testing.T) {
	bucket := newBucket(t)
	s := open(t, "s3+http://"+server.Address+"/"+bucket, Options{})
	id, frame := chunk(1, 1000)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	policy := fmt.Sprintf(`{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":["s3:GetObject"],"Resource":["arn:aws:s3:::%[1]s/*"]},
		{"Effect":"Allow","Principal":"*","Action":["s3:ListBucket"],"Resource":["arn:aws:s3:::%[1]s"]}]}`, bucket)
	q, err := s.begin(t.Context(), "set the policy", s.stall)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := q.send(ask{method: http.MethodPut, query: "policy=", body: []byte(policy)})
	if err != nil {
		t.Fatal(err)
	}
	q.watch.Leave(resp)
	q.end()

	anybody := open(t, s.String(), Options{Sources: env{}.sources()})
	if got, err := anybody.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v, want %d", len(got), err, len(frame))
	}
	if ok, err := anybody.Has(t.Context(), id); err != nil || !ok {
		t.Errorf("got %v, %v, want true", ok, err)
	}
	wantError(t, "Put", anybody.Put(t.Context(), id, frame), "no credentials were found", false)
}

// TestServerStartsAgain: a server that was away serves the same Store.
func TestServerStartsAgain(t *testing.T) {
	own, err := testenv.StartS3(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := own.MakeBucket("bucket"); err != nil {
		t.Fatal(err)
	}
	s := open(t, "s3+http://"+own.Address+"/bucket", Options{Sources: keysOf(own).sources()})
	id, frame := chunk(1, 1000)
	if err := s.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	if err := own.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = s.Get(t.Context(), id, nil)
	wantError(t, "Get from a server that is away", err, "connection refused", true)
	if err := own.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v, want %d", len(got), err, len(frame))
	}
	if err := own.Close(); err != nil {
		t.Error(err)
	}
}

// TestManyAtOnce: no more requests run at once than a Store allows itself.
func TestManyAtOnce(t *testing.T) {
	s := open(t, "s3+http://"+server.Address+"/"+newBucket(t), Options{})
	var g sync.WaitGroup
	for i := range 3 * parallelRequests {
		g.Go(func() {
			id, frame := chunk(i, 2000)
			if err := s.Put(t.Context(), id, frame); err != nil {
				t.Error(err)
			}
			if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
				t.Errorf("got %d bytes, %v, want %d", len(got), err, len(frame))
			}
		})
	}
	g.Wait()
}
