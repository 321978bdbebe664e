package e2e

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/httpstore"
	"github.com/container-bootfs/bootfs/chunkstore/local"
	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/converted"
	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/testenv"
	"github.com/container-bootfs/bootfs/mount"
	"github.com/container-bootfs/bootfs/registrystore"
)

// Damages that TestDamages does in all.
const (
	fewDamages  = 500
	manyDamages = 10_000 // with BOOTFS_SOAK
)

// damageEnv is an image whose files are known, with its chunks in a store of
// every kind.
type damageEnv struct {
	ref    string // of the converted image, with its chunks in packs
	image  *converted.Image
	files  map[string][]byte     // by path, without a slash in front
	holds  map[string][]index.ID // the chunks of each file
	chunks map[index.ID]index.Chunk
	frames map[index.ID][]byte // the stored form of each
	at     map[index.ID]int    // a position in the index
	names  []index.ID          // those of them that files have, sorted
	equals map[int][]index.ID  // by length of the stored form
	packs  map[v1.Hash]string  // the registry's files
	master *local.Store        // all chunks, never damaged
	sshd   *testenv.SSHD
	web    *testenv.Nginx
	loose  string // directory of single chunks on the web server
	remote string // directory of single chunks on the SSH server
	cache  string // a node cache with all chunks
}

const dataRepository = "damages"

// dataFiles are the files of the image: as chunks of one length and of many, in
// files of one chunk, of several, and several files to a chunk.
func dataFiles() map[string][]byte {
	rng := rand.New(rand.NewPCG(5, 0))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	text := func(n int) []byte {
		var b bytes.Buffer
		for b.Len() < n {
			fmt.Fprintf(&b, "line %d of a file that compresses\n", rng.Uint32())
		}
		return b.Bytes()[:n]
	}
	files := make(map[string][]byte)
	add := func(kind string, n int, make func() []byte) {
		for i := range n {
			files[fmt.Sprintf("data/%s/%d", kind, i)] = make()
		}
	}
	add("equal", 100, func() []byte { return noise(40 << 10) })
	add("large", 40, func() []byte { return noise(33<<10 + rng.IntN(250<<10)) })
	add("text", 40, func() []byte { return text(33<<10 + rng.IntN(250<<10)) })
	add("small", 200, func() []byte { return noise(100 + rng.IntN(20<<10)) })
	files["data/zero"] = make([]byte, 300<<10)
	files["data/empty"] = nil
	return files
}

// damageImage pushes the small image with dataFiles and converts it; args are
// more options of bootfs-convert, and the last is the destination.
func damageImage(t *testing.T, args ...string) {
	t.Helper()
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.SmallImage(t.Context(), "damages", v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	source := w.registry.Address + "/" + dataRepository + ":source"
	if err := testenv.Push(t.Context(), layout, source); err != nil {
		t.Fatal(err)
	}
	addFiles(t, source, dataFiles())
	last := len(args) - 1
	args = append(append([]string{"--boot", w.boot}, args[:last]...), source, args[last])
	if out, err := w.command(args...).CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
}

func newDamageEnv(t *testing.T) *damageEnv {
	t.Helper()
	e := &damageEnv{
		ref:   w.registry.Address + "/" + dataRepository + ":packs",
		files: dataFiles(), holds: make(map[string][]index.ID), chunks: make(map[index.ID]index.Chunk),
		frames: make(map[index.ID][]byte), at: make(map[index.ID]int), equals: make(map[int][]index.ID), packs: make(map[v1.Hash]string),
	}
	site, err := os.ReadFile("../../samples/http/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	if e.web, err = testenv.StartNginx(t.Context(), filepath.Join(t.TempDir(), "nginx"), string(site), nil); err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, e.web)
	if e.sshd, err = testenv.StartSSHD(t.Context(), t.TempDir(), testenv.SSHDOptions{}); err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, e.sshd)
	master := t.TempDir()
	e.loose, e.remote, e.cache = filepath.Join(e.web.Root, looseStore), filepath.Join(e.sshd.Srv, looseStore), filepath.Join(memory(t), looseStore)
	damageImage(t, e.ref)
	damageImage(t, "--store", master, w.registry.Address+"/"+dataRepository+":loose")
	for _, dir := range []string{e.loose, e.remote, e.cache} {
		if err := os.CopyFS(dir, os.DirFS(master)); err != nil {
			t.Fatal(err)
		}
	}
	if e.master, err = local.Open(master); err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, e.master)

	e.image = openImage(t, "docker://"+e.ref)
	x := e.image.Index
	for i := range x.Len() {
		c, err := x.At(i)
		if err != nil {
			t.Fatal(err)
		}
		at, err := e.image.Locators.At(i)
		if err != nil {
			t.Fatal(err)
		}
		if at.Length == 0 {
			continue // zeros
		}
		e.chunks[c.ID], e.at[c.ID] = c, i
		if e.frames[c.ID], err = e.master.Get(t.Context(), c.ID, nil); err != nil {
			t.Fatal(err)
		}
	}
	root, err := converted.Tree(e.image.Meta, bytes.NewReader(nil))
	if err != nil {
		t.Fatal(err)
	}
	of := make(map[index.ID]bool)
	for file := range e.files {
		node := root.Root
		for _, name := range strings.Split(file, "/") {
			node = node.Entries[name]
		}
		for _, extent := range node.Content.Extents {
			for i := x.Find(extent.Physical); i < x.Len(); i++ {
				c, err := x.At(i)
				if err != nil {
					t.Fatal(err)
				}
				if c.Offset >= extent.Physical+extent.Length {
					break
				}
				if e.frames[c.ID] != nil {
					e.holds[file] = append(e.holds[file], c.ID)
					of[c.ID] = true
				}
			}
		}
	}
	e.names = slices.SortedFunc(maps.Keys(of), func(a, b index.ID) int { return bytes.Compare(a[:], b[:]) })
	for _, id := range e.names {
		n := len(e.frames[id])
		e.equals[n] = append(e.equals[n], id)
	}
	for _, hash := range packsOf(t, e.ref) {
		e.packs[hash] = blobFile(t, hash)
	}
	return e
}

// memory mounts a filesystem whose fsync costs nothing.
func memory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A damage is what becomes of the stored form of a chunk.
type damage int

const (
	flip1 damage = iota
	truncate
	zero
	swap
	swapEqual // with the bytes of one that is as long
	damageKinds
)

func (d damage) String() string {
	return [damageKinds]string{"flip", "truncate", "zero", "swap", "swap as long"}[d]
}

// spoil returns the stored form of chunk id with some damage, which it has so
// that no decoder finds its content, and counts it. An overlaid one keeps its
// length.
func (r *damageRound) spoil(rng *rand.Rand, id index.ID, overlaid bool) []byte {
	e := r.damageEnv
	for {
		b := bytes.Clone(e.frames[id])
		kind := damage(rng.IntN(int(damageKinds)))
		switch equal := e.equals[len(b)]; {
		case kind == flip1:
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
		case kind == truncate && !overlaid:
			b = b[:rng.IntN(len(b))]
		case kind == zero:
			from := rng.IntN(len(b))
			clear(b[from : from+1+rng.IntN(len(b)-from)])
		case kind == swapEqual && len(equal) > 1:
			copy(b, e.frames[equal[rng.IntN(len(equal))]])
		default:
			kind = swap
			other := e.frames[e.names[rng.IntN(len(e.names))]]
			if overlaid {
				copy(b, other)
			} else {
				b = bytes.Clone(other)
			}
		}
		// A bit may stand in a place that no decoder looks at.
		if _, err := chunkstore.Decode(nil, b, index.SHA256, e.chunks[id]); err != nil {
			r.done[kind].Add(1)
			return b
		}
	}
}

// damageRound is a root that is read while something is damaged.
type damageRound struct {
	*damageEnv
	t       *testing.T
	rng     *rand.Rand
	victims map[index.ID]bool
	log     lockedBuffer
	// What heals the damage, as far as reading does not.
	heal []func()
	// The stores, and the cache if any.
	stores []chunkstore.Store
	cached bool
	// Reads may fail: the only copies are damaged, or the network stops.
	only, stalls bool
	// done counts the damages by kind.
	done [damageKinds]atomic.Int64
	// count adds those to done that are known at the end only; may be nil.
	count   func()
	refused int // files
}

// pick makes n chunks of files victims.
func (r *damageRound) pick(n int) []index.ID {
	var picked []index.ID
	for _, i := range r.rng.Perm(len(r.names))[:n] {
		picked = append(picked, r.names[i])
		r.victims[r.names[i]] = true
	}
	return picked
}

// spoilFiles damages those chunks in a directory of single chunks.
func (r *damageRound) spoilFiles(dir string, ids []index.ID) {
	for _, id := range ids {
		shard, file := chunkstore.Place(id)
		file = filepath.Join(dir, shard, file)
		put := func(b []byte) {
			// A file of its own, as the server may have the old one open.
			if err := os.WriteFile(file+".new", b, 0o644); err != nil {
				r.t.Fatal(err)
			}
			if err := os.Rename(file+".new", file); err != nil {
				r.t.Fatal(err)
			}
		}
		put(r.spoil(r.rng, id, false))
		r.heal = append(r.heal, func() { put(r.frames[id]) })
	}
}

// inPacks finds chunk id in the registry's files.
func (r *damageRound) inPacks(id index.ID) (file string, at registrystore.Location) {
	at, err := r.image.Locators.At(r.at[id])
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := r.image.Locators.Pack(at.Pack)
	if err != nil {
		r.t.Fatal(err)
	}
	hash, err := v1.NewHash(p.Digest)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.packs[hash], at
}

// spoilPacks damages those chunks in the registry's storage.
func (r *damageRound) spoilPacks(ids []index.ID) {
	for _, id := range ids {
		file, at := r.inPacks(id)
		put := func(b []byte) {
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				r.t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(b, at.Offset); err != nil {
				r.t.Fatal(err)
			}
		}
		put(r.spoil(r.rng, id, true))
		r.heal = append(r.heal, func() { put(r.frames[id]) })
	}
}

// cutPack truncates a pack, a few chunks before its end.
func (r *damageRound) cutPack() {
	file, at := r.inPacks(r.names[r.rng.IntN(len(r.names))])
	pack, end := at.Pack, int64(0)
	whole, err := os.ReadFile(file)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, i := range r.rng.Perm(len(r.names)) {
		_, at := r.inPacks(r.names[i])
		if at.Pack == pack && (end == 0 || at.Offset >= int64(len(whole))-300<<10) {
			end = at.Offset
		}
	}
	for _, id := range r.names {
		if _, at := r.inPacks(id); at.Pack == pack && at.Offset >= end {
			r.victims[id] = true
		}
	}
	if err := os.Truncate(file, end); err != nil {
		r.t.Fatal(err)
	}
	r.heal = append(r.heal, func() {
		if err := os.WriteFile(file, whole, 0o644); err != nil {
			r.t.Fatal(err)
		}
	})
	r.done[truncate].Add(1)
}

// The stores.

func (r *damageRound) open(s chunkstore.Store, err error) {
	if err != nil {
		r.t.Fatal(err)
	}
	if c, ok := s.(io.Closer); ok {
		r.t.Cleanup(func() { c.Close() })
	}
	r.stores = append(r.stores, s)
}

func (r *damageRound) fromRegistry(address string) {
	blobs, err := registrystore.NewRemote("registry://"+address+"/"+dataRepository, registrystore.RemoteOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	r.open(registrystore.NewStore(blobs, r.image.Locators, r.image.Index), nil)
}

func (r *damageRound) fromDirectory(dir string) { r.open(local.Open(dir)) }

func (r *damageRound) fromWeb(address string) {
	r.open(httpstore.New("http://"+address+"/"+looseStore, httpstore.Options{}))
}

func (r *damageRound) fromSSH(scheme, address string) {
	_, key, _ := strings.Cut(r.sshd.HostKey, " ")
	r.open(sshstore.New(scheme+"://root@"+address+"/srv/"+looseStore, sshstore.Options{Keys: []string{r.sshd.Key}, HostKeys: []string{key}}))
}

// proxy puts a proxy before upstream that damages each of n chunks once, and
// returns its address. take finds the chunks that a request asks for, and where
// in its answer they are.
func (r *damageRound) proxy(upstream string, n int, take func(q *http.Request) map[index.ID]int) string {
	p, err := faultproxy.New("http://" + upstream)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(p.Close)
	var mu sync.Mutex // guards rng and left
	left := make(map[index.ID]bool)
	for _, id := range r.pick(n) {
		left[id] = true
	}
	rng := rand.New(rand.NewPCG(r.rng.Uint64(), 0))
	r.victims = nil // all are right in the store
	p.Set(faultproxy.Change(func(q *http.Request, body []byte) []byte {
		mu.Lock()
		defer mu.Unlock()
		asked := take(q)
		for _, id := range r.names {
			from, ok := asked[id]
			if to := from + len(r.frames[id]); ok && left[id] && to <= len(body) {
				delete(left, id)
				// One of an answer: who has asked for several asks again for each.
				b := r.spoil(rng, id, len(asked) > 1)
				return slices.Concat(body[:from], b, body[to:])
			}
		}
		return body
	}))
	return p.Addr()
}

// chunkOfPath is proxy's take for a web server.
func (r *damageRound) chunkOfPath(q *http.Request) map[index.ID]int {
	id, err := index.ParseID(strings.TrimSuffix(path.Base(q.URL.Path), chunkstore.Suffix))
	if err != nil {
		return nil
	}
	return map[index.ID]int{id: 0}
}

// chunksOfRange is proxy's take for a registry.
func (r *damageRound) chunksOfRange(q *http.Request) map[index.ID]int {
	var first, last int64
	if _, err := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
		return nil
	}
	asked := make(map[index.ID]int)
	for _, id := range r.names {
		file, at := r.inPacks(id)
		if strings.Contains(file, strings.TrimPrefix(path.Base(q.URL.Path), "sha256:")) && at.Offset >= first && at.Offset+int64(at.Length)-1 <= last {
			asked[id] = int(at.Offset - first)
		}
	}
	return asked
}

// A damagePlace is where chunks are damaged.
type damagePlace struct {
	name string
	n    int // chunks
	many int // chunks with BOOTFS_SOAK; 0: n, where reads are refused, which takes time
	do   func(r *damageRound, n int)
}

// inFlight is how many connections over SSH are damaged in a round: each ends,
// and is made anew.
const inFlight = 3

var damagePlaces = []damagePlace{
	{name: "cache before a registry", n: 60, many: 180, do: func(r *damageRound, n int) {
		r.fromRegistry(w.registry.Address)
		r.cached = true
		r.spoilFiles(r.cache, r.pick(n))
		r.heal = nil // by reading
	}},
	{name: "cache before a directory", n: 60, many: 180, do: func(r *damageRound, n int) {
		r.fromDirectory(r.master.String())
		r.cached = true
		r.spoilFiles(r.cache, r.pick(n))
		r.heal = nil
	}},
	{name: "cache before a web server", n: 60, many: 180, do: func(r *damageRound, n int) {
		r.fromWeb(r.web.Address)
		r.cached = true
		r.spoilFiles(r.cache, r.pick(n))
		r.heal = nil
	}},
	{name: "cache and only store", n: 30, do: func(r *damageRound, n int) {
		r.fromDirectory(r.loose)
		r.cached, r.only = true, true
		ids := r.pick(n)
		r.spoilFiles(r.cache, ids)
		r.heal = nil
		r.spoilFiles(r.loose, ids)
	}},
	{name: "pack", n: 50, do: func(r *damageRound, n int) {
		r.fromRegistry(w.registry.Address)
		r.only = true
		r.spoilPacks(r.pick(n))
	}},
	{name: "pack and a second store", n: 50, many: 150, do: func(r *damageRound, n int) {
		r.fromRegistry(w.registry.Address)
		r.fromDirectory(r.master.String())
		r.spoilPacks(r.pick(n))
	}},
	{name: "end of a pack", n: 1, do: func(r *damageRound, n int) {
		r.fromRegistry(w.registry.Address)
		r.only = true
		r.cutPack()
	}},
	{name: "directory", n: 50, do: func(r *damageRound, n int) {
		r.fromDirectory(r.loose)
		r.only = true
		r.spoilFiles(r.loose, r.pick(n))
	}},
	{name: "directory and a second store", n: 50, many: 150, do: func(r *damageRound, n int) {
		r.fromDirectory(r.loose)
		r.fromRegistry(w.registry.Address)
		r.spoilFiles(r.loose, r.pick(n))
	}},
	{name: "web server", n: 50, do: func(r *damageRound, n int) {
		r.fromWeb(r.web.Address)
		r.only = true
		r.spoilFiles(r.loose, r.pick(n))
	}},
	{name: "SFTP", n: 40, do: func(r *damageRound, n int) {
		r.fromSSH("sftp", r.sshd.Address)
		r.only = true
		r.spoilFiles(r.remote, r.pick(n))
	}},
	{name: "in flight from a registry", n: 50, many: 150, do: func(r *damageRound, n int) {
		r.fromRegistry(r.proxy(w.registry.Address, n, r.chunksOfRange))
	}},
	{name: "in flight from a web server", n: 50, many: 150, do: func(r *damageRound, n int) {
		r.fromWeb(r.proxy(r.web.Address, n, r.chunkOfPath))
	}},
	{name: "in flight over SSH", n: inFlight, do: func(r *damageRound, n int) {
		p, err := faultproxy.NewTCP(r.sshd.Address)
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(p.Close)
		r.fromSSH("ssh", p.Addr())
		r.stalls = true                       // where the byte is one of a packet's length
		p.Flip(n, 5000+r.rng.Int64N(200_000)) // behind what a login takes
		r.count = func() { r.done[flip1].Add(int64(n - p.Flips())) }
	}},
}

// TestDamages damages chunks in every place where they are, and reads a mounted
// root through the kernel meanwhile. No read gives wrong bytes, or fails while
// there is a good copy; a failure names its chunk. Afterwards the cache is good,
// and what failed can be read from the same open file once the store has been
// healed.
func TestDamages(t *testing.T) {
	e := newDamageEnv(t)
	want := fewDamages
	if soak {
		want = manyDamages
	}
	byPlace := make(map[string]*[damageKinds]int64)
	planned, refused := 0, 0
	for seed := uint64(1); planned < want; seed++ {
		for i, place := range damagePlaces {
			n := place.n
			if soak {
				n = cmp.Or(place.many, n)
			}
			planned += n
			t.Run(fmt.Sprintf("%s/seed %d", place.name, seed), func(t *testing.T) {
				r := &damageRound{damageEnv: e, t: t, rng: rand.New(rand.NewPCG(seed, uint64(i))), victims: make(map[index.ID]bool)}
				place.do(r, n)
				r.read()
				if r.count != nil {
					r.count()
				}
				if byPlace[place.name] == nil {
					byPlace[place.name] = new([damageKinds]int64)
				}
				for kind := range r.done {
					byPlace[place.name][kind] += r.done[kind].Load()
				}
				refused += r.refused
			})
			if t.Failed() {
				t.Fatalf("the places draw their damages from the seed: -run 'TestDamages/%s/seed_%d$' does them again", strings.ReplaceAll(place.name, " ", "_"), seed)
			}
		}
	}
	var all [damageKinds]int64
	line := func(place string, n [damageKinds]int64) {
		var sum int64
		var kinds []string
		for kind, k := range n {
			sum += k
			kinds = append(kinds, fmt.Sprintf("%d %s", k, damage(kind)))
		}
		t.Logf("%5d damages: %s (%s)", sum, place, strings.Join(kinds, ", "))
	}
	for _, place := range slices.Sorted(maps.Keys(byPlace)) {
		line(place, *byPlace[place])
		for kind, k := range byPlace[place] {
			all[kind] += k
		}
	}
	line("all places", all)
	t.Logf("0 wrong bytes, the cache was good after each round; %d files with no good copy were refused, and read once that was healed", refused)
}

// read reads all files and checks what must hold.
func (r *damageRound) read() {
	o := chunkstore.FetcherOptions{Digest: r.image.Index.Digest(), Stores: r.stores, Log: slog.New(slog.NewTextHandler(&r.log, nil))}
	if r.cached {
		cache, err := nodecache.Open(r.cache, nodecache.Options{Log: o.Log})
		if err != nil {
			r.t.Fatal(err)
		}
		defer cache.Close()
		o.Cache = cache
	}
	fetcher := chunkstore.NewFetcher(o)
	image := lazy.New(r.image.Index, fetcher, lazy.Options{})
	dir := r.t.TempDir()
	server, err := mount.Serve(dir, mount.Options{
		Meta: r.image.Meta, Image: &recorded{image, &r.log}, XattrClasses: r.image.Config.XattrClasses, Log: o.Log, Name: "damages",
	})
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() {
		if err := server.Close(); err != nil {
			r.t.Error(err)
		}
	}()
	var prefetch sync.WaitGroup
	ctx, stopPrefetch := context.WithCancel(r.t.Context())
	defer stopPrefetch()
	if r.rng.IntN(2) == 0 {
		prefetch.Go(func() {
			image.Prefetch(ctx, slices.Values(r.rng.Perm(r.image.Index.Len()))) // what it brings, the reads see
		})
	}
	failed := r.readFiles(dir)
	defer func() {
		for _, fd := range failed {
			unix.Close(fd)
		}
	}()
	r.refused = len(failed)
	said := r.log.String()
	for file := range failed {
		ours := slices.DeleteFunc(slices.Clone(r.holds[file]), func(id index.ID) bool { return !r.victims[id] })
		switch {
		case r.stalls:
		case !r.only:
			r.t.Errorf("%s: EIO, and there is a good copy of all its chunks", file)
		case len(ours) == 0:
			r.t.Errorf("%s: EIO, and none of its chunks was damaged", file)
		case !slices.ContainsFunc(ours, func(id index.ID) bool { return strings.Contains(said, id.String()) }):
			r.t.Errorf("%s: EIO, and the log names none of its damaged chunks", file)
		}
	}
	if r.only && len(failed) == 0 {
		r.t.Error("chunks without a good copy were damaged, and no read has failed")
	}
	for _, heal := range r.heal {
		heal()
	}
	stopPrefetch() // it pauses longer and longer before it tries again
	prefetch.Wait()
	for file, fd := range failed {
		got := make([]byte, len(r.files[file]))
		if err := readAt(fd, got, 0); err != nil {
			r.t.Errorf("%s, after the store was healed: %v", file, err)
		} else if !bytes.Equal(got, r.files[file]) {
			r.t.Errorf("%s, after the store was healed: wrong bytes", file)
		}
	}
	if err := fetcher.Close(); err != nil {
		r.t.Error(err)
	}
	if r.t.Failed() {
		r.t.Logf("log:\n%.10000s", said)
	}
	if r.cached {
		r.checkCache(fetcher.Stats().Cache)
	}
}

// recorded is an image whose errors are all in a log: that of a mount leaves
// lines out when there are many.
type recorded struct {
	*lazy.Image
	log io.Writer
}

func (i *recorded) ReadFile(ctx context.Context, p []byte, off, end int64) (int, error) {
	n, err := i.Image.ReadFile(ctx, p, off, end)
	if err != nil {
		fmt.Fprintln(i.log, err)
	}
	return n, err
}

// readers is how many files are read at a time. A read that is refused takes a
// third of a second, as it is tried again before.
const readers = 32

// readFiles reads all files below dir, several at a time and in pieces, and
// returns those in which a read failed, open.
func (r *damageRound) readFiles(dir string) map[string]int {
	var mu sync.Mutex // guards failed
	failed := make(map[string]int)
	files := slices.Sorted(maps.Keys(r.files))
	r.rng.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	work := make(chan string, len(files))
	for _, file := range files {
		work <- file
	}
	close(work)
	var reading sync.WaitGroup
	for range readers {
		rng := rand.New(rand.NewPCG(r.rng.Uint64(), 0))
		reading.Go(func() {
			for file := range work {
				fd, err := unix.Open(filepath.Join(dir, file), unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					r.t.Errorf("%s: %v", file, err)
					continue
				}
				want := r.files[file]
				refused := 0
				for at := 0; at < len(want) && refused < 2; {
					n := min(4096<<rng.IntN(6), len(want)-at)
					got := make([]byte, n)
					err := readAt(fd, got, at)
					switch {
					case errors.Is(err, unix.EIO):
						refused++
					case err != nil:
						r.t.Errorf("%s at %d: %v", file, at, err)
					case !bytes.Equal(got, want[at:at+n]):
						r.t.Errorf("%s at %d: wrong bytes", file, at)
					}
					at += n
				}
				if refused == 0 {
					unix.Close(fd)
					continue
				}
				mu.Lock()
				failed[file] = fd
				mu.Unlock()
			}
		})
	}
	reading.Wait()
	return failed
}

// readAt fills p from a file of the mount. Package os would have the runtime
// poll the file, which asks the server, while the server's own runtime waits.
func readAt(fd int, p []byte, off int) error {
	for at := 0; at < len(p); {
		n, err := unix.Pread(fd, p[at:], int64(off+at))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		at += max(n, 0)
	}
	return nil
}

// checkCache looks at each file of the cache.
func (r *damageRound) checkCache(s chunkstore.CacheStats) {
	if s.Dropped > 0 {
		r.t.Errorf("%d chunks were not written to the cache", s.Dropped)
	}
	good := 0
	err := filepath.WalkDir(r.cache, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Dir(file) == r.cache {
			return err // the marker among them
		}
		id, err := index.ParseID(strings.TrimSuffix(d.Name(), chunkstore.Suffix))
		if err != nil {
			return fmt.Errorf("%s is in the cache", file)
		}
		frame, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if c, ok := r.chunks[id]; ok {
			if _, err := chunkstore.Decode(nil, frame, index.SHA256, c); err != nil {
				r.t.Errorf("in the cache, after its damage was read: %v", err)
			}
			good++
		}
		return nil
	})
	if err != nil {
		r.t.Error(err)
	}
	if good < len(r.chunks) {
		r.t.Errorf("the cache has %d chunks, want %d", good, len(r.chunks))
	}
}

// lockedBuffer is a buffer that several write to.
type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
