package shard

import (
	"context"
	"math/rand/v2"
	"time"

	"im-gateway/codec"
)

// The pace of a drain and of the closes after it.
const (
	defaultCloseRate = 10_000
	reconnectDelay   = 1000                  // a client is told to wait up to so many ms, at random
	pollInterval     = 50 * time.Millisecond // of the waits below
)

// drain is what a shard does while the gateway stops.
type drain struct {
	on        bool
	refuse    bool              // client messages, so that what is in flight only gets less
	announce  []codec.SessionID // not told yet
	perTick   int
	closeCode codec.CloseCode // 0: not closing yet
	closing   []codec.SessionID
	allowance int // for closes, saved up over the ticks
	reason    string
}

// drainStep does one tick's share.
func (s *shard) drainStep() {
	d := &s.drain
	n := min(d.perTick, len(d.announce))
	for _, id := range d.announce[:n] {
		ses := s.lookup(id)
		if ses == nil || ses.state == closing {
			continue
		}
		b := s.box(ses)
		start := len(b.Arena)
		b.Arena = ses.protocol.AppendReconnect(b.Arena, 1+rand.Int64N(reconnectDelay), d.reason, s.now) // #nosec G404 -- spreads load
		s.send(ses, b.Arena[start:len(b.Arena):len(b.Arena)], codec.Content{Type: codec.FrameReconnect}, codec.Delivery{})
	}
	d.announce = d.announce[n:]
	d.allowance += s.rules.CloseRate
	perClose := int(time.Second/tickLength) * s.opts.Shards // of the allowance
	n = min(d.allowance/perClose, len(d.closing))
	d.allowance = min(d.allowance-n*perClose, perClose)
	for _, id := range d.closing[:n] {
		if ses := s.lookup(id); ses != nil {
			s.close(ses, d.closeCode, d.reason)
		}
	}
	d.closing = d.closing[n:]
}

func (s *shard) ids() (list []codec.SessionID) {
	s.each(func(ses *session) { list = append(list, ses.id) })
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// Drain tells every session to connect elsewhere, spread evenly over window, and returns when all
// have been told, or ctx ends. New sessions are closed with 4002 from now on.
func (set *Set) Drain(ctx context.Context, window time.Duration, reason string) error {
	for i := range set.shards {
		err := set.do(ctx, i, func(s *shard) {
			s.drain.on = true
			s.drain.reason = reason
			s.drain.announce = s.ids()
			n := int(ticks(window))
			s.drain.perTick = (len(s.drain.announce) + n - 1) / n
		})
		if err != nil {
			return err
		}
	}
	return set.await(ctx, func(s *shard) bool { return len(s.drain.announce) == 0 })
}

// AwaitInFlight refuses client messages from now on, with OVERLOADED, and returns when no record is in
// flight, or ctx ends.
func (set *Set) AwaitInFlight(ctx context.Context) error {
	for i := range set.shards {
		if err := set.do(ctx, i, func(s *shard) { s.drain.refuse = true }); err != nil {
			return err
		}
	}
	return set.await(ctx, func(s *shard) bool { return s.flight.n == 0 })
}

// CloseAll closes every session, paced, and returns when all are gone and their presence is
// released, or ctx ends.
func (set *Set) CloseAll(ctx context.Context, code codec.CloseCode, reason string) error {
	for i := range set.shards {
		err := set.do(ctx, i, func(s *shard) {
			s.drain.on = true
			s.drain.closeCode, s.drain.reason = code, reason
			s.drain.closing = s.ids()
		})
		if err != nil {
			return err
		}
	}
	return set.await(ctx, func(s *shard) bool {
		return s.sessions.Load() == 0 && len(s.ops) == 0 && s.outstanding == 0
	})
}

// await polls the shards until done holds for each.
func (set *Set) await(ctx context.Context, done func(*shard) bool) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for i := 0; i < len(set.shards); {
		ok := false
		if err := set.do(ctx, i, func(s *shard) { ok = done(s) }); err != nil {
			return err
		}
		if ok {
			i++
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
