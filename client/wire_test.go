package client

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"

	"google.golang.org/protobuf/proto"

	"im-gateway/codec"
	"im-gateway/codec/clientpb"
)

// What the client writes the gateway's own code reads, and the other way round.
func TestFramesOfTheGatewaysCode(t *testing.T) {
	for format, protocol := range map[Format]codec.Protocol{JSON: codec.JSON, Protobuf: codec.Proto} {
		t.Run(format.subprotocol(), func(t *testing.T) {
			b, err := format.encode("send-message", "ü-1", []byte(`{"a":  "<b>"}`), 1760000000000)
			if err != nil {
				t.Fatal(err)
			}
			var m codec.ClientMessage
			if err := protocol.ParseClient(b, &m); err != nil {
				t.Fatal(err)
			}
			if string(m.Type) != "send-message" || string(m.ClientMsgID) != "ü-1" || string(m.Data) != `{"a":  "<b>"}` || m.Timestamp != 1760000000000 {
				t.Errorf("read as %+v", m)
			}
			f, err := format.decode(protocol.AppendConnected(nil, "gw", "s", 30_000, 65_536, true, 7))
			if err != nil {
				t.Fatal(err)
			}
			var d connected
			if err := json.Unmarshal(f.Data, &d); err != nil || f.Type != typeConnected || f.Timestamp != 7 ||
				d != (connected{"gw", "s", 30_000, 65_536, "degraded"}) {
				t.Errorf("%+v, %+v, %v", f, d, err)
			}
			f, err = format.decode(protocol.AppendAckError(nil, []byte("c-1"), false, codec.Overloaded, 250, 7))
			if err != nil {
				t.Fatal(err)
			}
			var a ack
			if err := json.Unmarshal(f.Data, &a); err != nil || f.Type != typeMessageAck || a.ClientMsgID != "c-1" ||
				a.Status != "error" || a.Code != "OVERLOADED" || a.RetryAfterMs != 250 {
				t.Errorf("%+v, %+v, %v", f, a, err)
			}
		})
	}
}

// FuzzDecodeProtobuf holds the reader against the generated code.
func FuzzDecodeProtobuf(f *testing.F) {
	whole, err := proto.Marshal(&clientpb.ServerFrame{Type: "new-message", MessageId: "m", Data: []byte(`{"a":1}`), Timestamp: 1, DeliveryId: 1 << 63})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(append(whole, 0x32, 1, 'x', 0x0a, 1, 0xff))
	f.Add([]byte{0x0b, 0x0c})
	f.Add([]byte{0x08, 1, 0x20, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		var want clientpb.ServerFrame
		wantErr := proto.Unmarshal(b, &want)
		got, err := decodeProtobuf(b)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%x: %v, the generated code says %v", b, err, wantErr)
		}
		if err != nil {
			return
		}
		as := frame{Type: want.Type, MessageID: want.MessageId, Timestamp: want.Timestamp, DeliveryID: want.DeliveryId}
		data := got.Data
		if got.Data = nil; !reflect.DeepEqual(got, as) || !bytes.Equal(data, want.Data) {
			t.Errorf("%x: %+v %q, want %+v %q", b, got, data, as, want.Data)
		}
	})
}
