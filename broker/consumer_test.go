package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"im-gateway/codec"
)

// desk stands for the shards: it keeps what is dispatched until the test ends it.
type desk struct {
	mu   sync.Mutex
	held []codec.Delivery
	seen []string // message ids with target, in order of dispatch
	auto codec.End
	err  error
}

func (d *desk) dispatch(_ context.Context, shard int, b *codec.DeliveryBatch) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	if b.GiveUp {
		return nil // it holds on to what it has
	}
	var ends []codec.Ended
	for _, v := range b.Deliveries {
		target := v.Record.Targets[v.Target]
		if codec.ShardOf(target, testShards) != shard {
			panic("wrong shard")
		}
		d.seen = append(d.seen, v.Record.MessageID+"/"+target)
		if d.auto != codec.EndNone {
			ends = append(ends, codec.Ended{Delivery: v, End: d.auto})
			continue
		}
		d.held = append(d.held, v)
	}
	if len(ends) > 0 {
		ends[0].Record.Owner.Ends(ends)
	}
	return nil
}

func (d *desk) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.seen)
}

func (d *desk) saw(id string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, s := range d.seen {
		if s == id {
			n++
		}
	}
	return n
}

// end ends the held delivery of one record and target.
func (d *desk) end(t testing.TB, id string, end codec.End) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, v := range d.held {
		if v.Record.MessageID+"/"+v.Record.Targets[v.Target] == id {
			d.held = append(d.held[:i], d.held[i+1:]...)
			v.Record.Owner.Ends([]codec.Ended{{Delivery: v, End: end}})
			return
		}
	}
	t.Fatalf("%s is not held", id)
}

// endAll ends all that is held.
func (d *desk) endAll(end codec.End) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ends []codec.Ended
	for _, v := range d.held {
		ends = append(ends, codec.Ended{Delivery: v, End: end})
	}
	if d.held = nil; len(ends) > 0 {
		ends[0].Record.Owner.Ends(ends)
	}
}

type running struct {
	*Consumer
	desk  *desk
	ended chan error // gets Run's result
}

// startConsumer runs a consumer, with a producer of its own, until the test ends.
func startConsumer(t testing.TB, opts Options, d *desk, beforeJoin func(context.Context) error) *running {
	t.Helper()
	p := startProducer(t, opts, func(*codec.UpstreamBatch) {})
	c, err := NewConsumer(opts, p, testShards, d.dispatch, beforeJoin)
	if err != nil {
		t.Fatal(err)
	}
	r := &running{c, d, make(chan error, 1)}
	go func() { r.ended <- c.Run(context.Background()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		_ = c.Stop(ctx)
	})
	return r
}

func (r *running) awaitReady(t testing.TB) *running {
	t.Helper()
	select {
	case <-r.Ready():
	case err := <-r.ended:
		t.Fatalf("Run ended: %v", err)
	case <-time.After(testTimeout):
		t.Fatal("not ready")
	}
	return r
}

func committed(c *kfake.Cluster) int64 {
	g := c.GroupInfo("im-gateway-" + testGateway)
	if g == nil {
		return -1
	}
	if o, ok := g.Commits[downTopic][0]; ok {
		return o.Offset
	}
	return -1
}

func message(id, user string) string {
	return fmt.Sprintf(`{"target_user_id":%q,"message_id":%q,"data":{"content":"hi"}}`, user, id)
}

func TestConsumerCommitsBehindTheLastEnd(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := new(desk)
	startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	write(t, c.ListenAddrs(), downTopic, "alice", message("m0", "alice"), "", message("m1", "bob"),
		"", `{"target_user_ids":["alice","bob","carol"],"message_id":"m2","data":1}`)
	waitFor(t, "five deliveries", func() bool { return d.count() == 5 })
	d.mu.Lock()
	for _, v := range d.held { // deliveries are timed from here
		if age := time.Since(time.UnixMilli(v.Record.Stored)); age < -time.Minute || age > testTimeout {
			t.Errorf("%s was stored %s ago", v.Record.MessageID, age)
		}
	}
	d.mu.Unlock()

	d.end(t, "m1/bob", codec.EndDelivered)
	d.end(t, "m2/alice", codec.EndDelivered)
	d.end(t, "m0/alice", codec.EndDelivered)
	waitFor(t, "the commit behind m1", func() bool { return committed(c) == 2 })
	d.end(t, "m2/carol", codec.EndDelivered)
	d.end(t, "m2/bob", codec.EndDelivered)
	waitFor(t, "the commit behind m2", func() bool { return committed(c) == 3 })
}

func TestConsumerStartsAtTheOldestThenAtTheCommitted(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	write(t, c.ListenAddrs(), downTopic, "", message("m0", "alice"), "", message("m1", "alice"))
	d := new(desk)
	r := startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil)
	waitFor(t, "the backlog", func() bool { return d.count() == 2 })
	d.end(t, "m0/alice", codec.EndDelivered)
	if err := r.Stop(within(t, 200*time.Millisecond)); err == nil {
		t.Error("Stop reports no error with a record open")
	}
	if n := committed(c); n != 1 {
		t.Fatalf("committed %d", n)
	}
	again := new(desk)
	startConsumer(t, testOptions(t, c.ListenAddrs()...), again, nil)
	waitFor(t, "the open one", func() bool { return again.count() == 1 })
	if again.saw("m1/alice") != 1 {
		t.Fatalf("%v", again.seen)
	}
	// The old claim's delivery ends now: nobody minds.
	d.end(t, "m1/alice", codec.EndOffline)
}

func TestUndeliveredAndDeadLetters(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := new(desk)
	r := startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	fanOut := `{"target_user_ids":["alice","bob"],"message_id":"m1","data":{"x": 1}}`
	write(t, c.ListenAddrs(), downTopic, "k", "{not json", "", fanOut, "", message("m2", "carol"))
	waitFor(t, "three deliveries", func() bool { return d.count() == 3 })
	d.end(t, "m1/alice", codec.EndDelivered)
	d.end(t, "m1/bob", codec.EndOffline)
	d.end(t, "m2/carol", codec.EndSlowConsumer)
	waitFor(t, "the commit", func() bool { return committed(c) == 3 })

	und := readTopic(t, c.ListenAddrs(), undTopic, 2)
	for i, want := range []struct{ key, value, reason, id string }{
		{"bob", fanOut, "offline", "m1"}, {"carol", message("m2", "carol"), "slow_consumer", "m2"},
	} {
		u := und[i]
		if string(u.Key) != want.key || string(u.Value) != want.value || header(u, "reason") != want.reason ||
			header(u, "gateway_id") != testGateway || header(u, "message_id") != want.id {
			t.Errorf("undelivered %d: %s %s %v", i, u.Key, u.Value, u.Headers)
		}
	}
	dead := readTopic(t, c.ListenAddrs(), deadTopic, 1)[0]
	if string(dead.Key) != "k" || string(dead.Value) != "{not json" || header(dead, "reason") == "" ||
		header(dead, "source_topic") != downTopic || header(dead, "source_partition") != "0" || header(dead, "source_offset") != "0" {
		t.Errorf("dead letter: %s %s %v", dead.Key, dead.Value, dead.Headers)
	}
	for end, want := range map[codec.End]float64{codec.EndDelivered: 1, codec.EndOffline: 1, codec.EndSlowConsumer: 1} {
		if n := testutil.ToFloat64(r.ends[end]); n != want {
			t.Errorf("%v counted %v times", end, n)
		}
	}
	if n := testutil.ToFloat64(r.metrics.deadLetters); n != 1 {
		t.Errorf("%v dead letters counted", n)
	}
}

// While the undelivered topic takes nothing, the offset stays; afterwards nothing is missing.
func TestUndeliveredHoldsTheOffsetUntilItIsStored(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	fault := c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Topic: undTopic, Err: kerr.TopicAuthorizationFailed, Count: -1})
	d := &desk{auto: codec.EndOffline}
	r := startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	var kvs []string
	for i := range 50 {
		kvs = append(kvs, "", message(fmt.Sprint("m", i), "alice"))
	}
	write(t, c.ListenAddrs(), downTopic, kvs...)
	waitFor(t, "failures", func() bool { return testutil.ToFloat64(r.producer.metrics.sideFailed) > 60 })
	if n := committed(c); n > 0 {
		t.Fatalf("committed %d though nothing is stored", n)
	}
	fault.Remove()
	waitFor(t, "the commit", func() bool { return committed(c) == 50 })
	seen := make(map[string]bool)
	for _, u := range readTopic(t, c.ListenAddrs(), undTopic, 50) {
		seen[header(u, "message_id")] = true
	}
	if len(seen) != 50 {
		t.Fatalf("%d of 50 undelivered", len(seen))
	}
}

// A record that its topic refuses for its size must not hold the partition for ever.
func TestTooLargeUndeliveredGoesWithoutItsValue(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	opts := testOptions(t, c.ListenAddrs()...)
	opts.MaxRecordBytes = 2000
	d := &desk{auto: codec.EndOffline}
	startConsumer(t, opts, d, nil).awaitReady(t)
	big := fmt.Sprintf(`{"target_user_id":"alice","message_id":"big","data":%q}`, strings.Repeat("x", 4000))
	write(t, c.ListenAddrs(), downTopic, "", big, "", message("small", "alice"))
	waitFor(t, "the commit", func() bool { return committed(c) == 2 })
	for _, u := range readTopic(t, c.ListenAddrs(), undTopic, 2) {
		switch header(u, "message_id") {
		case "big":
			if u.Value != nil || header(u, "value_omitted") != fmt.Sprint(len(big)) || string(u.Key) != "alice" {
				t.Errorf("%s %s %v", u.Key, u.Value, u.Headers)
			}
		case "small":
			if string(u.Value) != message("small", "alice") {
				t.Errorf("%s", u.Value)
			}
		}
	}
}

func TestFullWindowStopsReading(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	opts := testOptions(t, c.ListenAddrs()...)
	opts.WindowRecords = 10
	d := new(desk)
	startConsumer(t, opts, d, nil).awaitReady(t)
	var kvs []string
	for i := range 30 {
		kvs = append(kvs, "", message(fmt.Sprint("m", i), "alice"))
	}
	write(t, c.ListenAddrs(), downTopic, kvs...)
	waitFor(t, "a full window", func() bool { return d.count() == 10 })
	for i := 1; i < 10; i++ { // all but the oldest: it holds the window
		d.end(t, fmt.Sprintf("m%d/alice", i), codec.EndDelivered)
	}
	select {
	case <-time.After(2 * maxProcessingTime): // sarama drops the partition's subscription meanwhile
	case <-within(t, testTimeout).Done():
	}
	if n := d.count(); n != 10 {
		t.Fatalf("%d dispatched with a full window", n)
	}
	d.end(t, "m0/alice", codec.EndDelivered)
	waitFor(t, "the next ten", func() bool { return d.count() == 20 })
	for i := 10; i < 20; i++ {
		d.end(t, fmt.Sprintf("m%d/alice", i), codec.EndDelivered)
	}
	waitFor(t, "the rest", func() bool { return d.count() == 30 })
	waitFor(t, "the commit", func() bool { return committed(c) == 20 })
}

func TestBeginHoldsBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	write(t, c.ListenAddrs(), downTopic, "", message("m0", "alice"))
	begin := make(chan struct{})
	opts := testOptions(t, c.ListenAddrs()...)
	opts.Begin = begin
	d := new(desk)
	startConsumer(t, opts, d, nil).awaitReady(t)
	if n := d.count(); n != 0 {
		t.Fatalf("%d dispatched before the begin", n)
	}
	close(begin)
	waitFor(t, "the delivery", func() bool { return d.count() == 1 })
}

func TestFencedByAnotherMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	first := startConsumer(t, testOptions(t, c.ListenAddrs()...), new(desk), nil).awaitReady(t)
	startConsumer(t, testOptions(t, c.ListenAddrs()...), new(desk), nil).awaitReady(t)
	select {
	case err := <-first.ended:
		if !errors.Is(err, ErrFenced) {
			t.Fatalf("Run: %v", err)
		}
	case <-time.After(testTimeout):
		t.Fatal("the first is not fenced")
	}
}

// A member that Kafka has forgotten asks before it joins again.
func TestForgottenMemberAsksBeforeItJoins(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	var asked atomic.Int32
	verdict := make(chan error)
	r := startConsumer(t, testOptions(t, c.ListenAddrs()...), new(desk), func(ctx context.Context) error {
		if asked.Add(1) == 1 {
			return nil
		}
		select {
		case err := <-verdict:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}).awaitReady(t)
	c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Heartbeat}, TopLevel: true, Err: kerr.UnknownMemberID})
	verdict <- errors.New("etcd is away") // tried again
	verdict <- ErrFenced
	if err := <-r.ended; !errors.Is(err, ErrFenced) {
		t.Fatalf("Run: %v", err)
	}
	if n := asked.Load(); n != 3 {
		t.Errorf("asked %d times", n)
	}
}

func TestLostSessionReadsOpenRecordsAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := new(desk)
	startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	write(t, c.ListenAddrs(), downTopic, "", message("m0", "alice"), "", message("m1", "alice"))
	waitFor(t, "both", func() bool { return d.count() == 2 })
	d.end(t, "m0/alice", codec.EndDelivered)
	waitFor(t, "the commit", func() bool { return committed(c) == 1 })
	c.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Heartbeat}, TopLevel: true, Err: kerr.IllegalGeneration})
	waitFor(t, "m1 again", func() bool { return d.saw("m1/alice") == 2 })
	d.end(t, "m1/alice", codec.EndDelivered) // the first: too late
	d.end(t, "m1/alice", codec.EndDelivered)
	waitFor(t, "the commit", func() bool { return committed(c) == 2 })
	if d.saw("m0/alice") != 1 {
		t.Error("m0 was dispatched again")
	}
}

func TestRecreatedTopicIsReadFromTheOldest(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := &desk{auto: codec.EndDelivered}
	startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	for i := range 20 {
		write(t, c.ListenAddrs(), downTopic, "", message(fmt.Sprint("old", i), "alice"))
	}
	waitFor(t, "the commit", func() bool { return committed(c) == 20 })
	if err := c.DeleteTopic(downTopic); err != nil {
		t.Fatal(err)
	}
	if err := c.CreateTopic(downTopic, 1, nil); err != nil {
		t.Fatal(err)
	}
	write(t, c.ListenAddrs(), downTopic, "", message("new0", "alice"), "", message("new1", "alice"))
	waitFor(t, "the new ones", func() bool { return d.saw("new0/alice") > 0 && d.saw("new1/alice") > 0 })
	waitFor(t, "the commit", func() bool { return committed(c) == 2 })
}

func TestMissingTopicIsWaitedFor(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	if err := c.DeleteTopic(downTopic); err != nil {
		t.Fatal(err)
	}
	r := startConsumer(t, testOptions(t, c.ListenAddrs()...), new(desk), nil)
	select {
	case <-r.Ready():
		t.Fatal("ready without a topic")
	case err := <-r.ended:
		t.Fatal(err)
	case <-time.After(300 * time.Millisecond):
	}
	if err := c.CreateTopic(downTopic, 1, nil); err != nil {
		t.Fatal(err)
	}
	r.awaitReady(t)
}

func TestStopWaitsForWhatIsOpen(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := new(desk)
	r := startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	write(t, c.ListenAddrs(), downTopic, "", message("m0", "alice"), "", message("m1", "alice"))
	waitFor(t, "both", func() bool { return d.count() == 2 })
	stopped := make(chan error, 1)
	ctx := within(t, testTimeout)
	go func() { stopped <- r.Stop(ctx) }()
	<-r.draining
	write(t, c.ListenAddrs(), downTopic, "", message("m2", "alice"))
	d.end(t, "m1/alice", codec.EndShutdown)
	select {
	case err := <-stopped:
		t.Fatalf("stopped with m0 open: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	d.end(t, "m0/alice", codec.EndDelivered)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if err := <-r.ended; err != nil {
		t.Fatal(err)
	}
	if n := committed(c); n != 2 {
		t.Fatalf("committed %d", n)
	}
	if n := d.count(); n != 2 {
		t.Fatalf("%d dispatched", n)
	}
	if u := readTopic(t, c.ListenAddrs(), undTopic, 1)[0]; header(u, "reason") != "shutdown" {
		t.Errorf("%v", u.Headers)
	}
}

func TestDispatchErrorIsTriedAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	d := &desk{err: errors.New("no shard")}
	startConsumer(t, testOptions(t, c.ListenAddrs()...), d, nil).awaitReady(t)
	write(t, c.ListenAddrs(), downTopic, "", message("m0", "alice"))
	d.mu.Lock()
	d.err = nil
	d.mu.Unlock()
	waitFor(t, "the delivery", func() bool { return d.count() > 0 })
}
