package shard

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"im-gateway/codec"
)

func TestSettingsChecked(t *testing.T) {
	w := newWorld(t, nil)
	good := w.set.rules.Load()
	for name, change := range map[string]func(*Settings){
		"no egress budget":        func(n *Settings) { n.EgressBudget = 0 },
		"large egress budget":     func(n *Settings) { n.EgressBudget = maxEgressBudget + 1 },
		"negative node budget":    func(n *Settings) { n.NodeEgressBudget = -1 },
		"negative close rate":     func(n *Settings) { n.CloseRate = -1 },
		"many messages in flight": func(n *Settings) { n.MaxSessionInFlight = MaxSessionInFlight + 1 },
		"negative rate":           func(n *Settings) { n.UserBytesPerSecond = -1 },
	} {
		next := good.Settings
		change(&next)
		if _, err := w.set.Prepare(next); err == nil {
			t.Errorf("%s: taken", name)
		}
		o := w.set.opts
		o.Settings = next
		if _, err := New(o); err == nil {
			t.Errorf("%s: taken at the start", name)
		}
	}
	apply, err := w.set.Prepare(good.Settings)
	if err != nil {
		t.Fatal(err)
	}
	if w.set.rules.Load() != good {
		t.Error("in force before they were applied")
	}
	if apply(); w.set.rules.Load() == good {
		t.Error("not in force after they were applied")
	}
}

// TestSettingsOnOpenSessions: limits that change hold for sessions that are open.
func TestSettingsOnOpenSessions(t *testing.T) {
	l := limitedUser(t, 0, 0)
	id := l.connect(0, "alice")
	say := func(n int, want string) {
		t.Helper()
		for i := range n {
			code, _ := l.say("alice", id, 1)
			if last := i == n-1; last && code != want || !last && code != "" {
				t.Errorf("message %d of %d: %q", i, n, code)
			}
		}
	}
	say(100, "")
	l.alter(func(n *Settings) { n.UserMessagesPerSecond = 5 })
	say(11, string(codec.RateLimited))
	l.alter(func(n *Settings) { n.UserMessagesPerSecond = 0 })
	say(100, "")
	l.alter(func(n *Settings) { n.MaxSessionInFlight = 210 })
	say(1, string(codec.Overloaded)) // 210 have no answer yet
	l.alter(func(n *Settings) { n.MaxSessionInFlight = 220 })
	say(11, string(codec.Overloaded))

	w := newWorld(t, nil)
	w.outcome = func(*codec.Command) codec.Outcome { return codec.OutcomeBuffered }
	w.run()
	w.connected(sessionID(0, 1), "bob")
	s := newSink()
	push := func() {
		d := rec(s, "bob")
		d.Frame = append([]byte(`{"x":"`+strings.Repeat("a", 10_000)), `"}`...)
		w.deliver(d)
	}
	push()
	w.eventually(func() bool { return len(w.raw(sessionID(0, 1))) == 2 })
	alter(t, w.set, func(n *Settings) { n.EgressBudget, n.MaxMessageBytes = 5000, 4321 })
	push()
	w.eventually(func() bool { return w.closeCode(sessionID(0, 1)) == codec.CloseSlowConsumer })
	w.eventually(func() bool { return s.count(codec.EndSlowConsumer) == 2 })
	w.connected(sessionID(1, 1), "carol")
	if first := w.raw(sessionID(1, 1))[0]; !strings.Contains(first, `"max_message_bytes":4321`) {
		t.Errorf("told: %s", first)
	}
}

// TestSettingsUnderLoad: settings that change all the time lose no message, for -race too.
func TestSettingsUnderLoad(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	id := sessionID(0, 1)
	w.connected(id, "alice")
	stop := make(chan struct{})
	var changing sync.WaitGroup
	changing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				alter(t, w.set, func(n *Settings) {
					n.UserMessagesPerSecond, n.UserBytesPerSecond = 1e9-i, 0
					n.MaxSessionInFlight, n.EgressBudget = 60_000+i%1000, 1<<20+i
					n.NodeEgressBudget, n.CloseRate = 1<<30+i, 1+i
				})
			}
		}
	})
	const messages = 2000
	go func() {
		for i := range messages {
			w.offer(w.message(id, "alice", fmt.Sprint("n", i)))
		}
	}()
	for n := 0; n < messages; {
		b := w.batch()
		n += len(b.Records)
		w.set.Results(b)
	}
	w.eventually(func() bool { return len(w.raw(id)) == messages+1 })
	for i, f := range w.frames(id)[1:] {
		if f != fmt.Sprintf("message-ack success  n%d", i) {
			t.Fatalf("answer %d: %s", i, f)
		}
	}
	close(stop)
	changing.Wait()
}
