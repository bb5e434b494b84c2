package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec/gatewaypb"
)

// readBack returns a record of the upstream topic by its place.
func readBack(t *testing.T, a ack) (value string) {
	t.Helper()
	if env.real != nil {
		text, err := env.real.kafka.ConsoleConsume(deadline(t), a.Topic, a.Partition, a.Offset)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	r := find(t, a.Topic, func(r *kgo.Record) bool { return r.Partition == a.Partition && r.Offset == a.Offset })
	return string(r.Value)
}

// typeDownstream puts a line on a gateway's topic, as a person with a console producer does.
func typeDownstream(t *testing.T, g *gateway, line string) {
	t.Helper()
	if env.real == nil {
		produce(t, g, "", line)
		return
	}
	if err := env.real.kafka.ConsoleProduce(deadline(t), "im-downstream-topic-"+g.id, line); err != nil {
		t.Fatal(err)
	}
}

// TestSentMessageIsReadBackFromKafka: the ack names the place where kafka-console-consumer finds it.
func TestSentMessageIsReadBackFromKafka(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	c := connect(t, g, name)
	c.send("send-message", "c-1", map[string]any{"conversation_id": "v1", "content": "héllo"})
	a := c.ack()
	if a.ClientMsgID != "c-1" || a.Status != "success" || a.Topic != "im-upstream-topic" {
		t.Fatalf("ack %+v", a)
	}
	var r struct {
		MessageID       string          `json:"message_id"`
		TraceID         string          `json:"trace_id"`
		UserID          string          `json:"user_id"`
		GatewayID       string          `json:"gateway_id"`
		SessionID       string          `json:"session_id"`
		Type            string          `json:"type"`
		ClientMsgID     string          `json:"client_msg_id"`
		Data            json.RawMessage `json:"data"`
		Timestamp       int64           `json:"timestamp"`
		ClientTimestamp int64           `json:"client_timestamp"`
	}
	decode(t, []byte(readBack(t, a)), &r)
	if r.MessageID != a.MessageID || len(r.TraceID) != 32 || r.UserID != name || r.GatewayID != g.id || r.SessionID != c.session ||
		r.Type != "send-message" || r.ClientMsgID != "c-1" || string(r.Data) != `{"content":"héllo","conversation_id":"v1"}` ||
		r.Timestamp == 0 || r.ClientTimestamp == 0 {
		t.Errorf("record %+v", r)
	}
	record := find(t, a.Topic, func(r *kgo.Record) bool { return r.Partition == a.Partition && r.Offset == a.Offset })
	if string(record.Key) != name || header(record, "type") != "send-message" || header(record, "gateway_id") != g.id ||
		header(record, "client_msg_id") != "c-1" || !strings.Contains(header(record, "traceparent"), r.TraceID) {
		t.Errorf("key %q, headers %v", record.Key, record.Headers)
	}
	// GoChat's own page names its messages so.
	c.send("send-message", "", map[string]any{"tempMessageId": "t-1", "content": "x"})
	if a := c.ack(); a.TempMessageID != "t-1" || a.ClientMsgID != "t-1" || len(a.MessageID) != 26 {
		t.Errorf("ack %+v", a)
	}
}

func TestOrderAndAcks(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	c := connect(t, g, name)
	const n = 200
	for i := range n {
		c.send("m", fmt.Sprint("c-", i), i)
	}
	last := ack{Offset: -1}
	for i := range n {
		a := c.ack()
		if a.ClientMsgID != fmt.Sprint("c-", i) || a.Status != "success" {
			t.Fatalf("ack %d: %+v", i, a)
		}
		if last.Offset >= 0 && (a.Partition != last.Partition || a.Offset <= last.Offset) {
			t.Fatalf("ack %d: %+v after %+v", i, a, last)
		}
		last = a
	}
}

// TestTypedRecordReachesThatUserAndNoOther, by kafka-console-producer on the real servers.
func TestTypedRecordReachesThatUserAndNoOther(t *testing.T) {
	g := start(t, user("gw"), nil)
	alice, bob := user("alice"), user("bob")
	a, b := connect(t, g, alice), connect(t, g, bob)
	typeDownstream(t, g, fmt.Sprintf(`{"user_id":%q,"content":"hi"}`, alice))
	f := a.wait("new-message")
	if string(f.Data) != `{"content":"hi"}` || !strings.HasPrefix(f.MessageID, "im-downstream-topic-"+g.id+"-") {
		t.Errorf("alice got %+v %s", f, f.Data)
	}
	// One record for both, after which bob's next frame must be this one.
	typeDownstream(t, g, fmt.Sprintf(`{"target_user_ids":[%q,%q],"type":"news","message_id":"m-1","data":[1, 2]}`, alice, bob))
	for _, c := range []*client{a, b} {
		f, err := c.next()
		if err != nil || f.Type != "news" || f.MessageID != "m-1" || string(f.Data) != "[1, 2]" {
			t.Errorf("%s got %+v %s, %v", c.name, f, f.Data, err)
		}
	}
	eventually(t, "every delivery has ended", func() bool {
		return g.metric("im_gateway_shard_deliveries_open") == "0" && g.metric(`im_gateway_shard_ends_total{end="delivered"}`) == "3"
	})
}

func TestUndeliveredAndDeadLetters(t *testing.T) {
	g := start(t, user("gw"), nil)
	nobody := user("nobody")
	produce(t, g, nobody, fmt.Sprintf(`{"target_user_id":%q,"message_id":"m-1","data":1}`, nobody))
	r := find(t, "im-undelivered-topic", contains(nobody))
	if header(r, "reason") != "offline" || header(r, "gateway_id") != g.id || string(r.Key) != nobody {
		t.Errorf("key %q, headers %v", r.Key, r.Headers)
	}
	late := user("late")
	connect(t, g, late)
	produce(t, g, late, fmt.Sprintf(`{"target_user_id":%q,"data":1,"expire_at":%d}`, late, time.Now().Add(-time.Minute).UnixMilli()))
	if r := find(t, "im-undelivered-topic", contains(late)); header(r, "reason") != "expired" {
		t.Errorf("headers %v", r.Headers)
	}
	garbage := "\x00\xff not JSON " + user("garbage")
	produce(t, g, "k", garbage)
	r = find(t, "im-deadletter-topic", contains(garbage))
	if string(r.Value) != garbage || string(r.Key) != "k" || header(r, "reason") == "" {
		t.Errorf("key %q, value %q, headers %v", r.Key, r.Value, r.Headers)
	}
}

func TestKickRecordAndUserEvents(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	c := connect(t, g, name)
	produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"type":"kick","data":{"reason":"spam"}}`, name))
	if code := c.closed(); code != 4501 {
		t.Errorf("closed with %d, want 4501", code)
	}
	for _, kind := range []string{"user.online", "user.offline"} {
		r := find(t, "im-user-events-topic", func(r *kgo.Record) bool {
			return string(r.Key) == name && strings.Contains(string(r.Value), kind)
		})
		if !strings.Contains(string(r.Value), c.session) || !strings.Contains(string(r.Value), g.id) {
			t.Errorf("%s: %s", kind, r.Value)
		}
	}
}

func TestMessagesByHTTP(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	auth := http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}}
	a := post(t, g, "/api/messages", `{"type":"m","message_id":"h-1","data":{"x":1}}`, auth)
	var stored struct {
		ClientMsgID string `json:"client_msg_id"`
		MessageID   string `json:"message_id"`
		Topic       string `json:"topic"`
		Partition   int32  `json:"partition"`
		Offset      int64  `json:"offset"`
	}
	decode(t, a.Data, &stored)
	if a.Status != 200 || stored.ClientMsgID != "h-1" || stored.Topic == "" {
		t.Fatalf("%d %s", a.Status, a.Data)
	}
	r := find(t, stored.Topic, func(r *kgo.Record) bool { return r.Partition == stored.Partition && r.Offset == stored.Offset })
	if !strings.Contains(string(r.Value), stored.MessageID) || string(r.Key) != name {
		t.Errorf("record %s", r.Value)
	}
	for body, want := range map[string]int{`{"type":"m"}`: 400, `{"type":`: 400, `{"type":"ping"}`: 400, `{"data":"` + strings.Repeat("x", 66_000) + `"}`: 413} {
		if a := post(t, g, "/api/messages", body, auth); a.Status != want {
			t.Errorf("%.20s: %d %s, want %d", body, a.Status, a.Code, want)
		}
	}
	if a := post(t, g, "/api/messages", `{}`, nil); a.Status != 401 {
		t.Errorf("without a token: %d", a.Status)
	}
}

// TestGRPC uses every method of GatewayService with a generated client.
func TestGRPC(t *testing.T) {
	g := start(t, user("gw"), nil)
	s, ctx := g.service(), deadline(t)
	name, nobody := user("alice"), user("nobody")
	c := connect(t, g, name)
	pushed, err := s.Push(ctx, &gatewaypb.PushRequest{TargetUserIds: []string{name, nobody}, Type: "x", MessageId: "p-1", Data: []byte(`{"a":1}`)})
	if err != nil || pushed.Results[0].Outcome != gatewaypb.PushResult_OUTCOME_DELIVERED || pushed.Results[1].Outcome != gatewaypb.PushResult_OUTCOME_OFFLINE {
		t.Errorf("Push: %v, %v", pushed, err)
	}
	if f := c.wait("x"); f.MessageID != "p-1" || string(f.Data) != `{"a":1}` {
		t.Errorf("pushed %+v", f)
	}
	got, err := s.GetSession(ctx, &gatewaypb.GetSessionRequest{UserId: name})
	if err != nil || len(got.Sessions) != 1 || got.Sessions[0].SessionId != c.session || got.GatewayId != g.id {
		t.Errorf("GetSession: %v, %v", got, err)
	}
	kicked, err := s.Kick(ctx, &gatewaypb.KickRequest{UserId: name, SessionId: c.session, Reason: "bye"})
	if err != nil || kicked.Closed != 1 {
		t.Errorf("Kick: %v, %v", kicked, err)
	}
	if code := c.closed(); code != 4501 {
		t.Errorf("closed with %d", code)
	}
}

// chat is one user of the reference im-logic's chat.
type chat struct{ *client }

func (c chat) say(to, id, text string) {
	c.send("send-message", id, map[string]string{"to": to, "content": text})
	if a := c.ack(); a.Status != "success" {
		c.t.Fatalf("%s: %+v", c.name, a)
	}
}

func (c chat) hear(text string) {
	c.t.Helper()
	for {
		if f := c.wait("new-message"); strings.Contains(string(f.Data), text) {
			return
		}
	}
}

// TestTwoGatewaysOneKilled: users on both chat by way of im-logic; one gateway is killed, its user
// comes back on the other, and they chat on.
func TestTwoGatewaysOneKilled(t *testing.T) {
	a, b := start(t, user("gw"), nil), start(t, user("gw"), nil)
	alice, bob := user("alice"), user("bob")
	ca, cb := chat{connect(t, a, alice)}, chat{connect(t, b, bob)}
	ca.say(bob, "m-1", "hello bob")
	cb.hear("hello bob")
	cb.say(alice, "m-2", "hello alice")
	ca.hear("hello alice")
	b.kill()
	if code := cb.closed(); code > 0 && code < 4500 && code != 1006 {
		t.Logf("bob's connection ended with %d", code)
	}
	cb = chat{connect(t, a, bob)}
	ca.say(bob, "m-3", "still there?")
	cb.hear("still there?")
	cb.say(alice, "m-4", "yes")
	ca.hear("yes")
}
