package reads

import (
	"slices"
	"sort"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

// Recorder notes which parts of a root image are read, in blocks. It is safe for
// concurrent use.
type Recorder struct {
	mu     sync.Mutex // guards what follows
	seen   []uint64   // a bit for each block
	runs   []run      // of blocks, as they were first read
	blocks int64
	over   bool
}

// run is blocks of the root image that follow one another.
type run struct{ first, count int64 }

func (r run) end() int64 { return r.first + r.count }

// NewRecorder returns a Recorder for a root image of size bytes.
func NewRecorder(size int64) *Recorder {
	blocks := (size + erofs.BlockSize - 1) / erofs.BlockSize
	return &Recorder{seen: make([]uint64, (blocks+63)/64), blocks: blocks}
}

// Note notes a read of n bytes from off.
func (r *Recorder) Note(off int64, n int) {
	if off < 0 || n <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return
	}
	for b := off / erofs.BlockSize; b < min(r.blocks, (off+int64(n)+erofs.BlockSize-1)/erofs.BlockSize); b++ {
		if r.seen[b/64]&(1<<(b%64)) != 0 {
			continue
		}
		r.seen[b/64] |= 1 << (b % 64)
		if k := len(r.runs) - 1; k >= 0 && r.runs[k].end() == b {
			r.runs[k].count++
		} else if len(r.runs) < MaxRanges/2 { // one may be parts of several files
			r.runs = append(r.runs, run{b, 1})
		}
	}
}

// Stop has nothing noted any more.
func (r *Recorder) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
}

// Ranges returns what was read, as the parts of files that meta, the front region
// of the root image, has there. It looks at every file of the image.
func (r *Recorder) Ranges(meta *erofs.Reader) ([]Range, error) {
	r.mu.Lock()
	runs := slices.Clone(r.runs)
	r.mu.Unlock()
	w := walk{meta: meta, runs: slices.Clone(runs), seen: make(map[uint64]bool)}
	sort.Slice(w.runs, func(i, j int) bool { return w.runs[i].first < w.runs[j].first })
	root, err := meta.Inode(meta.RootNID())
	if err == nil {
		err = w.dir(root, "")
	}
	if err != nil {
		return nil, err
	}
	sort.Slice(w.parts, func(i, j int) bool { return w.parts[i].first < w.parts[j].first })
	var out []Range
	for _, r := range runs {
		i := sort.Search(len(w.parts), func(i int) bool { return w.parts[i].end() > r.first })
		for ; i < len(w.parts) && w.parts[i].first < r.end() && len(out) < MaxRanges; i++ {
			p := w.parts[i]
			from, to := max(p.first, r.first), min(p.end(), r.end())
			g := Range{Path: p.path, Offset: p.offset + (from-p.first)*erofs.BlockSize}
			g.Size = min((to-from)*erofs.BlockSize, p.size-g.Offset)
			if k := len(out) - 1; k >= 0 && out[k].Path == g.Path && out[k].Offset+out[k].Size == g.Offset {
				out[k].Size += g.Size
			} else if g.Size > 0 {
				out = append(out, g)
			}
		}
	}
	return out, nil
}

// walk finds the files that lie in runs.
type walk struct {
	meta  *erofs.Reader
	runs  []run // sorted
	seen  map[uint64]bool
	parts []part
}

// part is blocks of one file.
type part struct {
	run
	path   string
	offset int64 // in the file, bytes
	size   int64 // of the file, bytes
}

func (w *walk) dir(dir erofs.Inode, at string) error {
	var bad error
	err := w.meta.ReadDir(dir, 0, func(name []byte, nid uint64, typ uint8, _ uint64) bool {
		if string(name) == "." || string(name) == ".." || typ != unix.DT_DIR && typ != unix.DT_REG || w.seen[nid] {
			return true
		}
		var n erofs.Inode
		if n, bad = w.meta.Inode(nid); bad != nil {
			return false
		}
		switch {
		case typ == unix.DT_DIR:
			w.seen[nid] = true
			bad = w.dir(n, at+"/"+string(name))
		case n.Size > 0:
			if n.Nlink > 1 {
				w.seen[nid] = true
			}
			bad = w.file(n, at, name)
		}
		return bad == nil
	})
	if bad != nil {
		return bad
	}
	return err
}

// file adds the parts of n that lie in runs.
func (w *walk) file(n erofs.Inode, dir string, name []byte) error {
	path := ""
	for off := int64(0); off < n.Size; {
		at, size, err := w.meta.Span(n, off)
		if err != nil {
			return err
		}
		first := at / erofs.BlockSize
		end := (at + size + erofs.BlockSize - 1) / erofs.BlockSize
		i := sort.Search(len(w.runs), func(i int) bool { return w.runs[i].end() > first })
		if at >= 0 && i < len(w.runs) && w.runs[i].first < end {
			if path == "" {
				path = dir + "/" + string(name)
			}
			w.parts = append(w.parts, part{run{first, end - first}, path, off, n.Size})
		}
		off += size
	}
	return nil
}
