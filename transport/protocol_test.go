package transport

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec"
	"im-gateway/codec/clientpb"
)

// speaker is a client of one of the protocols.
type speaker struct {
	*client
	protocol codec.Protocol
}

func connectAs(t testing.TB, s *Server, user string, p codec.Protocol) *speaker {
	t.Helper()
	c := dial(t, s)
	name := protocolJSON
	if p == codec.Proto {
		name = protocolProto
	}
	c.send("GET /ws HTTP/1.1\r\n", upgradeLines, "Sec-WebSocket-Protocol: ", name, ", bearer.", token(t, user, time.Hour), "\r\n\r\n")
	if resp, body := c.answer(); resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Protocol") != name {
		t.Fatalf("upgrade to %s: %s %v %s", name, resp.Status, resp.Header, body)
	}
	return &speaker{c, p}
}

// say sends a message with a type, a name and data; empty ones are left out.
func (c *speaker) say(typ, name, data string) {
	c.t.Helper()
	if c.protocol == codec.Proto {
		b, err := proto.Marshal(&clientpb.ClientFrame{Type: typ, MessageId: name, Data: []byte(data)})
		if err != nil {
			c.t.Fatal(err)
		}
		c.send(frame(true, ws.OpBinary, string(b)))
		return
	}
	v := map[string]any{"type": typ}
	if name != "" {
		v["message_id"] = name
	}
	if data != "" {
		v["data"] = json.RawMessage(data)
	}
	b, err := json.Marshal(v)
	if err != nil { // data that is no JSON
		b = []byte(`{"type":"` + typ + `","data":` + data + `}`)
	}
	c.send(text(string(b)))
}

// hear returns the next message as its type and its data.
func (c *speaker) hear() string {
	c.t.Helper()
	f := c.read()
	if c.protocol == codec.Proto {
		var v clientpb.ServerFrame
		if err := proto.Unmarshal(f.Payload, &v); err != nil || f.Header.OpCode != ws.OpBinary {
			c.t.Fatalf("%v: %q, %v", f.Header.OpCode, f.Payload, err)
		}
		return v.Type + " " + string(v.Data)
	}
	var v struct {
		Type string
		Data json.RawMessage
	}
	if err := json.Unmarshal(f.Payload, &v); err != nil || f.Header.OpCode != ws.OpText {
		c.t.Fatalf("%v: %q, %v", f.Header.OpCode, f.Payload, err)
	}
	return v.Type + " " + string(v.Data)
}

// TestProtocolsAtTheSocket: one table, the same answers in both protocols.
func TestProtocolsAtTheSocket(t *testing.T) {
	s, sink := start(t, nil)
	later := token(t, "alice", 2*time.Hour)
	for p, name := range []string{codec.JSON: "json", codec.Proto: "proto"} {
		t.Run(name, func(t *testing.T) {
			c := connectAs(t, s, "alice", codec.Protocol(p))
			open := sink.next(t, codec.EventOpen)
			if open.Open.Protocol != codec.Protocol(p) {
				t.Errorf("the shard is told of protocol %d", open.Open.Protocol)
			}
			for _, tc := range []struct{ typ, name, data, want string }{
				{"ping", "", "", `pong {}`},
				{"m", "n", "", `message-ack {"client_msg_id":"n","status":"error","code":"INVALID_MESSAGE"}`},
				{"m", "", "", `error {"code":"INVALID_MESSAGE","message":"data is missing"}`},
				{"m", "", `{]}`, `error {"code":"INVALID_MESSAGE",`},
				{"m", strings.Repeat("n", 129), `1`, `error {"code":"INVALID_MESSAGE","message":"message_id must be`},
				{"refresh-token", "", `{"token":"x.y.z"}`, `error {"code":"AUTH_FAILED",`},
			} {
				c.say(tc.typ, tc.name, tc.data)
				if got := c.hear(); !strings.HasPrefix(got, tc.want) {
					t.Errorf("%s %s %s: got %s, want %s", tc.typ, tc.name, tc.data, got, tc.want)
				}
			}
			c.say("refresh-token", "", `{"token":"`+later+`"}`)
			if e := sink.next(t, codec.EventRefresh); e.Session != open.Session {
				t.Errorf("refreshed %v", e.Session)
			}
			c.say("delivery-ack", "", `{"delivery_id":7}`)
			if e := sink.next(t, codec.EventAcked); e.Value != 7 {
				t.Errorf("acknowledged up to %d", e.Value)
			}
			c.say("m", "", `{"tempMessageId":"t-1"}`)
			e := sink.next(t, codec.EventMessage)
			if u := e.Upstream; string(u.Type) != "m" || string(u.ClientMsgID) != "t-1" || !u.Temp ||
				!bytes.Contains(u.Value, []byte(`"data":{"tempMessageId":"t-1"}`)) {
				t.Errorf("%s", u.Value)
			}

			payload := codec.Protocol(p).AppendReconnect(nil, 5, "draining", 1)
			s.Submit(&codec.EgressBatch{Loop: open.Session.Loop(), Commands: []codec.Command{
				{Kind: codec.CommandFrame, Session: open.Session, Payload: payload},
			}})
			sink.returned(t)
			if got := c.hear(); got != `reconnect {"retry_after_ms":5,"reason":"draining"}` {
				t.Errorf("got %s", got)
			}
		})
	}
}

// TestWrongKindOfMessage: text where binary is spoken closes with 1003, and the other way round, also in
// pieces; the reason names the protocol.
func TestWrongKindOfMessage(t *testing.T) {
	s, _ := start(t, nil)
	for _, tc := range []struct {
		name, send string
		protocol   codec.Protocol
		reason     string
	}{
		{"binary to JSON", frame(true, ws.OpBinary, "x"), codec.JSON, reasonBinary},
		{"binary to JSON in pieces", frame(false, ws.OpBinary, "x"), codec.JSON, reasonBinary},
		{"text to proto", text(`{"type":"ping"}`), codec.Proto, reasonText},
		{"text to proto in pieces", frame(false, ws.OpText, `{"type"`), codec.Proto, reasonText},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := connectAs(t, s, "alice", tc.protocol)
			c.send(tc.send)
			f := c.read()
			if code, reason := ws.ParseCloseFrameData(f.Payload); f.Header.OpCode != ws.OpClose || code != 1003 || reason != tc.reason {
				t.Errorf("%v %d %s", f.Header.OpCode, code, reason)
			}
		})
	}
	// In pieces of one byte each, and not UTF-8 as a whole.
	c := connectAs(t, s, "bob", codec.Proto)
	b, err := proto.Marshal(&clientpb.ClientFrame{Type: "ping", Timestamp: -1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		op := ws.OpContinuation
		if i == 0 {
			op = ws.OpBinary
		}
		c.send(frame(i == len(b)-1, op, string(b[i:i+1])))
	}
	if got := c.hear(); got != "pong {}" {
		t.Errorf("got %s", got)
	}
}
