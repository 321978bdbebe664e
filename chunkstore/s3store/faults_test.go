package s3store

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
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

// quick is a stall time for tests of stalls: short, and yet so much longer than
// the pauses of a busy machine that these do not look like one.
const quick = 700 * time.Millisecond

// static are credentials that need no server's word.
var static = env{"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "hidden-secret", "AWS_SESSION_TOKEN": "hidden-token"}

// TestFaults sets each fault of a network and of an HTTP server, wants an error
// of the right kind soon, then heals it and wants the same Store to read again.
func TestFaults(t *testing.T) {
	dir := t.TempDir()
	files := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer files.Close()
	proxy, err := faultproxy.New(files.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	id, frame := chunk(1, 60_000)
	s := open(t, "s3+http://"+proxy.Addr()+"/bucket", Options{Sources: static.sources()})
	file := filepath.Join(dir, "bucket", s.address.key(id))
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, frame, 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name      string
		fault     faultproxy.Fault
		want      string // "" for success
		temporary bool
	}{
		{"reset mid-body", faultproxy.Reset(1000), "connection reset", true},
		{"reset before the body", faultproxy.Reset(0), "connection reset", true},
		{"short body", faultproxy.Short(1000), "unexpected EOF", true},
		{"blackhole", faultproxy.Blackhole(time.Minute), "stalled: no answer in 700ms", true},
		{"drip", faultproxy.Slow(0, 50), "stalled: less than", true},
		{"latency and a slow line", faultproxy.Slow(20*time.Millisecond, 8<<20), "", false},
		{"429 seconds", faultproxy.Status(429, "7"), "429 Too Many Requests, to be asked again in 7s", true},
		{"503 date", faultproxy.Status(503, time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)), "503 Service Unavailable, to be asked again in ", true},
		{"500", faultproxy.Status(500, ""), "500 Internal Server Error", true},
		{"web page", faultproxy.WebPage(), "got a web page from http://" + proxy.Addr() + ", want S3's answer", true},
		{"404", faultproxy.Status(404, ""), "404 Not Found: chunk not found", false},
		{"403", faultproxy.Status(403, ""), "403 Forbidden: these credentials may not read", false},
		{"401", faultproxy.Status(401, ""), "401 Unauthorized: these credentials may not read", false},
		{"400", faultproxy.Status(400, ""), "that is not how an S3 server answers", false},
		{"204", faultproxy.Status(204, ""), "204 No Content: that is not how an S3 server answers", false},
		{"redirect", faultproxy.Redirect(307, proxy.Other(), false), "name the store as it is called at http://" + proxy.Other(), false},
		{"redirect loop", faultproxy.RedirectLoop(), "credentials do not go there by themselves", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, s.String(), Options{Sources: static.sources()})
			if strings.HasPrefix(tt.want, "stalled") {
				s.stall = quick
			}
			proxy.ClearLog()
			proxy.Set(tt.fault)
			start := time.Now()
			got, err := s.Get(t.Context(), id, []byte("kept"))
			if took := time.Since(start); took > 40*time.Second {
				t.Errorf("took %s", took)
			}
			if tt.want != "" {
				wantError(t, "Get", err, tt.want, tt.temporary)
				if string(got) != "kept" || errors.Is(err, chunkstore.ErrNotFound) != strings.Contains(tt.want, "chunk not found") {
					t.Errorf("got %q and %v", got, err)
				}
				_, err = s.Has(t.Context(), id)
				if tt.name != "404" && tt.name != "204" && !strings.Contains(tt.name, "body") && tt.name != "drip" { // HEAD has no body
					wantError(t, "Has", err, tt.want, tt.temporary)
				}
			} else if err != nil || !bytes.Equal(got[len("kept"):], frame) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
			for _, r := range proxy.Log() {
				if r.Host != proxy.Addr() {
					t.Errorf("a request went to %s", r.Host)
				}
			}
			proxy.Set(nil)
			if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
				t.Errorf("after the fault: got %d bytes, %v", len(got), err)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		if err := proxy.Refuse(true); err != nil {
			t.Fatal(err)
		}
		_, err := s.Get(t.Context(), id, nil)
		wantError(t, "Get", err, "connection refused", true)
		if err := proxy.Refuse(false); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), id, nil); err != nil {
			t.Errorf("after the fault: %v", err)
		}
	})
}

// TestPutFaults: a write that fails says whether to try again, and the next one
// finds the server well.
func TestPutFaults(t *testing.T) {
	id, frame := chunk(1, 200_000)
	reset := func(w http.ResponseWriter) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}
	}
	// A server that reads nothing does not learn that its client has left.
	long := func() { time.Sleep(2 * putPatience * quick) }
	for _, tt := range []struct {
		name  string
		fault http.HandlerFunc
		want  string
	}{
		{"no answer", func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); long() }, "stalled: no answer in 2.1s"},
		{"nothing is taken", func(http.ResponseWriter, *http.Request) { long() }, "stalled: no answer in 2.1s"},
		{"reset", func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); reset(w) }, "connection reset"},
		{"500", func(w http.ResponseWriter, r *http.Request) { xmlError(w, 500, "<Code>InternalError</Code>") }, "InternalError"},
		{"web page", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>")
		}, "got a web page"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var stored bytes.Buffer
			var requests atomic.Int64
			s := answering(t, static.sources(), func(w http.ResponseWriter, r *http.Request) {
				if requests.Add(1) == 1 {
					tt.fault(w, r)
					return
				}
				io.Copy(&stored, r.Body)
			})
			s.stall = quick
			wantError(t, "Put", s.Put(t.Context(), id, frame), tt.want, true)
			if err := s.Put(t.Context(), id, frame); err != nil || !bytes.Equal(stored.Bytes(), frame) {
				t.Errorf("after the fault: %v, %d bytes stored", err, stored.Len())
			}
		})
	}
}

// answering starts a server that answers all that a Store asks with handler,
// and returns the Store.
func answering(t *testing.T, sources Sources, handler http.HandlerFunc) *Store {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return open(t, "s3+http://"+strings.TrimPrefix(server.URL, "http://")+"/bucket", Options{Sources: sources})
}

func xmlError(w http.ResponseWriter, status int, inner string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	io.WriteString(w, `<?xml version="1.0" encoding="UTF-8"?>`+"\n<Error>"+inner+"<RequestId>1</RequestId></Error>")
}

// TestErrorCodes: what S3 names becomes what to do.
func TestErrorCodes(t *testing.T) {
	id, frame := chunk(1, 1000)
	for _, tt := range []struct {
		code      string
		status    int
		call      string
		want      string
		temporary bool
	}{
		{"SlowDown", 503, "Get", "503 Service Unavailable, to be asked again in 3s: SlowDown", true},
		{"InternalError", 500, "Put", "InternalError", true},
		{"RequestTimeout", 400, "Put", "RequestTimeout", true},
		{"OperationAborted", 409, "Put", "OperationAborted", true},
		{"RequestTimeTooSkewed", 403, "Get", "RequestTimeTooSkewed: this machine's clock says 20", false},
		{"ExpiredToken", 400, "Get", "ExpiredToken: the session token is no longer good", false},
		{"SignatureDoesNotMatch", 403, "Get", "SignatureDoesNotMatch: the secret key is not that of the access key", false},
		{"InvalidAccessKeyId", 403, "Get", "the server does not know the access key", false},
		{"NoSuchBucket", 404, "Get", `there is no bucket "bucket"`, false},
		{"NoSuchBucket", 404, "Put", `there is no bucket "bucket"`, false},
		{"NoSuchKey", 404, "Get", "chunk not found", false},
		{"AccessDenied", 403, "Get", "allow them s3:GetObject on arn:aws:s3:::bucket/* and s3:ListBucket on arn:aws:s3:::bucket", false},
		{"AccessDenied", 403, "Put", "may not write: allow them s3:PutObject", false},
		{"AccessDenied", 403, "List", "may not list: allow them s3:ListBucket", false},
		{"AccessDenied", 403, "Remove", "may not remove: allow them s3:DeleteObject", false},
		{"QuotaExceeded", 403, "Put", "store is full", false},
		{"EntityTooLarge", 400, "Put", "objects of 16 MiB", false},
		{"InvalidObjectState", 403, "Get", "lies in an archive", false},
		{"PermanentRedirect", 301, "Get", "the bucket is elsewhere, and credentials do not go there by themselves: name the store as it is called at other.example", false},
		{"MalformedThing", 400, "Get", "400 Bad Request: MalformedThing: odd things in two lines", false},
	} {
		t.Run(tt.call+" "+tt.code, func(t *testing.T) {
			s := answering(t, static.sources(), func(w http.ResponseWriter, r *http.Request) {
				if tt.status == 503 {
					w.Header().Set("Retry-After", "3")
				}
				xmlError(w, tt.status, "<Code>"+tt.code+"</Code><Message>odd\nthings in\x20two lines.</Message><Endpoint>other.example</Endpoint>")
			})
			var err error
			switch tt.call {
			case "Get":
				_, err = s.Get(t.Context(), id, nil)
			case "Put":
				err = s.Put(t.Context(), id, frame)
			case "Remove":
				err = s.Remove(t.Context(), id)
			case "List":
				for _, err = range s.List(t.Context()) {
				}
			}
			wantError(t, tt.call, err, tt.want, tt.temporary)
			var e *chunkstore.Error
			if errors.As(err, &e) && (e.Status != tt.status || tt.status == 503 && e.RetryAfter() != 3*time.Second) {
				t.Errorf("got status %d, %s", e.Status, e.RetryAfter())
			}
		})
	}
}

// TestEchoedCredentials: a server that repeats what it was sent does not get it
// into a log.
func TestEchoedCredentials(t *testing.T) {
	s := answering(t, static.sources(), func(w http.ResponseWriter, r *http.Request) {
		xmlError(w, 400, "<Code>Odd</Code><Message>you sent "+r.Header.Get("X-Amz-Security-Token")+"</Message>")
	})
	_, err := s.Get(t.Context(), index.ID{}, nil)
	wantError(t, "Get", err, "400 Bad Request: Odd", false)
}

// TestRegions: a bucket is followed to where the server says, with the same
// credentials, as long as that is the same host or AWS itself.
func TestRegions(t *testing.T) {
	id, frame := chunk(1, 1000)
	for _, tt := range []struct {
		name, address string
		answer        string // of every host but the right one
		status        int
		header        string // X-Amz-Bucket-Region
		host, region  string // the right one
		want          string // error, "" for success
	}{
		{"same host", "s3+https://s3.example.com/bucket", "<Code>AuthorizationHeaderMalformed</Code><Region>eu-9</Region>", 400, "", "s3.example.com", "eu-9", ""},
		{"AWS, by header", "s3+https://s3.us-east-1.amazonaws.com/bucket", "<Code>PermanentRedirect</Code>", 301, "eu-west-1", "bucket.s3.eu-west-1.amazonaws.com", "eu-west-1", ""},
		{"AWS, by path", "s3+https://s3.amazonaws.com/bucket?style=path", "<Code>PermanentRedirect</Code>", 301, "eu-west-1", "s3.eu-west-1.amazonaws.com", "eu-west-1", ""},
		{"AWS, by endpoint", "s3+https://s3.amazonaws.com/bucket", "<Code>TemporaryRedirect</Code><Endpoint>bucket.s3-eu-west-1.amazonaws.com</Endpoint>", 307, "", "bucket.s3.eu-west-1.amazonaws.com", "eu-west-1", ""},
		{"AWS, by the signature", "s3+https://s3.us-west-2.amazonaws.com/bucket", "<Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region>", 400, "", "bucket.s3.eu-west-1.amazonaws.com", "eu-west-1", ""},
		{"AWS, another partition", "s3+https://s3.us-west-2.amazonaws.com/bucket", "<Code>PermanentRedirect</Code><Endpoint>bucket.s3.cn-north-1.amazonaws.com.cn</Endpoint>", 301, "", "", "", "s3.cn-north-1.amazonaws.com.cn"},
		{"AWS, away", "s3+https://s3.us-west-2.amazonaws.com/bucket", "<Code>PermanentRedirect</Code><Endpoint>evil.example</Endpoint>", 301, "", "", "", "evil.example"},
		{"AWS, a region that is a host", "s3+https://s3.us-west-2.amazonaws.com/bucket", "<Code>PermanentRedirect</Code><Region>evil.example/</Region>", 301, "", "", "", "the bucket is elsewhere"},
		{"another host", "s3+https://s3.example.com/bucket", "<Code>PermanentRedirect</Code><Endpoint>s3.eu.example.com</Endpoint>", 301, "eu", "", "", "name the store as it is called at s3.eu.example.com, with ?region=eu"},
		{"regions without end", "s3+https://s3.example.com/bucket", "<Code>AuthorizationHeaderMalformed</Code><Region>%d</Region>", 400, "", "", "", "name it behind the address, ?region="},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var mu sync.Mutex
			var asked []string
			n := 0
			server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				asked = append(asked, r.Host)
				n++
				count := n
				mu.Unlock()
				if r.Host == tt.host && strings.Contains(r.Header.Get("Authorization"), "/"+tt.region+"/s3/") {
					w.Write(frame)
					return
				}
				if tt.header != "" {
					w.Header().Set("X-Amz-Bucket-Region", tt.header)
				}
				w.Header().Set("Location", "https://evil.example/")
				xmlError(w, tt.status, strings.ReplaceAll(tt.answer, "%d", fmt.Sprint("r-", count)))
			}))
			defer server.Close()
			transport := server.Client().Transport.(*http.Transport).Clone()
			transport.TLSClientConfig.InsecureSkipVerify = true
			transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, server.Listener.Addr().String())
			}
			s := open(t, tt.address, Options{Sources: static.sources(), Transport: transport})
			for range 2 {
				got, err := s.Get(t.Context(), id, nil)
				if tt.want == "" {
					if err != nil || !bytes.Equal(got, frame) {
						t.Errorf("got %d bytes, %v, want %d", len(got), err, len(frame))
					}
				} else {
					wantError(t, "Get", err, tt.want, false)
				}
			}
			if tt.want == "" && n != 3 {
				t.Errorf("%d requests for two chunks, want 3: the place is remembered", n)
			}
			if n > 2*(maxMoves+2) {
				t.Errorf("%d requests for two calls", n)
			}
			if slices.Contains(asked, "evil.example") || slices.Contains(asked, "s3.eu.example.com") {
				t.Errorf("went to %q", asked)
			}
			if ok, err := s.Has(t.Context(), id); tt.want == "" && (err != nil || !ok) {
				t.Errorf("Has: got %v, %v", ok, err)
			}
		})
	}
}

// TestExpiredToken: credentials that the server calls expired are looked for
// again, once for all requests, and those that came to nothing are not
// remembered.
func TestExpiredToken(t *testing.T) {
	var mu sync.Mutex
	good, asked := "one", 0
	_, frame := chunk(1, 1000)
	file := filepath.Join(t.TempDir(), "credentials")
	write := func(key string) {
		if err := os.WriteFile(file, []byte("[default]\naws_access_key_id = "+key+"\naws_secret_access_key = hidden\naws_session_token = hidden-"+key+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sources := env{"AWS_SHARED_CREDENTIALS_FILE": file}.sources()
	sources.ReadFile = func(name string) ([]byte, error) {
		mu.Lock()
		asked++
		mu.Unlock()
		return os.ReadFile(name)
	}
	s := answering(t, sources, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if !strings.Contains(r.Header.Get("Authorization"), "Credential="+good+"/") || r.Header.Get("X-Amz-Security-Token") != "hidden-"+good {
			xmlError(w, 400, "<Code>ExpiredToken</Code>")
			return
		}
		w.Write(frame)
	})
	write("one")
	get := func() error { _, err := s.Get(t.Context(), index.ID{}, nil); return err }
	if err := get(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	good = "two"
	mu.Unlock()
	wantError(t, "Get before a renewal", get(), "ExpiredToken: the session token is no longer good", false)
	write("two")
	before := asked
	var g sync.WaitGroup
	for range 20 {
		g.Go(func() {
			if err := get(); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	if n := asked - before; n != 1 {
		t.Errorf("looked for credentials %d times, want once", n)
	}
	mu.Lock()
	good = "three"
	mu.Unlock()
	write("three")
	if ok, err := s.Has(t.Context(), index.ID{}); err != nil || !ok { // HEAD does not say why it is refused
		t.Errorf("Has: got %v, %v, want true", ok, err)
	}
}

var manyX = bytes.Repeat([]byte("x"), 64<<10)

// endless is a body of n bytes.
type endless struct{ n int64 }

func (e *endless) Read(p []byte) (int, error) {
	if e.n <= 0 {
		return 0, io.EOF
	}
	n := copy(p, manyX)
	e.n -= int64(n)
	return n, nil
}

// TestHostileAnswers: 1 GiB of whatever a server sends costs neither memory nor
// the time to take it.
func TestHostileAnswers(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	const giga = 1 << 30
	const enough = 64 << 20 // a chunk, a page, and what lies in buffers
	var before, after runtime.MemStats
	for name, head := range map[string]string{
		"text":     "<Error><Code>",
		"name":     "<Error><",
		"nothing":  "",
		"comment":  "<Error><!-- ",
		"entities": `<!DOCTYPE x [<!ENTITY a "&a;&a;">]><Error><Code>&a;`,
		"nested":   strings.Repeat("<Error>", 10_000),
		"list":     "<ListBucketResult><Contents><Key>",
	} {
		for _, status := range []int{200, 403} {
			var sent atomic.Int64
			s := answering(t, static.sources(), func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(status)
				io.WriteString(w, head)
				body := &endless{giga}
				for n := int64(1); n > 0; sent.Add(n) {
					n, _ = io.CopyN(w, body, 64<<10)
				}
			})
			runtime.ReadMemStats(&before)
			_, err := s.Get(t.Context(), index.ID{}, nil)
			var errList error
			for _, errList = range s.List(t.Context()) {
			}
			runtime.ReadMemStats(&after)
			if err == nil || errList == nil || strings.ContainsAny(err.Error()+errList.Error(), "\n") {
				t.Errorf("%s, %d: got %v and %v", name, status, err, errList)
			}
			if took, bytes := sent.Load(), after.TotalAlloc-before.TotalAlloc; took > enough || bytes > 256<<20 {
				t.Errorf("%s, %d: took %d MiB, and %d MiB of memory", name, status, took>>20, bytes>>20)
			}
		}
	}
}

// TestListAnswers: a list is believed as far as it makes sense, and ends.
func TestListAnswers(t *testing.T) {
	key := func(n byte) string { id := index.ID{n}; return (&address{}).key(id) }
	contents := func(n byte, more string) string {
		return "<Contents><Key>" + key(n) + "</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified><Size>7</Size>" + more + "</Contents>"
	}
	const more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
	for _, tt := range []struct {
		name   string
		pages  []string // the last one again and again
		chunks int
		want   string // "" for success
	}{
		{"empty", []string{""}, 0, ""},
		{"two", []string{contents(1, "<Owner><ID>x</ID></Owner>") + contents(2, "")}, 2, ""},
		{"pages", []string{contents(1, "") + more, contents(2, "") + "<IsTruncated>false</IsTruncated>"}, 2, ""},
		{"nothing of ours", []string{"<Contents><Key>other</Key><Size>1</Size></Contents>"}, 0, ""},
		{"the same page", []string{contents(1, "") + more}, 1, "lists the same again"},
		{"the same key", []string{contents(1, "") + contents(1, "")}, 0, "lists the same again"},
		{"backwards", []string{contents(2, "") + contents(1, "")}, 0, "lists the same again"},
		{"the same token", []string{more}, 0, "lists the same again"},
		{"no token", []string{"<IsTruncated>true</IsTruncated>"}, 0, "nothing says where"},
		{"no size", []string{"<Contents><Key>" + key(1) + "</Key><Size>many</Size></Contents>"}, 0, "a size or a time that is none"},
		{"cut off", []string{"<Contents>"}, 0, "the server's list: "},
		{"another document", []string{"</ListBucketResult><Other>"}, 0, "the server's list: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked := 0
			s := answering(t, static.sources(), func(w http.ResponseWriter, r *http.Request) {
				body := tt.pages[min(asked, len(tt.pages)-1)]
				asked++
				io.WriteString(w, `<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">`+body+"</ListBucketResult>")
			})
			chunks := 0
			var err error
			for e, e2 := range s.List(t.Context()) {
				if err = e2; err != nil {
					break
				}
				if e.Size != 7 || !e.Modified.Equal(time.Date(2026, 1, 2, 3, 4, 5, 678_000_000, time.UTC)) {
					t.Errorf("got %+v", e)
				}
				chunks++
			}
			if chunks != tt.chunks {
				t.Errorf("got %d chunks, want %d", chunks, tt.chunks)
			}
			if tt.want != "" {
				wantError(t, "List", err, tt.want, true)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("without end", func(t *testing.T) {
		asked := 0
		s := answering(t, static.sources(), func(w http.ResponseWriter, r *http.Request) {
			asked++
			fmt.Fprintf(w, "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>%d</NextContinuationToken></ListBucketResult>", asked)
		})
		var err error
		for _, err = range s.List(t.Context()) {
		}
		wantError(t, "List", err, "no chunk on 10000 pages", false)
	})
}
