package e2e

import (
	"bufio"
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
)

// endurance is how long containers read on, and what happens to them.
type endurance struct {
	lasts     time.Duration
	token     time.Duration // lifetime of a token
	url       time.Duration // lifetime of a signed URL
	flap      time.Duration // from one loss of the network to the next
	lost      time.Duration // how long it is lost
	pause     time.Duration // between two reads of a container
	mayGrowBy float64       // part of its memory that a boot may gain from the second quarter to the last
}

var (
	shortEndurance = endurance{
		lasts: 20 * time.Second, token: 2 * time.Second, url: 3 * time.Second,
		flap: 4 * time.Second, lost: time.Second, pause: 40 * time.Millisecond, mayGrowBy: math.Inf(1), // it has not filled its memory yet
	}
	longEndurance = endurance{
		lasts: 20 * time.Minute, token: time.Minute, url: 90 * time.Second,
		flap: 30 * time.Second, lost: 5 * time.Second, pause: 80 * time.Millisecond, mayGrowBy: 0.05,
	}
)

// mostMemory is what docs/running.md says that boot takes at most, in bytes.
const mostMemory = 52 << 20

// mostThreads is what docs/fidelity.md says that boot has at most. One that a busy
// machine made necessary stays.
const mostThreads = 20

// usage is what a boot has at a moment.
type usage struct {
	memory      int64 // bytes that are its own
	descriptors int64
	threads     int64
	goroutines  int64
}

// enduring is a container of TestEndurance.
type enduring struct {
	id      string
	pid     int // of boot
	metrics http.Client
	seen    []usage
}

// startEnduring starts a container whose boot serves metrics at a socket in the
// directory metrics.
func startEnduring(t *testing.T, metrics, name string, args ...string) *enduring {
	t.Helper()
	c := &enduring{id: startWith(t, []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--network", w.hostNetwork}, append([]string{
		"--volume", metrics + ":/metrics", "--env", "BOOTFS_METRICS=unix:/metrics/" + name}, args...)...)}
	c.pid = pidOf(t, c.id)
	c.metrics.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(metrics, name))
	}}
	return c
}

// look notes what boot has now.
func (c *enduring) look(t *testing.T) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/", c.pid)
	f, err := os.Open(dir + "smaps_rollup")
	if err != nil {
		logs := docker(t, "logs", c.id)
		t.Fatalf("%v; container %s: %s\n%s%s", err, c.id, docker(t, "inspect", "--format", "{{json .State}}", c.id).stdout, logs.stdout, logs.stderr)
	}
	defer f.Close()
	u := usage{memory: -1}
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "Anonymous:"); ok {
			kB, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(v, "kB")), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			u.memory = kB << 10
		}
	}
	if u.memory < 0 {
		t.Fatal("smaps_rollup has no line Anonymous")
	}
	for name, n := range map[string]*int64{"fd": &u.descriptors, "task": &u.threads} {
		entries, err := os.ReadDir(dir + name)
		if err != nil {
			t.Fatal(err)
		}
		*n = int64(len(entries))
	}
	eventually(t, "boot's metrics", func() bool {
		values, err := scrape(&c.metrics)
		u.goroutines = int64(values["go_goroutines"])
		return err == nil && u.goroutines > 0
	})
	c.seen = append(c.seen, u)
}

// byQuarter returns one value for each quarter of the time: that at place (0 is the
// least, 1 the most) among those of the quarter.
func (c *enduring) byQuarter(place float64, of func(usage) int64) (quarters [4]int64) {
	for i := range quarters {
		var all []int64
		for _, u := range c.seen[i*len(c.seen)/4 : (i+1)*len(c.seen)/4] {
			all = append(all, of(u))
		}
		slices.Sort(all)
		quarters[i] = all[int(place*float64(len(all)-1))]
	}
	return quarters
}

// judge wants that boot has in the last quarter of the time what it had in the
// second, in which it has filled its memory.
func (c *enduring) judge(t *testing.T, mayGrowBy float64) (report string) {
	t.Helper()
	memory := c.byQuarter(0.5, func(u usage) int64 { return u.memory })
	grown := float64(memory[3])/float64(memory[1]) - 1
	report = fmt.Sprintf("memory %d bytes, from the second quarter to the last %+.1f %%", memory, grown*100)
	if grown > mayGrowBy {
		t.Errorf("boot's memory has grown by %.1f %%, by quarters of the time in bytes: %d", grown*100, memory)
	}
	if most := slices.MaxFunc(c.seen, func(a, b usage) int { return cmp.Compare(a.memory, b.memory) }).memory; most > mostMemory {
		t.Errorf("boot's memory was %d MB at most", most>>20)
	}
	for _, what := range []struct {
		name string
		of   func(usage) int64
		any  int64 // how many may come any time
	}{
		{"descriptors", func(u usage) int64 { return u.descriptors }, 0},
		{"threads", func(u usage) int64 { return u.threads }, mostThreads},
		{"goroutines", func(u usage) int64 { return u.goroutines }, 0},
	} {
		// What each loss of the network leaves behind is always there, what is under
		// way after one is not.
		n := c.byQuarter(0, what.of)
		report += fmt.Sprintf("; %s %d", what.name, n)
		if n[3] > max(n[1]+n[1]/4+2, what.any) {
			t.Errorf("%s by quarters of the time: %d", what.name, n)
		}
	}
	return report
}

// TestEndurance lets containers read files that are not at hand, from a registry
// whose tokens and signed URLs die soon, over a network that is lost again and
// again. No read fails, and boot has in the end what it had when it was warm.
func TestEndurance(t *testing.T) {
	const containers = 8
	e := shortEndurance
	if inLongForm(t) {
		e = longEndurance
	}
	proxy, err := faultproxy.New("http://" + w.registry.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	// The registry and where it redirects to, on a network that can be lost.
	var network []*faultproxy.TCP
	for _, upstream := range []string{proxy.Addr(), proxy.Other()} {
		p, err := faultproxy.NewTCP(upstream)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Close)
		network = append(network, p)
	}
	source, image := w.registry.Address+"/endurance:source", network[0].Addr()+"/endurance:converted"
	dataImage(t, source, 32<<20)
	convertAndPull(t, source, image)

	signs := []faultproxy.Fault{faultproxy.Sign(network[1].Addr(), e.url, false), faultproxy.Sign(network[1].Addr(), e.url, true)}
	turn := make(chan int, 1)
	turn <- 0
	proxy.Set(func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		n := <-turn
		turn <- n + 1
		signs[n%2](w, r, pass)
	})
	proxy.RequireTokenFor(tableUser, tablePassword, e.token, http.StatusUnauthorized)

	secrets := t.TempDir()
	login := fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, network[0].Addr(), base64.StdEncoding.EncodeToString([]byte(tableUser+":"+tablePassword)))
	if err := os.WriteFile(filepath.Join(secrets, "config.json"), login, 0o600); err != nil {
		t.Fatal(err)
	}
	metrics := t.TempDir()
	var all []*enduring
	for i := range containers {
		all = append(all, startEnduring(t, metrics, fmt.Sprint(i), "--volume", secrets+":/.bootfs/secrets:ro", "--tmpfs", "/.bootfs/rw:size=8m",
			"--env", "BOOTFS_PREFETCH=none", image, "testapp", "churn", "/data", e.pause.String()))
	}

	began := time.Now()
	healed := began.Add(-e.lost)
	flaps, requests := 0, 0
	for time.Since(began) < e.lasts {
		if time.Since(healed) > e.flap-e.lost {
			for _, p := range network {
				if flaps%2 == 0 {
					p.Hold(true)
				} else if err := p.Refuse(true); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(e.lost)
			for _, p := range network {
				if flaps%2 == 0 {
					p.Hold(false)
					continue
				}
				if err := p.Refuse(false); err != nil {
					t.Fatal(err)
				}
			}
			flaps, healed = flaps+1, time.Now()
		}
		time.Sleep(min(time.Second, e.lasts/50))
		requests += len(proxy.Log())
		proxy.ClearLog()
		for _, c := range all {
			c.look(t)
		}
	}
	t.Logf("%d losses of the network, %d tokens, %d requests", flaps, proxy.TokensIssued(), requests)
	if proxy.TokensIssued() <= containers {
		t.Errorf("%d tokens were given: none has expired", proxy.TokensIssued())
	}

	for i, c := range all {
		t.Run(fmt.Sprint("container ", i), func(t *testing.T) {
			report := c.judge(t, e.mayGrowBy)
			if r := docker(t, "kill", "--signal", "TERM", c.id); r.code != 0 {
				t.Error(r.stderr)
			}
			code := strings.TrimSpace(docker(t, "wait", c.id).stdout)
			logs := docker(t, "logs", c.id)
			reads, err := strconv.Atoi(strings.TrimSpace(logs.stdout))
			if code != "0" || err != nil || reads < 10 {
				t.Errorf("exit %s, stdout %q, stderr:\n%s", code, logs.stdout, logs.stderr)
			}
			t.Logf("%d reads; %s", reads, report)
		})
	}
}
