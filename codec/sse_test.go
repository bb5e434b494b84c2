package codec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

// event is what a client of an event stream dispatches.
type event struct{ kind, data, id string }

// readEvents reads a stream as the HTML Living Standard says, section 9.2.6; what has no end yet is left.
func readEvents(stream []byte) (list []event, retry string) {
	text := strings.TrimPrefix(string(stream), "\ufeff")
	var e event
	var data strings.Builder
	for {
		end := strings.IndexAny(text, "\r\n")
		if end < 0 {
			return list, retry
		}
		line := text[:end]
		text = strings.TrimPrefix(text[end:], "\r")
		text = strings.TrimPrefix(text, "\n")
		if line == "" {
			if data.Len() > 0 {
				e.data = strings.TrimSuffix(data.String(), "\n")
				list = append(list, e)
			}
			data.Reset()
			e = event{id: e.id}
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			e.kind = value
		case "data":
			data.WriteString(value + "\n")
		case "id":
			if !strings.Contains(value, "\x00") {
				e.id = value
			}
		case "retry":
			if strings.Trim(value, "0123456789") == "" {
				retry = value
			}
		}
	}
}

// onlyEvent reads a stream that must be one event of no named type.
func onlyEvent(t testing.TB, frame []byte) event {
	t.Helper()
	list, retry := readEvents(frame)
	if len(list) != 1 || list[0].kind != "" || retry != "" || !bytes.HasSuffix(frame, []byte("}\n\n")) {
		t.Fatalf("%q is %q, %q", frame, list, retry)
	}
	return list[0]
}

func TestEventsOfRecords(t *testing.T) {
	for _, tc := range []struct{ name, id, data, want string }{
		{"plain", "m-1", `{"a": 1}`, "id: m-1\ndata: " + `{"type":"news","message_id":"m-1","data":{"a": 1},"timestamp":5}` + "\n\n"},
		{"line ends between tokens", "m", "{\n  \"a\": 1,\r\n\t\"b\":\r[\n]\n}",
			"id: m\ndata: " + `{"type":"news","message_id":"m","data":{   "a": 1,  ` + "\t" + `"b": [ ] },"timestamp":5}` + "\n\n"},
		{"line ends in a string", "m", `"a\n\r\u2028b"`, "id: m\ndata: " + `{"type":"news","message_id":"m","data":"a\n\r\u2028b","timestamp":5}` + "\n\n"},
		{"no id", "", "1", `data: {"type":"news","message_id":"","data":1,"timestamp":5}` + "\n\n"},
		{"a line end in the id", "a\nb", "1", `data: {"type":"news","message_id":"a\nb","data":1,"timestamp":5}` + "\n\n"},
		{"a NUL in the id", "a\x00", "1", `data: {"type":"news","message_id":"a\u0000","data":1,"timestamp":5}` + "\n\n"},
		{"an id of spaces", "  a ", "1", "id:   a \n" + `data: {"type":"news","message_id":"  a ","data":1,"timestamp":5}` + "\n\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := &Downstream{Type: "news", MessageID: tc.id, Data: []byte(tc.data)}
			if got := string(SSE.AppendDownstreamFrame(nil, d, 5)); got != tc.want {
				t.Errorf("got  %q\nwant %q", got, tc.want)
			}
		})
	}
	long := &Downstream{Type: "m", MessageID: strings.Repeat("n", maxEventID+1), Data: []byte("1")}
	if e := onlyEvent(t, SSE.AppendDownstreamFrame(nil, long, 1)); e.id != "" {
		t.Errorf("an id of %d bytes", len(e.id))
	}
	if list, _ := readEvents([]byte(SSEHeartbeat)); len(list) > 0 {
		t.Errorf("a heartbeat is %q", list)
	}
}

func TestCloseEvents(t *testing.T) {
	for code := CloseNormal; code < 5000; code++ {
		frame := AppendSSEClose([]byte(":\n"), code, "a\n\"b")
		list, retry := readEvents(frame)
		want := event{kind: "close", data: fmt.Sprintf(`{"code":%d,"reason":"a\n\"b"}`, code)}
		if len(list) != 1 || list[0] != want || (retry != "") != (code >= 4500) {
			t.Fatalf("%q is %q, retry %q", frame, list, retry)
		}
	}
}

func TestSSEDoesNotAllocate(t *testing.T) {
	out := make([]byte, 0, 1024)
	d := &Downstream{Type: "m", MessageID: "n", Data: []byte("[\n1\r\n]")}
	record := SSE.AppendDownstreamFrame(nil, d, 1)
	for name, f := range map[string]func(){
		"AppendDownstreamFrame": func() { out = SSE.AppendDownstreamFrame(out[:0], d, 1) },
		"AppendDeliveryID":      func() { out = SSE.AppendDeliveryID(out[:0], record, 1) },
		"AppendPong":            func() { out = SSE.AppendPong(out[:0], 1) },
		"AppendSSEClose":        func() { out = AppendSSEClose(out[:0], CloseKicked, "kicked") },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s allocates %.0f times", name, n)
		}
	}
}

// FuzzEvents: whatever a record holds, a client of the stream reads one event out of it, with the JSON that
// a WebSocket client gets; an id that it has is the record's.
func FuzzEvents(f *testing.F) {
	f.Add("new-message", "t-0-1", []byte("{\"a\":\n1,\r\n\"b\":\"\\n\"\r}"), uint64(1), "reason")
	f.Add("\n", "id: x\ndata: y\n\n", []byte(`"\u2028\u0085data: "`), uint64(9), "a\r\n\ndata: x")
	f.Add("", " \ufeff", []byte(" [\n\n\n] "), uint64(0), "\x00\xff")
	f.Fuzz(func(t *testing.T, typ, id string, data []byte, n uint64, reason string) {
		d := &Downstream{Type: typ, MessageID: id, Data: data}
		if json.Valid(data) && utf8.Valid(data) {
			for _, acks := range []bool{false, true} {
				j, e := JSON.AppendDownstreamFrame(nil, d, 1), SSE.AppendDownstreamFrame(nil, d, 1)
				if acks {
					j, e = JSON.AppendDeliveryID(nil, j, n), SSE.AppendDeliveryID(nil, e, n)
				}
				got := onlyEvent(t, e)
				var a, b bytes.Buffer
				if json.Compact(&a, j) != nil || json.Compact(&b, []byte(got.data)) != nil || a.String() != b.String() {
					t.Fatalf("%q\nis %q", e, got.data)
				}
				if got.id != id && (got.id != "" || !hasControl(id) && len(id) <= maxEventID && utf8.ValidString(id)) {
					t.Fatalf("the id is %q, want %q", got.id, id)
				}
				if len(got.data) != len(j) {
					t.Fatalf("%d bytes of data, %d on a WebSocket", len(got.data), len(j))
				}
			}
		}
		u := &Upstream{ClientMsgID: []byte(reason), MessageID: []byte("01J")}
		for _, frame := range []func(Protocol) []byte{
			func(p Protocol) []byte { return p.AppendConnected(nil, id, reason, 1, 2, true, 3) },
			func(p Protocol) []byte { return p.AppendAck(nil, u, id, 1) },
			func(p Protocol) []byte { return p.AppendAckError(nil, u.ClientMsgID, true, Overloaded, 1, 1) },
			func(p Protocol) []byte { return p.AppendError(nil, Code(typ), reason, 1) },
			func(p Protocol) []byte { return p.AppendReconnect(nil, 1, reason, 1) },
			func(p Protocol) []byte { return p.AppendTokenRefreshed(nil, int64(n), 1) },
		} {
			if got := onlyEvent(t, frame(SSE)); got.data != string(frame(JSON)) || got.id != "" {
				t.Fatalf("%q, want %q", got, frame(JSON))
			}
		}
		list, _ := readEvents(AppendSSEClose(nil, CloseCode(n), reason))
		var v struct {
			Code   CloseCode
			Reason string
		}
		if len(list) != 1 || list[0].kind != "close" || json.Unmarshal([]byte(list[0].data), &v) != nil || v.Code != CloseCode(n) ||
			utf8.ValidString(reason) && v.Reason != reason {
			t.Fatalf("%q, %+v", list, v)
		}
	})
}
