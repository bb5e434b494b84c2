package codec

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzClientData: data passes byte for byte, into what is parsed and into the record, and what is refused
// as no JSON is none to encoding/json either.
func FuzzClientData(f *testing.F) {
	for _, s := range []string{
		`{"a":[1,"x",null,true,-1.5e-3]}`, `1e400`, `"\ud800\u00e9"`, ` [ 1 , 2 ] `, `{"tempMessageId":"t","a":"\/"}`, `null`, `{"a":1`, `01`,
		`{"client_msg_id":"c","client_msg_id":null}`, `"` + strings.Repeat("é", 300) + `"`, strings.Repeat("[", 130) + strings.Repeat("]", 130),
	} {
		f.Add("m", "c-1", []byte(s))
	}
	b := NewBuilder("g", 1, nil)
	f.Fuzz(func(t *testing.T, typ, name string, data []byte) {
		if !utf8.ValidString(typ) || !utf8.ValidString(name) || !utf8.Valid(data) {
			return
		}
		frame := slices.Concat([]byte(`{"type":`), AppendQuoted(nil, typ), []byte(`,"message_id":`), AppendQuoted(nil, name),
			[]byte(`,"data":`), data, []byte(`}`))
		var m ClientMessage
		err := ParseClient(frame, &m)
		nested := bytes.Count(data, []byte("[")) + bytes.Count(data, []byte("{"))
		valid := json.Valid(frame)
		switch {
		case err == nil && !valid:
			t.Fatalf("accepted %q", frame)
		case err == errNotObject && valid && nested < maxDepth:
			t.Fatalf("refused %q", frame)
		case err != nil || m.Data == nil:
			return
		}
		var want map[string]json.RawMessage
		if err := json.Unmarshal(frame, &want); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.Data, want["data"]) {
			t.Fatalf("data %q, encoding/json reads %q of %q", m.Data, want["data"], frame)
		}
		u := b.Build(&m, "u", 1, 1)
		defer u.Release()
		var record map[string]json.RawMessage
		if err := json.Unmarshal(u.Value, &record); err != nil {
			t.Fatalf("built %q: %v", u.Value, err)
		}
		if !bytes.Equal(record["data"], m.Data) {
			t.Fatalf("the record holds %q of %q", record["data"], m.Data)
		}
	})
}

// FuzzServerFrames: whatever the texts are, what the gateway says is one JSON object in UTF-8 with a type
// and a time, behind what stood there before.
func FuzzServerFrames(f *testing.F) {
	f.Add("new-message", "id", "\"\\\u2028\x00\xff", int64(1), []byte(`{"a":1}`))
	f.Add("", strings.Repeat("n", 200), "\x7f\xed\xa0\x80", int64(-1), []byte(` [1] `))
	f.Fuzz(func(t *testing.T, typ, id, text string, n int64, data []byte) {
		u := &Upstream{ClientMsgID: []byte(text), MessageID: AppendQuoted(nil, "01J")[1:4], Temp: n&1 == 0, Result: UpstreamResult{Partition: int32(n), Offset: n}}
		frames := map[string]func(dst []byte) []byte{
			"connected": func(dst []byte) []byte { return JSON.AppendConnected(dst, id, text, n, int(n), n&1 == 0, n) },
			"ack":       func(dst []byte) []byte { return JSON.AppendAck(dst, u, text, n) },
			"ack error": func(dst []byte) []byte {
				return JSON.AppendAckError(dst, []byte(text), n&1 == 0, Code(typ), int32(n), n)
			},
			"error":           func(dst []byte) []byte { return JSON.AppendError(dst, Code(typ), text, n) },
			"pong":            func(dst []byte) []byte { return JSON.AppendPong(dst, n) },
			"reconnect":       func(dst []byte) []byte { return JSON.AppendReconnect(dst, n, text, n) },
			"token refreshed": func(dst []byte) []byte { return JSON.AppendTokenRefreshed(dst, n, n) },
			"user event":      func(dst []byte) []byte { return AppendUserEvent(dst, n&1 == 0, text, id, typ, text, n) },
		}
		if json.Valid(data) && utf8.Valid(data) {
			d := &Downstream{Type: typ, MessageID: id, TraceID: text, DeviceID: text, Data: data, ExpireAt: n, Timestamp: n}
			frames["downstream"] = func(dst []byte) []byte { return JSON.AppendDownstreamFrame(dst, d, n) }
			frames["delivery"] = func(dst []byte) []byte {
				return append(dst, JSON.AppendDeliveryID(nil, JSON.AppendDownstreamFrame(nil, d, n), uint64(n))...)
			}
			frames["forward"] = func(dst []byte) []byte { return AppendForward(dst, d, text) }
		}
		for name, frame := range frames {
			const before = "before"
			b, ok := bytes.CutPrefix(frame([]byte(before)), []byte(before))
			var v map[string]json.RawMessage
			if !ok || !utf8.Valid(b) || json.Unmarshal(b, &v) != nil || v["type"] == nil || v["timestamp"] == nil && name != "forward" {
				t.Errorf("%s: %q", name, b)
			}
		}
	})
}

// FuzzForward: a record that is handed on to another gateway says there what it said here.
func FuzzForward(f *testing.F) {
	for _, s := range []string{
		`{"target_user_ids":["a","\u00e9"],"type":"x","message_id":"m","trace_id":"t","device_id":"d","timestamp":5,"data":{"a":[1]},"expire_at":1}`,
		`{"user_id":"alice","content":"hi"}`,
		`{"target_user_id":"a\"b","type":"kick","data":{"reason":"\ud83d\ude00"}}`,
		`{"user_id":"a","data":null,"expire_at":-1,"timestamp":-9223372036854775808}`,
		`{"user_id":"a","type":"\ud800","data":1,"message_id":""}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		d, err := ParseDownstream(value, "t", 3, 4)
		if err != nil {
			return
		}
		if !json.Valid(value) {
			t.Fatalf("accepted what is not JSON: %q", value)
		}
		for _, user := range d.Targets[:min(2, len(d.Targets))] {
			on := AppendForward(nil, d, user)
			e, err := ParseDownstream(on, "other", 1, 2)
			if err != nil {
				t.Fatalf("%q is handed on as %q: %v", value, on, err)
			}
			if !slices.Equal(e.Targets, []string{user}) || e.Type != d.Type || e.MessageID != d.MessageID || e.TraceID != d.TraceID ||
				e.DeviceID != d.DeviceID || e.ExpireAt != d.ExpireAt || e.Timestamp != d.Timestamp || e.Kick != d.Kick ||
				e.KickReason != d.KickReason || !bytes.Equal(e.Data, d.Data) {
				t.Fatalf("%q is handed on as %q:\n%+v\n%+v", value, on, d, e)
			}
		}
	})
}
