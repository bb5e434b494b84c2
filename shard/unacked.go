package shard

import (
	"math"

	"im-gateway/codec"
)

// maxUnacked is how many deliveries a session may leave unacknowledged: beyond it the oldest ends.
const maxUnacked = 256

// unacked is the deliveries of a session whose client acknowledges them, oldest first.
type unacked struct {
	last uint64 // the delivery_id given last
	list []awaited
}

type awaited struct {
	id       uint64
	until    int64 // Unix ms
	delivery codec.Delivery
}

// awaitAck gives a delivery its delivery_id and returns the frame that carries it.
func (s *shard) awaitAck(ses *session, d codec.Delivery) []byte {
	q := s.unacked[refOf(ses.id)]
	if len(q.list) == maxUnacked {
		s.endUnacked(q, 1, codec.EndUnacked)
	}
	q.last++
	q.list = append(q.list, awaited{q.last, s.now + s.opts.AckTimeout.Milliseconds(), d})
	s.handling = codec.Delivery{}
	if len(q.list) == 1 && ses.state == live {
		s.schedule(ses, s.nextDue(ses))
	}
	b := s.box(ses)
	start := len(b.Arena)
	b.Arena = ses.protocol.AppendDeliveryID(b.Arena, d.Record.FrameFor(ses.protocol), q.last)
	return b.Arena[start:len(b.Arena):len(b.Arena)]
}

// onAcked settles the deliveries up to id, which is the client's: one below 1 names none.
func (s *shard) onAcked(session codec.SessionID, id int64) {
	ses := s.lookup(session)
	if ses == nil || !ses.acks {
		return
	}
	q := s.unacked[refOf(session)]
	n := 0
	for n < len(q.list) && int64(q.list[n].id) <= id {
		n++
	}
	s.endUnacked(q, n, codec.EndDelivered)
}

// endUnacked ends the first n.
func (s *shard) endUnacked(q *unacked, n int, end codec.End) {
	for i := range q.list[:n] {
		s.end(q.list[i].delivery, end)
	}
	rest := copy(q.list, q.list[n:])
	clear(q.list[rest:])
	q.list = q.list[:rest]
}

// expireUnacked ends what has waited for too long.
func (s *shard) expireUnacked(ses *session) {
	q := s.unacked[refOf(ses.id)]
	n := 0
	for n < len(q.list) && q.list[n].until <= s.now {
		n++
	}
	s.endUnacked(q, n, codec.EndUnacked)
}

// ackDeadline is when the oldest will have waited for too long, Unix ms.
func (s *shard) ackDeadline(ses *session) int64 {
	if ses.acks {
		if q := s.unacked[refOf(ses.id)]; len(q.list) > 0 {
			return q.list[0].until
		}
	}
	return math.MaxInt64
}

// settleUnacked ends all when the session ends.
func (s *shard) settleUnacked(ses *session, end codec.End) {
	r := refOf(ses.id)
	q := s.unacked[r]
	delete(s.unacked, r)
	ses.acks = false
	if end != codec.EndShutdown {
		end = codec.EndUnacked
	}
	s.endUnacked(q, len(q.list), end)
}

// giveUpUnacked ends a delivery out of turn.
func (s *shard) giveUpUnacked(ses *session, d codec.Delivery) {
	q := s.unacked[refOf(ses.id)]
	for i := range q.list {
		if q.list[i].delivery == d {
			q.list = append(q.list[:i], q.list[i+1:]...)
			s.end(d, codec.EndUnacked)
			return
		}
	}
}
