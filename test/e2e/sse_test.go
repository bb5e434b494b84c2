package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec"
	"im-gateway/codec/gatewaypb"
)

// streamed is a client without WebSocket: an event stream, and POST for what it sends.
type streamed struct {
	t       testing.TB
	g       *gateway
	name    string
	auth    http.Header
	session string
	conn    net.Conn
	in      *bufio.Reader
	lastID  string
	answer  answer   // to what sendRaw has sent
	close   closedBy // once the stream has said so
}

// closedBy is the close event.
type closedBy struct {
	Code   int    `json:"code"`
	Reason string `json:"reason"`
	retry  string
}

var errClosed = errors.New("the stream has ended with a close event")

// openStream opens a stream and reads `connected`. HTTP/1.0, the least that a proxy may speak.
func openStream(t testing.TB, g *gateway, name, query string, ttl time.Duration) *streamed {
	t.Helper()
	s := &streamed{t: t, g: g, name: name, auth: http.Header{"Authorization": {"Bearer " + token(t, name, ttl)}}}
	var err error
	if s.conn, err = net.Dial("tcp", g.addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.conn.Close() })
	if err := s.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(s.conn, "GET /sse%s HTTP/1.0\r\nAuthorization: %s\r\n\r\n", query, s.auth.Get("Authorization")); err != nil {
		t.Fatal(err)
	}
	s.in = bufio.NewReader(s.conn)
	resp, err := http.ReadResponse(s.in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%s %v", resp.Status, resp.Header)
	}
	f, err := s.next()
	if err != nil || f.Type != "connected" {
		t.Fatalf("the first event is %+v, %v", f, err)
	}
	var d struct {
		SessionID string `json:"session_id"`
	}
	decode(t, f.Data, &d)
	s.session = d.SessionID
	return s
}

// next reads the next event as the HTML standard says; comments are skipped.
func (s *streamed) next() (f frame, err error) {
	var data, kind, retry string
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			return f, err
		}
		line = strings.TrimSuffix(line, "\n")
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "" && data == "":
			continue
		case line == "" && kind == "close":
			if err := env.spec.streamClosed([]byte(data)); err != nil {
				s.t.Error(err)
			}
			if err := json.Unmarshal([]byte(data), &s.close); err != nil {
				return f, err
			}
			s.close.retry = retry
			if rest, err := io.ReadAll(s.in); err != nil || len(rest) > 0 {
				return f, fmt.Errorf("behind the close event: %q, %w", rest, err)
			}
			return f, errClosed
		case line == "":
			if err := env.spec.fromServer("events", []byte(data)); err != nil {
				s.t.Error(err)
			}
			return f, json.Unmarshal([]byte(data), &f)
		case field == "data":
			data += value
		case field == "event":
			kind = value
		case field == "retry":
			retry = value
		case field == "id":
			s.lastID = value
		}
	}
}

// wait reads events until one of the type.
func (s *streamed) wait(kind string) frame {
	s.t.Helper()
	for {
		f, err := s.next()
		if err != nil {
			s.t.Fatalf("%s waits for %s: %v", s.name, kind, err)
		}
		if f.Type == kind {
			return f
		}
	}
}

// closed reads to the end of the stream, which must be a close event.
func (s *streamed) closed() closedBy {
	s.t.Helper()
	for {
		if _, err := s.next(); errors.Is(err, errClosed) {
			return s.close
		} else if err != nil {
			s.t.Fatalf("%s: %v", s.name, err)
		}
	}
}

// post sends a message for the session; data need not be JSON, and empty parts are left out.
func (s *streamed) post(kind, id, data string) answer {
	s.t.Helper()
	b := fmt.Appendf(nil, `{"type":%q,"timestamp":%d`, kind, time.Now().UnixMilli())
	if id != "" {
		b = fmt.Appendf(b, `,"message_id":%s`, codec.AppendQuoted(nil, id))
	}
	if data != "" {
		b = append(append(b, `,"data":`...), data...)
	}
	return post(s.t, s.g, "/api/messages?session_id="+s.session, string(append(b, '}')), s.auth)
}

// TestEventStream: an event stream is a session as a WebSocket is.
func TestEventStream(t *testing.T) {
	g := start(t, user("gw"), settings{"auth.leeway": "0s"})
	name := user("alice")
	s := openStream(t, g, name, "?ack=1&device_id=d1", time.Hour)
	if e := presence(t, name); e["session_id"] != s.session || e["gateway_id"] != g.id {
		t.Errorf("presence %v", e)
	}
	// What is sent is one of the session's; the answer is the ack.
	a := s.post("post", "c-1", `{"content":"hi"}`)
	if a.Status != 200 || !a.Success || !strings.Contains(string(a.Data), `"client_msg_id":"c-1"`) {
		t.Errorf("%d %s %s", a.Status, a.Code, a.Data)
	}
	find(t, "im-upstream-topic", func(r *kgo.Record) bool {
		return string(r.Key) == name && strings.Contains(string(r.Value), `"session_id":"`+s.session+`","device_id":"d1","type":"post","client_msg_id":"c-1"`)
	})
	// Pushed, and acknowledged by POST.
	for i := range 3 {
		produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"m-%d","data":`+"{\n \"n\":\r\n%d\n}}", name, i, i))
	}
	got := map[string]string{}
	for range 3 {
		f := s.wait("new-message")
		if f.MessageID != s.lastID || f.DeliveryID == 0 {
			t.Errorf("%+v, the event's id is %q", f, s.lastID)
		}
		got[f.MessageID] = string(f.Data)
	}
	if len(got) != 3 || strings.Join(strings.Fields(got["m-2"]), "") != `{"n":2}` {
		t.Errorf("got %q", got)
	}
	if n := g.metric("im_gateway_shard_deliveries_open"); n != "3" {
		t.Errorf("%s deliveries are open before they are acknowledged", n)
	}
	if a := s.post("delivery-ack", "", `{"delivery_id":3}`); a.Status != 200 {
		t.Errorf("%d %s", a.Status, a.Code)
	}
	eventually(t, "every delivery has ended", func() bool {
		return g.metric("im_gateway_shard_deliveries_open") == "0" && g.metric(`im_gateway_shard_ends_total{end="delivered"}`) == "3"
	})
	if n := g.metric(`im_gateway_transport_sessions{protocol="sse"}`); n != "1" {
		t.Errorf("%s event streams", n)
	}
	// Nobody else's session, and none of another gateway.
	other := openStream(t, g, user("bob"), "", time.Hour)
	other.session = s.session
	for _, kind := range []string{"ping", "send-message"} {
		if a := other.post(kind, "c", "1"); a.Status != 404 || a.Code != "SESSION_NOT_FOUND" {
			t.Errorf("%s for another's session: %d %s", kind, a.Status, a.Code)
		}
	}
	for _, query := range []string{"", "?session_id="} {
		if a := post(t, g, "/api/messages"+query, `{"type":"ping"}`, s.auth); a.Status != 400 || a.Code != "INVALID_MESSAGE" {
			t.Errorf("a ping for no session: %d %s", a.Status, a.Code)
		}
	}
	// A newer session, a WebSocket, takes its place.
	w := connect(t, g, name)
	if c := s.closed(); c.Code != 4500 || c.Reason == "" || c.retry == "" {
		t.Errorf("replaced: %+v", c)
	}
	if a := s.post("ping", "", ""); a.Status != 404 {
		t.Errorf("a ping for a session that has ended: %d %s", a.Status, a.Code)
	}
	// And the other way round.
	s = openStream(t, g, name, "", 3*time.Second)
	if code := w.closed(); code != 4500 {
		t.Errorf("the WebSocket was closed with %d", code)
	}
	// A token that lasts longer, then no more.
	a = s.post("refresh-token", "", `{"token":"`+token(t, name, 6*time.Second)+`"}`)
	if f := s.wait("token-refreshed"); a.Status != 200 || string(a.Data) != string(f.Data) {
		t.Errorf("%d %s, the event says %s", a.Status, a.Data, f.Data)
	}
	if a := s.post("refresh-token", "", `{"token":"`+token(t, user("carol"), time.Hour)+`"}`); a.Status != 401 || a.Code != "AUTH_FAILED" {
		t.Errorf("another's token: %d %s", a.Status, a.Code)
	}
	if c := s.closed(); c.Code != 4502 || c.retry == "" {
		t.Errorf("expired: %+v", c)
	}
	eventually(t, "the user is offline", func() bool { return len(presence(t, name)) == 0 })
}

// TestEventStreamsWhenTheGatewayStops: each is told, then closed with 4002.
func TestEventStreamsWhenTheGatewayStops(t *testing.T) {
	g := start(t, user("gw"), settings{"sessions.policy": "allow:4", "websocket.heartbeat": "100ms", "websocket.heartbeat_timeout": "300ms"})
	name := user("alice")
	list := []*streamed{openStream(t, g, name, "", time.Hour), openStream(t, g, name, "?ack=1", time.Hour)}
	w := connect(t, g, name)
	produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"m-1","data":{"a": [1, "é"]}}`, name))
	for i, s := range list {
		if got := said(s.wait("new-message")); !strings.HasPrefix(got, `new-message m-1 {"a": [1, "é"]}`) || strings.HasSuffix(got, " #1") != (i == 1) {
			t.Errorf("stream %d got %s", i, got)
		}
	}
	w.wait("new-message")
	eventually(t, "silence for several timeouts", func() bool {
		var pings float64
		_, _ = fmt.Sscan(g.metric("im_gateway_shard_heartbeats_total"), &pings)
		return pings > 30
	})
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for i, s := range list {
		if f := s.wait("reconnect"); !strings.Contains(string(f.Data), `"retry_after_ms":`) {
			t.Errorf("stream %d got %s", i, said(f))
		}
		if c := s.closed(); c.Code != 4002 || c.retry != "" {
			t.Errorf("stream %d: %+v", i, c)
		}
	}
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestEventStreamOfSlowReader: what waits is bounded, and what was not read is undelivered.
func TestEventStreamOfSlowReader(t *testing.T) {
	g := start(t, user("gw"), settings{"websocket.egress_budget_bytes": "1MiB"})
	name := user("slow")
	s := openStream(t, g, name, "", time.Hour)
	large := strings.Repeat("x", 500_000)
	for i := range 40 { // more than socket buffers hold
		produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"slow-%d","data":%q}`, name, i, large))
	}
	eventually(t, "it is closed", func() bool { return g.metric(`im_gateway_transport_closes_total{code="4000"}`) == "1" })
	if r := find(t, "im-undelivered-topic", contains(`"`+name+`"`)); header(r, "reason") != "slow_consumer" && header(r, "reason") != "offline" {
		t.Errorf("headers %v", r.Headers)
	}
	last := ""
	for {
		f, err := s.next()
		if err != nil {
			break // the code, or a cut where it did not read on in time
		}
		last = f.MessageID
	}
	if last == "" || s.close.Code != 0 && s.close.Code != 4000 {
		t.Errorf("the last event is %q, closed by %+v", last, s.close)
	}
	// Others did not notice.
	if a := openStream(t, g, user("quick"), "", time.Hour).post("send-message", "c-1", "1"); a.Status != 200 {
		t.Errorf("%d %s", a.Status, a.Code)
	}
}

// TestEventStreamKicked, by a record and by gRPC.
func TestEventStreamKicked(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	for what, kick := range map[string]func(){
		"record": func() {
			produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"type":"kick","data":{"reason":"spam\n"}}`, name))
		},
		"gRPC": func() {
			if k, err := g.service().Kick(deadline(t), &gatewaypb.KickRequest{UserId: name, Reason: "spam\n"}); err != nil || k.Closed != 1 {
				t.Errorf("%v, %v", k, err)
			}
		},
	} {
		s := openStream(t, g, name, "", time.Hour)
		kick()
		if c := s.closed(); c.Code != 4501 || c.Reason != "spam\n" {
			t.Errorf("%s: %+v", what, c)
		}
	}
}
