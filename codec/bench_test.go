package codec

import (
	"fmt"
	"strings"
	"testing"
)

func BenchmarkParseClientKinds(b *testing.B) {
	for _, tc := range []struct {
		name  string
		frame []byte
	}{
		{"200B", []byte(`{"type":"send-message","message_id":"c-1","data":{"conversation_id":"v1","content":"` +
			strings.Repeat("x", 88) + `"},"timestamp":1760000000000}`)},
		{"temp", []byte(`{"type":"send","data":{"tempMessageId":"temp-1760000000000-1","content":"` + strings.Repeat("x", 88) + `"}}`)},
		{"chinese", []byte(`{"type":"send-message","message_id":"c-1","data":{"conversation_id":"v1","content":"` +
			strings.Repeat("你好", 15) + `"},"timestamp":1760000000000}`)},
		{"ping", []byte(`{"type":"ping"}`)},
		{"escaped name", []byte(`{"type":"m","message_id":"c\u00e9-1","data":1}`)},
		{"escaped keys", []byte(`{"type":"m","data":{` + strings.Repeat(`"\u0061":0,`, 5000) + `"x":0}}`)},
		{"numbers", []byte(`{"type":"m","message_id":"c-1","data":{"a":[` + strings.Repeat("[1,-2.5e3,true,null],", 100) + `0]}}`)},
	} {
		b.Run(tc.name, func(b *testing.B) {
			var m ClientMessage
			b.SetBytes(int64(len(tc.frame)))
			b.ReportAllocs()
			for b.Loop() {
				if err := ParseClient(tc.frame, &m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParseDownstream(b *testing.B) {
	users := make([]string, MaxTargets)
	for i := range users {
		users[i] = fmt.Sprintf(`"user-%d"`, i)
	}
	for _, tc := range []struct{ name, value string }{
		{"one", `{"target_user_id":"user-1","message_id":"01JABCDEFGHJKMNPQRSTVWXYZ0","data":{"content":"` + strings.Repeat("x", 128) + `"},"timestamp":1760000000000}`},
		{"short", `{"user_id":"alice","content":"hi"}`},
		{"ten", `{"target_user_ids":[` + strings.Join(users[:10], ",") + `],"data":{"content":"` + strings.Repeat("x", 128) + `"}}`},
		{"all", `{"target_user_ids":[` + strings.Join(users, ",") + `],"data":1}`},
	} {
		b.Run(tc.name, func(b *testing.B) {
			value := []byte(tc.value)
			b.SetBytes(int64(len(value)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ParseDownstream(value, "im-downstream-topic-gw1", 0, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkAppendDownstreamFrame(b *testing.B) {
	d := &Downstream{Type: "new-message", MessageID: "01JABCDEFGHJKMNPQRSTVWXYZ0", Data: []byte(`{"content":"` + strings.Repeat("x", 128) + `"}`)}
	dst := make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		dst = JSON.AppendDownstreamFrame(dst[:0], d, 1760000000000)
	}
}

func BenchmarkAppendAck(b *testing.B) {
	u := &Upstream{ClientMsgID: []byte("c-12345"), MessageID: []byte("01JABCDEFGHJKMNPQRSTVWXYZ0"), Temp: true, Result: UpstreamResult{Partition: 3, Offset: 123456789}}
	dst := make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		dst = JSON.AppendAck(dst[:0], u, "im-upstream-topic", 1760000000000)
	}
}
