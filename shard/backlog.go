package shard

import (
	"math"
	"time"

	"im-gateway/codec"
)

// backlog is what the kernel has not taken yet for one session, or what is held until `connected`.
// Only the few sessions that have one are in the map.
type backlog struct {
	frames []pendingFrame // in the order of the connection's stream
	held   []heldFrame
}

type pendingFrame struct {
	position uint64 // of its end in the stream
	size     int32
	since    int64 // Unix ms
	stored   int64 // as Command.Stored
	delivery codec.Delivery
}

type heldFrame struct {
	payload  []byte
	content  codec.Content
	delivery codec.Delivery
}

func (s *shard) backlogOf(ses *session) *backlog {
	r := refOf(ses.id)
	l := s.backlogs[r]
	if l == nil {
		l = &backlog{}
		s.backlogs[r] = l
		ses.backlogged = true
	}
	return l
}

func (s *shard) dropBacklogIfEmpty(ses *session, l *backlog) {
	if len(l.frames) == 0 && len(l.held) == 0 {
		delete(s.backlogs, refOf(ses.id))
		ses.backlogged = false
	}
}

// addPending notes a frame that waits in the connection's buffer.
func (s *shard) addPending(ses *session, c *codec.Command) {
	l := s.backlogOf(ses)
	l.frames = append(l.frames, pendingFrame{
		position: c.Position, size: int32(len(c.Payload)), since: s.now, stored: c.Stored, delivery: c.Delivery,
	})
	s.handling = codec.Delivery{}
	if len(l.frames) == 1 && ses.state == live {
		s.schedule(ses, s.nextDue(ses))
	}
}

// onFlushed settles the frames that the kernel has taken: all up to position.
func (s *shard) onFlushed(id codec.SessionID, position uint64) {
	ses := s.lookup(id)
	if ses == nil || !ses.backlogged {
		return
	}
	l := s.backlogs[refOf(id)]
	n := 0
	for n < len(l.frames) && l.frames[n].position <= position {
		s.wait(ses, -int(l.frames[n].size))
		s.observeDelivery(l.frames[n].stored, s.now*int64(time.Millisecond))
		s.end(l.frames[n].delivery, codec.EndDelivered)
		n++
	}
	clear(l.frames[:n])
	l.frames = l.frames[n:]
	s.dropBacklogIfEmpty(ses, l)
}

// settle ends what is still unsettled of a session that ends.
func (s *shard) settle(ses *session, end codec.End) {
	if ses.acks {
		s.settleUnacked(ses, end)
	}
	if !ses.backlogged {
		return
	}
	r := refOf(ses.id)
	l := s.backlogs[r]
	delete(s.backlogs, r)
	ses.backlogged = false
	for i := range l.frames {
		s.end(l.frames[i].delivery, end)
	}
	for i := range l.held {
		s.end(l.held[i].delivery, end)
	}
}

// settleAll ends every delivery that is still with the shard, which has stopped: what waits in its
// queues, in its batches, and in the kernel's stead. A batch that is with a loop may never come back;
// the loop writes its outcomes only, so the deliveries can be read.
func (s *shard) settleAll(end codec.End) {
	s.drainReturns()
	for i := range s.out {
		o := &s.out[i]
		for _, b := range []*codec.EgressBatch{o.sent, o.fill} {
			if b == nil {
				continue
			}
			for j := range b.Commands {
				s.end(b.Commands[j].Delivery, end)
			}
		}
		o.sent, o.fill = nil, nil
	}
	for r := range s.backlogs {
		s.settle(s.byRef(r), end)
	}
	for r := range s.unacked {
		s.settle(s.byRef(r), end)
	}
	for {
		select {
		case b := <-s.deliveries:
			for _, d := range b.Deliveries {
				if b.GiveUp {
					continue // it has ended, above or before
				}
				s.metrics.deliveries.Inc()
				s.end(d, end)
			}
		default:
			s.flushEnds()
			return
		}
	}
}

// deliveryDeadline is when the session's oldest waiting frame will have waited for too long, Unix ms.
func (s *shard) deliveryDeadline(ses *session) int64 {
	if ses.backlogged {
		if l := s.backlogs[refOf(ses.id)]; len(l.frames) > 0 {
			return l.frames[0].since + s.opts.DeliveryTimeout.Milliseconds()
		}
	}
	return math.MaxInt64
}
