package shard

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"im-gateway/codec"
)

// quiet is a world of one shard that is driven by the test itself: loops that have flushed everything
// at once and a broker with room.
type quiet struct {
	s    *shard
	sent []*codec.EgressBatch
	ends int
}

func (q *quiet) Submit(b *codec.EgressBatch) { q.sent = append(q.sent, b) }
func (q *quiet) Resume(int, int)             {}
func (q *quiet) Admit(int) (codec.Code, int32) {
	return codec.OK, 0
}
func (q *quiet) Queue(int) chan<- *codec.UpstreamBatch                  { return nil }
func (q *quiet) UserEvent(bool, string, codec.SessionID, string, int64) {}
func (q *quiet) Ends(list []codec.Ended)                                { q.ends += len(list) }

type quietPresence struct{ *quiet }

func (quietPresence) Submit(int, []PresenceOp) bool { return true }

func newQuiet(t testing.TB, now func() time.Time) *quiet {
	q := &quiet{}
	w := newWorld(t, func(o *Options) {
		o.Egress, o.Publisher, o.Presence, o.Events, o.Now = q, q, quietPresence{q}, q, now
	})
	q.s = w.set.shards[0]
	q.s.clock()
	return q
}

// open brings n sessions to life, through the events that a loop and Redis send.
func (q *quiet) open(n int) {
	for i := range uint32(n) {
		b := codec.NewIngressBatch(0)
		b.Events = append(b.Events, codec.Event{Kind: codec.EventOpen, Session: sessionID(i, 1), Open: &codec.Open{
			User: fmt.Sprintf("user-%08d", i), ExpiresAt: 1 << 60, ConnectedAt: q.s.now}})
		q.s.onIngress(b)
		q.s.onPresence([]PresenceResult{{Kind: Claim, Session: sessionID(i, 1), Version: 1}})
		if i%500 == 0 {
			q.settle()
		}
	}
	q.settle()
}

// settle hands on what has gathered and brings it back done.
func (q *quiet) settle() {
	q.s.flush()
	for len(q.sent) > 0 {
		b := q.sent[0]
		q.sent = q.sent[:0]
		for i := range b.Commands {
			b.Commands[i].Outcome = codec.OutcomeFlushed
		}
		b.Written = q.s.now * int64(time.Millisecond)
		q.s.onReturn(b)
		q.s.flush()
	}
}

// upstream is one message in, its result, and the ack out.
func (q *quiet) upstream(b *codec.Builder, e *codec.IngressBatch) {
	binary.BigEndian.PutUint32(nameC, binary.BigEndian.Uint32(nameC)+1) // a new message each time
	u := b.Build(&codec.ClientMessage{Type: typeM, ClientMsgID: nameC, Data: dataOne}, "user", sessionID(0, 1), 1)
	u.Received = q.s.now * int64(time.Millisecond)
	e.Events = append(e.Events, codec.Event{Kind: codec.EventMessage, Session: sessionID(0, 1), Upstream: u})
	for i := range e.Events {
		q.s.onEvent(&e.Events[i])
	}
	clear(e.Events)
	e.Events = e.Events[:0]
	q.s.onResults(q.s.up, q.s.began)
	q.s.up.Records = q.s.up.Records[:0]
	q.settle()
}

var typeM, nameC, dataOne = []byte("m"), []byte("0000"), []byte("1")

// TestUpstreamPathDoesNotAllocate: message, admission, result, ack, beyond what building the record costs.
func TestUpstreamPathDoesNotAllocate(t *testing.T) {
	q := newQuiet(t, time.Now)
	q.open(1)
	builder, batch := codec.NewBuilder("g", 7, nil), codec.NewIngressBatch(0)
	q.upstream(builder, batch)
	m := codec.ClientMessage{Type: typeM, ClientMsgID: nameC, Data: dataOne}
	build := testing.AllocsPerRun(1000, func() { builder.Build(&m, "user", sessionID(0, 1), 1).Release() })
	all := testing.AllocsPerRun(1000, func() { q.upstream(builder, batch) })
	if all > build {
		t.Errorf("%.1f allocations per message, %.1f of them for the record", all, build)
	}
}

// TestDeliveryPathDoesNotAllocate: the ends' list, which becomes the owner's, is all that a batch costs, timed
// and, while somebody asks for it, measured by user.
func TestDeliveryPathDoesNotAllocate(t *testing.T) {
	q := newQuiet(t, time.Now)
	q.open(100)
	b := q.batch(100)
	run := func() {
		q.s.onDeliveries(b)
		q.settle()
	}
	for _, m := range []*meter{nil, {users: map[string]*Talk{}}} {
		q.s.meter = m
		run()
		if n := testing.AllocsPerRun(500, run) / 100; n > 0.1 {
			t.Errorf("%.2f allocations per delivery, measured: %t", n, m != nil)
		}
	}
	timed, _ := observed(t, q.s.metrics.deliverTime)
	if q.ends == 0 || timed != uint64(q.ends) || len(q.s.meter.users) != 100 {
		t.Errorf("%d ended, %d were timed, %d users measured", q.ends, timed, len(q.s.meter.users))
	}
}

// batch is n deliveries, one for each of n users.
func (q *quiet) batch(n int) *codec.DeliveryBatch {
	b := &codec.DeliveryBatch{}
	d := rec(q)
	d.Stored = q.s.now
	for i := range n {
		d.Targets = append(d.Targets, fmt.Sprintf("user-%08d", i))
		b.Deliveries = append(b.Deliveries, codec.Delivery{Record: d, Target: int32(i)})
	}
	return b
}

// TestIdleSession: the budget of an idle session, opened as all are; user map and name included.
func TestIdleSession(t *testing.T) {
	if size := unsafe.Sizeof(session{}); size > 96 {
		t.Errorf("a session is %d bytes, want at most 96", size)
	}
	const n = 100_000
	q := newQuiet(t, time.Now)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	q.open(n)
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := float64(after.HeapAlloc-before.HeapAlloc) / n
	t.Logf("%.0f bytes per idle session", per)
	if per > 300 {
		t.Errorf("%.0f bytes per idle session, want at most 300", per)
	}
	if got := q.s.sessions.Load(); got != n {
		t.Errorf("%d sessions", got)
	}
}

// TestTickIsBounded: when everybody is due at once, other work has its turn in between.
func TestTickIsBounded(t *testing.T) {
	now := time.Unix(1_760_000_000, 0)
	q := newQuiet(t, func() time.Time { return now })
	const n = 3 * tickWork
	q.open(n)
	s := q.s
	// Far beyond the wheel: a ping or two each, the second for who is due again within the turn that
	// catches up, and not one for each interval missed.
	now = now.Add(time.Hour)
	s.clock()
	s.onTick()
	rounds, pings := 1, 0
	for {
		if s.out[0].fill != nil {
			commands := len(s.out[0].fill.Commands)
			if commands > 2*tickWork {
				t.Fatalf("%d commands in one round", commands)
			}
			pings += commands
			s.out[0].fill.Reset()
		}
		if !s.lagging {
			break
		}
		rounds++
		s.catchUp()
	}
	if rounds < 3 || pings < n || pings > n+n/20 || s.lag.Load() != 0 {
		t.Errorf("%d rounds, %d pings for %d sessions, %d ticks behind", rounds, pings, n, s.lag.Load())
	}
	s.flushCounts()
	if got := s.set.Stats().Heartbeats; got != int64(pings) {
		t.Errorf("%d heartbeats counted, %d commanded", got, pings)
	}

	// The same for records whose deadline has passed at once.
	builder := codec.NewBuilder("g", 7, nil)
	m := codec.ClientMessage{Type: typeM, ClientMsgID: nameC, Data: dataOne}
	for i := range uint32(n) {
		s.onMessage(builder.Build(&m, "user", sessionID(i, 1), 1))
	}
	now = now.Add(11 * time.Second)
	s.clock()
	s.onTick()
	if left := s.flight.n; left != n-tickWork || !s.lagging {
		t.Errorf("%d of %d records wait for their turn, lagging %v", left, n, s.lagging)
	}
	for s.lagging {
		s.catchUp()
	}
	if s.flight.n != 0 {
		t.Errorf("%d records left", s.flight.n)
	}
}

// TestWakeUps: a loop's return wakes the shard only if somebody waits for it, and is found by the next
// round all the same.
func TestWakeUps(t *testing.T) {
	q := newQuiet(t, time.Now)
	s := q.s
	q.open(2)
	give := func() { // what the loop was given goes back done
		t.Helper()
		if len(q.sent) != 1 {
			t.Fatalf("%d batches with the loop", len(q.sent))
		}
		b := q.sent[0]
		q.sent = nil
		for i := range b.Commands {
			b.Commands[i].Outcome = codec.OutcomeFlushed
		}
		s.set.Return(b)
	}
	woken := func() bool {
		select {
		case <-s.returned:
			return true
		default:
			return false
		}
	}
	s.onRefresh(sessionID(0, 1), 1<<60)
	s.flush()
	give()
	if woken() {
		t.Error("the shard is woken for nothing")
	}
	if s.begin(); s.out[0].sent != nil || s.lookup(sessionID(0, 1)).pending != 0 {
		t.Error("the return was not found")
	}

	s.onRefresh(sessionID(0, 1), 1<<60)
	s.flush()
	s.onRefresh(sessionID(1, 1), 1<<60) // waits for the batch before
	s.flush()
	give()
	if !woken() {
		t.Error("the next batch waits, but the shard was not woken")
	}
	s.begin()
	s.flush()

	give()
	s.onDeliveries(q.batch(1))
	s.flush() // finds the batch that has come back, and sends the next
	give()
	if !woken() {
		t.Error("a delivery has ended, but the shard was not woken")
	}
	if s.begin(); s.counts.ends[codec.EndDelivered] != 1 {
		t.Error("the delivery has not ended")
	}
}

// TestDeadlineOfABacklog: a frame that the kernel does not take is noticed in time, though the session
// would not be looked at for its heartbeat until much later.
func TestDeadlineOfABacklog(t *testing.T) {
	now := time.Unix(1_760_000_000, 0)
	q := newQuiet(t, func() time.Time { return now })
	s := q.s
	q.open(1)
	ses := s.lookup(sessionID(0, 1))
	ses.pinged, ses.refreshed = s.wheel.now, s.wheel.now // nothing else is due for 30 s
	s.opts.DeliveryTimeout = 2 * time.Second
	s.schedule(ses, s.nextDue(ses))
	s.onDeliveries(q.batch(1))
	s.flush()
	b := q.sent[0]
	b.Commands[0].Outcome, b.Commands[0].Position = codec.OutcomeBuffered, 100
	s.onReturn(b)
	for i := range 22 {
		now = now.Add(tickLength)
		s.clock()
		s.onTick()
		if closed := ses.closeCode == codec.CloseSlowConsumer; closed != (i >= 19) {
			t.Fatalf("after %d ticks: closed %v", i+1, closed)
		}
	}
}

// TestOptions: what a Set would not work with is refused.
func TestOptions(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no shards":          func(o *Options) { o.Shards = 0 },
		"too many shards":    func(o *Options) { o.Shards = codec.MaxShards + 1 },
		"no loops":           func(o *Options) { o.Loops = 0 },
		"no heartbeat":       func(o *Options) { o.Heartbeat = 0 },
		"long heartbeat":     func(o *Options) { o.Heartbeat = 2 * time.Hour },
		"no refresh":         func(o *Options) { o.RefreshInterval = 0 },
		"no deadline":        func(o *Options) { o.AckDeadline = 0 },
		"negative timeout":   func(o *Options) { o.ClaimTimeout = -1 },
		"no budget":          func(o *Options) { o.Settings.EgressBudget = 0 },
		"huge budget":        func(o *Options) { o.Settings.EgressBudget = 1 << 31 },
		"too many in flight": func(o *Options) { o.Settings.MaxSessionInFlight = 1 << 16 },
		"no egress":          func(o *Options) { o.Egress = nil },
		"no events":          func(o *Options) { o.Events = nil },
	} {
		t.Run(name, func(t *testing.T) {
			o := newWorld(t, nil).set.opts
			change(&o)
			if _, err := New(o); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestKickReasonFits(t *testing.T) {
	long := ""
	for range 50 {
		long += "Größe" // a cut must not split a letter
	}
	if got := kickReason(long); len(got) > maxCloseReason || len(got) < maxCloseReason-3 || got != long[:len(got)] {
		t.Errorf("%d bytes: %q", len(got), got)
	}
	if kickReason("") == "" || kickReason("spam") != "spam" {
		t.Error("a short reason is not kept, or an empty one is")
	}
}

// BenchmarkUpstream is one message from event to ack, on the shard's side.
func BenchmarkUpstream(b *testing.B) {
	q := newQuiet(b, time.Now)
	q.open(1)
	builder, batch := codec.NewBuilder("g", 7, nil), codec.NewIngressBatch(0)
	b.ReportAllocs()
	for b.Loop() {
		q.upstream(builder, batch)
	}
}

// BenchmarkRouteBatch is the shard's share of a message, in batches of 256 from random ones of 250,000
// sessions: building the records is left out.
func BenchmarkRouteBatch(b *testing.B) {
	const sessions, size = 250_000, 256
	q := newQuiet(b, time.Now)
	q.open(sessions)
	builder := codec.NewBuilder("g", 7, nil)
	m := codec.ClientMessage{Type: typeM, ClientMsgID: nameC, Data: dataOne}
	var took time.Duration
	b.ReportAllocs()
	for b.Loop() {
		batch := codec.NewIngressBatch(0)
		for range size {
			id := sessionID(rand.Uint32N(sessions), 1)
			batch.Events = append(batch.Events, codec.Event{
				Kind: codec.EventMessage, Session: id, Upstream: builder.Build(&m, "user", id, q.s.now)})
		}
		began := time.Now()
		q.s.clock()
		q.s.onIngress(batch)
		q.s.onResults(q.s.up, q.s.began)
		q.s.up.Records = q.s.up.Records[:0]
		q.settle()
		took += time.Since(began)
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(b.N)/size, "ns/message")
}

// BenchmarkDeliver is one delivery from the consumer's batch to its end, of 100 in a batch.
func BenchmarkDeliver(b *testing.B) {
	q := newQuiet(b, time.Now)
	q.open(100)
	batch := q.batch(100)
	b.ReportAllocs()
	for b.Loop() {
		q.s.onDeliveries(batch)
		q.settle()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/delivery")
}

// BenchmarkTick is one tick of a shard with 250,000 sessions, each pinged and refreshed every 30 s.
func BenchmarkTick(b *testing.B) {
	now := time.Unix(1_760_000_000, 0)
	q := newQuiet(b, func() time.Time { return now })
	q.open(250_000)
	took := make([]time.Duration, 0, 1<<16)
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(tickLength)
		began := time.Now()
		q.s.clock()
		q.s.onTick()
		took = append(took, time.Since(began))
		for q.s.lagging {
			q.s.catchUp()
		}
		q.settle()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "us/p99")
	b.ReportMetric(float64(took[len(took)-1].Microseconds()), "us/longest")
}
