package lazy

import (
	"container/list"

	"github.com/container-bootfs/bootfs/index"
)

// recent keeps the plain bytes of the chunks that were read last. Chunks are
// many times longer than what the kernel asks for at once, so the next request
// mostly lies in one of them. Its user locks.
type recent struct {
	limit int // bytes kept at most
	size  int // bytes kept now
	order list.List
	byID  map[index.ID]*list.Element // of order, whose values are kept
}

type kept struct {
	id    index.ID
	plain []byte // never written to: readers copy from it without a lock
}

func (r *recent) get(id index.ID) ([]byte, bool) {
	e, ok := r.byID[id]
	if !ok {
		return nil, false
	}
	r.order.MoveToFront(e)
	return e.Value.(kept).plain, true
}

func (r *recent) put(id index.ID, plain []byte) {
	if _, ok := r.byID[id]; ok || len(plain) > r.limit {
		return
	}
	for r.size+len(plain) > r.limit {
		oldest := r.order.Remove(r.order.Back()).(kept)
		delete(r.byID, oldest.id)
		r.size -= len(oldest.plain)
	}
	r.byID[id] = r.order.PushFront(kept{id, plain})
	r.size += len(plain)
}
