package shard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"im-gateway/codec"
)

// metered tells whether the shard measures.
func (w *world) metered() (on bool) {
	w.t.Helper()
	if err := w.set.do(w.t.Context(), 0, func(s *shard) { on = s.meter != nil }); err != nil {
		w.t.Fatal(err)
	}
	return on
}

func in(t *Talk) int64  { return t.In }
func out(t *Talk) int64 { return t.BytesOut }

// TestMeasure: what each user sends, refused or not, by HTTP too, and is sent, on all sessions together.
func TestMeasure(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.MaxSessions = 4 })
	w.run()
	a1, a2, b := sessionID(0, 1), sessionID(1, 1), sessionID(2, 1)
	w.connected(a1, "alice")
	w.connected(a2, "alice")
	w.connected(b, "bob")
	w.offer(w.message(b, "bob", "before")) // not counted
	w.until(func() bool { return w.admitted == 1 })

	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan Talks)
	enough := errors.New("enough")
	go func() {
		all, err := w.set.Measure(ctx, time.Hour)
		if !errors.Is(err, enough) {
			t.Errorf("measured: %v", err)
		}
		done <- all
	}()
	for deadline := time.Now().Add(patience); !w.metered(); {
		if time.Now().After(deadline) {
			t.Fatal("nothing is measured")
		}
	}
	// Another one waits, and goes away unserved.
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := w.set.Measure(gone, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a second measurement: %v", err)
	}

	for i := range 3 {
		w.offer(w.message(a1, "alice", fmt.Sprint("one", i)), w.message(a2, "alice", fmt.Sprint("two", i)))
	}
	w.until(func() bool { return w.admitted == 7 })
	w.mu.Lock()
	w.refuse = codec.Overloaded
	w.mu.Unlock()
	w.offer(w.message(b, "bob", "refused"))
	w.until(func() bool { return len(w.sent[b]) == 2 })
	m := codec.ClientMessage{Type: []byte("m"), Data: []byte("1")}
	if r, err := w.set.Publish(t.Context(), w.builder.Build(&m, "carol", 0, 1)); err != nil || r.Code != codec.Overloaded {
		t.Fatalf("published: %v %v", r, err)
	}
	ends := newSink()
	d := rec(ends, "alice", "dave")
	w.deliver(d)
	w.until(func() bool { return len(w.sent[a1]) == 2 && len(w.sent[a2]) == 2 })

	cancel(enough)
	all := <-done
	if all.Window <= 0 || all.Missed != 0 || len(all.Users) != 3 {
		t.Errorf("%+v", all)
	}
	top := all.Top(10, in)
	if len(top) != 3 || top[0].User != "alice" || top[1].User != "bob" || top[2].User != "carol" {
		t.Fatalf("senders: %+v", top)
	}
	frame := int64(len(w.raw(a1)[1]))
	if a := top[0]; a.In != 6 || a.BytesIn < 6*50 || a.Out != 2 || a.BytesOut != 2*frame {
		t.Errorf("alice: %+v, with frames of %d bytes", a, frame)
	}
	if b := top[1]; b.In != 1 || b.Out != 0 { // the refusal is no delivery
		t.Errorf("bob: %+v", b)
	}
	if top := all.Top(1, in); len(top) != 1 || top[0].User != "alice" {
		t.Errorf("the first: %+v", top)
	}
	if top := all.Top(10, out); len(top) != 1 || top[0].User != "alice" {
		t.Errorf("receivers: %+v", top)
	}
	if w.metered() {
		t.Error("the shard goes on measuring")
	}
	if all, err := w.set.Measure(t.Context(), time.Millisecond); err != nil || len(all.Users) != 0 || all.Window < time.Millisecond {
		t.Errorf("in silence: %+v %v", all, err)
	}
}

// TestMeasureEndsWithTheShards: nobody waits for shards that have stopped.
func TestMeasureEndsWithTheShards(t *testing.T) {
	w := newWorld(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- w.set.Run(ctx) }()
	done := make(chan error, 1)
	go func() {
		_, err := w.set.Measure(t.Context(), time.Hour)
		done <- err
	}()
	for deadline := time.Now().Add(patience); !w.metered(); {
		if time.Now().After(deadline) {
			t.Fatal("nothing is measured")
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, ErrStopped) {
		t.Errorf("measured: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// TestMeterIsBounded: further users are counted together.
func TestMeterIsBounded(t *testing.T) {
	m := &meter{users: map[string]*Talk{}}
	for i := range meteredUsers + 10 {
		m.received(fmt.Sprint("user", i), 1)
	}
	m.received("user0", 1)
	if len(m.users) != meteredUsers || m.missed != 10 || m.users["user0"].Out != 2 {
		t.Errorf("%d users, %d missed, %+v", len(m.users), m.missed, m.users["user0"])
	}
}

// TestTop holds the short way to the first few against sorting them all, and to its cost: it moves nobody who
// is not among them.
func TestTop(t *testing.T) {
	var all Talks
	for i := range 1000 {
		all.Users = append(all.Users, Talk{User: fmt.Sprintf("u%03d", i), In: rand.Int64N(50)})
	}
	sorted := slices.DeleteFunc(slices.Clone(all.Users), func(u Talk) bool { return u.In == 0 })
	slices.SortFunc(sorted, func(a, b Talk) int { return cmp.Or(cmp.Compare(b.In, a.In), cmp.Compare(a.User, b.User)) })
	for _, n := range []int{1, 10, 100, len(sorted), 2000} {
		if got := all.Top(n, in); !slices.Equal(got, sorted[:min(n, len(sorted))]) {
			t.Errorf("the first %d: %v", n, got)
		}
	}
	var none Talks
	if got := none.Top(10, in); len(got) != 0 {
		t.Errorf("of nobody: %v", got)
	}
	if n := testing.AllocsPerRun(10, func() { all.Top(10, in) }); n > 2 {
		t.Errorf("%v allocations", n)
	}
}
