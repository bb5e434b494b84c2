package shard

import (
	"im-gateway/codec"
)

// outbox gathers the commands for one event loop while its last batch is under way.
type outbox struct {
	fill  *codec.EgressBatch
	spare *codec.EgressBatch
	busy  bool // a batch is with the loop
}

// maxKeptArena keeps a batch that grew during a burst from holding its memory.
const maxKeptArena = 1 << 20

// box is the batch being filled for the session's loop.
func (s *shard) box(ses *session) *codec.EgressBatch {
	o := &s.out[ses.id.Loop()]
	if o.fill == nil {
		o.fill, o.spare = o.spare, nil
		if o.fill == nil {
			o.fill = &codec.EgressBatch{Shard: s.index, Loop: ses.id.Loop()}
		}
	}
	return o.fill
}

// command appends a command for the session; the caller fills it in at once.
func (s *shard) command(ses *session) *codec.Command {
	b := s.box(ses)
	b.Commands = append(b.Commands, codec.Command{Session: ses.id})
	return &b.Commands[len(b.Commands)-1]
}

// frame sends payload to the session. A delivery that it carries ends now or later, exactly once.
func (s *shard) frame(ses *session, payload []byte, d codec.Delivery) {
	if int(ses.pending)+len(payload) > s.opts.EgressBudget && ses.pending > 0 {
		s.metrics.slow.Inc()
		s.end(d, codec.EndSlowConsumer)
		s.close(ses, codec.CloseSlowConsumer, "too much is waiting to be read")
		return
	}
	ses.pending += int32(len(payload))
	ses.out++
	c := s.command(ses)
	c.Kind, c.Payload, c.Delivery = codec.CommandFrame, payload, d
}

// send is frame, but for a session whose `connected` has not gone out yet: its frames are held.
func (s *shard) send(ses *session, payload []byte, d codec.Delivery) {
	switch ses.state {
	case live:
		s.frame(ses, payload, d)
	case claiming:
		if int(ses.pending)+len(payload) > s.opts.EgressBudget {
			s.metrics.slow.Inc()
			s.end(d, codec.EndSlowConsumer)
			s.close(ses, codec.CloseSlowConsumer, "too much is waiting to be read")
			return
		}
		ses.pending += int32(len(payload))
		l := s.backlogOf(ses)
		// An ack's payload lies in a batch's arena, which is used again; a record's does not.
		if d.Record == nil {
			payload = append([]byte(nil), payload...)
		}
		l.held = append(l.held, heldFrame{payload, d})
	default:
		s.end(d, codec.EndOffline)
	}
}

// release sends what was held for a session that has gone live.
func (s *shard) release(ses *session) {
	l := s.backlogs[refOf(ses.id)]
	if l == nil {
		return
	}
	held := l.held
	l.held = nil
	s.dropBacklogIfEmpty(ses, l)
	for _, h := range held {
		ses.pending -= int32(len(h.payload))
	}
	for _, h := range held {
		s.send(ses, h.payload, h.delivery)
	}
}

func (s *shard) flushEgress() {
	for i := range s.out {
		o := &s.out[i]
		if o.busy || o.fill == nil || len(o.fill.Commands) == 0 {
			continue
		}
		b := o.fill
		o.fill, o.busy = nil, true
		s.opts.Egress.Submit(b)
	}
}

func (s *shard) drainReturns() {
	for {
		select {
		case b := <-s.returns:
			s.onReturn(b)
		default:
			return
		}
	}
}

// onReturn takes the outcomes of a batch.
func (s *shard) onReturn(b *codec.EgressBatch) {
	for i := range b.Commands {
		c := &b.Commands[i]
		if c.Kind != codec.CommandFrame {
			continue
		}
		s.current = c.Session
		ses := s.lookup(c.Session)
		switch {
		case c.Outcome == codec.OutcomeFlushed:
			if ses != nil {
				ses.pending -= int32(len(c.Payload))
			}
			s.end(c.Delivery, codec.EndDelivered)
		case c.Outcome == codec.OutcomeBuffered && ses != nil:
			s.addPending(ses, c)
		default:
			if ses != nil {
				ses.pending -= int32(len(c.Payload))
			}
			s.end(c.Delivery, codec.EndOffline)
		}
	}
	o := &s.out[b.Loop]
	o.busy = false
	if cap(b.Arena) > maxKeptArena {
		return
	}
	b.Reset()
	o.spare = b
}
