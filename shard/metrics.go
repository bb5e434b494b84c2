package shard

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"im-gateway/codec"
	"im-gateway/codec/latency"
)

// metrics are shared by the shards of a Set; every counter may be raised from any goroutine.
type metrics struct {
	opened, closed, degraded, expired, slow, panics, unknown prometheus.Counter
	orphanMessages, orphanResults                            prometheus.Counter
	retries, recentUser, recentNode                          prometheus.Counter
	userRate, userFlood, userSessions, unacked               prometheus.Counter
	presenceDropped, presenceSkipped, presenceFull           prometheus.Counter
	ingressFull, upstreamFull, heartbeats                    prometheus.Counter
	deliveries                                               prometheus.Counter
	ends                                                     [codec.NumEnds]prometheus.Counter
	refused                                                  map[codec.Code]prometheus.Counter
	accepted, stored, late                                   prometheus.Counter
	failed                                                   map[codec.Code]prometheus.Counter
	inFlight                                                 atomic.Int64
	roundTime, tickTime                                      prometheus.Histogram
	connectTime, ackTime, deliverTime                        *latency.Histogram
	lifetime                                                 prometheus.Histogram
}

// refusals are the codes that a shard refuses messages with.
var refusals = []codec.Code{codec.Overloaded, codec.BrokerUnavailable, codec.OutcomeUnknown, codec.MessageTooLarge}

func newMetrics(set *Set, reg prometheus.Registerer) (*metrics, error) {
	var failed error
	register := func(c prometheus.Collector) {
		if err := reg.Register(c); err != nil && failed == nil {
			failed = fmt.Errorf("register the shards' metrics: %w", err)
		}
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "im_gateway_shard_" + name, Help: help})
		register(c)
		return c
	}
	// Native buckets are a tenth wide; the others are for a Prometheus that does not take those.
	duration := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "im_gateway_shard_" + name, Help: help, NativeHistogramBucketFactor: 1.1,
			Buckets: []float64{0.00001, 0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1},
		})
		register(h)
		return h
	}
	m := &metrics{
		opened:          counter("sessions_opened_total", "Sessions opened."),
		closed:          counter("sessions_closed_total", "Sessions closed."),
		degraded:        counter("sessions_degraded_total", "Sessions that went live without presence, Redis being too slow."),
		expired:         counter("sessions_expired_total", "Sessions closed because the token had expired."),
		slow:            counter("slow_consumers_total", "Sessions closed because too much, or something for too long, was waiting to be read."),
		panics:          counter("panics_total", "Panics caught in a shard."),
		unknown:         counter("ack_deadlines_total", "Records that had no result by the ack deadline."),
		accepted:        counter("accepted_total", "Client messages accepted; each is stored, fails or is in flight."),
		stored:          counter("stored_total", "Records that Kafka has acknowledged."),
		late:            counter("stored_late_total", "Records that Kafka acknowledged after the client had been told OUTCOME_UNKNOWN."),
		retries:         counter("retries_total", "Messages sent again under the same name, answered as the first was."),
		presenceDropped: counter("presence_dropped_total", "Presence operations dropped because too many were waiting."),
		presenceSkipped: counter("presence_skipped_total", "Presence refreshes left out because the one before was still waiting."),
		presenceFull:    counter("presence_full_total", "Times that presence operations had to wait in a shard."),
		ingressFull:     counter("ingress_full_total", "Times that a loop found a shard's queue full and kept its events."),
		upstreamFull:    counter("upstream_full_total", "Times that records had to wait in a shard for the broker's queue."),
		heartbeats:      counter("heartbeats_total", "Pings asked of the event loops."),
		deliveries:      counter("deliveries_total", "Deliveries taken in: one per record, target and session; one for a target that is not connected."),
		refused:         map[codec.Code]prometheus.Counter{},
		failed:          map[codec.Code]prometheus.Counter{},
		roundTime:       duration("round_duration_seconds", "How long a shard was busy at a time; the sum is all its working time."),
		tickTime:        duration("tick_duration_seconds", "How long a shard was busy with what was due, heartbeats above all, at a time."),
	}
	ends := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_shard_ends_total",
		Help: "How deliveries ended: delivered, or the reason why not. Their sum and im_gateway_shard_deliveries_open are im_gateway_shard_deliveries_total.",
	}, []string{"end"})
	register(ends)
	for end := codec.EndDelivered; end < codec.NumEnds; end++ {
		m.ends[end] = ends.WithLabelValues(end.String())
	}
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_shard_refused_total", Help: "Client messages refused, by code.",
	}, []string{"code"})
	register(refused)
	lost := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_shard_failed_total", Help: "Accepted client messages that were not stored, or not as far as is known, by code.",
	}, []string{"code"})
	register(lost)
	for _, code := range refusals {
		m.refused[code] = refused.WithLabelValues(string(code))
		m.failed[code] = lost.WithLabelValues(string(code))
	}
	m.refused[codec.RateLimited] = refused.WithLabelValues(string(codec.RateLimited))
	limited := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_shard_limited_total",
		Help: "Times that a limit of one user was met: messages refused (user_rate), sessions closed for going on regardless (user_flood) " +
			"or for a newer one (user_sessions), messages refused while too many of the session had no answer (unacked_messages).",
	}, []string{"limit"})
	register(limited)
	m.userRate, m.userFlood = limited.WithLabelValues("user_rate"), limited.WithLabelValues("user_flood")
	m.userSessions, m.unacked = limited.WithLabelValues("user_sessions"), limited.WithLabelValues("unacked_messages")
	forgotten := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_shard_recent_evicted_total",
		Help: "Messages that were forgotten, for retries, before their time: the user sent too many after it, or the node is full.",
	}, []string{"by"})
	register(forgotten)
	m.recentUser, m.recentNode = forgotten.WithLabelValues("user"), forgotten.WithLabelValues("node")
	orphans := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_shard_orphans_total",
		Help: "What came for a session that had ended: a client's message, which is dropped, or a result that nobody is told.",
	}, []string{"what"})
	register(orphans)
	m.orphanMessages, m.orphanResults = orphans.WithLabelValues("message"), orphans.WithLabelValues("result")
	m.lifetime = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "im_gateway_shard_session_duration_seconds", Help: "How long sessions were connected, counted when they end.",
		NativeHistogramBucketFactor: 1.1, Buckets: []float64{1, 10, 60, 300, 1800, 3600, 4 * 3600, 12 * 3600, 24 * 3600},
	})
	register(m.lifetime)
	m.connectTime = latency.New("im_gateway_shard_connect_duration_seconds",
		"From the answer to a handshake to the frame `connected`: claiming presence in Redis, above all.")
	register(m.connectTime)
	m.ackTime = latency.New("im_gateway_shard_ack_duration_seconds",
		"From reading a client message to knowing that Kafka has acknowledged it.")
	m.deliverTime = latency.New("im_gateway_shard_delivery_duration_seconds",
		"From a downstream record's timestamp in Kafka to its bytes in a client's socket. The clocks of who set the timestamp "+
			"and of the gateway are compared: what is negative counts as 0.")
	register(m.ackTime)
	register(m.deliverTime)
	gauge := func(name, help string, f func(*shard) int64) {
		register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "im_gateway_shard_" + name, Help: help},
			func() float64 {
				var sum int64
				for _, s := range set.shards {
					sum += f(s)
				}
				return float64(sum)
			}))
	}
	gauge("sessions", "Sessions held.", func(s *shard) int64 { return s.sessions.Load() })
	gauge("users", "Users with a session.", func(s *shard) int64 { return s.userNum.Load() })
	gauge("sessions_without_presence", "Sessions without an entry in Redis: new ones for a moment, all of them while it is away.",
		func(s *shard) int64 { return s.absent.Load() })
	gauge("presence_waiting", "Presence operations without a result.", func(s *shard) int64 { return s.asking.Load() })
	gauge("presence_waiting_bound", "Beyond so many that could not be handed on, refreshes and releases are dropped.",
		func(*shard) int64 { return maxPendingOps })
	gauge("recent_messages", "Names of accepted messages that are remembered for retries.", func(s *shard) int64 { return s.known.Load() })
	gauge("recent_messages_bound", "How many are remembered at the most (websocket.remembered_messages).",
		func(s *shard) int64 { return int64(s.recent.max) })
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_shard_in_flight", Help: "Records handed to the broker without a result.",
	}, func() float64 { return float64(m.inFlight.Load()) }))
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_shard_egress_bytes", Help: "Bytes that wait to be written to all clients.",
	}, func() float64 { return float64(set.egress.Load()) }))
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_shard_egress_bound_bytes", Help: "Beyond so many bytes the node refuses; 0: no bound.",
	}, func() float64 { return float64(set.rules.Load().NodeEgressBudget) }))
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_shard_deliveries_open", Help: "Deliveries that have not ended.",
	}, func() float64 {
		open := value(m.deliveries)
		for _, end := range m.ends[codec.EndDelivered:] {
			open -= value(end)
		}
		return float64(open)
	}))
	register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_shard_wheel_lag_seconds", Help: "How far the timing wheel that is furthest behind is behind.",
	}, func() float64 {
		var most int64
		for _, s := range set.shards {
			most = max(most, s.lag.Load())
		}
		return (time.Duration(most) * tickLength).Seconds()
	}))
	register(&queueCollector{set: set,
		depth: prometheus.NewDesc("im_gateway_shard_queue_depth", "Batches waiting in a shard's queue, calls in its queues control and publishes.", []string{"shard", "queue"}, nil),
		bound: prometheus.NewDesc("im_gateway_shard_queue_bound", "The bound of each of a shard's queues.", []string{"queue"}, nil),
	})
	return m, failed
}

func (m *metrics) refuse(code codec.Code) {
	if c := m.refused[code]; c != nil {
		c.Inc()
	}
}

// counts are what a shard has counted since it last added it to the metrics: an atomic operation for
// each message or ping would wait for every write before it.
type counts struct {
	stored, late, inFlight, heartbeats int
	recentUser, recentNode             int
	deliveries, egress, accepted       int
	ends                               [codec.NumEnds]int
}

// flushCounts goes before anything is handed on that others could have counted themselves.
func (s *shard) flushCounts() {
	c, m := &s.counts, s.metrics
	if c.inFlight != 0 {
		m.inFlight.Add(int64(c.inFlight))
		c.inFlight = 0
	}
	if c.egress != 0 {
		s.set.egress.Add(int64(c.egress))
		c.egress = 0
	}
	add(m.deliveries, &c.deliveries)
	add(m.accepted, &c.accepted)
	add(m.stored, &c.stored)
	add(m.late, &c.late)
	add(m.heartbeats, &c.heartbeats)
	add(m.recentUser, &c.recentUser)
	add(m.recentNode, &c.recentNode)
	for end := range c.ends {
		add(m.ends[end], &c.ends[end])
	}
	s.connectTime.Flush()
	s.ackTime.Flush()
	s.deliverTime.Flush()
}

func add(c prometheus.Counter, n *int) {
	if *n != 0 {
		c.Add(float64(*n))
		*n = 0
	}
}

// value reads a counter.
func value(c prometheus.Counter) int64 {
	var d dto.Metric
	if err := c.Write(&d); err != nil {
		return 0
	}
	return int64(d.GetCounter().GetValue())
}

// queueCollector reports the depth of every queue of every shard.
type queueCollector struct {
	set          *Set
	depth, bound *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (q *queueCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- q.depth
	ch <- q.bound
}

// Collect implements prometheus.Collector.
func (q *queueCollector) Collect(ch chan<- prometheus.Metric) {
	for i, s := range q.set.shards {
		for _, queue := range []struct {
			name       string
			depth, cap int
		}{
			{"ingress", len(s.ingress), cap(s.ingress)},
			{"results", len(s.results), cap(s.results)},
			{"deliveries", len(s.deliveries), cap(s.deliveries)},
			{"presence", len(s.presence), cap(s.presence)},
			{"control", len(s.control), cap(s.control)},
			{"publishes", len(s.publishes), cap(s.publishes)},
			{"upstream", len(s.upstream), cap(s.upstream)},
		} {
			ch <- prometheus.MustNewConstMetric(q.depth, prometheus.GaugeValue, float64(queue.depth), fmt.Sprint(i), queue.name)
			if i == 0 {
				ch <- prometheus.MustNewConstMetric(q.bound, prometheus.GaugeValue, float64(queue.cap), queue.name)
			}
		}
	}
}
