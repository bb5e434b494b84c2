package broker

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"go.uber.org/goleak"

	"im-gateway/codec"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// go-metrics, which sarama uses, starts one goroutine per process.
		goleak.IgnoreTopFunction("github.com/rcrowley/go-metrics.(*meterArbiter).tick"),
		// sarama's circuit breaker sleeps for 10 s, then ends.
		goleak.IgnoreAnyFunction("github.com/eapache/go-resiliency/breaker.(*Breaker).timer"))
}

const (
	testTimeout = 60 * time.Second
	testShards  = 3
	testGateway = "gw-1"
	upTopic     = "up"
	undTopic    = "und"
	deadTopic   = "dead"
	eventsTopic = "events"
	downTopic   = "down-" + testGateway
)

func testOptions(t testing.TB, brokers ...string) Options {
	t.Helper()
	log := zerolog.Nop()
	if testing.Verbose() {
		log = zerolog.New(zerolog.NewTestWriter(t))
	}
	return Options{
		Brokers: brokers, GatewayID: testGateway, Nonce: 7,
		UpstreamTopic: upTopic, DownstreamPrefix: "down-", UndeliveredTopic: undTopic,
		DeadletterTopic: deadTopic, UserEventsTopic: eventsTopic,
		FlushInterval: time.Millisecond,
		Logger:        log,
	}
}

// newCluster starts a fake Kafka with every topic of one partition, but upTopic of four.
func newCluster(t testing.TB, opts ...kfake.Opt) *kfake.Cluster {
	t.Helper()
	c, err := kfake.NewCluster(append([]kfake.Opt{
		kfake.NumBrokers(1),
		kfake.SeedTopics(4, upTopic),
		kfake.SeedTopics(1, undTopic, deadTopic, eventsTopic, downTopic),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// waitFor polls until cond holds.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(testTimeout)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// answers collects what a producer answers.
type answers struct {
	mu      sync.Mutex
	results map[string][]codec.UpstreamResult // by client message id
	order   []string
	badness []string
}

func (a *answers) take(b *codec.UpstreamBatch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.results == nil {
		a.results = make(map[string][]codec.UpstreamResult)
	}
	for _, u := range b.Records {
		id := string(u.ClientMsgID)
		a.results[id] = append(a.results[id], u.Result)
		a.order = append(a.order, id)
		if want := codec.ShardOf(u.User, testShards); b.Shard != want {
			a.badness = append(a.badness, fmt.Sprintf("%s answered to shard %d, not %d", id, b.Shard, want))
		}
	}
}

func (a *answers) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.order)
}

func (a *answers) of(id string) []codec.UpstreamResult {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.results[id]
}

// startProducer runs a producer until the test ends.
func startProducer(t testing.TB, opts Options, results func(*codec.UpstreamBatch)) *Producer {
	t.Helper()
	p, err := NewProducer(opts, results, testShards)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Run(context.Background()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		_ = p.Close(ctx)
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	select {
	case <-p.Ready():
	case <-time.After(testTimeout):
		t.Fatal("the producer did not connect")
	}
	return p
}

var testBuilder = struct {
	sync.Mutex
	*codec.Builder
}{Builder: codec.NewBuilder(testGateway, 7, nil)}

// newUpstream builds a client's message.
func newUpstream(t testing.TB, user, id, data string) *codec.Upstream {
	t.Helper()
	var m codec.ClientMessage
	frame := fmt.Sprintf(`{"type":"send-message","message_id":%q,"data":%s}`, id, data)
	if err := codec.ParseClient([]byte(frame), &m); err != nil {
		t.Fatal(err)
	}
	testBuilder.Lock()
	defer testBuilder.Unlock()
	return testBuilder.Build(&m, user, codec.MakeSessionID(codec.ShardOf(user, testShards), 0, 1, 1), 1)
}

// publish admits and queues one message; false: it was refused.
func publish(t testing.TB, p *Producer, u *codec.Upstream) (codec.Code, bool) {
	t.Helper()
	if code, _ := p.Admit(u.Size()); code != codec.OK {
		return code, false
	}
	shard := codec.ShardOf(u.User, testShards)
	select {
	case p.Queue(shard) <- &codec.UpstreamBatch{Shard: shard, Records: []*codec.Upstream{u}}:
	case <-time.After(testTimeout):
		t.Fatal("the queue stays full")
	}
	return codec.OK, true
}

// readTopic reads n records of a topic from the beginning.
func readTopic(t testing.TB, brokers []string, topic string, n int) []*kgo.Record {
	t.Helper()
	cl, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	var records []*kgo.Record
	ctx := within(t, testTimeout)
	for len(records) < n {
		f := cl.PollFetches(ctx)
		if err := ctx.Err(); err != nil {
			t.Fatalf("%s: %d of %d records", topic, len(records), n)
		}
		records = append(records, f.Records()...)
	}
	return records
}

// write stores records, keys and values, in a topic.
func write(t testing.TB, brokers []string, topic string, kvs ...string) {
	t.Helper()
	cl, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.DefaultProduceTopic(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	for i := 0; i < len(kvs); i += 2 {
		r := &kgo.Record{Value: []byte(kvs[i+1])}
		if kvs[i] != "" {
			r.Key = []byte(kvs[i])
		}
		if err := cl.ProduceSync(within(t, testTimeout), r).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
}

func header(r *kgo.Record, key string) string {
	for _, h := range r.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}
