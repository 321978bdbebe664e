package fill

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// The journal says which chunks are in all their places:
//
//	header   magic, identity of the image, ID of the kernel's boot
//	record   count u32, positions in the index u32 × count, CRC-32C u32
//
// A record is written when the writes that it tells of have returned, and the
// count allDone says that nothing is left to do. It holds as long as the kernel runs
// that took the writes: a killed process loses none of them. A power cut does, and after
// it the kernel has another ID: then the journal is worth nothing, unless it
// ends with allDone, which is written after all else has reached the disk.
type journal struct {
	file     *os.File
	state    int // descriptor of the state directory
	complete bool

	mu     sync.Mutex // guards what follows
	done   []uint64   // bit i: chunk i
	record []byte
}

const (
	journalName  = "journal"
	journalMagic = "bootfsF1"
	allDone      = 1<<32 - 1
	bootIDSize   = 36
	headerSize   = len(journalMagic) + sha256.Size + bootIDSize
	chunkNoted   = 12 // bytes that a chunk takes at most: a record of its own
	doneNoted    = 8  // bytes of the record allDone
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openJournal opens the journal in o.State and reads what it says of p's image.
func openJournal(o *Options, p *plan) (*journal, error) {
	if err := os.MkdirAll(o.State, 0o700); err != nil {
		return nil, err
	}
	state, err := unix.Open(o.State, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.State, err)
	}
	fd, err := unix.Openat(state, journalName, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		unix.Close(state)
		return nil, fmt.Errorf("%s/%s: %w", o.State, journalName, err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(o.State, journalName))
	j := &journal{file: f, state: state, done: make([]uint64, (p.x.Len()+63)/64)}
	if err := j.read(o, p); err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

func (j *journal) read(o *Options, p *plan) error {
	if err := unix.Flock(int(j.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another process is filling it: %s: %w", j.file.Name(), err)
	}
	info, err := j.file.Stat()
	if err != nil {
		return err
	}
	// Whoever shares a volume can write to the journal of its fill.
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", j.file.Name())
	}
	longest := int64(headerSize + chunkNoted*p.x.Len() + doneNoted)
	b, err := io.ReadAll(io.LimitReader(j.file, longest+1))
	if err != nil {
		return err
	}
	if int64(len(b)) > longest {
		b = nil
	}
	header := append([]byte(journalMagic), p.identity[:]...)
	boot, err := bootID()
	if err != nil {
		return err
	}
	rest, same := bytes.CutPrefix(b, header)
	kernel, rest := rest[:min(len(rest), bootIDSize)], rest[min(len(rest), bootIDSize):]
	if same && len(kernel) == bootIDSize {
		good, complete := j.replay(rest, p.x.Len())
		if j.complete = complete; complete {
			return nil
		}
		if string(kernel) == boot {
			at := int64(len(b) - len(rest) + good)
			if err := j.file.Truncate(at); err != nil {
				return err
			}
			_, err := j.file.Seek(at, io.SeekStart)
			return err
		}
		o.Log.Info("the machine was started anew since the root was filled in part: filling it from the start")
	}
	clear(j.done)
	if err := removeOthers(o.State); err != nil {
		return err
	}
	if err := j.file.Truncate(0); err != nil {
		return err
	}
	if _, err := j.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err = j.file.Write(append(header, boot...))
	return err
}

// replay notes what the records in b say and returns how many of its bytes are
// whole records.
func (j *journal) replay(b []byte, chunks int) (good int, complete bool) {
	for {
		r := b[good:]
		if len(r) < 8 {
			return good, false
		}
		count := binary.LittleEndian.Uint32(r)
		size := 4
		if count != allDone {
			if int64(count) > int64(len(r)-8)/4 {
				return good, false
			}
			size += 4 * int(count)
		}
		if crc32.Checksum(r[:size], castagnoli) != binary.LittleEndian.Uint32(r[size:]) {
			return good, false
		}
		if count == allDone {
			return good + size + 4, true
		}
		for i := 4; i < size; i += 4 {
			if pos := binary.LittleEndian.Uint32(r[i:]); int64(pos) < int64(chunks) {
				j.done[pos/64] |= 1 << (pos % 64)
			}
		}
		good += size + 4
	}
}

// has reports whether chunk pos is in place.
func (j *journal) has(pos int) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.done[pos/64]&(1<<(pos%64)) != 0
}

// add notes that the chunk at pos, and at all places of its ring in same, is in
// place.
func (j *journal) add(pos uint32, same []uint32) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	r := binary.LittleEndian.AppendUint32(j.record[:0], 0) // the count, to be
	count := uint32(0)
	for at := pos; ; {
		r = binary.LittleEndian.AppendUint32(r, at)
		j.done[at/64] |= 1 << (at % 64)
		count++
		if at = same[at]; at == pos {
			break
		}
	}
	binary.LittleEndian.PutUint32(r, count)
	return j.write(r)
}

// finish notes that all is done.
func (j *journal) finish() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.write(binary.LittleEndian.AppendUint32(j.record[:0], allDone)); err != nil {
		return err
	}
	return j.file.Sync()
}

func (j *journal) write(r []byte) error {
	j.record = binary.LittleEndian.AppendUint32(r, crc32.Checksum(r, castagnoli))
	_, err := j.file.Write(j.record)
	return err
}

// fd is the descriptor of the state directory.
func (j *journal) fd() int { return j.state }

func (j *journal) close() {
	j.file.Close()
	unix.Close(j.state)
}

// bootID names the run of the kernel.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(b))
	if len(id) != bootIDSize {
		return "", fmt.Errorf("/proc/sys/kernel/random/boot_id has %q", id)
	}
	return id, nil
}

// removeOthers removes what a call that is no longer valid left beside the
// journal.
func removeOthers(state string) error {
	entries, err := os.ReadDir(state)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != journalName {
			if err := os.RemoveAll(filepath.Join(state, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// forget makes the next call start anew.
func forget(state string) error {
	err := os.Remove(filepath.Join(state, journalName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
