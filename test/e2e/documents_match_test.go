package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec"
)

// TestDocumentsAreServed: those that the suite holds the gateway against are those that it hands out.
func TestDocumentsAreServed(t *testing.T) {
	g := start(t, user("gw"), nil)
	get := func(path string) []byte {
		resp, err := http.Get("http://" + g.addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("GET %s: %d, %v", path, resp.StatusCode, err)
		}
		return b
	}
	hide("there is no token here") // nobody has connected
	n := 0
	for root, at := range map[string]string{documents: "/", "../../codec/proto": "/proto/"} {
		err := fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
			switch ext := filepath.Ext(name); {
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "testdata" || d.Name() == "node_modules"):
				return fs.SkipDir
			case ext == ".json" || ext == ".proto":
				n++
				want, err := os.ReadFile(filepath.Join(root, name))
				if !bytes.Equal(get(at+name), want) {
					t.Errorf("%s%s is not the file", at, name)
				}
				return err
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if n < 25 {
		t.Errorf("%d documents", n)
	}
}

// relay passes connections on to a server until it is cut.
func relay(t *testing.T, to string) (addr string, cut func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	open := []io.Closer{ln}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				_ = near.Close()
				return
			}
			mu.Lock()
			open = append(open, near, far)
			mu.Unlock()
			for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
				running.Go(func() {
					_, _ = io.Copy(way[0], way[1])
					_, _ = way[0].Close(), way[1].Close()
				})
			}
		}
	})
	cut = sync.OnceFunc(func() {
		_ = ln.Close()
		mu.Lock()
		for _, c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	t.Cleanup(cut)
	return ln.Addr().String(), cut
}

// TestDocumentsNameWhatThereIs: everything that AsyncAPI document and schemas name occurs, down to the last
// field of what a gateway sends. That nothing else occurs is checked wherever a client reads a frame, and in
// the end for all records of the suite.
func TestDocumentsNameWhatThereIs(t *testing.T) {
	redis, cut := relay(t, env.redis)
	a := start(t, user("gw"), settings{"redis.addrs": redis, "limits.messages_per_second": "20"})
	b := start(t, user("gw"), nil)

	alice, bob := user("alice"), user("bob")
	ca := speaking(t, a, alice, jsonProtocol, "?ack=1&device_id=d-1")
	cb := speaking(t, b, bob, protoProtocol, "?device_id=d-2")
	ca.sendRaw("ping", "", "")
	ca.wait("pong")
	ca.sendRaw("refresh-token", "", `{"token":"`+token(t, alice, 2*time.Hour)+`"}`)
	ca.wait("token-refreshed")
	ca.send("m", "c-1", 1)
	ca.ack()
	ca.send("m", "", map[string]string{"tempMessageId": "c-2"})
	ca.ack()
	ca.send("m", "", nil)
	ca.sendRaw("m", "", "")
	ca.wait("error")
	produce(t, a, alice, fmt.Sprintf(`{"user_id":%q,"content":"hi"}`, alice))
	ca.acknowledge(int(ca.wait("new-message").DeliveryID))

	// To bob by way of the other gateway, once; and to nobody.
	everything := fmt.Sprintf(`"device_id":"d-2","type":"news","message_id":"m-1","trace_id":"t","expire_at":%d,"timestamp":1,"data":{}`,
		time.Now().Add(time.Hour).UnixMilli())
	trace := kgo.RecordHeader{Key: "traceparent", Value: []byte("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")}
	hop := kgo.RecordHeader{Key: "im-hop", Value: []byte("1")}
	topic, garbage := downstreamPrefix+a.id, "no JSON of "+bob
	err := env.kafka.ProduceSync(deadline(t),
		&kgo.Record{Topic: topic, Value: fmt.Appendf(nil, `{"target_user_id":%q,%s}`, bob, everything), Headers: []kgo.RecordHeader{trace}},
		&kgo.Record{Topic: topic, Value: fmt.Appendf(nil, `{"target_user_ids":[%q],"data":1}`, bob), Headers: []kgo.RecordHeader{trace, hop}},
		&kgo.Record{Topic: topic, Value: []byte(garbage), Headers: []kgo.RecordHeader{trace}},
	).FirstErr()
	if err != nil {
		t.Fatal(err)
	}
	cb.wait("news")
	find(t, "im-deadletter-topic", contains(garbage))
	a.settled()

	cb.send("m", "c-1", 1)
	cb.ack()
	flood := connect(t, a, user("mallory"))
	for i := range 60 {
		flood.send("m", fmt.Sprint("c-", i), 1)
	}
	for flood.ack().Code != string(codec.RateLimited) {
	}
	cut()
	connect(t, a, user("carol")) // and Redis does not know it
	carol := connect(t, b, user("carol"))
	dave := openStream(t, b, user("dave"), "", time.Hour)
	dave.post("ping", "", "")
	dave.wait("pong")
	dave.post("refresh-token", "", `{"token":"`+token(t, dave.name, 2*time.Hour)+`"}`)
	dave.wait("token-refreshed")
	produce(t, b, dave.name, fmt.Sprintf(`{"user_id":%q,"content":"hi"}`, dave.name))
	dave.wait("new-message")
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	carol.wait("reconnect")
	dave.wait("reconnect")
	dave.closed()
	if code := b.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}

	if err := env.spec.readTopics(deadline(t)); err != nil {
		t.Error(err)
	}
	rare := []string{
		"events/messageAck",                            // late, after Kafka was away for long
		"undelivered/undelivered header value_omitted", // where that topic takes less than the others
	}
	for _, name := range env.spec.missing() {
		if !slices.Contains(rare, name) {
			t.Errorf("the documents name what does not occur: %s", name)
		}
	}
}

// values are what fields are given, good and bad alike.
var values = []string{
	`null`, `true`, `0`, `-1`, `1.9`, `1e3`, `1e18`, `1e300`, `9223372036854775799`, `-9223372036854775799`, `9223372036854775807`,
	`-9223372036854775808`, `""`, `"x"`, `"é"`, `"7"`, `"-7"`, `"007"`, `"1.5"`, `"+1"`, `"-"`, `"1e3"`, `" 1"`, `"123456789012345678"`,
	`"1234567890123456789"`, `"ping"`, `"kick"`, `"a\u0000b"`, `"a\u001f"`, `"a\u007f"`, `"a\u0080"`, `"a\nb"`, `"\ud83d\ude00"`,
	`"` + strings.Repeat("t", 64) + `"`, `"` + strings.Repeat("t", 65) + `"`, `"` + strings.Repeat("n", 128) + `"`, `"` + strings.Repeat("n", 129) + `"`,
	`{}`, `[]`, `["x"]`, `["x","x","y"]`, `["x",1]`, `["x",""]`, `[null]`, `{"token":""}`, `{"token":7}`, `{"token":"a.b.c"}`, `{"delivery_id":"x"}`,
	`{"client_msg_id":""}`, `{"client_msg_id":null,"tempMessageId":7}`, `{"client_msg_id":"x","tempMessageId":7}`, `{"tempMessageId":"x"}`,
}

// variants returns each of the objects, without each of its fields, and with each of the fields given each of
// the values.
func variants(objects []map[string]string, fields ...string) (list []string) {
	add := func(o map[string]string) {
		var parts []string
		for _, k := range slices.Sorted(maps.Keys(o)) {
			parts = append(parts, strconv.Quote(k)+":"+o[k])
		}
		list = append(list, "{"+strings.Join(parts, ",")+"}")
	}
	for _, o := range objects {
		add(o)
		for _, f := range fields {
			changed := maps.Clone(o)
			delete(changed, f)
			add(changed)
			for _, v := range values {
				changed[f] = v
				add(changed)
			}
		}
	}
	return append(list, values...)
}

func conforms(t *testing.T, schema *jsonschema.Schema, text string) bool {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return schema.Validate(v) == nil
}

// sayings are texts that a schema and a gateway judge differently, and why.
type sayings map[string]string

// TestClientFramesBySchema: a gateway refuses the frames that the schema excludes, and no others.
func TestClientFramesBySchema(t *testing.T) {
	g := start(t, user("gw"), settings{"limits.messages_per_second": "0", "limits.user_messages_per_second": "0"})
	c := connect(t, g, user("alice"))
	frames := variants([]map[string]string{
		{"type": `"ping"`},
		{"type": `"refresh-token"`, "data": `{"token":"a.b.c"}`},
		{"type": `"delivery-ack"`, "data": `{"delivery_id":1}`},
		{"type": `"m"`, "message_id": `"c-1"`, "data": `1`, "timestamp": `1`},
		{"type": `"m"`, "data": `{"client_msg_id":"c-1"}`},
	}, "type", "message_id", "data", "timestamp", "trace_id", "traceparent", "other")
	for _, v := range values {
		frames = append(frames,
			`{"type":"refresh-token","data":{"token":`+v+`}}`, `{"type":"delivery-ack","data":{"delivery_id":`+v+`}}`,
			`{"type":"m","data":{"client_msg_id":`+v+`}}`, `{"type":"m","data":{"tempMessageId":`+v+`}}`)
	}
	differ := sayings{
		`{"type":"m","message_id":"` + strings.Repeat("é", 65) + `","data":1}`:              "more than 128 bytes of fewer characters",
		`{"type":"` + strings.Repeat("é", 33) + `","data":1}`:                               "more than 64 bytes of fewer characters",
		`{"type":"m","data":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`:     "nested too deep",
		`{"type":"m","message_id":7,"message_id":"c-1","data":1,"data":{},"timestamp":"1"}`: "",
	}
	for f := range differ {
		frames = append(frames, f)
	}
	var taken, refused int
	for i, f := range frames {
		// The refusal of the frame behind it comes after any of its own.
		marker := fmt.Sprint("marker-", i)
		c.write(websocket.MessageText, []byte(f))
		c.write(websocket.MessageText, []byte(`{"type":"m","message_id":"`+marker+`"}`))
		ok := true
		for {
			got, err := c.next()
			if err != nil {
				t.Fatalf("%.300s: %v", f, err)
			}
			var d ack
			if got.Type == "message-ack" || got.Type == "error" {
				decode(t, got.Data, &d)
			}
			if d.ClientMsgID == marker {
				break
			}
			ok = ok && d.Code != string(codec.InvalidMessage)
		}
		if ok {
			taken++
		} else {
			refused++
		}
		if why := differ[f]; ok != (conforms(t, env.spec.client, f) && why == "") {
			t.Errorf("%.300s: taken %v, which is not what the schema says", f, ok)
		}
	}
	t.Logf("%d frames were taken, %d refused", taken, refused)
	if taken < 100 || refused < 100 {
		t.Error("most of one kind")
	}
}

// TestDownstreamRecordsBySchema: a gateway makes dead letters of the records that the schema excludes, and of
// no others.
func TestDownstreamRecordsBySchema(t *testing.T) {
	g := start(t, user("gw"), settings{"kafka.downstream_partitions": "1"})
	nobody := strconv.Quote(user("nobody"))
	records := variants([]map[string]string{
		{"target_user_id": nobody, "data": `1`},
		{"target_user_ids": `[` + nobody + `]`, "content": `1`},
		{"target_user_ids": `null`, "target_user_id": nobody, "data": `null`, "content": `null`},
		{"user_id": nobody, "target_user_id": `null`, "type": `"kick"`},
		{"user_id": `7`, "target_user_id": nobody, "content": `1`, "data": `2`},
	}, "target_user_id", "target_user_ids", "user_id", "data", "content", "type", "device_id", "expire_at", "other")
	many := strings.Repeat(nobody+",", 10_000)
	differ := sayings{
		`{"user_id":"` + strings.Repeat("é", 65) + `","data":1}`:                                      "more than 128 bytes of fewer characters",
		`{"user_id":` + nobody + `,"data":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`: "nested too deep",
		`{"target_user_ids":[` + many + nobody + `],"data":1}`:                                        "the same user more than 10,000 times",
	}
	for _, field := range []string{"message_id", "trace_id", "timestamp"} {
		differ[`{"user_id":`+nobody+`,"data":1,"`+field+`":{}}`] = "ignored when it is of another kind"
	}
	for r := range differ {
		records = append(records, r)
		env.spec.exempt(r)
	}
	ctx := deadline(t)
	topic := downstreamPrefix + g.id
	var batch []*kgo.Record
	for _, r := range records {
		batch = append(batch, &kgo.Record{Topic: topic, Value: []byte(r)})
	}
	name := user("alice")
	c := connect(t, g, name)
	batch = append(batch, &kgo.Record{Topic: topic, Value: fmt.Appendf(nil, `{"user_id":%q,"data":"the last"}`, name)})
	offsets := map[string]string{}
	for _, r := range env.kafka.ProduceSync(ctx, batch...) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		offsets[fmt.Sprint(r.Record.Offset)] = string(r.Record.Value)
	}
	c.wait("new-message")
	g.settled()
	dead := map[string]bool{}
	err := readAll(ctx, []string{"im-deadletter-topic"}, func(r *kgo.Record) {
		if header(r, "source_topic") != topic {
			return
		}
		text := offsets[header(r, "source_offset")]
		if text != string(r.Value) {
			t.Errorf("the dead letter of %.300s is %.300s", text, r.Value)
		}
		dead[text] = true
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		_, differs := differ[r]
		if taken := !dead[r]; taken != conforms(t, env.spec.record, r) != differs {
			t.Errorf("%.300s: taken %v, which is not what the schema says", r, taken)
		}
	}
	t.Logf("%d records, %d dead letters", len(records), len(dead))
	if len(dead) < 100 || len(records) < len(dead)+100 {
		t.Error("most of one kind")
	}
}

// TestConnectQueryBySchema: a gateway refuses the handshakes whose query the schema excludes, and no others.
func TestConnectQueryBySchema(t *testing.T) {
	g := start(t, user("gw"), nil)
	name := user("alice")
	for _, field := range []string{"device_id", "device"} {
		for _, v := range []string{"", "x", "phone", "a_b-9", "A", "é", "a b", "a\x01", "a\x7f", "a\nb", strings.Repeat("x", 32),
			strings.Repeat("x", 33), strings.Repeat("x", 128), strings.Repeat("x", 129)} {
			query := map[string]any{field: v}
			text, err := json.Marshal(query)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			conn, resp, err := websocket.Dial(ctx, "ws://"+g.addr+"/ws?"+field+"="+url.QueryEscape(v),
				&websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}}})
			cancel()
			if err == nil {
				_ = conn.CloseNow()
			} else if resp == nil || resp.StatusCode != http.StatusBadRequest {
				t.Fatalf("%s: %v", text, err)
			}
			if taken := err == nil; taken != conforms(t, env.spec.query, string(text)) {
				t.Errorf("%s: taken %v, which is not what the schema says", text, taken)
			}
		}
	}
}
