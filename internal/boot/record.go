package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/internal/answer"
	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/erofs"
	"github.com/container-bootfs/bootfs/internal/lazy"
	"github.com/container-bootfs/bootfs/internal/reads"
	"github.com/container-bootfs/bootfs/mount"
)

// recordCommand is argument 1 of a boot that is asked what the program has read.
const recordCommand = "start-set"

const (
	// portPause is how often boot looks whether a port is open.
	portPause = 10 * time.Millisecond
	// maxPorts is how much of the kernel's list of sockets is read, in bytes.
	maxPorts = 16 << 20
	// maxRecordReaders is how many are told what was read at a time, and
	// recordTimeout how long one of them takes.
	maxRecordReaders = 2
	recordTimeout    = 30 * time.Second
)

// recording is until when reads are noted: BOOTFS_RECORD. With neither a time nor
// a port that is the program's end.
type recording struct {
	on   bool
	time time.Duration // since the program began
	port uint16        // is listened at
}

func parseRecording(value string) (recording, error) {
	if value == "" {
		return recording{}, nil
	}
	if value == "exit" {
		return recording{on: true}, nil
	}
	if port, ok := strings.CutPrefix(value, "port:"); ok {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return recording{on: true, port: uint16(n)}, nil
		}
	} else if d, err := time.ParseDuration(value); err == nil && d > 0 {
		return recording{on: true, time: d}, nil
	}
	return recording{}, fmt.Errorf("BOOTFS_RECORD=%q: want exit, port:PORT or a time such as 5s", value)
}

// recorder notes what is read of the root until the program is ready. A nil one
// does nothing.
type recorder struct {
	until recording
	meta  []byte
	noted *reads.Recorder
	log   *logger
	once  sync.Once     // finish
	done  chan struct{} // closed by it
}

func newRecorder(c *content, until recording) *recorder {
	return &recorder{until: until, meta: c.meta, noted: reads.NewRecorder(c.index.Size()), log: c.log, done: make(chan struct{})}
}

// around has the reads of image noted.
func (r *recorder) around(image *lazy.Image) mount.Image {
	if r == nil {
		return image
	}
	return notedImage{image, r.noted}
}

type notedImage struct {
	*lazy.Image
	noted *reads.Recorder
}

// ReadAt implements mount.Image.
func (i notedImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	i.noted.Note(off, len(p))
	return i.Image.ReadAt(ctx, p, off)
}

// ReadFile implements mount.FileReader.
func (i notedImage) ReadFile(ctx context.Context, p []byte, off, end int64) (int, error) {
	i.noted.Note(off, len(p))
	return i.Image.ReadFile(ctx, p, off, end)
}

// begin waits for the program to be ready, which begins now.
func (r *recorder) begin() {
	switch {
	case r == nil:
	case r.until.time > 0:
		time.AfterFunc(r.until.time, r.finish)
	case r.until.port > 0:
		go func() {
			for !listensAt(r.until.port) {
				time.Sleep(portPause)
			}
			r.finish()
		}()
	}
}

// ended says that the program has ended, which for some is to be ready.
func (r *recorder) ended() {
	if r != nil && r.until.port == 0 {
		r.finish()
	}
}

// finish keeps what was read until now in the engine's root, where the program
// does not see it and the engine does. Only the first call counts.
func (r *recorder) finish() {
	r.once.Do(func() {
		defer close(r.done)
		r.noted.Stop()
		text, err := r.text()
		if err == nil {
			err = os.WriteFile(bootimage.RecordPath+".new", text, 0o644)
		}
		if err == nil {
			err = os.Rename(bootimage.RecordPath+".new", bootimage.RecordPath)
		}
		if err != nil {
			r.log.Warn("what the program has read could not be kept: " + err.Error())
		}
	})
}

// text is what was read until now, as package reads has it.
func (r *recorder) text() ([]byte, error) {
	meta, err := erofs.NewReader(r.meta)
	if err != nil {
		return nil, err
	}
	ranges, err := r.noted.Ranges(meta)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = reads.Write(&b, ranges)
	return b.Bytes(), err
}

// answer writes it to everybody who connects.
func (r *recorder) answer(l net.Listener) {
	answer.Each(l, maxRecordReaders, recordTimeout, func(conn net.Conn) {
		if text, err := r.text(); err == nil {
			_, _ = conn.Write(text)
		}
	})
}

// listensAt reports whether the network of this process has a TCP socket that
// listens at port.
func listensAt(port uint16) bool {
	for _, p := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		f, err := os.Open(p)
		if err != nil {
			continue
		}
		b, _ := io.ReadAll(io.LimitReader(f, maxPorts)) // what was read counts
		f.Close()
		if listed(b, port) {
			return true
		}
	}
	return false
}

// listed reports whether a socket that listens at port is in the kernel's list:
// "  0: 00000000:1F90 00000000:0000 0A …", address and port, those of the other
// end, state.
func listed(list []byte, port uint16) bool {
	const listens = "0A"
	want := fmt.Sprintf(":%04X", port)
	for line := range bytes.Lines(list) {
		f := bytes.Fields(line)
		if len(f) > 3 && string(f[3]) == listens && bytes.HasSuffix(f[1], []byte(want)) {
			return true
		}
	}
	return false
}

// tellRecord is the command: it writes what was read to stdout and returns the exit
// status.
func tellRecord(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		fmt.Fprintln(stderr, "bootfs: usage: "+bootimage.BootPath+" "+recordCommand)
		return exitUsage
	}
	text, err := askRecord()
	if err == nil {
		_, err = stdout.Write(text)
	}
	if err != nil {
		fmt.Fprintln(stderr, "bootfs: "+err.Error())
		return exitNotTold
	}
	return exitTold
}

func askRecord() ([]byte, error) {
	conn, err := net.DialTimeout("unix", bootimage.RecordPath, answerTimeout)
	switch {
	case errors.Is(err, unix.ENOENT) && !inCorner():
		return nil, errors.New("the root is not mounted, or not yet")
	case errors.Is(err, unix.ENOENT):
		return nil, errors.New("nothing is noted: the container needs BOOTFS_RECORD=exit, port:PORT or a time")
	case err != nil:
		return nil, fmt.Errorf("reach the container's boot: %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(recordTimeout))
	text, err := io.ReadAll(io.LimitReader(conn, reads.MaxFile))
	if err == nil && len(text) == 0 {
		err = errNoBoot
	}
	return text, err
}
