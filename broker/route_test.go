package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec"
)

// crowd says where users are, by their names: "x@a,b:d" is on gateways a and b, there with device d, "x!" cannot
// be looked up. A device of ? is not known.
func crowd(_ context.Context, users []string) []Located {
	out := make([]Located, len(users))
	for i, u := range users {
		if strings.HasSuffix(u, "!") {
			out[i].Err = errors.New("redis is away")
			continue
		}
		if _, at, ok := strings.Cut(u, "@"); ok {
			for _, g := range strings.Split(at, ",") {
				g, device, _ := strings.Cut(g, ":")
				out[i].Places = append(out[i].Places, Place{GatewayID: g, DeviceID: device, AnyDevice: device == "?"})
			}
		}
	}
	return out
}

func startRouting(t *testing.T, d *desk, change func(*Options)) (brokers []string, c *Consumer) {
	t.Helper()
	cluster := newCluster(t, kfake.SeedTopics(1, "down-gw-2", "down-gw-3"))
	brokers = cluster.ListenAddrs()
	o := testOptions(t, brokers...)
	o.Locate = crowd
	o.Alive = func(g string) bool { return g != "dead" }
	if change != nil {
		change(&o)
	}
	p := startProducer(t, o, func(*codec.UpstreamBatch) {})
	c, err := NewConsumer(o, p, testShards, d.dispatch, nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(context.Background()) }()
	t.Cleanup(func() {
		_ = c.Stop(within(t, testTimeout))
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return brokers, c
}

// balanced waits until nothing is open and checks the ledger.
func balanced(t *testing.T, c *Consumer, want map[codec.End]int) {
	t.Helper()
	waitFor(t, "everything has ended", func() bool {
		return testutil.ToFloat64(c.metrics.targets) > 0 && testutil.ToFloat64(c.metrics.openUnits) == 0
	})
	sum := testutil.ToFloat64(c.metrics.deadLetters) + testutil.ToFloat64(c.metrics.abandoned)
	for end := codec.EndDelivered; end < codec.NumEnds; end++ {
		n := testutil.ToFloat64(c.ends[end])
		sum += n
		if want != nil && int(n) != want[end] {
			t.Errorf("%s: %v, want %d", end, n, want[end])
		}
	}
	if in := testutil.ToFloat64(c.metrics.targets); in != sum {
		t.Errorf("%v deliveries in, %v ended", in, sum)
	}
}

func TestRouting(t *testing.T) {
	d := &desk{auto: codec.EndOffline}
	brokers, c := startRouting(t, d, nil)
	write(t, brokers, downTopic,
		"", `{"target_user_ids":["nowhere","one@gw-2","two@gw-2,gw-3,gw-2","lost!","gone@dead","back@gw-1"],"message_id":"m","data":{"a":[1]},"expire_at":99999999999999,"trace_id":"tr","timestamp":7}`,
		"", `{"target_user_id":"dev@gw-2:d1,gw-3:d2","device_id":"d2","message_id":"n","data":1}`,
		"", `{"target_user_id":"any@gw-2:?","device_id":"d2","message_id":"o","data":1}`, // that gateway knows
		"", `not json`)
	balanced(t, c, map[codec.End]int{codec.EndOffline: 2, codec.EndForwarded: 5, codec.EndMoved: 2})
	if d.saw("m/back@gw-1") != 2 {
		t.Errorf("a user who had come was delivered to %d times, want twice", d.saw("m/back@gw-1"))
	}
	byKey := func(a, b *kgo.Record) int { return bytes.Compare(a.Key, b.Key) } // the shards are dispatched to in any order
	second := readTopic(t, brokers, "down-gw-2", 3)
	slices.SortFunc(second, byKey)
	third := readTopic(t, brokers, "down-gw-3", 2)
	slices.SortFunc(third, byKey)
	if got := string(second[0].Value); got != `{"target_user_id":"any@gw-2:?","device_id":"d2","type":"new-message","message_id":"o","data":1}` {
		t.Errorf("forwarded: %s", got)
	}
	want := `{"target_user_id":"one@gw-2","type":"new-message","message_id":"m","trace_id":"tr","expire_at":99999999999999,"timestamp":7,"data":{"a":[1]}}`
	if got := string(second[1].Value); got != want || header(second[1], "im-hop") != "1" || string(second[1].Key) != "one@gw-2" {
		t.Errorf("forwarded: %s %v", got, second[1].Headers)
	}
	if got := string(third[0].Value); got != `{"target_user_id":"dev@gw-2:d1,gw-3:d2","device_id":"d2","type":"new-message","message_id":"n","data":1}` {
		t.Errorf("forwarded: %s", got)
	}
	present := map[string]string{}
	for _, r := range readTopic(t, brokers, undTopic, 4) {
		present[string(r.Key)] = header(r, "reason") + " " + header(r, "present_gateway")
	}
	for user, want := range map[string]string{"nowhere": "offline ", "lost!": "moved ", "gone@dead": "moved dead", "back@gw-1": "offline "} {
		if present[user] != want {
			t.Errorf("%s: %q, want %q", user, present[user], want)
		}
	}
}

// TestForwardedRecordIsNotForwardedAgain: and one whose target's topic is gone is undelivered.
func TestForwardedRecordIsNotForwardedAgain(t *testing.T) {
	d := &desk{auto: codec.EndOffline}
	brokers, c := startRouting(t, d, nil)
	cl, err := kgo.NewClient(kgo.SeedBrokers(brokers...))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	hopped := &kgo.Record{Topic: downTopic, Value: []byte(`{"target_user_id":"x@gw-2","message_id":"h","data":1}`),
		Headers: []kgo.RecordHeader{{Key: "im-hop", Value: []byte("1")}}}
	if err := cl.ProduceSync(within(t, testTimeout), hopped).FirstErr(); err != nil {
		t.Fatal(err)
	}
	write(t, brokers, downTopic, "", `{"target_user_id":"x@no-topic","message_id":"i","data":1}`)
	balanced(t, c, nil)
	got := map[string]string{}
	for _, r := range readTopic(t, brokers, undTopic, 2) {
		got[header(r, "message_id")] = header(r, "reason") + " " + header(r, "present_gateway")
	}
	if got["h"] != "moved gw-2" || got["i"] != "moved no-topic" {
		t.Errorf("undelivered: %v", got)
	}
}

// TestSplitsBalance: records to users with several sessions, here and elsewhere, at random.
func TestSplitsBalance(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	var mu sync.Mutex
	units := 0
	dispatch := func(_ context.Context, _ int, b *codec.DeliveryBatch) error {
		mu.Lock()
		defer mu.Unlock()
		for _, v := range b.Deliveries {
			n := rng.IntN(4)
			_, at, moved := strings.Cut(v.Record.Targets[v.Target], "@")
			if n == 0 {
				units += max(1, strings.Count(at, "gw"))
				v.Record.Owner.Ends([]codec.Ended{{Delivery: v, End: codec.EndOffline}})
				continue
			}
			units += n + strings.Count(at, "gw")
			var ends []codec.Ended
			if n > 1 || moved {
				ends = append(ends, codec.Ended{Delivery: v, Sessions: int32(n), Elsewhere: moved})
			}
			for range n {
				ends = append(ends, codec.Ended{Delivery: v, End: codec.EndDelivered + codec.End(rng.IntN(5))})
				if ends[len(ends)-1].End == codec.EndOffline {
					ends[len(ends)-1].End = codec.EndUnacked
				}
			}
			v.Record.Owner.Ends(ends)
		}
		return nil
	}
	cluster := newCluster(t, kfake.SeedTopics(1, "down-gw-2", "down-gw-3"))
	o := testOptions(t, cluster.ListenAddrs()...)
	o.Locate, o.Alive = crowd, func(string) bool { return true }
	p := startProducer(t, o, func(*codec.UpstreamBatch) {})
	c, err := NewConsumer(o, p, testShards, dispatch, nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(context.Background()) }()
	var kvs []string
	for i := range 400 {
		kvs = append(kvs, "", fmt.Sprintf(`{"target_user_ids":["a%d","b%d@gw-2","c%d@gw-2,gw-3"],"data":1}`, i, i, i))
	}
	write(t, cluster.ListenAddrs(), downTopic, kvs...)
	waitFor(t, "every record is read", func() bool { return testutil.ToFloat64(c.metrics.records) == 400 })
	balanced(t, c, nil)
	if err := c.Stop(within(t, testTimeout)); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if got := int(testutil.ToFloat64(c.metrics.targets)); got != units {
		t.Errorf("%d deliveries counted, want %d", got, units)
	}
	if n := testutil.ToFloat64(c.metrics.abandoned); n != 0 {
		t.Errorf("%v abandoned", n)
	}
}

// TestFullWindowGivesUpWhatIsOpen: a delivery that nobody ends holds the partition for a bounded time.
func TestFullWindowGivesUpWhatIsOpen(t *testing.T) {
	d := &desk{}
	var mu sync.Mutex
	asked := map[string]int{}
	dispatch := func(ctx context.Context, shard int, b *codec.DeliveryBatch) error {
		if !b.GiveUp {
			return d.dispatch(ctx, shard, b)
		}
		mu.Lock()
		for _, v := range b.Deliveries {
			asked[v.Record.MessageID]++
		}
		mu.Unlock()
		for _, v := range b.Deliveries {
			d.end(t, v.Record.MessageID+"/"+v.Record.Targets[v.Target], codec.EndUnacked)
		}
		return nil
	}
	cluster := newCluster(t)
	o := testOptions(t, cluster.ListenAddrs()...)
	o.WindowRecords = 4
	p := startProducer(t, o, func(*codec.UpstreamBatch) {})
	c, err := NewConsumer(o, p, testShards, dispatch, nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Run(context.Background()) }()
	var kvs []string
	for i := range 6 {
		kvs = append(kvs, "", fmt.Sprintf(`{"target_user_id":"u","message_id":"m%d","data":1}`, i))
	}
	write(t, cluster.ListenAddrs(), downTopic, kvs...)
	waitFor(t, "the last is read", func() bool { return d.saw("m5/u") == 1 })
	mu.Lock()
	if asked["m0"] == 0 || asked["m5"] != 0 {
		t.Errorf("given up: %v", asked)
	}
	mu.Unlock()
	for _, id := range []string{"m4/u", "m5/u"} {
		d.end(t, id, codec.EndDelivered)
	}
	balanced(t, c, map[codec.End]int{codec.EndUnacked: 4, codec.EndDelivered: 2})
	_ = c.Stop(within(t, testTimeout))
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestManyTargetsStopReading: what a claim holds is bounded by its deliveries, too.
func TestManyTargetsStopReading(t *testing.T) {
	d := &desk{}
	brokers, c := startRouting(t, d, nil)
	users := make([]string, codec.MaxTargets)
	for i := range users {
		users[i] = fmt.Sprintf(`"u%d"`, i)
	}
	record := `{"data":1,"target_user_ids":[` + strings.Join(users, ",") + `]}`
	const records = 2 * unitsMax / codec.MaxTargets
	var kvs []string
	for range records {
		kvs = append(kvs, "", record)
	}
	write(t, brokers, downTopic, kvs...)
	waitFor(t, "reading stops", func() bool { return testutil.ToFloat64(c.metrics.openUnits) >= unitsMax })
	time.Sleep(2 * gaugeInterval)
	if n := testutil.ToFloat64(c.metrics.openUnits); n >= unitsMax+codec.MaxTargets {
		t.Errorf("%v deliveries are open, the bound is %d", n, unitsMax)
	}
	waitFor(t, "the rest", func() bool {
		n := d.count() // before they end: what comes in between is for the next look
		d.endAll(codec.EndDelivered)
		return n == records*codec.MaxTargets
	})
	balanced(t, c, map[codec.End]int{codec.EndDelivered: records * codec.MaxTargets})
}
