//go:build realkafka

// Tests against the real Kafka at IM_TEST_KAFKA (host:port), one broker or more. They make topics of
// their own and remove them.

package broker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/IBM/sarama"

	"im-gateway/codec"
)

// realOptions are options with names of this test's own, and the admin to look with.
func realOptions(t *testing.T) (Options, sarama.ClusterAdmin) {
	t.Helper()
	addr := os.Getenv("IM_TEST_KAFKA")
	if addr == "" {
		t.Fatal("IM_TEST_KAFKA must name a broker, host:port")
	}
	opts := testOptions(t, addr)
	suffix := fmt.Sprintf("-%d", time.Now().UnixNano())
	opts.GatewayID += suffix
	opts.UpstreamTopic += suffix
	opts.UndeliveredTopic += suffix
	opts.DeadletterTopic += suffix
	opts.UserEventsTopic += suffix
	opts.CreateShared = true
	opts.SharedPartitions, opts.DownstreamPartitions = 4, 1

	conf := sarama.NewConfig()
	conf.Version = sarama.MaxVersion
	admin, err := sarama.NewClusterAdmin(opts.Brokers, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, name := range []string{opts.UpstreamTopic, opts.UndeliveredTopic, opts.DeadletterTopic, opts.UserEventsTopic, opts.DownstreamTopic()} {
			_ = admin.DeleteTopic(name)
		}
		_ = admin.Close()
	})
	a, err := NewAdmin(opts)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := a.EnsureTopics(within(t, testTimeout)); err != nil {
			t.Fatal(err)
		}
	}
	return opts, admin
}

func committedAt(t *testing.T, admin sarama.ClusterAdmin, opts Options) int64 {
	t.Helper()
	r, err := admin.ListConsumerGroupOffsets(opts.Group(), map[string][]int32{opts.DownstreamTopic(): {0}})
	if err != nil {
		return -1
	}
	b := r.GetBlock(opts.DownstreamTopic(), 0)
	if b == nil {
		return -1
	}
	return b.Offset
}

func TestRealProducer(t *testing.T) {
	opts, _ := realOptions(t)
	var got answers
	p := startProducer(t, opts, got.take)
	const n = 2000
	for i := range n {
		u := newUpstream(t, fmt.Sprint("user-", i%10), fmt.Sprint(i), `{"a":1}`)
		for {
			if code, ok := publish(t, p, u); ok {
				break
			} else if code != codec.Overloaded {
				t.Fatal(code)
			}
		}
	}
	waitFor(t, "the answers", func() bool { return got.count() == n })
	for _, r := range readTopic(t, opts.Brokers, opts.UpstreamTopic, n) {
		a := got.of(header(r, "client_msg_id"))
		if len(a) != 1 || a[0].Code != codec.OK || a[0].Offset != r.Offset || a[0].Partition != r.Partition {
			t.Fatalf("%+v, stored at %d/%d", a, r.Partition, r.Offset)
		}
	}
	if err := p.Close(within(t, testTimeout)); err != nil {
		t.Error(err)
	}
}

func TestRealConsumer(t *testing.T) {
	opts, admin := realOptions(t)
	d := new(desk)
	r := startConsumer(t, opts, d, nil).awaitReady(t)
	write(t, opts.Brokers, opts.DownstreamTopic(), "", message("m0", "alice"), "", "nonsense", "", message("m2", "bob"))
	waitFor(t, "two deliveries", func() bool { return d.count() == 2 })
	d.end(t, "m2/bob", codec.EndOffline)
	waitFor(t, "the dead letter", func() bool { return len(readTopic(t, opts.Brokers, opts.DeadletterTopic, 1)) == 1 })
	if u := readTopic(t, opts.Brokers, opts.UndeliveredTopic, 1)[0]; string(u.Key) != "bob" || header(u, "reason") != "offline" {
		t.Fatalf("%s %v", u.Key, u.Headers)
	}
	d.end(t, "m0/alice", codec.EndDelivered)
	waitFor(t, "the commit", func() bool { return committedAt(t, admin, opts) == 3 })
	if err := r.Stop(within(t, testTimeout)); err != nil {
		t.Fatal(err)
	}
	write(t, opts.Brokers, opts.DownstreamTopic(), "", message("m3", "alice"))
	again := new(desk)
	startConsumer(t, opts, again, nil)
	waitFor(t, "the next", func() bool { return again.count() == 1 })
	if again.saw("m3/alice") != 1 {
		t.Fatalf("%v", again.seen)
	}
}

func TestRealFencing(t *testing.T) {
	opts, _ := realOptions(t)
	first := startConsumer(t, opts, new(desk), nil).awaitReady(t)
	startConsumer(t, opts, new(desk), nil).awaitReady(t)
	select {
	case err := <-first.ended:
		if !errors.Is(err, ErrFenced) {
			t.Fatalf("Run: %v", err)
		}
	case <-time.After(testTimeout):
		t.Fatal("not fenced")
	}
}

func TestRealRecreatedTopic(t *testing.T) {
	opts, admin := realOptions(t)
	d := &desk{auto: codec.EndDelivered}
	startConsumer(t, opts, d, nil).awaitReady(t)
	for i := range 20 {
		write(t, opts.Brokers, opts.DownstreamTopic(), "", message(fmt.Sprint("old", i), "alice"))
	}
	waitFor(t, "the commit", func() bool { return committedAt(t, admin, opts) == 20 })
	if err := admin.DeleteTopic(opts.DownstreamTopic()); err != nil {
		t.Fatal(err)
	}
	a, err := NewAdmin(opts)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the deletion", func() bool {
		m, err := admin.DescribeTopics([]string{opts.DownstreamTopic()})
		return err == nil && m[0].Err == sarama.ErrUnknownTopicOrPartition
	})
	if err := a.EnsureTopics(within(t, testTimeout)); err != nil {
		t.Fatal(err)
	}
	write(t, opts.Brokers, opts.DownstreamTopic(), "", message("new0", "alice"), "", message("new1", "alice"))
	waitFor(t, "the new ones", func() bool { return d.saw("new0/alice") > 0 && d.saw("new1/alice") > 0 })
	waitFor(t, "the commit", func() bool { return committedAt(t, admin, opts) == 2 })
}

func TestRealStopOfARunContext(t *testing.T) {
	opts, _ := realOptions(t)
	p := startProducer(t, opts, func(*codec.UpstreamBatch) {})
	c, err := NewConsumer(opts, p, testShards, new(desk).dispatch, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	<-c.Ready()
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Run does not end with its context")
	}
}
