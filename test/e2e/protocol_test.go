package e2e

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec/gatewaypb"
)

// speaking opens a session in one of the protocols.
func speaking(t *testing.T, g *gateway, name, protocol, query string) *client {
	t.Helper()
	c, err := dial(t, g, name, "/ws"+query, nil, protocol, "bearer."+token(t, name, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if c.Subprotocol() != protocol {
		t.Fatalf("the gateway selects %q, offered was %s", c.Subprotocol(), protocol)
	}
	return c
}

// said is a frame without what differs from one session to the next.
func said(f frame) string {
	text := fmt.Sprintf("%s %s %s", f.Type, f.MessageID, f.Data)
	if f.DeliveryID > 0 {
		text += fmt.Sprint(" #", f.DeliveryID)
	}
	if f.Timestamp == 0 {
		text += " without a time"
	}
	return changing.ReplaceAllString(text, "$1*")
}

var changing = regexp.MustCompile(`("(?:messageId|message_id|partition|offset|expires_at)":)("[^"]*"|\d+)`)

// talker is a session in any protocol.
type talker interface {
	next() (frame, error)
	sendRaw(kind, id, data string)
}

// sendRaw sends a message; the answer is kept.
func (s *streamed) sendRaw(kind, id, data string) { s.answer = s.post(kind, id, data) }

const sseProtocol = "sse" // no WebSocket

// TestProtocolsAreEquivalent: one table for all protocols, through a real socket and the whole gateway.
func TestProtocolsAreEquivalent(t *testing.T) {
	for _, compressed := range []string{"false", "true"} {
		t.Run("compressed="+compressed, func(t *testing.T) {
			g := start(t, user("gw"), settings{
				"websocket.compression.enabled": compressed, "websocket.compression.threshold_bytes": "64"})
			protocolsAreEquivalent(t, g)
			if saved := g.metric("im_gateway_transport_compression_saved_bytes_total"); (saved != "0") != (compressed == "true") {
				t.Errorf("%s bytes saved", saved)
			}
		})
	}
}

func protocolsAreEquivalent(t *testing.T, g *gateway) {
	for _, protocol := range []string{jsonProtocol, protoProtocol, sseProtocol} {
		t.Run(protocol, func(t *testing.T) {
			name := user("alice")
			var c talker
			var s *streamed
			if protocol == sseProtocol {
				s = openStream(t, g, name, "?ack=1", time.Hour)
				c = s
			} else {
				c = speaking(t, g, name, protocol, "?ack=1")
			}
			push := func(kind, data string) func() {
				return func() {
					produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"type":%q,"message_id":"m-%s","data":%s}`, name, kind, kind, data))
				}
			}
			send := func(kind, id, data string) func() { return func() { c.sendRaw(kind, id, data) } }
			const invalid = `"status":"error","code":"INVALID_MESSAGE"}`
			const stored = `200 {"client_msg_id":"c-1","message_id":*,"topic":"im-upstream-topic","partition":*,"offset":*}`
			for _, tc := range []struct {
				name string
				do   func()
				want string // of the frame that answers; a trailing ... stands for the rest
				http string // what POST answers; but for records, pong and token-refreshed it is the only answer
			}{
				{"ping", send("ping", "", ""), `pong  {}`, `200 {}`},
				{"message", send("post", "c-1", `{"content": "héllo"}`),
					`message-ack  {"client_msg_id":"c-1","status":"success","messageId":*,"topic":"im-upstream-topic","partition":*,"offset":*}`, stored},
				{"the same again", send("post", "c-1", `{"content": "héllo"}`),
					`message-ack  {"client_msg_id":"c-1","status":"success","messageId":*,"topic":"im-upstream-topic","partition":*,"offset":*}`, stored},
				{"name of the page's own", send("m", "", `{"tempMessageId":"t-1"}`),
					`message-ack  {"client_msg_id":"t-1","tempMessageId":"t-1","status":"success","messageId":*,...`, `200 {"client_msg_id":"t-1",...`},
				{"no data", send("m", "c-2", ""), `message-ack  {"client_msg_id":"c-2",` + invalid, `400 INVALID_MESSAGE`},
				{"no data, no name", send("m", "", ""), `error  {"code":"INVALID_MESSAGE","message":"data is missing"}`, `400 INVALID_MESSAGE`},
				{"no type", send("", "c-3", "1"), `message-ack  {"client_msg_id":"c-3",` + invalid, `400 INVALID_MESSAGE`},
				{"a name too long", send("m", strings.Repeat("n", 129), "1"), `error  {"code":"INVALID_MESSAGE","message":"message_id must be...`, `400 INVALID_MESSAGE`},
				{"data that is no JSON", send("m", "", `{]}`), `error  {"code":"INVALID_MESSAGE",...`, `400 INVALID_MESSAGE`},
				{"data too deep", send("m", "", strings.Repeat("[", 64)+strings.Repeat("]", 64)), `error  {"code":"INVALID_MESSAGE",...`, `400 INVALID_MESSAGE`},
				{"a forged token", send("refresh-token", "", `{"token":"a.b.c"}`), `error  {"code":"AUTH_FAILED",...`, `401 AUTH_FAILED`},
				{"a new token", send("refresh-token", "", `{"token":"`+token(t, name, 2*time.Hour)+`"}`), `token-refreshed  {"expires_at":*}`, `200 {"expires_at":*}`},
				{"a record", push("news", `[1, 2]`), `news m-news [1, 2] #1`, ""},
				{"a large record", push("large", `"`+strings.Repeat("x", 100_000)+`"`), `large m-large "` + strings.Repeat("x", 100_000) + `" #2`, ""},
				{"a delivery-ack without a number", send("delivery-ack", "", `{}`), `error  {"code":"INVALID_MESSAGE",...`, `400 INVALID_MESSAGE`},
			} {
				is := func(got, want string) {
					t.Helper()
					if want, open := strings.CutSuffix(want, "..."); got != want && !(open && strings.HasPrefix(got, want)) {
						t.Errorf("%s:\ngot  %.300s\nwant %.300s", tc.name, got, want)
					}
				}
				tc.do()
				if s != nil && tc.http != "" {
					is(changing.ReplaceAllString(fmt.Sprintf("%d %s%s", s.answer.Status, s.answer.Code, s.answer.Data), "$1*"), tc.http)
					if strings.HasPrefix(tc.want, "message-ack ") || strings.HasPrefix(tc.want, "error ") {
						continue
					}
				}
				f, err := c.next()
				if err != nil {
					t.Fatalf("%s: %v", tc.name, err)
				}
				is(said(f), tc.want)
			}
			before := g.metric(`im_gateway_shard_ends_total{end="delivered"}`)
			c.sendRaw("delivery-ack", "", `{"delivery_id":2}`)
			eventually(t, "both deliveries are settled", func() bool {
				var was, is int
				_, _ = fmt.Sscan(before, &was)
				_, _ = fmt.Sscan(g.metric(`im_gateway_shard_ends_total{end="delivered"}`), &is)
				return is == was+2
			})
			find(t, "im-upstream-topic", func(r *kgo.Record) bool {
				return string(r.Key) == name && strings.Contains(string(r.Value), `"type":"post","client_msg_id":"c-1","data":{"content": "héllo"},`)
			})
			kick, err := g.service().Kick(deadline(t), &gatewaypb.KickRequest{UserId: name, Reason: "spam"})
			if err != nil || kick.Closed != 1 {
				t.Fatalf("kicked %v: %v", kick, err)
			}
			if s != nil {
				if c := s.closed(); c.Code != 4501 {
					t.Errorf("kicked: closed with %+v", c)
				}
				return
			}
			w := c.(*client)
			if code := w.closed(); code != 4501 {
				t.Errorf("kicked: closed with %d", code)
			}

			// The other kind of message ends the connection; one that is no frame at all does not.
			w = speaking(t, g, name, protocol, "")
			w.write(w.kind(), []byte{0xff})
			code := websocket.StatusCode(1007) // text must be UTF-8
			if protocol == protoProtocol {
				if f, err := w.next(); err != nil || f.Type != "error" {
					t.Errorf("%+v, %v", f, err)
				}
				w.write(websocket.MessageText, []byte(`{"type":"ping"}`))
				code = websocket.StatusUnsupportedData
			}
			if got := w.closed(); got != code {
				t.Errorf("closed with %d, want %d", got, code)
			}
		})
	}
	c := speaking(t, g, user("bob"), jsonProtocol, "")
	c.write(websocket.MessageBinary, []byte("x"))
	if code := c.closed(); code != websocket.StatusUnsupportedData {
		t.Errorf("binary on %s: closed with %d", jsonProtocol, code)
	}
	// Without an offer it is JSON; of an offer the first that is known.
	c, err := dial(t, g, user("carol"), "/ws?token="+token(t, "carol", time.Hour), nil)
	if err != nil || c.Subprotocol() != "" {
		t.Fatalf("%v", err)
	}
	if c, err = dial(t, g, user("carol"), "/ws", http.Header{"Authorization": {"Bearer " + token(t, "carol", time.Hour)}},
		"im.cbor.v1", protoProtocol, jsonProtocol); err != nil || c.Subprotocol() != protoProtocol {
		t.Errorf("%v", err)
	}
}

// TestFanOutToBothProtocols: one user, a session in each; one record reaches both, and a drain tells both.
func TestFanOutToBothProtocols(t *testing.T) {
	g := start(t, user("gw"), settings{"sessions.policy": "allow:4"})
	name := user("alice")
	var list []*client
	for _, p := range []string{jsonProtocol, protoProtocol, protoProtocol} {
		list = append(list, speaking(t, g, name, p, ""))
	}
	acked := speaking(t, g, name, protoProtocol, "?ack=1")
	produce(t, g, name, fmt.Sprintf(`{"target_user_id":%q,"message_id":"m-1","data":{"a": [1, "é"]}}`, name))
	for i, c := range append(list, acked) {
		want := `new-message m-1 {"a": [1, "é"]}`
		if c == acked {
			want += " #1"
		}
		if got := said(c.wait("new-message")); got != want {
			t.Errorf("session %d got %s, want %s", i, got, want)
		}
	}
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for i, c := range append(list, acked) {
		if f := c.wait("reconnect"); !strings.Contains(string(f.Data), `"retry_after_ms":`) {
			t.Errorf("session %d got %s", i, said(f))
		}
		if code := c.closed(); code != 4002 {
			t.Errorf("session %d: closed with %d", i, code)
		}
	}
	if code := g.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
