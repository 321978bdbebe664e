package boot

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

// statusVersion is the version of the status's JSON. Names and meanings that it
// has stay; new ones may come beside them.
const statusVersion = 1

// States of a container.
const (
	stateStarting = "starting" // the root is being made
	stateRunning  = "running"  // it is mounted
	stateFilled   = "filled"   // it was filled in place, and no boot is left
)

// status is how a container is doing: what boot answers whoever asks for it.
// Nothing in it is secret. Bytes are of chunks as they are read, unless the name says
// that they are stored ones.
type status struct {
	Version       int            `json:"version"`
	State         string         `json:"state"`
	Mode          string         `json:"mode,omitempty"` // as in BOOTFS_MODE; "" while it is not chosen
	Why           string         `json:"why,omitempty"`  // why it is this mode and not the other
	Doing         string         `json:"doing,omitempty"`
	Image         imageStatus    `json:"image"`
	Started       time.Time      `json:"started"`
	UptimeSeconds float64        `json:"uptimeSeconds"`
	Local         *localStatus   `json:"local,omitempty"` // absent until it was counted once
	Reads         readStatus     `json:"reads"`
	Memory        memoryStatus   `json:"memory"`
	Cache         cacheStatus    `json:"cache"`
	Stores        []storeStatus  `json:"stores"`
	Slowest       *slowStatus    `json:"slowestFetch,omitempty"` // absent if no store was asked
	FetchSeconds  float64        `json:"fetchSeconds"`           // in which chunks from stores were waited for, of all together
	Prefetch      prefetchStatus `json:"prefetch"`
	Process       processStatus  `json:"process"`
}

type imageStatus struct {
	Root   string `json:"root"`             // digest of the index, which names the root
	Source string `json:"source,omitempty"` // as the converter was told it
	Chunks int    `json:"chunks"`
	Bytes  int64  `json:"bytes"`
}

// localStatus is what share of the image is here: in memory, in the cache or in the
// boot image.
type localStatus struct {
	Chunks int   `json:"chunks"`
	Bytes  int64 `json:"bytes"`
	// RegistryNeeded says that a chunk may have to come from a store.
	RegistryNeeded bool      `json:"registryNeeded"`
	Counted        time.Time `json:"counted"`
}

type readStatus struct {
	Total   int64 `json:"total"`
	Failed  int64 `json:"failed"`
	Waiting int   `json:"waiting"`
}

type memoryStatus struct {
	Chunks     int64 `json:"chunks"` // of reads that were served from memory
	Bytes      int64 `json:"bytes"`
	KeptChunks int   `json:"keptChunks"`
	KeptBytes  int   `json:"keptBytes"`
}

type cacheStatus struct {
	Kind        string `json:"kind"`       // "shared", "private" or "none"
	LimitBytes  int64  `json:"limitBytes"` // 0: none
	Chunks      int64  `json:"chunks"`     // that came from it
	Bytes       int64  `json:"bytes"`
	StoredBytes int64  `json:"storedBytes"`
	Shared      int64  `json:"shared"`  // chunks of these that a neighbour was fetching
	Written     int64  `json:"written"` // chunks
	Dropped     int64  `json:"dropped"`
	Faults      int64  `json:"faults"`
	Corrupt     int64  `json:"corrupt"`
}

type storeStatus struct {
	Name        string     `json:"name"`
	State       string     `json:"state"` // "good" or "troubled"
	Chunks      int64      `json:"chunks"`
	Bytes       int64      `json:"bytes"`
	StoredBytes int64      `json:"storedBytes"`
	Failures    int64      `json:"failures"`
	Corrupt     int64      `json:"corrupt"`
	Hedges      int64      `json:"hedges"` // second requests for a slow chunk
	LastError   string     `json:"lastError,omitempty"`
	LastErrorAt *time.Time `json:"lastErrorAt,omitempty"`
}

type slowStatus struct {
	Seconds float64   `json:"seconds"`
	Chunk   string    `json:"chunk"`
	Store   string    `json:"store"`
	At      time.Time `json:"at"`
}

type prefetchStatus struct {
	What  string `json:"what"`  // "none", "start" or "all": what is fetched ahead
	State string `json:"state"` // "off", "running", "done" or "failed"
	Error string `json:"error,omitempty"`
}

// reporter knows how the container is doing. It collects nothing before it is asked.
type reporter struct {
	config *bootimage.Config
	out    *console
	began  time.Time

	mu       sync.Mutex // guards what follows
	state    string
	mode     string
	why      string
	content  *content // nil until its fetcher is open
	local    *locality
	prefetch *prefetching // nil until it begins
}

func newReporter(config *bootimage.Config, out *console) *reporter {
	return &reporter{config: config, out: out, began: time.Now(), state: stateStarting}
}

// chose notes the mode and the reason for it.
func (r *reporter) chose(m mode, asked bool, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode, r.why = m.String(), why
	if asked {
		r.why = "asked for with BOOTFS_MODE"
	}
}

// opened notes the content, whose fetcher is open.
func (r *reporter) opened(c *content) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.content, r.local = c, &locality{content: c}
}

func (r *reporter) prefetches(p *prefetching) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.prefetch = p
}

// became notes the state.
func (r *reporter) became(state string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = state
}

// status collects how the container is doing.
func (r *reporter) status() *status {
	r.mu.Lock()
	s := &status{
		Version: statusVersion, State: r.state, Mode: r.mode, Why: r.why,
		Image:   imageStatus{Root: r.config.IndexDigest, Source: r.config.Source.Name},
		Started: r.began.UTC(), UptimeSeconds: seconds(time.Since(r.began)),
		Stores: []storeStatus{}, Cache: cacheStatus{Kind: "none"}, Prefetch: prefetchStatus{What: "none", State: "off"},
		Process: ownProcess(),
	}
	c, local, prefetch := r.content, r.local, r.prefetch
	r.mu.Unlock()
	s.Doing = r.out.doing()
	if prefetch != nil {
		s.Prefetch = prefetch.status()
	}
	if c == nil {
		return s
	}
	s.Image.Chunks, s.Image.Bytes = c.index.Len(), c.index.Size()
	m := c.image.Stats()
	s.Reads = readStatus{m.Reads, m.Failed, m.Waiting}
	s.Memory = memoryStatus{m.Hits, m.HitBytes, m.Chunks, m.Bytes}
	f := c.fetcher.Stats()
	s.Cache = c.cacheStatus(f.Cache)
	for _, store := range f.Stores {
		s.Stores = append(s.Stores, storeStatusOf(store))
	}
	s.FetchSeconds = seconds(f.Waited)
	if slow := f.Slowest; slow.Took > 0 {
		s.Slowest = &slowStatus{seconds(slow.Took), slow.Chunk.String(), slow.Store, slow.At.UTC()}
	}
	s.Local = local.counted()
	return s
}

func (c *content) cacheStatus(s chunkstore.CacheStats) cacheStatus {
	kind, limit := "none", int64(0)
	switch {
	case c.sharedCache:
		kind = "shared"
	case c.hasCache:
		kind, limit = "private", privateCacheLimit
	}
	if c.cacheSize != nil && kind != "none" {
		limit = *c.cacheSize
	}
	return cacheStatus{kind, limit, s.Chunks, s.Plain, s.Stored, s.Shared, s.Written, s.Dropped, s.Faults, s.Corrupt}
}

func storeStatusOf(store chunkstore.StoreStats) storeStatus {
	s := storeStatus{
		Name: store.Name, State: "good", Chunks: store.Chunks, Bytes: store.Plain, StoredBytes: store.Stored,
		Failures: store.Failures, Corrupt: store.Corrupt, Hedges: store.Hedges,
	}
	if !store.Trouble.IsZero() {
		s.State = "troubled"
	}
	if store.LastError != nil {
		at := store.LastAt.UTC()
		s.LastError, s.LastErrorAt = httpio.OneLine(store.LastError.Error(), maxWords), &at
	}
	return s
}

func seconds(d time.Duration) float64 { return d.Round(time.Millisecond).Seconds() }

// writeStatus writes the status as JSON.
func (r *reporter) writeStatus(w io.Writer) error { return json.NewEncoder(w).Encode(r.status()) }

// keepStatus leaves the status in a root that was filled, for the time when no boot
// is there.
func (r *reporter) keepStatus() error {
	f, err := os.OpenFile(bootimage.StatusPath, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	s := r.status()
	s.State, s.Doing = stateFilled, ""
	// All of it lies in the root.
	s.Local = &localStatus{Chunks: s.Image.Chunks, Bytes: s.Image.Bytes, Counted: time.Now().UTC()}
	return json.NewEncoder(f).Encode(s)
}

// print writes the status for people: a line for each thing, without the bytes
// of a terminal's commands that a server's error could contain.
func (s *status) print(w io.Writer) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-9s %s\n", name, httpio.OneLine(fmt.Sprintf(format, args...), maxWords))
	}
	line("state", "%s", s.stateInWords())
	if s.Why != "" {
		line("why", "%s", s.Why)
	}
	line("image", "%s", s.Image.Root)
	if s.Image.Source != "" {
		line("source", "%s", s.Image.Source)
	}
	if l := s.Local; l != nil {
		needed := "the registry is still needed"
		if !l.RegistryNeeded {
			needed = "the registry is no longer needed"
		}
		line("local", "%d of %d chunks, %s of %s (%d %%): %s", l.Chunks, s.Image.Chunks, megabytes(l.Bytes), megabytes(s.Image.Bytes), percent(l.Bytes, s.Image.Bytes), needed)
		line("counted", "%s", ago(l.Counted))
	}
	line("reads", "%d, %d of them failed, %d wait", s.Reads.Total, s.Reads.Failed, s.Reads.Waiting)
	line("memory", "%d chunks, %s from it; holds %d, %s", s.Memory.Chunks, megabytes(s.Memory.Bytes), s.Memory.KeptChunks, megabytes(int64(s.Memory.KeptBytes)))
	if c := s.Cache; c.Kind == "none" {
		line("cache", "none")
	} else {
		limit := "no limit"
		if c.LimitBytes > 0 {
			limit = "at most " + megabytes(c.LimitBytes)
		}
		line("cache", "%s, %s: %d chunks, %s from it; %d written, %d dropped, %d faults, %d corrupt",
			c.Kind, limit, c.Chunks, megabytes(c.Bytes), c.Written, c.Dropped, c.Faults, c.Corrupt)
	}
	for _, store := range s.Stores {
		line("store", "%s, %s: %d chunks, %s; %d failures, %d corrupt", store.Name, store.State, store.Chunks, megabytes(store.Bytes), store.Failures, store.Corrupt)
		if store.LastError != "" && store.LastErrorAt != nil {
			line("", "%s: %s", ago(*store.LastErrorAt), store.LastError)
		}
	}
	if slow := s.Slowest; slow != nil {
		line("slowest", "%.3f s for chunk %.12s from %s, %s", slow.Seconds, slow.Chunk, slow.Store, ago(slow.At))
	}
	if p := s.Prefetch; p.State != "off" {
		text := p.What + ", " + p.State
		if p.Error != "" {
			text += ": " + p.Error
		}
		line("prefetch", "%s", text)
	}
}

func (s *status) stateInWords() string {
	up := (time.Duration(s.UptimeSeconds) * time.Second).String()
	switch {
	case s.State == stateRunning:
		return "the root is mounted (" + s.Mode + "), for " + up
	case s.State == stateFilled:
		return "the root is filled in place (" + s.Mode + "), in " + up + ", " + ago(s.Started)
	}
	text := "starting"
	if s.Mode != "" {
		text += " (" + s.Mode + ")"
	}
	text += ", for " + up
	if s.Doing != "" {
		text += ": " + s.Doing
	}
	return text
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// percent rounds down: 100 is all of it.
func percent(part, whole int64) int64 {
	if whole == 0 {
		return 100
	}
	return int64(100 * float64(part) / float64(whole))
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "at an unknown time"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}
