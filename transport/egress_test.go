package transport

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"im-gateway/codec"
)

func command(kind codec.CommandKind, id codec.SessionID, payload string) codec.Command {
	return codec.Command{Kind: kind, Session: id, Payload: []byte(payload)}
}

func submit(s *Server, id codec.SessionID, cmds ...codec.Command) {
	s.Submit(&codec.EgressBatch{Shard: id.Shard(), Loop: id.Loop(), Commands: cmds})
}

func TestEgressOutcomes(t *testing.T) {
	s, sink := start(t, nil)
	c := connect(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	stale := codec.MakeSessionID(id.Shard(), id.Loop(), id.Index(), id.Generation()+1)
	unknown := codec.MakeSessionID(id.Shard(), id.Loop(), id.Index()+100, 1)
	submit(s, id, command(codec.CommandFrame, id, "one"), command(codec.CommandFrame, stale, "not for alice"),
		command(codec.CommandFrame, unknown, "nobody"), command(codec.CommandFrame, id, "two"))
	b := sink.returned(t)
	for i, want := range []codec.Outcome{codec.OutcomeFlushed, codec.OutcomeGone, codec.OutcomeGone, codec.OutcomeFlushed} {
		if b.Commands[i].Outcome != want {
			t.Errorf("command %d: outcome %d, want %d", i, b.Commands[i].Outcome, want)
		}
	}
	for _, want := range []string{"one", "two"} {
		if f := c.read(); string(f.Payload) != want {
			t.Errorf("got %q, want %q", f.Payload, want)
		}
	}
	closing := codec.Command{Kind: codec.CommandClose, Session: id, Code: codec.CloseKicked, Reason: "kicked"}
	submit(s, id, command(codec.CommandFrame, id, "last"), closing, command(codec.CommandFrame, id, "too late"))
	b = sink.returned(t)
	if b.Commands[0].Outcome != codec.OutcomeFlushed || b.Commands[2].Outcome != codec.OutcomeGone {
		t.Errorf("outcomes %d, %d", b.Commands[0].Outcome, b.Commands[2].Outcome)
	}
	if f := c.read(); string(f.Payload) != "last" {
		t.Errorf("got %q", f.Payload)
	}
	if code := c.closed(); code != ws.StatusCode(codec.CloseKicked) {
		t.Errorf("closed with %d", code)
	}
	if e := sink.next(t, codec.EventClose); e.Session != id || e.Code != codec.CloseKicked {
		t.Errorf("closed %+v", e)
	}
	// The slot is used again under another generation.
	connect(t, s, "alice")
	again := sink.next(t, codec.EventOpen).Session
	if again == id {
		t.Error("the new session has the old one's id")
	}
}

// TestSlowReader: what the kernel does not take is buffered, reported once it is taken, and ends in
// 4000 beyond the budget.
func TestSlowReader(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Settings.EgressBudget = 32 << 20 })
	c := connect(t, s, "slow")
	id := sink.next(t, codec.EventOpen).Session
	payload := strings.Repeat("x", 60_000)
	var position uint64
	for range 400 {
		submit(s, id, command(codec.CommandFrame, id, payload))
		if b := sink.returned(t); b.Commands[0].Outcome == codec.OutcomeBuffered {
			position = b.Commands[0].Position
		}
	}
	if position == 0 {
		t.Fatal("24 MB were flushed to a client that does not read")
	}
	for range 400 {
		if f := c.read(); len(f.Payload) != len(payload) {
			t.Fatalf("a frame of %d bytes", len(f.Payload))
		}
	}
	for {
		if e := sink.next(t, codec.EventFlushed); uint64(e.Value) >= position {
			break
		}
	}
}

func TestLoopClosesWhatNobodyReads(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Settings.EgressBudget = 1 << 20 })
	c := connect(t, s, "slow")
	id := sink.next(t, codec.EventOpen).Session
	for range 400 {
		submit(s, id, command(codec.CommandFrame, id, strings.Repeat("x", 60_000)))
		sink.returned(t)
	}
	if e := sink.next(t, codec.EventClose); e.Code != codec.CloseSlowConsumer {
		t.Errorf("closed with %d", e.Code)
	}
	_ = c.Close()
}

func TestSilentClientIsClosed(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Settings.HeartbeatTimeout = 50 * time.Millisecond })
	c := connect(t, s, "quiet")
	id := sink.next(t, codec.EventOpen).Session
	eventually(t, func() bool {
		submit(s, id, codec.Command{Kind: codec.CommandPing, Session: id})
		sink.returned(t)
		select {
		case e := <-sink.events:
			return e.Kind == codec.EventClose && e.Code == codec.CloseHeartbeatMissed
		default:
			return false
		}
	})
	if code := c.closed(); code != ws.StatusCode(codec.CloseHeartbeatMissed) {
		t.Errorf("closed with %d", code)
	}
}

func TestLostConnectionEndsTheSession(t *testing.T) {
	s, sink := start(t, nil)
	c := connect(t, s, "gone")
	id := sink.next(t, codec.EventOpen).Session
	_ = c.Close()
	if e := sink.next(t, codec.EventClose); e.Session != id || e.Code != codec.CloseAbnormal {
		t.Errorf("%+v", e)
	}
}

// TestFullShard: while a shard takes nothing, messages are refused beyond a bound, lifecycle
// events are kept, and everything flows again after Resume.
func TestFullShard(t *testing.T) {
	s, sink := start(t, func(o *Options) { o.Loops = 1 })
	sink.shards = 1
	c := connect(t, s, "alice")
	id := sink.next(t, codec.EventOpen).Session
	sink.full.Store(true)
	const n = 3 * stalledEvents
	refused := make(chan int, 1)
	go func() {
		count := 0
		for count < n {
			f, err := ws.ReadFrame(c.r)
			if err != nil || strings.Contains(string(f.Payload), "pong") {
				break
			}
			if strings.Contains(string(f.Payload), string(codec.Overloaded)) {
				count++
			}
		}
		refused <- count
	}()
	for i := range n {
		c.send(text(fmt.Sprintf(`{"type":"m","message_id":"%d","data":0}`, i)))
	}
	c.send(text(`{"type":"ping"}`))
	got := <-refused
	if got == 0 || got > n-stalledEvents {
		t.Errorf("%d refused of %d", got, n)
	}
	other := connect(t, s, "alice")
	sink.full.Store(false)
	s.Resume(0, id.Shard())
	for i := range n - got {
		if e := sink.next(t, codec.EventMessage); string(e.Upstream.ClientMsgID) != fmt.Sprint(i) {
			t.Fatalf("message %q came as number %d", e.Upstream.ClientMsgID, i)
		}
	}
	if e := sink.next(t, codec.EventOpen); e.Open.User != "alice" {
		t.Errorf("%+v", e.Open)
	}
	_ = other.Close()
}

func TestMessages(t *testing.T) {
	s, sink := start(t, nil)
	c := connect(t, s, "alice")
	sink.next(t, codec.EventOpen)
	later := token(t, "alice", 2*time.Hour)
	for _, tc := range []struct{ name, send, want string }{
		{"ping", `{"type":"ping"}`, `"type":"pong"`},
		{"no JSON", `{"type":`, `"code":"INVALID_MESSAGE"`},
		{"no data, named", `{"type":"m","message_id":"x1"}`, `"client_msg_id":"x1","status":"error","code":"INVALID_MESSAGE"`},
		{"bad token", `{"type":"refresh-token","data":{"token":"x.y.z"}}`, `"code":"AUTH_FAILED"`},
		{"another user's token", `{"type":"refresh-token","data":{"token":"` + token(t, "bob", 2*time.Hour) + `"}}`, `"code":"AUTH_FAILED"`},
		{"earlier expiry", `{"type":"refresh-token","data":{"token":"` + token(t, "alice", time.Minute) + `"}}`, `"code":"AUTH_FAILED"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c.send(text(tc.send))
			f := c.read()
			if !json.Valid(f.Payload) || !strings.Contains(string(f.Payload), tc.want) {
				t.Errorf("got %s, want %s in it", f.Payload, tc.want)
			}
		})
	}
	c.send(text(`{"type":"refresh-token","data":{"token":"` + later + `"}}`))
	if e := sink.next(t, codec.EventRefresh); e.Value < time.Now().Add(90*time.Minute).UnixMilli() {
		t.Errorf("refreshed until %d", e.Value)
	}
	c.send(frame(true, ws.OpBinary, "x"))
	if code := c.closed(); code != 1003 {
		t.Errorf("binary: closed with %d", code)
	}
}

// TestDrainingRefusesUpgrades: connections opened before may not upgrade any more.
func TestDrainingRefusesUpgrades(t *testing.T) {
	s, _ := start(t, nil)
	c := dial(t, s)
	c.send("GET /ws HTTP/1.1\r\n")
	eventually(t, func() bool { return s.Connections() == 1 })
	s.StopAccepting()
	c.send(upgradeLines, "Authorization: Bearer ", token(t, "a", time.Hour), "\r\n\r\n")
	if resp, _ := c.answer(); resp.StatusCode != 503 {
		t.Errorf("upgrade while draining: %s", resp.Status)
	}
}

// The hot paths, alone: a connection whose socket discards what is written.
func BenchmarkEcho(b *testing.B) {
	s := startEcho(b, func(o *Options) { o.Loops = 1 })
	c := echoClient(b, s)
	m := []byte(text(strings.Repeat("x", 128)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(m); err != nil {
			b.Fatal(err)
		}
		if _, err := c.r.Discard(130); err != nil {
			b.Fatal(err)
		}
	}
}
