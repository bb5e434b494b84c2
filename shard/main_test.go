package shard

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"im-gateway/codec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 60 * time.Second

// world is everything around a Set: an event loop, a broker and Redis, driven by the test.
type world struct {
	t   testing.TB
	set *Set

	mu       sync.Mutex
	sent     map[codec.SessionID][]string // frames, in order
	closed   map[codec.SessionID]codec.CloseCode
	outcome  func(*codec.Command) codec.Outcome
	written  time.Time // when the loop says that it has; zero: now
	resumed  int
	pings    int
	events   []string
	replaced []string
	refuse   codec.Code
	admitted int
	ops      []PresenceOp
	presence func(PresenceOp) *PresenceResult // nil result: no answer
	builder  *codec.Builder

	queue chan *codec.UpstreamBatch
}

func newWorld(t testing.TB, change func(*Options)) *world {
	w := &world{t: t, sent: map[codec.SessionID][]string{}, closed: map[codec.SessionID]codec.CloseCode{},
		queue: make(chan *codec.UpstreamBatch, 64), builder: codec.NewBuilder("g", 7, nil)}
	w.presence = func(op PresenceOp) *PresenceResult {
		return &PresenceResult{Kind: op.Kind, Session: op.Session, Version: 1}
	}
	o := Options{
		Shards: 1, Loops: 1, GatewayID: "g", Nonce: 7, Topic: "up",
		Heartbeat: 30 * time.Second, RefreshInterval: 30 * time.Second, AckDeadline: 10 * time.Second,
		RecentMessages: 1 << 15,
		Settings:       Settings{EgressBudget: 1 << 20, MaxMessageBytes: 65536, UserMessagesPerSecond: 1e9, UserBytesPerSecond: 1 << 40},
		Egress:         w, Publisher: w, Presence: presencePort{w}, Events: w,
		Replaced:   func(user, gateway, session string) { w.note(&w.replaced, user+" "+gateway+" "+session) },
		Logger:     zerolog.Nop(),
		Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&o)
	}
	var err error
	if w.set, err = New(o); err != nil {
		t.Fatal(err)
	}
	return w
}

// alter puts settings into force that differ from those before.
func alter(t testing.TB, set *Set, change func(*Settings)) {
	t.Helper()
	next := set.rules.Load().Settings
	change(&next)
	apply, err := set.Prepare(next)
	if err != nil {
		t.Fatal(err)
	}
	apply()
}

// run starts the shards until the test ends.
func (w *world) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.set.Run(ctx)
	}()
	w.t.Cleanup(func() {
		cancel()
		<-done
	})
}

func (w *world) note(list *[]string, s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*list = append(*list, s)
}

// Submit implements Egress: the batch is done at once, as a loop on which everything is flushed.
func (w *world) Submit(b *codec.EgressBatch) {
	w.mu.Lock()
	var ended []codec.Event
	for i := range b.Commands {
		c := &b.Commands[i]
		if _, gone := w.closed[c.Session]; gone {
			c.Outcome = codec.OutcomeGone
			continue
		}
		switch c.Kind {
		case codec.CommandFrame:
			c.Outcome = codec.OutcomeFlushed
			if w.outcome != nil {
				c.Outcome = w.outcome(c)
			}
			w.sent[c.Session] = append(w.sent[c.Session], string(c.Payload))
		case codec.CommandPing:
			w.pings++
		case codec.CommandClose:
			w.closed[c.Session] = c.Code
			ended = append(ended, codec.Event{Kind: codec.EventClose, Session: c.Session, Code: c.Code, Reason: c.Reason})
		}
	}
	if b.Written = time.Now().UnixNano(); !w.written.IsZero() {
		b.Written = w.written.UnixNano()
	}
	w.mu.Unlock()
	w.set.Return(b)
	if len(ended) > 0 {
		go w.offer(ended...)
	}
}

// Resume implements Egress.
func (w *world) Resume(int, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.resumed++
}

// Admit implements Publisher.
func (w *world) Admit(int) (codec.Code, int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refuse != codec.OK {
		return w.refuse, 25
	}
	w.admitted++
	return codec.OK, 0
}

// Queue implements Publisher.
func (w *world) Queue(int) chan<- *codec.UpstreamBatch { return w.queue }

// UserEvent implements Events.
func (w *world) UserEvent(online bool, user string, _ codec.SessionID, reason string, _ int64) {
	w.note(&w.events, fmt.Sprintf("%s %v %s", user, online, reason))
}

// Submit implements Presence.
func (p presencePort) Submit(shard int, ops []PresenceOp) bool {
	w := p.world
	w.mu.Lock()
	var results []PresenceResult
	for _, op := range ops {
		w.ops = append(w.ops, op)
		if r := w.presence(op); r != nil {
			results = append(results, *r)
		}
	}
	w.mu.Unlock()
	if len(results) > 0 {
		go w.set.PresenceResults(shard, results)
	}
	return true
}

type presencePort struct{ *world }

// offer hands events to their shard, as a loop would.
func (w *world) offer(events ...codec.Event) {
	b := codec.NewIngressBatch(0)
	b.Events = append(b.Events, events...)
	deadline := time.Now().Add(patience)
	for !w.set.Offer(events[0].Session.Shard(), b) {
		if time.Now().After(deadline) {
			w.t.Error("the shard takes nothing")
			return
		}
	}
}

func sessionID(index, generation uint32) codec.SessionID {
	return codec.MakeSessionID(0, 0, index, generation)
}

func (w *world) open(id codec.SessionID, user string) {
	w.offer(codec.Event{Kind: codec.EventOpen, Session: id, Open: &codec.Open{
		User: user, ExpiresAt: time.Now().Add(time.Hour).UnixMilli(), ConnectedAt: time.Now().UnixMilli()}})
}

// connected opens a session and waits for its first frame.
func (w *world) connected(id codec.SessionID, user string) {
	w.t.Helper()
	w.open(id, user)
	w.until(func() bool { return len(w.sent[id]) > 0 })
}

func (w *world) message(id codec.SessionID, user, name string) codec.Event {
	m := codec.ClientMessage{Type: []byte("m"), ClientMsgID: []byte(name), Data: []byte("1")}
	return codec.Event{Kind: codec.EventMessage, Session: id, Upstream: w.builder.Build(&m, user, id, 1)}
}

// until waits for a condition that is looked at under the lock.
func (w *world) until(ok func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		w.mu.Lock()
		done := ok()
		w.mu.Unlock()
		if done {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatal("it did not come true")
		}
		<-time.After(time.Millisecond)
	}
}

// frames returns what a session was sent, as "type status code name".
func (w *world) frames(id codec.SessionID) (list []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sent[id] {
		var f struct {
			Type string
			Data struct {
				Status string `json:"status"`
				Code   string `json:"code"`
				Name   string `json:"client_msg_id"`
			}
		}
		if err := json.Unmarshal([]byte(s), &f); err != nil {
			list = append(list, s)
			continue
		}
		list = append(list, fmt.Sprintf("%s %s %s %s", f.Type, f.Data.Status, f.Data.Code, f.Data.Name))
	}
	return list
}

func (w *world) operations(kind PresenceKind) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, op := range w.ops {
		if op.Kind == kind {
			n++
		}
	}
	return n
}

func (w *world) pingCount() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pings
}

// closeCode is what the session was closed with, 0: it was not.
func (w *world) closeCode(id codec.SessionID) codec.CloseCode {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.closed[id]
}

func (w *world) raw(id codec.SessionID) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.sent[id]...)
}

// batch takes the next records that the shard has handed over.
func (w *world) batch() *codec.UpstreamBatch {
	w.t.Helper()
	select {
	case b := <-w.queue:
		return b
	case <-time.After(patience):
		w.t.Fatal("nothing was handed to the broker")
		return nil
	}
}

// sink counts ends.
type sink struct {
	mu   sync.Mutex
	ends map[codec.End]int
	all  int
}

// Ends implements codec.EndSink.
func (s *sink) Ends(list []codec.Ended) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range list {
		s.ends[e.End]++
		s.all++
	}
}

func (s *sink) count(e codec.End) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ends[e]
}

func (s *sink) total() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}

func newSink() *sink { return &sink{ends: map[codec.End]int{}} }

func rec(owner codec.EndSink, targets ...string) *codec.Downstream {
	d := &codec.Downstream{Targets: targets, Type: "new-message", MessageID: "m", Data: []byte(`"x"`), Owner: owner}
	d.Encode(1)
	return d
}

func (w *world) deliver(d *codec.Downstream) {
	w.t.Helper()
	b := &codec.DeliveryBatch{}
	for i := range d.Targets {
		b.Deliveries = append(b.Deliveries, codec.Delivery{Record: d, Target: int32(i)})
	}
	if err := w.set.Deliver(context.Background(), 0, b); err != nil {
		w.t.Fatal(err)
	}
}
