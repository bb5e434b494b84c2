package codec

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestBuild(t *testing.T) {
	b := NewBuilder(`gate"way`, 99, nil)
	id := MakeSessionID(3, 1, 77, 5)
	frame := `{"type":"a\"b","message_id":"c\u2028d","data":{ "x" : 1.0e2 , "y":"\u0041" },"timestamp":5}`
	var m ClientMessage
	if err := ParseClient([]byte(frame), &m); err != nil {
		t.Fatal(err)
	}
	u := b.Build(&m, "üser", id, 1000)
	var r record
	if err := json.Unmarshal(u.Value, &r); err != nil {
		t.Fatalf("%v in %s", err, u.Value)
	}
	if r.MessageID != string(u.MessageID) || len(r.MessageID) != 26 || len(r.TraceID) != 32 ||
		r.UserID != "üser" || r.GatewayID != `gate"way` || r.SessionID != id.Name(99) || r.Type != `a"b` ||
		r.ClientMsgID != "c\u2028d" || r.Timestamp != 1000 || r.ClientTimestamp != 5 {
		t.Errorf("%+v", r)
	}
	if !strings.Contains(string(u.Value), `"data":{ "x" : 1.0e2 , "y":"\u0041" }`) {
		t.Errorf("data did not pass byte for byte: %s", u.Value)
	}
	if string(u.Type) != `a"b` || string(u.ClientMsgID) != "c\u2028d" {
		t.Errorf("type %q, name %q", u.Type, u.ClientMsgID)
	}
	if want := "00-" + r.TraceID + "-"; !strings.HasPrefix(string(u.TraceParent), want) || len(u.TraceParent) != 55 {
		t.Errorf("traceparent %q", u.TraceParent)
	}
	last := r.MessageID
	u.Release()
	for now := int64(1000); now > 900; now-- { // a clock that goes back
		u := b.Build(&m, "u", id, now)
		if got := string(u.MessageID); got <= last {
			t.Fatalf("message id %s after %s", got, last)
		} else {
			last = got
		}
		u.Release()
	}
}

// checkBuilt builds m's record and reads it back. Every byte of data must be there as it came.
func checkBuilt(t *testing.T, b *Builder, m *ClientMessage) {
	t.Helper()
	const user, now = "ü\"\\\u2029ser", 1760000000001
	id := MakeSessionID(1, 2, 3, 4)
	u := b.Build(m, user, id, now)
	defer u.Release()
	var r record
	if err := json.Unmarshal(u.Value, &r); err != nil || !utf8.Valid(u.Value) {
		t.Fatalf("%v: %q of %q", err, u.Value, m.Data)
	}
	if r.MessageID != string(u.MessageID) || r.UserID != user || r.SessionID != id.Name(b.nonce) || r.Type != string(m.Type) ||
		r.ClientMsgID != string(m.ClientMsgID) || r.Timestamp != now || r.ClientTimestamp != m.Timestamp ||
		AppendQuoted(nil, r.GatewayID) == nil || !bytes.Equal(AppendQuoted(nil, r.GatewayID), b.gateway) {
		t.Fatalf("%+v of %+v", r, m)
	}
	if !bytes.Equal(r.Data, m.Data) {
		t.Fatalf("data is %q, was %q", r.Data, m.Data)
	}
	if len(m.TraceID) > 0 && r.TraceID != string(m.TraceID) || len(r.TraceID) != 32 || r.TraceID == zeroTraceID {
		t.Fatalf("trace id %q, was %q", r.TraceID, m.TraceID)
	}
	if u.Session != id || u.User != user || u.Temp != m.Temp || !bytes.Equal(u.Type, m.Type) || !bytes.Equal(u.ClientMsgID, m.ClientMsgID) {
		t.Fatalf("%+v of %+v", u, m)
	}
	checkTraceParent(t, string(u.TraceParent), r.TraceID)
	if u.Size() < len(u.Value)+len(u.User) {
		t.Fatalf("size %d for %d bytes", u.Size(), len(u.Value)+len(u.User))
	}
}

func checkTraceParent(t *testing.T, s, trace string) {
	t.Helper()
	var m ClientMessage
	m.readTrace([]byte(s))
	if string(m.TraceID) != trace || string(m.TraceParent) != s {
		t.Fatalf("traceparent %q of trace %q", s, trace)
	}
}

// A record from the HTTP API has no session, one without a name no client_msg_id.
func TestBuildLeavesOut(t *testing.T) {
	b := NewBuilder("g", 1, nil)
	m := ClientMessage{Type: []byte("m"), Data: []byte("null"), TraceID: []byte(strings.Repeat("ab", 16))}
	u := b.Build(&m, "u", 0, 5)
	var fields map[string]any
	if err := json.Unmarshal(u.Value, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"session_id", "client_msg_id", "client_timestamp"} {
		if v, ok := fields[name]; ok {
			t.Errorf("%s is %v", name, v)
		}
	}
	if v, ok := fields["data"]; !ok || v != nil || fields["trace_id"] != string(m.TraceID) || len(u.ClientMsgID) != 0 {
		t.Errorf("%s", u.Value)
	}
}

// A record keeps nothing of the frame it was made of, and a pooled one nothing of the one before.
func TestRecordsOwnTheirBytes(t *testing.T) {
	b := NewBuilder("g", 1, nil)
	frame := []byte(`{"type":"m","message_id":"first","data":{"k":"value"}}`)
	var m ClientMessage
	if err := ParseClient(frame, &m); err != nil {
		t.Fatal(err)
	}
	u := b.Build(&m, "u", 1, 1)
	before := string(u.Value) + string(u.Type) + string(u.ClientMsgID)
	clear(frame)
	if got := string(u.Value) + string(u.Type) + string(u.ClientMsgID); got != before {
		t.Errorf("%s became %s", before, got)
	}
	for _, s := range [][]byte{u.Value, u.MessageID, u.Type, u.ClientMsgID, u.TraceParent} {
		if cap(s) != len(s) {
			t.Errorf("an append to %s would write over what follows", s)
		}
	}
	u.Deadline, u.Unknown, u.Next, u.Result.Offset = 1, true, u, 7
	u.Release()
	for range 3 {
		v := b.Build(&ClientMessage{Type: []byte("x"), Data: []byte("1")}, "v", 1, 2)
		if v.Deadline != 0 || v.Unknown || v.Next != nil || v.Reply != nil || v.Result != (UpstreamResult{}) || len(v.ClientMsgID) != 0 {
			t.Fatalf("%+v", v)
		}
		defer v.Release()
	}
}

func TestBuildHugeData(t *testing.T) {
	b := NewBuilder("g", 1, nil)
	m := ClientMessage{Type: []byte("m"), Data: []byte(`"` + strings.Repeat("x", 1<<20) + `"`)}
	checkBuilt(t, b, &m)
	u := b.Build(&m, "u", 1, 1)
	u.Release()
	if cap(u.buf) > maxPooledRecord {
		t.Errorf("%d bytes stay in the pool", cap(u.buf))
	}
}

func TestBuildDoesNotAllocate(t *testing.T) {
	b := NewBuilder("gateway-1", 1, nil)
	var m ClientMessage
	if err := ParseClient(typicalFrame(), &m); err != nil {
		t.Fatal(err)
	}
	// A collection may empty the pool meanwhile, hence the fraction.
	if n := testing.AllocsPerRun(1000, func() { b.Build(&m, "user-1", 1, 1).Release() }); n > 1 {
		t.Errorf("allocates %.2f times", n)
	}
}

func BenchmarkBuild(b *testing.B) {
	builder := NewBuilder("gateway-1", 1, nil)
	var m ClientMessage
	if err := ParseClient(typicalFrame(), &m); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		builder.Build(&m, "user-1", 1, 1760000000000).Release()
	}
}

func typicalFrame() []byte {
	return []byte(`{"type":"send-message","message_id":"c-12345","data":{"conversation_id":"v1","content":"` +
		strings.Repeat("x", 128) + `"},"timestamp":1760000000000}`)
}
