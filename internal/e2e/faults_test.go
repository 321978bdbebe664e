package e2e

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
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
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/httpio"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/mount"
	"github.com/container-bootfs/bootfs/registrystore"
)

// realFaults makes the tables with the product's times, which takes minutes.
var realFaults = os.Getenv("BOOTFS_FAULTS") == "real"

// scale is by how much the times of a table are shorter than those of the
// product: deadlines, stalls and outages.
func (c *faultCase) scale() time.Duration {
	times := time.Duration(10)
	if c.logins {
		times = 4
	}
	if realFaults {
		times = 1
	}
	return max(1, times>>c.attempt)
}

// deadline is how long a read may take. What shall bring data is given a busy
// machine's time when it is tried again.
func (c *faultCase) deadline() time.Duration {
	if c.attempt > 0 && isData(c.want) {
		return mount.DefaultReadTimeout
	}
	return mount.DefaultReadTimeout / c.scale()
}

func (c *faultCase) stall() time.Duration { return httpio.Stall / c.scale() }

// A fault is a row of a table: what goes wrong between a reader and its store.
type fault struct {
	name string
	must expectation
	// begin makes it go wrong from now on, and returns what heals it.
	begin func(c *faultCase) (heal func() error)
	tls   bool // the store is reached with https
	alone bool // it needs a server of its own, with nothing before it
	line  bool // connections go wrong, and not requests
	// What the message of an EIO has in it, in the columns of read and of the
	// other kind of store; the latter is as the former where it is "".
	says, otherSays string
	// The outcome: cells of start, read, prefetch and read with a second store, and
	// read from the other kind of store. That of read may be as that of start. From
	// the other kind, a start ends as a read does, and a prefetch as from the first
	// kind or as it follows from the read.
	start, read, prefetch, second, other string
}

// An expectation is what must hold of a fault, whatever the store and the reader.
type expectation string

const (
	brings   expectation = "data"
	fails    expectation = "EIO, data once healed"
	mayBring expectation = "data or EIO, data once healed"
)

// allows reports whether a cell of a column is as expected. With a second store
// there always is data.
func (e expectation) allows(column, cell string) bool {
	switch {
	case cell == none:
		return true
	case isData(cell):
		return e != fails || column == secondStore
	}
	return e != brings && column != secondStore
}

// isData reports whether a cell says that all that was asked for has come.
func isData(cell string) bool {
	return strings.HasPrefix(cell, fine) || cell == all
}

// alike reports whether two cells are the same outcome. What is given up and asked
// anew by the store and what by the reader, and whether a second request was sent
// before the fault had healed, is chance.
func alike(a, b string) bool { return a == b || isData(a) && isData(b) }

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

const secondStore = "second store"

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
	{name: "connection refused", must: fails, says: "connection refused", begin: refuse, start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "RST in the body, 3 times", must: brings, begin: times(3, faultproxy.Reset(100)), start: late, prefetch: late, second: skipped, other: late},
	{name: "RST in the body, always", must: fails, says: "connection reset by peer", begin: always(faultproxy.Reset(100)), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "body too short, always", must: fails, says: "unexpected EOF", begin: always(faultproxy.Short(100)), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "nothing comes for 2 s", must: brings, begin: outage(2 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "nothing comes for 12 s", must: brings, begin: outage(12 * time.Second), start: late, prefetch: late, second: skipped, other: late},
	{name: "nothing comes for 120 s", must: fails, says: "stalled: no answer", begin: outage(120 * time.Second), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "1 byte a second", must: fails, says: "stalled: less than", begin: always(faultproxy.Slow(0, 1)), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "429, Retry-After: 1, once", must: brings, begin: times(1, faultproxy.Status(429, "1")), start: late, prefetch: late, second: skipped, other: late},
	{name: "503, Retry-After: a date, once", must: brings, begin: answer(func(*faultproxy.Proxy) faultproxy.Fault {
		return faultproxy.Times(1, faultproxy.Status(503, time.Now().Add(2*time.Second).UTC().Format(http.TimeFormat)))
	}), start: late, prefetch: late, second: skipped, other: late},
	{name: "503, Retry-After: 3600, always", must: fails, says: "to be asked again in 1h0m0s", begin: always(faultproxy.Status(503, "3600")), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "500, 3 times", must: brings, begin: times(3, faultproxy.Status(500, "")), start: late, prefetch: late, second: skipped, other: late},
	{name: "200 with the whole blob for 206", must: brings, begin: always(faultproxy.IgnoreRange()), start: fine, prefetch: all, second: fine, other: fine},
	{name: "another range than asked for", must: mayBring, says: "want bytes", begin: always(faultproxy.WrongRange(5)), start: timedOut, prefetch: goesOn, second: skipped, other: fine},
	{name: "answer longer than asked for", must: fails, says: "for a range of", otherSays: "no zstd frame", begin: always(faultproxy.Overlong(10, true)), start: timedOut, prefetch: goesOn, second: skipped, other: now},
	{name: "a web page with 200", must: fails, says: "got a web page", begin: always(faultproxy.WebPage()), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "404", must: fails, says: "404 Not Found", begin: always(faultproxy.Status(404, "")), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "401 when the token expires", must: brings, begin: expiringToken(401), start: fine, prefetch: all, second: fine, other: none},
	{name: "403 when the token expires", must: brings, begin: expiringToken(403), start: fine, prefetch: all, second: fine, other: none},
	{name: "403, whatever is shown", must: fails, says: "403 Forbidden", begin: always(faultproxy.Status(403, "")), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "307 to another host", must: brings, begin: answer(toOther), start: fine, prefetch: all, second: fine, other: fine},
	{name: "307 to a signed URL that has expired, 3 times", must: brings, begin: answer(func(p *faultproxy.Proxy) faultproxy.Fault {
		return faultproxy.Times(3, faultproxy.Redirect(307, p.Other(), true))
	}), start: late, prefetch: late, second: skipped, other: late},
	{name: "redirects in a circle", must: fails, says: "more than 10 redirects", begin: always(faultproxy.RedirectLoop()), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "from https to http", must: fails, says: "refused to go on from https to http", tls: true, begin: answer(toOther), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "HEAD refused", must: brings, begin: always(faultproxy.RefuseHead()), start: fine, prefetch: all, second: fine, other: fine},
	{name: "wrong bytes, once", must: brings, begin: times(1, faultproxy.Flip(40)), start: late, prefetch: late, second: skipped, other: late},
	{name: "wrong bytes, always", must: fails, says: "is corrupt", begin: always(faultproxy.Flip(40)), start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "connections are dead, as after a sleep", must: brings, line: true, begin: deaden, start: fine, prefetch: all, second: skipped, other: fine},
	{name: "SIGKILL of the server, which is back after 2 s", must: brings, alone: true, begin: sigKilled(2 * time.Second), start: late, prefetch: late, second: skipped, other: late},
	{name: "SIGSTOP of the server for 2 s", must: brings, alone: true, begin: sigStopped(2 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "SIGSTOP of the server", must: fails, says: "stalled: no answer", alone: true, begin: sigStopped(0), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
}

// sshFaults are the rows of the table of stores over SSH.
var sshFaults = []fault{
	{name: "connection refused", must: fails, says: "connection refused", begin: refuse, start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "RST in the middle of a frame, once", must: brings, begin: breaking(1, true), start: late, read: fine, prefetch: all, second: fine, other: fine},
	{name: "end of the stream in the middle of a frame, once", must: brings, begin: breaking(1, false), start: late, read: fine, prefetch: all, second: fine, other: fine},
	{name: "end of the stream in the middle of a frame, always", must: fails, says: "the connection was lost", begin: breaking(1000, false), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "nothing comes for 2 s", must: brings, begin: hold(2 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "nothing comes for 12 s", must: brings, begin: hold(12 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "nothing comes for 120 s", must: fails, says: "nothing arrived within", begin: hold(120 * time.Second), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "1 byte a second", must: fails, says: "nothing arrived within", begin: func(c *faultCase) func() error {
		c.tcp.Slow(1)
		return func() error { c.tcp.Slow(0); return nil }
	}, start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "another host key", must: fails, says: "is not the one that is pinned", alone: true, begin: anotherHostKey, start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "our key is no longer let in", must: fails, says: "does not let root in", alone: true, begin: ownKeyRefused, start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "the chunks are gone", must: fails, says: "chunk not found", alone: true, begin: func(c *faultCase) func() error {
		dir := filepath.Join(c.sshd.Srv, looseStore)
		if err := os.Rename(dir, dir+".away"); err != nil {
			return func() error { return err }
		}
		return func() error { return os.Rename(dir+".away", dir) }
	}, start: now, prefetch: givesUp, second: skipped, other: now},
	{name: "connections are dead, as after a sleep", must: brings, begin: deaden, start: fine, prefetch: all, second: skipped, other: fine},
	{name: "SIGKILL of sshd, which is back after 2 s", must: brings, alone: true, begin: sigKilled(2 * time.Second), start: late, prefetch: late, second: skipped, other: late},
	{name: "SIGSTOP of sshd for 2 s", must: brings, alone: true, begin: sigStopped(2 * time.Second), start: fine, prefetch: all, second: skipped, other: fine},
	{name: "SIGSTOP of sshd", must: fails, says: "nothing arrived within", alone: true, begin: sigStopped(0), start: timedOut, prefetch: goesOn, second: skipped, other: timedOut},
	{name: "SIGKILL of the process that reads the chunks there", must: brings, alone: true, begin: signalServing(unix.SIGKILL), start: fine, read: late, prefetch: late, second: fine, other: fine},
	{name: "SIGSTOP of the process that reads the chunks there", must: brings, alone: true, begin: signalServing(unix.SIGSTOP), start: late, prefetch: late, second: skipped, other: fine},
}

func deaden(c *faultCase) func() error {
	c.tcp.Deaden()
	return func() error { return nil }
}

// A server can be ended, begun again and stopped from outside.
type server interface {
	Kill()
	Start(ctx context.Context) error
	Processes() []int
}

// sigKilled kills the server, and starts it again after d.
func sigKilled(d time.Duration) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		c.server.Kill()
		back := make(chan error, 1)
		time.AfterFunc(d/c.scale(), func() { back <- c.server.Start(context.Background()) })
		return func() error { return <-back }
	}
}

// sigStopped stops all processes of the server for d, or until it heals if d is 0.
func sigStopped(d time.Duration) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		processes := c.server.Processes()
		send := func(s unix.Signal) {
			for _, pid := range processes {
				unix.Kill(pid, s) // one that has ended needs none
			}
		}
		send(unix.SIGSTOP)
		if d > 0 {
			time.AfterFunc(d/c.scale(), func() { send(unix.SIGCONT) })
		}
		return func() error { send(unix.SIGCONT); return nil }
	}
}

// signalServing sends a signal to the processes that read chunks for us, or to the
// first one if there is none yet.
func signalServing(s unix.Signal) func(*faultCase) func() error {
	return func(c *faultCase) func() error {
		ctx, cancel := context.WithCancel(context.Background())
		hit := make(chan []int, 1)
		send := func() bool {
			pids := c.sshd.Serving()
			for _, pid := range pids {
				unix.Kill(pid, s)
			}
			if len(pids) > 0 {
				hit <- pids
			}
			return len(pids) > 0
		}
		if !send() {
			go func() {
				for !send() && ctx.Err() == nil {
					time.Sleep(time.Millisecond)
				}
			}()
		}
		return func() error {
			defer cancel()
			select {
			case pids := <-hit:
				for _, pid := range pids {
					unix.Kill(pid, unix.SIGCONT)
				}
				return nil
			case <-time.After(c.deadline()):
				return errors.New("no process has read chunks for us")
			}
		}
	}
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
		{secondStore, kind, (*faultCase).withSecond, func(f fault) string { return f.second }, nil},
		{otherName + ": read", other, (*faultCase).read, func(f fault) string { return f.other }, func(f fault) string { return cmp.Or(f.otherSays, f.says) }},
		{otherName + ": start", other, (*faultCase).start, func(f fault) string { return f.other }, nil},
		{otherName + ": prefetch", other, (*faultCase).prefetch, fault.otherPrefetch, nil},
	}
}

// networkTable is the faults of two kinds of store.
type networkTable struct {
	head    string
	faults  []fault
	columns []column
	names   [2]string // of read's store, and of the last columns'
	atOnce  int       // cells; mostly they wait, but those of SSH start processes
	seen    [][]outcome
}

// networkTables lets each fault of a store meet each way in which a container
// reads. In every cell the bytes are right or there are none, the answer comes
// before the deadline, and what failed works once the fault has healed.
func networkTables(t *testing.T, env *faultEnv) (tables, said string) {
	var page, messages strings.Builder
	messages.WriteString(failureSaid)
	shown, err := os.ReadFile(failurePage)
	if err != nil {
		t.Fatal(err)
	}
	kinds := []*networkTable{
		{head: failureHTTP, faults: faults, atOnce: 24,
			columns: columns((*faultCase).registry, (*faultCase).web, "web server"), names: [2]string{"registry", "web server"}},
		{head: failureSSH, faults: sshFaults, atOnce: 12,
			columns: columns((*faultCase).ssh, (*faultCase).sftp, "SFTP"), names: [2]string{"casync over SSH", "SFTP"}},
	}
	var both sync.WaitGroup
	for _, table := range kinds {
		both.Go(func() { env.fill(table, string(shown)) })
	}
	both.Wait()
	for _, table := range kinds {
		page.WriteString(table.head)
		for i, f := range table.faults {
			fmt.Fprintf(&page, "| %s | %s |", f.name, f.must)
			for j, c := range table.columns {
				o := table.seen[i][j]
				want := c.want(f)
				if !alike(o.cell, want) || !f.must.allows(c.name, o.cell) || !c.said(f, o) {
					t.Errorf("%s, %s: got %q (%s), want %q; expected is: %s", f.name, c.name, o.cell, o.said, want, f.must)
				} else if o.cell != want {
					t.Logf("%s, %s: %q goes for %q", f.name, c.name, o.cell, want)
					o.cell = want
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
					messages.WriteString(messageLine(f, table.names[k], s))
				}
			}
		}
	}
	return page.String(), messages.String()
}

// messageLine is a row of the page's table of messages.
func messageLine(f fault, from, said string) string {
	return fmt.Sprintf("| %s | %s | %s |\n", f.name, from, said)
}

// fill makes the outcomes of a table, row by row, and so many at a time.
func (e *faultEnv) fill(table *networkTable, shown string) {
	table.seen = make([][]outcome, len(table.faults))
	var wg sync.WaitGroup
	slots := make(chan struct{}, table.atOnce)
	for i, f := range table.faults {
		table.seen[i] = make([]outcome, len(table.columns))
		for j, c := range table.columns {
			want, seen := c.want(f), &table.seen[i][j]
			if want == none {
				seen.cell = none
				continue
			}
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				// A second is short on a busy machine: what differs is tried
				// again with twice the time, but for wrong bytes.
				for attempt := range 4 {
					*seen = e.run(f, c, attempt)
					if seen.corrupt || table.isRight(f, c, *seen, attempt, shown) {
						return
					}
				}
			})
		}
	}
	wg.Wait()
}

// isRight reports whether an attempt's outcome is the one that the page shows, or
// may go for it.
func (table *networkTable) isRight(f fault, c column, o outcome, attempt int, shown string) bool {
	want := c.want(f)
	switch {
	case len(o.wrong) > 0, !alike(o.cell, want), !c.said(f, o):
		return false
	case o.cell != want:
		return attempt > 0
	case o.said == "" || c.says == nil || *update || realFaults:
		return true
	}
	from := table.names[0]
	if c.name != "read" {
		from = table.names[1]
	}
	return strings.Contains(shown, messageLine(f, from, o.said))
}

// faultEnv is the converted image that the table reads, in a registry, on a web
// server and on an SSH server.
type faultEnv struct {
	image    *converted.Image
	ref      string // of it, with its chunks in packs
	registry string // host:port, of its packs
	web      string // host:port
	loose    string // the directory of single chunks
	sshd     *testenv.SSHD
	// Others, for a cell.
	startSSH      func() (*testenv.SSHD, error)
	startRegistry func() (*testenv.Registry, error)
	startWeb      func() (*testenv.Nginx, error)
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
	startWeb := func() (*testenv.Nginx, error) {
		return testenv.StartNginx(t.Context(), filepath.Join(t.TempDir(), "nginx"), string(site), nil)
	}
	web, err := startWeb()
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, web)
	e := &faultEnv{ref: w.registry.Address + "/" + faultRepository + ":packs", registry: serveBlobs(t), web: web.Address, loose: filepath.Join(web.Root, looseStore)}
	for _, args := range [][]string{{e.ref}, {"--store", e.loose, w.registry.Address + "/" + faultRepository + ":loose"}} {
		last := len(args) - 1
		args = append(append([]string{"--boot", w.boot}, args[:last]...), "oci:"+layout, args[last])
		if out, err := w.command(args...).CombinedOutput(); err != nil {
			t.Fatalf("convert: %v\n%s", err, out)
		}
	}
	e.startWeb = func() (*testenv.Nginx, error) {
		n, err := startWeb()
		if err != nil {
			return nil, err
		}
		return n, os.Symlink(e.loose, filepath.Join(n.Root, looseStore))
	}
	e.startRegistry = func() (*testenv.Registry, error) {
		dir := t.TempDir()
		if err := os.Symlink(filepath.Join(w.registry.Dir, "data"), filepath.Join(dir, "data")); err != nil {
			return nil, err
		}
		return testenv.StartRegistry(t.Context(), dir, "")
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
		return s, os.CopyFS(filepath.Join(s.Srv, looseStore), os.DirFS(e.loose))
	}
	if e.sshd, err = e.startSSH(); err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, e.sshd)
	e.image = openImage(t, "docker://"+e.ref)
	return e
}

// serveBlobs serves the registry's blobs, and returns its host:port. It takes little
// of the machine: a registry that has too much to do takes the longer the more is
// given up and asked anew.
func serveBlobs(t *testing.T) string {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/{$}", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /v2/"+faultRepository+"/blobs/{digest}", func(answer http.ResponseWriter, r *http.Request) {
		digest, err := v1.NewHash(r.PathValue("digest"))
		if err != nil {
			http.NotFound(answer, r)
			return
		}
		answer.Header().Set("Content-Type", "application/octet-stream")
		http.ServeFile(answer, r, filepath.Join(w.registry.Dir, "data/docker/registry/v2/blobs", digest.Algorithm, digest.Hex[:2], digest.Hex, "data"))
	})
	server := httptest.NewServer(mux)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	return server.Listener.Addr().String()
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
	attempt int    // from 0
	want    string // the cell
	logins  bool   // over SSH, which take their time
	out     outcome
	close   []func()
	heal    func() error

	// What stands before the store: one of them, but for a server of its own.
	proxy *faultproxy.Proxy
	tcp   *faultproxy.TCP

	tls    *httptest.Server // before proxy; nil: none
	sshd   *testenv.SSHD    // behind tcp
	server server           // that is the case's own
}

// run makes a cell's outcome.
func (e *faultEnv) run(f fault, column column, attempt int) outcome {
	c := &faultCase{env: e, fault: f, attempt: attempt, want: column.want(f)}
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

// connect puts what the fault needs before the server at upstream, or before one
// that start begins, and returns where to reach it.
func (c *faultCase) connect(upstream string, start func() (server, string, error)) (scheme, address string, err error) {
	switch {
	case c.fault.alone:
		c.server, address, err = start()
		if err == nil {
			c.closeServer()
		}
		return "http", address, err
	case c.fault.line:
		if c.tcp, err = faultproxy.NewTCP(upstream); err != nil {
			return "", "", err
		}
		c.close = append(c.close, c.tcp.Close)
		return "http", c.tcp.Addr(), nil
	}
	if c.proxy, err = faultproxy.New("http://" + upstream); err != nil {
		return "", "", err
	}
	c.close = append(c.close, c.proxy.Close)
	if !c.fault.tls {
		return "http", c.proxy.Addr(), nil
	}
	c.tls = httptest.NewUnstartedServer(c.proxy)
	c.tls.Config.ErrorLog = log.New(io.Discard, "", 0)
	c.tls.StartTLS()
	c.close = append(c.close, c.tls.Close)
	return "https", c.tls.Listener.Addr().String(), nil
}

// closeServer has the case's own server closed in the end.
func (c *faultCase) closeServer() { c.close = append(c.close, c.server.Kill) }

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
	_, address, err := c.connect(c.env.registry, func() (server, string, error) {
		r, err := c.env.startRegistry()
		if err != nil {
			return nil, "", err
		}
		return r, r.Address, nil
	})
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
	scheme, address, err := c.connect(c.env.web, func() (server, string, error) {
		n, err := c.env.startWeb()
		if err != nil {
			return nil, "", err
		}
		return n, n.Address, nil
	})
	if err != nil {
		return nil, err
	}
	return httpstore.New(scheme+"://"+address+"/"+looseStore, httpstore.Options{Transport: c.transport(), Stall: c.stall()})
}

func (c *faultCase) ssh() (chunkstore.Store, error)  { return c.overSSH("ssh") }
func (c *faultCase) sftp() (chunkstore.Store, error) { return c.overSSH("sftp") }

// overSSH is the SSH server behind the proxy.
func (c *faultCase) overSSH(scheme string) (chunkstore.Store, error) {
	c.logins = true
	c.sshd = c.env.sshd
	if c.fault.alone {
		var err error
		if c.sshd, err = c.env.startSSH(); err != nil {
			return nil, err
		}
		c.server = c.sshd
		c.closeServer()
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
	if took := time.Since(began); took > deadline+10*time.Second {
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

// before reads a chunk before the fault. Like what is read after it, it has the
// time of the product.
func (r *faultReader) before(i int) {
	if err := r.within(mount.DefaultReadTimeout, i); err != nil {
		r.c.bad("before the fault: %v", err)
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
	r.before(warm)
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
	r.before(warm)
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
	r.before(warm)
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
	patience := 2 * time.Minute
	if c.want == goesOn {
		patience = c.deadline() / 2 // a fetch for nobody in particular ends by itself after 30 s
	}
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
	case <-time.After(patience):
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
