package broker

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/IBM/sarama"
	"github.com/prometheus/client_golang/prometheus"

	"im-gateway/codec"
)

const (
	// takeMax is how many records are dispatched together at most.
	takeMax = 256
	// unitsMax is how many deliveries may be open for another record to be read: one record alone has up
	// to codec.MaxTargets, each with a place in memory of its own.
	unitsMax      = 1 << 17
	gaugeInterval = time.Second
	// A side record that could not be stored is tried again after sideBackoffMin, doubled with each
	// failure up to sideBackoffMax.
	sideBackoffMin = 100 * time.Millisecond
	sideBackoffMax = 5 * time.Second
	// omitAfter is the number of refusals for its size after which a side record goes without its
	// value: nobody holds an offset for ever. More than one, since a batch can be what is too large.
	omitAfter = 3
)

// claim reads one partition while this process owns it. Everything but the inbox belongs to its
// goroutine.
type claim struct {
	c         *Consumer
	session   sarama.ConsumerGroupSession
	in        sarama.ConsumerGroupClaim
	topic     string
	partition int32

	inbox   *inbox
	window  *window
	units   int   // deliveries that have not ended
	marked  int64 // the offset last marked to be committed; -1: none
	first   bool  // no record was read yet
	idle    bool  // told to drain, and nothing is open
	byShard []*codec.DeliveryBatch

	backlog []*sideRecord // to be handed to the side producer, in order
	failed  []*sideRecord // wait for the retry timer
	backoff time.Duration // of the next retry; 0: the last attempt succeeded
	retry   *time.Timer

	asking  []route                 // users to be looked up
	looking chan []route            // to the goroutine that does
	again   []codec.Delivery        // for users that came meanwhile
	retried map[codec.Delivery]bool // of them: they are not looked up and delivered to for ever

	traces map[int64]*codec.RecordTrace // of the open records that are traced, by offset

	ends   [][]codec.Ended // swapped with the inbox
	stored []sideResult

	lag, age, open, windowRecords, windowBytes prometheus.Gauge
}

func newClaim(c *Consumer, session sarama.ConsumerGroupSession, in sarama.ConsumerGroupClaim) *claim {
	partition := strconv.Itoa(int(in.Partition()))
	k := &claim{
		c: c, session: session, in: in, topic: in.Topic(), partition: in.Partition(),
		inbox:   newInbox(),
		window:  newWindow(c.opts.WindowRecords, c.opts.WindowBytes),
		marked:  -1,
		first:   true,
		byShard: make([]*codec.DeliveryBatch, c.shards),
		retry:   time.NewTimer(time.Hour),
		looking: make(chan []route),
		retried: map[codec.Delivery]bool{},
		traces:  map[int64]*codec.RecordTrace{},
		lag:     c.metrics.lag.WithLabelValues(in.Topic(), partition),
		age:     c.metrics.age.WithLabelValues(in.Topic(), partition),
		open:    c.metrics.open.WithLabelValues(in.Topic(), partition),

		windowRecords: c.metrics.windowRecords.WithLabelValues(in.Topic(), partition),
		windowBytes:   c.metrics.windowBytes.WithLabelValues(in.Topic(), partition),
	}
	k.retry.Stop()
	c.claims.Add(1)
	return k
}

func (k *claim) close() {
	if k.idle {
		k.c.idle.Add(-1)
	}
	k.c.claims.Add(-1)
	k.c.active.Store(time.Now().UnixMilli())
	k.retry.Stop()
	k.inbox.close()
	k.abandonTraces()
	k.c.metrics.abandoned.Add(float64(k.units))
	k.c.metrics.openUnits.Sub(float64(k.units))
	if k.c.adopted {
		m := &k.c.metrics
		for _, g := range []*prometheus.GaugeVec{m.lag, m.age, m.open, m.windowRecords, m.windowBytes} {
			g.DeletePartialMatch(prometheus.Labels{"topic": k.topic})
		}
		return
	}
	for _, g := range []prometheus.Gauge{k.age, k.open, k.windowRecords, k.windowBytes} {
		g.Set(0)
	}
}

// run reads until the session ends. It returns an error only when a shard cannot be reached.
func (k *claim) run() error {
	ctx := k.session.Context()
	if !k.begin(ctx) {
		return nil
	}
	if k.c.opts.Locate != nil {
		go k.locate(ctx)
	}
	tick := time.NewTicker(gaugeInterval)
	defer tick.Stop()
	drain, draining := k.c.draining, false
	select {
	case <-drain: // before the first record, not beside it
		drain, draining = nil, true
	default:
	}
	for {
		if draining && !k.idle && k.window.open == 0 {
			k.idle = true
			k.c.idle.Add(1)
		}
		var messages <-chan *sarama.ConsumerMessage
		if !draining && !k.full() {
			messages = k.in.Messages()
		}
		var side chan<- *sideRecord
		var head *sideRecord
		if len(k.backlog) > 0 {
			side, head = k.c.producer.side, k.backlog[0]
		}
		var look chan<- []route
		if len(k.asking) > 0 {
			look = k.looking
		}
		if len(k.again) > 0 {
			if err := k.deliverAgain(ctx); err != nil {
				return k.undispatched(ctx, err)
			}
		}
		select {
		case <-ctx.Done():
			k.settle() // what has ended by now is committed and not read again
			return nil
		case m, ok := <-messages:
			if !ok {
				k.settle()
				return nil
			}
			if err := k.take(ctx, m); err != nil {
				return k.undispatched(ctx, err)
			}
		case look <- k.takeAsking():
			k.asking = append([]route(nil), k.asking[len(k.takeAsking()):]...)
		case <-k.inbox.notify:
			k.settle()
		case side <- head:
			k.backlog[0] = nil
			k.backlog = k.backlog[1:]
		case <-k.retry.C:
			k.backlog = append(k.backlog, k.failed...)
			clear(k.failed)
			k.failed = k.failed[:0]
		case <-tick.C:
			k.gauge()
			if k.full() {
				if err := k.giveUp(ctx); err != nil {
					return k.undispatched(ctx, err)
				}
			}
		case <-drain:
			drain, draining = nil, true
		}
	}
}

// undispatched is what run returns when a shard could not be reached.
func (k *claim) undispatched(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("dispatch of partition %d: %w", k.partition, err)
}

// begin waits until dispatching may begin; false: the session ended before.
func (k *claim) begin(ctx context.Context) bool {
	if k.c.opts.Begin == nil {
		return true
	}
	select {
	case <-k.c.opts.Begin:
		return true
	case <-k.c.draining:
		return true
	case <-ctx.Done():
		return false
	}
}

// take reads m and what follows at once, and dispatches it to the shards.
func (k *claim) take(ctx context.Context, m *sarama.ConsumerMessage) error {
	if k.first {
		k.first = false
		if k.in.InitialOffset() == sarama.OffsetOldest {
			// The committed offset, if there is one, is of a topic that was deleted since and created
			// again, or of records that have expired: it would hold commits of lower offsets back.
			k.session.ResetOffset(k.topic, k.partition, m.Offset, "")
		}
	}
	now := time.Now().UnixMilli()
	for n := 1; ; n++ {
		k.read(m, now)
		if n == takeMax || k.full() {
			break
		}
		var ok bool
		select {
		case m, ok = <-k.in.Messages():
		default:
		}
		if !ok {
			break // nothing there now, or the claim has ended and the next receive says so
		}
	}
	return k.send(ctx, false)
}

// full reports whether nothing more may be read.
func (k *claim) full() bool { return k.window.full() || k.units >= unitsMax }

func (k *claim) read(m *sarama.ConsumerMessage, now int64) {
	k.c.metrics.records.Inc()
	k.c.metrics.readBytes.Add(float64(len(m.Key) + len(m.Value)))
	k.c.active.Store(now)
	hookRead(k, m.Offset)
	d, err := codec.ParseDownstream(m.Value, m.Topic, m.Partition, m.Offset)
	hop, traceParent := known(m.Headers)
	traceParent = k.trace(m, d, err, traceParent)
	k.window.add(d, m.Offset, len(m.Key)+len(m.Value), now)
	if err != nil {
		k.opened(1)
		k.backlog = append(k.backlog, k.deadLetter(m, err, traceParent))
		return
	}
	d.Encode(now)
	if !m.Timestamp.IsZero() {
		d.Stored = m.Timestamp.UnixMilli()
	}
	d.Owner, d.Pending, d.Forwarded, d.TraceParent = k.inbox, len(d.Targets), hop, traceParent
	k.opened(len(d.Targets))
	for i, target := range d.Targets {
		k.put(codec.ShardOf(target, k.c.shards), codec.Delivery{Record: d, Target: int32(i)})
	}
}

// opened counts deliveries that are to end.
func (k *claim) opened(n int) {
	k.units += n
	k.c.metrics.targets.Add(float64(n))
	k.c.metrics.openUnits.Add(float64(n))
}

// ended counts one that has.
func (k *claim) ended() {
	k.units--
	k.c.metrics.openUnits.Dec()
}

// settle takes what has ended.
func (k *claim) settle() {
	var routes []route
	k.ends, k.stored, routes = k.inbox.take(k.ends, k.stored)
	for i, batch := range k.ends {
		for _, e := range batch {
			k.end(e)
		}
		k.ends[i] = nil
	}
	for i, s := range k.stored {
		k.sideDone(s)
		k.stored[i] = sideResult{}
	}
	for _, r := range routes {
		k.routed(r)
	}
	if low, ok := k.window.low(); ok && low > k.marked {
		k.marked = low
		k.session.MarkOffset(k.topic, k.partition, low, "")
		k.c.metrics.marks.Inc()
	}
}

func (k *claim) end(e codec.Ended) {
	if len(k.retried) > 0 && e.End != codec.EndNone && e.End != codec.EndOffline {
		delete(k.retried, e.Delivery)
	}
	switch {
	case e.End == codec.EndNone:
		e.Record.Pending += int(e.Sessions) - 1
		k.opened(int(e.Sessions) - 1)
		if e.Elsewhere && k.c.opts.Locate != nil {
			e.Record.Pending++
			k.ask(e.Delivery, true)
		}
	case e.End == codec.EndDelivered:
		k.finish(e.Record, e.End)
	case e.End == codec.EndOffline && k.c.opts.Locate != nil:
		k.ask(e.Delivery, false)
	case e.End > codec.EndDelivered && e.End < codec.NumEnds:
		k.backlog = append(k.backlog, k.undelivered(e, ""))
	default: // no shard says so; yet nothing vanishes
		e.End = codec.EndUnacked
		k.backlog = append(k.backlog, k.undelivered(e, ""))
	}
}

// finish notes that one delivery of a record has ended for good.
func (k *claim) finish(d *codec.Downstream, end codec.End) {
	k.c.ends[end].Inc()
	k.ended()
	if len(k.traces) > 0 {
		k.traceEnd(d.Offset, end)
	}
	k.settled(d)
}

// settled notes that a record waits for one delivery less.
func (k *claim) settled(d *codec.Downstream) {
	d.Pending--
	if d.Pending == 0 {
		k.window.done(d.Offset)
		k.endTrace(d.Offset)
	}
}

func (k *claim) sideDone(s sideResult) {
	r := s.record
	if s.err == nil {
		k.backoff = 0
		k.c.producer.metrics.sideStored.Inc()
		if r.record != nil {
			k.finish(r.record, r.end)
			return
		}
		k.c.metrics.deadLetters.Inc()
		k.ended()
		k.window.done(r.offset)
		k.endTrace(r.offset)
		return
	}
	k.c.producer.metrics.sideFailed.Inc()
	if r.end == codec.EndForwarded { // perhaps it is stored: im-logic sees the same message_id twice then
		k.backlog = append(k.backlog, k.undelivered(codec.Ended{
			Delivery: codec.Delivery{Record: r.record, Target: r.target}, End: codec.EndMoved,
		}, r.gateway))
		return
	}
	if classify(s.err) == codec.MessageTooLarge {
		if r.tooLarge++; r.tooLarge == omitAfter {
			k.c.log.Error().Str("topic", r.topic).Int32("partition", k.partition).Int("bytes", len(r.value)).
				Msg("kafka: a record is too large for the topic and is stored there without its value")
			r.headers = append(r.headers, sarama.RecordHeader{
				Key: headerOmitted, Value: strconv.AppendInt(nil, int64(len(r.value)), 10),
			})
			r.value = nil
		}
	}
	k.failed = append(k.failed, r)
	if len(k.failed) == 1 {
		k.backoff = min(max(2*k.backoff, sideBackoffMin), sideBackoffMax)
		k.retry.Reset(k.backoff)
	}
}

// undelivered is the record that tells im-logic of a delivery that did not reach its target. present
// is the gateway that the user is on, where that is known.
func (k *claim) undelivered(e codec.Ended, present string) *sideRecord {
	d := e.Record
	headers := make([]sarama.RecordHeader, 0, sideHeaders)
	if present != "" {
		headers = append(headers, sarama.RecordHeader{Key: headerPresent, Value: []byte(present)})
	}
	headers = appendTraceParent(headers, d.TraceParent)
	return &sideRecord{
		topic: k.c.opts.UndeliveredTopic,
		key:   []byte(d.Targets[e.Target]),
		value: d.Value,
		headers: append(headers,
			sarama.RecordHeader{Key: headerReason, Value: []byte(e.End.String())},
			sarama.RecordHeader{Key: headerGatewayID, Value: k.c.producer.gatewayID},
			sarama.RecordHeader{Key: headerMessageID, Value: []byte(d.MessageID)}),
		done:   k.inbox.sideDone,
		record: d,
		end:    e.End,
	}
}

// deadLetter is the record that keeps what could not be parsed, byte for byte.
func (k *claim) deadLetter(m *sarama.ConsumerMessage, reason error, traceParent []byte) *sideRecord {
	headers := appendTraceParent(make([]sarama.RecordHeader, 0, sideHeaders), traceParent)
	return &sideRecord{
		topic: k.c.opts.DeadletterTopic,
		key:   m.Key,
		value: m.Value,
		headers: append(headers,
			sarama.RecordHeader{Key: headerReason, Value: []byte(reason.Error())},
			sarama.RecordHeader{Key: headerTopic, Value: []byte(m.Topic)},
			sarama.RecordHeader{Key: headerPartition, Value: strconv.AppendInt(nil, int64(m.Partition), 10)},
			sarama.RecordHeader{Key: headerOffset, Value: strconv.AppendInt(nil, m.Offset, 10)}),
		done:   k.inbox.sideDone,
		offset: m.Offset,
	}
}

func (k *claim) gauge() {
	k.open.Set(float64(k.window.open))
	k.windowRecords.Set(float64(k.window.count))
	k.windowBytes.Set(float64(k.window.bytes))
	if k.window.open > 0 {
		k.c.active.Store(time.Now().UnixMilli())
	}
	var age float64
	if ms := k.window.oldestMS(); ms > 0 {
		age = time.Since(time.UnixMilli(ms)).Seconds()
	}
	k.age.Set(age)
	if low, ok := k.window.low(); ok {
		k.lag.Set(float64(max(0, k.in.HighWaterMarkOffset()-low)))
	}
}
