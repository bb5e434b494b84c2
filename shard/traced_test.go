package shard

import (
	"fmt"
	"testing"
	"time"

	"im-gateway/codec"
)

// TestTracedMessages: each message with a span is told once, with its fate, after its client was answered.
func TestTracedMessages(t *testing.T) {
	r := newRetrier(t, 100)
	r.builder = codec.NewBuilder("g", 7, codec.NewSampler(1, 1000))
	var told []string
	r.s.opts.Traced = func(u *codec.Upstream) {
		told = append(told, fmt.Sprintf("%s %s %d %s", u.ClientMsgID, u.Result.Code, u.Result.Offset, u.MessageID))
	}
	want := func(what string, list ...string) {
		t.Helper()
		if fmt.Sprint(told) != fmt.Sprint(list) {
			t.Errorf("%s: told %q, want %q", what, told, list)
		}
		told = nil
	}
	r.open(1)
	id, user := sessionID(0, 1), "user-00000000"

	first := r.send(id, user, "a")
	r.want(first, 1)
	name := string(first[0].MessageID)
	r.want(r.send(id, user, "a"), 0) // waits for the first one's result
	want("in flight")
	r.result(first[0], codec.OK)
	want("stored", "a  1 "+name, "a  1 "+name)
	r.want(r.send(id, user, "a"), 0)
	want("sent again", "a  1 "+name)

	failed := r.send(id, user, "b")
	r.want(failed, 1)
	name = string(failed[0].MessageID)
	r.pass(11 * time.Second)
	r.s.expireFlight()
	want("told OUTCOME_UNKNOWN") // the span goes on until it is known
	r.result(failed[0], codec.BrokerUnavailable)
	want("failed", "b BROKER_UNAVAILABLE 2 "+name)

	u := r.builder.Build(&codec.ClientMessage{Type: typeM, ClientMsgID: []byte("x"), Data: dataOne}, user, sessionID(9, 1), r.s.now)
	name = string(u.MessageID)
	r.s.onMessage(u)
	want("of a session that has ended", "x SESSION_NOT_FOUND 0 "+name)

	before := r.s.rules
	after := *before
	after.MaxSessionInFlight = 1
	r.s.rules = &after
	r.want(r.send(id, user, "c"), 1)
	u = r.builder.Build(&codec.ClientMessage{Type: typeM, ClientMsgID: []byte("d"), Data: dataOne}, user, id, r.s.now)
	name = string(u.MessageID)
	r.s.onMessage(u)
	want("refused", "d OVERLOADED 0 "+name)

	r.s.drain.refuse = true
	reply := make(chan codec.UpstreamResult, 1)
	u = r.builder.Build(&codec.ClientMessage{Type: typeM, ClientMsgID: []byte("e"), Data: dataOne}, user, 0, r.s.now)
	u.Reply, name = reply, string(u.MessageID)
	r.s.onPublish(u)
	want("refused over HTTP", "e OVERLOADED 0 "+name)
	if got := <-reply; got.Code != codec.Overloaded {
		t.Errorf("answered %+v", got)
	}

	r.builder = codec.NewBuilder("g", 7, nil)
	r.s.drain.refuse, r.s.rules = false, before
	plain := r.send(id, user, "f")
	r.want(plain, 1)
	r.result(plain[0], codec.OK)
	want("not traced")
}
