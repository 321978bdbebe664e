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
	plain []byte  // never written to: readers copy from it without a lock
	ahead *stream // nil unless it was fetched ahead and not read yet
}

func (r *recent) get(id index.ID) ([]byte, bool) {
	e, ok := r.byID[id]
	if !ok {
		return nil, false
	}
	r.order.MoveToFront(e)
	k := e.Value.(*kept)
	if k.ahead != nil {
		k.ahead.used += len(k.plain)
		k.ahead = nil
	}
	return k.plain, true
}

// put keeps plain; ahead is the stream for which it was fetched before it was read.
func (r *recent) put(id index.ID, plain []byte, ahead *stream) {
	if _, ok := r.byID[id]; ok || len(plain) > r.limit {
		return
	}
	for r.size+len(plain) > r.limit {
		oldest := r.order.Remove(r.order.Back()).(*kept)
		delete(r.byID, oldest.id)
		r.size -= len(oldest.plain)
	}
	r.byID[id] = r.order.PushFront(&kept{id, plain, ahead})
	r.size += len(plain)
}
