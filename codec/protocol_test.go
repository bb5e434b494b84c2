package codec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec/clientpb"
)

// encode writes a client frame as a client of the protocol does; an empty field is left out.
func encode(t testing.TB, p Protocol, f *clientpb.ClientFrame) []byte {
	t.Helper()
	if p == Proto {
		b, err := proto.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var fields []string
	add := func(name, value string) { fields = append(fields, strconv.Quote(name)+":"+value) }
	if f.Type != "" {
		add("type", string(AppendQuoted(nil, f.Type)))
	}
	if f.MessageId != "" {
		add("message_id", string(AppendQuoted(nil, f.MessageId)))
	}
	if len(f.Data) > 0 {
		add("data", string(f.Data))
	}
	if f.Timestamp != 0 {
		add("timestamp", strconv.FormatInt(f.Timestamp, 10))
	}
	if f.TraceId != "" {
		add("trace_id", string(AppendQuoted(nil, f.TraceId)))
	}
	return []byte("{" + strings.Join(fields, ",") + "}")
}

// decode reads a gateway's frame as a client of the protocol does.
func decode(t testing.TB, p Protocol, frame []byte) *clientpb.ServerFrame {
	t.Helper()
	f := &clientpb.ServerFrame{}
	if p == Proto {
		if err := proto.Unmarshal(frame, f); err != nil {
			t.Fatal(err)
		}
		if len(f.ProtoReflect().GetUnknown()) > 0 {
			t.Errorf("%x has fields that the schema has not", frame)
		}
		same, err := proto.MarshalOptions{Deterministic: true}.Marshal(f)
		if err != nil || !bytes.Equal(same, frame) {
			t.Errorf("%x, the generated code writes %x, %v", frame, same, err)
		}
		return f
	}
	if p == SSE {
		frame = []byte(onlyEvent(t, frame).data)
	}
	var v struct {
		Type       string
		MessageID  string `json:"message_id"`
		Data       json.RawMessage
		Timestamp  int64
		DeliveryID uint64 `json:"delivery_id"`
	}
	if err := json.Unmarshal(frame, &v); err != nil || !utf8.Valid(frame) {
		t.Fatalf("%q: %v", frame, err)
	}
	f.Type, f.MessageId, f.Data, f.Timestamp, f.DeliveryId = v.Type, v.MessageID, v.Data, v.Timestamp, v.DeliveryID
	return f
}

// parsed describes what a frame was read as.
func parsed(p Protocol, frame []byte) string {
	var m ClientMessage
	text := "ok"
	if err := p.ParseClient(frame, &m); err != nil {
		var refusal *ParseError
		if !errors.As(err, &refusal) {
			return "no ParseError: " + err.Error()
		}
		if text = refusal.Error(); refusal == errNotObject || refusal == errNotJSON {
			return "malformed"
		}
	}
	return fmt.Sprintf("%s|%s|%s|%v|%s|%d|%s|%s|%d", text, m.Type, m.ClientMsgID, m.Temp, m.Data, m.Timestamp, m.TraceID, m.Token, m.DeliveryID)
}

// TestProtocolsAgreeOnClientFrames: one table, the same meaning and the same refusals in both.
func TestProtocolsAgreeOnClientFrames(t *testing.T) {
	const invalid = "INVALID_MESSAGE: "
	deep := func(n int) []byte { return []byte(strings.Repeat("[", n) + strings.Repeat("]", n)) }
	type frame = clientpb.ClientFrame
	for _, tc := range []struct {
		name  string
		frame *frame
		want  string // ...: anything may follow
	}{
		{"whole", &frame{Type: "send-message", MessageId: "c-1", Data: []byte(`{"a":[1,2,{}]}`), Timestamp: 1760000000000, TraceId: "0123456789abcdef0123456789abcdef"},
			`ok|send-message|c-1|false|{"a":[1,2,{}]}|1760000000000|0123456789abcdef0123456789abcdef||0`},
		{"no name", &frame{Type: "m", Data: []byte(`"x"`)}, `ok|m||false|"x"|0|||0`},
		{"null", &frame{Type: "m", Data: []byte(`null`)}, `ok|m||false|null|0|||0`},
		{"a number", &frame{Type: "m", Data: []byte(`-1.5e3`)}, `ok|m||false|-1.5e3|0|||0`},
		{"white space", &frame{Type: "m", Data: []byte(" \n{ \"a\" : 1 }\t")}, `ok|m||false|{ "a" : 1 }|0|||0`},
		{"name in data", &frame{Type: "m", Data: []byte(`{"client_msg_id":"d-1"}`)}, `ok|m|d-1|false|{"client_msg_id":"d-1"}|0|||0`},
		{"temp name", &frame{Type: "m", Data: []byte(`{"tempMessageId":"t-1"}`)}, `ok|m|t-1|true|{"tempMessageId":"t-1"}|0|||0`},
		{"names in order", &frame{Type: "m", MessageId: "a", Data: []byte(`{"client_msg_id":"b","tempMessageId":"c"}`)}, `ok|m|a|false|...`},
		{"name in data, escaped", &frame{Type: "m", Data: []byte(`{"tempMessageId":"\u00e9"}`)}, `ok|m|é|true|...`},
		{"name beyond ASCII", &frame{Type: "m", MessageId: "é\"你", Data: []byte(`1`)}, `ok|m|é"你|false|1|0|||0`},
		{"longest names", &frame{Type: strings.Repeat("t", MaxTypeLen), MessageId: strings.Repeat("n", MaxNameLen), Data: []byte(`1`)}, "ok|ttt..."},
		{"before 1970", &frame{Type: "m", Data: []byte(`1`), Timestamp: -5}, `ok|m||false|1|-5|||0`},
		{"traceparent", &frame{Type: "m", Data: []byte(`1`), TraceId: "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"}, `ok|m||false|1|0|0123456789abcdef0123456789abcdef||0`},
		{"bad trace id", &frame{Type: "m", Data: []byte(`1`), TraceId: "XYZ"}, `ok|m||false|1|0|||0`},
		{"zero trace id", &frame{Type: "m", Data: []byte(`1`), TraceId: zeroTraceID}, `ok|m||false|1|0|||0`},
		{"ping", &frame{Type: "ping"}, `ok|ping||false||0|||0`},
		{"ping with data", &frame{Type: "ping", MessageId: "p", Data: []byte(`{}`)}, `ok|ping|p|false|{}|0|||0`},
		{"refresh", &frame{Type: "refresh-token", Data: []byte(`{"token":"a.b.c"}`)}, `ok|refresh-token||false|{"token":"a.b.c"}|0||a.b.c|0`},
		{"delivery", &frame{Type: "delivery-ack", Data: []byte(`{"delivery_id":42}`)}, `ok|delivery-ack||false|{"delivery_id":42}|0|||42`},
		{"delivery as text", &frame{Type: "delivery-ack", Data: []byte(`{"delivery_id":"42"}`)}, `ok|delivery-ack||false|{"delivery_id":"42"}|0|||42`},
		{"deepest", &frame{Type: "m", Data: deep(maxDepth - 1)}, `ok|m|...`},

		{"nothing", &frame{}, invalid + `type must be...`},
		{"no type", &frame{MessageId: "n", Data: []byte(`1`)}, invalid + errNoType.Message + "||n|..."},
		{"long type", &frame{Type: strings.Repeat("t", MaxTypeLen+1), Data: []byte(`1`)}, invalid + "type must be..."},
		{"control character in type", &frame{Type: "a\n", Data: []byte(`1`)}, invalid + "type must be..."},
		{"long name", &frame{Type: "m", MessageId: strings.Repeat("n", MaxNameLen+1), Data: []byte(`1`)}, invalid + errBadName.Message + "|m||..."},
		{"control character in name", &frame{Type: "m", MessageId: "a\a", Data: []byte(`1`)}, invalid + errBadName.Message + "|m||..."},
		{"name in data no string", &frame{Type: "m", Data: []byte(`{"client_msg_id":7}`)}, invalid + errBadName.Message + "|m||..."},
		{"temp name empty", &frame{Type: "m", Data: []byte(`{"tempMessageId":""}`)}, invalid + errBadName.Message + "|m||..."},
		{"no data", &frame{Type: "m", MessageId: "n"}, invalid + errNoData.Message + "|m|n|..."},
		{"refresh without data", &frame{Type: "refresh-token"}, invalid + errNoToken.Message + "|..."},
		{"refresh without token", &frame{Type: "refresh-token", Data: []byte(`{}`)}, invalid + errNoToken.Message + "|..."},
		{"delivery without id", &frame{Type: "delivery-ack", MessageId: "n", Data: []byte(`{}`)}, invalid + errBadDelivery.Message + "|delivery-ack|n|..."},
		{"data no JSON", &frame{Type: "m", MessageId: "n", Data: []byte(`{]}`)}, "malformed"},
		{"data cut", &frame{Type: "m", Data: []byte(`{"a":`)}, "malformed"},
		{"data and more", &frame{Type: "m", Data: []byte(`1 2`)}, "malformed"},
		{"data with a control character", &frame{Type: "m", Data: []byte("\"\x01\"")}, "malformed"},
		{"ping with bad data", &frame{Type: "ping", Data: []byte(`x`)}, "malformed"},
		{"too deep", &frame{Type: "m", Data: deep(maxDepth)}, "malformed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for p, name := range []string{JSON: "json", Proto: "proto"} {
				got := parsed(Protocol(p), encode(t, Protocol(p), tc.frame))
				want, open := strings.CutSuffix(tc.want, "...")
				if got != want && !(open && strings.HasPrefix(got, want)) {
					t.Errorf("%s: got  %s\nwant %s", name, got, tc.want)
				}
			}
		})
	}
}

// TestParseClientProto: what only bytes of im.proto.v1 can be.
func TestParseClientProto(t *testing.T) {
	field := func(num protowire.Number, value string) string { return string(appendField(nil, num, value)) }
	m, name, one := field(fieldType, "m"), field(fieldMessageID, "n"), field(fieldData, "1")
	varint := func(num protowire.Number, v uint64) string {
		return string(protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v))
	}
	const malformed = "INVALID_MESSAGE: the frame is not one valid ClientFrame"
	for _, tc := range []struct{ name, frame, want string }{
		{"the last one counts", field(fieldType, "a") + m + field(fieldData, "0") + one, "ok|m||false|1|0|||0"},
		{"data first", one + m, "ok|m||false|1|0|||0"},
		{"an empty name is none", m + one + name + field(fieldMessageID, ""), "ok|m||false|1|0|||0"},
		{"a bad name, then a good one", m + one + field(fieldMessageID, "\a") + name, "ok|m|n|false|1|0|||0"},
		{"unknown fields", varint(9, 1) + field(100, "x") + m + one + string(protowire.AppendFixed64(protowire.AppendTag(nil, 8, protowire.Fixed64Type), 1)), "ok|m||false|1|0|||0"},
		{"known fields of other types", m + one + varint(1, 5) + varint(2, 5) + field(fieldTimestamp, "x"), "ok|m||false|1|0|||0"},
		{"type not UTF-8", field(fieldType, "\xff") + name + one, malformed},
		{"name not UTF-8", m + one + field(fieldMessageID, "\xff"), malformed},
		{"trace id not UTF-8", m + name + one + field(fieldTraceID, "\xff"), malformed + "|m|n|..."},
		{"data not UTF-8", m + name + field(fieldData, "\"\xff\""), "malformed"},
		{"group", m + one + string(protowire.AppendTag(nil, 9, protowire.StartGroupType)) + string(protowire.AppendTag(nil, 9, protowire.EndGroupType)), malformed},
		{"field 0", m + one + "\x02\x00", malformed},
		{"wire type 7", m + one + "\x0f", malformed},
		{"tag cut", m + name + one + "\xff", malformed + "|m|n|..."},
		{"length beyond the end", m + "\x1a\x05x", malformed},
		{"endless varint", m + one + "\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", malformed},
		{"timestamp cut", m + one + "\x20", malformed},
		{"JSON", `{"type":"m","data":1}`, malformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, open := parsed(Proto, []byte(tc.frame)), strings.TrimSuffix(tc.want, "...")
			if got != tc.want && !strings.HasPrefix(got, open) {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestProtocolsAgreeOnServerFrames: every frame that a gateway sends has the same fields and the same data
// in each, and im.proto.v1 is byte for byte what the generated code writes.
func TestProtocolsAgreeOnServerFrames(t *testing.T) {
	u := &Upstream{ClientMsgID: []byte("a\"\n\u2028"), MessageID: []byte("01J"), Temp: true}
	u.Result.Offset = 7
	long := &Upstream{ClientMsgID: []byte(strings.Repeat("n", MaxNameLen)), MessageID: []byte("01J")}
	long.Result.Offset = -1
	record := func(data []byte) *Downstream {
		d := &Downstream{Type: "new-message", MessageID: "t-0-1\"", Data: data}
		d.Encode(1760000000000)
		return d
	}
	big := record(append(append([]byte(`"`), bytes.Repeat([]byte("x"), 70_000)...), '"'))
	for name, f := range map[string]func(Protocol) []byte{
		"connected":       func(p Protocol) []byte { return p.AppendConnected(nil, "g\"", "s", 30000, 65536, false, 1) },
		"degraded":        func(p Protocol) []byte { return p.AppendConnected(nil, "g", "s", 30000, 65536, true, 1) },
		"ack":             func(p Protocol) []byte { return p.AppendAck(nil, u, "topic", 1) },
		"ack of 128":      func(p Protocol) []byte { return p.AppendAck([]byte{}, long, strings.Repeat("t", 20_000), 1) },
		"ack error":       func(p Protocol) []byte { return p.AppendAckError(nil, u.ClientMsgID, true, Overloaded, 5, 1) },
		"error":           func(p Protocol) []byte { return p.AppendError(nil, InvalidMessage, "bad \xff", 1) },
		"pong":            func(p Protocol) []byte { return p.AppendPong(nil, 1760000000000) },
		"reconnect":       func(p Protocol) []byte { return p.AppendReconnect(nil, 5, "draining", 1) },
		"token-refreshed": func(p Protocol) []byte { return p.AppendTokenRefreshed(nil, 5, 1) },
		"record":          record([]byte(`{"a": [1]}`)).FrameFor,
		"record, no data": record(nil).FrameFor,
		"large record":    big.FrameFor,
		"record with an id": func(p Protocol) []byte {
			return p.AppendDeliveryID(nil, record([]byte(`1`)).FrameFor(p), 300)
		},
	} {
		t.Run(name, func(t *testing.T) {
			j, b, e := decode(t, JSON, f(JSON)), decode(t, Proto, f(Proto)), decode(t, SSE, f(SSE))
			if !proto.Equal(j, b) || !proto.Equal(j, e) {
				t.Errorf("JSON  %v\nproto %v\nSSE   %v", j, b, e)
			}
			if j.Type == "" || j.Timestamp == 0 || !json.Valid(j.Data) {
				t.Errorf("%v", j)
			}
		})
	}
	d := record([]byte(`1`))
	if f := d.FrameFor(JSON); d.others.Load() != nil || &f[0] != &d.Frame[0] {
		t.Error("encoded for nobody, or twice")
	}
	for _, p := range []Protocol{Proto, SSE} {
		if f := d.FrameFor(p); &f[0] != &d.FrameFor(p)[0] {
			t.Errorf("%d: encoded twice", p)
		}
	}
	// A frame is appended: what stands before it stays.
	for _, n := range []int{0, 1, 100, 20_000} {
		text := strings.Repeat("t", n)
		if f := Proto.AppendError([]byte("before"), Overloaded, text, 1); !strings.HasPrefix(string(f), "before") {
			t.Errorf("%d: %.10q", n, f)
		} else if s := decode(t, Proto, f[len("before"):]); !strings.Contains(string(s.Data), `"message":"`+text+`"`) {
			t.Errorf("%d: %.100s", n, s.Data)
		}
	}
}

func TestProtoHotPathDoesNotAllocate(t *testing.T) {
	frame := encode(t, Proto, typicalProto())
	var m ClientMessage
	u := &Upstream{ClientMsgID: []byte("c-12345"), MessageID: []byte("01JABCDEFGHJKMNPQRSTVWXYZ0"), Temp: true}
	out := make([]byte, 0, 1024)
	record := Proto.AppendDownstreamFrame(nil, &Downstream{Type: "m", MessageID: "n", Data: []byte(`1`)}, 1)
	for name, f := range map[string]func(){
		"ParseClientProto": func() { _ = ParseClientProto(frame, &m) },
		"AppendAck":        func() { out = Proto.AppendAck(out[:0], u, "im-upstream-topic", 1) },
		"AppendAckError":   func() { out = Proto.AppendAckError(out[:0], u.ClientMsgID, false, Overloaded, 5, 1) },
		"AppendError":      func() { out = Proto.AppendError(out[:0], InvalidMessage, strings.Repeat("text", 1), 1) },
		"AppendPong":       func() { out = Proto.AppendPong(out[:0], 1) },
		"AppendDeliveryID": func() { out = Proto.AppendDeliveryID(out[:0], record, 1) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s allocates %.0f times", name, n)
		}
	}
}

// FuzzParseClientProto: what is accepted is a ClientFrame, read as the generated code reads it, and what
// JSON would have made of the same fields; the record built of it is JSON.
func FuzzParseClientProto(f *testing.F) {
	f.Add(encode(f, Proto, &clientpb.ClientFrame{Type: "m", MessageId: "c-1", Data: []byte(`{"a":[1,"x",null]}`), Timestamp: 1}))
	f.Add(encode(f, Proto, &clientpb.ClientFrame{Type: "m", Data: []byte(`{"tempMessageId":"\u00e9"}`), TraceId: "0123456789abcdef0123456789abcdef"}))
	f.Add(encode(f, Proto, &clientpb.ClientFrame{Type: "ping"}))
	f.Add([]byte("\x0a\x01m\x20\xff\xff\xff\xff\x0f\x1a\x011"))
	b := NewBuilder("g", 1, nil)
	f.Fuzz(func(t *testing.T, frame []byte) {
		var m ClientMessage
		err := ParseClientProto(frame, &m)
		var want clientpb.ClientFrame
		schema := proto.Unmarshal(frame, &want)
		if err != nil {
			return
		}
		if schema != nil {
			t.Fatalf("accepted %x: %v", frame, schema)
		}
		if string(m.Type) != want.Type || m.Timestamp != want.Timestamp || !bytes.Equal(m.Data, bytes.Trim(want.Data, " \t\r\n")) ||
			want.MessageId != "" && string(m.ClientMsgID) != want.MessageId {
			t.Fatalf("read %+v, the generated code %v", m, &want)
		}
		want.Data = bytes.Clone(want.Data)
		if got, same := parsed(Proto, frame), parsed(JSON, encode(t, JSON, &want)); got != same {
			t.Fatalf("%x:\nproto %s\nJSON  %s", frame, got, same)
		}
		if m.Data != nil {
			u := b.Build(&m, "u", 1, 1)
			if !json.Valid(u.Value) || !utf8.Valid(u.Value) {
				t.Fatalf("built %q of %x", u.Value, frame)
			}
			u.Release()
		}
	})
}

// FuzzServerProto: whatever the texts are, all protocols say the same.
func FuzzServerProto(f *testing.F) {
	f.Add("new-message", "t-0-1", "name", int64(1), uint64(1))
	f.Add("\"", "\u2028", strings.Repeat("n", 200), int64(1)<<62, uint64(1)<<63)
	f.Fuzz(func(t *testing.T, typ, id, text string, n int64, delivery uint64) {
		if !utf8.ValidString(typ) || !utf8.ValidString(id) || typ == "" || id == "" || n < 1 || delivery == 0 {
			return // a record's texts are UTF-8 and not empty
		}
		d := &Downstream{Type: typ, MessageID: id, Data: AppendQuoted(nil, text)}
		u := &Upstream{ClientMsgID: []byte(text), MessageID: []byte("01J"), Result: UpstreamResult{Offset: n}}
		for _, frame := range []func(Protocol) []byte{
			func(p Protocol) []byte { return p.AppendDeliveryID(nil, p.AppendDownstreamFrame(nil, d, n), delivery) },
			func(p Protocol) []byte { return p.AppendAck(nil, u, text, n) },
			func(p Protocol) []byte { return p.AppendError(nil, Code(typ), text, n) },
		} {
			j, b, e := decode(t, JSON, frame(JSON)), decode(t, Proto, frame(Proto)), decode(t, SSE, frame(SSE))
			if !proto.Equal(j, b) || !proto.Equal(j, e) {
				t.Fatalf("JSON  %v\nproto %v\nSSE   %v", j, b, e)
			}
		}
	})
}

func typicalProto() *clientpb.ClientFrame {
	var m ClientMessage
	if err := ParseClient(typicalFrame(), &m); err != nil {
		panic(err)
	}
	return &clientpb.ClientFrame{Type: string(m.Type), MessageId: string(m.ClientMsgID), Data: m.Data, Timestamp: m.Timestamp}
}

// BenchmarkProtocols is one frame each way: a message in, its ack, and a record out.
func BenchmarkProtocols(b *testing.B) {
	u := &Upstream{ClientMsgID: []byte("c-12345"), MessageID: []byte("01JABCDEFGHJKMNPQRSTVWXYZ0"), Temp: true, Result: UpstreamResult{Partition: 3, Offset: 123456789}}
	d := &Downstream{Type: "new-message", MessageID: "01JABCDEFGHJKMNPQRSTVWXYZ0", Data: []byte(`{"content":"` + strings.Repeat("x", 128) + `"}`)}
	dst := make([]byte, 0, 1024)
	for p, name := range []string{JSON: "json", Proto: "proto", SSE: "sse"} {
		p := Protocol(p)
		frame := encode(b, p, typicalProto())
		var m ClientMessage
		for _, op := range []struct {
			name string
			run  func()
		}{
			{"parse", func() { _ = p.ParseClient(frame, &m) }},
			{"ack", func() { dst = p.AppendAck(dst[:0], u, "im-upstream-topic", 1760000000000) }},
			{"record", func() { dst = p.AppendDownstreamFrame(dst[:0], d, 1760000000000) }},
		} {
			b.Run(op.name+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					op.run()
				}
				if op.name == "parse" {
					b.ReportMetric(float64(len(frame)), "frame-bytes")
				} else {
					b.ReportMetric(float64(len(dst)), "frame-bytes")
				}
			})
		}
	}
}
