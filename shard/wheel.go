package shard

import (
	"time"

	"im-gateway/codec"
)

// tickLength is the wheel's resolution: heartbeats, expiries and deadlines are met within one tick.
const tickLength = 100 * time.Millisecond

// A tick never holds the shard for long: it looks at so many sessions, and works for so long, before
// other work has its turn; what is left is carried on with at once.
const (
	tickWork = 2048
	tickTime = time.Millisecond / 2
)

// Sessions are touched, and the clock is read, once for so many that are due.
const dueBatch = 64

// maxKeptSlot keeps the memory of a storm, when many are due at once, from staying.
const maxKeptSlot = 1 << 14

// wheel is the timing wheel: a circle of lists of sessions, due when the wheel gets there. A session
// knows the slot in which it is due; wherever else it is listed counts for nothing, so that nothing
// needs to be taken out of a list. It is listed again only to be due earlier.
type wheel struct {
	slots [][]ref
	now   uint32 // the tick that has been reached
}

// newWheel returns a wheel that can hold sessions due up to span ahead.
func newWheel(span time.Duration) wheel {
	return wheel{slots: make([][]ref, int(span/tickLength)+2)}
}

// ticks converts a duration, at least one tick.
func ticks(d time.Duration) uint32 { return max(1, uint32((d+tickLength-1)/tickLength)) }

// schedule makes ses due in n ticks, at the most the wheel's span, unless it is due before.
func (s *shard) schedule(ses *session, n uint32) {
	w := &s.wheel
	size := uint32(len(w.slots))
	n = min(max(n, 1), size-1)
	if ses.slot != 0 && (uint32(ses.slot)-1+size-w.now%size)%size <= n {
		return
	}
	slot := (w.now + n) % size
	w.slots[slot] = append(w.slots[slot], refOf(ses.id))
	ses.slot = uint16(slot) + 1
}

func unschedule(ses *session) { ses.slot = 0 }

// turn advances the wheel towards target and handles what is due, within the bounds of a tick that
// began at the given time. It returns false when there is more to do.
func (s *shard) turn(target uint32, began time.Time) bool {
	w := &s.wheel
	if span := uint32(len(w.slots)); int32(target-w.now) > int32(span) {
		w.now = target - span // after a long stop of the process one turn finds every session
	}
	for work := 0; ; {
		slot := w.now % uint32(len(w.slots))
		for len(w.slots[slot]) > 0 {
			n := min(len(w.slots[slot]), dueBatch)
			if work += n; work > tickWork || work > n && s.opts.Now().Sub(began) > tickTime {
				return false
			}
			s.turnSlot(slot, n)
		}
		if cap(w.slots[slot]) > maxKeptSlot {
			w.slots[slot] = nil
		}
		if int32(target-w.now) <= 0 {
			return true
		}
		w.now++
	}
}

// turnSlot handles the last n of a slot. Nothing that it does adds to the slot.
func (s *shard) turnSlot(slot uint32, n int) {
	list := &s.wheel.slots[slot]
	for _, r := range (*list)[len(*list)-n:] {
		if ses := s.byRef(r); ses.slot != 0 && ses.expiresAt != 0 {
			s.touched++
		}
	}
	for range n {
		last := len(*list) - 1
		ses := s.byRef((*list)[last])
		*list = (*list)[:last]
		if uint32(ses.slot) != slot+1 {
			continue
		}
		unschedule(ses)
		s.current = ses.id
		s.due(ses)
	}
}

// due does what a session's time has come for and schedules the next time.
func (s *shard) due(ses *session) {
	now := s.now
	if ses.state == closing {
		return
	}
	if ses.expiresAt <= now {
		s.metrics.expired.Inc()
		s.close(ses, codec.CloseTokenExpired, "token expired")
		return
	}
	if ses.state == claiming {
		s.goLive(ses, true)
		return // goLive has scheduled it
	}
	tick := s.wheel.now
	if s.deliveryDeadline(ses) <= now {
		s.metrics.slow.Inc()
		s.close(ses, codec.CloseSlowConsumer, "nothing was read for too long")
		return
	}
	if ses.acks {
		s.expireUnacked(ses)
	}
	if tick-ses.pinged >= s.heartbeatTicks {
		ses.pinged = tick
		s.counts.heartbeats++
		s.command(ses).Kind = codec.CommandPing
	}
	if tick-ses.refreshed >= s.refreshTicks {
		ses.refreshed = tick
		s.refreshPresence(ses)
	}
	s.schedule(ses, s.nextDue(ses))
}

// left is what is left of a period; 0: it is over.
func left(period, elapsed uint32) uint32 { return period - min(period, elapsed) }

// nextDue is in how many ticks a live session is to be looked at again.
func (s *shard) nextDue(ses *session) uint32 {
	tick := s.wheel.now
	next := min(left(s.heartbeatTicks, tick-ses.pinged), left(s.refreshTicks, tick-ses.refreshed))
	until := min(ses.expiresAt, s.deliveryDeadline(ses), s.ackDeadline(ses)) - s.now
	if until < int64(next)*tickLength.Milliseconds() {
		next = ticks(time.Duration(max(until, 0)) * time.Millisecond)
	}
	return next
}
