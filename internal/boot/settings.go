package boot

import (
	"fmt"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/internal/metrics"
	"github.com/container-bootfs/bootfs/internal/stores"
)

// What is fetched before it is read: BOOTFS_PREFETCH.
type prefetchMode int

const (
	prefetchAuto  prefetchMode = iota // the start set, and the rest where a shared cache takes it
	prefetchNone                      // nothing
	prefetchStart                     // the start set
	prefetchAll                       // the whole image
)

// minReadTimeout is the least that BOOTFS_READ_TIMEOUT can be: the kernel asks
// three times, and each time a store must have the time to answer.
const minReadTimeout = 3 * time.Second

// settings are what the container's environment asks of boot.
type settings struct {
	stores       []string // BLOB_STORE: tried before the image's own
	mirrors      string   // BOOTFS_MIRRORS: asked before the registries that they stand for
	insecure     []string // BOOTFS_INSECURE: hosts without TLS or a valid certificate
	mode         mode     // BOOTFS_MODE
	prefetch     prefetchMode
	hold         bool              // BOOTFS_ON_FAILURE: reads wait for as long as a store fails
	readTimeout  time.Duration     // BOOTFS_READ_TIMEOUT; 0 is the default
	cacheSize    *int64            // BOOTFS_CACHE_SIZE: bytes that the cache may take, 0: any; nil: not set
	cacheReserve nodecache.Reserve // BOOTFS_CACHE_RESERVE: what it leaves free
	offline      bool              // BOOTFS_OFFLINE: no store is reached over a network
	metrics      metrics.Address   // BOOTFS_METRICS
	record       recording         // BOOTFS_RECORD: until when reads are noted
	keepSysAdmin bool              // BOOTFS_KEEP_SYS_ADMIN: the app keeps the capability
	sshPassword  string            // DROPBEAR_PASSWORD, as container-bootfs named it
	sshAgent     string            // SSH_AUTH_SOCK: path of an agent's socket

	env []string // all of it: S3 has many variables
}

func readSettings(env []string) (*settings, error) {
	s := settings{env: env, cacheReserve: nodecache.DefaultReserve}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		switch name {
		case "BLOB_STORE":
			s.stores = stores.Split(value)
		case "BOOTFS_MIRRORS":
			s.mirrors = value
		case "BOOTFS_INSECURE":
			s.insecure = words(value)
		case "BOOTFS_METRICS":
			at, err := metrics.ParseAddress(value)
			if err != nil {
				return nil, fmt.Errorf("BOOTFS_METRICS=%w", err)
			}
			s.metrics = at
		case "BOOTFS_RECORD":
			r, err := parseRecording(value)
			if err != nil {
				return nil, err
			}
			s.record = r
		case "BOOTFS_MODE":
			modes := map[string]mode{"": modeAuto, "auto": modeAuto, "fuse": modeFuse, "fill": modeFill}
			mode, ok := modes[value]
			if !ok {
				return nil, fmt.Errorf("BOOTFS_MODE=%q: want auto, fuse or fill", value)
			}
			s.mode = mode
		case "BOOTFS_PREFETCH":
			modes := map[string]prefetchMode{"": prefetchAuto, "none": prefetchNone, "start": prefetchStart, "all": prefetchAll}
			mode, ok := modes[value]
			if !ok {
				return nil, fmt.Errorf("BOOTFS_PREFETCH=%q: want none, start or all", value)
			}
			s.prefetch = mode
		case "BOOTFS_CACHE_SIZE":
			if value == "" {
				continue
			}
			n, err := nodecache.ParseSize(value)
			if err != nil {
				return nil, fmt.Errorf("BOOTFS_CACHE_SIZE: %w", err)
			}
			s.cacheSize = &n
		case "BOOTFS_CACHE_RESERVE":
			if value == "" {
				continue
			}
			r, err := nodecache.ParseReserve(value)
			if err != nil {
				return nil, fmt.Errorf("BOOTFS_CACHE_RESERVE: %w", err)
			}
			s.cacheReserve = r
		case "BOOTFS_OFFLINE":
			offline, ok := map[string]bool{"": false, "0": false, "1": true}[value]
			if !ok {
				return nil, fmt.Errorf("BOOTFS_OFFLINE=%q: want 1, or 0", value)
			}
			s.offline = offline
		case "BOOTFS_ON_FAILURE":
			if value != "" && value != "error" && value != "hold" {
				return nil, fmt.Errorf("BOOTFS_ON_FAILURE=%q: want error or hold", value)
			}
			s.hold = value == "hold"
		case "BOOTFS_READ_TIMEOUT":
			if value == "" {
				continue
			}
			d, err := time.ParseDuration(value)
			if err != nil || d < minReadTimeout {
				return nil, fmt.Errorf("BOOTFS_READ_TIMEOUT=%q: want a time of %v or more, such as 60s or 2m", value, minReadTimeout)
			}
			s.readTimeout = d
		case "BOOTFS_KEEP_SYS_ADMIN":
			s.keepSysAdmin = value == "1"
		case "DROPBEAR_PASSWORD":
			s.sshPassword = value
		case "SSH_AUTH_SOCK":
			s.sshAgent = value
		}
	}
	return &s, nil
}

// getenv returns a variable of the container, "" if it has none of that name.
func (s *settings) getenv(name string) string {
	for _, v := range s.env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}
