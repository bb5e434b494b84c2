package shard

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"im-gateway/codec"
)

// model is a world in one goroutine: it plays the loops, the broker, Redis and the clock of one shard
// in an order that a seed decides, and knows what must come out.
type model struct {
	t   *testing.T
	rnd *rand.Rand
	s   *shard
	now time.Time

	loops   [2]modelLoop
	queue   chan *codec.UpstreamBatch
	broker  []*codec.UpstreamBatch // taken from the queue, not answered yet
	ops     [][]PresenceOp
	noRedis bool // presence has no room
	noRoom  bool // the broker admits nothing
	panics  bool // the broker's Admit panics

	conns map[codec.SessionID]*modelConn // every one there ever was
	order []codec.SessionID              // in order of opening
	sent  int                            // records so far, the clients' names for them
	ended map[int]codec.End              // by delivery number
	given int

	survivors int // connections that outlived the steps
}

// modelLoop holds what a real loop would: slots, events not offered yet, the batch that it was given.
type modelLoop struct {
	generations []uint32
	live        []*modelConn // by slot; nil: free
	events      []codec.Event
	batch       *codec.EgressBatch
}

type modelConn struct {
	id       codec.SessionID
	user     string
	open     bool
	written  uint64
	flushed  uint64
	frames   int
	lost     bool            // its close was commanded, or it went away: it need not be answered
	sent     []string        // messages that the shard was given
	stored   map[string]bool // the broker's answer was success
	answered map[string]int  // answers by name; the first may be OUTCOME_UNKNOWN
	ackOrder []string        // successes, as the broker gave them
	acks     []string        // successes, as they were sent
}

// modelSink records ends by delivery number, which is the record's offset.
type modelSink struct{ m *model }

func (k *modelSink) Ends(list []codec.Ended) {
	for _, e := range list {
		n := int(e.Record.Offset)
		if old, twice := k.m.ended[n]; twice {
			k.m.t.Fatalf("delivery %d ended %s, then %s", n, old, e.End)
		}
		k.m.ended[n] = e.End
	}
}

func (m *model) Submit(b *codec.EgressBatch) {
	l := &m.loops[b.Loop]
	if l.batch != nil {
		m.t.Fatal("a second batch while one is with the loop")
	}
	l.batch = b
}

func (m *model) Resume(int, int) {}

func (m *model) Admit(int) (codec.Code, int32) {
	switch {
	case m.panics:
		panic("injected")
	case m.noRoom:
		return codec.Overloaded, 10
	}
	return codec.OK, 0
}

func (m *model) Queue(int) chan<- *codec.UpstreamBatch { return m.queue }

func (m *model) UserEvent(bool, string, codec.SessionID, string, int64) {
	if m.rnd.IntN(500) == 0 {
		panic("injected")
	}
}

type modelPresence struct{ *model }

func (p modelPresence) Submit(_ int, ops []PresenceOp) bool {
	if p.noRedis {
		return false
	}
	p.ops = append(p.ops, ops)
	return true
}

func newModel(t *testing.T, seed uint64) *model {
	m := &model{
		t: t, rnd: rand.New(rand.NewPCG(seed, 99)), now: time.Unix(1_760_000_000, 0),
		queue: make(chan *codec.UpstreamBatch, 1), conns: map[codec.SessionID]*modelConn{}, ended: map[int]codec.End{},
	}
	set, err := New(Options{
		Shards: 1, Loops: len(m.loops), GatewayID: "g", Nonce: 7, Topic: "up",
		Heartbeat: 3 * time.Second, RefreshInterval: 2 * time.Second, AckDeadline: time.Second,
		DeliveryTimeout: 5 * time.Second,
		Settings: Settings{EgressBudget: 3000, MaxMessageBytes: 65536, MaxSessionInFlight: 4,
			UserMessagesPerSecond: 20, UserBytesPerSecond: 100},
		Egress: m, Publisher: m, Presence: modelPresence{m}, Events: m,
		Replaced: func(string, string, string) {}, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(),
		Now: func() time.Time { return m.now },
	})
	if err != nil {
		t.Fatal(err)
	}
	m.s = set.shards[0]
	return m
}

// wake runs one piece of the shard's work as its run loop does.
func (m *model) wake(f func()) {
	m.s.clock()
	m.s.guard(f)
	m.s.flush()
}

func (m *model) user() string { return fmt.Sprint("u", m.rnd.IntN(12)) }

// anyConn is a random connection of the loop, or nil.
func (m *model) anyConn(l *modelLoop) *modelConn {
	if len(l.live) == 0 {
		return nil
	}
	return l.live[m.rnd.IntN(len(l.live))]
}

func (m *model) open(n int) {
	l := &m.loops[n]
	slot := -1
	for i, c := range l.live {
		if c == nil {
			slot = i
		}
	}
	if slot < 0 {
		if len(l.live) == 12 {
			return
		}
		slot = len(l.live)
		l.live, l.generations = append(l.live, nil), append(l.generations, 0)
	}
	l.generations[slot]++
	c := &modelConn{
		id: codec.MakeSessionID(0, n, uint32(slot), l.generations[slot]), user: m.user(), open: true,
		stored: map[string]bool{}, answered: map[string]int{},
	}
	l.live[slot], m.conns[c.id] = c, c
	m.order = append(m.order, c.id)
	life := time.Duration(1+m.rnd.IntN(600)) * time.Second
	l.events = append(l.events, codec.Event{Kind: codec.EventOpen, Session: c.id, Open: &codec.Open{
		User: c.user, ExpiresAt: m.now.Add(life).UnixMilli(), ConnectedAt: m.now.UnixMilli()}})
}

func (m *model) lose(l *modelLoop, c *modelConn, code codec.CloseCode) {
	if c == nil || !c.open {
		return
	}
	c.open, c.lost = false, true
	l.live[c.id.Index()] = nil
	l.events = append(l.events, codec.Event{Kind: codec.EventClose, Session: c.id, Code: code, Reason: "model"})
}

func (m *model) message(l *modelLoop) {
	c := m.anyConn(l)
	if c == nil {
		return
	}
	m.sent++
	name := fmt.Sprint("n", m.sent)
	c.sent = append(c.sent, name)
	u := &codec.Upstream{Session: c.id, User: c.user, MessageID: []byte("M"), ClientMsgID: []byte(name), Value: []byte("{}")}
	l.events = append(l.events, codec.Event{Kind: codec.EventMessage, Session: c.id, Upstream: u})
}

// stale tells the shard of a session that ended long ago.
func (m *model) stale(l *modelLoop) {
	for range 10 {
		if len(m.order) == 0 {
			return
		}
		id := m.order[m.rnd.IntN(len(m.order))]
		if m.conns[id].open || id.Generation() >= m.loops[id.Loop()].generations[id.Index()] {
			continue
		}
		kinds := []codec.EventKind{codec.EventFlushed, codec.EventRefresh, codec.EventClose}
		l.events = append(l.events, codec.Event{Kind: kinds[m.rnd.IntN(3)], Session: id, Value: 1 << 50})
		return
	}
}

// offer gives the loop's events to the shard.
func (m *model) offer(n int) {
	l := &m.loops[n]
	if len(l.events) == 0 {
		return
	}
	b := codec.NewIngressBatch(n)
	b.Events = append(b.Events, l.events...)
	l.events = nil
	m.wake(func() { m.s.onIngress(b) })
}

// execute runs the batch that the loop was given, as transport does: some frames stay buffered.
func (m *model) execute(n int) {
	l := &m.loops[n]
	b := l.batch
	if b == nil {
		m.wake(m.s.drainReturns)
		return
	}
	l.batch = nil
	for i := range b.Commands {
		c := &b.Commands[i]
		conn := m.conns[c.Session]
		c.Outcome = codec.OutcomeGone
		if conn == nil || !conn.open {
			continue
		}
		switch c.Kind {
		case codec.CommandFrame:
			m.frame(conn, c.Payload)
			conn.written += uint64(len(c.Payload))
			if conn.flushed == conn.written-uint64(len(c.Payload)) && m.rnd.IntN(4) > 0 {
				conn.flushed = conn.written
				c.Outcome = codec.OutcomeFlushed
			} else {
				c.Outcome, c.Position = codec.OutcomeBuffered, conn.written
			}
		case codec.CommandClose:
			m.lose(l, conn, c.Code)
		}
	}
	m.s.set.Return(b)
	if m.rnd.IntN(2) == 0 { // else the shard finds it when it takes events in
		m.wake(m.s.drainReturns)
	}
}

// frame checks a frame that a client is sent.
func (m *model) frame(c *modelConn, payload []byte) {
	if c.frames++; (c.frames == 1) != bytes.Contains(payload, []byte(`"type":"connected"`)) {
		m.t.Fatalf("frame %d of a session: %s", c.frames, payload)
	}
	var f struct {
		Type string
		Data json.RawMessage
	}
	if err := json.Unmarshal(payload, &f); err != nil {
		m.t.Fatalf("%v: %s", err, payload)
	}
	if f.Type != "message-ack" {
		return
	}
	var ack struct {
		Status, Code string
		Name         string `json:"client_msg_id"`
	}
	if err := json.Unmarshal(f.Data, &ack); err != nil {
		m.t.Fatal(err)
	}
	if ack.Status == "success" {
		if !c.stored[ack.Name] {
			m.t.Fatalf("%s acked without a result", ack.Name)
		}
		c.acks = append(c.acks, ack.Name)
	}
	c.answered[ack.Name]++
	if c.answered[ack.Name] > 2 || c.answered[ack.Name] == 2 && ack.Code == string(codec.OutcomeUnknown) {
		m.t.Fatalf("answer %d for %s: %s", c.answered[ack.Name], ack.Name, payload)
	}
}

func (m *model) flushed(l *modelLoop) {
	c := m.anyConn(l)
	if c == nil || c.flushed == c.written {
		return
	}
	c.flushed += 1 + m.rnd.Uint64N(c.written-c.flushed)
	l.events = append(l.events, codec.Event{Kind: codec.EventFlushed, Session: c.id, Value: int64(c.flushed)})
}

// answer gives the result of one batch back, of any, in any order within it.
func (m *model) answer() {
	select {
	case b := <-m.queue:
		m.broker = append(m.broker, b)
	default:
	}
	if len(m.broker) == 0 {
		return
	}
	i := m.rnd.IntN(len(m.broker))
	b := m.broker[i]
	m.broker = append(m.broker[:i], m.broker[i+1:]...)
	m.rnd.Shuffle(len(b.Records), func(i, j int) { b.Records[i], b.Records[j] = b.Records[j], b.Records[i] })
	for _, u := range b.Records {
		switch m.rnd.IntN(10) {
		case 0:
			u.Result = codec.UpstreamResult{Code: codec.BrokerUnavailable}
			continue
		case 1:
			u.Result = codec.UpstreamResult{Code: codec.OutcomeUnknown}
			continue
		}
		c := m.conns[u.Session]
		c.stored[string(u.ClientMsgID)] = true
		c.ackOrder = append(c.ackOrder, string(u.ClientMsgID))
	}
	m.wake(func() { m.s.onResults(b, m.s.opts.Now()) })
}

func (m *model) deliver() {
	b := &codec.DeliveryBatch{}
	for range 1 + m.rnd.IntN(4) {
		d := rec(&modelSink{m}, m.user())
		d.Offset = int64(m.given)
		m.given++
		switch m.rnd.IntN(150) {
		case 0:
			d.Kick = true
		case 1:
			d.ExpireAt = m.now.Add(-time.Minute).UnixMilli()
		case 2:
			d.Targets = nil // out of range: it panics
		}
		b.Deliveries = append(b.Deliveries, codec.Delivery{Record: d})
	}
	m.wake(func() { m.s.onDeliveries(b) })
}

// redis answers one round of operations.
func (m *model) redis() {
	if len(m.ops) == 0 {
		return
	}
	ops := m.ops[0]
	m.ops = m.ops[1:]
	results := make([]PresenceResult, len(ops))
	for i, op := range ops {
		results[i] = PresenceResult{Kind: op.Kind, Session: op.Session, Version: op.Version}
		switch m.rnd.IntN(60) {
		case 0, 1, 2:
			results[i].Err = fmt.Errorf("model")
		case 3:
			results[i].Superseded = op.Kind == Refresh
		default:
			if op.Kind == Claim {
				results[i].Version = m.now.UnixMicro()
			}
		}
	}
	m.wake(func() { m.s.onPresence(results) })
}

func (m *model) tick(d time.Duration) {
	m.now = m.now.Add(d)
	m.wake(m.s.onTick)
	for m.s.lagging {
		m.wake(m.s.catchUp)
	}
}

func (m *model) step() {
	n := m.rnd.IntN(len(m.loops))
	l := &m.loops[n]
	switch m.rnd.IntN(16) {
	case 0:
		m.open(n)
	case 1:
		if m.rnd.IntN(12) == 0 {
			m.lose(l, m.anyConn(l), codec.CloseAbnormal)
		}
	case 2, 3:
		m.message(l)
	case 4, 5, 6:
		m.offer(n)
	case 7, 8:
		m.execute(n)
	case 9:
		m.answer()
	case 10:
		m.deliver()
	case 11:
		m.redis()
	case 12:
		m.flushed(l)
	case 13:
		m.stale(l)
	case 14:
		m.tick(time.Duration(m.rnd.IntN(300)) * time.Millisecond)
	case 15:
		switch m.rnd.IntN(6) {
		case 0:
			m.noRedis = !m.noRedis
		case 1:
			m.noRoom = !m.noRoom
		case 2:
			m.panics = m.rnd.IntN(60) == 0
		case 3:
			if m.rnd.IntN(50) == 0 {
				m.tick(time.Minute) // the process stood still
			}
		}
	}
}
