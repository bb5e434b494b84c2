package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec/gatewaypb"
)

// account is one side of a gateway's ledger.
type account struct {
	In       int64            `json:"in"`
	Ends     map[string]int64 `json:"ends"`
	Open     int64            `json:"open"`
	Balanced bool             `json:"balanced"`
}

type ledger struct{ Downstream, Upstream account }

func (g *gateway) ledger() (l ledger) {
	g.t.Helper()
	resp, err := http.Get("http://" + g.admin + "/ledger")
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(resp.Body).Decode(&l); err != nil {
		g.t.Fatal(err)
	}
	return l
}

// settled waits until nothing is open, and the ledger must be balanced then.
func (g *gateway) settled() ledger {
	g.t.Helper()
	var l ledger
	eventually(g.t, "nothing is open on "+g.id, func() bool {
		l = g.ledger()
		return l.Downstream.Open == 0 && l.Upstream.Open == 0
	})
	if !l.Downstream.Balanced || !l.Upstream.Balanced {
		g.t.Errorf("the ledger of %s is not balanced: %+v", g.id, l)
	}
	return l
}

func connectTo(t *testing.T, g *gateway, name, query string) *client {
	t.Helper()
	c, err := dial(t, g, name, "/ws?"+query, http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// acknowledge sends a delivery-ack.
func (c *client) acknowledge(id int) { c.send("delivery-ack", "", map[string]int{"delivery_id": id}) }

func TestRetryIsStoredOnce(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	c := connect(t, g, name)
	c.send("m", "r-1", name)
	first := c.ack()
	c.send("m", "r-1", name)
	if again := c.ack(); again != first || first.Status != "success" {
		t.Errorf("first %+v, the retry %+v", first, again)
	}
	second := connect(t, g, name) // a new session of the user's
	second.send("m", "r-1", name)
	if again := second.ack(); again != first {
		t.Errorf("first %+v, the retry after a reconnect %+v", first, again)
	}
	a := post(t, g, "/api/messages", fmt.Sprintf(`{"type":"m","message_id":"r-1","data":%q}`, name),
		http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}})
	if a.Status != http.StatusOK || !strings.Contains(string(a.Data), first.MessageID) {
		t.Errorf("the retry over HTTP: %d %s", a.Status, a.Data)
	}
	second.send("m", "r-2", name)
	last := second.ack()
	n := 0
	find(t, "im-upstream-topic", func(r *kgo.Record) bool {
		if string(r.Key) == name {
			n++
		}
		return string(r.Key) == name && header(r, "client_msg_id") == "r-2"
	})
	if n != 2 || last.Status != "success" {
		t.Errorf("%d records of the user's, want 2; last ack %+v", n, last)
	}
	if l := g.settled(); l.Upstream.In != 2 || l.Upstream.Ends["stored"] != 2 {
		t.Errorf("ledger %+v", l.Upstream)
	}
}

func TestDeliveryAcks(t *testing.T) {
	g := start(t, user("gw"), settings{"websocket.delivery_timeout": "2s"})
	name := user("alice")
	c := connectTo(t, g, name, "ack=1")
	for i := range 3 {
		produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"%s-%d","data":%d}`, name, name, i, i))
	}
	var got []string
	for range 3 {
		_, b, err := c.Read(deadline(t))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(b))
	}
	for i, f := range got {
		if !strings.HasSuffix(f, fmt.Sprintf(`,"delivery_id":%d}`, i+1)) {
			t.Errorf("frame %s", f)
		}
	}
	c.acknowledge(2)
	eventually(t, "two are delivered", func() bool { return g.ledger().Downstream.Ends["delivered"] == 2 })
	r := find(t, "im-undelivered-topic", contains(name+"-2")) // not acknowledged in time
	if header(r, "reason") != "unacked" || header(r, "message_id") != name+"-2" {
		t.Errorf("headers %v", r.Headers)
	}
	if l := g.settled(); l.Downstream.In != 3 || l.Downstream.Ends["unacked"] != 1 {
		t.Errorf("ledger %+v", l.Downstream)
	}
	produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"%s-9","data":9}`, name, name))
	c.wait("new-message")
	_ = c.CloseNow() // gone with one unacknowledged
	if r := find(t, "im-undelivered-topic", contains(name+"-9")); header(r, "reason") != "unacked" {
		t.Errorf("headers %v", r.Headers)
	}
	g.settled()
}

func TestForwardedToWhereTheUserIs(t *testing.T) {
	a, b := start(t, user("gw"), nil), start(t, user("gw"), nil)
	name, away := user("alice"), user("bob")
	c := connect(t, b, name)
	produce(t, a, name, fmt.Sprintf(`{"target_user_ids":[%q,%q],"message_id":"f-%s","data":{"x":1},"trace_id":"t"}`, name, away, name))
	if f := c.wait("new-message"); f.MessageID != "f-"+name || string(f.Data) != `{"x":1}` {
		t.Errorf("frame %+v", f)
	}
	if l := a.settled(); l.Downstream.Ends["forwarded"] != 1 || l.Downstream.Ends["offline"] != 1 || l.Downstream.In != 2 {
		t.Errorf("the first gateway's ledger %+v", l.Downstream)
	}
	if l := b.settled(); l.Downstream.Ends["delivered"] != 1 || l.Downstream.In != 1 {
		t.Errorf("the second gateway's ledger %+v", l.Downstream)
	}
	if r := find(t, "im-undelivered-topic", contains("f-"+name)); string(r.Key) != away || header(r, "reason") != "offline" {
		t.Errorf("undelivered: key %s, headers %v", r.Key, r.Headers)
	}
	// Redis names a gateway that the user has left: one hop, and no circles.
	entry := presence(t, name)
	if err := env.cache.Do(deadline(t), env.cache.B().Hset().Key("user_session:"+away).FieldValue().
		FieldValue("gateway_id", b.id).FieldValue("session_id", "x").FieldValue("version", entry["version"]).Build()).Error(); err != nil {
		t.Fatal(err)
	}
	produce(t, a, away, fmt.Sprintf(`{"target_user_id":%q,"message_id":"g-%s","data":1}`, away, away))
	r := find(t, "im-undelivered-topic", contains("g-"+away))
	if header(r, "gateway_id") != b.id {
		t.Errorf("undelivered by %s, want the second gateway: %v", header(r, "gateway_id"), r.Headers)
	}
	a.settled()
	b.settled()
	// A gateway that nobody runs: undelivered at once, naming it.
	if err := env.cache.Do(deadline(t), env.cache.B().Hset().Key("user_session:"+away).FieldValue().
		FieldValue("gateway_id", "nobody").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	produce(t, a, away, fmt.Sprintf(`{"target_user_id":%q,"message_id":"h-%s","data":1}`, away, away))
	if r := find(t, "im-undelivered-topic", contains("h-"+away)); header(r, "reason") != "moved" || header(r, "present_gateway") != "nobody" {
		t.Errorf("headers %v", r.Headers)
	}
	a.settled()
}

func TestSeveralDevices(t *testing.T) {
	policy := settings{"sessions.policy": "allow:3"}
	a, b := start(t, user("gw"), policy), start(t, user("gw"), policy)
	name := user("alice")
	phone := connectTo(t, a, name, "device_id=d1&device=phone")
	tab := connectTo(t, b, name, "device_id=d2&device=web")
	other := connectTo(t, b, name, "device_id=d3&device=web")
	e := presence(t, name)
	if e["gateway_id"] != b.id || e["session_id"] != other.session {
		t.Errorf("presence names %s, %s", e["gateway_id"], e["session_id"])
	}
	for _, c := range []*client{phone, tab, other} {
		if v := e["s:"+c.session]; !strings.Contains(v, "|d") {
			t.Errorf("no field of session %s: %v", c.session, e)
		}
	}
	// A simple sender writes to the newest session's gateway; every session gets it, once.
	produce(t, b, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"all-%s","data":1}`, name, name))
	for _, c := range []*client{phone, tab, other} {
		if f := c.wait("new-message"); f.MessageID != "all-"+name {
			t.Errorf("frame %+v", f)
		}
	}
	if l := b.settled(); l.Downstream.In != 3 || l.Downstream.Ends["delivered"] != 2 || l.Downstream.Ends["forwarded"] != 1 {
		t.Errorf("ledger %+v", l.Downstream)
	}
	if l := a.settled(); l.Downstream.In != 1 || l.Downstream.Ends["delivered"] != 1 {
		t.Errorf("ledger %+v", l.Downstream)
	}
	// One device, by whichever gateway.
	produce(t, b, name, fmt.Sprintf(`{"target_user_id":%q,"device_id":"d1","message_id":"one-%s","data":1}`, name, name))
	produce(t, b, name, fmt.Sprintf(`{"target_user_id":%q,"device_id":"d3","message_id":"two-%s","data":1}`, name, name))
	if f := phone.wait("new-message"); f.MessageID != "one-"+name {
		t.Errorf("frame %+v", f)
	}
	if f := other.wait("new-message"); f.MessageID != "two-"+name {
		t.Errorf("frame %+v", f)
	}
	resp, err := b.service().GetSession(deadline(t), &gatewaypb.GetSessionRequest{UserId: name})
	if err != nil || len(resp.Sessions) != 2 || resp.Sessions[0].DeviceId != "d3" || resp.Sessions[0].Device != "web" {
		t.Errorf("%v, %v", resp, err)
	}
	// The upstream record names the device.
	tab.send("m", "u-1", 1)
	tab.ack()
	if r := find(t, "im-upstream-topic", func(r *kgo.Record) bool { return string(r.Key) == name }); !strings.Contains(string(r.Value), `"device_id":"d2"`) {
		t.Errorf("record %s", r.Value)
	}
	// The same device elsewhere takes its session's place, and one too many the oldest's.
	moved := connectTo(t, a, name, "device_id=d2")
	if code := tab.closed(); code != 4500 {
		t.Errorf("the replaced session was closed with %d", code)
	}
	fourth := connectTo(t, a, name, "device_id=d4")
	if code := phone.closed(); code != 4500 {
		t.Errorf("the oldest session was closed with %d", code)
	}
	_ = fourth.Close(1000, "")
	eventually(t, "presence names the newest that is left", func() bool {
		e := presence(t, name)
		return e["session_id"] == moved.session && e["gateway_id"] == a.id
	})
}

// takeover makes gateways notice the dead within seconds.
//
// The other tests leave topics behind, too, and they are not to stand in the way.
var takeover = settings{"takeover.after": "2s", "takeover.quiet": "2s", "takeover.max_topics": "500"}

func TestDeadGatewaysTopicIsTakenOver(t *testing.T) {
	dead := start(t, user("gw"), takeover)
	name := user("alice")
	here := connect(t, dead, name)
	produce(t, dead, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"0-%s","data":1}`, name, name))
	here.wait("new-message")
	dead.settled()
	dead.kill()
	live := start(t, user("gw"), takeover)
	c := connect(t, live, name)
	for i := range 5 {
		produce(t, dead, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"t%d-%s","data":1}`, name, i, name))
	}
	for i := 0; i < 5; {
		f := c.wait("new-message")
		switch f.MessageID {
		case fmt.Sprintf("t%d-%s", i, name):
			i++
		case "0-" + name: // the last commit was within a second of the end
		default:
			t.Errorf("frame %+v", f)
		}
	}
	// Its owner takes the topic back.
	back := start(t, dead.id, takeover)
	eventually(t, "the topic was given back", func() bool { return live.metric(`im_gateway_takeovers_total{event="returned"}`) != "0" })
	again := connect(t, back, name)
	produce(t, back, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"b-%s","data":1}`, name, name))
	for f := again.wait("new-message"); f.MessageID != "b-"+name; f = again.wait("new-message") {
	}
	live.settled()
	if code := back.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestTopicOfARandomIDIsRemoved(t *testing.T) {
	first := start(t, "", takeover)
	id := first.realID()
	if code := first.stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	produce(t, &gateway{id: id}, "bob", `{"target_user_id":"nobody-there","message_id":"left-`+id+`","data":1}`)
	live := start(t, user("gw"), takeover)
	if r := find(t, "im-undelivered-topic", contains("left-"+id)); header(r, "reason") != "offline" || header(r, "gateway_id") != live.id {
		t.Errorf("headers %v", r.Headers)
	}
	admin := kadm.NewClient(env.kafka)
	eventually(t, "the topic is removed", func() bool {
		topics, err := admin.ListTopics(deadline(t), "im-downstream-topic-"+id)
		return err == nil && !topics.Has("im-downstream-topic-"+id)
	})
	eventually(t, "the entry in etcd is removed", func() bool {
		resp, err := env.keys.Get(deadline(t), "im-gateway-topics/"+id)
		return err == nil && len(resp.Kvs) == 0
	})
	live.settled()
}

// TestAdoptedTopicIsDeleted: a dead gateway's topic that somebody deletes keeps nobody waiting.
func TestAdoptedTopicIsDeleted(t *testing.T) {
	long := settings{"takeover.after": "2s", "takeover.quiet": "10m", "takeover.max_topics": "500"}
	first := start(t, "", long)
	id := first.realID()
	if code := first.stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	produce(t, &gateway{id: id}, "bob", `{"target_user_id":"nobody-there","message_id":"kept-`+id+`","data":1}`)
	start(t, user("gw"), long)
	find(t, "im-undelivered-topic", contains("kept-"+id))
	if _, err := kadm.NewClient(env.kafka).DeleteTopics(deadline(t), "im-downstream-topic-"+id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the entry in etcd is removed", func() bool {
		resp, err := env.keys.Get(deadline(t), "im-gateway-topics/"+id)
		return err == nil && len(resp.Kvs) == 0
	})
}

// realID is the id that a gateway without a configured one has made up.
func (g *gateway) realID() string {
	g.t.Helper()
	id := ""
	for line := range strings.Lines(g.log.String()) {
		if _, rest, ok := strings.Cut(line, `"gateway_id":"`); ok {
			id, _, _ = strings.Cut(rest, `"`)
		}
	}
	if id == "" {
		g.t.Fatal("no gateway_id in the log")
	}
	return id
}

// TestPausedGatewayIsFenced: stopped for longer than its lease and the takeover's delay, it finds its
// topic taken and ends; it writes no presence any more.
func TestPausedGatewayIsFenced(t *testing.T) {
	zombie, live := start(t, user("gw"), takeover), start(t, user("gw"), takeover)
	name := user("alice")
	connect(t, zombie, name)
	if err := zombie.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c := connect(t, live, name)
	produce(t, zombie, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"z-%s","data":1}`, name, name))
	if f := c.wait("new-message"); f.MessageID != "z-"+name {
		t.Errorf("frame %+v", f)
	}
	if err := zombie.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if code := zombie.exit(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if e := presence(t, name); e["gateway_id"] != live.id || e["session_id"] != c.session {
		t.Errorf("presence %v", e)
	}
	live.settled()
}

func TestDrainByTheAdminPort(t *testing.T) {
	g := start(t, user("gw"), settings{"admin.token": "operator-token-5521"})
	hide("operator-token-5521")
	c := connect(t, g, user("alice"))
	ask := func(token string) int {
		req, err := http.NewRequestWithContext(deadline(t), http.MethodPost, "http://"+g.admin+"/drain", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	if code := ask("wrong"); code != http.StatusForbidden {
		t.Errorf("a wrong token was answered %d", code)
	}
	if code := ask("operator-token-5521"); code != http.StatusAccepted {
		t.Errorf("status %d", code)
	}
	if code := c.closed(); code != 4002 {
		t.Errorf("closed with %d", code)
	}
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
