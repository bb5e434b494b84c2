package shard

import (
	"time"

	"im-gateway/codec"
)

// tickLength is the wheel's resolution: heartbeats, expiries and deadlines are met within one tick.
const tickLength = 100 * time.Millisecond

// tickWork bounds how many sessions are looked at before other work has its turn, so that a tick never
// holds the shard for long; what is left is carried on with at once.
const tickWork = 2048

// wheel is the timing wheel: a circle of lists of sessions, linked through the sessions themselves.
// A session is in at most one list, due when the wheel gets there.
type wheel struct {
	slots []ref
	now   uint32 // the tick that has been reached
}

// newWheel returns a wheel that can hold sessions due up to span ahead.
func newWheel(span time.Duration) wheel {
	w := wheel{slots: make([]ref, int(span/tickLength)+2)}
	for i := range w.slots {
		w.slots[i] = noRef
	}
	return w
}

// ticks converts a duration, at least one tick.
func ticks(d time.Duration) uint32 { return max(1, uint32((d+tickLength-1)/tickLength)) }

// schedule makes ses due in n ticks, at the most the wheel's span.
func (s *shard) schedule(ses *session, n uint32) {
	s.unschedule(ses)
	w := &s.wheel
	n = min(max(n, 1), uint32(len(w.slots)-1))
	slot := (w.now + n) % uint32(len(w.slots))
	first := w.slots[slot]
	ses.wheelPrev, ses.wheelNext = noRef, first
	if first != noRef {
		s.byRef(first).wheelPrev = refOf(ses.id)
	}
	w.slots[slot] = refOf(ses.id)
	ses.slot = uint16(slot) + 1
}

func (s *shard) unschedule(ses *session) {
	if ses.slot == 0 {
		return
	}
	if ses.wheelPrev == noRef {
		s.wheel.slots[ses.slot-1] = ses.wheelNext
	} else {
		s.byRef(ses.wheelPrev).wheelNext = ses.wheelNext
	}
	if ses.wheelNext != noRef {
		s.byRef(ses.wheelNext).wheelPrev = ses.wheelPrev
	}
	ses.slot = 0
}

// turn advances the wheel towards target and handles what is due, at most tickWork sessions. It
// returns false when there is more to do.
func (s *shard) turn(target uint32) bool {
	w := &s.wheel
	if span := uint32(len(w.slots)); int32(target-w.now) > int32(span) {
		w.now = target - span // after a long stop of the process one turn finds every session
	}
	for work := 0; ; {
		slot := w.now % uint32(len(w.slots))
		for w.slots[slot] != noRef {
			if work++; work > tickWork {
				return false
			}
			ses := s.byRef(w.slots[slot])
			s.unschedule(ses)
			s.current = ses.id
			s.due(ses)
		}
		if int32(target-w.now) <= 0 {
			return true
		}
		w.now++
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
	if tick-ses.pinged >= s.heartbeatTicks {
		ses.pinged = tick
		s.metrics.heartbeats.Inc()
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
	until := min(ses.expiresAt, s.deliveryDeadline(ses)) - s.now
	if until < int64(next)*tickLength.Milliseconds() {
		next = ticks(time.Duration(max(until, 0)) * time.Millisecond)
	}
	return next
}
