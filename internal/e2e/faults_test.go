package e2e

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/internal/transport"
	"github.com/container-bootfs/bootfs/mount"
	"github.com/container-bootfs/bootfs/registrystore"
)

var update = flag.Bool("update", false, "write docs/failure.md anew instead of comparing with it")

const failurePage = "../../docs/failure.md"

// faultScale is by how much the times of the fault table are shorter than those
// of the product: deadlines, stalls and outages. BOOTFS_FAULTS=real takes the
// real ones.
var faultScale = func() time.Duration {
	if os.Getenv("BOOTFS_FAULTS") == "real" {
		return 1
	}
	return 10
}()

var (
	faultDeadline = mount.DefaultReadTimeout / faultScale
	faultStall    = httpio.Stall / faultScale
)

// A fault is a row of the table: what goes wrong between a reader and its store.
type fault struct {
	name string
	// begin makes it go wrong at p from now on, and returns what heals it; nil
	// is p.Set(nil). It stands for set where that is nil.
	begin func(p *faultproxy.Proxy) (heal func() error)
	set   func(p *faultproxy.Proxy) faultproxy.Fault
	tls   bool // the store is reached with https
	noWeb bool // it is a registry's way only
	// The outcome: cells of start, read, prefetch, read with a second store, and
	// read from a web server. An empty one is as the cell before it, but the
	// one of prefetch, which is as start and read bring it about.
	start, read, prefetch, second, web string
}

// What a cell can say.
const (
	fine     = "data"
	late     = "data, after a retry"
	now      = "EIO at once"
	timedOut = "EIO at the deadline"
	skipped  = "data, from the second"
	all      = "all"
	goesOn   = "tries on until healed"
	givesUp  = "gives up; reads ask again"
	none     = "–"
)

const (
	tableUser     = "joe"
	tablePassword = "s3cret"
)

func always(f faultproxy.Fault) func(*faultproxy.Proxy) faultproxy.Fault {
	return func(*faultproxy.Proxy) faultproxy.Fault { return f }
}

func times(n int, f faultproxy.Fault) func(*faultproxy.Proxy) faultproxy.Fault {
	return func(*faultproxy.Proxy) faultproxy.Fault { return faultproxy.Times(n, f) }
}

func outage(d time.Duration) func(*faultproxy.Proxy) faultproxy.Fault {
	return func(*faultproxy.Proxy) faultproxy.Fault { return faultproxy.Outage(d / faultScale) }
}

// expiringToken makes tokens expire after three requests, with status.
func expiringToken(status int) func(*faultproxy.Proxy) func() error {
	return func(p *faultproxy.Proxy) func() error {
		p.RequireToken(tableUser, tablePassword, 3, status)
		return func() error { return nil }
	}
}

// faults are the rows.
var faults = []fault{
	{name: "connection refused", begin: refuse, start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "RST in the body, 3 times", set: times(3, faultproxy.Reset(100)), start: late, prefetch: late, second: skipped, web: late},
	{name: "RST in the body, always", set: always(faultproxy.Reset(100)), start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "body too short, always", set: always(faultproxy.Short(100)), start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "nothing comes for 2 s", set: outage(2 * time.Second), start: fine, prefetch: all, second: fine, web: fine},
	{name: "nothing comes for 12 s", set: outage(12 * time.Second), start: late, prefetch: late, second: skipped, web: late},
	{name: "nothing comes for 120 s", set: outage(120 * time.Second), start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "1 byte a second", set: always(faultproxy.Slow(0, 1)), start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "429, Retry-After: 1, once", set: times(1, faultproxy.Status(429, "1")), start: late, prefetch: late, second: skipped, web: late},
	{name: "503, Retry-After: a date, once", set: func(*faultproxy.Proxy) faultproxy.Fault {
		return faultproxy.Times(1, faultproxy.Status(503, time.Now().Add(2*time.Second).UTC().Format(http.TimeFormat)))
	}, start: late, prefetch: late, second: skipped, web: late},
	{name: "503, Retry-After: 3600, always", set: always(faultproxy.Status(503, "3600")), start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "500, 3 times", set: times(3, faultproxy.Status(500, "")), start: late, prefetch: late, second: skipped, web: late},
	{name: "200 with the whole blob for 206", set: always(faultproxy.IgnoreRange()), start: fine, prefetch: all, second: fine, web: fine},
	{name: "another range than asked for", set: always(faultproxy.WrongRange(5)), start: timedOut, prefetch: goesOn, second: skipped, web: fine},
	{name: "answer longer than asked for", set: always(faultproxy.Overlong(10, true)), start: timedOut, prefetch: goesOn, second: skipped, web: now},
	{name: "a web page with 200", set: always(faultproxy.WebPage()), start: timedOut, prefetch: goesOn, second: skipped, web: timedOut},
	{name: "404", set: always(faultproxy.Status(404, "")), start: now, prefetch: givesUp, second: skipped, web: now},
	{name: "401 when the token expires", begin: expiringToken(401), noWeb: true, start: fine, prefetch: all, second: fine},
	{name: "403 when the token expires", begin: expiringToken(403), noWeb: true, start: fine, prefetch: all, second: fine},
	{name: "403, whatever is shown", set: always(faultproxy.Status(403, "")), start: now, prefetch: givesUp, second: skipped, web: now},
	{name: "307 to another host", set: func(p *faultproxy.Proxy) faultproxy.Fault { return faultproxy.Redirect(307, p.Other(), false) }, start: fine, prefetch: all, second: fine, web: fine},
	{name: "307 to a signed URL that has expired, 3 times", set: func(p *faultproxy.Proxy) faultproxy.Fault {
		return faultproxy.Times(3, faultproxy.Redirect(307, p.Other(), true))
	}, start: late, prefetch: late, second: skipped, web: late},
	{name: "redirects in a circle", set: always(faultproxy.RedirectLoop()), start: now, prefetch: givesUp, second: skipped, web: now},
	{name: "from https to http", tls: true, set: func(p *faultproxy.Proxy) faultproxy.Fault { return faultproxy.Redirect(307, p.Other(), false) }, start: now, prefetch: givesUp, second: skipped, web: now},
	{name: "HEAD refused", set: always(faultproxy.RefuseHead()), start: fine, prefetch: all, second: fine, web: fine},
	{name: "wrong bytes, once", set: times(1, faultproxy.Flip(40)), start: late, prefetch: late, second: skipped, web: late},
	{name: "wrong bytes, always", set: always(faultproxy.Flip(40)), start: now, prefetch: givesUp, second: skipped, web: now},
}

func refuse(p *faultproxy.Proxy) func() error {
	if err := p.Refuse(true); err != nil {
		return func() error { return err }
	}
	return func() error {
		// Another process may have the port for a moment.
		var err error
		for range 100 {
			if err = p.Refuse(false); err == nil {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
		return err
	}
}

// TestFaultTable lets each fault meet each way in which a container reads, and
// compares the outcome with docs/failure.md, which it writes with -update. In
// every cell the bytes are right or there are none, the answer comes before
// the deadline, and what failed works once the fault has healed.
func TestFaultTable(t *testing.T) {
	env := newFaultEnv(t)
	columns := []struct {
		name string
		run  func(*faultCase) outcome
		want func(f fault) string
	}{
		{"start", (*faultCase).start, func(f fault) string { return f.start }},
		{"read", (*faultCase).read, func(f fault) string { return cmp.Or(f.read, f.start) }},
		{"prefetch", (*faultCase).prefetch, func(f fault) string { return f.prefetch }},
		{"second store", (*faultCase).withSecond, func(f fault) string { return f.second }},
		{"web server", (*faultCase).fromWeb, func(f fault) string {
			if f.noWeb {
				return none
			}
			return f.web
		}},
	}
	seen := make([][]outcome, len(faults))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 48) // mostly they wait
	for i, f := range faults {
		seen[i] = make([]outcome, len(columns))
		for j, c := range columns {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				if want := c.want(f); want == none {
					seen[i][j].cell = none
				} else {
					// A second is short on a busy machine: what differs is tried
					// again, but for wrong bytes.
					for range 3 {
						seen[i][j] = env.run(f, c.run)
						if o := &seen[i][j]; o.corrupt || o.cell == want && len(o.wrong) == 0 {
							break
						}
					}
				}
			})
		}
	}
	wg.Wait()

	var page strings.Builder
	page.WriteString(failureHead)
	for i, f := range faults {
		fmt.Fprintf(&page, "| %s |", f.name)
		for j, c := range columns {
			o := seen[i][j]
			if want := c.want(f); o.cell != want {
				t.Errorf("%s, %s: got %q (%s), want %q", f.name, c.name, o.cell, o.said, want)
			}
			for _, w := range o.wrong {
				t.Errorf("%s, %s: %s", f.name, c.name, w)
			}
			fmt.Fprintf(&page, " %s |", o.cell)
		}
		page.WriteString("\n")
	}
	page.WriteString(failureSaid)
	for i, f := range faults {
		for _, j := range []int{1, 4} {
			if said := seen[i][j].said; said != "" {
				fmt.Fprintf(&page, "| %s | %s | %s |\n", f.name, []string{"registry", "web server"}[j/4], said)
			}
		}
	}
	if faultScale == 1 {
		return // a second is a tenth of what the page says
	}
	if *update {
		if err := os.WriteFile(failurePage, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(failurePage)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page.String() {
		t.Errorf("docs/failure.md is not what happens: read what differs, then write it anew with\n\tgo test ./internal/e2e -run TestFaultTable -update\n%s", firstDifference(string(have), page.String()))
	}
}

// firstDifference shows the first line in which two texts differ.
func firstDifference(have, want string) string {
	h, w := strings.Split(have, "\n"), strings.Split(want, "\n")
	for i := range max(len(h), len(w)) {
		var a, b string
		if i < len(h) {
			a = h[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			return fmt.Sprintf("line %d:\n\tin the page %s\n\tseen        %s", i+1, a, b)
		}
	}
	return ""
}

const failureHead = `# When a store fails

What a converted image does when what is between it and its chunks fails. ` + "`internal/e2e`" + ` makes each fault happen, looks
at the outcome and writes this page (` + "`go test ./internal/e2e -run TestFaultTable -update`" + `); without ` + "`-update`" + ` it compares, so
the page says what the program does.

In every cell it also checks that the bytes were right or that there were none, that the answer came before the deadline, and that the
same open image reads again once the fault has healed. A read has 60 s; a store that brings less than 16 KiB in 10 s is given
up and asked anew. The test takes a tenth of these times.

- **start**: the fault is there when the container starts: start set and program are fetched for the first time.
- **read**: the container runs, has read before, and reads something that nobody has read yet.
- **prefetch**: the container runs and fetches the rest ahead.
- **second store**: as *read*, with another store behind the one that fails. Ten more chunks do not wait for it again.
- **web server**: as *read*, from single chunks on a web server instead of packs in a registry.

| fault | start | read | prefetch | second store | web server |
|---|---|---|---|---|---|
`

const failureSaid = `
A read that fails is EIO for the program and a line in boot's log. This is the line's end, without the names of chunks and hosts and with N
for numbers of bytes.

| fault | from | what the log says |
|---|---|---|
`

// faultEnv is the converted image that the table reads, in a registry and on a
// web server.
type faultEnv struct {
	image    *converted.Image
	registry string // host:port
	web      string // host:port
}

const faultRepository = "faults"

func newFaultEnv(t *testing.T) *faultEnv {
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.ScratchImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	site, err := os.ReadFile("../../samples/http/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	web, err := testenv.StartNginx(t.Context(), filepath.Join(t.TempDir(), "nginx"), string(site), nil)
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, web)
	destination := w.registry.Address + "/" + faultRepository + ":packs"
	for _, args := range [][]string{
		{destination},
		{"--store", filepath.Join(web.Root, "rootfs.castr"), w.registry.Address + "/" + faultRepository + ":loose"},
	} {
		last := len(args) - 1
		args = append(append([]string{"--boot", w.boot}, args[:last]...), "oci:"+layout, args[last])
		if out, err := w.command(args...).CombinedOutput(); err != nil {
			t.Fatalf("convert: %v\n%s", err, out)
		}
	}
	ref, err := transport.Parse("docker://"+destination, "")
	if err != nil {
		t.Fatal(err)
	}
	opened, err := converted.Open(t.Context(), ref, converted.Options{})
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, opened)
	return &faultEnv{image: opened.Images[0], registry: w.registry.Address, web: web.Address}
}

// outcome is what happened in a cell.
type outcome struct {
	cell  string
	said  string   // the error, for the page
	wrong []string // what must never happen

	corrupt bool // a read gave wrong bytes
}

// faultCase is a reader with a fault before it.
type faultCase struct {
	env   *faultEnv
	fault fault
	proxy *faultproxy.Proxy
	tls   *httptest.Server // before proxy; nil: none
	out   outcome
	heal  func() error
}

// run makes a cell's outcome.
func (e *faultEnv) run(f fault, column func(*faultCase) outcome) outcome {
	return column(&faultCase{env: e, fault: f})
}

// connect puts the proxy before the server at upstream and returns where to
// reach it.
func (c *faultCase) connect(upstream string) (address string) {
	p, err := faultproxy.New("http://" + upstream)
	if err != nil {
		c.bad("%v", err)
		return upstream
	}
	c.proxy = p
	if !c.fault.tls {
		return p.Addr()
	}
	c.tls = httptest.NewUnstartedServer(p)
	c.tls.Config.ErrorLog = log.New(io.Discard, "", 0)
	c.tls.StartTLS()
	return c.tls.Listener.Addr().String()
}

func (c *faultCase) close() {
	if c.tls != nil {
		c.tls.Close()
	}
	if c.proxy != nil {
		c.proxy.Close()
	}
}

func (c *faultCase) bad(format string, args ...any) {
	c.out.wrong = append(c.out.wrong, fmt.Sprintf(format, args...))
}

func (c *faultCase) transport() http.RoundTripper {
	if c.tls != nil {
		return c.tls.Client().Transport
	}
	return nil
}

// open returns a reader of the packs behind the proxy, with more stores after
// them.
func (c *faultCase) open(more ...chunkstore.Store) *faultReader {
	blobs, err := registrystore.NewRemote("registry://"+c.connect(c.env.registry)+"/"+faultRepository, registrystore.RemoteOptions{
		Keychain: tableKeychain{}, Transport: c.transport(), Stall: faultStall,
	})
	if err != nil {
		c.bad("%v", err)
	}
	return c.reader(append([]chunkstore.Store{registrystore.NewStore(blobs, c.env.image.Locators, c.env.image.Index)}, more...)...)
}

func (c *faultCase) reader(stores ...chunkstore.Store) *faultReader {
	x := c.env.image.Index
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: x.Digest(), Stores: stores})
	return &faultReader{c: c, fetcher: f, image: lazy.New(x, f, lazy.Options{})}
}

// tableKeychain has the credentials of every host.
type tableKeychain struct{}

func (tableKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: tableUser, Password: tablePassword}, nil
}

func (c *faultCase) begin() {
	if c.fault.begin != nil {
		c.heal = c.fault.begin(c.proxy)
		return
	}
	c.proxy.Set(c.fault.set(c.proxy))
	c.heal = func() error { c.proxy.Set(nil); return nil }
}

// faultReader reads as a container does.
type faultReader struct {
	c       *faultCase
	fetcher *chunkstore.Fetcher
	image   *lazy.Image
}

// failures is how often the first store failed so far.
func (r *faultReader) failures() int64 {
	s := r.fetcher.Stats().Stores[0]
	return s.Failures + s.Corrupt
}

// chunk reads chunk i as a program would, with the time that a read has, and
// verifies it.
func (r *faultReader) chunk(i int) error { return r.within(faultDeadline, i) }

func (r *faultReader) within(deadline time.Duration, i int) error {
	c, err := r.c.env.image.Index.At(i)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	p := make([]byte, c.Size)
	began := time.Now()
	_, err = r.image.ReadAt(ctx, p, c.Offset)
	if took := time.Since(began); took > deadline+2*time.Second {
		r.c.bad("a read took %v", took)
	}
	if err != nil && ctx.Err() != nil && !errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
	}
	if err == nil && index.ID(sha256.Sum256(p)) != c.ID {
		r.c.bad("wrong bytes in chunk %d", i)
		r.c.out.corrupt = true
	}
	return err
}

// outcome tells how a read ended.
func (r *faultReader) outcome(failures int64, err error) {
	o := &r.c.out
	switch failed := r.failures() > failures; {
	case err == nil && failed:
		o.cell = late
	case err == nil:
		o.cell = fine
	case errors.Is(err, context.DeadlineExceeded):
		o.cell = timedOut
	default:
		o.cell = now
	}
	if err != nil {
		o.said = r.c.shorten(err)
	}
}

// healed reads chunks with the same reader after the fault. They have the time
// of the product: one may join a fetch of the prefetch that began before.
func (r *faultReader) healed(chunks ...int) {
	if err := r.c.heal(); err != nil {
		r.c.bad("heal: %v", err)
	}
	for _, i := range chunks {
		if err := r.within(mount.DefaultReadTimeout, i); err != nil {
			r.c.bad("after the fault: %v", err)
		}
	}
	r.fetcher.Close()
}

// The chunks that a cell reads, as positions in the index. The first few lie in
// the metadata, which boot has.
func (c *faultCase) chunks() (warm, cold, colder int) {
	n := c.env.image.Index.Len()
	return n / 4, n / 2, 3 * n / 4
}

func (c *faultCase) start() outcome {
	defer c.close()
	r := c.open()
	c.begin()
	ctx, cancel := context.WithCancel(context.Background())
	var prefetch sync.WaitGroup
	prefetch.Go(func() { r.image.Prefetch(ctx, c.env.image.Locators.StartSet()) }) // what it brings, the reads see
	first, second, third := c.chunks()
	err := r.chunk(first)
	if err == nil {
		err = r.chunk(second)
	}
	r.outcome(0, err)
	r.healed(first, second, third)
	cancel()
	prefetch.Wait()
	return c.out
}

func (c *faultCase) read() outcome {
	defer c.close()
	return c.readWith(c.open())
}

func (c *faultCase) readWith(r *faultReader) outcome {
	warm, cold, colder := c.chunks()
	if err := r.chunk(warm); err != nil {
		c.bad("before the fault: %v", err)
	}
	failures := r.failures()
	c.begin()
	err := r.chunk(cold)
	r.outcome(failures, err)
	r.healed(cold, colder)
	return c.out
}

func (c *faultCase) fromWeb() outcome {
	defer c.close()
	address := c.connect(c.env.web)
	scheme := "http://"
	if c.tls != nil {
		scheme = "https://"
	}
	s, err := httpstore.New(scheme+address+"/rootfs.castr", httpstore.Options{Transport: c.transport(), Stall: faultStall})
	if err != nil {
		c.bad("%v", err)
	}
	return c.readWith(c.reader(s))
}

func (c *faultCase) withSecond() outcome {
	defer c.close()
	blobs, err := registrystore.NewRemote("registry://"+c.env.registry+"/"+faultRepository, registrystore.RemoteOptions{})
	if err != nil {
		c.bad("%v", err)
	}
	r := c.open(registrystore.NewStore(blobs, c.env.image.Locators, c.env.image.Index))
	warm, cold, colder := c.chunks()
	if err := r.chunk(warm); err != nil {
		c.bad("before the fault: %v", err)
	}
	failures := r.failures()
	c.begin()
	err = r.chunk(cold)
	r.outcome(failures, err)
	if s := r.fetcher.Stats().Stores[1]; s.Chunks > 0 && err == nil {
		c.out.cell = skipped
	}
	began := time.Now()
	for i := range 10 {
		if err := r.chunk(cold + 1 + i); err != nil {
			c.bad("chunk %d: %v", i, err)
		}
	}
	if took := time.Since(began); took > 5*faultStall {
		c.bad("ten more chunks took %v", took)
	}
	r.healed(cold, colder)
	return c.out
}

func (c *faultCase) prefetch() outcome {
	defer c.close()
	r := c.open()
	warm, cold, _ := c.chunks()
	if err := r.chunk(warm); err != nil {
		c.bad("before the fault: %v", err)
	}
	failures := r.failures()
	c.begin()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- r.image.Prefetch(ctx, func(yield func(int) bool) {
			for i := range c.env.image.Index.Len() {
				if !yield(i) {
					return
				}
			}
		})
	}()
	// No longer: a fetch for nobody in particular ends by itself after 30 s.
	select {
	case err := <-done:
		r.outcome(failures, err)
		switch c.out.cell {
		case fine:
			c.out.cell = all
		case now:
			c.out.cell = givesUp
		}
		r.healed(cold)
	case <-time.After(faultDeadline / 2):
		c.out.cell = goesOn
		r.healed(cold)
		select {
		case err := <-done:
			if err != nil {
				c.bad("prefetch after the fault: %v", err)
			}
		case <-time.After(40 * time.Second):
			c.bad("prefetch does not end after the fault")
		}
	}
	return c.out
}

// placeInMessage is where the store's own words begin.
var placeInMessage = regexp.MustCompile(`: (blob sha256:[0-9a-f]+|chunk [0-9a-f]{64}) in `)

// What of a message differs from run to run, and what stands for it.
var shortenings = []struct {
	re *regexp.Regexp
	by string
}{
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "HOST"},
	{regexp.MustCompile(`sha256:[0-9a-f]{64}`), "sha256:…"},
	{regexp.MustCompile(`[0-9a-f]{64}`), "…"},
	{regexp.MustCompile(`bytes \d+-\d+(/\d+)?`), "bytes N-N"},
	{regexp.MustCompile(`\d+ of \d+ bytes`), "N of N bytes"},
	{regexp.MustCompile(`(after|got|want|of|at) \d+\b`), "$1 N"},
	{regexp.MustCompile(`\d+ bytes`), "N bytes"},
	{regexp.MustCompile(`(zstd frame) \([^)]*\)`), "$1"},
	{regexp.MustCompile(`(: (read|write) tcp )?HOST->HOST`), ""},
}

func (c *faultCase) shorten(err error) string {
	s := err.Error()
	s, _, _ = strings.Cut(s, "; gave up: ")
	if all := placeInMessage.FindAllStringIndex(s, -1); all != nil {
		s = s[all[len(all)-1][0]+2:]
	}
	s = strings.ReplaceAll(s, faultStall.String(), httpio.Stall.String())
	for _, sh := range shortenings {
		s = sh.re.ReplaceAllString(s, sh.by)
	}
	return strings.ReplaceAll(s, "|", `\|`)
}
