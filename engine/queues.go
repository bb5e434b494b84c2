package engine

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"im-gateway/codec/gatewaypb"
)

// reading is one look at all metrics, by name.
type reading map[string]*dto.MetricFamily

func read(from prometheus.Gatherer) (reading, error) {
	families, err := from.Gather()
	if err != nil {
		return nil, fmt.Errorf("read the metrics: %w", err)
	}
	r := make(reading, len(families))
	for _, f := range families {
		r[f.GetName()] = f
	}
	return r, nil
}

// series names metrics whose values are added up: those of a name that have the label, or all of it.
type series struct{ name, label, value string }

// sum adds up a series; there are as many of it as n says.
func (r reading) sum(s series) (sum int64, n int) {
	for _, m := range r[s.name].GetMetric() {
		ok := s.label == ""
		for _, l := range m.GetLabel() {
			ok = ok || l.GetName() == s.label && l.GetValue() == s.value
		}
		if ok {
			sum += int64(m.GetCounter().GetValue() + m.GetGauge().GetValue())
			n++
		}
	}
	return sum, n
}

// queue says where the figures of a queue stand among the metrics.
type queue struct {
	name, unit string
	depth      series
	bound      series // of each that depth adds up
	overflows  series
	whenFull   string
}

func shardQueue(name, what, whenFull string, overflows series) queue {
	return queue{
		name: what, unit: "batches", whenFull: whenFull, overflows: overflows,
		depth: series{"im_gateway_shard_queue_depth", "queue", name},
		bound: series{"im_gateway_shard_queue_bound", "queue", name},
	}
}

// queues lists what ARCHITECTURE.md lists, in the order in which a message meets them.
func queues() []queue {
	plain := func(name string) series { return series{name: name} }
	producer := func(name, unit, what, whenFull string, overflows series) queue {
		bound := name + "_bound"
		if of, ok := strings.CutSuffix(name, "_bytes"); ok {
			bound = of + "_bound_bytes"
		}
		return queue{
			name: what, unit: unit, whenFull: whenFull, overflows: overflows,
			depth: plain("im_gateway_producer_" + name), bound: plain("im_gateway_producer_" + bound),
		}
	}
	messages := shardQueue("publishes", "HTTP to shards", "requests wait", series{})
	messages.unit = "messages"
	calls := shardQueue("control", "calls to shards", "callers wait", series{})
	calls.unit = "calls"
	return []queue{
		{
			name: "connections", unit: "connections", whenFull: "new ones are refused with 503",
			depth: plain("im_gateway_transport_connections"), bound: plain("im_gateway_transport_connections_bound"),
			overflows: series{"im_gateway_transport_handshakes_total", "result", "shed"},
		},
		{
			name: "TLS handshakes", unit: "handshakes", whenFull: "the oldest is closed",
			depth: plain("im_gateway_transport_tls_handshakes_in_flight"), bound: plain("im_gateway_transport_tls_handshakes_in_flight_bound"),
			overflows: series{"im_gateway_transport_tls_handshakes_total", "result", "shed"},
		},
		{
			name: "HTTP connections", unit: "connections", whenFull: "new requests are refused with 503",
			depth: plain("im_gateway_transport_http_connections"), bound: plain("im_gateway_transport_http_connections_bound"),
		},
		shardQueue("ingress", "loops to shards", "the loops keep events and refuse messages with OVERLOADED",
			plain("im_gateway_shard_ingress_full_total")),
		messages,
		producer("queue_batches", "batches", "shards to producer", "the shards keep their records",
			plain("im_gateway_shard_upstream_full_total")),
		producer("in_flight_records", "records", "records in flight", "messages are refused with OVERLOADED",
			series{"im_gateway_producer_refused_total", "reason", "records"}),
		producer("in_flight_bytes", "bytes", "bytes in flight", "messages are refused with OVERLOADED",
			series{"im_gateway_producer_refused_total", "reason", "bytes"}),
		shardQueue("results", "Kafka's answers to shards", "the producer waits", series{}),
		shardQueue("deliveries", "consumer to shards", "the consumer waits, Kafka keeps the rest", series{}),
		{
			name: "waiting for clients to read", unit: "bytes",
			whenFull: "messages are refused with OVERLOADED, the largest debtors closed with 4000",
			depth:    plain("im_gateway_shard_egress_bytes"), bound: plain("im_gateway_shard_egress_bound_bytes"),
			overflows: plain("im_gateway_shard_slow_consumers_total"),
		},
		producer("side_queue_records", "records", "undelivered and forwarded", "the consumer keeps them in its window", series{}),
		producer("events_queue_records", "records", "user events", "dropped",
			series{"im_gateway_producer_user_events_total", "result", "dropped"}),
		{
			name: "presence to Redis", unit: "batches", whenFull: "the shards keep the operations",
			depth: plain("im_gateway_presence_queue_batches"), bound: plain("im_gateway_presence_queue_batches_bound"),
			overflows: plain("im_gateway_shard_presence_full_total"),
		},
		shardQueue("presence", "Redis' answers to shards", "presence waits", series{}),
		{
			name: "kicks to other gateways", unit: "kicks",
			whenFull: "dropped; the other gateway finds out at its next presence refresh",
			depth:    plain("im_gateway_peer_kicks_waiting"), bound: plain("im_gateway_peer_kicks_waiting_bound"),
			overflows: series{"im_gateway_peer_kicks_total", "outcome", "queue_full"},
		},
		calls,
	}
}

// state reads the queue's figures.
func (q *queue) state(r reading) *gatewaypb.Queue {
	depth, n := r.sum(q.depth)
	bound, bounds := r.sum(q.bound)
	if bounds == 1 { // of each, as many as there are
		bound *= int64(max(n, 1))
	}
	overflows, _ := r.sum(q.overflows)
	return &gatewaypb.Queue{
		Name: q.name, Unit: q.unit, Depth: depth, Bound: bound, Overflows: overflows, WhenFull: q.whenFull,
	}
}
