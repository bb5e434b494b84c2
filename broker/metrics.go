package broker

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"im-gateway/codec/latency"
)

// register adds the collectors, or says which name is taken.
func register(r prometheus.Registerer, cs ...prometheus.Collector) error {
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("broker: metrics: %w", err)
		}
	}
	return nil
}

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: "im_gateway_" + name, Help: help})
}

func counters(name, help, label string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "im_gateway_" + name, Help: help}, []string{label})
}

func gauges(name, help string, labels ...string) *prometheus.GaugeVec {
	return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "im_gateway_" + name, Help: help}, labels)
}

func gauge(name, help string, f func() float64) prometheus.GaugeFunc {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "im_gateway_" + name, Help: help}, f)
}

// producerMetrics are the producer's; the children are resolved once, for the hot path.
type producerMetrics struct {
	stored, duplicate, tooLarge, unavailable, unknown prometheus.Counter
	ackSeconds                                        *latency.Histogram

	refusedRecords, refusedBytes, refusedUnavailable prometheus.Counter

	events, eventsDropped, eventsLost prometheus.Counter
	sideStored, sideFailed            prometheus.Counter
}

func newProducerMetrics(p *Producer, r prometheus.Registerer) (producerMetrics, error) {
	answers := counters("producer_records_total",
		"Client messages answered, by result: stored, duplicate (stored by an earlier attempt, offset "+
			"unknown), too_large, unavailable (not stored), unknown.", "result")
	refused := counters("producer_refused_total",
		"Client messages refused before they were handed over, by what was exhausted: records, bytes "+
			"(the caps in flight) or unavailable (Kafka answers nothing).", "reason")
	ack := latency.New("im_gateway_producer_ack_duration_seconds",
		"From handing a client message to the producer to Kafka's answer, a refusal or none in time among them.")
	events := counters("producer_user_events_total",
		"User events, by result: stored, dropped (the queue was full), lost (Kafka refused it or was away).", "result")
	side := counters("producer_side_records_total",
		"Undelivered and dead-letter records, by result of each attempt: stored, failed (it is tried again).", "result")
	m := producerMetrics{
		stored:             answers.WithLabelValues("stored"),
		duplicate:          answers.WithLabelValues("duplicate"),
		tooLarge:           answers.WithLabelValues("too_large"),
		unavailable:        answers.WithLabelValues("unavailable"),
		unknown:            answers.WithLabelValues("unknown"),
		ackSeconds:         ack,
		refusedRecords:     refused.WithLabelValues("records"),
		refusedBytes:       refused.WithLabelValues("bytes"),
		refusedUnavailable: refused.WithLabelValues("unavailable"),
		events:             events.WithLabelValues("stored"),
		eventsDropped:      events.WithLabelValues("dropped"),
		eventsLost:         events.WithLabelValues("lost"),
		sideStored:         side.WithLabelValues("stored"),
		sideFailed:         side.WithLabelValues("failed"),
	}
	return m, register(r, answers, refused, ack, events, side,
		gauge("producer_in_flight_records", "Client messages admitted and not answered.",
			func() float64 { return float64(p.credits.records.Load()) }),
		gauge("producer_in_flight_bytes", "The bytes of the client messages in flight.",
			func() float64 { return float64(p.credits.bytes.Load()) }),
		gauge("producer_queue_batches", "Batches of client messages that wait for sarama to take them.",
			func() float64 { return float64(len(p.queue)) }),
		gauge("producer_queue_batches_bound", "The bound of im_gateway_producer_queue_batches; beyond it the shards keep their records.",
			func() float64 { return float64(cap(p.queue)) }),
		gauge("producer_side_queue_records", "Undelivered, forwarded and dead-letter records that wait for sarama to take them.",
			func() float64 { return float64(len(p.side)) }),
		gauge("producer_side_queue_records_bound", "The bound of im_gateway_producer_side_queue_records; beyond it the consumer keeps them in its window.",
			func() float64 { return float64(cap(p.side)) }),
		gauge("producer_events_queue_records", "User events that wait for sarama to take them.",
			func() float64 { return float64(len(p.events)) }),
		gauge("producer_events_queue_records_bound", "The bound of im_gateway_producer_events_queue_records; beyond it events are dropped and counted.",
			func() float64 { return float64(cap(p.events)) }),
		gauge("producer_in_flight_records_bound", "Beyond so many client messages in flight the shards refuse.",
			func() float64 { return float64(p.opts.MaxInFlightRecords) }),
		gauge("producer_in_flight_bound_bytes", "Beyond so many bytes in flight the shards refuse.",
			func() float64 { return float64(p.opts.MaxInFlightBytes) }),
		gauge("producer_available", "1 while client messages are admitted, 0 in an outage or before the first connection.",
			func() float64 {
				if p.Healthy() {
					return 1
				}
				return 0
			}),
	)
}

// consumerMetrics are the consumer's.
type consumerMetrics struct {
	records, targets, deadLetters, marks, sessions prometheus.Counter
	lookupsFailed, abandoned                       prometheus.Counter
	openUnits                                      prometheus.Gauge
	readBytes                                      prometheus.Counter
	ends                                           *prometheus.CounterVec
	lag, age, open, windowRecords, windowBytes     *prometheus.GaugeVec
}

func newConsumerMetrics(o *Options, r prometheus.Registerer) (consumerMetrics, error) {
	m := consumerMetrics{
		records:     counter("consumer_records_total", "Downstream records read."),
		readBytes:   counter("consumer_read_bytes_total", "Bytes of the keys and values of the downstream records read."),
		targets:     counter("consumer_targets_total", "Deliveries: one per record, target and session, one per record and target without a session, one per record that could not be parsed. Each ends once."),
		deadLetters: counter("consumer_dead_letters_total", "Records that could not be parsed, stored as dead letters."),
		lookupsFailed: counter("consumer_lookups_failed_total",
			"Users who are not here and could not be looked up; their records are undelivered, as moved."),
		abandoned: counter("consumer_abandoned_total",
			"Deliveries that were open when their partition was lost; its next reader reads their records again."),
		openUnits: prometheus.NewGauge(prometheus.GaugeOpts{Name: "im_gateway_consumer_open_deliveries",
			Help: "Deliveries that have not ended."}),
		marks:    counter("consumer_offsets_marked_total", "Times that a partition's offset to commit moved on; it is committed within a second."),
		sessions: counter("consumer_group_joins_total", "Times that a consumer group was joined."),
		ends: counters("consumer_ends_total",
			"Deliveries that ended, by how: delivered, forwarded, or the reason on the undelivered topic.", "end"),
		lag:  gauges("consumer_lag_records", "Records of the partition that are not committed yet, read or not.", "topic", "partition"),
		age:  gauges("consumer_oldest_open_seconds", "Since the partition's oldest record that has not ended was read.", "topic", "partition"),
		open: gauges("consumer_open_records", "Records read and not ended.", "topic", "partition"),
		windowRecords: gauges("consumer_window_records",
			"Records between the oldest that has not ended and the newest read: a restart reads them again.", "topic", "partition"),
		windowBytes: gauges("consumer_window_bytes", "Bytes of the records in a partition's window.", "topic", "partition"),
	}
	return m, register(r, m.records, m.targets, m.deadLetters, m.marks, m.sessions, m.lookupsFailed, m.abandoned,
		m.openUnits, m.ends, m.lag, m.age, m.open, m.readBytes, m.windowRecords, m.windowBytes,
		gauge("consumer_window_records_bound", "Beyond so many records in a partition's window it is not read on.",
			func() float64 { return float64(o.WindowRecords) }),
		gauge("consumer_window_bound_bytes", "Beyond so many bytes in a partition's window it is not read on.",
			func() float64 { return float64(o.WindowBytes) }),
		gauge("consumer_open_deliveries_bound", "Beyond so many open deliveries of one partition it is not read on.",
			func() float64 { return unitsMax }))
}
