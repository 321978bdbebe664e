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
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
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

var update = flag.Bool("update", false, "write docs/failure.md and docs/fidelity.md anew instead of comparing with them")

const failurePage = "../../docs/failure.md"

// realFaults makes the tables with the product's times, which takes minutes.
var realFaults = os.Getenv("BOOTFS_FAULTS") == "real"

// scale is by how much the times of a table are shorter than those of the
// product: deadlines, stalls and outages.
func (c *faultCase) scale() time.Duration {
	times := time.Duration(10)
	if c.tcp != nil {
		times = 3 // a login over SSH takes its time
	}
	if realFaults {
		times = 1
	}
	return max(1, times>>c.attempt)
}

func (c *faultCase) deadline() time.Duration { return mount.DefaultReadTimeout / c.scale() }

func (c *faultCase) stall() time.Duration { return httpio.Stall / c.scale() }

// A fault is a row of a table: what goes wrong between a reader and its store.
type fault struct {
	name string
	// begin makes it go wrong from now on, and returns what heals it.
	begin func(c *faultCase) (heal func() error)
	tls   bool // the store is reached with https
	alone bool // it needs a server of its own
	// The store itself asks again, or a login takes as long as the reader waits for
	// it: a second attempt of the reader is as good.
	either bool
	// What the message of an EIO has in it, in the columns of read and of the
	// other kind of store; the latter is as the former where it is "".
	says, otherSays string
	// The outcome: cells of start, read, prefetch and read with a second store, and
	// read from the other kind of store. That of read may be as that of start. From
	// the other kind, a start ends as a read does, and a prefetch as from the first
	// kind or as it follows from the read.
	start, read, prefetch, second, other string
}

// otherPrefetch is the cell of prefetch from the other kind of store.
func (f fault) otherPrefetch() string {
	if f.other == cmp.Or(f.read, f.start) {
		return f.prefetch
	}
	return map[string]string{fine: all, now: givesUp, timedOut: goesOn, late: late, none: none}[f.other]
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

// answer makes the proxy answer with what f makes of it.
func answer(f func(*faultproxy.Proxy) faultproxy.Fault) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		c.proxy.Set(f(c.proxy))
		return func() error { c.proxy.Set(nil); return nil }
	}
}

func always(f faultproxy.Fault) func(*faultCase) func() error {
	return answer(func(*faultproxy.Proxy) faultproxy.Fault { return f })
}

func times(n int, f faultproxy.Fault) func(*faultCase) func() error {
	return answer(func(*faultproxy.Proxy) faultproxy.Fault { return faultproxy.Times(n, f) })
}

func outage(d time.Duration) func(*faultCase) func() error {
	return func(c *faultCase) func() error { return always(faultproxy.Outage(d / c.scale()))(c) }
}

func toOther(p *faultproxy.Proxy) faultproxy.Fault { return faultproxy.Redirect(307, p.Other(), false) }

// expiringToken makes tokens expire after three requests, with status.
func expiringToken(status int) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		c.proxy.RequireToken(tableUser, tablePassword, 3, status)
		return func() error { return nil }
	}
}

// refuse makes connections be refused.
func refuse(c *faultCase) func() error {
	proxy := interface{ Refuse(bool) error }(c.proxy)
	if c.tcp != nil {
		proxy = c.tcp
	}
	if err := proxy.Refuse(true); err != nil {
		return func() error { return err }
	}
	return func() error {
		// Another process may have the port for a moment.
		var err error
		for range 100 {
			if err = proxy.Refuse(false); err == nil {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
		return err
	}
}

// faults are the rows.
var faults = []fault{
	{name: "connection refused", says: "connection refused", begin: refuse, start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "RST in the body, 3 times", begin: times(3, faultproxy.Reset(100)), start: late, prefetch: late, second: skipped, other: late},
	{name: "RST in the body, always", says: "connection reset by peer", begin: always(faultproxy.Reset(100)), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "body too short, always", says: "unexpected EOF", begin: always(faultproxy.Short(100)), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "nothing comes for 2 s", begin: outage(2 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "nothing comes for 12 s", begin: outage(12 * time.Second), start: late, prefetch: late, second: skipped, other: late},
	{name: "nothing comes for 120 s", says: "stalled: no answer", begin: outage(120 * time.Second), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "1 byte a second", says: "stalled: less than", begin: always(faultproxy.Slow(0, 1)), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "429, Retry-After: 1, once", begin: times(1, faultproxy.Status(429, "1")), start: late, prefetch: late, second: skipped, other: late},
	{name: "503, Retry-After: a date, once", begin: answer(func(*faultproxy.Proxy) faultproxy.Fault {
		return faultproxy.Times(1, faultproxy.Status(503, time.Now().Add(2*time.Second).UTC().Format(http.TimeFormat)))
	}), start: late, prefetch: late, second: skipped, other: late},
	{name: "503, Retry-After: 3600, always", says: "to be asked again in 1h0m0s", begin: always(faultproxy.Status(503, "3600")), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "500, 3 times", begin: times(3, faultproxy.Status(500, "")), start: late, prefetch: late, second: skipped, other: late},
	{name: "200 with the whole blob for 206", begin: always(faultproxy.IgnoreRange()), start: fine, prefetch: all, second: fine, other: fine},
	{name: "another range than asked for", says: "want bytes", begin: always(faultproxy.WrongRange(5)), start: timedOut, prefetch: goesOn, second: skipped, other: fine},
	{name: "answer longer than asked for", says: "for a range of", otherSays: "no zstd frame", begin: always(faultproxy.Overlong(10, true)), start: timedOut, prefetch: goesOn, second: skipped, other: now},
	{name: "a web page with 200", says: "got a web page", begin: always(faultproxy.WebPage()), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "404", says: "404 Not Found", begin: always(faultproxy.Status(404, "")), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "401 when the token expires", begin: expiringToken(401), start: fine, prefetch: all, second: fine, other: none},
	{name: "403 when the token expires", begin: expiringToken(403), start: fine, prefetch: all, second: fine, other: none},
	{name: "403, whatever is shown", says: "403 Forbidden", begin: always(faultproxy.Status(403, "")), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "307 to another host", begin: answer(toOther), start: fine, prefetch: all, second: fine, other: fine},
	{name: "307 to a signed URL that has expired, 3 times", begin: answer(func(p *faultproxy.Proxy) faultproxy.Fault {
		return faultproxy.Times(3, faultproxy.Redirect(307, p.Other(), true))
	}), start: late, prefetch: late, second: skipped, other: late},
	{name: "redirects in a circle", says: "more than 10 redirects", begin: always(faultproxy.RedirectLoop()), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "from https to http", says: "refused to go on from https to http", tls: true, begin: answer(toOther), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "HEAD refused", begin: always(faultproxy.RefuseHead()), start: fine, prefetch: all, second: fine, other: fine},
	{name: "wrong bytes, once", begin: times(1, faultproxy.Flip(40)), start: late, prefetch: late, second: skipped, other: late},
	{name: "wrong bytes, always", says: "is corrupt", begin: always(faultproxy.Flip(40)), start: now, prefetch: givesUp, second: skipped, other: now},
}

// sshFaults are the rows of the table of stores over SSH.
var sshFaults = []fault{
	{name: "connection refused", says: "connection refused", begin: refuse, start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "RST in the middle of a frame, once", either: true, begin: breaking(1, true), start: late, read: fine, prefetch: all, second: fine, other: fine},
	{name: "end of the stream in the middle of a frame, once", either: true, begin: breaking(1, false), start: late, read: fine, prefetch: all, second: fine, other: fine},
	{name: "end of the stream in the middle of a frame, always", says: "the connection was lost", begin: breaking(1000, false), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "nothing comes for 2 s", begin: hold(2 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "nothing comes for 12 s", either: true, begin: hold(12 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "nothing comes for 120 s", says: "nothing arrived within", begin: hold(120 * time.Second), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "1 byte a second", says: "nothing arrived within", begin: func(c *faultCase) func() error {
		c.tcp.Slow(1)
		return func() error { c.tcp.Slow(0); return nil }
	}, start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "another host key", says: "is not the one that is pinned", alone: true, begin: anotherHostKey, start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "our key is no longer let in", says: "does not let root in", alone: true, begin: ownKeyRefused, start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "the chunks are gone", says: "chunk not found", alone: true, begin: func(c *faultCase) func() error {
		dir := filepath.Join(c.sshd.Srv, looseStore)
		if err := os.Rename(dir, dir+".away"); err != nil {
			return func() error { return err }
		}
		return func() error { return os.Rename(dir+".away", dir) }
	}, start: now, prefetch: givesUp, second: skipped, other: now},
}

// breaking ends n connections in the middle of a chunk.
func breaking(n int, reset bool) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		c.tcp.Break(n, 4000, reset) // behind what a login takes
		return func() error { c.tcp.Break(0, 0, false); return nil }
	}
}

func hold(d time.Duration) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		c.tcp.Hold(true)
		timer := time.AfterFunc(d/c.scale(), func() { c.tcp.Hold(false) })
		return func() error { timer.Stop(); c.tcp.Hold(false); return nil }
	}
}

// restarted stops the server, which ends its connections, and starts it again
// with what change has done.
func restarted(c *faultCase, change func() error) error {
	return errors.Join(c.sshd.Close(), change(), c.sshd.Start(context.Background()))
}

func anotherHostKey(c *faultCase) func() error {
	// The server has its keys where it sees /etc/ssh/keys.
	key := filepath.Join(filepath.Dir(c.sshd.Srv), "etc/ssh/keys/host_ed25519")
	old, err := os.ReadFile(key)
	if err == nil {
		err = restarted(c, c.sshd.NewHostKey)
	}
	return func() error {
		return errors.Join(err, restarted(c, func() error { return os.WriteFile(key, old, 0o600) }))
	}
}

func ownKeyRefused(c *faultCase) func() error {
	keys := filepath.Join(filepath.Dir(c.sshd.Srv), "etc/ssh/keys/authorized_keys")
	old, err := os.ReadFile(keys)
	if err == nil {
		err = restarted(c, func() error { return os.WriteFile(keys, nil, 0o644) })
	}
	return func() error {
		return errors.Join(err, restarted(c, func() error { return os.WriteFile(keys, old, 0o644) }))
	}
}

// A column is a way to read.
type column struct {
	name string
	open func(*faultCase) (chunkstore.Store, error)
	run  func(*faultCase, chunkstore.Store) outcome
	want func(f fault) string
	says func(f fault) string // nil: the message is not shown
}

// said reports whether the message of a failed read is the one of its fault.
func (c column) said(f fault, o outcome) bool {
	return c.says == nil || o.said == "" || c.says(f) != "" && strings.Contains(o.said, c.says(f)) ||
		realFaults && strings.Contains(o.said, "nothing arrived within") // the last attempt, with little time
}

// columns are start, read, prefetch and second store of one kind of store, and
// read, start and prefetch of another.
func columns(kind, other func(*faultCase) (chunkstore.Store, error), otherName string) []column {
	return []column{
		{"start", kind, (*faultCase).start, func(f fault) string { return f.start }, nil},
		{"read", kind, (*faultCase).read, func(f fault) string { return cmp.Or(f.read, f.start) }, func(f fault) string { return f.says }},
		{"prefetch", kind, (*faultCase).prefetch, func(f fault) string { return f.prefetch }, nil},
		{"second store", kind, (*faultCase).withSecond, func(f fault) string { return f.second }, nil},
		{otherName + ": read", other, (*faultCase).read, func(f fault) string { return f.other }, func(f fault) string { return cmp.Or(f.otherSays, f.says) }},
		{otherName + ": start", other, (*faultCase).start, func(f fault) string { return f.other }, nil},
		{otherName + ": prefetch", other, (*faultCase).prefetch, fault.otherPrefetch, nil},
	}
}

// TestFaultTable lets each fault meet each way in which a container reads, and
// compares the outcome with docs/failure.md, which it writes with -update. In
// every cell the bytes are right or there are none, the answer comes before
// the deadline, and what failed works once the fault has healed.
func TestFaultTable(t *testing.T) {
	env := newFaultEnv(t)
	var page, said strings.Builder
	page.WriteString(failureHead)
	said.WriteString(failureSaid)
	tables := []struct {
		head    string
		faults  []fault
		columns []column
		names   [2]string // of read's store, and of the last column's
		atOnce  int       // cells; mostly they wait, but those of SSH start processes
		seen    [][]outcome
	}{
		{head: failureHTTP, faults: faults, atOnce: 48,
			columns: columns((*faultCase).registry, (*faultCase).web, "web server"), names: [2]string{"registry", "web server"}},
		{head: failureSSH, faults: sshFaults, atOnce: 16,
			columns: columns((*faultCase).ssh, (*faultCase).sftp, "SFTP"), names: [2]string{"casync over SSH", "SFTP"}},
	}
	for _, table := range tables {
		table.seen = env.fill(table.faults, table.columns, table.atOnce)
		page.WriteString(table.head)
		for i, f := range table.faults {
			fmt.Fprintf(&page, "| %s |", f.name)
			for j, c := range table.columns {
				o := table.seen[i][j]
				if want := c.want(f); o.cell != want || !c.said(f, o) {
					t.Errorf("%s, %s: got %q (%s), want %q", f.name, c.name, o.cell, o.said, want)
				}
				for _, w := range o.wrong {
					t.Errorf("%s, %s: %s", f.name, c.name, w)
				}
				fmt.Fprintf(&page, " %s |", o.cell)
			}
			page.WriteString("\n")
		}
		for i, f := range table.faults {
			for k, j := range []int{1, 4} {
				if s := table.seen[i][j].said; s != "" {
					fmt.Fprintf(&said, "| %s | %s | %s |\n", f.name, table.names[k], s)
				}
			}
		}
	}
	page.WriteString(said.String())
	if realFaults {
		return // a second is a part of what the page says
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

// fill makes the outcomes of a table, row by row, and so many at a time.
func (e *faultEnv) fill(faults []fault, columns []column, atOnce int) [][]outcome {
	seen := make([][]outcome, len(faults))
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i, f := range faults {
		seen[i] = make([]outcome, len(columns))
		for j, c := range columns {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				want := c.want(f)
				if want == none {
					seen[i][j].cell = none
					return
				}
				// A second is short on a busy machine: what differs is tried
				// again with twice the time, but for wrong bytes.
				for attempt := range 3 {
					o := e.run(f, c, attempt)
					if f.either && o.cell == late && (want == fine || want == all) {
						o.cell = want
					}
					if seen[i][j] = o; o.corrupt || o.cell == want && c.said(f, o) && len(o.wrong) == 0 {
						return
					}
				}
			})
		}
	}
	wg.Wait()
	return seen
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
			return fmt.Sprintf("line %d:\n\thave %s\n\twant %s", i+1, a, b)
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
up and asked anew. The test takes a tenth of these times, and a third with SSH.

- **start**: the fault is there when the container starts: start set and program are fetched for the first time.
- **read**: the container runs, has read before, and reads something that nobody has read yet.
- **prefetch**: the container runs and fetches the rest ahead.
- **second store**: as *read*, with another store behind the one that fails. Ten more chunks do not wait for it again.
- **web server**, **SFTP**: the same from single chunks there.

Each cell is what the test expects, and what it has seen: it fails where the two differ. Where a connection over SSH breaks once or brings nothing for 12 s,
"data" may take a second attempt: chance decides whether the store asks anew in time by itself. How long a read waits, what a second request and another
store do for it, and how to wait for a store instead of an error stand in [running.md](running.md#when-a-store-fails).
`

const failureHTTP = `
## Registry and web server

| fault | start | read | prefetch | second store | web server: read | start | prefetch |
|---|---|---|---|---|---|---|---|
`

const failureSSH = `
## SSH

A connection is given up when it has been silent for 20 s.

| fault | start | read | prefetch | second store | SFTP: read | start | prefetch |
|---|---|---|---|---|---|---|---|
`

const failureSaid = `
## What the log says

A read that fails is EIO for the program and a line in boot's log. This is the line's end, without the names of chunks and hosts and with N
for numbers of bytes. An attempt has the less time the later it is: where a store does not answer in it, "nothing arrived within N s; before that: " stands
before the reason.

| fault | from | what the log says |
|---|---|---|
`

// faultEnv is the converted image that the table reads, in a registry, on a web
// server and on an SSH server.
type faultEnv struct {
	image    *converted.Image
	registry string // host:port
	web      string // host:port
	loose    string // the directory of single chunks
	sshd     *testenv.SSHD
	startSSH func() (*testenv.SSHD, error) // another one
}

const (
	faultRepository = "faults"
	looseStore      = "rootfs.castr"
)

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
	e := &faultEnv{registry: w.registry.Address, web: web.Address, loose: filepath.Join(web.Root, looseStore)}
	destination := w.registry.Address + "/" + faultRepository + ":packs"
	for _, args := range [][]string{{destination}, {"--store", e.loose, w.registry.Address + "/" + faultRepository + ":loose"}} {
		last := len(args) - 1
		args = append(append([]string{"--boot", w.boot}, args[:last]...), "oci:"+layout, args[last])
		if out, err := w.command(args...).CombinedOutput(); err != nil {
			t.Fatalf("convert: %v\n%s", err, out)
		}
	}
	// Many clients log in at once, and some break off.
	e.startSSH = func() (*testenv.SSHD, error) {
		s, err := testenv.StartSSHD(t.Context(), t.TempDir(), testenv.SSHDOptions{Config: `HostKey /etc/ssh/keys/host_ed25519
AuthorizedKeysFile /etc/ssh/keys/authorized_keys
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
UseDNS no
PidFile none
MaxStartups 1000
Subsystem sftp internal-sftp
`})
		if err != nil {
			return nil, err
		}
		stopAtEnd(t, s)
		return s, os.CopyFS(filepath.Join(s.Srv, looseStore), os.DirFS(e.loose))
	}
	if e.sshd, err = e.startSSH(); err != nil {
		t.Fatal(err)
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
	e.image = opened.Images[0]
	return e
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
	env     *faultEnv
	fault   fault
	attempt int // from 0
	out     outcome
	close   []func()
	heal    func() error

	// What stands before the store: one of them.
	proxy *faultproxy.Proxy
	tcp   *faultproxy.TCP

	tls  *httptest.Server // before proxy; nil: none
	sshd *testenv.SSHD    // behind tcp
}

// run makes a cell's outcome.
func (e *faultEnv) run(f fault, column column, attempt int) outcome {
	c := &faultCase{env: e, fault: f, attempt: attempt}
	defer func() {
		for _, end := range slices.Backward(c.close) {
			end()
		}
	}()
	s, err := column.open(c)
	if err != nil {
		return outcome{wrong: []string{err.Error()}}
	}
	if closer, ok := s.(io.Closer); ok {
		c.close = append(c.close, func() { closer.Close() })
	}
	return column.run(c, s)
}

// connect puts the proxy before the server at upstream and returns where to
// reach it.
func (c *faultCase) connect(upstream string) (scheme, address string, err error) {
	p, err := faultproxy.New("http://" + upstream)
	if err != nil {
		return "", "", err
	}
	c.proxy = p
	c.close = append(c.close, p.Close)
	if !c.fault.tls {
		return "http", p.Addr(), nil
	}
	c.tls = httptest.NewUnstartedServer(p)
	c.tls.Config.ErrorLog = log.New(io.Discard, "", 0)
	c.tls.StartTLS()
	c.close = append(c.close, c.tls.Close)
	return "https", c.tls.Listener.Addr().String(), nil
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

// registry is the store of packs behind the proxy.
func (c *faultCase) registry() (chunkstore.Store, error) {
	_, address, err := c.connect(c.env.registry)
	if err != nil {
		return nil, err
	}
	return c.packs(address, registrystore.RemoteOptions{Keychain: tableKeychain{}, Transport: c.transport(), Stall: c.stall()})
}

func (c *faultCase) packs(address string, o registrystore.RemoteOptions) (chunkstore.Store, error) {
	blobs, err := registrystore.NewRemote("registry://"+address+"/"+faultRepository, o)
	if err != nil {
		return nil, err
	}
	return registrystore.NewStore(blobs, c.env.image.Locators, c.env.image.Index), nil
}

// web is the web server behind the proxy.
func (c *faultCase) web() (chunkstore.Store, error) {
	scheme, address, err := c.connect(c.env.web)
	if err != nil {
		return nil, err
	}
	return httpstore.New(scheme+"://"+address+"/"+looseStore, httpstore.Options{Transport: c.transport(), Stall: c.stall()})
}

func (c *faultCase) ssh() (chunkstore.Store, error)  { return c.overSSH("ssh") }
func (c *faultCase) sftp() (chunkstore.Store, error) { return c.overSSH("sftp") }

// overSSH is the SSH server behind the proxy.
func (c *faultCase) overSSH(scheme string) (chunkstore.Store, error) {
	c.sshd = c.env.sshd
	if c.fault.alone {
		var err error
		if c.sshd, err = c.env.startSSH(); err != nil {
			return nil, err
		}
	}
	p, err := faultproxy.NewTCP(c.sshd.Address)
	if err != nil {
		return nil, err
	}
	c.tcp = p
	c.close = append(c.close, p.Close)
	_, key, _ := strings.Cut(c.sshd.HostKey, " ")
	return sshstore.New(scheme+"://root@"+p.Addr()+"/srv/"+looseStore, sshstore.Options{
		Keys: []string{c.sshd.Key}, HostKeys: []string{key}, Stall: 2 * c.stall(),
	})
}

// reader reads as a container does, from stores.
func (c *faultCase) reader(stores ...chunkstore.Store) *faultReader {
	x := c.env.image.Index
	f := chunkstore.NewFetcher(chunkstore.FetcherOptions{
		Digest: x.Digest(), Stores: stores, HedgeAfter: chunkstore.DefaultHedgeAfter / c.scale(),
	})
	return &faultReader{c: c, fetcher: f, image: lazy.New(x, f, lazy.Options{})}
}

// tableKeychain has the credentials of every host.
type tableKeychain struct{}

func (tableKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: tableUser, Password: tablePassword}, nil
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
func (r *faultReader) chunk(i int) error { return r.within(r.c.deadline(), i) }

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

func (c *faultCase) start(s chunkstore.Store) outcome {
	r := c.reader(s)
	c.heal = c.fault.begin(c)
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

func (c *faultCase) read(s chunkstore.Store) outcome {
	r := c.reader(s)
	warm, cold, colder := c.chunks()
	if err := r.chunk(warm); err != nil {
		c.bad("before the fault: %v", err)
	}
	failures := r.failures()
	c.heal = c.fault.begin(c)
	err := r.chunk(cold)
	r.outcome(failures, err)
	r.healed(cold, colder)
	return c.out
}

func (c *faultCase) withSecond(s chunkstore.Store) outcome {
	second, err := c.packs(c.env.registry, registrystore.RemoteOptions{})
	if err != nil {
		c.bad("%v", err)
		return c.out
	}
	r := c.reader(s, second)
	warm, cold, colder := c.chunks()
	if err := r.chunk(warm); err != nil {
		c.bad("before the fault: %v", err)
	}
	failures := r.failures()
	c.heal = c.fault.begin(c)
	err = r.chunk(cold)
	r.outcome(failures, err)
	// On a busy machine any answer is slow, and a second request goes there.
	if s := r.fetcher.Stats().Stores[1]; s.Chunks > 0 && err == nil && (c.fault.second != fine || s.Hedges == 0) {
		c.out.cell = skipped
	}
	began := time.Now()
	for i := range 10 {
		if err := r.chunk(cold + 1 + i); err != nil {
			c.bad("chunk %d: %v", i, err)
		}
	}
	if took := time.Since(began); took > 5*c.stall() {
		c.bad("ten more chunks took %v", took)
	}
	r.healed(cold, colder)
	return c.out
}

func (c *faultCase) prefetch(s chunkstore.Store) outcome {
	r := c.reader(s)
	warm, cold, _ := c.chunks()
	if err := r.chunk(warm); err != nil {
		c.bad("before the fault: %v", err)
	}
	failures := r.failures()
	c.heal = c.fault.begin(c)
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
	case <-time.After(c.deadline() / 2):
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
	{regexp.MustCompile(`SHA256:[A-Za-z0-9+/]+`), "SHA256:…"},
	{regexp.MustCompile(`\[127\.0\.0\.1\]:\d+ (\S+) AAAA\S+`), "[HOST]:PORT $1 AAAA…"},
	// An attempt on which nothing arrived comes after others, of which a login that
	// was given up says the same.
	{regexp.MustCompile(`; before that: HOST did not let us in within .*`), ""},
	{regexp.MustCompile(`nothing arrived within \d+s: context deadline exceeded; before that: `), ""},
	{regexp.MustCompile(`within \d+s`), "within N s"},
	{regexp.MustCompile(`(ssh://\S+: chunk not found): .*`), "$1"},                              // by SFTP, where casync's first answer is late
	{regexp.MustCompile(`casync ended|the connection was lost: .*`), "the connection was lost"}, // whoever notices it first
}

func (c *faultCase) shorten(err error) string {
	s := err.Error()
	s, _, _ = strings.Cut(s, "; gave up: ")
	s = strings.ReplaceAll(s, c.stall().String(), httpio.Stall.String())
	for _, sh := range shortenings {
		s = sh.re.ReplaceAllString(s, sh.by)
	}
	return strings.ReplaceAll(strings.TrimPrefix(s, "chunk …: "), "|", `\|`)
}
