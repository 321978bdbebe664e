package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
)

// treeDigest prints a digest of the image's tree: names, modes, owners, times,
// links and contents.
const treeDigest = `cd / && find bin data home opt root srv usr var vol >/tmp/names && sort /tmp/names >/tmp/sorted &&
{ tr '\n' '\0' </tmp/sorted | xargs -0 stat -c '%N %f %u %g %Y' && find data bin opt vol -type f -print0 | sort -z | xargs -0 sha256sum; } >/tmp/tree && sha256sum </tmp/tree`

// A line is a narrow way to a registry that counts the chunks which cross it.
type line struct {
	bytesPerSecond int64
	packs          map[string][]stretch // by digest, in the order of their places
	unique         int                  // chunks in all packs
	bytes          int64                // of them

	mu      sync.Mutex // guards what follows
	free    time.Time  // when it has sent what it was given
	crossed map[index.ID]int
	sent    int64 // bytes of packs
}

// A stretch is where a chunk lies in a pack.
type stretch struct {
	from, to int64
	id       index.ID
}

// newLine returns a line that knows the packs of the converted image at ref.
func newLine(t *testing.T, ref string, bytesPerSecond int64) *line {
	t.Helper()
	l := &line{bytesPerSecond: bytesPerSecond, packs: make(map[string][]stretch)}
	img := openImage(t, "docker://"+ref)
	chunks := make(map[index.ID]bool)
	for i := range img.Index.Len() {
		c, err := img.Index.At(i)
		if err != nil {
			t.Fatal(err)
		}
		at, err := img.Locators.At(i)
		if err != nil {
			t.Fatal(err)
		}
		if at.Length == 0 || chunks[c.ID] {
			continue
		}
		chunks[c.ID] = true
		p, err := img.Locators.Pack(at.Pack)
		if err != nil {
			t.Fatal(err)
		}
		l.packs[p.Digest] = append(l.packs[p.Digest], stretch{at.Offset, at.Offset + int64(at.Length), c.ID})
		l.unique++
		l.bytes += int64(at.Length)
	}
	for _, p := range l.packs {
		slices.SortFunc(p, func(a, b stretch) int { return int(a.from - b.from) })
	}
	return l
}

// clear forgets what has crossed.
func (l *line) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.crossed, l.sent = make(map[index.ID]int), 0
}

// progress is how many bytes have crossed as a part of those of all chunks.
func (l *line) progress() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return float64(l.sent) / float64(l.bytes)
}

// counts returns how many different chunks have crossed, and how often chunks
// have. One counts with its first byte: also when it is read to reach the next
// one, or by a boot that is killed and takes it with it.
func (l *line) counts() (different, times int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.crossed {
		times += n
	}
	return len(l.crossed), times, l.sent
}

// pass is a faultproxy.Fault.
func (l *line) pass(w http.ResponseWriter, r *http.Request, pass http.Handler) {
	_, digest, _ := strings.Cut(r.URL.Path, "/blobs/")
	if pack := l.packs[digest]; r.Method == http.MethodGet && pack != nil {
		w = &lineWriter{ResponseWriter: w, line: l, pack: pack, at: -1}
	}
	pass.ServeHTTP(w, r)
}

// send waits until n bytes starting at from of pack have crossed, and returns
// what of pack comes after them.
func (l *line) send(pack []stretch, from int64, n int) []stretch {
	l.mu.Lock()
	l.free = slices.MaxFunc([]time.Time{l.free, time.Now()}, time.Time.Compare).Add(time.Duration(n) * time.Second / time.Duration(l.bytesPerSecond))
	free := l.free
	l.sent += int64(n)
	for len(pack) > 0 && pack[0].from < from+int64(n) {
		l.crossed[pack[0].id]++
		pack = pack[1:]
	}
	l.mu.Unlock()
	time.Sleep(time.Until(free))
	return pack
}

// A lineWriter is one answer with a part of a pack.
type lineWriter struct {
	http.ResponseWriter
	line *line
	pack []stretch // what has not crossed
	at   int64     // place in the pack; -1: nothing has crossed
}

func (w *lineWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *lineWriter) Write(b []byte) (int, error) {
	if w.at < 0 {
		w.at = 0
		var last, size int64
		if h := w.Header().Get("Content-Range"); h != "" {
			if _, err := fmt.Sscanf(h, "bytes %d-%d/%d", &w.at, &last, &size); err != nil {
				return 0, err
			}
		}
		w.pack = w.pack[sort.Search(len(w.pack), func(i int) bool { return w.pack[i].to > w.at }):]
	}
	w.pack = w.line.send(w.pack, w.at, len(b))
	n, err := w.ResponseWriter.Write(b)
	w.at += int64(n)
	return n, err
}

// fleet is the boots that share a cache.
type fleet struct {
	line   *line
	image  string
	digest string // what treeDigest prints in the source image
	kills  int    // of a round
	boots  int
}

// round starts containers on a cache in which there are only old chunks of others,
// kills some of them while chunks cross the line, and looks at what the rest have
// seen. The cache may have limit bytes, and is evicted from meanwhile, by each
// boot and from outside. It returns what the boots that were not killed say, as
// metrics.
func (c *fleet) round(t *testing.T, limit int64, env ...string) (told []map[string]float64) {
	t.Helper()
	c.line.clear()
	out, dir := t.TempDir(), t.TempDir()
	// Nobody waits for neighbours whose disk takes seconds for a write, as that of a
	// machine can on which other tests run: here the cache has none.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	prey := storetest.FillWithOld(t, dir, limit*94/100, 4<<20) // less than is evicted at
	ids := make([]string, c.boots)
	victims := rand.Perm(c.boots)[:c.kills]
	var create, start errgroup.Group
	create.SetLimit(4)
	for i := range ids {
		create.Go(func() error {
			args := []string{"create", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--network", w.hostNetwork,
				"--volume", dir + ":/.bootfs/rootfs.castr", "--env", fmt.Sprintf("BOOTFS_CACHE_SIZE=%d", limit),
				"--volume", out + ":/out", "--env", fmt.Sprintf("BOOTFS_METRICS=unix:/out/%d.sock", i)}
			for _, v := range env {
				args = append(args, "--env", v)
			}
			script := fmt.Sprintf("{ %s; } >/out/%d && >/out/%[2]d.done && until [ -e /out/%[2]d.seen ]; do sleep 0.1; done", treeDigest, i)
			if slices.Contains(victims, i) { // it does not end before its turn
				script = "while :; do { " + treeDigest + "; } >/dev/null; done"
			}
			id, err := w.docker.Output(t.Context(), append(args, c.image, "sh", "-c", script)...)
			ids[i] = strings.TrimSpace(id)
			return err
		})
	}
	if err := create.Wait(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if r := docker(t, append([]string{"rm", "--force", "--volumes"}, ids...)...); r.code != 0 {
			t.Errorf("docker rm: %s", r.stderr)
		}
	}()

	done, stop := context.WithCancel(t.Context())
	defer stop()
	var beside errgroup.Group
	beside.Go(func() error { return evictUntil(done, dir, limit) })
	beside.Go(func() error {
		moments := make([]float64, len(victims))
		for i := range moments {
			moments[i] = rand.Float64() * 0.7
		}
		slices.Sort(moments)
		for i, v := range victims {
			for done.Err() == nil {
				if c.line.progress() >= moments[i] {
					if _, err := w.docker.Output(done, "kill", "--signal", "KILL", ids[v]); err == nil {
						break
					} // else it has not begun yet
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		return nil
	})
	for some := range slices.Chunk(ids, 4) {
		start.Go(func() error {
			_, err := w.docker.Output(t.Context(), append([]string{"start"}, some...)...)
			return err
		})
	}
	if err := start.Wait(); err != nil {
		t.Fatal(err)
	}
	said := make([]map[string]float64, c.boots)
	for i := range ids {
		beside.Go(func() (err error) {
			said[i], err = lastWords(done, filepath.Join(out, fmt.Sprint(i)))
			return err
		})
	}
	r := docker(t, append([]string{"wait"}, ids...)...)
	stop()
	if err := beside.Wait(); err != nil {
		t.Error(err)
	}
	codes := strings.Fields(r.stdout)
	if len(codes) != c.boots {
		t.Fatalf("docker wait: %s%s", r.stdout, r.stderr)
	}
	for i, id := range ids {
		logs := docker(t, "logs", id)
		if strings.Contains(logs.stderr, "DATA RACE") {
			t.Errorf("container %d:\n%s", i, logs.stderr)
		}
		if slices.Contains(victims, i) {
			if codes[i] != "137" {
				t.Errorf("container %d, which was to be killed: exit %s\n%s", i, codes[i], logs.stderr)
			}
			continue
		}
		digest, err := os.ReadFile(filepath.Join(out, fmt.Sprint(i)))
		if codes[i] != "0" || err != nil || string(digest) != c.digest {
			t.Errorf("container %d: exit %s, tree %q, %v; want %q\n%s", i, codes[i], digest, err, c.digest, logs.stderr)
			continue
		}
		told = append(told, said[i])
	}
	if !slices.ContainsFunc(prey, func(file string) bool { _, err := os.Stat(file); return err != nil }) {
		t.Error("no old chunk was evicted")
	}
	return told
}

// lastWords waits until the program whose files have that name has done its work,
// returns what its boot says, and lets it end. It returns nothing if done is first.
func lastWords(done context.Context, name string) (map[string]float64, error) {
	for {
		if _, err := os.Stat(name + ".done"); err == nil {
			break
		}
		if done.Err() != nil {
			return nil, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", name+".sock")
	}}}
	values, err := scrape(&client)
	return values, errors.Join(err, os.WriteFile(name+".seen", nil, 0o644))
}

// evictUntil evicts from the cache in dir again and again until done.
func evictUntil(done context.Context, dir string, limit int64) error {
	cache, err := nodecache.Open(dir, nodecache.Options{Limit: limit})
	if err != nil {
		return err
	}
	defer cache.Close()
	for done.Err() == nil {
		if _, err := cache.Evict(done); err != nil && done.Err() == nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

// TestManyOnOneCache starts many containers at once on one cold cache, with an
// evictor that runs and with some of them killed. Each of the others sees the
// right tree. Where the cache has room for it, they fetch together little more
// than once what all of them need.
func TestManyOnOneCache(t *testing.T) {
	// Where others are starved of the processor for seconds, a boot waits for them
	// no longer: a bound for any machine is half of what they would fetch apart.
	c, rounds, most := &fleet{boots: 8, kills: 1}, 1, 4.0
	if inLongForm(t) {
		c.boots, c.kills, rounds, most = 32, 4, 20, 1.2
	}
	proxy, err := faultproxy.New("http://" + w.registry.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	source := w.registry.Address + "/many:source"
	c.image = proxy.Addr() + "/many:converted"
	dataImage(t, source, 24<<20)
	boot := w.boot
	if raced {
		boot = racedBoot(t)
	}
	convertAndPullWith(t, boot, source, c.image)
	c.line = newLine(t, c.image, 8<<20)
	proxy.Set(c.line.pass)
	r := docker(t, "run", "--rm", "--network", w.hostNetwork, source, "sh", "-c", treeDigest)
	if r.code != 0 {
		t.Fatal(r.stderr)
	}
	c.digest = r.stdout
	for _, test := range []struct {
		name   string
		rounds int
		limit  int64 // of the cache, bytes; a writer that looks for what others write knows it to 1/128
		env    []string
	}{
		{"room for all", rounds, 40 * c.line.bytes, nil},
		{"GOMAXPROCS=1", 1, 40 * c.line.bytes, []string{"GOMAXPROCS=1"}},
		{"room for half", 1, c.line.bytes / 2, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			for i := range test.rounds {
				began := time.Now()
				told := c.round(t, test.limit, test.env...)
				different, times, sent := c.line.counts()
				t.Logf("round %d, %.1f s: %d chunks of %d, fetched %d times: %.3f; %d kB for %d kB: %.3f; %s", i+1, time.Since(began).Seconds(),
					different, c.line.unique, times, float64(times)/float64(c.line.unique), sent/1000, c.line.bytes/1000, float64(sent)/float64(c.line.bytes), summary(told))
				if test.limit > c.line.bytes && (different != c.line.unique || float64(times) > most*float64(c.line.unique)) {
					t.Errorf("%d chunks of %d were fetched, %d times; want at most %.1f times each", different, c.line.unique, times, most)
				}
			}
		})
	}
}

// racedBoot builds boot with the race detector, which needs C; without libraries, as
// there are none before boot.
func racedBoot(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "bootfs-boot")
	cmd := exec.Command("go", "build", "-race", "-tags", "netgo,osusergo", "-ldflags", "-linkmode external -extldflags -static", "-o", out, "../../cmd/bootfs-boot")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build boot with the race detector: %v\n%s", err, msg)
	}
	return out
}

// summary adds up what boots say of their chunks.
func summary(told []map[string]float64) string {
	sum := func(name string) (n float64) {
		for _, values := range told {
			n += values[name]
		}
		return n
	}
	return fmt.Sprintf("%d boots took %.0f chunks from the registry and %.0f from others, asked for %.0f twice, had %.0f failures and %.0f chunks not cached",
		len(told), sum("bootfs_store_chunks_total"), sum("bootfs_cache_shared_chunks_total"), sum("bootfs_store_hedges_total"),
		sum("bootfs_store_failures_total"), sum("bootfs_cache_dropped_chunks_total"))
}
