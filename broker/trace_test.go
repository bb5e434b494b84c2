package broker

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec"
)

const (
	traceID   = "0123456789abcdef0123456789abcdef"
	sampled   = "00-" + traceID + "-00f067aa0ba902b7-01"
	unsampled = "00-" + traceID + "-00f067aa0ba902b7-00"
)

// traces collects what a consumer tells of traced records.
type traces struct {
	mu   sync.Mutex
	list map[string]*codec.RecordTrace // by message id
}

func (c *traces) add(t *codec.RecordTrace) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.list == nil {
		c.list = map[string]*codec.RecordTrace{}
	}
	if c.list[t.MessageID] != nil {
		panic("told twice")
	}
	c.list[t.MessageID] = t
}

func (c *traces) of(id string) *codec.RecordTrace {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.list[id]
}

// writeTraced stores records, traceparents and values.
func writeTraced(t testing.TB, brokers []string, topic string, pairs ...string) {
	t.Helper()
	cl, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.DefaultProduceTopic(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	for i := 0; i < len(pairs); i += 2 {
		r := &kgo.Record{Value: []byte(pairs[i+1])}
		if pairs[i] != "" {
			r.Headers = []kgo.RecordHeader{{Key: "traceparent", Value: []byte(pairs[i])}}
		}
		if err := cl.ProduceSync(within(t, testTimeout), r).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
}

// byMessage reads n records of a topic, by the header message_id or, where they have none, the value's.
func byMessage(t testing.TB, brokers []string, topic string, n int) map[string]*kgo.Record {
	t.Helper()
	list := map[string]*kgo.Record{}
	for _, r := range readTopic(t, brokers, topic, n) {
		id := header(r, "message_id")
		if id == "" {
			if d, err := codec.ParseDownstream(r.Value, topic, 0, 0); err == nil {
				id = d.MessageID
			}
		}
		list[id] = r
	}
	return list
}

// TestTracedRecords: which records are traced, what is told of them, and what those get to whom they are
// handed on.
func TestTracedRecords(t *testing.T) {
	var told traces
	d := &desk{auto: codec.EndOffline}
	brokers, c := startRouting(t, d, func(o *Options) {
		o.Sampler, o.Traced = codec.NewSampler(0, 1000), told.add
	})
	writeTraced(t, brokers, downTopic,
		sampled, `{"target_user_ids":["nowhere","one@gw-2","two@gw-2,gw-3"],"message_id":"m1","data":1}`,
		unsampled, `{"target_user_ids":["nowhere","one@gw-2"],"message_id":"m2","data":1}`,
		"", `{"target_user_ids":["nowhere","one@gw-2"],"message_id":"m3","trace_id":"`+sampled+`","data":1}`,
		"", `{"target_user_ids":["nowhere","one@gw-2"],"message_id":"m4","trace_id":"`+traceID+`","data":1}`,
		sampled+"x", `{"target_user_ids":["nowhere","one@gw-2"],"message_id":"m5","data":1}`,
		sampled, `not json`)
	balanced(t, c, map[codec.End]int{codec.EndOffline: 5, codec.EndForwarded: 7})

	parent, _ := codec.ParseTraceParent(sampled)
	context := map[string]string{"m2": unsampled}
	for id, want := range map[string][codec.NumEnds]int{
		"m1": {codec.EndOffline: 1, codec.EndForwarded: 3}, "m2": {},
		"m3": {codec.EndOffline: 1, codec.EndForwarded: 1}, "m4": {}, "m5": {}, "": {},
	} {
		got := told.of(id)
		if want == [codec.NumEnds]int{} && id != "" {
			if got != nil {
				t.Errorf("%s is traced: %+v", id, got)
			}
			continue
		}
		if got == nil {
			t.Errorf("%q is not traced", id)
			continue
		}
		if got.Ends != want || got.TraceID != parent.TraceID || got.Parent != parent.SpanID || got.SpanID == parent.SpanID ||
			got.Topic != downTopic || got.Group != "im-gateway-gw-1" || got.Abandoned || (got.DeadLetter != nil) != (id == "") {
			t.Errorf("%q: %+v", id, got)
		}
		context[id] = string(got.AppendTraceParent(nil))
	}
	for topic, n := range map[string]int{"down-gw-2": 6, undTopic: 5, deadTopic: 1} {
		for id, r := range byMessage(t, brokers, topic, n) {
			if got := header(r, "traceparent"); got != context[id] {
				t.Errorf("%s, %q: traceparent %q, want %q", topic, id, got, context[id])
			}
		}
	}
}

// TestTracingOff: without a sampler the context of a record is handed on as it came, and nothing is told.
func TestTracingOff(t *testing.T) {
	d := &desk{auto: codec.EndOffline}
	brokers, c := startRouting(t, d, nil)
	for i, parent := range []string{sampled, unsampled, "", "nonsense", "cc" + sampled[2:] + "-later"} {
		writeTraced(t, brokers, downTopic, parent, fmt.Sprintf(`{"target_user_ids":["nowhere","one@gw-2"],"message_id":"m%d","data":1}`, i))
	}
	balanced(t, c, map[codec.End]int{codec.EndOffline: 5, codec.EndForwarded: 5})
	for _, topic := range []string{"down-gw-2", undTopic} {
		list := byMessage(t, brokers, topic, 5)
		for id, want := range map[string]string{"m0": sampled, "m1": unsampled, "m2": "", "m3": "", "m4": sampled} {
			if got := header(list[id], "traceparent"); got != want {
				t.Errorf("%s: traceparent %q, want %q", topic, got, want)
			}
		}
	}
}

// TestAbandonedRecordsAreTold: what is open when the consumer leaves, and that is all it keeps.
func TestAbandonedRecordsAreTold(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	var told traces
	o := testOptions(t, c.ListenAddrs()...)
	o.Sampler, o.Traced = codec.NewSampler(1, 1000), told.add
	d := new(desk)
	r := startConsumer(t, o, d, nil).awaitReady(t)
	write(t, c.ListenAddrs(), downTopic, "", message("m0", "alice"), "", message("m1", "alice"))
	waitFor(t, "two deliveries", func() bool { return d.count() == 2 })
	d.end(t, "m0/alice", codec.EndDelivered)
	waitFor(t, "the first one is told", func() bool { return told.of("m0") != nil })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_ = r.Stop(ctx)
	if got := told.of("m0"); got.Abandoned || got.Ends[codec.EndDelivered] != 1 || got.Parent != [8]byte{} {
		t.Errorf("%+v", got)
	}
	if got := told.of("m1"); got == nil || !got.Abandoned || got.Ends != [codec.NumEnds]int{} {
		t.Errorf("%+v", got)
	}
}
