package nodecache_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/lazy"
)

// What a process of TestManyProcesses is told.
const (
	manyIndex = "BOOTFS_TEST_MANY_INDEX" // path of the index; empty: this is the test itself
	manyCache = "BOOTFS_TEST_MANY_CACHE" // directory
	manyLimit = "BOOTFS_TEST_MANY_LIMIT" // of the cache, bytes
	manyStore = "BOOTFS_TEST_MANY_STORE" // URL
)

// readAsBoot does with an image what boot does: it fetches it ahead, and reads it
// in an order of its own meanwhile. It prints the digest of what it has read.
func readAsBoot() error {
	raw, err := os.ReadFile(os.Getenv(manyIndex))
	if err != nil {
		return err
	}
	x, err := index.Open(raw)
	if err != nil {
		return err
	}
	limit, err := strconv.ParseInt(os.Getenv(manyLimit), 10, 64)
	if err != nil {
		return err
	}
	cache, err := nodecache.Open(os.Getenv(manyCache), nodecache.Options{Limit: limit})
	if err != nil {
		return err
	}
	defer cache.Close()
	store, err := httpstore.New(os.Getenv(manyStore), httpstore.Options{})
	if err != nil {
		return err
	}
	fetcher := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: x.Digest(), Cache: cache, Stores: []chunkstore.Store{store}})
	defer fetcher.Close()
	image := lazy.New(x, fetcher, lazy.Options{Memory: 256 << 10})

	var ahead sync.WaitGroup
	ahead.Go(func() {
		image.Prefetch(context.Background(), func(yield func(int) bool) {
			for i := 0; i < x.Len() && yield(i); i++ {
			}
		})
	})
	got := make([]byte, x.Size())
	const piece = 100_000
	pieces := rand.Perm(len(got)/piece + 1)
	failed := make(chan error, 2)
	for half := range slices.Chunk(pieces, len(pieces)/2+1) {
		ahead.Go(func() {
			for _, i := range half {
				from, to := i*piece, min(len(got), (i+1)*piece)
				if _, err := image.ReadAt(context.Background(), got[from:to], int64(from)); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	ahead.Wait()
	select {
	case err := <-failed:
		return err
	default:
	}
	fmt.Printf("read %x\n", sha256.Sum256(got))
	return nil
}

// web is a web server with the chunks of an image on a narrow line.
type web struct {
	*httptest.Server
	frames map[string][]byte // by path

	mu      sync.Mutex // guards what follows
	free    time.Time  // when the line has sent what it was given
	fetched map[string]int
}

const bytesPerSecond = 4 << 20

func (s *web) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	frame := s.frames[r.URL.Path]
	if frame == nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	s.mu.Lock()
	s.fetched[r.URL.Path]++
	if now := time.Now(); s.free.Before(now) {
		s.free = now
	}
	s.free = s.free.Add(time.Duration(len(frame)) * time.Second / bytesPerSecond)
	free := s.free
	s.mu.Unlock()
	time.Sleep(time.Until(free))
	w.Write(frame)
}

// counts returns how many chunks were asked for, and how often.
func (s *web) counts() (different, times int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.fetched {
		times += n
	}
	return len(s.fetched), times
}

// imageOnWeb makes an image of chunks, and a server that has them. It returns the
// image's digest and the bytes that a cache takes for it.
func imageOnWeb(t *testing.T, file string, chunks int) (s *web, digest string, stored int64) {
	t.Helper()
	s = &web{frames: make(map[string][]byte)}
	random := rand.NewChaCha8([32]byte{7})
	sizes := rand.New(random)
	var b bytes.Buffer
	x := index.NewWriter(&b, chunker.Params{Min: 1, Avg: 32 << 10, Max: 128 << 10}, index.SHA256)
	all := sha256.New()
	for range chunks {
		plain := make([]byte, 1+sizes.IntN(64<<10))
		random.Read(plain)
		all.Write(plain)
		id := index.SHA256.Sum(plain)
		if err := x.Append(id, len(plain)); err != nil {
			t.Fatal(err)
		}
		dir, name := chunkstore.Place(id)
		frame := chunkstore.Encode(nil, plain)
		s.frames["/"+dir+"/"+name] = frame
		stored += (int64(len(frame)) + 4095) &^ 4095
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s, fmt.Sprintf("%x", all.Sum(nil)), stored
}

// manyDone says that the long form has been begun: once is enough for a soak test
// that runs all tests several times.
var manyDone atomic.Bool

// TestManyProcesses lets processes that are killed now and then read an image
// through one cold cache, while old chunks are evicted from it. Each of the others
// reads the right bytes. Where the cache has room for the image, they fetch little
// more than once what all of them need.
func TestManyProcesses(t *testing.T) {
	if os.Getenv(manyIndex) != "" {
		if err := readAsBoot(); err != nil {
			t.Fatal(err)
		}
		return
	}
	// Where others are starved of the processor for seconds, a process waits for
	// them no longer: a bound for any machine is twice.
	processes, kills, rounds, chunks, most := 6, 1, 1, 100, 2.0
	if os.Getenv("BOOTFS_SOAK") != "" && !manyDone.Swap(true) {
		processes, kills, rounds, chunks, most = 32, 4, 20, 400, 1.2
	}
	file := filepath.Join(t.TempDir(), "index")
	s, digest, stored := imageOnWeb(t, file, chunks)
	for _, test := range []struct {
		name  string
		limit int64
		env   string
		once  bool
	}{
		{"room for all", 40 * stored, "", false},
		{"GOMAXPROCS=1", 40 * stored, "GOMAXPROCS=1", true},
		{"room for half", stored / 2, "", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			for i := range rounds {
				if test.once && i > 0 {
					break
				}
				dir := t.TempDir()
				storetest.FillWithOld(t, dir, test.limit*94/100, 256<<10) // less than is evicted at
				env := append(os.Environ(), manyIndex+"="+file, manyCache+"="+dir, manyStore+"="+s.URL, fmt.Sprintf("%s=%d", manyLimit, test.limit), test.env)
				s.read(t, processes, kills, digest, env)
				different, times := s.counts()
				t.Logf("round %d: %d chunks of %d, fetched %d times: %.3f", i+1, different, chunks, times, float64(times)/float64(chunks))
				if test.limit > stored && (different != chunks || float64(times) > most*float64(chunks)) {
					t.Errorf("%d chunks of %d were fetched, %d times; want at most %.1f times each", different, chunks, times, most)
				}
			}
		})
	}
}

// read has n processes read the image, kills some of them while they do, and looks
// at what the others have read.
func (s *web) read(t *testing.T, n, kills int, digest string, env []string) {
	t.Helper()
	s.mu.Lock()
	s.fetched = make(map[string]int)
	s.mu.Unlock()
	cmds, outs := make([]*exec.Cmd, n), make([]bytes.Buffer, n)
	for i := range cmds {
		cmds[i] = exec.Command(os.Args[0], "-test.run", "^TestManyProcesses$", "-test.v", "-test.timeout", "10m")
		cmds[i].Env, cmds[i].Stdout, cmds[i].Stderr = env, &outs[i], &outs[i]
		if err := cmds[i].Start(); err != nil {
			t.Fatal(err)
		}
	}
	moments := make([]float64, kills)
	for i := range moments {
		moments[i] = rand.Float64() * 0.9
	}
	slices.Sort(moments)
	victims := rand.Perm(n)[:kills]
	for i, v := range victims {
		for {
			if _, times := s.counts(); float64(times) >= moments[i]*float64(len(s.frames)) {
				break
			}
			time.Sleep(time.Millisecond)
		}
		cmds[v].Process.Kill() // it may have ended
	}
	for i, cmd := range cmds {
		err := cmd.Wait()
		out := outs[i].String()
		if slices.Contains(victims, i) {
			continue
		}
		if err != nil || !strings.Contains(out, "read "+digest+"\n") {
			t.Errorf("process %d: %v, want the digest %s\n%s", i, err, digest, out)
		}
	}
}
