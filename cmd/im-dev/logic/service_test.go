package logic

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/lestrrat-go/jwx/v2/jwt"
	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"im-gateway/cmd/im-dev/embedded"
	"im-gateway/codec/logicpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var secret = []byte("0123456789abcdef0123456789abcdef")

// world is a service on embedded servers, with the test in the place of the gateways.
type world struct {
	t       *testing.T
	ctx     context.Context
	servers *embedded.Servers
	service *Service
	kafka   *kgo.Client // consumes the topics of g1 and g2
	etcd    *clientv3.Client
	next    int
}

func newWorld(t *testing.T) *world {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	down := []string{DefaultDownstreamTopicPrefix + "g1", DefaultDownstreamTopicPrefix + "g2"}
	servers, err := embedded.Start(ctx, embedded.Options{Topics: append([]string{DefaultUpstreamTopic}, down...)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = servers.Close() })
	w := &world{t: t, ctx: ctx, servers: servers}
	w.kafka, err = kgo.NewClient(kgo.SeedBrokers(servers.KafkaBrokers()...), kgo.ConsumeTopics(down...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.kafka.Close)
	w.etcd, err = clientv3.New(clientv3.Config{Endpoints: servers.EtcdEndpoints(), Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.etcd.Close() })
	w.service, err = New(Options{
		Kafka:    []kgo.Opt{kgo.SeedBrokers(servers.KafkaBrokers()...)},
		Redis:    rueidis.ClientOption{InitAddress: []string{servers.RedisAddr()}, ForceSingleClient: true},
		Etcd:     clientv3.Config{Endpoints: servers.EtcdEndpoints()},
		LeaseTTL: 2 * time.Second,
		Secret:   secret,
		Logger:   zerolog.New(zerolog.NewTestWriter(t)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// run starts the service and returns what stops it and waits.
func (w *world) run() (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	ended := make(chan error, 1)
	go func() { ended <- w.service.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			w.t.Error("Run:", err)
		}
	}
	w.t.Cleanup(stop)
	select {
	case <-w.service.Ready():
	case err := <-ended:
		w.t.Fatal("Run ended:", err)
	case <-w.ctx.Done():
		w.t.Fatal("not ready")
	}
	return stop
}

// client returns a client of the service as the gateway finds it: by its entry in etcd.
func (w *world) client() logicpb.AuthServiceClient {
	w.t.Helper()
	entries := w.entries()
	if len(entries) != 1 {
		w.t.Fatalf("%d entries in etcd, want 1", len(entries))
	}
	for _, e := range entries {
		conn, err := grpc.NewClient(e.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { _ = conn.Close() })
		return logicpb.NewAuthServiceClient(conn)
	}
	return nil
}

func (w *world) entries() endpoints.Key2EndpointMap {
	w.t.Helper()
	m, err := endpoints.NewManager(w.etcd, DefaultServiceName)
	if err != nil {
		w.t.Fatal(err)
	}
	entries, err := m.List(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return entries
}

func (w *world) connect(user, gateway string) {
	w.servers.RedisServer().HSet("user_session:"+user, "gateway_id", gateway)
}

// send stores what a gateway would store of a client's frame, and returns its message_id.
func (w *world) send(user, gateway, kind, clientID string, data any) string {
	w.t.Helper()
	w.next++
	id := fmt.Sprintf("m-%03d", w.next)
	raw, err := json.Marshal(data)
	if err != nil {
		w.t.Fatal(err)
	}
	value, err := json.Marshal(upstream{
		MessageID: id, UserID: user, GatewayID: gateway, SessionID: "s-" + user, Type: kind,
		ClientMsgID: clientID, Data: raw, Timestamp: time.Now().UnixMilli(),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.produce(user, value)
	return id
}

func (w *world) produce(user string, value []byte) {
	w.t.Helper()
	r := &kgo.Record{Topic: DefaultUpstreamTopic, Key: []byte(user), Value: value}
	if err := w.kafka.ProduceSync(w.ctx, r).FirstErr(); err != nil {
		w.t.Fatal(err)
	}
}

// got is a downstream record as the test sees it.
type got struct {
	gateway, key string
	downstream
}

func (g got) field(name string) any {
	var m map[string]any
	_ = json.Unmarshal(g.Data, &m)
	return m[name]
}

// receive returns the next n downstream records of a type; it passes over `conversation`, which
// comes along with first messages, unless asked for.
func (w *world) receive(kind string, n int) []got {
	w.t.Helper()
	var list []got
	for len(list) < n {
		fetches := w.kafka.PollFetches(w.ctx)
		if err := fetches.Err0(); err != nil {
			w.t.Fatalf("waiting for %d records of type %s, have %d: %v", n, kind, len(list), err)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			g := got{gateway: strings.TrimPrefix(r.Topic, DefaultDownstreamTopicPrefix), key: string(r.Key)}
			if err := json.Unmarshal(r.Value, &g.downstream); err != nil {
				w.t.Errorf("downstream record %s: %v", r.Value, err)
			}
			switch g.Type {
			case kind:
				list = append(list, g)
			case typeConversation:
			default:
				w.t.Errorf("unexpected record %s", r.Value)
			}
		})
	}
	if len(list) > n {
		w.t.Fatalf("%d records of type %s, want %d", len(list), kind, n)
	}
	return list
}

func TestAuthServiceIsFoundInEtcd(t *testing.T) {
	w := newWorld(t)
	stop := w.run()
	c := w.client()
	r, err := c.Register(w.ctx, &logicpb.RegisterRequest{Username: "Alice", Password: "correct horse"})
	if err != nil {
		t.Fatal(err)
	}
	if u := r.GetUser(); u.GetUserId() != "alice" || u.GetUsername() != "Alice" {
		t.Errorf("registered %v", u)
	}
	l, err := c.Login(w.ctx, &logicpb.LoginRequest{Username: "alice", Password: "correct horse"})
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Parse([]byte(l.GetToken()), jwt.WithKey(jwa.HS256, secret))
	if err != nil {
		t.Fatal("token:", err)
	}
	if id, _ := token.Get("user_id"); id != "alice" || token.Subject() != "alice" || token.JwtID() == "" {
		t.Errorf("claims: user_id %v, sub %s, jti %q", id, token.Subject(), token.JwtID())
	}
	if token.Expiration().UnixMilli() != l.GetExpiresAt() {
		t.Errorf("expires_at %d, but exp is %v", l.GetExpiresAt(), token.Expiration())
	}
	stop()
	if entries := w.entries(); len(entries) != 0 {
		t.Errorf("stopped, but etcd still has %v", entries)
	}
}

func TestRegistersAgainAfterLosingItsLease(t *testing.T) {
	w := newWorld(t)
	w.run()
	kv, err := w.etcd.Get(w.ctx, DefaultServiceName, clientv3.WithPrefix())
	if err != nil || len(kv.Kvs) != 1 {
		t.Fatalf("entry: %v, %v", kv, err)
	}
	watch := w.etcd.Watch(w.ctx, DefaultServiceName, clientv3.WithPrefix(), clientv3.WithRev(kv.Header.Revision+1))
	if _, err := w.etcd.Revoke(w.ctx, clientv3.LeaseID(kv.Kvs[0].Lease)); err != nil {
		t.Fatal(err)
	}
	for changes := range watch {
		for _, e := range changes.Events {
			if e.Type == clientv3.EventTypePut {
				return
			}
		}
	}
	t.Fatal("not registered again")
}

func TestMessageReachesTheRecipientsGatewayOnly(t *testing.T) {
	w := newWorld(t)
	w.run()
	w.connect("alice", "g1")
	w.connect("bob", "g2")
	id := w.send("alice", "g1", typeSend, "c-1", map[string]any{"to": "bob", "content": "hi <b>&"})
	m := w.receive(typeMessage, 1)[0]
	if m.gateway != "g2" || m.key != "bob" || m.TargetUserID != "bob" || m.MessageID != id {
		t.Errorf("got %+v", m)
	}
	if m.field("content") != "hi <b>&" || m.field("conversation_id") != "dm:alice:bob" || m.field("from") != "alice" {
		t.Errorf("data %s", m.Data)
	}

	w.send("bob", "g2", typeDelivered, "", map[string]any{"conversation_id": "dm:alice:bob", "message_id": id})
	r := w.receive(typeReceipt, 1)[0]
	if r.gateway != "g1" || r.TargetUserID != "alice" || r.field("message_id") != id || r.field("client_msg_id") != "c-1" {
		t.Errorf("receipt %+v %s", r, r.Data)
	}
}

func TestGroupMessageIsOneRecordPerGateway(t *testing.T) {
	w := newWorld(t)
	w.run()
	for user, gateway := range map[string]string{"alice": "g1", "bob": "g2", "carol": "g2"} {
		w.connect(user, gateway)
	}
	id := w.send("alice", "g1", typeCreate, "c-1", map[string]any{"name": "team", "members": []string{"bob", "carol", "dave"}})
	w.receive(typeConversation, 3) // dave is offline
	w.send("alice", "g1", typeSend, "c-2", map[string]any{"conversation_id": "group:" + id, "content": "hello"})
	m := w.receive(typeMessage, 1)[0]
	if m.gateway != "g2" || strings.Join(m.TargetUserIDs, ",") != "bob,carol" {
		t.Errorf("got %+v", m)
	}
}

func TestDuplicatesAndRubbishArePassedOver(t *testing.T) {
	w := newWorld(t)
	w.run()
	w.connect("bob", "g2")
	send := map[string]any{"to": "bob", "content": "once"}
	w.send("alice", "g1", typeSend, "c-1", send)
	w.send("alice", "g1", typeSend, "c-1", send) // the client's retry: another message_id
	for _, rubbish := range []string{"", "{", `[]`, `{"user_id":"alice"}`, `{"user_id":1}`} {
		w.produce("alice", []byte(rubbish))
	}
	w.send("alice", "g1", typeSend, "c-2", map[string]any{"to": "bob", "content": "end"})
	for i, m := range w.receive(typeMessage, 2) {
		if want := []string{"once", "end"}[i]; m.field("content") != want {
			t.Errorf("record %d: %s, want %s", i, m.Data, want)
		}
	}
	if s := w.service.Stats(); s.Malformed != 5 {
		t.Errorf("%d malformed, want 5", s.Malformed)
	}
}

func TestOfflineUserSyncsLater(t *testing.T) {
	w := newWorld(t)
	w.run()
	id := w.send("alice", "g1", typeSend, "c-1", map[string]any{"to": "bob", "content": "are you there?"})
	// Keyed apart, so wait until it has been handled.
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for w.service.Stats().Offline == 0 {
		select {
		case <-poll.C:
		case <-w.ctx.Done():
			t.Fatal("the message was not handled")
		}
	}
	// Redis does not know of bob yet: the answer goes to the gateway that asked.
	w.send("bob", "g2", typeSync, "s-1", map[string]any{"after": 0})
	answer := w.receive(typeSync, 1)[0]
	if answer.gateway != "g2" || answer.TargetUserID != "bob" {
		t.Errorf("got %+v", answer)
	}
	var view struct {
		Messages []messageView
		After    int64
	}
	if err := json.Unmarshal(answer.Data, &view); err != nil {
		t.Fatal(err)
	}
	if len(view.Messages) != 1 || view.Messages[0].MessageID != id || view.After == 0 {
		t.Errorf("sync %s", answer.Data)
	}
}

func TestRedisOutageDelaysButLosesNothing(t *testing.T) {
	w := newWorld(t)
	w.run()
	w.connect("bob", "g2")
	w.send("alice", "g1", typeSend, "c-1", map[string]any{"to": "bob", "content": "before"})
	w.receive(typeMessage, 1)
	w.servers.RedisServer().Close()
	for i := range 20 {
		w.send("alice", "g1", typeSend, fmt.Sprintf("d-%d", i), map[string]any{"to": "bob", "content": i})
	}
	if err := w.servers.RedisServer().Restart(); err != nil {
		t.Fatal(err)
	}
	for i, m := range w.receive(typeMessage, 20) {
		if m.field("content") != float64(i) {
			t.Errorf("message %d: %s", i, m.Data)
		}
	}
}
