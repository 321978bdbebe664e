package e2e

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"math"
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
	warm      time.Duration // from the start on, in which boot may still grow
	token     time.Duration // lifetime of a token
	url       time.Duration // lifetime of a signed URL
	flap      time.Duration // from one loss of the network to the next
	lost      time.Duration // how long it is lost
	pause     time.Duration // between two reads of a container
	mayGrowBy float64       // part of its memory that a boot may gain between the first fifth and the last
}

var (
	shortEndurance = endurance{
		lasts: 20 * time.Second, warm: 4 * time.Second, token: 2 * time.Second, url: 3 * time.Second,
		flap: 4 * time.Second, lost: time.Second, pause: 40 * time.Millisecond, mayGrowBy: math.Inf(1), // it has not filled its memory yet
	}
	longEndurance = endurance{
		lasts: 20 * time.Minute, warm: 2 * time.Minute, token: time.Minute, url: 90 * time.Second,
		flap: 30 * time.Second, lost: 5 * time.Second, pause: 80 * time.Millisecond, mayGrowBy: 0.05,
	}
)

// mostMemory is what docs/running.md says that boot takes at most, in bytes.
const mostMemory = 52 << 20

// usage is what a boot has at a moment.
type usage struct {
	memory      int64 // bytes that are its own
	descriptors int
	threads     int
}

func usageOf(t *testing.T, id string, pid int) usage {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/", pid)
	f, err := os.Open(dir + "smaps_rollup")
	if err != nil {
		logs := docker(t, "logs", id)
		t.Fatalf("%v; container %s: %s\n%s%s", err, id, docker(t, "inspect", "--format", "{{json .State}}", id).stdout, logs.stdout, logs.stderr)
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
	for name, n := range map[string]*int{"fd": &u.descriptors, "task": &u.threads} {
		entries, err := os.ReadDir(dir + name)
		if err != nil {
			t.Fatal(err)
		}
		*n = len(entries)
	}
	return u
}

// median returns the middle one of what of has of us.
func median[T int | int64](us []usage, of func(usage) T) T {
	var all []T
	for _, u := range us {
		all = append(all, of(u))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// TestEndurance lets containers read files that are not at hand, from a registry
// whose tokens and signed URLs die soon, over a network that is lost again and
// again. No read fails, and boot has in the end what it had in the beginning.
func TestEndurance(t *testing.T) {
	const containers = 8
	e := shortEndurance
	if soak {
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
	var ids []string
	var pids []int
	for range containers {
		id := startWith(t, []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--network", w.hostNetwork},
			"--volume", secrets+":/.bootfs/secrets:ro", "--tmpfs", "/.bootfs/rw:size=8m", "--env", "BOOTFS_PREFETCH=none", image, "testapp", "churn", "/data", e.pause.String())
		ids, pids = append(ids, id), append(pids, pidOf(t, id))
	}

	began := time.Now()
	healed := began.Add(-e.lost)
	flaps, requests := 0, 0
	seen := make([][]usage, containers)
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
				within(t, e.flap, "the proxy has its port again", func() bool { return p.Refuse(false) == nil })
			}
			flaps, healed = flaps+1, time.Now()
		}
		time.Sleep(min(time.Second, e.lasts/50))
		requests += len(proxy.Log())
		proxy.ClearLog()
		if time.Since(began) < e.warm {
			continue
		}
		for i, pid := range pids {
			seen[i] = append(seen[i], usageOf(t, ids[i], pid))
		}
	}
	t.Logf("%d losses of the network, %d tokens, %d requests", flaps, proxy.TokensIssued(), requests)
	if proxy.TokensIssued() <= containers {
		t.Errorf("%d tokens were given: none has expired", proxy.TokensIssued())
	}

	for i, id := range ids {
		if r := docker(t, "kill", "--signal", "TERM", id); r.code != 0 {
			t.Errorf("container %d: %s", i, r.stderr)
		}
		code := strings.TrimSpace(docker(t, "wait", id).stdout)
		logs := docker(t, "logs", id)
		reads, err := strconv.Atoi(strings.TrimSpace(logs.stdout))
		if code != "0" || err != nil || reads < 10 {
			t.Errorf("container %d: exit %s, stdout %q, stderr:\n%s", i, code, logs.stdout, logs.stderr)
		}

		fifth := max(1, len(seen[i])/5)
		first, last := seen[i][:fifth], seen[i][len(seen[i])-fifth:]
		memory := func(u usage) int64 { return u.memory }
		descriptors := func(u usage) int { return u.descriptors }
		threads := func(u usage) int { return u.threads }
		grown := float64(median(last, memory))/float64(median(first, memory)) - 1
		t.Logf("container %d: %d reads; memory %.1f MB, then %.1f MB: %+.1f %%; descriptors %d, then %d; threads %d, then %d", i, reads,
			float64(median(first, memory))/1e6, float64(median(last, memory))/1e6, grown*100,
			median(first, descriptors), median(last, descriptors), median(first, threads), median(last, threads))
		if most := slices.MaxFunc(seen[i], func(a, b usage) int { return int(a.memory - b.memory) }).memory; grown > e.mayGrowBy || most > mostMemory {
			t.Errorf("container %d: boot's memory has grown by %.1f %%, and was %d MB at most", i, grown*100, most>>20)
		}
		if before, after := median(first, descriptors), median(last, descriptors); after > before+before/4 {
			t.Errorf("container %d: %d descriptors, then %d", i, before, after)
		}
	}
}
