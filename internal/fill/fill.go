// Package fill writes a root image into a directory that is the root of a
// running container, file by file, from the image's metadata and its chunks.
//
// Give [Root] the front region, the index and a [lazy.Fetcher]. Directories are
// made while the first chunks travel; each chunk is fetched once, in the order
// in which the packs hold them, and goes at once to every file that has a part
// in it. What the directory held before gives way to what the image has;
// what is mounted below it is left alone, and so is what the image does not
// name. When Root returns without an error, the tree is the image's and would
// survive a power cut.
//
// Root may be killed at any time and called again: a journal says which chunks
// are in place. Metadata and index may be hostile: no path leads out of the
// directory or into another mount, no file is written twice, and memory, open
// files and time stay within what the bytes that are given can justify.
package fill

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/lazy"
)

// Options of Root. Meta, Index, Fetcher and State are required.
type Options struct {
	Meta    []byte       // front region of the root image; not changed meanwhile
	Index   *index.Index // of the whole root image
	Fetcher lazy.Fetcher

	// Under is the directory of the image that is written, a path without symlinks;
	// "" is its root.
	Under string

	// Order yields positions of the index in the order in which their packs hold
	// them, so that each pack is read once and from front to back. What it leaves
	// out comes behind, in the order of the index; nil leaves out all.
	Order iter.Seq[int]

	// State is a directory for the journal and for files that are not in their
	// place yet, in the same mount as the root; it is made if it is not there.
	// The caller removes it, with all it holds, when it has noted in its own way
	// that the root is filled. Until then a further call finds it complete.
	State string

	// Last reports whether the file at path, without a leading slash, has to
	// keep what stands there until all else is in place. These are renamed into
	// place at the end. nil stands for none.
	Last func(path string) bool

	// Patience is how long no chunk may arrive; 0 is DefaultPatience, and less than
	// 0 is for ever.
	Patience time.Duration

	// Progress is told how many bytes of files are in place, and of how many. It
	// is called often, from any goroutine; it may be nil.
	Progress func(done, total int64)

	Log *slog.Logger // for what happens in between; nil discards it
}

// DefaultPatience is what Options.Patience means when it is 0.
const DefaultPatience = 60 * time.Second

// Report says what Root has done.
type Report struct {
	Files   int64         // inodes of the image that are in place
	Bytes   int64         // of files, that this call has put in place
	Resumed int64         // bytes of files that an earlier call had put in place
	Sync    time.Duration // of the call, that waiting for the disk took in the end
	Left    []string      // what could not be made and why, a line for each kind; no error
}

// errStale says that what an earlier call left is not what its journal says.
var errStale = errors.New("the files of an earlier fill are not what its journal says")

// Root writes the root image below dir and resumes what an earlier call left
// there. Errors are one line that names the file.
func Root(ctx context.Context, dir string, o Options) (Report, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Patience == 0 {
		o.Patience = DefaultPatience
	}
	report, err := root(ctx, dir, &o)
	if errors.Is(err, errStale) {
		o.Log.Info("filling the root from the start", "reason", err)
		if err = forget(o.State); err == nil {
			report, err = root(ctx, dir, &o)
		}
	}
	if err != nil {
		return report, fmt.Errorf("fill %s: %w", dir, explain(dir, err))
	}
	return report, nil
}

func root(ctx context.Context, dir string, o *Options) (Report, error) {
	p, err := newPlan(o)
	if err != nil {
		return Report{}, err
	}
	j, err := openJournal(o, p)
	if err != nil {
		return Report{}, err
	}
	defer j.close()
	f := &filler{plan: p, o: o, journal: j, dirsMade: make(chan struct{}), moved: map[uint32]name{}}
	if err := f.open(dir); err != nil {
		return Report{}, err
	}
	defer f.close()
	if j.complete {
		return f.report(), nil
	}
	if err := f.room(dir); err != nil {
		return Report{}, err
	}
	err = f.run(ctx)
	return f.report(), err
}

// filler is one call of Root.
type filler struct {
	*plan
	o       *Options
	journal *journal

	dirs     dirs
	files    files
	owner    owner
	left     left
	sync     time.Duration
	dirsMade chan struct{}   // closed when all directories stand
	moved    map[uint32]name // regular files whose first name is below a mount; made before dirsMade

	progress progress
}

// owner is what new files belong to and lack without a further call.
type owner struct {
	uid, gid uint32
	umask    uint32 // all ones if unknown
}

func (f *filler) open(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open it: %w", err)
	}
	if here, there := mountOf(fd), mountOf(f.journal.fd()); here != there {
		unix.Close(fd)
		return fmt.Errorf("%s is not in the mount that is filled: %w", f.o.State, unix.EXDEV)
	}
	limit := openFiles()
	f.dirs.init(f.plan, fd, limit)
	f.files.init(limit)
	f.owner = owner{uint32(unix.Geteuid()), uint32(unix.Getegid()), umask()}
	f.progress.init(f.plan, f.journal, f.o.Progress)
	return nil
}

// mountOf names the mount of an open directory; 0 if the kernel does not.
func mountOf(fd int) uint64 {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil || st.Mask&unix.STATX_MNT_ID == 0 {
		return 0
	}
	return st.Mnt_id
}

func (f *filler) close() {
	f.files.close()
	f.dirs.close()
}

func (f *filler) report() Report {
	return Report{
		Files:   f.inodes,
		Bytes:   f.progress.done.Load() - f.progress.resumed,
		Resumed: f.progress.resumed,
		Sync:    f.sync,
		Left:    f.left.lines(),
	}
}

// workers is how many batches of chunks are on their way or being written at a
// time. Decoding and verifying needs a processor, writing one now and then.
func workers() int { return max(4, 2*runtime.GOMAXPROCS(0)) }
