package shard

import (
	"context"
	"errors"
	"io"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"im-gateway/codec"
)

// TestPanicLosesNothingElse: one event that panics costs one session, not the rest of its batch.
func TestPanicLosesNothingElse(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	a, b, c := sessionID(0, 1), sessionID(1, 1), sessionID(2, 1)
	w.connected(a, "alice")
	w.connected(b, "bob")
	gone := codec.Event{Kind: codec.EventClose, Session: b, Code: codec.CloseAbnormal, Reason: "lost"}
	w.offer(
		codec.Event{Kind: codec.EventMessage, Session: a}, // no record: it panics
		gone,
		codec.Event{Kind: codec.EventOpen, Session: c, Open: &codec.Open{User: "carol", ExpiresAt: 1 << 60}},
	)
	w.until(func() bool { return w.closed[a] == codec.CloseInternal && len(w.sent[c]) == 1 })
	w.until(func() bool { st := w.set.Stats(); return st.Sessions == 1 && st.Users == 1 })

	// A delivery that panics still ends, and the one behind it arrives.
	s := newSink()
	bad := &codec.DeliveryBatch{Deliveries: []codec.Delivery{
		{Record: rec(s, "carol"), Target: 7}, {Record: rec(s, "carol"), Target: 0},
	}}
	if err := w.set.Deliver(context.Background(), 0, bad); err != nil {
		t.Fatal(err)
	}
	w.until(func() bool { return s.count(codec.EndOffline) == 1 && s.count(codec.EndDelivered) == 1 })
}

// TestPanickingPorts: what the ports do wrong leaves the shard in order.
func TestPanickingPorts(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Events = panickingEvents{} })
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	w.offer(codec.Event{Kind: codec.EventClose, Session: id, Code: codec.CloseAbnormal, Reason: "lost"})
	w.until(func() bool { st := w.set.Stats(); return st.Sessions == 0 && st.Users == 0 })
	w.connected(sessionID(0, 2), "alice")
}

type panickingEvents struct{}

func (panickingEvents) UserEvent(bool, string, codec.SessionID, string, int64) { panic("injected") }

// TestOpenWhileDraining: a session that comes too late does not cost the user the one that lives.
func TestOpenWhileDraining(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	old, late := sessionID(0, 1), sessionID(1, 1)
	w.connected(old, "alice")
	if err := w.set.Drain(t.Context(), 0, "draining"); err != nil {
		t.Fatal(err)
	}
	w.open(late, "alice")
	w.until(func() bool { return w.closed[late] == codec.CloseDraining })
	s := newSink()
	w.deliver(rec(s, "alice"))
	w.until(func() bool { return s.count(codec.EndDelivered) == 1 })
	if code := w.closeCode(old); code != 0 {
		t.Errorf("the older session was closed with %d", code)
	}
	if err := w.set.CloseAll(t.Context(), codec.CloseDraining, "draining"); err != nil {
		t.Fatal(err)
	}
	if n := w.operations(Release); n != 1 {
		t.Errorf("%d releases, want one: the late session never had an entry", n)
	}
}

// TestUserEvents: online once per session, offline when the user's last session has ended.
func TestUserEvents(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	w.connected(sessionID(0, 1), "alice")
	w.connected(sessionID(1, 1), "alice")
	w.until(func() bool { return w.closed[sessionID(0, 1)] == codec.CloseReplaced })
	w.offer(codec.Event{Kind: codec.EventClose, Session: sessionID(1, 1), Code: codec.CloseAbnormal, Reason: "lost"})
	w.until(func() bool { return len(w.events) >= 3 && w.set.Stats().Users == 0 })
	w.mu.Lock()
	defer w.mu.Unlock()
	want := []string{"alice true connected", "alice true connected", "alice false lost"}
	if !reflect.DeepEqual(w.events, want) {
		t.Errorf("events %q, want %q", w.events, want)
	}
}

// TestReplacedBeforeConnected: the newer session ends before presence was claimed for it; the user's
// offline is not lost with it.
func TestReplacedBeforeConnected(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	w.connected(sessionID(0, 1), "alice")
	w.mu.Lock()
	w.presence = func(PresenceOp) *PresenceResult { return nil }
	w.mu.Unlock()
	w.open(sessionID(1, 1), "alice")
	w.offer(codec.Event{Kind: codec.EventClose, Session: sessionID(1, 1), Code: codec.CloseAbnormal, Reason: "lost"})
	w.until(func() bool { return len(w.events) > 0 && w.events[len(w.events)-1] == "alice false lost" })
}

// TestRefreshWaitsForConnected: `connected` is the first frame whatever the client is quick to send.
func TestRefreshWaitsForConnected(t *testing.T) {
	w := newWorld(t, nil)
	claims := make(chan PresenceOp, 1)
	w.presence = func(op PresenceOp) *PresenceResult { claims <- op; return nil }
	w.run()
	id := sessionID(0, 1)
	w.open(id, "alice")
	op := <-claims
	w.offer(codec.Event{Kind: codec.EventRefresh, Session: id, Value: time.Now().Add(time.Hour).UnixMilli()})
	if _, err := w.set.Sessions(t.Context(), "alice"); err != nil { // the shard is past the event
		t.Fatal(err)
	}
	w.until(func() bool { return len(w.set.shards[0].ingress) == 0 })
	w.set.PresenceResults(0, []PresenceResult{{Kind: Claim, Session: op.Session, Version: 1}})
	w.until(func() bool { return len(w.sent[id]) == 2 })
	if got := w.frames(id); got[0] != "connected   " || got[1] != "token-refreshed   " {
		t.Errorf("frames %q", got)
	}
}

// TestClaimNamesOwnSession: the entry was held by another session of this gateway that still lives.
func TestClaimNamesOwnSession(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	older, newer := sessionID(0, 1), sessionID(1, 1)
	w.connected(older, "alice")
	w.connected(newer, "bob")
	w.set.PresenceResults(0, []PresenceResult{
		{Kind: Claim, Session: newer, Version: 2, Evicted: []Evicted{{"g", older.Name(7)}}}})
	w.until(func() bool { return w.closed[older] == codec.CloseReplaced })
	// Its own name, and one of a process before this one, mean nothing.
	w.set.PresenceResults(0, []PresenceResult{
		{Kind: Claim, Session: newer, Version: 3, Evicted: []Evicted{{"g", newer.Name(7)}}},
		{Kind: Claim, Session: newer, Version: 4, Evicted: []Evicted{{"g", newer.Name(8)}}}})
	s := newSink()
	w.deliver(rec(s, "bob"))
	w.until(func() bool { return s.count(codec.EndDelivered) == 1 })
	if len(w.replaced) != 0 {
		t.Errorf("told another gateway: %q", w.replaced)
	}
}

// keeper is a loop that never returns what it was given.
type keeper struct{ got chan *codec.EgressBatch }

func (k keeper) Submit(b *codec.EgressBatch) { k.got <- b }
func (k keeper) Resume(int, int)             {}

// TestStopSettlesWhatLoopsHold: a batch that no loop returns does not keep its deliveries open.
func TestStopSettlesWhatLoopsHold(t *testing.T) {
	k := keeper{make(chan *codec.EgressBatch, 8)}
	w := newWorld(t, func(o *Options) { o.Egress = k })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.set.Run(ctx) }()
	w.open(sessionID(0, 1), "alice")
	<-k.got // `connected`; returned, so that the next batch goes out
	w.set.Return(&codec.EgressBatch{})
	s := newSink()
	w.deliver(rec(s, "alice"))
	<-k.got
	w.deliver(rec(s, "alice")) // waits behind it
	cancel()
	<-done
	if s.count(codec.EndShutdown) != 2 || s.total() != 2 {
		t.Errorf("ends %v", s.ends)
	}
}

// TestDeliverRacesStop: what Deliver took has ended once Run is back; what it refused has not.
func TestDeliverRacesStop(t *testing.T) {
	for range 50 {
		w := newWorld(t, nil)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = w.set.Run(ctx) }()
		s := newSink()
		var taken int
		var senders sync.WaitGroup
		started := make(chan struct{})
		senders.Go(func() {
			for i := 0; ; i++ {
				b := &codec.DeliveryBatch{Deliveries: []codec.Delivery{{Record: rec(s, "alice")}}}
				if err := w.set.Deliver(context.Background(), 0, b); err != nil {
					if !errors.Is(err, ErrStopped) {
						t.Error(err)
					}
					return
				}
				taken++
				if i == 0 {
					close(started)
				}
			}
		})
		<-started
		cancel()
		<-done
		senders.Wait()
		if got := s.total(); got != taken {
			t.Fatalf("%d deliveries taken, %d ended", taken, got)
		}
	}
}

// TestPushWithoutTargets returns at once.
func TestPushWithoutTargets(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if ends, err := w.set.Push(ctx, rec(nil)); len(ends) != 0 || err != nil || ctx.Err() != nil {
		t.Errorf("Push: %v, %v, %v", ends, err, ctx.Err())
	}
}

// TestControlGivenUp: a call whose ctx has ended shares nothing with the shard that still serves it.
func TestControlGivenUp(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	w.connected(sessionID(0, 1), "alice")
	for range 200 {
		ctx, cancel := context.WithCancel(context.Background())
		go cancel()
		_, _ = w.set.Sessions(ctx, "alice")
		_, _ = w.set.Kick(ctx, "alice", sessionID(9, 9).Name(7), false, "")
	}
}

// TestPanicInAClose: a close is reported once, so its slot is given up even where handling it panics.
func TestPanicInAClose(t *testing.T) {
	w := newWorld(t, func(o *Options) {
		o.Logger = zerolog.New(io.Discard).Hook(zerolog.HookFunc(func(_ *zerolog.Event, _ zerolog.Level, message string) {
			if message == "disconnected" {
				panic("injected")
			}
		}))
	})
	w.run()
	w.connected(sessionID(0, 1), "alice")
	w.offer(codec.Event{Kind: codec.EventClose, Session: sessionID(0, 1), Code: codec.CloseAbnormal, Reason: "lost"})
	w.until(func() bool { st := w.set.Stats(); return st.Sessions == 0 && st.Users == 0 })
	w.connected(sessionID(0, 2), "alice")
}
