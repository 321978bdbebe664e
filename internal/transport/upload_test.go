package transport

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/registrystore"
)

// uploads is a registry's side of blob uploads, with the habits that
// registries have.
type uploads struct {
	keepsPartial bool   // of a piece that broke off
	refusesHead  bool   // 405
	pieces       int    // that one upload may have; 0: any number
	atLeast      int    // OCI-Chunk-Min-Length
	absolute     string // prefix of locations: "http://host"
	wrongDigest  bool   // Docker-Content-Digest is of something else
	forgets      bool   // an upload that is asked about is not known any more
	mounts       int    // status of a mount: 201, 202, 400

	// before answers a request itself if it returns true; n counts requests.
	before func(n int, w http.ResponseWriter, r *http.Request) bool

	mu       sync.Mutex // guards what follows
	requests []string
	auth     map[string]bool // host + Authorization that were seen
	received int             // bytes of bodies, those of broken requests too
	open     map[string][]byte
	parts    map[string]int
	blobs    map[string][]byte
}

func newUploads() *uploads {
	return &uploads{auth: map[string]bool{}, open: map[string][]byte{}, parts: map[string]int{}, blobs: map[string][]byte{}}
}

// cut reads n bytes of the body and breaks the connection.
func (u *uploads) cut(n int) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		b := make([]byte, n)
		k, _ := io.ReadFull(r.Body, b)
		u.mu.Lock()
		u.received += k
		if id := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]; u.keepsPartial && r.Method == http.MethodPatch {
			u.open[id] = append(u.open[id], b[:k]...)
		}
		u.mu.Unlock()
		reset(w)
	}
}

// reset ends the connection without an answer.
func reset(w http.ResponseWriter) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

func (u *uploads) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	u.requests = append(u.requests, r.Method+" "+r.URL.Path)
	n := len(u.requests) - 1
	u.auth[r.Host+" "+r.Header.Get("Authorization")] = true
	u.mu.Unlock()
	if u.before != nil && u.before(n, w, r) {
		return
	}
	body, err := io.ReadAll(r.Body)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.received += len(body)
	last := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	if err != nil {
		return
	}
	at := func(id string) {
		w.Header().Set("Location", u.absolute+"/v2/a/b/blobs/uploads/"+id+"?state="+strconv.Itoa(len(u.open[id])))
		w.Header().Set("Range", fmt.Sprintf("0-%d", max(0, len(u.open[id])-1)))
	}
	_, known := u.open[last]
	digest := r.URL.Query().Get("digest")
	switch {
	case r.URL.Path == "/v2/":
	case r.Method == http.MethodHead && u.refusesHead:
		w.WriteHeader(http.StatusMethodNotAllowed)
	case strings.HasPrefix(last, "sha256:"):
		b, ok := u.blobs[last]
		switch {
		case !ok:
			w.WriteHeader(http.StatusNotFound)
		case r.Header.Get("Range") == "bytes=0-0":
			w.WriteHeader(http.StatusPartialContent)
			w.Write(b[:1])
		default:
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		}
	case r.Method == http.MethodPost:
		if m := r.URL.Query().Get("mount"); m != "" && u.mounts != http.StatusAccepted {
			if u.mounts == http.StatusCreated {
				w.Header().Set("Docker-Content-Digest", m)
			}
			w.WriteHeader(u.mounts)
			return
		}
		id := strconv.Itoa(len(u.open) + 1)
		u.open[id] = []byte{}
		at(id)
		if u.atLeast > 0 {
			w.Header().Set("OCI-Chunk-Min-Length", strconv.Itoa(u.atLeast))
		}
		w.WriteHeader(http.StatusAccepted)
	case !known, r.Method == http.MethodGet && u.forgets:
		w.WriteHeader(http.StatusNotFound)
	case r.Method == http.MethodGet:
		at(last)
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodPatch:
		want := fmt.Sprintf("%d-%d", len(u.open[last]), len(u.open[last])+len(body)-1)
		if u.parts[last]++; u.pieces > 0 && u.parts[last] > u.pieces || r.Header.Get("Content-Range") != want {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		if len(body) < u.atLeast {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		u.open[last] = append(u.open[last], body...)
		at(last)
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPut:
		all := append(u.open[last], body...)
		delete(u.open, last)
		got := fmt.Sprintf("sha256:%x", sha256.Sum256(all))
		if got != digest {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		u.blobs[got] = all
		if u.wrongDigest {
			got = "sha256:" + strings.Repeat("0", 64)
		}
		w.Header().Set("Docker-Content-Digest", got)
		w.WriteHeader(http.StatusCreated)
	}
}

const testPiece = 64 << 10

// uploaderTo returns an uploader of small pieces that does not wait long.
func uploaderTo(t testing.TB, h http.Handler, o Options) (*uploader, *httptest.Server) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	p := must(newRepository(mustParse(t, strings.TrimPrefix(s.URL, "http://")+"/a/b:v1"), o))(t)
	up := newUploader(p, o.progress)
	up.piece, up.pause = testPiece, time.Millisecond
	return up, s
}

// randomBlob is a blob of n bytes.
func randomBlob(n int) (blob, []byte) {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return bytesBlob(v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sha256.Sum256(b))}, b), b
}

// TestUploadSurvivesCuts breaks each request of an upload, before the registry
// has it, in the middle of it and behind it.
func TestUploadSurvivesCuts(t *testing.T) {
	const size = 4*testPiece + 1000
	b, plain := randomBlob(size)
	stages := 0
	for _, keepsPartial := range []bool{true, false} {
		for _, after := range []int{0, 1, testPiece / 2, testPiece, -1} { // bytes; -1: the answer is lost
			for stage := 0; ; stage++ {
				reg := newUploads()
				reg.keepsPartial = keepsPartial
				broke := false
				reg.before = func(n int, w http.ResponseWriter, r *http.Request) bool {
					if n != stage || broke || r.URL.Path == "/v2/" {
						return false
					}
					broke = true
					if after < 0 {
						reg.before = nil
						reg.ServeHTTP(httptest.NewRecorder(), r)
						reset(w)
						return true
					}
					reg.cut(after)(w, r)
					return true
				}
				var progress atomic.Int64
				up, _ := uploaderTo(t, reg, Options{Progress: func(n int64) { progress.Add(n) }})
				if reused, err := up.put(t.Context(), b); err != nil || reused {
					t.Fatalf("stage %d broken after %d bytes: %v, %v; %q", stage, after, reused, err, reg.requests)
				}
				if string(reg.blobs[b.digest.String()]) != string(plain) {
					t.Fatalf("stage %d: other bytes arrived", stage)
				}
				if again := reg.received - size; again < 0 || again > testPiece {
					t.Errorf("stage %d broken after %d bytes: %d bytes were sent again, more than a piece; %q", stage, after, again, reg.requests)
				}
				if progress := progress.Load(); progress != size {
					t.Errorf("stage %d broken after %d bytes: progress of %d bytes, want %d", stage, after, progress, size)
				}
				if !broke && stage > 0 {
					break
				}
				stages++
			}
		}
	}
	if stages < 50 {
		t.Errorf("%d requests were broken", stages)
	}
}

func TestUploadHabits(t *testing.T) {
	const size = 3*testPiece + 10
	for _, tt := range []struct {
		name  string
		set   func(*uploads)
		max   int    // bytes that may be received, 0: the size
		fails string // part of the error
	}{
		{name: "pieces", set: func(u *uploads) {}},
		{name: "HEAD refused", set: func(u *uploads) { u.refusesHead = true }},
		{name: "no pieces", set: func(u *uploads) { u.pieces = -1 }},
		{name: "one piece", set: func(u *uploads) { u.pieces = 1 }, max: size + 2*testPiece},
		{name: "large pieces", set: func(u *uploads) { u.atLeast = 2 * testPiece }, max: size + 2*testPiece + size},
		{name: "pieces larger than the blob", set: func(u *uploads) { u.atLeast = 1 << 40 }, max: 2 * size},
		{name: "other digest", set: func(u *uploads) { u.wrongDigest = true }, fails: "stored it as"},
		{name: "forgets", set: func(u *uploads) {
			u.forgets = true
			u.before = times(1, http.MethodPatch, func(w http.ResponseWriter, r *http.Request) { u.cut(10)(w, r) })
		}, max: size + testPiece},
		{name: "5xx", set: func(u *uploads) { u.before = times(3, http.MethodPatch, status(500, "")) }, max: size + 3*testPiece},
		{name: "429 at each stage", set: func(u *uploads) {
			seen := map[string]bool{}
			u.before = func(_ int, w http.ResponseWriter, r *http.Request) bool {
				if seen[r.Method] || r.URL.Path == "/v2/" {
					return false
				}
				seen[r.Method] = true
				status(429, "0")(w, r)
				return true
			}
		}, max: size + 2*testPiece},
		{name: "always 503", set: func(u *uploads) { u.before = times(1000, http.MethodPatch, status(503, "")) }, max: 10 * size, fails: "503"},
		{name: "asks for an hour", set: func(u *uploads) { u.before = times(1, http.MethodPatch, status(429, "3600")) }, max: size, fails: "asked again in 1h0m0s"},
		{name: "refused", set: func(u *uploads) { u.before = times(1000, http.MethodPost, status(403, "")) }, fails: "403"},
		{name: "405 for all", set: func(u *uploads) { u.before = times(1000, http.MethodPut, status(405, "")) }, max: 5 * size, fails: "405"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, plain := randomBlob(size)
			reg := newUploads()
			tt.set(reg)
			up, _ := uploaderTo(t, reg, Options{})
			_, err := up.put(t.Context(), b)
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Errorf("got %v, want an error with %q", err, tt.fails)
				}
				return
			}
			if err != nil || string(reg.blobs[b.digest.String()]) != string(plain) {
				t.Fatalf("%v; %q", err, reg.requests)
			}
			if limit := max(tt.max, size); tt.name != "no pieces" && reg.received > limit {
				t.Errorf("%d bytes were received for a blob of %d, want at most %d", reg.received, size, limit)
			}
			clear(up.known)
			before := reg.received
			if reused, err := up.put(t.Context(), b); err != nil || !reused || reg.received != before {
				t.Errorf("again: %v, %v, %d bytes", reused, err, reg.received-before)
			}
		})
	}
}

// times applies f to the first n requests of a method.
func times(n int, method string, f func(http.ResponseWriter, *http.Request)) func(int, http.ResponseWriter, *http.Request) bool {
	var mu sync.Mutex
	return func(_ int, w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		hit := r.Method == method && n > 0
		if hit {
			n--
		}
		mu.Unlock()
		if hit {
			f(w, r)
		}
		return hit
	}
}

func status(code int, retryAfter string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(code)
	}
}

// A registry that takes nothing more, and one that never answers, are given up
// and tried again.
func TestUploadStalls(t *testing.T) {
	for _, reads := range []int{100, 1 << 30} {
		over := make(chan struct{})
		reg := newUploads()
		reg.before = times(1, http.MethodPatch, func(w http.ResponseWriter, r *http.Request) {
			io.CopyN(io.Discard, r.Body, int64(reads))
			<-over
		})
		up, s := uploaderTo(t, reg, Options{})
		t.Cleanup(func() { close(over) })
		up.piece, up.sending, up.answering = 16<<20, time.Second, 3*time.Second
		b, plain := randomBlob(17 << 20) // more than sockets hold
		if _, err := up.put(t.Context(), b); err != nil || string(reg.blobs[b.digest.String()]) != string(plain) {
			t.Errorf("after a stall: %v", err)
		}
		s.CloseClientConnections()
		reg.before = func(_ int, w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				<-over
				return true
			}
			return false
		}
		up.answering = 20 * time.Millisecond
		b, _ = randomBlob(testPiece)
		if _, err := up.put(t.Context(), b); !errors.Is(err, httpio.ErrStalled) {
			t.Errorf("without any answer: %v, want %v", err, httpio.ErrStalled)
		}
	}
}

type passwordKeychain struct{ user, password string }

func (k passwordKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: k.user, Password: k.password}, nil
}

// Uploads that go to another host get no credentials there; tokens that die
// are renewed where they were asked for.
func TestUploadCredentials(t *testing.T) {
	const password = "pl4nted"
	storage := newUploads()
	other := httptest.NewServer(storage)
	defer other.Close()
	storage.absolute = other.URL
	front := newUploads()
	tokens, used := 0, 0
	front.before = func(_ int, w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			if _, p, _ := r.BasicAuth(); p != password {
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			tokens++
			used = 0
			fmt.Fprintf(w, `{"token":"token-%d"}`, tokens)
			return true
		}
		if used++; used > 2 || r.Header.Get("Authorization") != fmt.Sprintf("Bearer token-%d", tokens) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		return false
	}
	const size = 6*testPiece + 5
	b, plain := randomBlob(size)
	up, _ := uploaderTo(t, front, Options{Keychain: passwordKeychain{"ci", password}})
	if _, err := up.put(t.Context(), b); err != nil || string(front.blobs[b.digest.String()]) != string(plain) {
		t.Fatalf("with tokens that die: %v; %q", err, front.requests)
	}
	if tokens < 4 {
		t.Errorf("%d tokens were asked for", tokens)
	}

	storage.open["8"] = []byte{}
	front.before = func(_ int, w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.URL.Path == "/v2/":
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case r.Method == http.MethodPost:
			w.Header().Set("Location", other.URL+"/v2/a/b/blobs/uploads/8?signature=s3cret")
			w.WriteHeader(http.StatusAccepted)
		default:
			return false
		}
		return true
	}
	b, plain = randomBlob(size + 1)
	up, _ = uploaderTo(t, front, Options{Keychain: passwordKeychain{"ci", password}})
	if _, err := up.put(t.Context(), b); err != nil || string(storage.blobs[b.digest.String()]) != string(plain) {
		t.Fatalf("to another host: %v", err)
	}
	for seen := range storage.auth {
		if !strings.HasSuffix(seen, " ") {
			t.Errorf("the other host got credentials: %q", seen)
		}
	}
	// What fails there is told without the signature.
	storage.before = times(1000, http.MethodPatch, func(w http.ResponseWriter, _ *http.Request) { reset(w) })
	storage.open["8"] = []byte{}
	b, _ = randomBlob(size + 2)
	if _, err := up.put(t.Context(), b); err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("broken at the other host: %v", err)
	}
}

func TestMount(t *testing.T) {
	for _, tt := range []struct {
		status, sent int
		reused       bool
	}{{http.StatusCreated, 0, true}, {http.StatusAccepted, 4, false}, {http.StatusBadRequest, 4, false}, {http.StatusForbidden, 4, false}} {
		reg := newUploads()
		reg.mounts = tt.status
		up, _ := uploaderTo(t, reg, Options{})
		b := must(packBlob(testPack("pack")))(t)
		b.from = "c/d"
		if reused, err := up.put(t.Context(), b); err != nil || reused != tt.reused || reg.received != tt.sent {
			t.Errorf("a mount is answered with %d: reused %v, %v, %d bytes sent; want %v, %d", tt.status, reused, err, reg.received, tt.reused, tt.sent)
		}
	}
}

// TestMountReal takes a pack from another repository of a real registry, and
// sends it where it lies in another registry.
func TestMountReal(t *testing.T) {
	ctx := context.Background()
	reg := must(testenv.StartRegistry(ctx, t.TempDir(), ""))(t)
	defer reg.Close()
	put := func(ref string, p registrystore.Pack) bool {
		d := must(OpenDestination(ctx, mustParse(t, ref), Options{}))(t)
		defer d.Close()
		return must(d.PutPack(ctx, p))(t)
	}
	p := testPack("pack")
	if put(reg.Address+"/old/x:v1", p) {
		t.Error("a new pack was there")
	}
	moved := p
	moved.From = "registry://" + reg.Address + "/old/x"
	moved.Open = func() (io.ReadCloser, error) { return nil, errors.New("it was opened") }
	if !put(reg.Address+"/new/x:v1", moved) {
		t.Error("the pack was not mounted")
	}
	elsewhere := p
	elsewhere.From = moved.From
	if put(startRegistry(t, nil)+"/new/x:v1", elsewhere) {
		t.Error("the pack of another registry was mounted")
	}
	elsewhere.From = "registry://" + reg.Address + "/never/was"
	if put(reg.Address+"/newer/x:v1", elsewhere) {
		t.Error("a pack was mounted from where it is not")
	}
	s := must(registrystore.NewRemote("registry://"+reg.Address+"/new/x", registrystore.RemoteOptions{}))(t)
	if b, err := registrystore.ReadRange(ctx, s, p.Digest, 0, p.Size, nil); err != nil || string(b) != "pack" {
		t.Errorf("the mounted pack: %q, %v", b, err)
	}
}

// TestUploadReal breaks a piece on its way to real registries.
func TestUploadReal(t *testing.T) {
	cache := must(testenv.OpenCache())(t)
	const size = 5 * testPiece
	for name, tt := range map[string]struct {
		start func(context.Context, string, string) (*testenv.Registry, error)
		limit int64 // bytes that may be sent
	}{
		// It forgets an upload of which a part of a piece arrived.
		"distribution 2": {testenv.StartRegistry, 2 * size},
		"distribution 3": {cache.StartDistribution, size + testPiece},
	} {
		t.Run(name, func(t *testing.T) {
			reg := must(tt.start(t.Context(), t.TempDir(), ""))(t)
			defer reg.Close()
			target := must(url.Parse("http://" + reg.Address))(t)
			// How much it has kept when it is asked at once is chance: the best of
			// three uploads counts.
			least := int64(math.MaxInt64)
			for i := range 3 {
				if least > tt.limit {
					least = min(least, uploadBroken(t, target, size-i)) // another blob each time
				}
			}
			if least > tt.limit {
				t.Errorf("%d bytes were sent for a blob of %d, want at most %d", least, size, tt.limit)
			}
		})
	}
}

// uploadBroken uploads a blob to the registry at target over a connection that
// breaks in the third piece, and returns how many of its bytes were sent.
func uploadBroken(t *testing.T, target *url.URL, size int) int64 {
	t.Helper()
	var patches, received atomic.Int64
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
			if r.In.Method != http.MethodPatch {
				return
			}
			left := int64(1 << 40)
			if patches.Add(1) == 3 {
				left = testPiece / 2
			}
			r.Out.Body = &broken{r.In.Body, left, &received}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { reset(w) },
	}
	b, _ := randomBlob(size)
	up, _ := uploaderTo(t, proxy, Options{})
	if reused, err := up.put(t.Context(), b); err != nil || reused {
		t.Fatalf("%v, %v", reused, err)
	}
	if ok, err := up.has(t.Context(), "blobs/"+b.digest.String()); err != nil || !ok {
		t.Errorf("the blob is not there: %v", err)
	}
	return received.Load()
}

// broken is a body that ends with an error.
type broken struct {
	io.ReadCloser
	left int64
	n    *atomic.Int64
}

func (b *broken) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	b.n.Add(int64(n))
	return n, err
}
