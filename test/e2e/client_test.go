package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/redis/rueidis"
	"github.com/twmb/franz-go/pkg/kgo"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec"
	"im-gateway/codec/clientpb"
)

var names atomic.Int64

// user returns a name that no other test uses.
func user(prefix string) string { return prefix + "-" + strconv.FormatInt(names.Add(1), 10) }

// token signs an access token.
func token(t testing.TB, name string, ttl time.Duration) string {
	t.Helper()
	return tokenBy(t, secret, name, ttl)
}

// tokenBy signs an access token with a secret of its own.
func tokenBy(t testing.TB, secret, name string, ttl time.Duration) string {
	t.Helper()
	tok, err := jwt.NewBuilder().Claim("user_id", name).Expiration(time.Now().Add(ttl)).Build()
	if err != nil {
		t.Fatal(err)
	}
	b, err := jwt.Sign(tok, jwt.WithKey(jwa.HS256, []byte(secret)))
	if err != nil {
		t.Fatal(err)
	}
	return hide(string(b))
}

// frame is what a gateway sends.
type frame struct {
	Type       string          `json:"type"`
	MessageID  string          `json:"message_id"`
	Data       json.RawMessage `json:"data"`
	Timestamp  int64           `json:"timestamp"`
	DeliveryID uint64          `json:"delivery_id"`
}

// ack is the data of a message-ack, and of an error.
type ack struct {
	ClientMsgID   string `json:"client_msg_id"`
	TempMessageID string `json:"tempMessageId"`
	MessageID     string `json:"messageId"`
	Status        string `json:"status"`
	Code          string `json:"code"`
	Topic         string `json:"topic"`
	Partition     int32  `json:"partition"`
	Offset        int64  `json:"offset"`
}

// client is one WebSocket client.
type client struct {
	t    testing.TB
	name string
	*websocket.Conn
	session string
}

// connect opens a session and reads `connected`.
func connect(t testing.TB, g *gateway, name string) *client {
	t.Helper()
	c, err := dial(t, g, name, "/ws", http.Header{"Authorization": {"Bearer " + token(t, name, time.Hour)}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func dial(t testing.TB, g *gateway, name, path string, header http.Header, protocols ...string) (*client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, "ws://"+g.addr+path, &websocket.DialOptions{HTTPHeader: header, Subprotocols: protocols,
		CompressionMode: websocket.CompressionNoContextTakeover, CompressionThreshold: 128})
	if err != nil {
		if resp != nil {
			return nil, fmt.Errorf("status %d: %w", resp.StatusCode, err)
		}
		return nil, err
	}
	conn.SetReadLimit(1 << 20)
	t.Cleanup(func() { _ = conn.CloseNow() })
	c := &client{t: t, name: name, Conn: conn}
	f, err := c.next()
	if err != nil {
		return nil, err
	}
	if f.Type != "connected" {
		return nil, fmt.Errorf("the first frame is %s", f.Type)
	}
	var d struct {
		SessionID string `json:"session_id"`
	}
	if err := json.Unmarshal(f.Data, &d); err != nil {
		return nil, err
	}
	c.session = d.SessionID
	return c, nil
}

func (c *client) next() (f frame, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	kind, b, err := c.Read(ctx)
	if err != nil {
		return f, err
	}
	if kind != c.kind() {
		return f, fmt.Errorf("a %v message on a connection of protocol %q", kind, c.Subprotocol())
	}
	if kind == websocket.MessageText {
		if err := env.spec.fromServer("json", b); err != nil {
			c.t.Error(err)
		}
		return f, json.Unmarshal(b, &f)
	}
	var p clientpb.ServerFrame
	if err := proto.Unmarshal(b, &p); err != nil {
		return f, err
	}
	if err := env.spec.fromServerProto(&p); err != nil {
		c.t.Error(err)
	}
	return frame{p.Type, p.MessageId, p.Data, p.Timestamp, p.DeliveryId}, nil
}

// kind is what the connection's protocol sends messages as.
func (c *client) kind() websocket.MessageType {
	if c.Subprotocol() == protoProtocol {
		return websocket.MessageBinary
	}
	return websocket.MessageText
}

const (
	jsonProtocol  = "im.json.v1"
	protoProtocol = "im.proto.v1"
)

// wait reads frames until one of the type.
func (c *client) wait(kind string) frame {
	c.t.Helper()
	for {
		f, err := c.next()
		if err != nil {
			c.t.Fatalf("%s waits for %s: %v", c.name, kind, err)
		}
		if f.Type == kind {
			return f
		}
	}
}

// closed reads until the connection is closed and returns the code.
func (c *client) closed() websocket.StatusCode {
	c.t.Helper()
	for {
		if _, err := c.next(); err != nil {
			code := websocket.CloseStatus(err)
			if err := env.spec.closedWith(int(code)); err != nil {
				c.t.Error(err)
			}
			return code
		}
	}
}

func (c *client) send(kind, id string, data any) {
	c.t.Helper()
	b, err := json.Marshal(data)
	if err != nil {
		c.t.Fatal(err)
	}
	c.sendRaw(kind, id, string(b))
}

// sendRaw sends a message whose data need not be JSON; empty ones are left out.
func (c *client) sendRaw(kind, id, data string) {
	c.t.Helper()
	now := time.Now().UnixMilli()
	var b []byte
	if c.kind() == websocket.MessageBinary {
		var err error
		b, err = proto.Marshal(&clientpb.ClientFrame{Type: kind, MessageId: id, Data: []byte(data), Timestamp: now})
		if err != nil {
			c.t.Fatal(err)
		}
	} else {
		b = fmt.Appendf(nil, `{"type":%q,"timestamp":%d`, kind, now)
		if id != "" {
			b = fmt.Appendf(b, `,"message_id":%s`, codec.AppendQuoted(nil, id))
		}
		if data != "" {
			b = append(append(b, `,"data":`...), data...)
		}
		b = append(b, '}')
	}
	c.write(c.kind(), b)
}

func (c *client) write(kind websocket.MessageType, b []byte) {
	c.t.Helper()
	if kind == websocket.MessageText {
		env.spec.fromClient(b)
	} else if c.kind() == kind {
		env.spec.saw("protobuf/clientFrame")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := c.Write(ctx, kind, b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) ack() (a ack) {
	c.t.Helper()
	decode(c.t, c.wait("message-ack").Data, &a)
	return a
}

func decode(t testing.TB, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
}

// answer is the envelope of the HTTP API.
type answer struct {
	Status  int
	Header  http.Header
	Success bool            `json:"success"`
	Code    string          `json:"code"`
	Data    json.RawMessage `json:"data"`
}

func post(t testing.TB, g *gateway, path, body string, header http.Header) answer {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, "http://"+g.addr+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := env.spec.fromHTTP(req.Method, path, resp.StatusCode, text); err != nil {
		t.Error(err)
	}
	a := answer{Status: resp.StatusCode, Header: resp.Header}
	decode(t, text, &a)
	return a
}

// presence returns a user's entry in Redis.
func presence(t testing.TB, name string) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := env.cache.Do(ctx, env.cache.B().Hgetall().Key("user_session:"+name).Build()).AsStrMap()
	if err != nil && !rueidis.IsRedisNil(err) {
		t.Logf("read presence of %s: %v", name, err)
	}
	return m
}

// produce puts a record on a gateway's downstream topic.
func produce(t testing.TB, g *gateway, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r := &kgo.Record{Topic: "im-downstream-topic-" + g.id, Value: []byte(value)}
	if key != "" {
		r.Key = []byte(key)
	}
	if err := env.kafka.ProduceSync(ctx, r).FirstErr(); err != nil {
		t.Fatal(err)
	}
}

// find reads a topic from its beginning until a record satisfies want.
func find(t testing.TB, topic string, want func(*kgo.Record) bool) *kgo.Record {
	t.Helper()
	c, err := kgo.NewClient(kgo.SeedBrokers(env.brokers...), kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for ctx.Err() == nil {
		for it := c.PollFetches(ctx).RecordIter(); !it.Done(); {
			if r := it.Next(); want(r) {
				return r
			}
		}
	}
	t.Fatalf("no such record on %s", topic)
	return nil
}

func header(r *kgo.Record, key string) string {
	for _, h := range r.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}

func contains(text string) func(*kgo.Record) bool {
	return func(r *kgo.Record) bool { return bytes.Contains(r.Value, []byte(text)) }
}
