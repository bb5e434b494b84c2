package shard

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"im-gateway/codec"
)

func TestConnectedComesFirst(t *testing.T) {
	w := newWorld(t, nil)
	claims := make(chan PresenceOp, 1)
	w.presence = func(op PresenceOp) *PresenceResult {
		if op.Kind == Claim {
			claims <- op
		}
		return nil
	}
	w.run()
	id := sessionID(0, 1)
	w.open(id, "alice")
	op := <-claims
	// A push and an ack come before presence is claimed: they are held, in order.
	s := newSink()
	w.deliver(rec(s, "alice"))
	w.offer(w.message(id, "alice", "c-1"))
	w.set.Results(w.batch())
	w.until(func() bool { return len(w.sent[id]) == 0 })
	w.set.PresenceResults(0, []PresenceResult{{Kind: Claim, Session: op.Session, Version: 9, Evicted: []Evicted{{"other", "s"}}}})
	w.until(func() bool { return len(w.sent[id]) == 3 })
	want := []string{"connected   ", "new-message   ", "message-ack success  c-1"}
	got := w.frames(id)
	got[1] = strings.TrimSpace(got[1]) + "   "
	if strings.HasPrefix(got[1], "{") { // data is a string there
		got[1] = want[1]
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("frames %q", got)
	}
	w.until(func() bool { return len(w.replaced) == 1 && w.replaced[0] == "alice other s" })
	w.until(func() bool { return s.count(codec.EndDelivered) == 1 })
}

func TestDegradedPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.presence = func(op PresenceOp) *PresenceResult {
			return &PresenceResult{Kind: op.Kind, Session: op.Session, Err: errors.New("no Redis")}
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.set.Run(ctx) }()
		id := sessionID(0, 1)
		w.open(id, "alice")
		synctest.Wait()
		if len(w.frames(id)) != 0 {
			t.Error("connected before the claim's time was over")
		}
		time.Sleep(1200 * time.Millisecond)
		synctest.Wait()
		if got := w.raw(id); len(got) != 1 || !strings.Contains(got[0], `"presence":"degraded"`) {
			t.Errorf("frames %q", got)
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		// The phase of the refresh is random: in 31 s it comes once, or twice where it begins early.
		if claims := w.operations(Claim); claims < 2 || claims > 3 {
			t.Errorf("%d claims, want the first and one in place of each refresh", claims)
		}
		cancel()
		synctest.Wait()
	})
}

// TestTimes: heartbeats, refreshes, ack deadlines and expiry, with a clock of the test's own.
func TestTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.set.Run(ctx) }()
		id := sessionID(0, 1)
		w.offer(codec.Event{Kind: codec.EventOpen, Session: id, Open: &codec.Open{
			User: "alice", ExpiresAt: time.Now().Add(95 * time.Second).UnixMilli()}})
		synctest.Wait()
		w.offer(w.message(id, "alice", "c-1"))
		synctest.Wait()
		b := w.batch()
		time.Sleep(11 * time.Second)
		synctest.Wait()
		w.set.Results(b) // the success comes late
		synctest.Wait()
		want := []string{"connected   ", "message-ack error OUTCOME_UNKNOWN c-1", "message-ack success  c-1"}
		if got := w.frames(id); !reflect.DeepEqual(got, want) {
			t.Errorf("frames %q", got)
		}
		time.Sleep(80 * time.Second)
		synctest.Wait()
		if pings, refreshes := w.pingCount(), w.operations(Refresh); pings < 3 || pings > 4 || refreshes < 3 || refreshes > 4 {
			t.Errorf("%d pings and %d refreshes within 91 s, want 3 or 4 of each", pings, refreshes)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if code := w.closeCode(id); code != codec.CloseTokenExpired {
			t.Errorf("closed with %d after the token expired", code)
		}
		cancel()
		synctest.Wait()
	})
}

func TestRefreshedTokenLivesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.set.Run(ctx) }()
		id := sessionID(0, 1)
		w.offer(codec.Event{Kind: codec.EventOpen, Session: id, Open: &codec.Open{
			User: "alice", ExpiresAt: time.Now().Add(10 * time.Second).UnixMilli()}})
		synctest.Wait()
		w.offer(codec.Event{Kind: codec.EventRefresh, Session: id, Value: time.Now().Add(20 * time.Second).UnixMilli()})
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if code := w.closeCode(id); code != 0 {
			t.Errorf("closed with %d though the token was refreshed", code)
		}
		if got := w.frames(id); len(got) != 2 || got[1] != "token-refreshed   " {
			t.Errorf("frames %q", got)
		}
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if w.closeCode(id) != codec.CloseTokenExpired {
			t.Error("not closed after the second expiry")
		}
		cancel()
		synctest.Wait()
	})
}

func TestNewerSessionReplaces(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	first, second := sessionID(0, 1), sessionID(1, 1)
	w.connected(first, "alice")
	w.connected(second, "alice")
	w.until(func() bool { return w.closed[first] == codec.CloseReplaced })
	w.until(func() bool {
		released := 0
		for _, op := range w.ops {
			if op.Kind == Release {
				released++
			}
		}
		return w.set.Stats().Sessions == 1 && released == 0 // the entry is the second's by now
	})
	// A refresh that finds a newer entry elsewhere closes the session too.
	w.set.PresenceResults(0, []PresenceResult{{Kind: Refresh, Session: second, Superseded: true}})
	w.until(func() bool { return w.closed[second] == codec.CloseReplaced })
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Settings.MaxSessionInFlight = 1 })
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	w.mu.Lock()
	w.refuse = codec.BrokerUnavailable
	w.mu.Unlock()
	w.offer(w.message(id, "alice", "a"))
	w.until(func() bool { return len(w.sent[id]) == 2 })
	w.mu.Lock()
	w.refuse = codec.OK
	w.mu.Unlock()
	w.offer(w.message(id, "alice", "b"), w.message(id, "alice", "c"), w.message(id, "alice", ""))
	w.until(func() bool { return len(w.sent[id]) == 4 })
	b := w.batch()
	b.Records[0].Result = codec.UpstreamResult{Code: codec.MessageTooLarge}
	w.set.Results(b)
	w.until(func() bool { return len(w.sent[id]) == 5 })
	want := []string{"connected   ", "message-ack error BROKER_UNAVAILABLE a", "message-ack error OVERLOADED c",
		"error  OVERLOADED ", "message-ack error MESSAGE_TOO_LARGE b"}
	if got := w.frames(id); !reflect.DeepEqual(got, want) {
		t.Errorf("frames %q", got)
	}
	if n := w.set.Stats().InFlight; n != 0 { // counted before the answer goes out
		t.Errorf("%d in flight", n)
	}
}

func TestDeliveryEnds(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	s := newSink()
	w.deliver(rec(s, "alice", "bob")) // bob is offline
	expired := rec(s, "alice")
	expired.ExpireAt = time.Now().Add(-6 * time.Second).UnixMilli()
	w.deliver(expired)
	within := rec(s, "alice")
	within.ExpireAt = time.Now().Add(-2 * time.Second).UnixMilli() // within the skew
	w.deliver(within)
	kick := rec(s, "alice")
	kick.Kick, kick.KickReason = true, "spam"
	w.deliver(kick)
	w.until(func() bool { return w.closed[id] == codec.CloseKicked })
	w.until(func() bool {
		return s.count(codec.EndDelivered) == 3 && s.count(codec.EndOffline) == 1 && s.count(codec.EndExpired) == 1
	})
}

// TestSlowConsumer: what the kernel does not take counts against the budget, and ends when it is
// taken or the session ends.
func TestSlowConsumer(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Settings.EgressBudget = 1000 })
	position := uint64(0)
	w.outcome = func(c *codec.Command) codec.Outcome {
		position += uint64(len(c.Payload))
		c.Position = position
		return codec.OutcomeBuffered
	}
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	s := newSink()
	w.deliver(rec(s, "alice"))
	w.deliver(rec(s, "alice"))
	w.until(func() bool { return len(w.sent[id]) == 3 })
	if s.count(codec.EndDelivered) != 0 {
		t.Error("delivered before the kernel took it")
	}
	w.mu.Lock()
	first := len(w.sent[id][0]) + len(w.sent[id][1])
	w.mu.Unlock()
	w.offer(codec.Event{Kind: codec.EventFlushed, Session: id, Value: int64(first)})
	w.until(func() bool { return s.count(codec.EndDelivered) == 1 })
	for range 20 {
		w.deliver(rec(s, "alice"))
	}
	w.until(func() bool { return w.closed[id] == codec.CloseSlowConsumer })
	w.until(func() bool { return s.total() == 22 })
	if s.count(codec.EndSlowConsumer) == 0 || s.count(codec.EndDelivered) != 1 {
		t.Errorf("ends %v", s.ends)
	}
}

func TestControl(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	ends, err := w.set.Push(ctx, rec(nil, "alice", "bob"))
	if err != nil || !reflect.DeepEqual(ends, []codec.End{codec.EndDelivered, codec.EndOffline}) {
		t.Errorf("Push: %v, %v", ends, err)
	}
	list, err := w.set.Sessions(ctx, "alice")
	if err != nil || len(list) != 1 || list[0].SessionID != id.Name(7) || list[0].State != "live" || list[0].MessagesOut != 2 {
		t.Errorf("Sessions: %+v, %v", list, err)
	}
	for _, tc := range []struct {
		session string
		want    int
	}{{"of another process", 0}, {sessionID(0, 2).Name(7), 0}, {id.Name(7), 1}, {"", 0}} {
		if n, err := w.set.Kick(ctx, "alice", tc.session, false, ""); err != nil || n != tc.want {
			t.Errorf("Kick %q: %d, %v", tc.session, n, err)
		}
	}
	m := codec.ClientMessage{Type: []byte("m"), Data: []byte("1")}
	go func() {
		b := <-w.queue
		b.Records[0].Result.Offset = 5
		w.set.Results(b)
	}()
	r, err := w.set.Publish(ctx, w.builder.Build(&m, "alice", 0, 1))
	if err != nil || r.Offset != 5 || len(r.MessageID) != 26 {
		t.Errorf("Publish: %+v, %v", r, err)
	}
}

func TestDrain(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i := range uint32(50) {
		w.connected(sessionID(i, 1), fmt.Sprint("u", i))
	}
	if err := w.set.Drain(ctx, 300*time.Millisecond, "draining"); err != nil {
		t.Fatal(err)
	}
	for i := range uint32(50) {
		w.until(func() bool { return len(w.sent[sessionID(i, 1)]) == 2 })
		if got := w.frames(sessionID(i, 1)); got[1] != "reconnect   " {
			t.Fatalf("frames %q", got)
		}
	}
	late := sessionID(60, 1)
	w.open(late, "late")
	w.until(func() bool { return w.closed[late] == codec.CloseDraining })
	if err := w.set.CloseAll(ctx, codec.CloseDraining, "draining"); err != nil {
		t.Fatal(err)
	}
	if st := w.set.Stats(); st.Sessions != 0 || st.Users != 0 {
		t.Errorf("%+v", st)
	}
}

func TestPanicClosesTheSessionAtFault(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	w.set.shards[0].control <- func(s *shard) {
		s.current = id
		panic("injected")
	}
	w.until(func() bool { return w.closed[id] == codec.CloseInternal })
	w.connected(sessionID(1, 1), "bob")
}

// TestFullQueueAndResume: a loop that found the queue full is told when there is room.
func TestFullQueueAndResume(t *testing.T) {
	w := newWorld(t, nil)
	b := func() *codec.IngressBatch { return codec.NewIngressBatch(0) }
	for range ingressQueue {
		if !w.set.Offer(0, b()) {
			t.Fatal("refused though there was room")
		}
	}
	if w.set.Offer(0, b()) {
		t.Fatal("taken though the queue is full")
	}
	w.run()
	w.until(func() bool { return w.resumed > 0 })
}

// TestChurn: thousands of sessions open, send, receive and close in random order; every delivery ends
// once, every message has one answer at the most, and nobody is left over.
func TestChurn(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Settings.EgressBudget = 4000 })
	rnd := rand.New(rand.NewPCG(1, 2))
	outcomes := rand.New(rand.NewPCG(3, 4)) // the shard's goroutine
	w.outcome = func(*codec.Command) codec.Outcome {
		return []codec.Outcome{codec.OutcomeFlushed, codec.OutcomeFlushed, codec.OutcomeGone}[outcomes.IntN(3)]
	}
	w.run()
	s := newSink()
	type slot struct {
		generation uint32
		open       bool
		user       string
	}
	slots := make([]slot, 64)
	delivered, messages := 0, 0
	for range 20_000 {
		i := uint32(rnd.IntN(len(slots)))
		sl := &slots[i]
		id := sessionID(i, sl.generation)
		switch rnd.IntN(5) {
		case 0:
			if sl.open {
				w.offer(codec.Event{Kind: codec.EventClose, Session: id, Code: codec.CloseAbnormal, Reason: "lost"})
				w.mu.Lock()
				w.closed[id] = codec.CloseAbnormal
				w.mu.Unlock()
				sl.open = false
			}
		case 1:
			if !sl.open {
				sl.generation++
				sl.open, sl.user = true, fmt.Sprint("u", rnd.IntN(40))
				w.open(sessionID(i, sl.generation), sl.user)
			}
		case 2:
			if sl.open {
				w.offer(w.message(id, sl.user, "n"))
				messages++
			}
		case 3:
			w.deliver(rec(s, fmt.Sprint("u", rnd.IntN(40)), fmt.Sprint("u", rnd.IntN(40))))
			delivered += 2
		case 4:
			select {
			case b := <-w.queue:
				w.set.Results(b)
			default:
			}
		}
		select {
		case b := <-w.queue:
			w.set.Results(b)
		default:
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stop := make(chan struct{})
	go func() { // the broker goes on answering
		for {
			select {
			case b := <-w.queue:
				w.set.Results(b)
			case <-stop:
				return
			}
		}
	}()
	defer close(stop)
	if err := w.set.AwaitInFlight(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range slots {
		if sl := &slots[i]; sl.open {
			w.offer(codec.Event{Kind: codec.EventClose, Session: sessionID(uint32(i), sl.generation), Code: codec.CloseAbnormal})
		}
	}
	w.until(func() bool { st := w.set.Stats(); return st.Sessions == 0 && st.Users == 0 && st.InFlight == 0 })
	w.until(func() bool { return s.total() == delivered })
	st := w.set.Stats()
	sum := int64(0)
	for _, n := range st.Ends {
		sum += n
	}
	if sum != int64(delivered) {
		t.Errorf("%d deliveries, ends %v", delivered, st.Ends)
	}
	if messages == 0 || delivered == 0 {
		t.Error("nothing happened")
	}
}

// TestStopSettlesEverything: what is unsettled when the shards stop ends as shutdown.
func TestStopSettlesEverything(t *testing.T) {
	w := newWorld(t, nil)
	w.outcome = func(c *codec.Command) codec.Outcome {
		c.Position = 1 << 40
		return codec.OutcomeBuffered
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.set.Run(ctx) }()
	w.connected(sessionID(0, 1), "alice")
	s := newSink()
	w.deliver(rec(s, "alice"))
	w.until(func() bool { return len(w.sent[sessionID(0, 1)]) == 2 })
	cancel()
	<-done
	if s.count(codec.EndShutdown) != 1 {
		t.Errorf("ends %v", s.ends)
	}
	if err := w.set.Deliver(context.Background(), 0, &codec.DeliveryBatch{}); err != nil && !errors.Is(err, ErrStopped) {
		t.Errorf("Deliver: %v", err)
	}
}

// TestMemoryPerSession: the budget of an idle session, user map and user name included.
func TestMemoryPerSession(t *testing.T) {
	if size := unsafe.Sizeof(session{}); size > 128 {
		t.Errorf("a session is %d bytes", size)
	}
	w := newWorld(t, nil)
	s := w.set.shards[0]
	const n = 100_000
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range uint32(n) {
		id := sessionID(i, 1)
		ses := s.tables[0].grow(i)
		*ses = session{user: fmt.Sprintf("user-%08d", i), id: id, next: noRef, state: live, expiresAt: 1 << 60}
		s.link(ses)
		s.schedule(ses, 1+i%200)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := float64(after.HeapAlloc-before.HeapAlloc) / n
	t.Logf("%.0f bytes per session", per)
	if per > 300 {
		t.Errorf("%.0f bytes per idle session, want at most 300", per)
	}
	runtime.KeepAlive(w)
}

// route takes one message of a session to its ack, on one goroutine.
func route(w *world, s *shard, b *codec.IngressBatch, id codec.SessionID) {
	m := codec.ClientMessage{Type: []byte("m"), ClientMsgID: []byte("c"), Data: []byte("1")}
	b.Events = append(b.Events, codec.Event{Kind: codec.EventMessage, Session: id,
		Upstream: w.builder.Build(&m, "user", id, 1)})
	for i := range b.Events {
		s.onMessage(b.Events[i].Upstream)
	}
	clear(b.Events)
	b.Events = b.Events[:0]
	up := s.up
	s.onResults(up, s.began)
	up.Records = up.Records[:0]
	out := s.out[0].fill
	for i := range out.Commands {
		out.Commands[i].Outcome = codec.OutcomeFlushed
	}
	s.onReturn(out)
	s.out[0].fill = nil
}

func routing(t testing.TB) (*world, *shard, codec.SessionID) {
	w := newWorld(t, nil)
	s := w.set.shards[0]
	id := sessionID(0, 1)
	*s.tables[0].grow(0) = session{user: "user", id: id, next: noRef, state: live, expiresAt: 1 << 60}
	return w, s, id
}

func TestRoutingDoesNotAllocate(t *testing.T) {
	w, s, id := routing(t)
	b := codec.NewIngressBatch(0)
	route(w, s, b, id)
	if n := testing.AllocsPerRun(1000, func() { route(w, s, b, id) }); n > 1 {
		t.Errorf("%.1f allocations per message from event to ack", n)
	}
}

func BenchmarkRoute(b *testing.B) {
	w, s, id := routing(b)
	batch := codec.NewIngressBatch(0)
	b.ReportAllocs()
	for b.Loop() {
		route(w, s, batch, id)
	}
}

// TestNothingIsAcceptedWhileAcksAreSettled: during a stop what is in flight only gets less.
func TestNothingIsAcceptedWhileAcksAreSettled(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	w.offer(w.message(id, "alice", "a"))
	b := w.batch()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	settled := make(chan error, 1)
	go func() { settled <- w.set.AwaitInFlight(ctx) }()
	for i := 0; ; i++ { // until the refusal has taken hold
		w.offer(w.message(id, "alice", fmt.Sprint("b", i)))
		w.until(func() bool { return len(w.sent[id]) == i+2 || len(w.queue) > 0 })
		select {
		case more := <-w.queue:
			w.set.Results(more)
			w.until(func() bool { return len(w.sent[id]) == i+2 })
			continue
		default:
		}
		break
	}
	w.set.Results(b)
	if err := <-settled; err != nil {
		t.Fatal(err)
	}
	got := w.frames(id)
	if last := got[len(got)-1]; last != "message-ack success  a" {
		t.Errorf("frames %q", got)
	}
}

// TestLateClaimIsSuperseded: a claim that finds a session of a later connect closes its own.
func TestLateClaimIsSuperseded(t *testing.T) {
	w := newWorld(t, nil)
	w.presence = func(op PresenceOp) *PresenceResult {
		return &PresenceResult{Kind: op.Kind, Session: op.Session, Superseded: op.Kind == Claim}
	}
	w.run()
	id := sessionID(0, 1)
	w.open(id, "alice")
	w.until(func() bool { return w.closed[id] == codec.CloseReplaced && len(w.replaced) == 0 })
	if n := w.operations(Release); n != 0 {
		t.Errorf("%d releases of an entry that is another's", n)
	}
}

// TestExpiry: a record expires 5 s after its time, and one whose time is as late as can be written never does.
func TestExpiry(t *testing.T) {
	now := time.UnixMilli(1_760_000_000_000)
	w := newWorld(t, func(o *Options) { o.Now = func() time.Time { return now } })
	w.run()
	w.connected(sessionID(0, 1), "alice")
	s := newSink()
	for _, tc := range []struct {
		at   int64
		want codec.End
	}{
		{0, codec.EndDelivered}, {now.UnixMilli() - expirySkew, codec.EndDelivered}, {math.MaxInt64, codec.EndDelivered},
		{math.MaxInt64 - expirySkew + 1, codec.EndDelivered}, {now.UnixMilli() - expirySkew - 1, codec.EndExpired}, {1, codec.EndExpired},
	} {
		before := s.count(tc.want)
		d := rec(s, "alice")
		d.ExpireAt = tc.at
		all := s.total()
		w.deliver(d)
		w.until(func() bool { return s.total() > all })
		if s.count(tc.want) != before+1 {
			t.Errorf("expire_at %d: it did not end as %s", tc.at, tc.want)
		}
	}
}
