package shard

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"im-gateway/codec"
)

// crowd is a world that holds several sessions per user.
func crowd(t *testing.T, policy int, oneKind bool) *world {
	w := newWorld(t, func(o *Options) { o.MaxSessions, o.ReplaceKind = policy, oneKind })
	w.run()
	return w
}

func (w *world) openDevice(id codec.SessionID, user, device, kind string, acks bool) {
	w.t.Helper()
	w.offer(codec.Event{Kind: codec.EventOpen, Session: id, Open: &codec.Open{
		User: user, ExpiresAt: 1 << 60, ConnectedAt: 1, DeviceID: device, Device: kind, Acks: acks}})
	w.eventually(func() bool { return len(w.raw(id)) > 0 })
}

func TestSessionsOfAUser(t *testing.T) {
	w := crowd(t, 3, true)
	for i := range uint32(3) {
		w.openDevice(sessionID(i, 1), "alice", fmt.Sprint("d", i), "", false)
	}
	w.openDevice(sessionID(3, 1), "alice", "d1", "", false) // the device again
	w.eventually(func() bool { return w.closeCode(sessionID(1, 1)) == codec.CloseReplaced })
	w.openDevice(sessionID(4, 1), "alice", "d4", "phone", false) // the oldest goes
	w.eventually(func() bool { return w.closeCode(sessionID(0, 1)) == codec.CloseReplaced })
	w.openDevice(sessionID(5, 1), "alice", "d5", "phone", false) // one phone
	w.eventually(func() bool { return w.closeCode(sessionID(4, 1)) == codec.CloseReplaced })
	for _, id := range []uint32{2, 3, 5} {
		if c := w.closeCode(sessionID(id, 1)); c != 0 {
			t.Errorf("session %d was closed with %d", id, c)
		}
	}
	list, err := w.set.Sessions(t.Context(), "alice")
	if err != nil || len(list) != 3 || list[0].DeviceID != "d5" || list[0].Device != "phone" {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestEverySessionGetsTheRecord(t *testing.T) {
	w := crowd(t, 4, false)
	for i := range uint32(3) {
		w.openDevice(sessionID(i, 1), "alice", fmt.Sprint("d", i), "", false)
	}
	s := &splits{}
	w.deliver(rec(s, "alice"))
	w.eventually(func() bool { return s.count(codec.EndDelivered) == 3 })
	if n := s.sessions(); n != 3 {
		t.Errorf("the owner was told of %d sessions, want 3", n)
	}
	one := rec(s, "alice")
	one.DeviceID = "d1"
	w.deliver(one)
	w.eventually(func() bool { return s.count(codec.EndDelivered) == 4 })
	one = rec(s, "alice")
	one.DeviceID = "nowhere"
	w.deliver(one)
	w.eventually(func() bool { return s.count(codec.EndOffline) == 1 })
	for i, want := range []int{1, 2, 1} {
		got := 0
		for _, f := range w.raw(sessionID(uint32(i), 1)) {
			if strings.Contains(f, "new-message") {
				got++
			}
		}
		if got != want {
			t.Errorf("session %d got %d records, want %d", i, got, want)
		}
	}
	ends, err := w.set.Push(t.Context(), rec(nil, "alice", "bob"))
	if err != nil || ends[0] != codec.EndDelivered || ends[1] != codec.EndOffline {
		t.Errorf("push: %v, %v", ends, err)
	}
	w.deliver(func() *codec.Downstream { d := rec(s, "alice"); d.Kick = true; return d }())
	for i := range uint32(3) {
		w.eventually(func() bool { return w.closeCode(sessionID(i, 1)) == codec.CloseKicked })
	}
}

// TestOwnerIsToldOfSessionsElsewhere: by what the claim has said, but not for a record that was forwarded.
func TestOwnerIsToldOfSessionsElsewhere(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.MaxSessions = 3 })
	w.presence = func(op PresenceOp) *PresenceResult {
		return &PresenceResult{Kind: op.Kind, Session: op.Session, Version: 1, Elsewhere: true,
			Evicted: []Evicted{{"other", "s9"}}}
	}
	w.run()
	w.openDevice(sessionID(0, 1), "alice", "", "", false)
	s := &splits{}
	w.deliver(rec(s, "alice"))
	w.eventually(func() bool { return s.count(codec.EndDelivered) == 1 && s.elsewhere() == 1 })
	hopped := rec(s, "alice")
	hopped.Forwarded = true
	w.deliver(hopped)
	w.eventually(func() bool { return s.count(codec.EndDelivered) == 2 })
	if s.elsewhere() != 1 {
		t.Error("a forwarded record is to be forwarded again")
	}
	if len(w.replaced) != 1 || w.replaced[0] != "alice other s9" {
		t.Errorf("told the other gateways: %q", w.replaced)
	}
}

// splits counts what an owner is told.
type splits struct {
	sink
	n, others int
}

// Ends implements codec.EndSink.
func (s *splits) Ends(list []codec.Ended) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range list {
		if e.End == codec.EndNone {
			s.n += int(e.Sessions)
			if e.Elsewhere {
				s.others++
			}
			continue
		}
		if s.ends == nil {
			s.ends = map[codec.End]int{}
		}
		s.ends[e.End]++
	}
}

func (s *splits) sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *splits) elsewhere() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.others
}

// eventually waits for a condition that takes its own locks.
func (w *world) eventually(ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatal("it did not come true")
		}
	}
}

func acked(id codec.SessionID, upTo int64) codec.Event {
	return codec.Event{Kind: codec.EventAcked, Session: id, Value: upTo}
}

func TestDeliveryEndsWithTheAck(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	id := sessionID(0, 1)
	w.openDevice(id, "alice", "", "", true)
	s := newSink()
	for range 3 {
		w.deliver(rec(s, "alice"))
	}
	w.eventually(func() bool { return len(w.raw(id)) == 4 })
	for i, f := range w.raw(id)[1:] {
		if want := fmt.Sprintf(`,"delivery_id":%d}`, i+1); !strings.HasSuffix(f, want) {
			t.Errorf("frame %q, want it to end in %s", f, want)
		}
	}
	if s.total() != 0 {
		t.Errorf("%d ended before an ack", s.total())
	}
	w.offer(acked(id, -7), acked(id, math.MinInt64), acked(id, 0), acked(id, 2))
	w.eventually(func() bool { return s.count(codec.EndDelivered) >= 2 })
	if n := s.count(codec.EndDelivered); n != 2 {
		t.Errorf("%d delivered, though the client has acknowledged two", n)
	}
	w.offer(acked(id, 1), acked(id, math.MaxInt64))
	w.eventually(func() bool { return s.count(codec.EndDelivered) == 3 })
	w.deliver(rec(s, "alice"))
	w.eventually(func() bool { return len(w.raw(id)) == 5 })
	w.offer(codec.Event{Kind: codec.EventClose, Session: id, Code: codec.CloseAbnormal})
	w.eventually(func() bool { return s.count(codec.EndUnacked) == 1 })
}

func TestUnackedEnds(t *testing.T) {
	q := newQuiet(t, time.Now)
	now := time.UnixMilli(1 << 40)
	q.s.opts.Now = func() time.Time { return now }
	q.s.started = now
	q.s.clock()
	b := codec.NewIngressBatch(0)
	b.Events = append(b.Events, codec.Event{Kind: codec.EventOpen, Session: sessionID(0, 1), Open: &codec.Open{
		User: "alice", ExpiresAt: 1 << 60, Acks: true}})
	q.s.onIngress(b)
	q.s.onPresence([]PresenceResult{{Kind: Claim, Session: sessionID(0, 1), Version: 1}})
	q.settle()
	s := newSink()
	send := func(n int) (list []codec.Delivery) {
		for range n {
			list = append(list, codec.Delivery{Record: rec(s, "alice")})
		}
		q.s.onDeliveries(&codec.DeliveryBatch{Deliveries: list})
		q.settle()
		return list
	}
	// More than the session may leave: the oldest end.
	all := send(maxUnacked + 3)
	if n := s.count(codec.EndUnacked); n != 3 {
		t.Errorf("%d ended, want 3", n)
	}
	// Given up out of turn, once, whatever is asked twice.
	q.s.onDeliveries(&codec.DeliveryBatch{Deliveries: all[:10], GiveUp: true})
	q.s.onDeliveries(&codec.DeliveryBatch{Deliveries: all[:10], GiveUp: true})
	q.settle()
	if n := s.count(codec.EndUnacked); n != 10 {
		t.Errorf("%d ended, want 10", n)
	}
	// And after the timeout all the others; the session lives on.
	now = now.Add(31 * time.Second)
	q.s.clock()
	q.s.onTick()
	q.settle()
	if n := s.count(codec.EndUnacked); n != maxUnacked+3 {
		t.Errorf("%d ended, want %d", n, maxUnacked+3)
	}
	if ses := q.s.lookup(sessionID(0, 1)); ses == nil || ses.state != live {
		t.Error("the session was closed")
	}
	send(1)
	q.s.onAcked(sessionID(0, 1), 1<<60)
	q.settle()
	if s.count(codec.EndDelivered) != 1 || s.total() != maxUnacked+4 {
		t.Errorf("%d delivered of %d ends", s.count(codec.EndDelivered), s.total())
	}
}

// TestNodeEgressBudget: what waits for all clients together is bounded; those who owe most are closed.
func TestNodeEgressBudget(t *testing.T) {
	const budget = 100_000
	w := newWorld(t, func(o *Options) { o.Settings.NodeEgressBudget, o.Settings.EgressBudget = budget, 1<<20 })
	var stuck = map[uint32]bool{0: true, 1: true}
	w.outcome = func(c *codec.Command) codec.Outcome {
		if stuck[c.Session.Index()] {
			return codec.OutcomeBuffered
		}
		return codec.OutcomeFlushed
	}
	w.run()
	for i, user := range []string{"alice", "bob", "carol"} {
		w.open(sessionID(uint32(i), 1), user)
	}
	w.eventually(func() bool { return w.set.Stats().Users == 3 })
	s := newSink()
	big := func(user string, n int) {
		d := rec(s, user)
		d.Frame = append([]byte(`{"x":"`+strings.Repeat("a", n)), `"}`...)
		w.deliver(d)
	}
	big("alice", 30_000)
	big("bob", 70_000)
	big("alice", 30_000)
	w.eventually(func() bool { return w.closeCode(sessionID(1, 1)) == codec.CloseSlowConsumer })
	w.eventually(func() bool { return s.count(codec.EndSlowConsumer) == 1 })
	if c := w.closeCode(sessionID(0, 1)); c != 0 {
		t.Errorf("the one who owed less was closed with %d", c)
	}
	w.eventually(func() bool { return w.set.egress.Load() < budget })
	big("carol", 1000)
	w.eventually(func() bool { return s.count(codec.EndDelivered) == 1 })
	w.eventually(func() bool { return w.set.egress.Load() >= 60_000 && w.set.egress.Load() < 62_000 })
}
