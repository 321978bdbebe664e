package nodecache

import (
	"encoding/binary"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/index"
)

// claimsCheck is how often it is looked whether the lock file is still the one
// that others lock.
const claimsCheck = 100 * time.Millisecond

// claims are the chunks that this process has claimed. A claim is a lock on one
// byte of the lock file: nothing is written and nothing need be cleaned up, as
// the kernel takes a lock away with the process that holds it.
type claims struct {
	mu      sync.Mutex // guards what follows, and the fields of locks
	locks   *locks     // nil: there is no lock file; claims are good within the process
	checked time.Time
	held    map[int64]struct{} // bytes of the lock file
}

// locks is an open lock file.
type locks struct {
	*os.File
	writable bool
	held     int  // claims that lie in it
	replaced bool // another file has its name; closed with the last claim
}

// Claim tells the other processes that this one is fetching chunk id, until
// release is called. A cache that cannot be written has no claims: what is
// fetched does not come into it.
func (c *Cache) Claim(id index.ID) (release func(), ok bool) {
	// Two chunks that share a byte would wait for one another now and then; with
	// 62 bits none do.
	at := int64(binary.BigEndian.Uint64(id[:]) >> 2)
	s := &c.claims
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, held := s.held[at]; held {
		return nil, false
	}
	if now := time.Now(); !c.readOnly && now.Sub(s.checked) > claimsCheck {
		c.openLocks()
		s.checked = now
	}
	l := s.locks
	if l != nil && !l.lock(at) {
		return nil, false
	}
	if s.held == nil {
		s.held = make(map[int64]struct{})
	}
	s.held[at] = struct{}{}
	if l != nil {
		l.held++
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.held, at)
		if l == nil {
			return
		}
		_ = l.set(unix.F_UNLCK, at) // what fails ends with the process
		if l.held--; l.held == 0 && l.replaced {
			l.Close()
		}
	}, true
}

// openLocks opens the lock file, and anew if another one has its name by now. The
// caller has locked the claims.
func (c *Cache) openLocks() {
	s := &c.claims
	if l := s.locks; l != nil {
		var has, named unix.Stat_t
		if unix.Fstat(int(l.Fd()), &has) == nil && unix.Fstatat(int(c.dir.Fd()), lockName, &named, unix.AT_SYMLINK_NOFOLLOW) == nil &&
			has.Dev == named.Dev && has.Ino == named.Ino {
			return
		}
		s.locks = nil
		if l.replaced = true; l.held == 0 {
			l.Close()
		}
	}
	f, err := c.open(lockName, os.O_RDWR|os.O_CREATE)
	writable := err == nil
	if err != nil {
		f, err = c.open(lockName, os.O_RDONLY) // that of another user
	}
	if err == nil {
		s.locks = &locks{File: f, writable: writable}
	}
}

// closeLocks ends all claims.
func (c *Cache) closeLocks() {
	s := &c.claims
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.locks != nil {
		s.locks.replaced = true
		if s.locks.held == 0 {
			s.locks.Close()
		}
		s.locks = nil
	}
}

// lock locks a byte, and reports whether it is not another's. Where there are no
// locks there is nothing to wait for.
func (l *locks) lock(at int64) bool {
	if l.writable {
		err := l.set(unix.F_WRLCK, at)
		return err != unix.EAGAIN && err != unix.EACCES
	}
	// A file that may only be read can only be locked against those who write.
	// Two who look at the same moment both go on.
	free := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
	if unix.FcntlFlock(l.Fd(), unix.F_OFD_GETLK, &free) == nil && free.Type != unix.F_UNLCK {
		return false
	}
	err := l.set(unix.F_RDLCK, at)
	return err != unix.EAGAIN && err != unix.EACCES
}

// set sets a lock on one byte, or takes it away. It never waits.
func (l *locks) set(kind int16, at int64) error {
	return unix.FcntlFlock(l.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: at, Len: 1})
}
