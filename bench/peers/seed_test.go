package peers

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/gorilla/websocket"
	"github.com/redis/rueidis"
	"github.com/segmentio/kafka-go"
)

const testSecret = "a-secret-of-the-seed-stack-test-0123"

// admin is on an address of its own, where nothing else listens.
const admin = "127.0.0.9:17999"

type seedFixture struct {
	addr, admin, gateway, upstream, kafka string
	redis                                 rueidis.Client
}

func startSeed(t *testing.T) seedFixture {
	t.Helper()
	kafkaAddr, redisAddr := os.Getenv("IM_TEST_KAFKA"), os.Getenv("IM_TEST_REDIS")
	if kafkaAddr == "" || redisAddr == "" {
		t.Skip("IM_TEST_KAFKA and IM_TEST_REDIS (host:port) are not both set: the seed stack needs a real Kafka and Redis")
	}
	id := strconv.FormatInt(time.Now().UnixNano(), 36)
	f := seedFixture{gateway: "seed-" + id, upstream: "up-" + id, kafka: kafkaAddr, admin: admin}
	rdb, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{redisAddr}, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(rdb.Close)
	f.redis = rdb
	f.addr = start(t, "seed", "-addr", "127.0.0.1:0", "-admin", f.admin, "-gateway-id", f.gateway, "-upstream-topic", f.upstream,
		"-secret", testSecret, "-kafka", kafkaAddr, "-redis", redisAddr)
	t.Cleanup(func() {
		client := kafka.Client{Addr: kafka.TCP(kafkaAddr), Timeout: patience}
		if _, err := client.DeleteTopics(context.Background(), &kafka.DeleteTopicsRequest{Topics: []string{f.upstream, "im-downstream-topic-" + f.gateway}}); err != nil {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
		kafka.DefaultTransport.(*kafka.Transport).CloseIdleConnections()
	})
	return f
}

func signed(t *testing.T, secret string, claims jwt.MapClaims) string {
	t.Helper()
	s, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func in(d time.Duration) int64 { return time.Now().Add(d).Unix() }

type seedFrame struct {
	Type      string          `json:"type"`
	MessageID string          `json:"message_id"`
	Data      json.RawMessage `json:"data"`
}

func next(t *testing.T, c *websocket.Conn) seedFrame {
	t.Helper()
	_, b, err := c.ReadMessage()
	if err != nil {
		t.Fatal(err)
	}
	var f seedFrame
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	return f
}

func (f seedFixture) connect(t *testing.T, user string) (*websocket.Conn, string) {
	t.Helper()
	tok := signed(t, testSecret, jwt.MapClaims{"user_id": user, "exp": in(time.Hour)})
	c := dial(t, "ws://"+f.addr+"/ws", http.Header{"Sec-WebSocket-Protocol": {"im.json.v1, bearer." + tok}})
	if c.Subprotocol() != "im.json.v1" {
		t.Fatalf("subprotocol %q", c.Subprotocol())
	}
	hello := next(t, c)
	var d struct {
		GatewayID       string `json:"gateway_id"`
		SessionID       string `json:"session_id"`
		HeartbeatMS     int    `json:"heartbeat_ms"`
		MaxMessageBytes int    `json:"max_message_bytes"`
	}
	if err := json.Unmarshal(hello.Data, &d); err != nil || hello.Type != "connected" ||
		d.GatewayID != f.gateway || d.SessionID == "" || d.HeartbeatMS != 30000 || d.MaxMessageBytes <= 0 {
		t.Fatalf("first frame %s %s", hello.Type, hello.Data)
	}
	return c, d.SessionID
}

func TestSeedTokens(t *testing.T) {
	f := startSeed(t)
	good := jwt.MapClaims{"sub": "tok", "exp": in(time.Hour)}
	for _, tc := range []struct {
		name, query string
		header      http.Header
		status      int
	}{
		{"header", "", http.Header{"Authorization": {"Bearer " + signed(t, testSecret, good)}}, 101},
		{"query", "?token=" + signed(t, testSecret, good), nil, 101},
		{"subprotocol", "", http.Header{"Sec-WebSocket-Protocol": {"im.json.v1, bearer." + signed(t, testSecret, good)}}, 101},
		{"none", "", nil, 401},
		{"forged", "?token=" + signed(t, "another secret", good), nil, 401},
		{"expired", "?token=" + signed(t, testSecret, jwt.MapClaims{"sub": "tok", "exp": in(-time.Hour)}), nil, 401},
		{"without exp", "?token=" + signed(t, testSecret, jwt.MapClaims{"sub": "tok"}), nil, 401},
		{"nobody", "?token=" + signed(t, testSecret, jwt.MapClaims{"exp": in(time.Hour)}), nil, 401},
	} {
		c, res, err := websocket.DefaultDialer.Dial("ws://"+f.addr+"/ws"+tc.query, tc.header)
		if res == nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		if res.StatusCode != tc.status {
			t.Errorf("%s: %d, want %d", tc.name, res.StatusCode, tc.status)
		}
		if c != nil {
			_ = c.Close()
		}
	}
	res, err := http.Get("http://" + f.admin + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Errorf("readyz %d", res.StatusCode)
	}
}

func TestSeedUpstream(t *testing.T) {
	f := startSeed(t)
	c, session := f.connect(t, "alice")
	presence, err := f.redis.Do(context.Background(), f.redis.B().Hgetall().Key("user_session:alice").Build()).AsStrMap()
	if err != nil || presence["gateway_id"] != f.gateway || presence["session_id"] != session || presence["connected_at"] == "" || presence["version"] == "" {
		t.Fatalf("presence %v, %v", presence, err)
	}
	if err := c.WriteMessage(websocket.TextMessage, []byte("no JSON")); err != nil {
		t.Fatal(err)
	}
	if e := next(t, c); e.Type != "error" {
		t.Fatalf("%s after no JSON", e.Type)
	}
	const n = 300 // more than a batch
	for i := range n {
		if err := c.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, `{"type":"send-message","message_id":"c-%d","data":{"n": %d},"timestamp":7}`, i, i)); err != nil {
			t.Fatal(err)
		}
	}
	partition := -1
	for i := range n {
		a := next(t, c)
		var d struct {
			ID        string `json:"client_msg_id"`
			Status    string `json:"status"`
			Topic     string `json:"topic"`
			Partition int    `json:"partition"`
		}
		if err := json.Unmarshal(a.Data, &d); err != nil || a.Type != "message-ack" || d.ID != "c-"+strconv.Itoa(i) || d.Status != "success" || d.Topic != f.upstream {
			t.Fatalf("ack %d: %s %s", i, a.Type, a.Data)
		}
		partition = d.Partition
	}
	r := kafka.NewReader(kafka.ReaderConfig{Brokers: []string{f.kafka}, Topic: f.upstream, Partition: partition, MaxBytes: 1 << 20})
	defer func() { _ = r.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i := range n {
		m, err := r.ReadMessage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var v struct {
			MessageID   string          `json:"message_id"`
			UserID      string          `json:"user_id"`
			GatewayID   string          `json:"gateway_id"`
			SessionID   string          `json:"session_id"`
			Type        string          `json:"type"`
			ClientMsgID string          `json:"client_msg_id"`
			Data        json.RawMessage `json:"data"`
			Timestamp   int64           `json:"timestamp"`
			ClientTime  int64           `json:"client_timestamp"`
		}
		headers := map[string]string{}
		for _, h := range m.Headers {
			headers[h.Key] = string(h.Value)
		}
		name := "c-" + strconv.Itoa(i)
		if err := json.Unmarshal(m.Value, &v); err != nil || string(m.Key) != "alice" || v.MessageID == "" || v.UserID != "alice" ||
			v.GatewayID != f.gateway || v.SessionID != session || v.Type != "send-message" || v.ClientMsgID != name ||
			string(v.Data) != fmt.Sprintf(`{"n": %d}`, i) || v.Timestamp == 0 || v.ClientTime != 7 ||
			headers["type"] != "send-message" || headers["gateway_id"] != f.gateway || headers["client_msg_id"] != name {
			t.Fatalf("record %d: key %s headers %v value %s", i, m.Key, headers, m.Value)
		}
	}
}

func TestSeedDownstream(t *testing.T) {
	f := startSeed(t)
	a, _ := f.connect(t, "ann")
	b, _ := f.connect(t, "bob")
	w := &kafka.Writer{Addr: kafka.TCP(f.kafka), Topic: "im-downstream-topic-" + f.gateway, Balancer: &kafka.Hash{}, RequiredAcks: kafka.RequireAll, BatchTimeout: time.Millisecond}
	defer func() { _ = w.Close() }()
	write := func(value string) {
		t.Helper()
		if err := w.WriteMessages(context.Background(), kafka.Message{Key: []byte("k"), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"target_user_id":"ann","message_id":"m1","data":{"x": 1}}`)
	write(`no JSON`)
	write(`{"target_user_ids":["ann","bob","nobody"],"type":"notice","data":[2]}`)
	write(`{"target_user_id":"bob","message_id":"m3","data":3}`)
	if m := next(t, a); m.Type != "new-message" || m.MessageID != "m1" || string(m.Data) != `{"x": 1}` {
		t.Fatalf("ann got %+v", m)
	}
	ma, mb := next(t, a), next(t, b)
	if ma.Type != "notice" || ma.MessageID == "" || string(ma.Data) != "[2]" || mb.Type != ma.Type || mb.MessageID != ma.MessageID {
		t.Fatalf("ann got %+v, bob %+v", ma, mb)
	}
	if m := next(t, b); m.MessageID != "m3" {
		t.Fatalf("bob got %+v", m)
	}
}

func TestSeedReplacesSessions(t *testing.T) {
	f := startSeed(t)
	old, _ := f.connect(t, "carl")
	_, session := f.connect(t, "carl")
	if _, _, err := old.ReadMessage(); !websocket.IsCloseError(err, 4500) {
		t.Fatalf("the old session ended with %v", err)
	}
	got, err := f.redis.Do(context.Background(), f.redis.B().Hget().Key("user_session:carl").Field("session_id").Build()).ToString()
	if err != nil || got != session {
		t.Fatalf("presence names %q, %v; want %q", got, err, session)
	}
}
