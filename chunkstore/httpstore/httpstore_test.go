package httpstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
)

// chunk returns the ID and the stored form of n reproducible bytes.
func chunk(seed, n int) (index.ID, []byte) {
	plain := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(plain)
	return index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
}

// checkError wants a *chunkstore.Error with a part of its text, or none.
func checkError(t *testing.T, what string, err error, want string, temporary bool) {
	t.Helper()
	if want == "" {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		return
	}
	var e *chunkstore.Error
	if !errors.As(err, &e) || !strings.Contains(err.Error(), want) || e.Temporary() != temporary {
		t.Errorf("%s: got %v, want %q, temporary %v", what, err, want, temporary)
		return
	}
	if msg := err.Error(); strings.Contains(msg, "\n") || strings.Contains(msg, "s3cret") || strings.Contains(msg, password) {
		t.Errorf("%s: got error %q, want one line without secrets", what, msg)
	}
}

func TestAddresses(t *testing.T) {
	id := index.ID{0xab, 0xcd}
	for _, tt := range []struct {
		address, name, auth string // name empty: refused
	}{
		{"https://h/p", "https://h/p", ""},
		{"https://h/p/", "https://h/p", ""},
		{"https://h", "https://h", ""},
		{"HTTPS://h:8443/a%20b//", "https://h:8443/a%20b", ""},
		{"http://[::1]:80/p", "http://[::1]:80/p", ""},
		{"http://joe:s3cret@h/p", "http://h/p", "Basic am9lOnMzY3JldA=="},
		{"http://joe:s3cret%40@h/p", "http://h/p", "Basic am9lOnMzY3JldEA="},
		{"http://joe@h/p", "http://h/p", "Basic am9lOg=="},
		{"http://joe:s3cret@", "", ""},
		{"http://joe:s3cret@@h", "http://h", "Basic am9lOnMzY3JldEA="},
		{"http://joe:s3/cret@h/p", "", ""},
		{"http://joe:1/s3cret@h/p", "", ""},
		{"http://joe:s3#cret@h/p", "", ""},
		{"http://joe:s3?cret@h/p", "", ""},
		{"http://joe:s3cret@h:x/p", "", ""},
		{"http://joe:s3cret@h/p?sig=1", "", ""},
		{"http://h/p?", "", ""},
		{"http://h/p#x", "", ""},
		{"http:///p", "", ""},
		{"http://:80/p", "", ""},
		{"http:h/p", "", ""},
		{"ftp://h/p", "", ""},
		{"joe:s3cret@h/p", "", ""},
		{"", "", ""},
	} {
		s, err := New(tt.address, Options{})
		if tt.name == "" {
			if err == nil || strings.Contains(err.Error(), "s3") || !strings.Contains(err.Error(), "want https://HOST/PATH") {
				t.Errorf("%s: got %v", tt.address, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.address, err)
			continue
		}
		if s.String() != tt.name || *s.login.Load() != tt.auth {
			t.Errorf("%s: got %s and %q, want %s and %q", tt.address, s, *s.login.Load(), tt.name, tt.auth)
		}
		if got, want := s.chunkURL(id), tt.name+"/abcd/abcd"+strings.Repeat("0", 60)+".cacnk"; got != want {
			t.Errorf("%s: got %s, want %s", tt.address, got, want)
		}
	}
}

// FuzzNew: what is between "://" and the last "@" is in no name and no error.
func FuzzNew(f *testing.F) {
	for _, s := range []string{"joe:pw@h/p", "a/b@h", "a#b@c", "%@h", "@", "[@]:1/", ":1/x@h", ""} {
		f.Add("https://", s)
	}
	f.Fuzz(func(t *testing.T, scheme, rest string) {
		const secret = "pl4nted"
		address := scheme + "u:" + secret + "@" + rest
		s, err := New(address, Options{})
		switch {
		case strings.Contains(rest, secret):
		case err == nil && strings.Contains(s.String(), secret), err != nil && strings.Contains(err.Error(), secret):
			t.Errorf("%q: %v, %v", address, s, err)
		case err == nil:
			if _, err := New(s.String(), Options{}); err != nil {
				t.Errorf("%q: its name: %v", address, err)
			}
		}
	})
}

// quick is the stall time of tests that wait for it: short, but not so short
// that a busy machine looks like a stalled one.
const quick = 700 * time.Millisecond

// faulty returns an nginx with chunks, as a store behind a proxy.
func faulty(t testing.TB, chunks int) (base string, proxy *faultproxy.Proxy, ids []index.ID, frames map[index.ID][]byte) {
	t.Helper()
	n := startNginx(t)
	// The proxy's faults are for paths of this kind.
	direct := open(t, "http://"+n.addr+"/blobs/store", login(user, password))
	frames = make(map[index.ID][]byte)
	for i := range chunks {
		id, frame := chunk(i, 60_000+i)
		if err := direct.Put(t.Context(), id, frame); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
		frames[id] = frame
	}
	proxy, err := faultproxy.New("http://" + n.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	return "http://" + proxy.Addr() + "/blobs/store", proxy, ids, frames
}

// TestFaults sets each fault for all requests and wants an error of the right
// kind soon, then heals it and wants the same Store to read again.
func TestFaults(t *testing.T) {
	t.Parallel()
	base, proxy, ids, frames := faulty(t, 40)
	for _, tt := range []struct {
		name      string
		fault     faultproxy.Fault
		want      string // part of the error; empty: no error
		temporary bool
	}{
		{"reset mid-body", faultproxy.Reset(1000), "connection reset", true},
		{"reset before the body", faultproxy.Reset(0), "connection reset", true},
		{"short body", faultproxy.Short(1000), "unexpected EOF", true},
		{"blackhole", faultproxy.Blackhole(time.Minute), "stalled: no answer in 700ms", true},
		{"late answer", faultproxy.Blackhole(200 * time.Millisecond), "", false},
		{"drip", faultproxy.Slow(0, 50), "stalled: less than", true},
		{"latency and a slow line", faultproxy.Slow(20*time.Millisecond, 8<<20), "", false},
		{"429 seconds", faultproxy.Status(429, "7"), "429 Too Many Requests, to be asked again in 7s", true},
		{"503 date", faultproxy.Status(503, time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)), "503 Service Unavailable, to be asked again in ", true},
		{"500", faultproxy.Status(500, ""), "500 Internal Server Error", true},
		{"502", faultproxy.Status(502, ""), "502 Bad Gateway", true},
		{"504", faultproxy.Status(504, ""), "504 Gateway Timeout", true},
		{"520", faultproxy.Status(520, ""), "520", true},
		{"web page", faultproxy.WebPage(), "got a web page from http://" + proxy.Addr() + ", want a chunk", true},
		{"404", faultproxy.Status(404, ""), "404 Not Found: chunk not found", false},
		{"410", faultproxy.Status(410, ""), "410 Gone: chunk not found", false},
		{"403", faultproxy.Status(403, ""), "403 Forbidden: the server does not let us read", false},
		{"401", faultproxy.Status(401, ""), "401 Unauthorized: the server wants credentials", false},
		{"400", faultproxy.Status(400, ""), "if the server speaks HTTPS", false},
		{"418", faultproxy.Status(418, ""), "418", false},
		{"204", faultproxy.Status(204, ""), "204 No Content", false},
		{"501", faultproxy.Status(501, ""), "501 Not Implemented", false},
		{"redirect", faultproxy.Redirect(307, proxy.Other(), false), "", false},
		{"redirect to an expired URL", faultproxy.Redirect(307, proxy.Other(), true), "403 Forbidden from http://" + proxy.Other(), true},
		{"redirect to nobody", faultproxy.Redirect(307, "127.0.0.1:1", false), "connection refused", true},
		{"redirect without place", faultproxy.Status(307, ""), "307 Temporary Redirect", false},
		{"redirect loop", faultproxy.RedirectLoop(), "more than 10 redirects", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stall := 20 * time.Second
			if strings.HasPrefix(tt.want, "stalled") {
				stall = quick
			}
			s := open(t, base, Options{Stall: stall})
			read := map[string]func() error{
				"Get": func() error {
					got, err := s.Get(t.Context(), ids[3], []byte("kept"))
					if err != nil && string(got) != "kept" {
						t.Errorf("%d bytes beside an error", len(got))
					}
					if err == nil && string(got) != "kept"+string(frames[ids[3]]) {
						t.Errorf("got %d wrong bytes", len(got))
					}
					return err
				},
				"GetBatch": func() error {
					return s.GetBatch(t.Context(), ids, func(i int, frame []byte) error {
						if !bytes.Equal(frame, frames[ids[i]]) {
							t.Errorf("chunk %d: got %d wrong bytes", i, len(frame))
						}
						return nil
					})
				},
			}
			for _, how := range []string{"Get", "GetBatch"} {
				proxy.Set(tt.fault)
				start := time.Now()
				err := read[how]()
				if took := time.Since(start); took > 40*time.Second {
					t.Errorf("%s: took %s", how, took)
				}
				checkError(t, how, err, tt.want, tt.temporary)
				if errors.Is(err, chunkstore.ErrNotFound) != strings.Contains(tt.want, "chunk not found") {
					t.Errorf("%s: got %v, ErrNotFound or not", how, err)
				}
				proxy.Set(nil)
				if err := read[how](); err != nil {
					t.Errorf("%s: after the fault: %v", how, err)
				}
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		s := open(t, base, Options{})
		if err := proxy.Refuse(true); err != nil {
			t.Fatal(err)
		}
		_, err := s.Get(t.Context(), ids[3], nil)
		checkError(t, "Get", err, "connection refused", true)
		_, err = s.Has(t.Context(), ids[3])
		checkError(t, "Has", err, "connection refused", true)
		if err := proxy.Refuse(false); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), ids[3], nil); err != nil {
			t.Errorf("after the fault: %v", err)
		}
	})
}

// TestFetcherRidesOutFaults has chunkstore.Fetcher read through faults that end.
func TestFetcherRidesOutFaults(t *testing.T) {
	t.Parallel()
	base, proxy, ids, frames := faulty(t, 40)
	var cs []index.Chunk
	for i, id := range ids {
		cs = append(cs, index.Chunk{ID: id, Size: 60_000 + i})
	}
	for _, tt := range []struct {
		name   string
		faults faultproxy.Fault
	}{
		{"500×3", faultproxy.Times(3, faultproxy.Status(500, ""))},
		{"429", faultproxy.Times(1, faultproxy.Status(429, "1"))},
		{"reset", faultproxy.Times(3, faultproxy.Reset(50_000))},
		{"short", faultproxy.Times(3, faultproxy.Short(50_000))},
		{"blackhole", faultproxy.Times(2, faultproxy.Blackhole(time.Minute))},
		{"flipped byte", faultproxy.Times(1, faultproxy.Flip(500))},
		{"web page", faultproxy.Times(2, faultproxy.WebPage())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxy.Set(tt.faults)
			f := chunkstore.NewFetcher(chunkstore.FetcherOptions{
				Digest: index.SHA256, Stores: []chunkstore.Store{open(t, base, Options{Stall: quick})},
			})
			defer f.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			came := 0
			err := f.FetchBatch(ctx, cs, func(i int, plain []byte) error {
				came++
				if !bytes.Equal(chunkstore.Encode(nil, plain), frames[cs[i].ID]) {
					return fmt.Errorf("chunk %d: wrong bytes", i)
				}
				return nil
			})
			if err != nil || came != len(cs) {
				t.Errorf("got %d of %d chunks, %v", came, len(cs), err)
			}
		})
	}
}

// TestDeadConnections: when all connections have died without a word, as after a
// sleep of the machine, a read does not wait until they are found stalled.
func TestDeadConnections(t *testing.T) {
	t.Parallel()
	base, proxy, ids, frames := faulty(t, 20)
	tcp, err := faultproxy.NewTCP(proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tcp.Close)
	st := open(t, strings.Replace(base, proxy.Addr(), tcp.Addr(), 1), Options{Stall: 5 * time.Minute})
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: []chunkstore.Store{st}})
	defer f.Close()
	for i, id := range ids {
		if i%5 == 4 {
			tcp.Deaden()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		plain, err := f.Fetch(ctx, index.Chunk{ID: id, Size: 60_000 + i}, nil)
		cancel()
		if err != nil || !bytes.Equal(chunkstore.Encode(nil, plain), frames[id]) {
			t.Fatalf("chunk %d: got %d bytes, %v", i, len(plain), err)
		}
	}
	if s := f.Stats().Stores[0]; s.Hedges < 4 || s.Failures != 0 {
		t.Errorf("got %+v, want a second request for each of 4 and no failure", s)
	}
}

// serve starts a server of one handler and returns a store there.
func serve(t testing.TB, o Options, h http.HandlerFunc) *Store {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.Config.ErrorLog = discardLog
	server.Start()
	t.Cleanup(server.Close)
	return open(t, server.URL+"/store", o)
}

// TestHas with servers that answer HEAD in their own ways.
func TestHas(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 1000)
	whole := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(frame))
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) }
	}
	for _, tt := range []struct {
		name      string
		head, get http.HandlerFunc
		want      bool
		requests  int // of two calls
		err       string
		temporary bool
	}{
		{"there", whole, nil, true, 2, "", false},
		{"missing", status(404), nil, false, 2, "", false},
		{"gone", status(410), nil, false, 2, "", false},
		{"no HEAD, ranges", status(405), whole, true, 3, "", false},
		{"no HEAD, no ranges", status(501), func(w http.ResponseWriter, r *http.Request) { w.Write(frame) }, true, 3, "", false},
		{"no HEAD, missing", status(405), status(404), false, 3, "", false},
		{"no HEAD, empty", status(405), status(416), false, 3, "", false},
		{"no HEAD, fault", status(405), status(500), false, 4, "500", true},
		{"HEAD not signed", status(403), whole, true, 4, "", false},
		{"forbidden", status(403), status(403), false, 4, "403 Forbidden", false},
		{"empty", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Length", "0") }, nil, false, 2, "", false},
		{"too long", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Length", "16777217") }, nil, false, 2, "", false},
		{"fault", status(503), nil, false, 2, "503", true},
		{"web page", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Type", "text/html") }, nil, false, 2, "got a web page", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var requests atomic.Int32
			s := serve(t, Options{}, func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				switch {
				case r.Method == http.MethodHead:
					tt.head(w, r)
				case tt.get == nil || r.Header.Get("Range") != "bytes=0-0":
					t.Errorf("got %s with range %q", r.Method, r.Header.Get("Range"))
				default:
					tt.get(w, r)
				}
			})
			for range 2 {
				got, err := s.Has(t.Context(), id)
				checkError(t, "Has", err, tt.err, tt.temporary)
				if got != tt.want {
					t.Errorf("got %v, want %v", got, tt.want)
				}
			}
			if n := int(requests.Load()); n != tt.requests {
				t.Errorf("got %d requests, want %d", n, tt.requests)
			}
		})
	}
}

// TestBodies: a response is bounded, whatever it claims.
func TestBodies(t *testing.T) {
	id, _ := chunk(1, 1000)
	for _, tt := range []struct {
		name           string
		length, stated int64
		header         string
		want           string
		temporary      bool
	}{
		{"empty", 0, 0, "", "", false},
		{"one byte", 1, 1, "", "", false},
		{"largest", chunkstore.MaxStored, chunkstore.MaxStored, "", "", false},
		{"largest, unstated", chunkstore.MaxStored, -1, "", "", false},
		{"one more", chunkstore.MaxStored + 1, chunkstore.MaxStored + 1, "", "got more than 16777216 bytes: that is no chunk", false},
		{"one more, unstated", chunkstore.MaxStored + 1, -1, "", "got more than 16777216 bytes", false},
		{"endless", 1 << 62, -1, "", "got more than 16777216 bytes", false},
		{"claims all memory", 10, 1 << 62, "", "got more than 16777216 bytes", false},
		{"claims 16 MiB", 10, chunkstore.MaxStored, "", "after 10 bytes: unexpected EOF", true},
		{"compressed on the way", 10, 10, "gzip", `content encoded as "gzip"`, true},
	} {
		s := serve(t, Options{}, func(w http.ResponseWriter, r *http.Request) {
			if e := r.Header.Get("Accept-Encoding"); e != "identity" {
				t.Errorf("got Accept-Encoding %q", e)
			}
			if tt.header != "" {
				w.Header().Set("Content-Encoding", tt.header)
			}
			w.Header().Set("Content-Type", "application/octet-stream")
			if tt.stated >= 0 {
				w.Header().Set("Content-Length", fmt.Sprint(tt.stated))
			} else {
				w.(http.Flusher).Flush()
			}
			buf := make([]byte, 64<<10)
			for left := tt.length; left > 0; {
				n, err := w.Write(buf[:min(left, int64(len(buf)))])
				if left -= int64(n); err != nil {
					return
				}
			}
		})
		before := allocated()
		got, err := s.Get(t.Context(), id, []byte("x"))
		checkError(t, tt.name, err, tt.want, tt.temporary)
		if tt.want == "" && len(got) != 1+int(tt.length) {
			t.Errorf("%s: got %d bytes, want %d", tt.name, len(got)-1, tt.length)
		}
		limit := uint64(4 << 20)
		if tt.length >= chunkstore.MaxStored {
			limit = 128 << 20 // growing in steps
		}
		if n := allocated() - before; n > limit {
			t.Errorf("%s: got %d bytes allocated, want at most %d", tt.name, n, limit)
		}
	}
}

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// TestPutAnswers: only a server that says so has the chunk.
func TestPutAnswers(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 300_000)
	for _, tt := range []struct {
		name      string
		answer    http.HandlerFunc
		want      string
		temporary bool
	}{
		{"200", answer(200, ""), "", false},
		{"201", answer(201, ""), "", false},
		{"201 with a page", answer(201, "Content-Type", "text/html"), "", false},
		{"204", answer(204, ""), "", false},
		{"200 with a page", answer(200, "Content-Type", "text/html"), "got a web page", true},
		{"202", answer(202, ""), "202 Accepted", false},
		{"401", answer(401, ""), "401 Unauthorized: the server wants credentials", false},
		{"403", answer(403, ""), "403 Forbidden: the server does not let us write", false},
		{"404", answer(404, ""), "404 Not Found: the server has no place", false},
		{"405", answer(405, ""), "405 Method Not Allowed: the server takes no PUT: turn on WebDAV", false},
		{"409", answer(409, ""), "409 Conflict: the server has no place", false},
		{"413", answer(413, ""), "the server must allow requests of 16 MiB", false},
		{"429", answer(429, "Retry-After", "3"), "to be asked again in 3s", true},
		{"500", answer(500, ""), "500", true},
		{"501", answer(501, ""), "501 Not Implemented: the server takes no PUT", false},
		{"503", answer(503, ""), "503", true},
		{"507", answer(507, ""), "507 Insufficient Storage: store is full", false},
		{"302 to a page", answer(302, "Location", "/login?s3cret"), "the server sends writes elsewhere: name the store as it is called there: http", false},
		{"303 to a page", answer(303, "Location", "/login"), "the server sends writes elsewhere", false},
		{"redirect loop", answer(307, "Location", "/store/"), "more than 10 redirects", false},
		{"blackhole", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "stalled: no answer in 2.1s", true},
		{"answer before the body", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			w.WriteHeader(500)
		}, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, Options{Stall: quick}, func(w http.ResponseWriter, r *http.Request) {
				if tt.name != "answer before the body" {
					io.Copy(io.Discard, r.Body)
				}
				tt.answer(w, r)
			})
			err := s.Put(t.Context(), id, frame)
			if tt.name == "answer before the body" {
				// The connection may break before the answer is read.
				var e *chunkstore.Error
				if !errors.As(err, &e) || !e.Temporary() {
					t.Errorf("got %v, want a temporary error", err)
				}
				return
			}
			checkError(t, "Put", err, tt.want, tt.temporary)
			if errors.Is(err, chunkstore.ErrNotFound) || errors.Is(err, chunkstore.ErrFull) != (tt.name == "507") {
				t.Errorf("got %v of another kind", err)
			}
		})
	}
}

func answer(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if len(header) == 2 {
			w.Header().Set(header[0], header[1])
		}
		w.WriteHeader(code)
	}
}

// TestMakesDirectories where the server wants that first, as WebDAV says.
func TestMakesDirectories(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	made := make(map[string]bool)
	s := serve(t, Options{}, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		io.Copy(io.Discard, r.Body)
		dir := r.URL.Path[:strings.LastIndexByte(r.URL.Path, '/')+1]
		switch {
		case r.Method == "MKCOL" && made[r.URL.Path]:
			w.WriteHeader(405)
		case r.Method == "MKCOL":
			made[r.URL.Path] = true
			w.WriteHeader(201)
		case !made[dir]:
			w.WriteHeader(409)
		default:
			w.WriteHeader(201)
		}
	})
	var g sync.WaitGroup
	for i := range 20 {
		g.Go(func() {
			if err := s.Put(t.Context(), index.ID{0, byte(i % 2), byte(i)}, []byte("x")); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	if len(made) != 2 || !made["/store/0001/"] {
		t.Errorf("got directories %v, want 2", made)
	}
}

// TestPutRedirected: a redirect that keeps the method is followed with the whole
// body, but without the login.
func TestPutRedirected(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 300_000)
	var got []byte
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, _ = io.ReadAll(r.Body)
		if r.Header.Get("Authorization") != "" {
			t.Error("the other server got the login")
		}
		w.WriteHeader(201)
	}))
	defer other.Close()
	s := serve(t, login(user, password), func(w http.ResponseWriter, r *http.Request) {
		if _, p, _ := r.BasicAuth(); p != password {
			t.Error("the server got no login")
		}
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
	})
	if err := s.Put(t.Context(), id, frame); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes there, %v, want %d", len(got), err, len(frame))
	}
}

// TestSlowUpload: a server that takes a chunk slowly but steadily is alive.
func TestSlowUpload(t *testing.T) {
	t.Parallel()
	id, _ := chunk(1, 1)
	s := serve(t, Options{Stall: 2 * time.Second}, func(w http.ResponseWriter, r *http.Request) {
		buf := make([]byte, 1<<20)
		for {
			time.Sleep(250 * time.Millisecond)
			if _, err := io.ReadFull(r.Body, buf); err != nil {
				break
			}
		}
		w.WriteHeader(201)
	})
	if err := s.Put(t.Context(), id, make([]byte, chunkstore.MaxStored)); err != nil {
		t.Error(err)
	}
}

// TestCredentialsStayHome plants a login in each place where it can come from
// and follows redirects of every kind: no other origin sees it, and neither
// names nor errors do.
func TestCredentialsStayHome(t *testing.T) {
	t.Parallel()
	base, proxy, ids, _ := faulty(t, 4)
	home := strings.TrimPrefix(base, "http://")
	for where, s := range map[string]*Store{
		"address": open(t, "http://joe:s3cret@"+home, Options{}),
		"basic":   open(t, base, login("joe", "s3cret")),
		"bearer":  open(t, base, Options{Login: func(context.Context) (Login, error) { return Login{Token: "s3cret"}, nil }}),
	} {
		if strings.Contains(fmt.Sprint(s), "s3cret") {
			t.Errorf("%s: its name is %s", where, s)
		}
		for _, status := range []int{301, 302, 303, 307, 308} {
			proxy.ClearLog()
			proxy.Set(faultproxy.Redirect(status, proxy.Other(), false))
			if _, err := s.Get(t.Context(), ids[0], nil); err != nil {
				t.Fatal(err)
			}
			proxy.Set(faultproxy.Redirect(status, proxy.Other(), true))
			_, err := s.Get(t.Context(), ids[0], nil)
			checkError(t, where, err, "credentials go to http://"+proxy.Addr()+" only", true)
			atHome, away := 0, 0
			for _, r := range proxy.Log() {
				if r.Host == proxy.Other() {
					away++
					if r.Authorization != "" {
						t.Fatalf("%s, %d: the other host got %q", where, status, r.Authorization)
					}
				} else if r.Authorization != "" {
					atHome++
				}
			}
			if atHome != 2 || away != 2 {
				t.Errorf("%s, %d: %d requests with credentials at home, %d away", where, status, atHome, away)
			}
		}
		proxy.Set(faultproxy.Status(403, ""))
		_, err := s.Get(t.Context(), ids[0], nil)
		checkError(t, where, err, "403 Forbidden", false)
		proxy.Set(nil)
	}
}

// TestSubdomain: net/http itself would take the login along to a subdomain and
// to another port.
func TestSubdomain(t *testing.T) {
	t.Parallel()
	var away atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		away.Add(1)
		if a := r.Header.Get("Authorization"); a != "" {
			t.Errorf("%s got %q", r.Host, a)
		}
		w.Write([]byte("x"))
	}))
	defer other.Close()
	_, port, _ := strings.Cut(strings.TrimPrefix(other.URL, "http://"), ":")
	for _, host := range []string{"127.0.0.1", "sub.localhost", "joe:evil@127.0.0.1"} {
		s := serve(t, login("joe", "s3cret"), func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://"+host+":"+port+r.URL.Path)
			w.WriteHeader(302)
		})
		s.transport.(*http.Transport).DialContext = dialTo("127.0.0.1")
		id, _ := chunk(1, 1)
		if _, err := s.Get(t.Context(), id, nil); err != nil {
			t.Error(err)
		}
	}
	if away.Load() != 3 {
		t.Errorf("got %d requests away, want 3", away.Load())
	}
}

// TestTLS: HTTP/2 where the server has it; never from https to http; what a
// wrong scheme means.
func TestTLS(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 1000)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("got %s over plain HTTP", r.URL)
	}))
	defer plain.Close()
	var redirect atomic.Bool
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Proto != "HTTP/2.0" {
			t.Errorf("got %s", r.Proto)
		}
		if redirect.Load() {
			http.Redirect(w, r, plain.URL, http.StatusFound)
			return
		}
		w.Write(frame)
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = discardLog
	server.StartTLS()
	defer server.Close()

	o := login("joe", "s3cret")
	o.Transport = server.Client().Transport
	s := open(t, server.URL, o)
	if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	redirect.Store(true)
	_, err := s.Get(t.Context(), id, nil)
	checkError(t, "Get", err, "refused to go on from https to http", false)
	_, err = open(t, server.URL, Options{}).Get(t.Context(), id, nil)
	checkError(t, "unknown authority", err, "certificate", false)
	_, err = open(t, "http"+strings.TrimPrefix(server.URL, "https"), Options{}).Get(t.Context(), id, nil)
	checkError(t, "http to https", err, "400 Bad Request: if the server speaks HTTPS, name the store https://", false)
	_, err = open(t, "https"+strings.TrimPrefix(plain.URL, "http"), Options{}).Get(t.Context(), id, nil)
	checkError(t, "https to http", err, "speaks plain HTTP: name the store http://", false)
}

// TestLoginChanges: a password that is replaced while a store is read.
func TestLoginChanges(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 1000)
	var valid, known atomic.Value
	valid.Store("one")
	known.Store("one")
	var asked atomic.Int32
	o := Options{Login: func(context.Context) (Login, error) {
		asked.Add(1)
		return Login{Token: known.Load().(string)}, nil
	}}
	s := serve(t, o, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+valid.Load().(string) {
			w.WriteHeader(401)
			return
		}
		w.Write(frame)
	})
	get := func(want string) {
		t.Helper()
		var g sync.WaitGroup
		for range 20 {
			g.Go(func() {
				_, err := s.Get(t.Context(), id, nil)
				checkError(t, "Get", err, want, false)
			})
		}
		g.Wait()
	}
	get("")
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
	valid.Store("two")
	get("401 Unauthorized: the server refuses the credentials")
	known.Store("two")
	get("")
	asked.Store(0)
	get("")
	if n := asked.Load(); n != 0 {
		t.Errorf("asked %d times for what is known", n)
	}
}

// TestHungLogin: a credential helper that does not answer, or fails.
func TestHungLogin(t *testing.T) {
	t.Parallel()
	id, _ := chunk(1, 1)
	hung := make(chan bool)
	defer close(hung)
	s := serve(t, Options{Stall: quick, Login: func(context.Context) (Login, error) { <-hung; return Login{}, nil }}, answer(200))
	for range 2 {
		_, err := s.Get(t.Context(), id, nil)
		checkError(t, "Get", err, "stalled: no answer", true)
	}
	s = serve(t, Options{Login: func(context.Context) (Login, error) { return Login{}, os.ErrPermission }}, answer(200))
	_, err := s.Get(t.Context(), id, nil)
	checkError(t, "Get", err, "credentials for http://127.0.0.1:", true)
}

// TestCancel ends a call in each of its states: waiting for a turn, for the
// answer and for the body.
func TestCancel(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 100_000)
	for name, h := range map[string]http.HandlerFunc{
		"answer": func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); <-r.Context().Done() },
		"body": func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Write(make([]byte, 1000))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
	} {
		s := serve(t, Options{}, h)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		start := time.Now()
		var g sync.WaitGroup
		for range 2 * parallelRequests {
			g.Go(func() {
				if _, err := s.Get(ctx, id, nil); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: Get: got %v", name, err)
				}
			})
			g.Go(func() {
				err := s.GetBatch(ctx, []index.ID{id, id, id}, func(int, []byte) error { return nil })
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: GetBatch: got %v", name, err)
				}
			})
		}
		g.Wait()
		if name == "answer" {
			if err := s.Put(ctx, id, frame); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Put: got %v", err)
			}
		}
		if took := time.Since(start); took > 40*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
		if len(s.slots) != 0 {
			t.Errorf("%s: %d requests are left", name, len(s.slots))
		}
	}
}

// TestInFlight: many requests at a time, with a limit.
func TestInFlight(t *testing.T) {
	t.Parallel()
	_, frame := chunk(1, 1000)
	var now, most, limit atomic.Int32
	var full chan struct{} // closed once there are as many requests as there may be
	s := serve(t, Options{}, func(w http.ResponseWriter, r *http.Request) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if n == limit.Load() {
			limit.Store(0)
			close(full)
		}
		select {
		case <-full:
		case <-r.Context().Done():
		}
		time.Sleep(20 * time.Millisecond) // in which there could be more
		w.Write(frame)
	})
	next := func(n int32) { full = make(chan struct{}); limit.Store(n) }
	next(batchRequests)
	ids := make([]index.ID, 480)
	if err := s.GetBatch(t.Context(), ids, func(int, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if n := most.Load(); n != batchRequests {
		t.Errorf("one batch: got %d requests at once, want %d", n, batchRequests)
	}
	next(parallelRequests)
	var g sync.WaitGroup
	for range 3 {
		g.Go(func() { s.GetBatch(t.Context(), ids[:100], func(int, []byte) error { return nil }) })
	}
	g.Wait()
	if n := most.Load(); n != parallelRequests {
		t.Errorf("three batches: got %d requests at once, want %d", n, parallelRequests)
	}
}

// TestBatchKeepsWhatCame: one chunk's failure does not throw away what is under
// way.
func TestBatchKeepsWhatCame(t *testing.T) {
	t.Parallel()
	_, frame := chunk(1, 1000)
	bad := index.ID{7}
	var underWay sync.WaitGroup
	underWay.Add(batchRequests - 1)
	s := serve(t, Options{}, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, bad.String()) {
			underWay.Wait()
			w.WriteHeader(500)
			return
		}
		underWay.Done()
		time.Sleep(50 * time.Millisecond)
		w.Write(frame)
	})
	ids := make([]index.ID, batchRequests)
	ids[batchRequests-1] = bad
	var came []int
	err := s.GetBatch(t.Context(), ids, func(i int, _ []byte) error { came = append(came, i); return nil })
	checkError(t, "GetBatch", err, "500", true)
	if len(came) == 0 || slices.Contains(came, batchRequests-1) {
		t.Errorf("got chunks %v", came)
	}
}

// TestKeepsConnections: answers without a chunk do not cost a connection each.
func TestKeepsConnections(t *testing.T) {
	t.Parallel()
	id, frame := chunk(1, 1000)
	var connections atomic.Int32
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if r.Method == http.MethodGet {
			http.Error(w, strings.Repeat("not here ", 50), 404)
		}
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	s := open(t, server.URL, Options{})
	for range 10 {
		if _, err := s.Get(t.Context(), id, nil); !errors.Is(err, chunkstore.ErrNotFound) {
			t.Error(err)
		}
		if _, err := s.Has(t.Context(), id); err != nil {
			t.Error(err)
		}
		if err := s.Put(t.Context(), id, frame); err != nil {
			t.Error(err)
		}
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("got %d connections, want 1", n)
	}
}

func BenchmarkGet(b *testing.B) {
	base, _, ids, _ := faulty(b, 50)
	s := open(b, base, Options{})
	var buf []byte
	b.SetBytes(60_000)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		var err error
		if buf, err = s.Get(b.Context(), ids[i%len(ids)], buf[:0]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGetBatch(b *testing.B) {
	n := startNginx(b)
	s := open(b, "http://"+n.addr, login(user, password))
	var ids []index.ID
	for i := range 200 {
		id, frame := chunk(i, 60_000)
		if err := s.Put(b.Context(), id, frame); err != nil {
			b.Fatal(err)
		}
		ids = append(ids, id)
	}
	b.SetBytes(200 * 60_000)
	b.ReportAllocs()
	for b.Loop() {
		if err := s.GetBatch(b.Context(), ids, func(int, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
