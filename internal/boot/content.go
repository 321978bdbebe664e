package boot

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/chunkstore/s3store"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/stores"
	"github.com/container-bootfs/bootfs/mount"
	"github.com/container-bootfs/bootfs/registrystore"
)

// privateCacheLimit bounds the cache of a container that shares none, in bytes, unless
// BOOTFS_CACHE_SIZE does.
const privateCacheLimit = 1 << 30

// content is the root image of the container: what stands in the boot image,
// and the stores that have the rest. Opening it does not use the network.
type content struct {
	config       *bootimage.Config
	index        *index.Index
	locators     *registrystore.Locators // nil where the chunks lie in loose stores
	meta         []byte
	upstream     []chunkstore.Store
	fetcher      *chunkstore.Fetcher
	image        *lazy.Image
	server       *mount.Server
	record       *recorder // nil unless reads are noted
	memory       memory
	cacheSize    *int64 // bytes, 0: any; nil: what is usual
	cacheReserve nodecache.Reserve
	hasCache     bool
	sharedCache  bool          // the cache outlives the container
	s3Variables  bool          // the variables with credentials for S3 are boot's, not the app's
	offline      *noNetwork    // stands for the stores that are reached over a network; nil if they may be
	hold         bool          // chunks are waited for, however long
	readTimeout  time.Duration // of a read that is not held; 0 is the default
	log          *logger
	faults       *logger // of the way to the chunks; kept until the start has succeeded
	started      func()  // lets them be said
}

func openContent(config *bootimage.Config, s *settings, out *console) (*content, error) {
	c := &content{
		config: config, memory: ownMemory(), cacheSize: s.cacheSize, cacheReserve: s.cacheReserve,
		hold: s.hold && !s.offline, readTimeout: s.readTimeout, log: out.log,
	}
	c.faults, c.started = out.keeping()
	rawIndex, err := mapFile(bootimage.IndexPath)
	if err != nil {
		return nil, err
	}
	if c.index, err = index.Open(rawIndex); err != nil {
		return nil, fmt.Errorf("%s: %w", bootimage.IndexPath, err)
	}
	if c.meta, err = mapFile(bootimage.MetaPath); err != nil {
		return nil, err
	}
	rawLocators, err := mapFile(bootimage.LocatorsPath)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		if c.locators, err = registrystore.OpenLocators(rawLocators, c.index); err != nil {
			return nil, fmt.Errorf("%s: %w", bootimage.LocatorsPath, err)
		}
	}
	if s.record.on {
		c.record = newRecorder(c, s.record)
	}
	c.upstream, err = c.openStores(s)
	return c, err
}

// openFetcher opens the way to the chunks: through the node cache, where there
// is one, otherwise through a cache of the container's own, if it may be.
func (c *content) openFetcher(ownCache bool) {
	cache, err := c.openCache(ownCache)
	if err != nil {
		c.log.Warn("no cache: " + err.Error())
	}
	o := chunkstore.FetcherOptions{Digest: c.index.Digest(), Stores: c.upstream, Log: c.faults}
	if cache != nil {
		o.Cache, c.hasCache = cache, true
	}
	if c.hold {
		o.Hold = c.sayHold
	}
	c.fetcher = chunkstore.NewFetcher(o)
	c.image = lazy.New(c.index, c.fetcher, lazy.Options{Memory: c.memory.chunks(), Patient: c.hold})
}

// sayHold says that reads wait for chunks, or that they go on.
func (c *content) sayHold(again bool) {
	if again {
		c.log.Warn("the chunks come again, reads go on")
		return
	}
	why := lastErrors(c.fetcher.Stats())
	if why == nil {
		why = errors.New("no store answers")
	}
	c.log.Warn("reads wait until the chunks can be had (BOOTFS_ON_FAILURE=hold): " + why.Error())
}

// patience is how long a read of the mounted root may take; less than 0 is for
// ever.
func (c *content) patience() time.Duration {
	if c.hold {
		return -1
	}
	return c.readTimeout
}

func readConfig(path string) (*bootimage.Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("this is not a converted image: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, bootimage.MaxConfig+1))
	if err == nil && len(b) > bootimage.MaxConfig {
		err = fmt.Errorf("it has more than %d bytes", bootimage.MaxConfig)
	}
	var c *bootimage.Config
	if err == nil {
		c, err = parseConfig(b)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func parseConfig(b []byte) (*bootimage.Config, error) {
	var c bootimage.Config
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	if c.Version != bootimage.Version {
		return nil, fmt.Errorf("format version %d, this boot binary reads %d: convert the image again", c.Version, bootimage.Version)
	}
	digits, ok := strings.CutPrefix(c.IndexDigest, "sha256:")
	if _, err := hex.DecodeString(digits); err != nil || !ok || len(digits) != 64 {
		return nil, fmt.Errorf("index digest %.80q: want sha256: and 64 hex digits", c.IndexDigest)
	}
	return &c, nil
}

// mapFile maps a file of the boot image. The engine's root filesystem does not
// change below a running boot.
func mapFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return b, nil
}

func (c *content) openStores(s *settings) ([]chunkstore.Store, error) {
	addresses := slices.Concat(s.stores, c.config.Stores)
	if s.offline {
		addresses = slices.DeleteFunc(addresses, stores.Remote)
	}
	places, err := secretPlaces()
	if err != nil {
		return nil, err
	}
	paths, err := withMounts(append([]string{bootimage.CertsDir}, places...))
	if err != nil {
		return nil, err
	}
	mounted, err := hold(paths...)
	if err != nil {
		return nil, err
	}
	secrets := secrets{mounted, places}
	ssh, err := secrets.ssh(s)
	if err != nil {
		return nil, err
	}
	ssh.HostKeys = c.config.HostKeys
	reach, err := newHosts(s, mounted)
	if err != nil {
		return nil, err
	}
	source := stores.Source{
		Index:    c.index,
		Locators: c.locators,
		Access:   stores.Access{Keychain: secrets, Advice: registryAdvice, SSH: ssh, Hosts: reach},
	}
	if slices.ContainsFunc(addresses, s3store.Is) {
		source.S3 = secrets.s3(s)
		c.s3Variables = len(secrets.find(s3Credentials)) == 0
	}
	var list []chunkstore.Store
	var faults []error
	for _, address := range addresses {
		found, err := stores.OpenAll(address, source)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		list = append(list, found...)
	}
	if s.offline {
		c.offline = &noNetwork{source: c.config.Source.Name, index: c.index, locators: c.locators}
		list = append(list, c.offline)
	}
	// One address that leads nowhere is no reason to refuse the others.
	if len(list) == 0 {
		faults = append(faults, errors.New("no store can be read: name one with -e BLOB_STORE=ADDRESS"))
		return nil, errors.Join(faults...)
	}
	for _, err := range faults {
		c.log.Warn(err.Error())
	}
	return list, nil
}

// openCache opens the node cache where one is mounted, else, if it may, a bounded
// cache of the container's own in its volume. It returns nil where there is
// neither.
func (c *content) openCache(own bool) (chunkstore.Writer, error) {
	shared, err := mountinfo.Mounted(bootimage.CachePath)
	if err != nil {
		return nil, err
	}
	o := nodecache.Options{Reserve: c.cacheReserve, Log: c.log}
	if c.cacheSize != nil {
		o.Limit = *c.cacheSize
	}
	if shared {
		cache, err := nodecache.Open(bootimage.CachePath, o)
		if err != nil {
			return nil, err
		}
		c.sharedCache = true
		return cache, nil
	}
	if !own {
		return nil, nil
	}
	private, err := mountinfo.Mounted(bootimage.WritablePath)
	if err != nil || !private {
		return nil, err
	}
	if c.cacheSize == nil {
		o.Limit = privateCacheLimit
	}
	cache, err := nodecache.Open(bootimage.WritablePath+"/cache.castr", o)
	if err != nil {
		return nil, err
	}
	return cache, nil
}

// serve mounts the root image at dir.
func (c *content) serve(dir string) error {
	var err error
	c.server, err = mount.Serve(dir, mount.Options{
		Meta:         c.meta,
		Image:        c.record.around(c.image),
		XattrClasses: c.config.XattrClasses,
		ReadTimeout:  c.patience(),
		Log:          c.faults,
		Name:         "bootfs",
		ReadAhead:    c.readAhead(),
		Place:        filepath.Base(bootimage.Dir),
	})
	return err
}

// makeStartReady has what a start reads decoded while the root is made, as far as it
// is in the cache.
func (c *content) makeStartReady() {
	if c.locators != nil {
		go c.image.MakeReady(c.locators.StartSet())
	}
}

func (c *content) prefetchStart(ctx context.Context) error {
	if c.locators == nil {
		return nil
	}
	return c.image.PrefetchStart(ctx, c.locators.StartSet())
}

func (c *content) prefetchAll(ctx context.Context) error {
	return c.image.Prefetch(ctx, func(yield func(int) bool) {
		for i := range c.index.Len() {
			if !yield(i) {
				return
			}
		}
	})
}

// cutOffAfter is how long boot tries before it says what a person could do
// about a store that does not answer.
const cutOffAfter = 5 * time.Second

// warnIfCutOff says once what stands between a container and its chunks, if
// none has come and the stores fail.
func (c *content) warnIfCutOff() {
	if c.offline != nil {
		return // and each chunk that is missing says so at once
	}
	if c.hold {
		return // which is said by sayHold
	}
	if warning := cutOff(c.fetcher.Stats(), resolvers("/etc/resolv.conf")); warning != "" {
		c.log.Warn(warning)
	}
}

func cutOff(s chunkstore.Stats, resolvers []string) string {
	for _, store := range s.Stores {
		if store.Chunks > 0 {
			return ""
		}
	}
	why := lastErrors(s)
	if why == nil {
		return ""
	}
	warning := fmt.Sprintf("no chunk has come in %s: %v", cutOffAfter, why)
	if !onTheWay(why) {
		return warning // it says what to do
	}
	if slices.ContainsFunc(s.Stores, hasHostName) {
		by := "no resolver"
		if len(resolvers) > 0 {
			by = "resolver " + strings.Join(resolvers, ", ")
		}
		warning += " (looked up by " + by + ")"
	}
	return fmt.Sprintf("%s: give the container a way there (--network, --dns), a filled cache (-v CACHE:%s) or another store (-e BLOB_STORE=ADDRESS)",
		warning, bootimage.CachePath)
}

// hasHostName reports whether a store that fails is on a host whose name must be
// looked up.
func hasHostName(s chunkstore.StoreStats) bool {
	if s.LastError == nil {
		return false
	}
	u, err := url.Parse(s.Name)
	if err != nil {
		return false
	}
	_, err = netip.ParseAddr(u.Hostname())
	return err != nil
}

// noChunks is why chunks of the program could not be had.
func (c *content) noChunks() error {
	if c.offline != nil {
		return c.offline.lastError()
	}
	stats := c.fetcher.Stats()
	if why := lastErrors(stats); why != nil {
		return why
	}
	var asked []string
	for _, store := range stats.Stores {
		asked = append(asked, store.Name)
	}
	return fmt.Errorf("nothing has come in time from %s", strings.Join(asked, ", "))
}

// lastErrors is why chunks could not be had, as far as stores have said.
func lastErrors(s chunkstore.Stats) error {
	var all storeErrors
	for _, store := range s.Stores {
		if store.LastError != nil {
			all = append(all, store.LastError)
		}
	}
	if all == nil {
		return nil
	}
	return all
}

// storeErrors are those of several stores, on one line.
type storeErrors []error

func (e storeErrors) Error() string {
	var all []string
	for _, err := range e {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

func (e storeErrors) Unwrap() []error { return e }

// onTheWay reports whether err is of the way to a store, and not of what that
// has answered or of how to be let in.
func onTheWay(err error) bool {
	var way *net.OpError
	return errors.As(err, &way) || errors.Is(err, context.DeadlineExceeded)
}

// resolvers returns the name servers that a resolv.conf lists.
func resolvers(path string) []string {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var list []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			list = append(list, f[1])
		}
	}
	return list
}

// close waits for the cache to take what is on its way and ends the mount: the
// kernel, which now kills what else runs in the container, must find nobody
// waiting for a server that has left.
func (c *content) close() {
	err := c.fetcher.Close()
	if c.server != nil {
		err = errors.Join(err, c.server.Close())
	}
	if err != nil {
		c.log.Info("while ending: " + err.Error())
	}
}
