package shard

import (
	"runtime/debug"

	"im-gateway/codec"
)

// forEach handles items 0 to n-1 of a batch. A panic ends the handling of one item only: it is
// counted, the session at fault is closed, failed (nil: nothing to do) puts the item's own affairs in
// order, and the rest of the batch is handled all the same, for a lost close would leak a session.
func (s *shard) forEach(n int, handle, failed func(i int)) {
	for i := 0; i < n; {
		i = s.attempt(i, n, handle, failed)
	}
}

// attempt handles items from i on and returns the first that is still to be handled.
func (s *shard) attempt(i, n int, handle, failed func(int)) (next int) {
	defer func() {
		if p := recover(); p != nil {
			next = i + 1
			if failed != nil {
				failed(i)
			}
			s.caught(p)
		}
	}()
	for ; i < n; i++ {
		handle(i)
	}
	return n
}

// guard runs f and survives its panic.
func (s *shard) guard(f func()) {
	defer func() {
		if p := recover(); p != nil {
			s.caught(p)
		}
	}()
	f()
}

// caught is told of a panic: the process and the other sessions go on.
func (s *shard) caught(p any) {
	s.metrics.panics.Inc()
	s.opts.Logger.Error().Any("panic", p).Bytes("stack", debug.Stack()).Int("shard", s.index).
		Msg("panic in a shard; the session at fault is closed")
	s.end(s.handling, codec.EndOffline)
	for ; s.remaining > 0; s.remaining-- {
		s.end(s.delivering, codec.EndOffline)
	}
	if ses := s.lookup(s.current); ses != nil && ses.state != closing {
		s.close(ses, codec.CloseInternal, "internal error")
	}
}
