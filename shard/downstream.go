package shard

import (
	"unicode/utf8"

	"im-gateway/codec"
)

// expirySkew is how far the sender's clock may be ahead of ours, in ms.
const expirySkew = 5000

// ownerEnds gathers the ends for one consumer.
type ownerEnds struct {
	owner codec.EndSink
	list  []codec.Ended
}

func (s *shard) onDeliveries(b *codec.DeliveryBatch) {
	if b.GiveUp {
		s.forEach(len(b.Deliveries), func(i int) { s.giveUp(b.Deliveries[i]) }, nil)
		return
	}
	s.metrics.deliveries.Add(float64(len(b.Deliveries)))
	s.forEach(len(b.Deliveries), func(i int) { s.deliver(b.Deliveries[i]) }, nil)
}

// deliver decides what becomes of one record for one target.
func (s *shard) deliver(d codec.Delivery) {
	s.current, s.handling, s.delivering = 0, d, d
	rec := d.Record
	user := rec.Targets[d.Target]
	if rec.ExpireAt > 0 && rec.ExpireAt < s.now-expirySkew {
		s.end(d, codec.EndExpired)
		return
	}
	if s.opts.MaxSessions > 1 {
		s.deliverToAll(d, user)
		return
	}
	r, online := s.users[user]
	if !online || rec.DeviceID != "" && s.deviceOf(s.byRef(r)).id != rec.DeviceID {
		s.end(d, codec.EndOffline)
		return
	}
	s.sendOrKick(s.byRef(r), d)
}

// sendOrKick does to a session what the record says.
func (s *shard) sendOrKick(ses *session, d codec.Delivery) {
	if d.Record.Kick {
		s.close(ses, codec.CloseKicked, kickReason(d.Record.KickReason))
		s.end(d, codec.EndDelivered)
		return
	}
	s.current = ses.id
	s.send(ses, d.Record.FrameFor(ses.protocol), d.Record.Content, d)
}

// deliverToAll delivers to each of the user's sessions that the record is for.
func (s *shard) deliverToAll(d codec.Delivery, user string) {
	var targets [maxUserSessions]*session
	n, elsewhere := 0, false
	s.userSessions(user, func(ses *session) {
		elsewhere = elsewhere || ses.elsewhere
		if n < len(targets) && (d.Record.DeviceID == "" || s.deviceOf(ses).id == d.Record.DeviceID) {
			targets[n] = ses
			n++
		}
	})
	if n == 0 {
		s.end(d, codec.EndOffline)
		return
	}
	if elsewhere = elsewhere && !d.Record.Forwarded; n > 1 || elsewhere {
		s.counts.deliveries += n - 1
		s.report(codec.Ended{Delivery: d, Sessions: int32(n), Elsewhere: elsewhere})
	}
	for i, ses := range targets[:n] {
		s.remaining = n - 1 - i
		s.handling = d
		s.sendOrKick(ses, d)
	}
}

// giveUp ends what is still open of a delivery that has taken too long.
func (s *shard) giveUp(d codec.Delivery) {
	s.current = 0
	s.userSessions(d.Record.Targets[d.Target], func(ses *session) {
		if ses.acks {
			s.giveUpUnacked(ses, d)
		}
		if !ses.backlogged {
			return
		}
		l := s.backlogs[refOf(ses.id)]
		for i := range l.frames {
			if f := &l.frames[i]; f.delivery == d {
				f.delivery = codec.Delivery{}
				s.end(d, codec.EndSlowConsumer)
			}
		}
	})
}

// maxCloseReason is what a close frame has room for, in bytes.
const maxCloseReason = 123

func kickReason(reason string) string {
	if reason == "" {
		return "kicked"
	}
	for len(reason) > maxCloseReason {
		_, size := utf8.DecodeLastRuneInString(reason)
		reason = reason[:len(reason)-size]
	}
	return reason
}

// kick closes the user's sessions, or only the one named, and returns how many.
func (s *shard) kick(user string, only codec.SessionID, code codec.CloseCode, reason string) (closed int) {
	s.userSessions(user, func(ses *session) {
		if only != 0 && ses.id != only {
			return
		}
		if code == codec.CloseReplaced {
			ses.superseded = s.opts.MaxSessions == 1
		}
		s.close(ses, code, reason)
		closed++
	})
	return closed
}

// end settles one delivery; one without a record carried something else.
func (s *shard) end(d codec.Delivery, end codec.End) {
	if d.Record == nil {
		return
	}
	s.handling = codec.Delivery{}
	s.counts.ends[end]++
	s.report(codec.Ended{Delivery: d, End: end})
}

// report tells a record's owner, in the order of the calls.
func (s *shard) report(e codec.Ended) {
	owner := e.Record.Owner
	if owner == nil {
		return
	}
	for i := range s.ends {
		if s.ends[i].owner == owner {
			s.ends[i].list = append(s.ends[i].list, e)
			return
		}
	}
	s.ends = append(s.ends, ownerEnds{owner, []codec.Ended{e}})
}

func (s *shard) flushEnds() {
	s.flushCounts() // what came back during the flush, too
	ends := s.ends
	s.ends = ends[:0]
	s.forEach(len(ends), func(i int) { ends[i].owner.Ends(ends[i].list) }, nil)
	clear(ends)
}
