package codec

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec/clientpb"
)

var update = flag.Bool("update", false, "write testdata/vectors.json anew")

// vectors are frames in both protocols, for clients in other languages: clients/js reads the file.
type vectors struct {
	Client    []clientVector    `json:"client"`    // what the generated code writes
	Server    []serverVector    `json:"server"`    // what the gateway sends
	Malformed map[string]string `json:"malformed"` // name -> bytes that the generated code refuses as a ServerFrame
}

type clientVector struct {
	Type      string `json:"type"`
	MessageID string `json:"message_id,omitempty"`
	Data      string `json:"data,omitempty"` // JSON text
	Timestamp int64  `json:"timestamp,omitempty"`
	Proto     string `json:"proto"` // hex
}

type serverVector struct {
	Name  string          `json:"name"`
	JSON  json.RawMessage `json:"json"`
	Proto string          `json:"proto"` // hex
}

// TestVectors keeps testdata/vectors.json up to date: go test ./codec -run Vectors -update.
func TestVectors(t *testing.T) {
	var v vectors
	for _, c := range []clientVector{
		{Type: "ping"},
		{Type: "send-message", MessageID: "c-1", Data: `{"conversation_id":"v1","content":"grüß dich 😀"}`, Timestamp: 1760000000000},
		{Type: "delivery-ack", Data: `{"delivery_id":300}`},
		{Type: "refresh-token", Data: `{"token":"a.b.c"}`},
		{Type: "m", MessageID: strings.Repeat("n", MaxNameLen), Data: `null`, Timestamp: 1},
		{Type: "m", MessageID: "large", Data: `"` + strings.Repeat("x", 300) + `"`, Timestamp: 1<<53 - 1},
	} {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&clientpb.ClientFrame{
			Type: c.Type, MessageId: c.MessageID, Data: []byte(c.Data), Timestamp: c.Timestamp,
		})
		if err != nil {
			t.Fatal(err)
		}
		c.Proto = hex.EncodeToString(b)
		v.Client = append(v.Client, c)
	}

	const now = 1760000000000
	u := &Upstream{ClientMsgID: []byte("a\"\n\u2028é"), MessageID: []byte("01J"), Temp: true}
	u.Result.Offset = 1 << 40
	record := func(id string, data string) *Downstream {
		return &Downstream{Type: "new-message", MessageID: id, Data: []byte(data)}
	}
	for _, s := range []struct {
		name  string
		frame func(Protocol) []byte
	}{
		{"connected", func(p Protocol) []byte { return p.AppendConnected(nil, "g\"", "s", 30000, 65536, true, now) }},
		{"ack", func(p Protocol) []byte { return p.AppendAck(nil, u, "topic", now) }},
		{"refusal", func(p Protocol) []byte { return p.AppendAckError(nil, u.ClientMsgID, false, Overloaded, 1500, now) }},
		{"error", func(p Protocol) []byte { return p.AppendError(nil, InvalidMessage, "no \u007f type", now) }},
		{"pong", func(p Protocol) []byte { return p.AppendPong(nil, now) }},
		{"reconnect", func(p Protocol) []byte { return p.AppendReconnect(nil, 700, "draining", now) }},
		{"token-refreshed", func(p Protocol) []byte { return p.AppendTokenRefreshed(nil, now+1, now) }},
		{"record", func(p Protocol) []byte {
			return p.AppendDownstreamFrame(nil, record("t-0-1", `{"a": [1.5, "😀", null]}`), now)
		}},
		{"record to acknowledge", func(p Protocol) []byte {
			return p.AppendDeliveryID(nil, p.AppendDownstreamFrame(nil, record("t-0-2", `"`+strings.Repeat("x", 300)+`"`), now), 1<<53-1)
		}},
		{"record with a BOM in its id", func(p Protocol) []byte { return p.AppendDownstreamFrame(nil, record("\ufeffid", `1`), now) }},
	} {
		v.Server = append(v.Server, serverVector{s.name, s.frame(JSON), hex.EncodeToString(s.frame(Proto))})
	}
	pong := Proto.AppendPong(nil, now)
	varint := func(num protowire.Number, n uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), n)
	}
	bytesField := func(num protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, num, protowire.BytesType), s)
	}
	for _, s := range []struct {
		name  string
		frame []byte
	}{
		{"fields of a later version", bytes.Join([][]byte{varint(9, 1<<63), bytesField(1000, "x"), pong,
			protowire.AppendFixed64(protowire.AppendTag(nil, 7, protowire.Fixed64Type), 1),
			protowire.AppendFixed32(protowire.AppendTag(nil, 8, protowire.Fixed32Type), 1)}, nil)},
		{"the last one counts", bytes.Join([][]byte{bytesField(1, "old"), varint(4, 1), pong}, nil)},
		{"known fields of other kinds", bytes.Join([][]byte{pong, varint(1, 5), bytesField(4, "x"), bytesField(5, "x")}, nil)},
	} {
		if err := proto.Unmarshal(s.frame, &clientpb.ServerFrame{}); err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
		v.Server = append(v.Server, serverVector{s.name, JSON.AppendPong(nil, now), hex.EncodeToString(s.frame)})
	}

	v.Malformed = map[string]string{}
	for name, b := range map[string]string{
		"a tag alone":             "\x0a",
		"a length beyond the end": "\x0a\x05x",
		"a huge length":           "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7fx",
		"an endless varint":       "\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
		"a varint that is cut":    "\x20\xff",
		"a fixed64 that is cut":   "\x39\x01",
		"field 0":                 "\x02\x00",
		"wire type 7":             "\x0f",
		"a type that is no UTF-8": "\x0a\x01\xff",
		"JSON":                    `{"type":"pong"}`,
	} {
		if err := proto.Unmarshal([]byte(b), &clientpb.ServerFrame{}); err == nil {
			t.Errorf("%s is accepted by the generated code", name)
		}
		v.Malformed[name] = hex.EncodeToString([]byte(b))
	}

	got, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	const file = "testdata/vectors.json"
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is stale: go test ./codec -run Vectors -update", file)
	}
}
