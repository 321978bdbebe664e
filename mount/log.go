package mount

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

const (
	maxLinesPerSecond = 20   // of failures: a program may try again in a loop
	maxPaths          = 1000 // remembered, so that such a loop costs no search each time
)

// failureLog says what FUSE has no way to say: a program that reads sees an
// errno only.
type failureLog struct {
	log  *slog.Logger
	meta *erofs.Reader

	mu      sync.Mutex // guards what follows
	second  int64      // of the last failure, since 1970
	lines   int        // in that second
	dropped int        // lines left out since the last one
	paths   map[uint64]string
}

// failed logs that something went wrong with inode nid.
func (l *failureLog) failed(nid uint64, what string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now().Unix(); now != l.second {
		l.second, l.lines = now, 0
	}
	if l.lines++; l.lines > maxLinesPerSecond {
		l.dropped++
		return
	}
	attrs := []any{"path", l.path(nid), "err", err}
	if l.dropped > 0 {
		attrs = append(attrs, "lines left out", l.dropped)
		l.dropped = 0
	}
	l.log.Error(what, attrs...)
}

func (l *failureLog) path(nid uint64) string {
	if p, ok := l.paths[nid]; ok {
		return p
	}
	if l.paths == nil || len(l.paths) >= maxPaths {
		l.paths = make(map[uint64]string)
	}
	p := findPath(l.meta, nid)
	l.paths[nid] = p
	return p
}

// findPath returns a path of inode nid, found by a search from the root: a
// request carries none, and the metadata has no way up.
func findPath(meta *erofs.Reader, nid uint64) string {
	root := meta.RootNID()
	if nid == root {
		return "/"
	}
	type dir struct {
		nid  uint64
		path string
	}
	found := ""
	seen := map[uint64]bool{root: true} // damaged metadata may show a directory twice
	for queue := []dir{{root, ""}}; len(queue) > 0 && found == ""; queue = queue[1:] {
		d := queue[0]
		n, err := meta.Inode(d.nid)
		if err != nil {
			continue
		}
		_ = meta.ReadDir(n, 0, func(name []byte, child uint64, typ uint8, _ uint64) bool {
			if string(name) == "." || string(name) == ".." {
				return true
			}
			if child == nid {
				found = d.path + "/" + string(name)
				return false
			}
			if typ == unix.DT_DIR && !seen[child] {
				seen[child] = true
				queue = append(queue, dir{child, d.path + "/" + string(name)})
			}
			return true
		})
	}
	if found == "" {
		return fmt.Sprintf("inode %d", nid)
	}
	return found
}
