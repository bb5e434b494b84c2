package broker

import (
	"sync"

	"im-gateway/codec"
)

// inbox is how the shards and the side producer's collector tell a claim what has ended. Putting
// never blocks; what it holds is bounded by the claim's window. Once closed it drops what comes, for
// the records belong to the partition's next reader by then.
type inbox struct {
	notify chan struct{} // capacity 1: something is there

	mu     sync.Mutex
	closed bool
	ends   [][]codec.Ended
	stored []sideResult
	routes []route
}

// sideResult is the answer to one attempt to store a side record.
type sideResult struct {
	record *sideRecord
	err    error
}

func newInbox() *inbox { return &inbox{notify: make(chan struct{}, 1)} }

// Ends implements codec.EndSink.
func (b *inbox) Ends(ends []codec.Ended) {
	b.mu.Lock()
	if !b.closed {
		b.ends = append(b.ends, ends)
	}
	b.mu.Unlock()
	b.wake()
}

func (b *inbox) sideDone(r *sideRecord, err error) {
	b.mu.Lock()
	if !b.closed {
		b.stored = append(b.stored, sideResult{r, err})
	}
	b.mu.Unlock()
	b.wake()
}

func (b *inbox) located(routes []route) {
	b.mu.Lock()
	if !b.closed {
		b.routes = append(b.routes, routes...)
	}
	b.mu.Unlock()
	b.wake()
}

func (b *inbox) wake() {
	select {
	case b.notify <- struct{}{}:
	default:
	}
}

// take swaps what has come for the two empty lists, which are used for what comes next, and takes the
// users that were looked up.
func (b *inbox) take(ends [][]codec.Ended, stored []sideResult) ([][]codec.Ended, []sideResult, []route) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, s, r := b.ends, b.stored, b.routes
	b.ends, b.stored, b.routes = ends[:0], stored[:0], nil
	return e, s, r
}

func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed, b.ends, b.stored, b.routes = true, nil, nil, nil
}
