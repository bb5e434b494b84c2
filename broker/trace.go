package broker

import (
	"time"

	"github.com/IBM/sarama"

	"im-gateway/codec"
)

// trace begins the span of a record, where it is traced. header is the context that the record came with;
// what is returned those are told to whom the record is handed on, nil: nothing. d is nil for a dead letter.
func (k *claim) trace(m *sarama.ConsumerMessage, d *codec.Downstream, reason error, header []byte) []byte {
	sampler := k.c.opts.Sampler
	if header == nil && sampler == nil {
		return nil
	}
	in, ok := codec.ParseTraceParent(header)
	switch {
	case !ok:
		header = nil
	case len(header) > codec.TraceParentLen || string(header[:2]) != "00":
		header = in.AppendTraceParent(nil) // a later version, as far as it is known
	}
	if sampler == nil {
		return header
	}
	if !ok && d != nil && d.TraceID != "" {
		in, _ = codec.ParseTraceID(d.TraceID)
	}
	span := sampler.Continue(in, time.Now())
	if span == nil {
		return header
	}
	t := &codec.RecordTrace{
		Span: span, Topic: k.topic, Group: k.c.opts.Group(), Partition: k.partition, Offset: m.Offset, DeadLetter: reason,
	}
	if d != nil {
		t.MessageID = d.MessageID
	}
	k.traces[m.Offset] = t
	return span.AppendTraceParent(make([]byte, 0, codec.TraceParentLen))
}

// traceEnd notes how a delivery of a record ended.
func (k *claim) traceEnd(offset int64, end codec.End) {
	if t := k.traces[offset]; t != nil {
		t.Ends[end]++
	}
}

// endTrace ends the span of a record that has ended.
func (k *claim) endTrace(offset int64) {
	if len(k.traces) == 0 {
		return
	}
	if t := k.traces[offset]; t != nil {
		delete(k.traces, offset)
		k.c.opts.Traced(t)
	}
}

// abandonTraces ends the spans of the records that are open when the partition is lost.
func (k *claim) abandonTraces() {
	for offset, t := range k.traces {
		t.Abandoned = true
		k.endTrace(offset)
	}
}

func appendTraceParent(headers []sarama.RecordHeader, traceParent []byte) []sarama.RecordHeader {
	if len(traceParent) == 0 {
		return headers
	}
	return append(headers, sarama.RecordHeader{Key: headerTraceParent, Value: traceParent})
}
