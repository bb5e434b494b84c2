package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"im-gateway/codec"
)

func TestProducerStoresAndAnswersEachOnce(t *testing.T) {
	c := newCluster(t)
	var got answers
	p := startProducer(t, testOptions(t, c.ListenAddrs()...), got.take)
	const users, each = 10, 60
	values := make(map[string]string)
	for i := range each {
		for u := range users {
			user, id := fmt.Sprintf("user-%d", u), fmt.Sprintf("%d-%d", u, i)
			up := newUpstream(t, user, id, `{"a":1}`)
			values[id] = string(up.Value)
			if code, ok := publish(t, p, up); !ok {
				t.Fatal(code)
			}
		}
	}
	waitFor(t, "all answers", func() bool { return got.count() >= users*each })
	if len(got.badness) > 0 {
		t.Fatal(got.badness)
	}
	records := readTopic(t, c.ListenAddrs(), upTopic, users*each)
	next := make(map[string]int)
	for _, r := range records {
		id := header(r, "client_msg_id")
		results := got.of(id)
		if len(results) != 1 || results[0].Code != codec.OK ||
			results[0].Offset != r.Offset || results[0].Partition != r.Partition {
			t.Fatalf("%s: answers %+v, stored at %d/%d", id, results, r.Partition, r.Offset)
		}
		if string(r.Value) != values[id] {
			t.Fatalf("%s: value %s", id, r.Value)
		}
		if header(r, "type") != "send-message" || header(r, "gateway_id") != testGateway || len(header(r, "traceparent")) != 55 {
			t.Fatalf("%s: headers %v", id, r.Headers)
		}
		user := string(r.Key)
		if want := fmt.Sprintf("%s-%d", strings.TrimPrefix(user, "user-"), next[user]); id != want {
			t.Fatalf("%s stored where %s was expected", id, want)
		}
		next[user]++
	}
	if n := p.credits.records.Load(); n != 0 {
		t.Errorf("%d records still count as in flight", n)
	}
	if n := p.credits.bytes.Load(); n != 0 {
		t.Errorf("%d bytes still count as in flight", n)
	}
	if n := testutil.ToFloat64(p.metrics.stored); n != users*each {
		t.Errorf("%v counted as stored", n)
	}
}

func TestAdmitRefusesAtTheCaps(t *testing.T) {
	opts := testOptions(t, "127.0.0.1:1")
	opts.MaxInFlightRecords, opts.MaxInFlightBytes = 3, 100
	p, err := NewProducer(opts, func(*codec.UpstreamBatch) {}, testShards)
	if err != nil {
		t.Fatal(err)
	}
	if code, after := p.Admit(1); code != codec.BrokerUnavailable || after <= 0 {
		t.Fatalf("before the connection: %q, %d", code, after)
	}
	p.credits.gate.Store(gateOpen)
	for _, tc := range []struct {
		size int
		want codec.Code
	}{{10, codec.OK}, {60, codec.OK}, {60, codec.Overloaded}, {30, codec.OK}, {0, codec.Overloaded}} {
		if code, _ := p.Admit(tc.size); code != tc.want {
			t.Fatalf("Admit(%d) = %q, want %q", tc.size, code, tc.want)
		}
	}
	p.Cancel(2, 70)
	if code, _ := p.Admit(70); code != codec.OK {
		t.Fatalf("after Cancel: %q", code)
	}
	if r, b := p.credits.records.Load(), p.credits.bytes.Load(); r != 2 || b != 100 {
		t.Fatalf("in flight %d records, %d bytes", r, b)
	}
}

func TestProducerClassifiesErrors(t *testing.T) {
	for _, tc := range []struct {
		err  *kerr.Error
		want codec.Code
	}{
		{kerr.MessageTooLarge, codec.Overloaded}, // of its batch: it is small itself
		{kerr.InvalidRecord, codec.BrokerUnavailable},
		{kerr.TopicAuthorizationFailed, codec.BrokerUnavailable},
		{kerr.UnknownServerError, codec.OutcomeUnknown},
		{kerr.OutOfOrderSequenceNumber, codec.OutcomeUnknown},
	} {
		t.Run(tc.err.Message, func(t *testing.T) {
			c := newCluster(t)
			c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: tc.err})
			var got answers
			p := startProducer(t, testOptions(t, c.ListenAddrs()...), got.take)
			publish(t, p, newUpstream(t, "alice", "c-1", `1`))
			waitFor(t, "the answer", func() bool { return got.count() == 1 })
			if r := got.of("c-1")[0]; r.Code != tc.want || r.Offset != -1 {
				t.Fatalf("%+v, want %s", r, tc.want)
			}
			publish(t, p, newUpstream(t, "alice", "c-2", `1`))
			waitFor(t, "the next answer", func() bool { return got.count() == 2 })
			if r := got.of("c-2")[0]; r.Code != codec.OK {
				t.Fatalf("afterwards: %+v", r)
			}
		})
	}
}

func TestProducerRefusesATooLargeRecordBeforeSendingIt(t *testing.T) {
	c := newCluster(t)
	opts := testOptions(t, c.ListenAddrs()...)
	opts.MaxRecordBytes = 1000
	var got answers
	p := startProducer(t, opts, got.take)
	publish(t, p, newUpstream(t, "alice", "big", `"`+strings.Repeat("x", 2000)+`"`))
	publish(t, p, newUpstream(t, "alice", "small", `1`))
	waitFor(t, "both answers", func() bool { return got.count() == 2 })
	if b, s := got.of("big")[0].Code, got.of("small")[0].Code; b != codec.MessageTooLarge || s != codec.OK {
		t.Fatalf("big %q, small %q", b, s)
	}
}

// A response that is lost after the record was stored must not store it twice, nor refuse it.
func TestProducerSurvivesLostResponses(t *testing.T) {
	c := newCluster(t)
	c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Err: kerr.RequestTimedOut, Count: 2})
	var got answers
	p := startProducer(t, testOptions(t, c.ListenAddrs()...), got.take)
	for i := range 20 {
		publish(t, p, newUpstream(t, "alice", fmt.Sprint(i), `1`))
	}
	waitFor(t, "the answers", func() bool { return got.count() == 20 })
	var stored int64
	for _, i := range c.PartitionInfos(upTopic) {
		stored += i.HighWatermark
	}
	if stored != 20 {
		t.Fatalf("%d records stored, want 20", stored)
	}
	for i := range 20 {
		if r := got.of(fmt.Sprint(i)); len(r) != 1 || r[0].Code != codec.OK {
			t.Fatalf("%d: %+v", i, r)
		}
	}
}

// unanswered lets produce requests fail by closing their connection while it is set.
func unanswered(c *kfake.Cluster) *atomic.Bool {
	away := new(atomic.Bool)
	away.Store(true)
	c.ControlKey(int16(kmsg.Produce), func(kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		if away.Load() {
			return nil, errors.New("away"), true
		}
		return nil, nil, false
	})
	return away
}

func TestProducerRefusesInAnOutageAndRecovers(t *testing.T) {
	c := newCluster(t)
	away := unanswered(c)
	opts := testOptions(t, c.ListenAddrs()...)
	opts.UnavailableAfter = 300 * time.Millisecond
	var got answers
	p := startProducer(t, opts, got.take)
	publish(t, p, newUpstream(t, "alice", "c-1", `1`))
	waitFor(t, "the refusal", func() bool {
		code, _ := p.Admit(1)
		if code == codec.OK {
			p.Cancel(1, 1)
		}
		return code == codec.BrokerUnavailable
	})
	if p.Healthy() {
		t.Error("healthy in an outage")
	}
	away.Store(false)
	waitFor(t, "the late success", func() bool { return got.count() == 1 })
	if r := got.of("c-1")[0]; r.Code != codec.OK {
		t.Fatalf("%+v", r)
	}
	if code, ok := publish(t, p, newUpstream(t, "alice", "c-2", `1`)); !ok {
		t.Fatalf("after the outage: %q", code)
	}
	waitFor(t, "the next success", func() bool { return got.count() == 2 })
}

func TestCloseAnswersEverythingWhileKafkaIsAway(t *testing.T) {
	c := newCluster(t)
	unanswered(c)
	var got answers
	opts := testOptions(t, c.ListenAddrs()...)
	p := startProducer(t, opts, got.take)
	const n, batch = 5000, 500 // more than sarama takes: the producer is blocked, the queue not empty
	for i := 0; i < n; i += batch {
		user := fmt.Sprint("user-", i)
		b := &codec.UpstreamBatch{Shard: codec.ShardOf(user, testShards)}
		for j := range batch {
			u := newUpstream(t, user, fmt.Sprint(i+j), `1`)
			if code, _ := p.Admit(u.Size()); code != codec.OK {
				t.Fatal(code)
			}
			b.Records = append(b.Records, u)
		}
		p.Queue(b.Shard) <- b
	}
	waitFor(t, "a blocked producer", func() bool { return len(p.queue) > 0 })
	begun := time.Now()
	if err := p.Close(within(t, 300*time.Millisecond)); err == nil {
		t.Error("Close reports no error though nothing was stored")
	}
	if d := time.Since(begun); d > 20*time.Second {
		t.Errorf("Close took %v", d)
	}
	waitFor(t, "all answers", func() bool { return got.count() == n })
	for i := range n {
		r := got.of(fmt.Sprint(i))
		if len(r) != 1 || r[0].Code != codec.OutcomeUnknown && r[0].Code != codec.BrokerUnavailable {
			t.Fatalf("%d: %+v", i, r)
		}
	}
	if code, _ := p.Admit(1); code != codec.BrokerUnavailable {
		t.Errorf("after Close: %q", code)
	}
}

func TestCloseFlushes(t *testing.T) {
	c := newCluster(t)
	opts := testOptions(t, c.ListenAddrs()...)
	opts.FlushInterval = 200 * time.Millisecond
	var got answers
	p := startProducer(t, opts, got.take)
	publish(t, p, newUpstream(t, "alice", "c-1", `1`))
	p.UserEvent(true, "alice", codec.MakeSessionID(0, 0, 1, 1), "connect", 1)
	if err := p.Close(within(t, testTimeout)); err != nil {
		t.Fatal(err)
	}
	if r := got.of("c-1"); len(r) != 1 || r[0].Code != codec.OK {
		t.Fatalf("%+v", r)
	}
	readTopic(t, c.ListenAddrs(), eventsTopic, 1)
}

func TestProducerWithoutKafkaStops(t *testing.T) {
	p, err := NewProducer(testOptions(t, "127.0.0.1:1"), func(*codec.UpstreamBatch) {}, testShards)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Run(context.Background()) }()
	waitFor(t, "the start", p.started.Load)
	begun := time.Now()
	if err := p.Close(within(t, testTimeout)); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if d := time.Since(begun); d > 20*time.Second {
		t.Errorf("Close took %v", d)
	}
}

func TestUserEvents(t *testing.T) {
	c := newCluster(t)
	p := startProducer(t, testOptions(t, c.ListenAddrs()...), func(*codec.UpstreamBatch) {})
	id := codec.MakeSessionID(1, 0, 1, 1)
	p.UserEvent(true, "alice", id, "connect", 1760000000000)
	p.UserEvent(false, "alice", id, "client", 1760000000001)
	records := readTopic(t, c.ListenAddrs(), eventsTopic, 2)
	for i, want := range []string{
		string(codec.AppendUserEvent(nil, true, "alice", testGateway, id.Name(7), "connect", 1760000000000)),
		string(codec.AppendUserEvent(nil, false, "alice", testGateway, id.Name(7), "client", 1760000000001)),
	} {
		if string(records[i].Key) != "alice" || string(records[i].Value) != want {
			t.Errorf("%s: %s, want %s", records[i].Key, records[i].Value, want)
		}
	}
}

func TestUserEventsAreDroppedWhenTheQueueIsFull(t *testing.T) {
	p, err := NewProducer(testOptions(t, "127.0.0.1:1"), func(*codec.UpstreamBatch) {}, testShards)
	if err != nil {
		t.Fatal(err)
	}
	for range eventsQueue + 5 {
		p.UserEvent(true, "alice", 1, "connect", 1)
	}
	if n := testutil.ToFloat64(p.metrics.eventsDropped); n != 5 {
		t.Fatalf("%v dropped", n)
	}
}

func TestLogins(t *testing.T) {
	for _, mechanism := range []string{SASLPlain, SASLScramSHA256, SASLScramSHA512} {
		t.Run(mechanism, func(t *testing.T) {
			c := newCluster(t, kfake.EnableSASL(), kfake.Superuser(mechanism, "u", "secret"))
			opts := testOptions(t, c.ListenAddrs()...)
			opts.SASL = SASL{Mechanism: mechanism, User: "u", Password: "secret"}
			a, err := NewAdmin(opts)
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Reachable(within(t, testTimeout)); err != nil {
				t.Fatal(err)
			}
			var got answers
			p := startProducer(t, opts, got.take)
			publish(t, p, newUpstream(t, "alice", "c-1", `1`))
			waitFor(t, "the answer", func() bool { return got.count() == 1 })

			opts.SASL.Password = "guess"
			if a, err = NewAdmin(opts); err != nil {
				t.Fatal(err)
			}
			// The fake just hangs up on a wrong password, Kafka says so.
			if err := a.Reachable(within(t, testTimeout)); err == nil || strings.Contains(err.Error(), "guess") {
				t.Fatalf("wrong password: %v", err)
			}
			c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.SASLAuthenticate}, TopLevel: true, Err: kerr.SaslAuthenticationFailed, Count: -1})
			if err := a.Reachable(within(t, testTimeout)); !errors.Is(err, ErrLogin) {
				t.Fatalf("wrong password: %v", err)
			}
			p, err = NewProducer(opts, got.take, testShards)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Run(within(t, testTimeout)); !errors.Is(err, sarama.ErrSASLAuthenticationFailed) {
				t.Fatalf("Run with a wrong password: %v", err)
			}
		})
	}
}

// The partitioner must agree with Java's: these are the vectors of Kafka's own UtilsTest.
func TestPartitionerIsJavas(t *testing.T) {
	opts := testOptions(t, "127.0.0.1:1")
	p := opts.producerConfig(newLink(), 1, 1).Producer.Partitioner(upTopic)
	for key, hash := range map[string]int32{
		"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536,
		"a-little-bit-longer-string":                       -1486304829,
		"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
		"abc": 479470107,
	} {
		k := raw(key)
		for _, n := range []int32{1, 3, 16, 1<<31 - 1} {
			got, err := p.Partition(&sarama.ProducerMessage{Key: &k}, n)
			if want := hash & 0x7fffffff % n; err != nil || got != want {
				t.Errorf("%q of %d: %d, %v, want %d", key, n, got, err, want)
			}
		}
	}
}

func TestOptionsAreValidated(t *testing.T) {
	for name, spoil := range map[string]func(*Options){
		"no brokers":      func(o *Options) { o.Brokers = nil },
		"no gateway":      func(o *Options) { o.GatewayID = "" },
		"no topic":        func(o *Options) { o.DeadletterTopic = "" },
		"bad mechanism":   func(o *Options) { o.SASL = SASL{"OTHER", "u", "p"} },
		"no password":     func(o *Options) { o.SASL = SASL{SASLPlain, "u", ""} },
		"bad compression": func(o *Options) { o.Compression = "rar" },
	} {
		t.Run(name, func(t *testing.T) {
			opts := testOptions(t, "127.0.0.1:1")
			spoil(&opts)
			if _, err := NewProducer(opts, nil, 1); err == nil {
				t.Error("no error")
			}
		})
	}
	if _, err := NewProducer(testOptions(t, "127.0.0.1:1"), nil, 0); err == nil {
		t.Error("no error with 0 shards")
	}
}

func TestCompression(t *testing.T) {
	c := newCluster(t)
	opts := testOptions(t, c.ListenAddrs()...)
	opts.Compression = CompressionLZ4
	var got answers
	p := startProducer(t, opts, got.take)
	u := newUpstream(t, "alice", "c-1", `"`+strings.Repeat("x", 2000)+`"`)
	want := bytes.Clone(u.Value)
	publish(t, p, u)
	if r := readTopic(t, c.ListenAddrs(), upTopic, 1); !bytes.Equal(r[0].Value, want) {
		t.Fatalf("%s", r[0].Value)
	}
	waitFor(t, "the answer", func() bool { return got.count() == 1 })
}
