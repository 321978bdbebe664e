package registrystore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

func TestParseContentRange(t *testing.T) {
	for _, tt := range []struct {
		header      string
		first, last int64
		ok          bool
	}{
		{"bytes 0-0/1", 0, 0, true},
		{"bytes 0-99/100", 0, 99, true},
		{"Bytes 5-9/*", 5, 9, true},
		{fmt.Sprintf("bytes 0-%d/*", int64(math.MaxInt64)), 0, math.MaxInt64, true},
		{"bytes 0-99/99", 0, 0, false},
		{"bytes 9-5/100", 0, 0, false},
		{"bytes */100", 0, 0, false},
		{"bytes 0-/100", 0, 0, false},
		{"bytes -5/100", 0, 0, false},
		{"bytes 0-5", 0, 0, false},
		{"bytes 0-5/", 0, 0, false},
		{"bytes +0-5/9", 0, 0, false},
		{"bytes 0--5/9", 0, 0, false},
		{"bytes 0-5-6/9", 0, 0, false},
		{"bytes  0-5/9", 0, 0, false},
		{"bytes=0-5/9", 0, 0, false},
		{"items 0-5/9", 0, 0, false},
		{"bytes 0-9223372036854775808/*", 0, 0, false},
		{"", 0, 0, false},
	} {
		first, last, err := parseContentRange(tt.header)
		if (err == nil) != tt.ok || first != tt.first || last != tt.last {
			t.Errorf("%q: got %d, %d, %v", tt.header, first, last, err)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/*", "bytes */7", "bytes 9-5/100", "bytes 0-9223372036854775807/*", "", "bytes 0-5-6/-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, err := parseContentRange(s)
		if err != nil {
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 700 {
				t.Errorf("%q", err)
			}
			return
		}
		if first < 0 || last < first {
			t.Fatalf("%q: %d to %d", s, first, last)
		}
		again := fmt.Sprintf("bytes %d-%d/*", first, last)
		if f2, l2, err := parseContentRange(again); err != nil || f2 != first || l2 != last {
			t.Fatalf("%q: %q gives %d, %d, %v", s, again, f2, l2, err)
		}
	})
}

func TestAddresses(t *testing.T) {
	for _, tt := range []struct {
		address  string
		insecure bool
		want     string // scheme, or a part of the error
	}{
		{"registry://ghcr.io/a/b", false, "https"},
		{"registry://ghcr.io/a/b", true, "http"},
		{"registry+http://ghcr.io/a/b", false, "http"},
		{"registry://127.0.0.1:5000/a", false, "http"},
		{"registry://127.1.2.3/a", false, "http"},
		{"registry://[::1]:5000/a", false, "http"},
		{"registry://localhost/a", false, "http"},
		{"registry://r.localhost:1/a", false, "http"},
		{"registry://localhost.example.com/a", false, "https"},
		{"registry://10.0.0.1:5000/a", false, "https"},
		{"registry://store/a", false, "https"}, // no namespace of Docker Hub
		{"registry://ghcr.io", false, "want registry://host/repository"},
		{"registry://ghcr.io/", false, "want registry://host/repository"},
		{"registry:///a", false, "want registry://host/repository"},
		{"registry://ghcr.io/A", false, "repository"},
		{"registry://ghcr.io/a:tag", false, "repository"},
		{"registry://ghcr.io/../a", false, "want registry://host/repository"},
		{"registry://us:er@pass@ghcr.io/a", false, `"registry://ghcr.io/a"`},
		{"https://ghcr.io/a", false, "want registry://"},
		{"ghcr.io/a", false, "want registry://"},
	} {
		b, err := NewRemote(tt.address, RemoteOptions{Insecure: tt.insecure})
		if err != nil {
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "er@") {
				t.Errorf("%s: got %v, want %q", tt.address, err, tt.want)
			}
			continue
		}
		if got := b.(*remoteBlobs).session.Load().scheme; got != tt.want || b.String() != tt.address {
			t.Errorf("%s: got scheme %s of %s, want %s", tt.address, got, b, tt.want)
		}
	}
}

// TestRangeBounds reads products of offsets and lengths from each kind of Blobs.
func TestRangeBounds(t *testing.T) {
	im, proxy := faulty(t, 20)
	p := im.packs[0]
	r, _ := p.Open()
	whole, _ := io.ReadAll(r)
	remote, err := NewRemote("registry://"+proxy.Addr()+"/app", RemoteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ignore := range []bool{false, true} {
		if ignore {
			proxy.Set(faultproxy.IgnoreRange())
		}
		for _, off := range []int64{0, 1, 4095, p.Size - 1, p.Size} {
			for _, n := range []int64{0, 1, 2, 4096, p.Size - 1, p.Size} {
				got, err := ReadRange(t.Context(), remote, p.Digest, off, n, []byte("x"))
				switch {
				case off+n <= p.Size || n == 0:
					if err != nil || string(got) != "x"+string(whole[off:off+n]) {
						t.Errorf("%d bytes at %d: got %d bytes, %v", n, off, len(got), err)
					}
				case err == nil:
					t.Errorf("%d bytes at %d of %d: no error", n, off, p.Size)
				}
			}
		}
	}
	for _, bad := range []struct {
		digest string
		off, n int64
	}{
		{p.Digest, -1, 1}, {p.Digest, 0, -1}, {p.Digest, math.MaxInt64, 1}, {p.Digest, 1, math.MaxInt64},
		{"sha256:../../secret", 0, 1}, {"", 0, 1}, {strings.ToUpper(p.Digest), 0, 1}, {p.Digest[:70], 0, 1},
	} {
		for _, b := range []Blobs{remote, NewLayoutBlobs(t.TempDir())} {
			var e *chunkstore.Error
			if _, err := b.Range(t.Context(), bad.digest, bad.off, bad.n); !errors.As(err, &e) || e.Temporary() {
				t.Errorf("%s: %+v: got %v, want a permanent error", b, bad, err)
			}
		}
	}
}

// quick is the stall time of tests that wait for it: short, but not so short
// that a busy machine looks like a stalled one.
const quick = 700 * time.Millisecond

// TestFaults sets each fault for all requests and wants an error of the right
// kind soon, then heals it and wants the same Store to read again.
func TestFaults(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	elsewhere := goRegistry(t) // another host, without the packs
	ids := im.ids(t, 0, im.index.Len())
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
		{"200 for 206", faultproxy.IgnoreRange(), "", false},
		{"wrong range", faultproxy.WrongRange(5), "want bytes", true},
		{"overlong", faultproxy.Overlong(10, true), "for a range of", true},
		{"overlong without length", faultproxy.Overlong(10, false), "", false}, // the rest is not read
		{"web page", faultproxy.WebPage(), "got a web page, want a blob", true},
		{"404", faultproxy.Status(404, ""), "chunk not found: the registry does not have this blob", false},
		{"403", faultproxy.Status(403, ""), "403 Forbidden: the registry wants other credentials: log in", false},
		{"416", faultproxy.Status(416, ""), "the blob ends before byte", false},
		{"418", faultproxy.Status(418, ""), "418", false},
		{"204", faultproxy.Status(204, ""), "204 No Content", false},
		{"redirect", faultproxy.Redirect(307, proxy.Other(), false), "", false},
		{"redirect to an expired URL", faultproxy.Redirect(307, proxy.Other(), true), "403 Forbidden from http://" + proxy.Other(), true},
		{"redirect to a host that lacks it", faultproxy.Redirect(302, elsewhere, false), "404 Not Found from http://" + elsewhere, false},
		{"redirect to nobody", faultproxy.Redirect(307, "127.0.0.1:1", false), "connection refused", true},
		{"redirect without place", faultproxy.Status(307, ""), "307 Temporary Redirect", false},
		{"redirect loop", faultproxy.RedirectLoop(), "more than 10 redirects", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stall := 20 * time.Second
			if strings.HasPrefix(tt.want, "stalled") {
				stall = quick
			}
			s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{Stall: stall, Advice: "log in"})
			read := map[string]func() error{
				"Get": func() error {
					frame, err := s.Get(t.Context(), ids[3], nil)
					if err != nil {
						if len(frame) > 0 {
							t.Errorf("%d bytes beside an error", len(frame))
						}
						return err
					}
					return im.verify(ids[3], frame)
				},
				"GetBatch": func() error {
					return s.GetBatch(t.Context(), ids, func(i int, frame []byte) error { return im.verify(ids[i], frame) })
				},
			}
			for _, how := range []string{"Get", "GetBatch"} {
				proxy.Set(tt.fault)
				start := time.Now()
				err := read[how]()
				if took := time.Since(start); took > 40*time.Second {
					t.Errorf("%s: took %s", how, took)
				}
				checkFault(t, how, err, tt.want, tt.temporary)
				proxy.Set(nil)
				if err := read[how](); err != nil {
					t.Errorf("%s: after the fault: %v", how, err)
				}
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
		if err := proxy.Refuse(true); err != nil {
			t.Fatal(err)
		}
		_, err := s.Get(t.Context(), ids[3], nil)
		checkFault(t, "Get", err, "connection refused", true)
		if err := proxy.Refuse(false); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), ids[3], nil); err != nil {
			t.Errorf("after the fault: %v", err)
		}
	})
	t.Run("no such host", func(t *testing.T) {
		s := im.storeAt(t, "registry+http://nobody.invalid/app", RemoteOptions{})
		_, err := s.Get(t.Context(), ids[3], nil)
		checkFault(t, "Get", err, "nobody.invalid", true)
	})
}

// checkFault wants err to contain want, in one line without secrets.
func checkFault(t *testing.T, how string, err error, want string, temporary bool) {
	t.Helper()
	if want == "" {
		if err != nil {
			t.Errorf("%s: %v", how, err)
		}
		return
	}
	var e *chunkstore.Error
	if !errors.As(err, &e) {
		t.Errorf("%s: got %v, want a *chunkstore.Error", how, err)
		return
	}
	msg := err.Error()
	if !strings.Contains(msg, want) || strings.ContainsAny(msg, "\n") || strings.Contains(msg, "s3cret") {
		t.Errorf("%s: got %s, want one line with %q", how, msg, want)
	}
	if !strings.Contains(msg, "chunk ") || !strings.Contains(msg, "blob sha256:") || !strings.HasPrefix(e.Store, "registry") || !strings.HasPrefix(msg, e.Store+": ") {
		t.Errorf("%s: %s does not name chunk, blob and place", how, msg)
	}
	if e.Temporary() != temporary {
		t.Errorf("%s: %s: temporary is %v, want %v", how, msg, e.Temporary(), temporary)
	}
	if got := errors.Is(err, chunkstore.ErrNotFound); got != strings.Contains(want, "404") && !strings.Contains(want, "not found") {
		t.Errorf("%s: %s: ErrNotFound is %v", how, msg, got)
	}
	if strings.Contains(want, "asked again") && e.RetryAfter() <= 0 {
		t.Errorf("%s: %s: no time to ask again", how, msg)
	}
}

// TestBatchKeepsWhatCame breaks a batch off in the middle: the chunks before
// that have been yielded, so a second attempt asks for less.
func TestBatchKeepsWhatCame(t *testing.T) {
	im, proxy := faulty(t, 60)
	s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
	ids := im.ids(t, 10, 30)
	proxy.Set(faultproxy.Short(400 << 10))
	came := 0
	err := s.GetBatch(t.Context(), ids, func(i int, frame []byte) error {
		came++
		return im.verify(ids[i], frame)
	})
	if err == nil || came < 5 || came >= len(ids) {
		t.Errorf("got %d of %d chunks and %v, want some and an error", came, len(ids), err)
	}
}

// TestFetcherRidesOutFaults has chunkstore.Fetcher read through faults that
// end.
func TestFetcherRidesOutFaults(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	for _, tt := range []struct {
		name   string
		faults faultproxy.Fault
	}{
		{"500×3", faultproxy.Times(3, faultproxy.Status(500, ""))},
		{"429", faultproxy.Times(1, faultproxy.Status(429, "1"))},
		{"reset", faultproxy.Times(3, faultproxy.Reset(50_000))},
		{"blackhole", faultproxy.Times(2, faultproxy.Blackhole(time.Minute))},
		{"flipped byte", faultproxy.Times(1, faultproxy.Flip(500))},
		{"web page", faultproxy.Times(2, faultproxy.WebPage())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxy.Set(tt.faults)
			s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{Stall: quick})
			f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: index.SHA256, Stores: []chunkstore.Store{s}})
			defer f.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			var cs []index.Chunk
			for pos := range im.index.Len() {
				c, err := im.index.At(pos)
				if err != nil {
					t.Fatal(err)
				}
				cs = append(cs, c)
			}
			err := f.FetchBatch(ctx, cs, func(i int, plain []byte) error {
				if string(plain) != string(im.plain[cs[i].ID]) {
					return fmt.Errorf("chunk %d: wrong bytes", i)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCancel ends a read in each of its states: waiting for a turn, for the
// answer and for the body.
func TestCancel(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	ids := im.ids(t, 0, im.index.Len())
	for name, fault := range map[string]faultproxy.Fault{
		"answer": faultproxy.Blackhole(time.Minute),
		"body":   faultproxy.Slow(0, 1000),
	} {
		t.Run(name, func(t *testing.T) {
			proxy.Set(fault)
			s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			start := time.Now()
			var wg sync.WaitGroup
			for range 3 * parallelRequests {
				wg.Go(func() {
					if _, err := s.Get(ctx, ids[3], nil); !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("Get: got %v, want %v", err, context.DeadlineExceeded)
					}
				})
				wg.Go(func() {
					err := s.GetBatch(ctx, ids[3:6], func(int, []byte) error { return nil })
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("GetBatch: got %v, want %v", err, context.DeadlineExceeded)
					}
				})
			}
			wg.Wait()
			if took := time.Since(start); took > 40*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
	if _, err := s.Get(ctx, ids[3], nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if err := s.GetBatch(ctx, ids, func(int, []byte) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// TestSlowReader takes its time between reads: that is no stall.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 60)
	b, err := NewRemote("registry://"+proxy.Addr()+"/app", RemoteOptions{Stall: quick})
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.Range(t.Context(), im.packs[1].Digest, 0, 5000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for range 2 {
		time.Sleep(2 * quick)
		if _, err := io.ReadFull(r, make([]byte, 2500)); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("got %d, %v, want the end", n, err)
	}
}

func TestLogin(t *testing.T) {
	for _, expired := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(http.StatusText(expired), func(t *testing.T) {
			im, proxy := faulty(t, 60)
			proxy.RequireToken("joe", "s3cret", 20, expired)
			s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{
				Keychain: &keychain{proxy.Addr(), "joe", "s3cret"},
			})
			ids := im.ids(t, 0, im.index.Len())
			// Many readers see tokens expire again and again.
			var wg sync.WaitGroup
			for i, id := range ids {
				wg.Go(func() {
					// With more readers than a token has uses, one may fail twice.
					for range 5 {
						frame, err := s.Get(t.Context(), id, nil)
						var e *chunkstore.Error
						if errors.As(err, &e) && e.Status == expired {
							continue
						}
						if err != nil {
							t.Errorf("chunk %d: %v", i, err)
						} else if err := im.verify(id, frame); err != nil {
							t.Error(err)
						}
						return
					}
					t.Errorf("chunk %d: tokens expire faster than they come", i)
				})
			}
			wg.Wait()
			if n := proxy.TokensIssued(); n < 2 || n > len(ids) {
				t.Errorf("%d tokens for %d chunks", n, len(ids))
			}
		})
	}
}

func TestWrongLogin(t *testing.T) {
	im, proxy := faulty(t, 20)
	proxy.RequireToken("joe", "s3cret", 1000, http.StatusUnauthorized)
	id := im.ids(t, 2, 3)[0]
	keys := &keychain{proxy.Addr(), "joe", "wr0ng"}
	s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{Keychain: keys})
	_, err := s.Get(t.Context(), id, nil)
	var e *chunkstore.Error
	if !errors.As(err, &e) || e.Status != http.StatusUnauthorized || e.Temporary() || strings.Contains(err.Error(), "wr0ng") {
		t.Errorf("got %v (%+v), want a permanent 401", err, e)
	}
	// The secret was mounted, or changed, while the container runs.
	keys.password = "s3cret"
	if _, err := s.Get(t.Context(), id, nil); err != nil {
		t.Errorf("with the right password: %v", err)
	}

	anonymous := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
	if _, err := anonymous.Get(t.Context(), id, nil); !errors.As(err, &e) || e.Status != http.StatusUnauthorized {
		t.Errorf("without credentials: got %v, want a 401", err)
	}
}

// hungKeychain is a credential helper that does not answer.
type hungKeychain chan struct{}

func (k hungKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	<-k
	return authn.Anonymous, nil
}

func TestHungCredentialHelper(t *testing.T) {
	t.Parallel()
	im, proxy := faulty(t, 20)
	proxy.RequireToken("joe", "s3cret", 1000, http.StatusUnauthorized)
	keys := make(hungKeychain)
	defer close(keys)
	s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{Keychain: keys, Stall: quick})
	for range 2 {
		_, err := s.Get(t.Context(), im.ids(t, 2, 3)[0], nil)
		checkFault(t, "Get", err, "stalled: no answer", true)
	}
}

// TestCredentialsStayHome follows redirects with a login: the other host sees
// none of it.
func TestCredentialsStayHome(t *testing.T) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		im, proxy := faulty(t, 20)
		proxy.RequireToken("joe", "s3cret", 1000, http.StatusUnauthorized)
		s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{Keychain: &keychain{proxy.Addr(), "joe", "s3cret"}})
		proxy.Set(faultproxy.Redirect(status, proxy.Other(), false))
		for _, id := range im.ids(t, 0, 8) {
			frame, err := s.Get(t.Context(), id, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := im.verify(id, frame); err != nil {
				t.Error(err)
			}
		}
		home, away := 0, 0
		for _, r := range proxy.Log() {
			if r.Host == proxy.Other() {
				away++
				if r.Authorization != "" {
					t.Fatalf("%d: the other host got %q", status, r.Authorization)
				}
			} else if r.Authorization != "" {
				home++
			}
		}
		if home == 0 || away == 0 {
			t.Errorf("%d: %d requests with credentials at home, %d away", status, home, away)
		}
	}
}

// TestTLS reads from a server with TLS: at a loopback address, where plain
// HTTP is tried first, and with redirects away from TLS refused.
func TestTLS(t *testing.T) {
	im, proxy := faulty(t, 20)
	server := httptest.NewUnstartedServer(proxy)
	server.EnableHTTP2 = true
	server.Config.ErrorLog = discardLog
	server.StartTLS()
	defer server.Close()
	host := server.Listener.Addr().String()
	id := im.ids(t, 2, 3)[0]

	trusting := server.Client().Transport
	s := im.storeAt(t, "registry://"+host+"/app", RemoteOptions{Transport: trusting})
	im.readAll(t, s)

	proxy.Set(faultproxy.Redirect(307, proxy.Other(), false))
	_, err := s.Get(t.Context(), id, nil)
	checkFault(t, "Get", err, httpio.ErrDowngrade.Error(), false)
	proxy.Set(nil)

	_, err = im.storeAt(t, "registry://"+host+"/app", RemoteOptions{}).Get(t.Context(), id, nil)
	if err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("unknown authority: got %v", err)
	}

	// By name it is a host like any other: https only.
	dialer := trusting.(*http.Transport).Clone()
	var plain atomic.Int64
	dialer.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if strings.HasSuffix(addr, ":80") {
			plain.Add(1)
		}
		return new(net.Dialer).DialContext(ctx, network, host)
	}
	im.readAll(t, im.storeAt(t, "registry://example.com/app", RemoteOptions{Transport: dialer}))
	proxy.RequireToken("joe", "s3cret", 100000, http.StatusUnauthorized)
	im.readAll(t, im.storeAt(t, "registry://example.com/app", RemoteOptions{Transport: dialer, Keychain: &keychain{"example.com", "joe", "s3cret"}}))
	if plain.Load() > 0 {
		t.Errorf("%d connections without TLS", plain.Load())
	}
}

func TestPlainHTTPElsewhere(t *testing.T) {
	im, proxy := faulty(t, 20)
	dialer := httpio.NewTransport(parallelRequests)
	dialer.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, proxy.Addr())
	}
	id := im.ids(t, 2, 3)[0]
	for _, host := range []string{"example.com", "10.0.0.1:5000"} {
		_, err := im.storeAt(t, "registry://"+host+"/app", RemoteOptions{Transport: dialer}).Get(t.Context(), id, nil)
		checkFault(t, "Get", err, "https://"+host+": the server speaks plain HTTP: name the store registry+http://", false)
		im.readAll(t, im.storeAt(t, "registry+http://"+host+"/app", RemoteOptions{Transport: dialer}))
	}
}

// TestOneRequest counts what a read costs where nobody asks for credentials.
func TestOneRequest(t *testing.T) {
	im, proxy := faulty(t, 60)
	s := im.storeAt(t, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
	ids := im.ids(t, 0, im.index.Len())
	for i := range 3 {
		proxy.ClearLog()
		if _, err := s.Get(t.Context(), ids[i], nil); err != nil {
			t.Fatal(err)
		}
		if log := proxy.Log(); len(log) != 1 {
			t.Errorf("one chunk: got %d requests %+v, want 1", len(log), log)
		}
	}
	proxy.ClearLog()
	if err := s.GetBatch(t.Context(), ids, func(int, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if n := len(proxy.Log()); n != len(im.packs) {
		t.Errorf("all chunks of %d packs: got %d requests", len(im.packs), n)
	}
}

func BenchmarkGet(b *testing.B) {
	im, proxy := faulty(b, 60)
	s := im.storeAt(b, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
	ids := im.ids(b, 0, im.index.Len())
	var buf []byte
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		frame, err := s.Get(b.Context(), ids[i%len(ids)], buf[:0])
		if err != nil {
			b.Fatal(err)
		}
		buf = frame
	}
}

func BenchmarkGetBatch(b *testing.B) {
	im, proxy := faulty(b, 300)
	s := im.storeAt(b, "registry://"+proxy.Addr()+"/app", RemoteOptions{})
	ids := im.ids(b, 0, im.index.Len())
	var size int64
	for _, p := range im.packs {
		size += p.Size
	}
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		if err := s.GetBatch(b.Context(), ids, func(int, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
