package shard

import (
	"slices"
	"testing"
	"time"

	"im-gateway/codec"
)

// check compares what the shard has with what can be counted.
func (m *model) check() {
	s := m.s
	sessions, linked, waiting := 0, 0, 0
	pending, inFlight := m.underWay()
	s.each(func(ses *session) {
		sessions++
		if ses.state != closing {
			linked++
			if ses.slot == 0 {
				m.t.Fatalf("%s is in no slot of the wheel", stateNames[ses.state])
			}
		}
		if ses.backlogged != (s.backlogs[refOf(ses.id)] != nil) {
			m.t.Fatal("the backlog and its mark differ")
		}
		if int(ses.pending) != pending[ses.id] || int(ses.inFlight) != inFlight[ses.id] {
			m.t.Fatalf("%d bytes pending, %d in flight; there are %d and %d",
				ses.pending, ses.inFlight, pending[ses.id], inFlight[ses.id])
		}
		if int(ses.inFlight) > s.rules.MaxSessionInFlight {
			m.t.Fatalf("%d in flight", ses.inFlight)
		}
	})
	if n := int(s.sessions.Load()); n != sessions {
		m.t.Fatalf("%d sessions counted, %d there", n, sessions)
	}
	listed := 0
	for user, r := range s.users {
		for ; r != noRef; r = s.byRef(r).next {
			listed++
			if ses := s.byRef(r); ses.user != user || ses.state == closing || ses.state == free {
				m.t.Fatalf("%q lists a session of %q, %s", user, ses.user, stateNames[ses.state])
			}
		}
	}
	if listed != linked || int(s.userNum.Load()) != len(s.users) {
		m.t.Fatalf("%d sessions linked, %d live; %d users counted, %d there", listed, linked, s.userNum.Load(), len(s.users))
	}
	for slot, list := range s.wheel.slots {
		listed := map[ref]bool{}
		for _, r := range list {
			if int(s.byRef(r).slot) == slot+1 && !listed[r] {
				listed[r] = true
				waiting++
			}
		}
	}
	if waiting != linked {
		m.t.Fatalf("%d sessions in the wheel, %d live", waiting, linked)
	}
	if ends := m.sumOfEnds(); ends != int64(len(m.ended)) {
		m.t.Fatalf("%d ends counted, %d told", ends, len(m.ended))
	}
}

// underWay counts, by session, the bytes on their way to the kernel and the records on theirs to Kafka.
func (m *model) underWay() (pending, inFlight map[codec.SessionID]int) {
	pending, inFlight = map[codec.SessionID]int{}, map[codec.SessionID]int{}
	s := m.s
	batches := []*codec.EgressBatch{}
	for n := range m.loops {
		if b := s.out[n].sent; b != nil { // with the loop, or coming back
			batches = append(batches, b)
		}
		if b := s.out[n].fill; b != nil {
			batches = append(batches, b)
		}
	}
	for _, b := range batches {
		for i := range b.Commands {
			pending[b.Commands[i].Session] += len(b.Commands[i].Payload)
		}
	}
	for r, l := range s.backlogs {
		id := s.byRef(r).id
		for _, f := range l.frames {
			pending[id] += int(f.size)
		}
		for _, h := range l.held {
			pending[id] += len(h.payload)
		}
	}
	upstream := append([]*codec.UpstreamBatch{s.up}, m.broker...)
	for range len(m.queue) {
		b := <-m.queue
		upstream = append(upstream, b)
		m.queue <- b
	}
	for _, b := range upstream {
		for _, u := range b.Records {
			inFlight[u.Session]++
		}
	}
	return pending, inFlight
}

func (m *model) sumOfEnds() (sum int64) {
	for _, n := range m.s.set.Stats().Ends {
		sum += n
	}
	return sum
}

// settle ends the world: all that is under way arrives and every connection is lost.
func (m *model) settle() {
	m.noRedis, m.noRoom, m.panics = false, false, false
	m.rest(func(l *modelLoop, c *modelConn) {
		if c.flushed < c.written {
			c.flushed = c.written
			l.events = append(l.events, codec.Event{Kind: codec.EventFlushed, Session: c.id, Value: int64(c.flushed)})
		}
	})
	// Who is still there has been answered everything, and nothing waits for the kernel.
	for _, c := range m.conns {
		ses := m.s.lookup(c.id)
		if c.lost || ses == nil || ses.state != live {
			continue
		}
		m.survivors++
		for _, name := range c.sent {
			if c.answered[name] == 0 {
				m.t.Fatalf("%s was not answered", name)
			}
			if c.stored[name] && !slices.Contains(c.acks, name) {
				m.t.Fatalf("%s was stored and not acked", name)
			}
		}
		if c.flushed == c.written && ses.backlogged {
			m.t.Fatal("everything was flushed, and frames wait")
		}
	}
	m.rest(func(l *modelLoop, c *modelConn) { m.lose(l, c, codec.CloseAbnormal) })
	for len(m.ops) > 0 || len(m.s.ops) > 0 {
		m.redis()
		m.wake(func() {})
	}
}

// rest lets what is under way arrive, and does each to every connection now and then.
func (m *model) rest(each func(*modelLoop, *modelConn)) {
	for range 100 {
		for n := range m.loops {
			l := &m.loops[n]
			for _, c := range l.live {
				if c != nil && m.rnd.IntN(4) == 0 {
					each(l, c)
				}
			}
			m.offer(n)
			m.execute(n)
		}
		m.answer()
		m.redis()
		m.tick(20 * time.Millisecond)
	}
	m.wake(m.s.drainReturns)
}

// TestLedger: whatever the order of things, every delivery ends once, nothing is acked that was not
// stored, acks keep the broker's order, and nobody is left over.
func TestLedger(t *testing.T) {
	var reached [codec.NumEnds]bool
	panics, acks, survivors := int64(0), 0, 0
	for seed := range uint64(30) {
		m := newModel(t, seed)
		for i := range 6000 {
			m.step()
			if i%50 == 0 {
				m.check()
			}
		}
		m.settle()
		m.check()
		st := m.s.set.Stats()
		if st.Sessions != 0 || st.Users != 0 || st.InFlight != 0 || m.s.flight.n != 0 || len(m.s.backlogs) != 0 {
			t.Fatalf("seed %d: left over: %+v, %d in flight, %d backlogs", seed, st, m.s.flight.n, len(m.s.backlogs))
		}
		if m.s.outstanding != 0 || len(m.s.ops) != 0 {
			t.Fatalf("seed %d: %d presence operations outstanding, %d waiting", seed, m.s.outstanding, len(m.s.ops))
		}
		if len(m.ended) != m.given {
			t.Fatalf("seed %d: %d deliveries, %d ended", seed, m.given, len(m.ended))
		}
		for _, c := range m.conns {
			acks += len(c.acks)
			if !inOrder(c.acks, c.ackOrder) {
				t.Fatalf("seed %d: acks %v, the broker's order %v", seed, c.acks, c.ackOrder)
			}
		}
		for _, end := range m.ended {
			reached[end] = true
		}
		panics += value(m.s.metrics.panics)
		survivors += m.survivors
	}
	for _, end := range []codec.End{codec.EndDelivered, codec.EndOffline, codec.EndSlowConsumer, codec.EndExpired} {
		if !reached[end] {
			t.Errorf("no delivery ended %s: the test does not try it", end)
		}
	}
	t.Logf("%d panics, %d acks, %d survivors", panics, acks, survivors)
	if panics < 100 || acks < 1000 || survivors < 100 {
		t.Error("the test does not try enough")
	}
}

// inOrder tells whether list is a subsequence of all.
func inOrder(list, all []string) bool {
	for _, x := range all {
		if len(list) > 0 && list[0] == x {
			list = list[1:]
		}
	}
	return len(list) == 0
}
