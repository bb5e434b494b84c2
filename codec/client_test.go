package codec

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParseClient(t *testing.T) {
	long := strings.Repeat("n", MaxNameLen+1)
	for _, tc := range []struct {
		name, frame string
		code        Code
		want        string // type|name|temp|data|timestamp|trace
	}{
		{"whole", `{"type":"send-message","message_id":"c-1","data":{"a":[1,2,{}]},"timestamp":1760000000000}`, OK, `send-message|c-1|false|{"a":[1,2,{}]}|1760000000000|`},
		{"white space", " {\t\"type\" : \"m\" ,\r\n\"data\": null } \n", OK, `m||false|null|0|`},
		{"data first", `{"data":"x","type":"m"}`, OK, `m||false|"x"|0|`},
		{"name in data", `{"type":"m","data":{"client_msg_id":"d-1"}}`, OK, `m|d-1|false|{"client_msg_id":"d-1"}|0|`},
		{"temp name", `{"type":"m","data":{"tempMessageId":"t-1"}}`, OK, `m|t-1|true|{"tempMessageId":"t-1"}|0|`},
		{"names in order", `{"type":"m","message_id":"a","data":{"client_msg_id":"b","tempMessageId":"c"}}`, OK, `m|a|false|{"client_msg_id":"b","tempMessageId":"c"}|0|`},
		{"null name", `{"type":"m","message_id":null,"data":{"tempMessageId":"c"}}`, OK, `m|c|true|{"tempMessageId":"c"}|0|`},
		{"escaped name", `{"type":"m","message_id":"\u00e9\"","data":1}`, OK, `m|é"|false|1|0|`},
		{"escaped key", `{"t\u0079pe":"m","data":1}`, OK, `m||false|1|0|`},
		{"the last one counts", `{"type":"a","type":"b","data":1,"data":2}`, OK, `b||false|2|0|`},
		{"fraction", `{"type":"m","data":1,"timestamp":1.9e3}`, OK, `m||false|1|1900|`},
		{"digits as text", `{"type":"m","data":1,"timestamp":"12"}`, OK, `m||false|1|12|`},
		{"trace id", `{"type":"m","data":1,"trace_id":"0123456789abcdef0123456789abcdef"}`, OK, `m||false|1|0|0123456789abcdef0123456789abcdef`},
		{"traceparent", `{"type":"m","data":1,"traceparent":"00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"}`, OK, `m||false|1|0|0123456789abcdef0123456789abcdef`},
		{"bad trace id", `{"type":"m","data":1,"trace_id":"XYZ"}`, OK, `m||false|1|0|`},
		{"ping", `{"type":"ping"}`, OK, `ping||false||0|`},
		{"no object", `[1]`, InvalidMessage, ""},
		{"empty", ``, InvalidMessage, ""},
		{"trailing", `{"type":"m","data":1}x`, InvalidMessage, ""},
		{"trailing, named", `{"type":"m","message_id":"n","data":1}x`, InvalidMessage, `|n|`},
		{"broken data, named", `{"message_id":"n","type":"m","data":{]}`, InvalidMessage, `|n|`},
		{"trailing comma", `{"type":"m","data":1,}`, InvalidMessage, ""},
		{"no type", `{"message_id":"n","data":1}`, InvalidMessage, `|n|`},
		{"type no string", `{"type":7,"data":1}`, InvalidMessage, ""},
		{"no data", `{"type":"m","message_id":"n"}`, InvalidMessage, `|n|`},
		{"name no string", `{"type":"m","message_id":7,"data":1}`, InvalidMessage, ""},
		{"empty name", `{"type":"m","message_id":"","data":1}`, InvalidMessage, ""},
		{"long name", `{"type":"m","message_id":"` + long + `","data":1}`, InvalidMessage, ""},
		{"control character", `{"type":"m","message_id":"a\u0007","data":1}`, InvalidMessage, ""},
		{"timestamp", `{"type":"m","message_id":"n","data":1,"timestamp":"now"}`, InvalidMessage, `|n|`},
		{"fraction as text", `{"type":"m","data":1,"timestamp":"1.5"}`, InvalidMessage, ""},
		{"19 digits as text", `{"type":"m","data":1,"timestamp":"1234567890123456789"}`, InvalidMessage, ""},
		{"huge timestamp", `{"type":"m","data":1,"timestamp":99999999999999999999}`, InvalidMessage, ""},
		{"too deep", `{"type":"m","data":` + strings.Repeat("[", 70) + strings.Repeat("]", 70) + `}`, InvalidMessage, ""},
		{"refresh without token", `{"type":"refresh-token","data":{}}`, InvalidMessage, ""},
		{"delivery without id", `{"type":"delivery-ack","data":{}}`, InvalidMessage, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var m ClientMessage
			err := ParseClient([]byte(tc.frame), &m)
			var refusal *ParseError
			if (err == nil) != (tc.code == OK) || (err != nil && (!errors.As(err, &refusal) || refusal.Code != tc.code)) {
				t.Fatalf("error %v, want code %q", err, tc.code)
			}
			got := fmt.Sprintf("%s|%s|%v|%s|%d|%s", m.Type, m.ClientMsgID, m.Temp, m.Data, m.Timestamp, m.TraceID)
			if tc.code == OK && got != tc.want || tc.code != OK && !strings.Contains(got, tc.want) {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
	var m ClientMessage
	if err := ParseClient([]byte(`{"type":"refresh-token","data":{"token":"a.b.c"}}`), &m); err != nil || string(m.Token) != "a.b.c" {
		t.Errorf("token %q, %v", m.Token, err)
	}
	if err := ParseClient([]byte(`{"type":"delivery-ack","data":{"delivery_id":42}}`), &m); err != nil || m.DeliveryID != 42 {
		t.Errorf("delivery %d, %v", m.DeliveryID, err)
	}
}

// record is an upstream value as im-logic reads it.
type record struct {
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

func TestHotPathDoesNotAllocate(t *testing.T) {
	frame := []byte(`{"type":"send-message","message_id":"c-1","data":{"conversation_id":"v1","content":"` +
		strings.Repeat("x", 128) + `"},"timestamp":1760000000000}`)
	var m ClientMessage
	b := NewBuilder("gateway-1", 1, nil)
	id := MakeSessionID(0, 0, 1, 1)
	out := make([]byte, 0, 1024)
	u := b.Build(&m, "user", id, 1)
	for name, f := range map[string]func(){
		"ParseClient": func() {
			if err := ParseClient(frame, &m); err != nil {
				t.Fatal(err)
			}
		},
		"AppendAck":       func() { out = JSON.AppendAck(out[:0], u, "im-upstream-topic", 1) },
		"AppendAckError":  func() { out = JSON.AppendAckError(out[:0], m.ClientMsgID, false, Overloaded, 5, 1) },
		"AppendError":     func() { out = JSON.AppendError(out[:0], InvalidMessage, "text", 1) },
		"AppendPong":      func() { out = JSON.AppendPong(out[:0], 1) },
		"AppendReconnect": func() { out = JSON.AppendReconnect(out[:0], 5, "draining", 1) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s allocates %.0f times", name, n)
		}
	}
	if n := testing.AllocsPerRun(1000, func() { b.Build(&m, "user", id, 1).Release() }); n > 1 {
		t.Errorf("Build allocates %.1f times", n)
	}
}

func TestFramesAreJSON(t *testing.T) {
	u := &Upstream{ClientMsgID: []byte("a\"\n\u2028"), MessageID: []byte("01J"), Temp: true}
	u.Result.Offset = 7
	for name, f := range map[string][]byte{
		"connected":       JSON.AppendConnected(nil, "g\"", "s", 30000, 65536, true, 1),
		"ack":             JSON.AppendAck(nil, u, "topic", 1),
		"ack error":       JSON.AppendAckError(nil, u.ClientMsgID, true, Overloaded, 5, 1),
		"error":           JSON.AppendError(nil, InvalidMessage, "bad \xff", 1),
		"pong":            JSON.AppendPong(nil, 1),
		"reconnect":       JSON.AppendReconnect(nil, 5, "draining", 1),
		"token-refreshed": JSON.AppendTokenRefreshed(nil, 5, 1),
		"user event":      AppendUserEvent(nil, false, "u\x00", "g", "s", "r", 1),
	} {
		var v struct {
			Type      string
			Timestamp int64
			Data      map[string]any
		}
		if err := json.Unmarshal(f, &v); err != nil || v.Type == "" || v.Timestamp != 1 || !utf8.Valid(f) {
			t.Errorf("%s: %v in %s", name, err, f)
		}
		if name == "ack" && (v.Data["tempMessageId"] != "a\"\n\u2028" || v.Data["messageId"] != "01J" || v.Data["offset"] != 7.0) {
			t.Errorf("ack: %v", v.Data)
		}
	}
}

// FuzzParseClient: what is accepted is valid JSON, and what is built of it round-trips; every cut of an
// accepted frame is refused.
func FuzzParseClient(f *testing.F) {
	f.Add([]byte(`{"type":"m","message_id":"c-1","data":{"a":[1,"x",null,true,-1.5e-3]},"timestamp":1}`))
	f.Add([]byte(`{"type":"m","data":{"tempMessageId":"\u00e9"}}`))
	f.Add([]byte(`{"type":"ping"}`))
	b := NewBuilder("g", 1, nil)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if !utf8.Valid(frame) {
			return // refused before
		}
		var m ClientMessage
		err := ParseClient(frame, &m)
		if err != nil {
			return
		}
		if !json.Valid(frame) {
			t.Fatalf("accepted what is not JSON: %q", frame)
		}
		if m.Data != nil {
			u := b.Build(&m, "u", 1, 1)
			var r record
			if err := json.Unmarshal(u.Value, &r); err != nil {
				t.Fatalf("built what is not JSON: %q of %q", u.Value, frame)
			}
			if r.ClientMsgID != string(m.ClientMsgID) || r.Type != string(m.Type) {
				t.Fatalf("%q: name %q, type %q", frame, r.ClientMsgID, r.Type)
			}
			u.Release()
		}
		whole := strings.TrimRight(string(frame), " \t\r\n")
		for cut := range whole {
			if ParseClient([]byte(whole[:cut]), &m) == nil {
				t.Fatalf("accepted the beginning %q of %q", whole[:cut], frame)
			}
		}
	})
}

// FuzzScan: the scanner accepts exactly what encoding/json does, nesting apart.
func FuzzScan(f *testing.F) {
	for _, s := range []string{`{"a":1}`, `{"a":[{}]}`, `{"a":-0.0e+1}`, `{"a":"\ud800"}`, `{"":01}`, "{\"a\":\"\x01\"}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if !utf8.Valid(b) || strings.Count(string(b), "[")+strings.Count(string(b), "{") > maxDepth {
			return
		}
		o := topObject(b)
		for o.next() {
		}
		object := len(strings.TrimLeft(string(b), " \t\r\n")) > 0 && strings.TrimLeft(string(b), " \t\r\n")[0] == '{'
		if got, want := o.endsHere(), json.Valid(b) && object; got != want {
			t.Errorf("%q: %v, encoding/json says %v", b, got, want)
		}
	})
}

func BenchmarkParseClient(b *testing.B) {
	frame := typicalFrame()
	var m ClientMessage
	b.ReportAllocs()
	for b.Loop() {
		if err := ParseClient(frame, &m); err != nil {
			b.Fatal(err)
		}
	}
}

func TestParseClientDoesNotAllocate(t *testing.T) {
	frame := typicalFrame()
	var m ClientMessage
	if n := testing.AllocsPerRun(100, func() { _ = ParseClient(frame, &m) }); n != 0 {
		t.Errorf("allocates %.2f times", n)
	}
}

// skipText and skipASCII look at eight bytes at a time: every byte at every place.
func TestSkip(t *testing.T) {
	for c := range 256 {
		for at := range 20 {
			b := []byte("abcdefghijklmnopqrstuvw")
			b[at] = byte(c)
			text, ascii := len(b), len(b)
			if c < 0x20 || c == '"' || c == '\\' {
				text, ascii = at, at
			} else if c >= 0x80 {
				ascii = at
			}
			if got := skipText(b, 0); got != text {
				t.Errorf("skipText: %q: %d, want %d", b, got, text)
			}
			if got := skipASCII(b, 0); got != ascii {
				t.Errorf("skipASCII: %q: %d, want %d", b, got, ascii)
			}
		}
	}
}
