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
	s.metrics.deliveries.Add(float64(len(b.Deliveries)))
	s.forEach(len(b.Deliveries), func(i int) { s.deliver(b.Deliveries[i]) }, nil)
}

// deliver decides what becomes of one record for one target.
func (s *shard) deliver(d codec.Delivery) {
	s.current, s.handling = 0, d
	rec := d.Record
	user := rec.Targets[d.Target]
	if rec.ExpireAt > 0 && rec.ExpireAt+expirySkew < s.now {
		s.end(d, codec.EndExpired)
		return
	}
	r, online := s.users[user]
	if !online {
		s.end(d, codec.EndOffline)
		return
	}
	if rec.Kick {
		s.kick(user, 0, codec.CloseKicked, kickReason(rec.KickReason))
		s.end(d, codec.EndDelivered)
		return
	}
	// One session per user: the newest is the first.
	ses := s.byRef(r)
	s.current = ses.id
	s.send(ses, rec.Frame, d)
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
			ses.superseded = true
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
	owner := d.Record.Owner
	if owner == nil {
		return
	}
	for i := range s.ends {
		if s.ends[i].owner == owner {
			s.ends[i].list = append(s.ends[i].list, codec.Ended{Delivery: d, End: end})
			return
		}
	}
	s.ends = append(s.ends, ownerEnds{owner, []codec.Ended{{Delivery: d, End: end}}})
}

func (s *shard) flushEnds() {
	s.flushCounts() // what came back during the flush, too
	ends := s.ends
	s.ends = ends[:0]
	s.forEach(len(ends), func(i int) { ends[i].owner.Ends(ends[i].list) }, nil)
	clear(ends)
}
