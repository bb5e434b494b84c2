package shard

import "im-gateway/codec"

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
	delivery codec.Delivery
}

type heldFrame struct {
	payload  []byte
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
		position: c.Position, size: int32(len(c.Payload)), since: s.now, delivery: c.Delivery,
	})
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
		ses.pending -= l.frames[n].size
		s.end(l.frames[n].delivery, codec.EndDelivered)
		n++
	}
	clear(l.frames[:n])
	l.frames = l.frames[n:]
	s.dropBacklogIfEmpty(ses, l)
}

// settle ends what is still unsettled of a session that ends.
func (s *shard) settle(ses *session, end codec.End) {
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

// settleAll ends every delivery that is still with the shard, when it stops.
func (s *shard) settleAll(end codec.End) {
	s.drainReturns()
	for i := range s.out {
		if b := s.out[i].fill; b != nil {
			for j := range b.Commands {
				s.end(b.Commands[j].Delivery, end)
			}
			s.out[i].fill = nil
		}
	}
	for r := range s.backlogs {
		s.settle(s.byRef(r), end)
	}
	for {
		select {
		case b := <-s.deliveries:
			for _, d := range b.Deliveries {
				s.metrics.deliveries.Inc()
				s.end(d, end)
			}
		default:
			return
		}
	}
}

// sweepBacklogs closes the sessions whose oldest waiting frame is too old.
func (s *shard) sweepBacklogs() {
	limit := s.now - s.opts.DeliveryTimeout.Milliseconds()
	for r, l := range s.backlogs {
		if len(l.frames) > 0 && l.frames[0].since < limit {
			if ses := s.byRef(r); ses.state != closing {
				s.metrics.slow.Inc()
				s.close(ses, codec.CloseSlowConsumer, "nothing was read for too long")
			}
		}
	}
}
