package shard

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"

	"im-gateway/codec"
)

// outbox gathers the commands for one event loop while its last batch is under way.
type outbox struct {
	fill       *codec.EgressBatch
	deliveries bool                  // fill carries some
	spare      [2]*codec.EgressBatch // with fill and sent never more than two
	sent       *codec.EgressBatch    // with the loop; nil: none is

	// A batch that has come back waits here until the shard's next round. The shard is only woken for
	// it if somebody waits: the consumer for how deliveries ended, or the next batch for this loop.
	back atomic.Pointer[codec.EgressBatch]
	wake atomic.Bool
}

// A batch that grew during a burst does not hold its memory.
const (
	maxKeptArena    = 1 << 20
	maxKeptCommands = 1 << 13
)

// box is the batch being filled for the session's loop.
func (s *shard) box(ses *session) *codec.EgressBatch {
	o := &s.out[ses.id.Loop()]
	if o.fill == nil {
		o.fill, o.spare[0], o.spare[1] = o.spare[0], o.spare[1], nil
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
func (s *shard) frame(ses *session, payload []byte, content codec.Content, d codec.Delivery) {
	if s.tooMuch(ses, payload) {
		s.end(d, codec.EndSlowConsumer)
		return
	}
	var stored int64
	if d.Record != nil {
		stored = d.Record.Stored
		if s.meter != nil {
			s.meter.received(ses.user, len(payload))
		}
		if ses.acks {
			payload = s.awaitAck(ses, d)
			d = codec.Delivery{}
		}
	}
	s.wait(ses, len(payload))
	ses.out++
	c := s.command(ses)
	c.Kind, c.Payload, c.Content, c.Stored, c.Delivery = codec.CommandFrame, payload, content, stored, d
	if d.Record != nil {
		s.out[ses.id.Loop()].deliveries = true
	}
	s.handling = codec.Delivery{}
}

// wait notes that so many bytes more, or less, wait for the session.
func (s *shard) wait(ses *session, bytes int) {
	ses.pending += int32(bytes)
	s.counts.egress += bytes
}

// nodeFull tells whether more waits in all than the node may hold: then the consumer waits, and client
// messages are refused, until the clients have read, or those who owe most are closed.
func (s *shard) nodeFull() bool {
	return s.rules.NodeEgressBudget > 0 && s.nodeEgress+int64(s.counts.egress) > int64(s.rules.NodeEgressBudget)
}

// shedDebtors closes the sessions for which most is waiting until the shard's share of what is too
// much is gone.
func (s *shard) shedDebtors() {
	if !s.nodeFull() {
		return
	}
	excess := (s.nodeEgress - int64(s.rules.NodeEgressBudget)) / int64(s.opts.Shards)
	var debtors []*session
	for r := range s.backlogs {
		if ses := s.byRef(r); ses.state == closing {
			excess -= int64(ses.pending)
		} else {
			debtors = append(debtors, ses)
		}
	}
	slices.SortFunc(debtors, func(a, b *session) int { return cmp.Compare(b.pending, a.pending) })
	for _, ses := range debtors {
		if excess < 0 {
			return
		}
		excess -= int64(ses.pending)
		s.metrics.slow.Inc()
		s.close(ses, codec.CloseSlowConsumer, "too much is waiting to be read")
	}
}

// fairShare is what a session may owe, in bytes, while the node is full.
const fairShare = 64 << 10

// tooMuch closes a session for which more than its budget would wait, or more than its share while the
// node is full. A frame by itself is never too much, however large.
func (s *shard) tooMuch(ses *session, payload []byte) bool {
	all := int(ses.pending) + len(payload)
	if ses.pending == 0 || all <= s.rules.EgressBudget && (all <= fairShare || !s.nodeFull()) {
		return false
	}
	s.metrics.slow.Inc()
	s.close(ses, codec.CloseSlowConsumer, "too much is waiting to be read")
	return true
}

// send is frame, but for a session whose `connected` has not gone out yet: its frames are held.
func (s *shard) send(ses *session, payload []byte, content codec.Content, d codec.Delivery) {
	switch ses.state {
	case live:
		s.frame(ses, payload, content, d)
	case claiming:
		if s.tooMuch(ses, payload) {
			s.end(d, codec.EndSlowConsumer)
			return
		}
		s.wait(ses, len(payload))
		l := s.backlogOf(ses)
		// An ack's payload lies in a batch's arena, which is used again; a record's does not.
		if d.Record == nil {
			payload = append([]byte(nil), payload...)
		}
		l.held = append(l.held, heldFrame{payload, content, d})
		s.handling = codec.Delivery{}
	default:
		end := codec.EndOffline
		if ses.closeCode == codec.CloseSlowConsumer {
			end = codec.EndSlowConsumer
		}
		s.end(d, end)
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
		s.wait(ses, -len(h.payload))
	}
	for _, h := range held {
		s.send(ses, h.payload, h.content, h.delivery)
	}
}

func (s *shard) flushEgress() {
	for i := range s.out {
		o := &s.out[i]
		if o.fill == nil || len(o.fill.Commands) == 0 {
			continue
		}
		if o.sent != nil {
			// The mark is set before the look: either this look finds the batch, or its return the mark.
			o.wake.Store(true)
			s.takeReturn(o)
		}
		if o.sent != nil {
			continue
		}
		o.wake.Store(o.deliveries)
		o.sent, o.fill, o.deliveries = o.fill, nil, false
		s.opts.Egress.Submit(o.sent)
	}
}

func (s *shard) drainReturns() {
	for i := range s.out {
		s.takeReturn(&s.out[i])
	}
}

func (s *shard) takeReturn(o *outbox) {
	if o.back.Load() != nil { // cheaper than a swap
		s.onReturn(o.back.Swap(nil))
	}
}

// onReturn takes the outcomes of a batch.
func (s *shard) onReturn(b *codec.EgressBatch) {
	o := &s.out[b.Loop]
	o.sent = nil
	for i := range b.Commands {
		s.touch(b.Commands[i].Session)
	}
	s.forEach(len(b.Commands), func(i int) {
		if c := &b.Commands[i]; c.Kind == codec.CommandFrame {
			s.onOutcome(c, b.Written)
		}
	}, nil)
	if cap(b.Arena) > maxKeptArena || cap(b.Commands) > maxKeptCommands {
		return
	}
	b.Reset()
	o.spare[0], o.spare[1] = b, o.spare[0]
}

func (s *shard) onOutcome(c *codec.Command, written int64) {
	s.current, s.handling = c.Session, c.Delivery
	ses := s.lookup(c.Session)
	if c.Outcome == codec.OutcomeBuffered && ses != nil {
		s.addPending(ses, c)
		return
	}
	end := codec.EndOffline
	if c.Outcome == codec.OutcomeFlushed {
		end = codec.EndDelivered
		s.observeDelivery(c.Stored, written)
	}
	if ses != nil {
		s.wait(ses, -len(c.Payload))
		if end == codec.EndOffline && ses.closeCode == codec.CloseSlowConsumer {
			end = codec.EndSlowConsumer
		}
	}
	s.end(c.Delivery, end)
}

// observeDelivery counts how long a record took: from its time in Kafka, Unix ms, to its bytes in the
// socket, Unix ns. 0: not known. Who produced the record may have set any time: one ahead of ours is now.
func (s *shard) observeDelivery(stored, written int64) {
	if stored > 0 && written != 0 {
		s.deliverTime.Observe(written - min(stored, written/int64(time.Millisecond)+1)*int64(time.Millisecond))
	}
}
