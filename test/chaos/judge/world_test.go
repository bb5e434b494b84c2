package judge

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"im-gateway/test/chaos/traffic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testTimeout = 60 * time.Second
	upTopic     = "up"
	undTopic    = "undelivered"
	deadTopic   = "dead"
	downPrefix  = "down-"
	ttl         = 500 * time.Millisecond
	messages    = 5 // of each sending user
)

// start is when the invented history began.
var start = time.UnixMilli(1760000000000)

func at(n int) time.Time { return start.Add(time.Duration(n) * time.Second) }

// world is a history: what the servers will hold and what the clients say they saw. New ones are
// healthy; a test puts its defect in before judge.
type world struct {
	t        *testing.T
	records  map[string][][]*kgo.Record // topic -> partition -> records
	presence map[string][2]string       // user -> gateway, session
	etcd     []string                   // ids
	e        Evidence
	// onRedis, when set, is told how to change presence while the judge looks.
	onRedis func(set func(user string, p [2]string))
}

// The cast: alice acknowledges deliveries and is on gw-1; bob does not and is on gw-2, where he came
// to from gw-1; carol went offline.
const (
	alice = iota
	bob
	carol
)

func newWorld(t *testing.T) *world {
	w := &world{t: t, records: map[string][][]*kgo.Record{
		upTopic: make([][]*kgo.Record, 2), undTopic: make([][]*kgo.Record, 1), deadTopic: make([][]*kgo.Record, 1),
		downPrefix + "gw-1": make([][]*kgo.Record, 1), downPrefix + "gw-2": make([][]*kgo.Record, 1),
	}}
	w.presence = map[string][2]string{"alice": {"gw-1", "sa"}, "bob": {"gw-2", "sb2"}}
	w.etcd = []string{"gw-1", "gw-2"}
	w.e = Evidence{
		UpstreamTopic: upTopic, UndeliveredTopic: undTopic, DeadletterTopic: deadTopic, DownstreamPrefix: downPrefix,
		Gateways: []string{"gw-1", "gw-2"}, PresenceTTL: ttl,
	}
	w.e.Logs.Clients = []traffic.ClientLog{
		{User: "alice", Ack: true, Ordered: true, Every: time.Second,
			Connects: []traffic.Connect{{Gateway: "gw-1", Session: "sa", At: at(0)}}},
		{User: "bob", Ordered: true, Every: time.Second,
			Connects:    []traffic.Connect{{Gateway: "gw-1", Session: "sb1", At: at(0)}, {Gateway: "gw-2", Session: "sb2", At: at(4)}},
			Disconnects: []traffic.Disconnect{{Session: "sb1", Code: 4002, At: at(3)}}},
		{User: "carol",
			Connects:    []traffic.Connect{{Gateway: "gw-1", Session: "sc", At: at(0)}},
			Disconnects: []traffic.Disconnect{{Session: "sc", Code: 1000, Ours: true, At: at(1)}}},
	}
	for n := 1; n <= messages; n++ {
		w.message(alice, n, "gw-1")
		w.message(bob, n, bobsGateway(n))
		w.deliver(alice, n, "gw-1", "sa")
		w.deliver(bob, n, bobsGateway(n), map[string]string{"gw-1": "sb1", "gw-2": "sb2"}[bobsGateway(n)])
	}
	w.undelivered(w.produce(carol, 1, "gw-1"), "carol", "offline")
	return w
}

func bobsGateway(n int) string {
	if n < 4 {
		return "gw-1"
	}
	return "gw-2"
}

func (w *world) client(i int) *traffic.ClientLog { return &w.e.Logs.Clients[i] }

// put appends a record and returns its offset.
func (w *world) put(topic string, partition int, key string, value any, at time.Time, headers ...string) int64 {
	b, ok := value.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(value); err != nil {
			w.t.Fatal(err)
		}
	}
	r := &kgo.Record{Topic: topic, Partition: int32(partition), Key: []byte(key), Value: b, Timestamp: at}
	for i := 0; i < len(headers); i += 2 {
		r.Headers = append(r.Headers, kgo.RecordHeader{Key: headers[i], Value: []byte(headers[i+1])})
	}
	p := &w.records[topic][partition]
	*p = append(*p, r)
	return int64(len(*p) - 1)
}

// store puts client i's n-th message on the upstream topic.
func (w *world) store(i, n int, gateway string, when time.Time) int64 {
	user := w.client(i).User
	return w.put(upTopic, i%2, user, map[string]any{
		"user_id": user, "gateway_id": gateway, "client_msg_id": fmt.Sprintf("%s-%d", user, n),
		"data": map[string]int{"seq": n}, "timestamp": when.UnixMilli(),
	}, when)
}

// message is one sent, stored and acknowledged.
func (w *world) message(i, n int, gateway string) {
	c := w.client(i)
	w.sent(i, n)
	c.Acks = append(c.Acks, traffic.Ack{ID: fmt.Sprintf("%s-%d", c.User, n), Status: "success", Topic: upTopic,
		Partition: int32(i % 2), Offset: w.store(i, n, gateway, at(n)), At: at(n)})
}

func (w *world) sent(i, n int) {
	c := w.client(i)
	c.Sent = append(c.Sent, traffic.Sent{Seq: int64(n), ID: fmt.Sprintf("%s-%d", c.User, n), At: at(n),
		Sum: traffic.Sum(fmt.Appendf(nil, `{"seq":%d}`, n))})
}

// produce puts the n-th record for client i on a gateway's topic.
func (w *world) produce(i, n int, gateway string) *kgo.Record {
	user := w.client(i).User
	id := fmt.Sprintf("d-%s-%d", user, n)
	topic := downPrefix + gateway
	offset := w.put(topic, 0, user, map[string]any{"target_user_id": user, "message_id": id, "data": map[string]int{"seq": n}}, at(n))
	w.e.Logs.Produced = append(w.e.Logs.Produced, traffic.Produced{User: user, Seq: int64(n), MessageID: id, Topic: topic, Offset: offset, At: at(n)})
	return w.records[topic][0][offset]
}

func (w *world) push(i, n int, session string) *traffic.Push {
	c := w.client(i)
	c.Pushes = append(c.Pushes, traffic.Push{MessageID: fmt.Sprintf("d-%s-%d", c.User, n), Seq: int64(n),
		Data: fmt.Appendf(nil, `{"seq":%d}`, n), Session: session, At: at(n)})
	return &c.Pushes[len(c.Pushes)-1]
}

func (w *world) deliver(i, n int, gateway, session string) {
	w.produce(i, n, gateway)
	w.push(i, n, session)
}

func (w *world) undelivered(r *kgo.Record, user, reason string) {
	w.put(undTopic, 0, user, r.Value, r.Timestamp, "reason", reason, "message_id", traffic.RecordID(r))
}

// judge brings the servers up with the history and judges.
func (w *world) judge() Verdict {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	opts := []kfake.Opt{kfake.NumBrokers(1)}
	for topic, partitions := range w.records {
		opts = append(opts, kfake.SeedTopics(int32(len(partitions)), topic))
	}
	k, err := kfake.NewCluster(opts...)
	if err != nil {
		w.t.Fatal(err)
	}
	defer k.Close()
	w.e.Brokers = k.ListenAddrs()
	w.fill(ctx)

	r := miniredis.RunT(w.t)
	set := func(user string, p [2]string) { r.HSet(presenceKey+user, "gateway_id", p[0], "session_id", p[1]) }
	for user, p := range w.presence {
		set(user, p)
	}
	if w.onRedis != nil {
		w.onRedis(set)
	}
	w.e.Redis = r.Addr()

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	g := grpc.NewServer()
	etcdserverpb.RegisterKVServer(g, &fakeEtcd{ids: w.etcd})
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	defer func() {
		g.Stop()
		<-served
	}()
	w.e.Etcd = l.Addr().String()

	v, err := Judge(ctx, w.e)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) fill(ctx context.Context) {
	c, err := kgo.NewClient(kgo.SeedBrokers(w.e.Brokers...), kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	for _, partitions := range w.records {
		for _, records := range partitions {
			if err := c.ProduceSync(ctx, records...).FirstErr(); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}

// fakeEtcd answers a range over the registrations.
type fakeEtcd struct {
	etcdserverpb.UnimplementedKVServer
	ids []string
}

func (f *fakeEtcd) Range(context.Context, *etcdserverpb.RangeRequest) (*etcdserverpb.RangeResponse, error) {
	resp := &etcdserverpb.RangeResponse{Header: &etcdserverpb.ResponseHeader{}}
	for _, id := range f.ids {
		resp.Kvs = append(resp.Kvs, &mvccpb.KeyValue{Key: []byte(registration + id)})
	}
	return resp, nil
}
