package nodecache

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is the file whose bytes processes lock for one another. It is empty:
// what lies there are locks alone, which end with the processes that hold them.
// Its time is that of the last sweep.
const lockName = ".bootfs-lock"

// evictByte is the byte of the lock file that an evictor locks. Those before it
// stand for chunks.
const evictByte = 1 << 62

// lockPatience is how long a cache that is too large waits for another process
// to evict. That may be stopped, or hold the lock to do harm; two that evict do
// none.
const lockPatience = 30 * time.Second

// lockEviction takes the evictor's lock. held is false if another process has
// it. The file is nil where the cache cannot have one, which is no reason not to
// evict. Closing it ends the lock.
func (c *Cache) lockEviction() (f *os.File, held bool) {
	f, err := c.open(lockName, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, true
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: evictByte, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err == unix.EAGAIN || err == unix.EACCES {
		f.Close()
		return nil, false
	}
	return f, true
}
